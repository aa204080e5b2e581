"""``dskd convert``: what it writes and says, and the loss that a user judges it by."""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from dskd.cli import main
from dskd.convert import fairseq, uer
from dskd.convert.check import PARAGRAPH, _rows, loss_on, reloaded
from dskd.data.fairseq_vocabulary import read_dictionary, read_merges, tokenizer_of
from dskd.errors import ConfigError
from dskd.settings.model import Model
from tests.convert.checkpoints import (
    BEST,
    GOLDEN,
    HEAD,
    IDS,
    LAST,
    arguments,
    random_roberta,
    save,
)
from tests.models.tiny import make, tokenizer

BPE, DICT = GOLDEN / "bpe/vocab.bpe", GOLDEN / "bpe/dict.txt"
SIZES = {"L": 2, "H": 12, "F": 20, "V": 273, "P": 40}


def convert(*words: object, status: int = 0) -> None:
    assert main(["convert", *map(str, words)]) == status


@pytest.fixture
def source(tmp_path) -> Path:
    """A checkpoint with the golden vocabulary."""
    history = [{"num_updates": 12}]
    content = {"model": random_roberta(SIZES, seed=3), "args": arguments()}
    return save(tmp_path / "a.pt", content | {"optimizer_history": history})


def test_a_folder_as_a_run_exports_it(tmp_path, source, capsys):
    out = tmp_path / "new" / "out"
    convert("fairseq", source, out, "--dict", DICT, "--bpe", BPE)
    names = {"README.md", "config.json", "model.safetensors"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # no temporary one
    model, report = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    direct = fairseq.convert(source).model
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, direct(IDS).logits)
    again = make(Model(path=str(out)), model_type="roberta", tok=AutoTokenizer.from_pretrained(out))
    assert sum(p.numel() for p in again.parameters()) == direct.num_parameters()
    assert AutoTokenizer.from_pretrained(out).model_max_length == 40

    card = (out / "README.md").read_text()
    assert "# A RobertaForMaskedLM converted by dskd from fairseq\n" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == {
        "kind": "fairseq", "file": "a.pt", "architecture": "roberta_base", "updates": 12,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }  # fmt: skip
    assert str(tmp_path) not in card

    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{out}: converted from {source}"
    assert lines[0] == "  vocabulary: 273 tokens, as many as embeddings"
    assert lines[1] == f"  read again: RobertaForMaskedLM, {direct.num_parameters():,} parameters"
    nats, count, unknown = loss_on(
        reloaded(out, "masked", None), AutoTokenizer.from_pretrained(out), "masked",
        " ".join(PARAGRAPH.split()),
    )  # fmt: skip
    assert (count > 400, unknown) == (True, 0)
    assert lines[2].startswith(
        f"  masked LM loss (one token in seven masked): {nats:.3f} nats a token, over {count} "
        f"tokens of the built-in English paragraph; guessing has {math.log(273):.2f}"
    )
    assert "the only end-to-end evidence of the conversion: on its own language a s" in lines[3]
    assert len(lines) == 4


def test_the_users_own_text(tmp_path, source, capsys):
    text = tmp_path / "a.txt"
    text.write_text("the the\n")
    words = ["--dict", DICT, "--bpe", BPE, "--text", text]
    convert("fairseq", source, tmp_path / "out", *words)
    assert f"over 3 tokens of {text}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b"\xff", "cannot read"), (b" \n", "has no words")],
)
def test_a_text_that_cannot_be_scored_comes_before_any_work(tmp_path, capsys, content, message):
    text = tmp_path / "a.txt"
    if content is not None:
        text.write_bytes(content)
    convert("fairseq", LAST, tmp_path / "out", "--text", text, status=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_of_one_token_leaves_nothing_behind(tmp_path, source, capsys):
    text = tmp_path / "a.txt"
    text.write_text("a\n")
    words = ["--dict", DICT, "--bpe", BPE, "--text", text]
    convert("fairseq", source, tmp_path / "out", *words, status=2)
    assert "--text: too few tokens to score" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_nothing_is_claimed(tmp_path, capsys):
    convert("fairseq", LAST, tmp_path / "out")
    said = capsys.readouterr().out
    assert "no --dict: the vocabulary is not checked, no tokenizer is written" in said
    assert "NOT checked end to end: without a tokenizer there is no loss on text" in said


def test_a_head_for_classes(tmp_path, capsys):
    convert("fairseq", BEST, tmp_path / "out", "--head", HEAD)
    assert "NOT checked end to end: a head for classes" in capsys.readouterr().out
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, fairseq.convert(BEST, head=HEAD).model(IDS).logits)


