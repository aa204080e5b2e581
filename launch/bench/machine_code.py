"""Loops of compiled GPU code: NVIDIA's SASS, as nvdisasm prints it.

An :class:`Instruction` knows its source lines, from the innermost inlined function outwards. The
loops are the natural ones of the control flow graph, so that blocks which a compiler has moved
behind the end of a function belong to the loop they serve.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Instruction(NamedTuple):
    """One machine instruction.

    Attributes:
        op: the opcode with its modifiers.
        guarded: whether it is executed under a predicate of its own.
        target: the label it may jump to.
        ends: whether the next instruction is not reached from it.
        where: source lines, innermost first.
    """

    op: str
    guarded: bool
    target: str | None
    ends: bool
    where: tuple[str, ...]


@dataclass(frozen=True)
class Loop:
    """What one loop executes in an iteration, the loops inside of it left out.

    ``source`` is where the instruction stands that jumps back: the loop's ``for``. All forms that
    a compiler makes of one loop (unrolled, remainder) have it in common.
    """

    instructions: tuple[Instruction, ...]
    source: tuple[str, ...]

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode begins with one of the prefixes."""
        return sum(instruction.op.startswith(prefixes) for instruction in self.instructions)

    def loads(self) -> list[tuple[Instruction, int]]:
        """Loads from global memory and the bytes a thread gets from each."""
        return [(i, size) for i in self.instructions if (size := _access(i.op, "load"))]

    def stores(self) -> list[tuple[Instruction, int]]:
        """Stores to global memory and the bytes a thread writes with each."""
        return [(i, size) for i in self.instructions if (size := _access(i.op, "store"))]

    @property
    def barriers(self) -> int:
        """Barriers of the whole block of threads."""
        return self.count("BAR.")

    @property
    def transcendental(self) -> int:
        """Instructions of the slow unit: exponentials, logarithms, reciprocals."""
        return self.count("MUFU")


_SASS_OP = {"load": ("LDG.", "LDGSTS."), "store": ("STG.",)}
_SASS_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def _access(op: str, kind: str) -> int:
    """Bytes of a load or store of global memory, 0 for anything else."""
    if not op.startswith(_SASS_OP[kind]):
        return 0
    return next((_SASS_WIDTH[part] for part in op.split(".") if part in _SASS_WIDTH), 4)


class Code:
    """The instructions of one kernel and the positions of its labels."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}

    def loops(self) -> list[Loop]:
        """The loops in the order of their first instructions."""
        starts, after = self._blocks()
        bodies = _natural_loops(after)
        loops = []
        for header in sorted(bodies):
            inner = [b for h, b in bodies.items() if h != header and h in bodies[header]]
            own = bodies[header].difference(*(body for body in inner if header not in body))
            latch = max(block for block in bodies[header] if header in after[block])
            instructions = (i for block in sorted(own) for i in self._block(starts, block))
            loops.append(Loop(tuple(instructions), self._block(starts, latch)[-1].where))
        return loops

    def _block(self, starts: Sequence[int], block: int) -> list[Instruction]:
        return self.instructions[starts[block] : starts[block + 1]]

    def _blocks(self) -> tuple[list[int], list[list[int]]]:
        """First instructions of the basic blocks (and the end), and the blocks after each."""
        count = len(self.instructions)
        leaders = {0, count, *self.labels.values()}
        leaders |= {n + 1 for n, i in enumerate(self.instructions) if i.target or i.ends}
        starts = sorted(leaders)
        block_at = {start: block for block, start in enumerate(starts[:-1])}
        after: list[list[int]] = []
        for block, end in enumerate(starts[1:]):
            last = self.instructions[end - 1]
            reached = [] if last.ends or end == count else [block + 1]
            if last.target in self.labels and self.labels[last.target] in block_at:
                reached.append(block_at[self.labels[last.target]])
            after.append(reached)
        return starts, after


def _natural_loops(after: list[list[int]]) -> dict[int, set[int]]:
    """The blocks of every loop by its header: a block jumped back to by one it dominates."""
    before: list[list[int]] = [[] for _ in after]
    for block, reached in enumerate(after):
        for successor in reached:
            before[successor].append(block)
    dominators = _dominators(after, before)
    bodies: dict[int, set[int]] = {}
    for block, reached in enumerate(after):
        for header in reached:
            # what cannot be reached has no dominators: the trap behind the end of a kernel
            if header not in dominators.get(block, ()):
                continue
            body = bodies.setdefault(header, {header})
            waiting = [block]
            while waiting:
                current = waiting.pop()
                if current not in body:
                    body.add(current)
                    waiting += [b for b in before[current] if b in dominators]
    return bodies


def _dominators(after: list[list[int]], before: list[list[int]]) -> dict[int, set[int]]:
    """For every block that can be reached: the blocks on all ways to it, itself included."""
    reached, waiting = {0}, [0]
    while waiting:
        new = set(after[waiting.pop()]) - reached
        reached |= new
        waiting += new
    dominators = {block: set(reached) for block in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = set.intersection(*(dominators[b] for b in before[block] if b in reached))
            changed |= dominators[block] != (new := common | {block})
            dominators[block] = new
    return dominators


_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_SASS_LABEL = re.compile(r"(\.L_\w+):")
_SASS_JUMP = re.compile(r"(.*?)`\((\.L_\w+)\)")
_SASS_LINE = re.compile(r'\s*//## File "([^"]*)", line (\d+)')


def parse_sass(text: str) -> Code:
    """Read ``nvdisasm -c -gi``."""
    code = Code()
    where: tuple[str, ...] = ()
    lines: list[str] = []
    for line in text.splitlines():
        if match := _SASS_LINE.match(line):
            lines.append(f"{match[1]}:{match[2]}")
        elif match := _SASS_LABEL.match(line):
            code.labels[match[1]] = len(code.instructions)
        elif match := _SASS.match(line):
            where, lines = tuple(lines) or where, []
            guard, op, operands = match.groups()
            jump = _SASS_JUMP.match(operands) if op.startswith("BRA") else None
            # a branch may also have its predicate among its operands
            sure = not guard and not (jump and jump[1])
            ends = sure and op.startswith(("BRA", "EXIT", "RET", "BRX", "JMP"))
            code.instructions.append(Instruction(op, bool(guard), jump and jump[2], ends, where))
    return code
