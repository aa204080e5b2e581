"""What teachers are worth on labelled rows, against a reference made row by row."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dskd.batch import UNLABELLED
from dskd.errors import CheckpointError
from dskd.methods.panel_summary import (
    FILE,
    PanelSummary,
    answers,
    panel_section,
    read_summary,
    summary_of,
)
from dskd.settings.folders import RunFolder
from dskd.stores.uncertainty import PANEL_CONFIDENCE, PANEL_PRESENT, panel_logits
from dskd.system.files import write_manifest
from tests.batches import batch_of

UNION = list("abcde")
OWN = {"x": ["a", "b", "c"], "y": ["d", "c", "e"]}
MAPS = [torch.tensor([UNION.index(label) for label in own]) for own in OWN.values()]
LABELS = [0, 1, 2, 3, 4, UNLABELLED, 3]
HEARD = [[1, 1], [1, 1], [1, 1], [1, 1], [1, 0], [1, 1], [0, 1]]
TEMPERATURE = 2.0


def panel(seed: int = 0):
    """A batch with the columns of a panel of two, one row a class and more."""
    random = np.random.RandomState(seed)
    rows = len(LABELS)
    batch = batch_of(torch.tensor(LABELS)[:, None])
    columns = {panel_logits(n): torch.from_numpy(3 * random.randn(rows, 3)) for n in range(2)}
    columns[PANEL_CONFIDENCE] = torch.from_numpy(random.rand(rows, 2))
    return replace(batch, columns=columns | {PANEL_PRESENT: torch.tensor(HEARD).bool()})


def summarised(*batches) -> PanelSummary:
    parts = [answers(batch, MAPS, len(UNION), TEMPERATURE) for batch in batches]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    layout = SimpleNamespace(passes=4)
    teachers = [SimpleNamespace(name=n, labels=own, layout=layout) for n, own in OWN.items()]
    return summary_of(found, teachers, MAPS, len(UNION), TEMPERATURE)


def softmax(logits):
    odds = [math.exp(value / TEMPERATURE) for value in logits]
    return [each / sum(odds) for each in odds]


class Row:
    """One row's answers, without a tensor."""

    def __init__(self, columns, row: int) -> None:
        self.label = LABELS[row]
        self.heard = [n for n in range(2) if HEARD[row][n]]
        logits = [columns[panel_logits(n)][row].tolist() for n in range(2)]
        entropies = [-sum(p * math.log(p) for p in softmax(each)) for each in logits]
        self.sure = {
            "passes": columns[PANEL_CONFIDENCE][row].tolist(),
            "logits": [1 - entropy / math.log(3) for entropy in entropies],
        }
        own = [[UNION.index(label) for label in labels] for labels in OWN.values()]
        self.said = [own[n][max(range(3), key=logits[n].__getitem__)] for n in range(2)]
        self.has = [self.label in own[n] for n in range(2)]
        odds = dict.fromkeys(range(5), 0.0)
        for n in self.heard:
            for place, label in enumerate(own[n]):
                odds[label] += math.exp(logits[n][place])
        self.together = max(odds, key=odds.__getitem__)

    def surest(self, by: str) -> int:
        return max(self.heard, key=self.sure[by].__getitem__)

    def margin(self, by: str) -> float:
        first, second = sorted([*(self.sure[by][n] for n in self.heard), 0.0, 0.0])[-1:-3:-1]
        return first - second + 1e-6


def mean(values):
    found = [float(value) for value in values]
    return pytest.approx(sum(found) / len(found), abs=1e-6) if found else None


@pytest.mark.parametrize("seed", range(4))
def test_the_summary_is_that_of_its_rows(seed):
    batch = panel(seed)
    rows = [Row(batch.columns, row) for row in range(len(LABELS))]
    known = [row for row in rows if row.label != UNLABELLED]
    found = summarised(batch)
    assert (found.rows, found.labelled, found.passes) == (7, 6, 4)
    assert found.concatenated == mean(row.together == row.label for row in known)
    for by in ("passes", "logits"):
        choice = found.choice[by]
        assert choice.selection == mean(row.has[row.surest(by)] for row in known)
        assert choice.accuracy == mean(row.said[row.surest(by)] == row.label for row in known)
        assert choice.margin == mean(row.margin(by) for row in rows)
    for n, (name, teacher) in enumerate(found.teachers.items()):
        assert teacher.labels == OWN[name]
        asked = [row for row in known if n in row.heard]
        own = [row for row in asked if row.has[n]]
        assert teacher.rows == len(own) == (3, 3)[n]
        assert teacher.accuracy == mean(row.said[n] == row.label for row in own)
        for by in ("passes", "logits"):
            sure = teacher.confidence[by]
            assert sure.own == mean(row.sure[by][n] for row in own)
            assert sure.foreign == mean(row.sure[by][n] for row in asked if not row.has[n])
            assert sure.every == mean(row.sure[by][n] for row in rows if n in row.heard)


def test_it_is_that_of_all_batches():
    first, second = panel(1), panel(2)
    both, one, other = summarised(first, second), summarised(first), summarised(second)
    assert both.rows == 14
    assert both.concatenated == mean([one.concatenated, other.concatenated])


def test_without_labels_there_are_margins_and_confidences():
    batch = panel()
    found = summarised(replace(batch, labels_N=torch.full_like(batch.labels_N, UNLABELLED)))
    assert found.labelled == 0 and found.concatenated is None
    assert found.choice["passes"].selection is None and found.choice["passes"].margin > 0
    teacher = found.teachers["y"]
    assert teacher.accuracy is None and teacher.confidence["logits"].own is None
    assert teacher.confidence["logits"].every > 0


def written(folder, summary: PanelSummary) -> RunFolder:
    folder.mkdir()
    write_manifest(folder / FILE, summary.model_dump())
    return RunFolder(folder)


def test_the_report_shows_each_panel_once(tmp_path):
    summary = summarised(panel())
    runs = {name: written(tmp_path / name, summary) for name in ("a", "<b>")}
    runs["c"] = written(tmp_path / "c", summarised(panel(1)))
    assert read_summary(runs["a"].path / FILE) == summary
    page = panel_section(runs | {"none": RunFolder(tmp_path / "none")})
    assert page.count("<h2>") == 2 and "What the teachers know: a, &lt;b&gt;</h2>" in page
    assert "4 passes with dropout" in page
    chosen = summary.choice["logits"]
    row = f"<td>by logits</td><td>{chosen.selection:.2%}</td><td>{chosen.accuracy:.2%}</td>"
    assert row in page
    assert f"<td>y</td><td>3</td><td>3</td><td>{summary.teachers['y'].accuracy:.2%}</td>" in page


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": "7"}, "rows"),
        ({"more": 1}, "more"),
        ({"teachers": {"x": {}}}, "teachers.x.labels"),
    ],
    ids=lambda value: "",
)
def test_what_is_not_written_so_is_refused(tmp_path, change, told):
    path = tmp_path / FILE
    write_manifest(path, summarised(panel()).model_dump() | change)
    with pytest.raises(
        CheckpointError, match=f"panel.json: damaged, not as dskd writes it: {told}"
    ):
        read_summary(path)
    path.write_bytes(path.read_bytes().replace(b'"passes": 4', b'"passes": 8'))
    with pytest.raises(CheckpointError, match=r"panel\.json: damaged, its checksum"):
        read_summary(path)
