"""Runs of fine-tuning on small tables of labelled rows."""

from pathlib import Path

from dskd.settings.yaml_tree import dump, merge
from tests.equivalence.small import MASKED
from tests.launching import forked

WORDS = {"fruit": "apple pear plum fig", "tree": "oak ash elm fir", "bird": "owl kite rook wren"}
STEPS = 20


def write_table(path: Path, rows: int, salt: int, *, numbers: bool = False) -> None:
    """Sentences of words of one class each; the number of a row is its share of a word."""
    lines = ["y\ttext"]
    for row in range(rows):
        name = list(WORDS)[(row + salt) % 3]
        words = WORDS[name].split()
        text = " ".join(words[(row * k + salt) % 4] for k in range(1, 3 + row % 9))
        y = text.split().count(words[0]) / len(text.split()) if numbers else name
        lines.append(f"{y}\t{text}")
    path.write_text("\n".join(lines) + "\n")


class Tables:
    """Runs on tables of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, rows, salt in (("train", 50, 0), ("valid", 11, 1)):
            write_table(folder / f"{name}.tsv", rows, salt)
            write_table(folder / f"{name}-numbers.tsv", rows, salt, numbers=True)

    def run(self, name: str, ranks: int, *words: str, numbers: bool = False, **changes) -> Path:
        column = {"target": "y"} if numbers else {"label": "y"}

        def source(split: str) -> dict:
            file = f"{split}-numbers.tsv" if numbers else f"{split}.tsv"
            return {"kind": "tsv", "path": str(self.folder / file), **column}

        settings = {
            "seed": 3,
            "out": str(self.folder / name),
            "deepspeed": "zero0",
            "method": {"kind": "finetune", "metric": "loss" if numbers else "accuracy"},
            "data": {
                "objective": "classification",
                "folder": str(self.folder / "data"),
                "sources": [source("train")],
                "validation": [source("valid")],
                "tokenizer": {"kind": "trained", "vocab_size": 320},
                "block_size": 32,
            },
            "model": {"config": MASKED},
            "teacher": None,
            "train": {
                "steps": STEPS, "batch": 8, "micro_batch": 4, "lr": 0.005, "warmup": 1,
                "precision": "fp32",
            },
            "evaluation": {"every": 10, "micro_batch": 2},
            "checkpoint": {"every": 10},
            "until": "train",
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(dump(merge(settings, changes)))
        forked(ranks, str(path), *words)
        return self.folder / name
