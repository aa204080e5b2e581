"""The export, scored by transformers alone on the text, gives the number of the report."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from tests.launching import forked

BLOCK = 32
LINES = (
    "the <unk> of the town was <unk> in 1801 , and <s> is not a word",
    "a row ends with </s> in some papers ; <pad> and <mask> are names, too",
    "<mask><mask> the old mill stood by the <unk> river until the <pad> flood",
)


def _text(path, documents):
    """WikiText writes ``<unk>`` for a rare word; other corpora quote other tokens' names."""
    lines = [" ".join([LINES[n % 3], str(n), LINES[(n * 7 + 1) % 3]]) for n in range(documents)]
    path.write_text("\n\n".join(lines) + "\n")
    return path


def _run(folder, objective, model):
    words = [
        f"out={folder / 'run'}", f"data.folder={folder / 'data'}", "method={kind: lm}",
        "teacher=null", f"data.objective={objective}", f"model.config={json.dumps(model)}",
        f"data.sources=[{{kind: text, path: {_text(folder / 'train.txt', 200)}}}]",
        f"data.validation=[{{kind: text, path: {_text(folder / 'valid.txt', 23)}}}]",
        "data.tokenizer.vocab_size=320", f"data.block_size={BLOCK}", "data.packing=contiguous",
        "train.steps=4", "train.warmup=0", "train.lr=0.01", "train.precision=fp32",
        "evaluation.every=2", "checkpoint.every=2",
    ]  # fmt: skip
    forked(1, *words)
    return folder / "run" / "export", json.loads((folder / "run" / "scores.json").read_text())


def _rows(tokenizer, path):
    """The validation text as rows of the tokenizer's own ids."""
    ids = []
    for document in path.read_text().strip("\n").split("\n\n"):
        ids += [*tokenizer(document, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    size = BLOCK - 1
    return [[tokenizer.bos_token_id, *ids[at : at + size]] for at in range(0, len(ids), size)]


def test_a_causal_export_on_text_with_the_names_of_special_tokens(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = {"model_type": "llama", "num_attention_heads": 2, **sizes}
    export, scores = _run(tmp_path, "causal", model)
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.split_special_tokens and tokenizer.model_max_length >= BLOCK
    rows = _rows(tokenizer, tmp_path / "valid.txt")
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    assert not any(special & set(row[1:]) for row in rows)
    whole = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float64)
    total = count = 0
    for row in rows:
        ids_T = torch.tensor(row)
        with torch.no_grad():
            logits_TV = whole(input_ids=ids_T[None]).logits[0]
        total += F.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="sum").item()
        count += len(row) - 1
    assert scores["eval_nll"] == pytest.approx(total / count, abs=1e-6)


def test_a_masked_export_knows_the_token_where_it_is_meant(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = {"model_type": "bert", "num_attention_heads": 2, **sizes}
    export, _ = _run(tmp_path, "masked", model)
    tokenizer = AutoTokenizer.from_pretrained(export)
    asked = tokenizer("the <mask> mill", split_special_tokens=False, return_tensors="pt").input_ids
    assert (asked == tokenizer.mask_token_id).sum() == 1
    AutoModelForMaskedLM.from_pretrained(export)(input_ids=asked)
