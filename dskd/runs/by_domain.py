"""What the exported models score on the validation rows of each domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dskd.runs.history import read_object
from dskd.settings.folders import RunFolder
from dskd.system.markup import html_table
from dskd.training.evaluation import ROWS, VALIDATION

_WHOLE = f"{VALIDATION}_"
_PART = f"{VALIDATION}."


def by_domain_section(runs: Mapping[str, RunFolder]) -> str:
    """HTML of the runs whose validation rows are of several domains: of each domain a line a run,
    so that runs stand together; empty where there are none."""
    scored = {
        name: read_object(run.scores, ()) for name, run in runs.items() if run.scores.exists()
    }
    found = {name: (scores, _domains(scores)) for name, scores in scored.items()}
    found = {name: of for name, of in found.items() if of[1]}
    domains = dict.fromkeys(domain for _, own in found.values() for domain in own)
    metrics = dict.fromkeys(key for _, own in found.values() for of in own.values() for key in of)
    if not domains:
        return ""
    rows = [
        [domain, name, *(_cell(own[domain].get(metric)) for metric in metrics)]
        for domain in domains
        for name, (_, own) in found.items()
        if domain in own
    ]
    rows += [
        ["all", name, *(_cell(scores.get(_WHOLE + metric)) for metric in metrics)]
        for name, (scores, _) in found.items()
    ]
    header = ["domain", "run", *(metric.replace("_", " ") for metric in metrics)]
    return "<h2>Scores by domain</h2>\n" + html_table(header, rows)


def _domains(scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The results of each domain, by its name, of what a run's ``scores.json`` holds."""
    last = f"_{ROWS}"
    parts = [key for key in scores if key.startswith(_PART)]
    names = [key.removeprefix(_PART).removesuffix(last) for key in parts if key.endswith(last)]
    metrics = [key.removeprefix(_WHOLE) for key in scores if key.startswith(_WHOLE)]
    return {
        name: {
            m: scores[f"{_PART}{name}_{m}"]
            for m in (ROWS, *metrics)
            if f"{_PART}{name}_{m}" in scores
        }
        for name in names
    }


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else "-"
