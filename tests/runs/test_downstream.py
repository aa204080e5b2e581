"""The tables of what models score on tasks: also where scores are undefined or there are few."""

import json

from dskd.runs.downstream import RESULT, downstream_section, print_downstream


def spread(*values: float | None, mean: float | None, sd: float | None) -> dict:
    return {"values": list(values), "mean": mean, "sd": sd, "median": mean}


def of_model(name: str, scores: dict, failed: int = 0) -> dict:
    del name
    return {"lr": 1e-4, "seeds": [0, 1], "failed": failed, "failed_of_all": failed, "trials": 4,
            "scores": scores}  # fmt: skip


def result() -> dict:
    sts = {
        "a": of_model("a", {"dev_spearman": spread(0.5, 0.7, mean=0.6, sd=0.1)}),
        "b": of_model("b", {"dev_spearman": spread(0.5, None, mean=None, sd=None)}, failed=1),
    }
    gaps = [{"first": "a", "second": "b", "mean": None, "sd": None, "interval": None}]
    one = {
        "task": "stsb",
        "metric": "spearman",
        "headline": "dev_spearman",
        "selected_on": "dev",
        "models": sts,
        "comparisons": gaps,
    }
    arc = {"test_macro_f1": spread(0.25, 0.75, mean=0.5, sd=0.35355)}
    two = {
        "task": "classification",
        "metric": "macro_f1",
        "headline": "test_macro_f1",
        "selected_on": "dev",
        "models": {"a": of_model("a", arc)},
        "comparisons": [
            {"first": "a", "second": "b", "mean": 0.125, "sd": 0.25, "interval": [-0.5, 0.75]}
        ],
    }
    pairs = {"blimp": {"a": {"accuracy": 0.75, "random": 0.625, "pairs": 2680}}}
    glue = {"a": {"average": 0.8125, "over": "8 tasks, without WNLI"}}
    return {"tasks": {"sts": one, "arc<": two}, "pairs": pairs, "glue": glue}  # fmt: skip


def test_the_section_of_the_report(tmp_path):
    assert downstream_section(tmp_path) == ""
    (tmp_path / RESULT).write_text(json.dumps(result()))
    page = downstream_section(tmp_path)
    for cell in ("0.6000", "1 (1 of all 4)", "+0.1250", "-0.5000 to +0.7500", "arc&lt;", "0.625",
                 "0.8125", "8 tasks, without WNLI"):  # fmt: skip
        assert cell in page, cell
    assert "sts: reported on the very rows that selected" in page
    assert "arc&lt;: reported" not in page and "arc&lt;, sts" not in page
    assert page.count("<figure><svg ") == 2 and page.count("<table") == 4


def test_the_tables_on_the_terminal(capsys):
    print_downstream(result())
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "spearman" in line and " b " in line)
    assert [cell.strip() for cell in line.split("\u2502")[1:-1]] == [
        "sts", "b", "dev spearman", "-", "-", "-", "2", "0.0001", "1 (1 of all 4)"
    ]  # fmt: skip
    assert "Failed: trials that say the same of every row" in out
