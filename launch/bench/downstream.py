"""The honest table of small exports on small public tasks, beside a bag of words.

``sample FOLDER OUT`` draws the rows that the sections ``downstream`` of the recipes with small
models are made for: the whole of a file, or so many rows of it by a hash of their texts (the files
are sorted by class). FOLDER has ``banking77/``, ``citation_intent/`` and ``chemprot/``, each with
``train.jsonl.gz``, maybe ``dev.jsonl.gz``, and ``test.jsonl.gz``, ``{"text", "label"}`` a line, and
``blimp/sample.jsonl.gz``. ``table DATA OUT NAME=RESULT.json ...`` scores TF-IDF and a logistic
regression on the rows of DATA, and writes them, and what ``dskd downstream`` found of the models
NAME, as OUT.md and OUT.json.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

ROWS = {
    "banking10": {"train": None, "test": None},
    "banking77": {"train": 2000, "test": 770},
    "citation_intent": {"train": 1000, "dev": None, "test": None},
    "chemprot": {"train": 600, "dev": 200, "test": 500},
}
"""Rows of each file of a task; None: all."""
CLASSES = 10
"""Of banking10: the first intents in the order of their names' code points."""

PAIRS = {"blimp": 1000, "blimp_short": 64}
"""Most characters of a sentence: those of ``blimp_short`` fit into 48 tokens of WID's students."""


def _read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _drawn(rows: list[dict[str, str]], most: int | None) -> list[dict[str, str]]:
    if most is None or len(rows) <= most:
        return rows
    order = sorted(
        range(len(rows)), key=lambda n: (xxhash.xxh64(rows[n]["text"].encode()).intdigest(), n)
    )
    return [rows[n] for n in sorted(order[:most])]


def sample(folder: Path, out: Path) -> None:
    """Write the rows of all tasks below ``out``."""
    for task, files in ROWS.items():
        source = folder / ("banking77" if task == "banking10" else task)
        names = sorted({row["label"] for row in _read(source / "train.jsonl.gz")})
        kept = set(names[:CLASSES] if task == "banking10" else names)
        for name, most in files.items():
            rows = [row for row in _read(source / f"{name}.jsonl.gz") if row["label"] in kept]
            rows = _drawn(rows, most)
            path = out / task / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"text": r["text"], "label": r["label"]}) + "\n" for r in rows]
            path.write_text("".join(lines), encoding="utf-8")
            print(f"{task} {name}: {len(rows)} rows")
    pairs = _read(folder / "blimp" / "sample.jsonl.gz")
    longest = [max(len(pair["sentence_good"]), len(pair["sentence_bad"])) for pair in pairs]
    for name, most in PAIRS.items():
        kept = [json.dumps(p) + "\n" for p, n in zip(pairs, longest, strict=True) if n <= most]
        (out / f"{name}.jsonl").write_text("".join(kept), encoding="utf-8")
        print(f"{name}: {len(kept)} pairs")


def _rows(path: Path) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def anchors(out: Path) -> dict[str, dict[str, float]]:
    """Test scores of a bag of one and two words, by task: accuracy, macro-F1 over all training
    labels, and the share of the largest class of the training rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    found = {}
    for task in ROWS:
        texts, labels = _rows(out / task / "train.jsonl")
        test_texts, test_labels = _rows(out / task / "test.jsonl")
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        model = LogisticRegression(C=10, max_iter=2000)
        model.fit(words.fit_transform(texts), labels)
        said = model.predict(words.transform(test_texts))
        names = sorted(set(labels))
        most = Counter(labels).most_common(1)[0][0]
        f1 = f1_score(test_labels, said, average="macro", labels=names, zero_division=0)
        found[task] = {
            "accuracy": float(accuracy_score(test_labels, said)),
            "macro_f1": float(f1),
            "largest_class": test_labels.count(most) / len(test_labels),
        }
    return found


def _cell(told: Mapping[str, Any], score: str) -> str:
    found = told["scores"][score]
    values = ", ".join(f"{value:.3f}" for value in found["values"])
    failed = f"; {told['failed']} failed" if told["failed"] else ""
    return f"**{found['mean']:.3f}** ({values}), {told['lr']:g}{failed}"


def _headings(task: Mapping[str, Any]) -> list[str]:
    """The score that models are compared by, then those that are shown besides."""
    headline = task["headline"]
    split = headline.split("_")[0]
    names = next(iter(task["models"].values()))["scores"]
    return [headline, *(n for n in names if n.startswith(split) and n != headline)]


def table(bags: Mapping[str, Mapping[str, float]], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: by task the scores of each model, its seeds and rate, then the differences."""
    lines = ["| task | model | mean (seeds), rate | besides |", "|---|---|---|---|"]
    for name, bag in bags.items():
        most = f"largest class {bag['largest_class']:.3f}"
        both = f"accuracy {bag['accuracy']:.3f}, macro-F1 {bag['macro_f1']:.3f}"
        lines.append(f"| {name} | bag of words | {both} | {most} |")
        for of, result in results.items():
            task = result["tasks"][name]
            headline, *others = _headings(task)
            for model, told in task["models"].items():
                besides = [f"{n} {told['scores'][n]['mean']:.3f}" for n in others]
                cell = f"{headline} {_cell(told, headline)}"
                lines.append(f"| {name} | {of}: {model} | {cell} | {'; '.join(besides)} |")
    lines += ["", "| task | difference | mean (seeds) |", "|---|---|---|"]
    for of, result in results.items():
        for name, task in result["tasks"].items():
            for pair in task["comparisons"]:
                values = ", ".join(f"{value:+.3f}" for value in pair["differences"])
                which = f"{of}: {pair['first']} - {pair['second']}"
                lines.append(f"| {name} | {which} | **{pair['mean']:+.3f}** ({values}) |")
    lines += [
        "",
        "| pairs | model | accuracy | the same with random weights |",
        "|---|---|---|---|",
    ]
    for of, result in results.items():
        for name, models in result["pairs"].items():
            for model, told in models.items():
                own = f"{told['accuracy']:.3f} | {told['random']:.3f}"
                lines.append(f"| {name}, {told['pairs']} | {of}: {model} | {own} |")
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> None:
    """Carry out one of the commands of the module's first lines."""
    command, *rest = words or [""]
    if command == "sample":
        sample(Path(rest[0]), Path(rest[1]))
    elif command == "table":
        bags = anchors(Path(rest[0]))
        named = dict(word.split("=", 1) for word in rest[2:])
        results = {of: json.loads(Path(file).read_text("utf-8")) for of, file in named.items()}
        text = table(bags, results)
        Path(f"{rest[1]}.md").write_text(text, encoding="utf-8")
        whole = json.dumps({"bags_of_words": bags, "results": results}, indent=1)
        Path(f"{rest[1]}.json").write_text(whole + "\n", encoding="utf-8")
        print(text, end="")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
