"""The packing that an objective has by default, and the padding that is left in batches of rows."""

from pathlib import Path

import numpy as np
import pytest

from dskd.data.loader import Loader
from dskd.data.padding import padding_lines, padding_share
from dskd.data.prepared import _key, open_prepared, prepare
from dskd.data.views import view_for
from dskd.settings.data import Data
from dskd.settings.parsing import parse
from tests.data.conftest import WORDS, settings


@pytest.mark.parametrize(
    ("given", "packing", "packed"),
    [
        ({}, "complete", True),
        ({"objective": "causal"}, "contiguous", True),
        ({"objective": "causal", "packing": None}, "contiguous", True),
        ({"objective": "causal", "packing": "complete"}, "complete", True),
        ({"objective": "masked", "packing": "contiguous"}, "contiguous", True),
        ({"objective": "causal", "questions": {}}, "complete", False),  # as it always was
        ({"objective": "classification"}, "complete", False),
    ],
)
def test_the_default_packing_is_of_the_objective(given: dict, packing: str, packed: bool) -> None:
    read = parse(Data, given)
    assert (read.packing, read.packed) == (packing, packed)
    assert Data(**read.model_dump()) == read  # as it is written beside a run


def test_rows_are_found_again_where_the_default_is_what_was_given(corpus: Path) -> None:
    keys = [
        _key(settings(corpus, objective="causal", **packing), None)
        for packing in ({}, {"packing": "contiguous"}, {"packing": "complete"})
    ]
    assert keys[0] == keys[1] != keys[2]
    assert _key(settings(corpus), None) == _key(settings(corpus, packing="complete"), None)


def long_documents(where: Path) -> None:
    """Documents of one sentence that is a little longer than a row of 32 tokens."""
    texts = [" ".join(WORDS[(n * w) % 16] for w in range(1, 36)) for n in range(1, 160)]
    (where / "corpus.txt").write_text("\n\n".join(texts))


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_share_is_that_of_the_batches_of_many_epochs(tmp_path: Path, micro_batch: int) -> None:
    long_documents(tmp_path)
    data = settings(tmp_path, objective="causal", packing="complete_doc")
    rows = open_prepared(prepare(data)).train
    lengths_R = rows.lengths_B(np.arange(len(rows)))
    view = view_for(data, open_prepared(prepare(data)).tokenizer, seed=1)
    batch = {"batch": 4 * micro_batch, "micro_batch": micro_batch, "rank": 0, "world": 1}
    loader = Loader(rows, view, **batch, seed=1)
    real = held = 0
    for _ in range(600 // micro_batch):
        for sent in loader.next_step():
            mask_BT = sent.batch.mask_BT
            real, held = real + int(mask_BT.sum()), held + mask_BT.numel()
    loader.close()
    share = padding_share(lengths_R, data.block_size, micro_batch)
    assert share == pytest.approx(1 - real / held, abs=0.01) and share > 0.04


def test_a_default_of_causal_rows_leaves_next_to_no_padding(tmp_path: Path) -> None:
    long_documents(tmp_path)
    shares = {}
    for packing in (None, "complete"):
        data = settings(tmp_path, objective="causal", packing=packing)
        rows = open_prepared(prepare(data)).train
        lengths_R = rows.lengths_B(np.arange(len(rows)))
        shares[packing] = padding_share(lengths_R, 32, micro_batch=8)
        lines = padding_lines(lengths_R, data, 8)
        assert lines[0].startswith(f"  padding: {shares[packing]:.1%} of what micro-batches of 8 ")
        assert len(lines) == (1 if packing is None else 2)
    assert shares[None] < 0.01 and shares["complete"] > 0.3
    assert lines[1].startswith(f"warning: data.packing: complete leaves {shares['complete']:.0%} ")
    assert lines[1].endswith("; contiguous leaves next to none")


def test_closed_forms_of_the_share() -> None:
    assert padding_share(np.full(7, 32), 32, 4) == 0
    assert padding_share(np.full(7, 30), 32, 4) == pytest.approx(2 / 32)
    assert padding_share(np.full(7, 30), 30, 4) == 0  # no wider than a row may be
    lengths_R = np.array([8, 24] * 5)  # two rows: as wide as 8 in one case of four
    assert padding_share(lengths_R, 32, 2) == pytest.approx(1 - 16 / (8 / 4 + 24 * 3 / 4))


def test_the_warning_begins_above_a_fifth() -> None:
    packed = Data(objective="causal", packing="contiguous", block_size=40)
    assert len(padding_lines(np.array([32, 40] * 9), packed, 64)) == 1  # 10 %
    last = padding_lines(np.array([10, 40]), packed, 64)[1]  # as of sources of a line each
    assert last.startswith("warning: data.block_size: 40 leaves ") and "; fewer leave less" in last
