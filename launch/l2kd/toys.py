"""Three small tasks of made-up words, to see in minutes what a way to learn them in turn forgets.

    python launch/l2kd/toys.py FOLDER [--noise 0.3] [--seed 1] [--rows 1500] [--tests 200]

``rev`` asks for four words in the opposite order, ``maj`` for the word that stands most often among
seven, ``shift`` for the word behind each of four. ``FOLDER/TASK-train.jsonl`` has ``rows`` rows, in
a share ``noise`` of which, drawn by chance, the answer is that of another row and wrong;
``FOLDER/TASK-test.jsonl`` has ``tests`` others, all right. ``FOLDER/tokenizer`` makes each word a
token: 15 of the tasks and of the questions, and the special ones. The same arguments give the
same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from random import Random

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from dskd.system.files import write_atomic

WORDS = tuple("abcdefgh")
COUNTED = tuple("wxyz")
"""Those of which there is a majority."""
QUESTIONS = {"rev": "reverse", "maj": "majority", "shift": "next"}
SPECIAL = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}


def example(task: str, random: Random) -> tuple[str, str]:
    """A context of the task and its right answer, words with a space between them."""
    if task == "maj":
        while True:
            words = random.choices(COUNTED, k=7)
            (first, most), *others = Counter(words).most_common()
            if not others or others[0][1] < most:
                return " ".join(words), first
    words = random.choices(WORDS, k=4)
    after = {word: WORDS[(place + 1) % len(WORDS)] for place, word in enumerate(WORDS)}
    answer = words[::-1] if task == "rev" else [after[word] for word in words]
    return " ".join(words), " ".join(answer)


def rows(task: str, count: int, random: Random, seen: set[str]) -> list[dict[str, str]]:
    """So many questions of a task whose contexts are not among those seen, which they join."""
    found = []
    while len(found) < count:
        context, answer = example(task, random)
        if context not in seen:
            seen.add(context)
            found.append({"context": context, "question": QUESTIONS[task], "answer": answer})
    return found


def with_noise(found: list[dict[str, str]], noise: float, random: Random) -> list[dict[str, str]]:
    """The rows, a share of which has the answer of another row that is not its own."""
    wrong = set(random.sample(range(len(found)), round(noise * len(found))))
    noisy = []
    for place, row in enumerate(found):
        answer = row["answer"]
        while place in wrong and answer == row["answer"]:
            answer = random.choice(found)["answer"]
        noisy.append({**row, "answer": answer})
    return noisy


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word; any other word is unknown."""
    words = [*SPECIAL.values(), *WORDS, *COUNTED, *QUESTIONS.values()]
    model = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, SPECIAL["unk_token"]))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL)


def write(folder: Path, *, noise: float, seed: int, count: int = 1500, tests: int = 200) -> None:
    """All files of the folder; the tokenizer comes last."""
    for task in QUESTIONS:
        seen: set[str] = set()
        random = Random(f"{task} {seed}")
        parts = {"test": rows(task, tests, random, seen), "train": rows(task, count, random, seen)}
        parts["train"] = with_noise(parts["train"], noise, random)
        for part, found in parts.items():
            lines = "".join(json.dumps(row) + "\n" for row in found)
            write_atomic(folder / f"{task}-{part}.jsonl", lines.encode())
    tokenizer().save_pretrained(folder / "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--noise", type=float, default=0.0, help="share of wrong training rows")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1500, help="training rows of each task")
    parser.add_argument("--tests", type=int, default=200, help="test rows of each task")
    words = parser.parse_args()
    if not 0 <= words.noise < 1:
        parser.error(f"--noise: {words.noise:g} is no share below 1")
    write(words.folder, noise=words.noise, seed=words.seed, count=words.rows, tests=words.tests)


if __name__ == "__main__":
    main()