def test_the_other_kinds(tmp_path, capsys):
    vocab = tmp_path / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + n) for n in range(24))]
    vocab.write_text("\n".join(tokens))
    words = ["--vocab", vocab, "--heads", 4, "--trained-in", "elsewhere", "--cased"]
    convert("uer", GOLDEN / "uer/model_2022.bin", tmp_path / "uer", *words)
    path = tmp_path / "uer"
    model, report = AutoModelForMaskedLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    direct = uer.convert(
        GOLDEN / "uer/model_2022.bin", vocab, heads=4, trained_in="elsewhere"
    ).model
    for name, parameter in direct.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert "of them unknown (it is not the language of this vocabulary" in capsys.readouterr().out
    convert("gpt2", GOLDEN / "gpt2_2019", tmp_path / "gpt2")
    assert json.loads((tmp_path / "gpt2/config.json").read_text())["vocab_size"] == 43
    card = (tmp_path / "gpt2/README.md").read_text()
    assert "file: model-finish\n" in card
    assert "folder: gpt2_2019\n" in card


def test_dtype(tmp_path):
    convert("fairseq", LAST, tmp_path / "out", "--dtype", "fp16")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_exists_is_left_alone(tmp_path, capsys, kind):
    out = tmp_path / "out"
    make_it = {"folder": out.mkdir, "file": out.touch, "link": lambda: out.symlink_to("nowhere")}
    make_it[kind]()
    convert("fairseq", LAST, out, status=2)
    assert f"{out} exists; a conversion writes a folder of its own" in capsys.readouterr().err
    assert out.is_symlink() or not list(out.glob("*"))


def test_a_refusal_leaves_no_folder(tmp_path, capsys):
    convert("fairseq", LAST, tmp_path / "out", "--dict", DICT, status=2)
    assert "not its dictionary" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_token_is_masked_once():
    tok, model = tokenizer(), make("roberta")
    ids = [5 + k % 38 for k in range(100)]
    rows = [(ids_BT[0], labels_BT[0]) for ids_BT, labels_BT in _rows(ids, model, tok, "masked")]
    width = model.config.max_position_embeddings - 2 - 2  # rows 0 and 1, <s> and </s>
    first, seen, before = 0, Counter(), None
    for row_T, labels_T in rows:
        masked_T = labels_T != -100
        assert bool((row_T[masked_T] == tok.mask_token_id).all())
        assert 1 <= int(masked_T.sum()) <= math.ceil(width / 7)
        whole = torch.where(masked_T, labels_T, row_T).tolist()
        assert (whole[0], whole[-1]) == (0, 2)
        first += width if before not in (None, whole) else 0
        assert whole[1:-1] == ids[first : first + width]
        seen.update(first + int(k) - 1 for k in masked_T.nonzero())
        before = whole
    assert seen == Counter(range(100))


def silent(model_type: str) -> PreTrainedModel:
    """A model that says the same whatever it reads: that all tokens are alike."""
    model = make(model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_the_loss_is_the_mean_over_all_tokens():
    """Of a masked LM that knows the tokens' shares and nothing else: their entropy."""
    tok = tokenizer_of(read_dictionary(DICT), read_merges(BPE), "dict.txt")
    model = make("roberta", tok=tok)
    ids = tok(PARAGRAPH.strip())["input_ids"][1:-1]
    shares = {token: count / len(ids) for token, count in Counter(ids).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.lm_head.decoder.bias.fill_(-100.0)
        for token, share in shares.items():
            model.lm_head.decoder.bias[token] = math.log(share)
    entropy = -sum(share * math.log(share) for share in shares.values())
    nats, count, unknown = loss_on(model, tok, "masked", PARAGRAPH)
    assert nats == pytest.approx(entropy, rel=1e-5)
    assert (count, unknown) == (len(ids), 0)
    with torch.no_grad():  # another order of the tokens
        model.lm_head.decoder.bias.copy_(model.lm_head.decoder.bias.flip(0))
    assert loss_on(model, tok, "masked", PARAGRAPH)[0] > 50


def test_causal_rows_are_shifted():
    tok, model = tokenizer(), make("gpt2")
    ids = [5 + k % 38 for k in range(50)]
    rows = list(_rows(ids, model, tok, "causal"))
    assert len(rows) == 2  # of 32 positions, the first of each is <s>
    for ids_BT, labels_BT in rows:
        assert ids_BT[0, 0] == 0
        assert torch.equal(ids_BT[0, 1:], labels_BT[0, :-1])
        assert labels_BT[0, -1] == -100
    assert [t for ids_BT, _ in rows for t in ids_BT[0, 1:].tolist()] == ids
    nats, count, unknown = loss_on(silent("gpt2"), tok, "causal", "a b")
    assert nats == pytest.approx(math.log(43), rel=1e-6)
    assert count == unknown == 2


def test_a_reloaded_folder_has_the_tokenizers_tokens(tmp_path):
    convert("fairseq", LAST, tmp_path / "out")
    with pytest.raises(ConfigError, match="vocabulary of 46 is smaller than the tokenizer's 50"):
        reloaded(tmp_path / "out", "masked", tokenizer(50))
