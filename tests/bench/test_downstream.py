"""launch/bench/downstream.py draws the rows of its tasks and writes down what was found of them."""

import gzip
import json

from launch.bench import downstream


def test_rows_are_drawn_by_their_texts(tmp_path):
    """As many as are asked for, of all classes, whatever the order of the file."""
    rows = [{"text": f"text {n}", "label": f"class {n // 1000:02d}"} for n in range(12_000)]
    pairs = [{"sentence_good": "a" * n, "sentence_bad": "b", "UID": "x"} for n in (64, 65)]
    for task, files in (("banking77", 2), ("citation_intent", 3), ("chemprot", 3)):
        for name in ("train", "test", "dev")[:files]:
            path = tmp_path / "in" / task / f"{name}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (tmp_path / "in/blimp").mkdir()
    text = "\n".join(map(json.dumps, pairs))
    (tmp_path / "in/blimp/sample.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    downstream.sample(tmp_path / "in", tmp_path / "out")
    for task, files in downstream.ROWS.items():
        for name, most in files.items():
            texts, labels = downstream._rows(tmp_path / "out" / task / f"{name}.jsonl")
            classes = downstream.CLASSES if task == "banking10" else 12
            assert len(texts) == (most or 1000 * classes) and len(set(labels)) == classes
    assert len((tmp_path / "out/blimp.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "out/blimp_short.jsonl").read_text().splitlines()) == 1


def test_the_table_names_whose_models_they_are():
    scores = {"test_accuracy": {"values": [0.5, 0.75], "mean": 0.625}}
    told = {"scores": scores, "lr": 0.001, "failed": 1}
    pair = {"first": "a", "second": "b", "differences": [0.1, -0.2], "mean": -0.05}
    task = {"headline": "test_accuracy", "models": {"a": told}, "comparisons": [pair]}
    found = {"pairs": 2, "accuracy": 0.5, "random": 0.25}
    results = {"mine": {"tasks": {"t": task}, "pairs": {"p": {"a": found}}}}
    bags = {"t": {"accuracy": 0.9, "macro_f1": 0.8, "largest_class": 0.1}}
    lines = downstream.table(bags, results).splitlines()
    assert "| t | bag of words | accuracy 0.900, macro-F1 0.800 | largest class 0.100 |" in lines
    cell = "test_accuracy **0.625** (0.500, 0.750), 0.001; 1 failed"
    assert f"| t | mine: a | {cell} |  |" in lines
    assert "| t | mine: a - b | **-0.050** (+0.100, -0.200) |" in lines
    assert "| p, 2 | mine: a | 0.500 | 0.250 |" in lines
