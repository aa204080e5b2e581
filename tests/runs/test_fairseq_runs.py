"""Runs on a corpus of fairseq: what is refused before they start, and Knowledge Inheritance on its
blocks with the original's masks."""

import math
from pathlib import Path

import numpy as np
import pytest

from dskd.data.prepared import open_prepared
from dskd.errors import ConfigError
from dskd.settings.yaml_tree import dump
from tests.data.conftest import all_rows
from tests.data.fairseq_corpora import golden_corpus
from tests.goldens import golden
from tests.launching import forked, losses
from tests.runs.test_plan import BERT, checked, recipe_of

SOURCE = {"kind": "fairseq", "path": "data-bin/train"}
STORED = {"kind": "pretrained", "path": "somewhere"}
GPT2 = {"model": {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"sources": [{"kind": "builtin"}, SOURCE]}},
         "data.tokenizer.kind: trained, but data.sources.1 is of tokens that its dict.txt numbers; "
         "pretrained, with the path of that vocabulary's tokenizer"),
        ({"data": {"validation": [SOURCE]}},
         "data.tokenizer.kind: trained, but data.validation.0 is of tokens"),
        ({"evaluation": {"sets": {"bio": {"sources": [SOURCE]}}}},
         "data.tokenizer.kind: trained, but evaluation.sets.bio.sources.0 is of tokens"),
        ({"data": {"sources": [SOURCE], "objective": "classification", "labels": ["a", "b"],
                   "tokenizer": STORED}, "method": {"kind": "finetune"}},
         "data.sources.0.kind: fairseq has no labels; one of csv, tsv"),
        ({"data": {"sources": [SOURCE], "objective": "causal", "questions": {},
                   "tokenizer": STORED}, **GPT2},
         "data.sources.0.kind: fairseq has no questions; data.questions takes"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_the_start(tmp_path, changes, message):
    with pytest.raises(ConfigError) as error:
        checked(recipe_of(tmp_path, {"only": {"model": {"config": BERT}, **changes}}))
    assert str(error.value).startswith(f"runs.only.{message}")


ROBERTA = {
    "model_type": "roberta", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 20, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def run(folder: Path) -> Path:
    """Twelve steps of Knowledge Inheritance, each on all rows; returns the run's folder."""
    settings = {
        "seed": 3, "out": str(folder / "run"), "deepspeed": "zero1",
        "data": {
            "objective": "masked", "folder": str(folder / "rows"), "block_size": 16,
            "sources": [{"kind": "fairseq", "path": str(folder / "train"), "domain": "bio"}],
            "validation": [{"kind": "fairseq", "path": str(folder / "valid"), "domain": "bio"}],
            "tokenizer": {"kind": "pretrained", "path": str(folder / "tokenizer")},
            "masking": {"kind": "random", "sampler": "fairseq", "probability": 0.3},
        },
        "model": {"config": ROBERTA},
        "teacher": {"kind": "live", "model": {"config": ROBERTA | {"hidden_size": 8}}},
        "method": {"kind": "ki", "temperature": 2.0, "schedule": "constant", "rate": 0.5},
        "train": {
            "steps": 12, "batch": 4, "micro_batch": 2, "lr": 0.03, "warmup": 2, "precision": "fp32",
        },
        "evaluation": {"every": 6},
        "checkpoint": {"every": 12},
        "until": "train",
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(dump(settings))
    forked(1, str(path))
    return folder / "run"


def test_knowledge_inheritance_on_fairseqs_blocks(tmp_path):
    """Both layouts are the same rows, the golden ones, and one trajectory."""
    found = {}
    for layout in ("mmap_uint16", "cached_int32"):
        (tmp_path / layout).mkdir()
        folder = golden_corpus(tmp_path / layout, layout)
        out = run(folder)
        (rows,) = (folder / "rows").iterdir()
        opened = open_prepared(rows)
        expected = golden("bridges/corpus/expected")["rows_block16_complete"]
        assert all_rows(opened.train) == expected
        assert opened.domains == ["bio"]
        found[layout] = losses(out)
    one, other = found.values()
    assert one == other and len(one) == 12
    assert all(math.isfinite(loss) for loss in one)
    assert np.mean(one[-3:]) < np.mean(one[:3]) - 0.1
