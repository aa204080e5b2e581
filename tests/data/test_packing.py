"""Packing: the original's slices, nothing lost, and pieces packed like the whole."""

import numpy as np
import pytest

from dskd.data.counter import below
from dskd.data.packing import Encoder, Items, Packer, complete, complete_doc, contiguous, cut
from dskd.data.prepared import Prepared
from dskd.settings.data import Data
from tests.goldens import golden

GOLDEN = golden("ki")["blocking"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_slices(case: dict) -> None:
    sizes, block = case["sizes"], case["block_size"]
    assert [list(s) for s in complete(sizes, block)] == case["complete"]
    assert [list(s) for s in complete_doc(sizes, block)] == case["complete_doc"]


def test_contiguous() -> None:
    assert contiguous(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert contiguous(8, 4) == [(0, 4), (4, 8)]
    assert contiguous(0, 4) == []
    assert complete([], 10) == complete_doc([], 10) == []


def test_complete_doc_with_named_separators() -> None:
    # Sentences of one token are text; the empty separators end the documents.
    slices = complete_doc([1, 3, 0, 2, 9, 0, 1, 0], 10, [False, False, True] * 2 + [False, True])
    assert slices == [(0, 4), (4, 6), (6, 15)]


@pytest.mark.parametrize("size", range(1, 40))
def test_cut_keeps_every_token_and_no_piece_of_one(size: int) -> None:
    pieces = cut(size, 8)
    assert sum(pieces) == size and max(pieces) <= 8
    assert size == 1 or min(pieces) > 1
    assert len(pieces) == -(-size // 8)


def some_items(stretch: int, separator: int) -> Items:
    """A stretch of random documents; every token is told apart by its value."""
    sizes: list[int] = []
    separators: list[bool] = []
    for document in range(1 + below(3, stretch)):
        count = below(6, stretch, document)
        sizes += [int(n) + 2 for n in below(9, stretch, document, np.arange(count))] + [separator]
        separators += [False] * int(count) + [True]
    return Items(1000 * stretch + np.arange(sum(sizes)), sizes, separators)


@pytest.mark.parametrize("separator", [0, 1])
@pytest.mark.parametrize("packing", ["complete", "complete_doc", "contiguous"])
def test_stretch_by_stretch_equals_one_go(packing: str, separator: int) -> None:
    stretches = [some_items(n, separator) for n in range(60)]
    packer = Packer(packing, 12)
    rows = [row for items in stretches for row in packer.add(items)] + packer.finish()
    whole = Items(
        np.concatenate([items.ids for items in stretches]),
        [n for items in stretches for n in items.sizes],
        [s for items in stretches for s in items.separators],
    )
    slices = {
        "complete": complete(whole.sizes, 12),
        "complete_doc": complete_doc(whole.sizes, 12, whole.separators),
        "contiguous": contiguous(len(whole.ids), 12),
    }[packing]
    assert len(rows) > 50
    assert [row.tolist() for row in rows] == [whole.ids[a:b].tolist() for a, b in slices]


def test_masked_items(prepared: Prepared) -> None:
    encode = Encoder(Data(block_size=32), prepared.tokenizer)
    items = encode(["the cat\n\n  sat on  ", "\n \n", "a mat"])
    end = prepared.tokenizer.sep_token_id
    plain = prepared.tokenizer(["the cat", "sat on", "a mat"], add_special_tokens=False)
    one, two, three = [[*ids, end] for ids in plain.input_ids]
    assert items.ids.tolist() == [*one, *two, end, *three, end]  # the empty document left no trace
    assert items.sizes == [len(one), len(two), 1, len(three), 1]
    assert items.separators == [False, False, True, False, True]
    assert encode.block == 31  # the start token takes one


@pytest.mark.parametrize("packing", ["complete", "contiguous"])
def test_causal_items_keep_the_text(prepared: Prepared, packing: str) -> None:
    encode = Encoder(Data(objective="causal", packing=packing, block_size=64), prepared.tokenizer)
    text = "\nthe cat\n\n  sat on\na mat"
    items = encode([text, "dogs"])
    end = prepared.tokenizer.eos_token_id
    assert items.ids.tolist().count(end) == 2 and items.ids[-1] == end
    first = items.ids[: items.ids.tolist().index(end)]
    assert prepared.tokenizer.decode(first) == text
    assert items.separators.count(True) == 2
    assert items.separators.count(False) == (5 if packing == "complete" else 2)
    assert sum(items.sizes) == len(items.ids)


def test_long_sentences_are_cut_not_lost(prepared: Prepared) -> None:
    encode = Encoder(Data(block_size=8), prepared.tokenizer)
    text = "the old garden wall " * 20
    items = encode([text])
    assert max(items.sizes) == 7
    assert prepared.tokenizer.decode(items.ids, skip_special_tokens=True) == text.strip()


def test_names_of_special_tokens_in_the_text_are_text(prepared: Prepared) -> None:
    items = Encoder(Data(block_size=64), prepared.tokenizer)(["a <mask> on </s> the <s> mat"])
    ids = items.ids.tolist()
    assert prepared.tokenizer.mask_token_id not in ids
    assert prepared.tokenizer.bos_token_id not in ids
    assert ids.count(prepared.tokenizer.eos_token_id) == 2  # the sentence's and the document's
    assert prepared.tokenizer.decode(ids[:-2]) == "a <mask> on </s> the <s> mat"
