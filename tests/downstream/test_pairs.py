"""Minimal pairs: what HuggingFace's own models say of each sentence, and the pairs told right."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from dskd.cli import main
from dskd.downstream import pairs
from dskd.downstream.pairs import EncodedSentences, Pair, log_probabilities, preferred, read_pairs
from dskd.errors import ConfigError, DataError
from dskd.models.initial import initialise
from dskd.settings.yaml_tree import load
from tests.models import tiny

TEXTS = ["t1 t5 t30", "t7", "t30 t30 t2 t9 t9 t11 t4", "t20 t3 t1 t8", "t7 t6 t30 t12 t1"]
LAUNCH = Path(__file__).resolve().parents[2] / "launch"
BLIMP = Path(__file__).resolve().parents[3] / "shared/data/blimp/sample.jsonl.gz"


def pieces() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer: ``t1`` and its rest ``##a``, ``##b``."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokens = [*specials, *(f"t{i}" for i in range(34)), "##a", "##b", "##c", "##d"]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    own = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    ends = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **own, **ends)


def encoded(texts: list[str], causal: bool) -> EncodedSentences:
    return pairs.encoded(texts, ["x:1"] * len(texts), pieces(), causal)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def causal(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.stored(folder, request.param, tok=pieces(), drift=True)
    return folder


@pytest.fixture(scope="module", params=["bert", "roberta", "electra"])
def masked(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.stored(folder, request.param, tok=pieces(), drift=True)
    return folder


def loaded(folder: Path):
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return tiny.make(tiny.Model(path=str(folder)), tok=pieces(), model_type=model_type)


def test_a_causal_sum_is_huggingfaces_loss_times_the_tokens(causal):
    sentences = encoded(TEXTS, causal=True)
    assert [row[0] for row in sentences.rows] == [0] * len(TEXTS)
    theirs = AutoModelForCausalLM.from_pretrained(causal).eval()
    wanted = []
    for row in sentences.rows:
        ids = torch.from_numpy(row)[None]
        with torch.no_grad():
            wanted.append(-theirs(input_ids=ids, labels=ids).loss.item() * (len(row) - 1))
    for rows in (1, 2, 64):
        found = log_probabilities(loaded(causal), sentences, pieces(), rows=rows)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def brute_force(folder: Path, sentences: EncodedSentences, spans) -> list[float]:
    """One token after the other, by itself; ``spans`` gives what is masked with each."""
    theirs = AutoModelForMaskedLM.from_pretrained(folder).eval()
    wanted = []
    for row in sentences.rows:
        total = 0.0
        for place in range(1, len(row) - 1):
            ids = torch.from_numpy(row.copy())[None]
            ids[0, spans(row, place)] = 4
            with torch.no_grad():
                logits = theirs(input_ids=ids).logits[0, place].double()
            total += float(logits.log_softmax(0)[int(row[place])])
        wanted.append(total)
    return wanted


def test_a_pseudo_log_likelihood_is_that_of_a_loop(masked):
    sentences = encoded(TEXTS, causal=False)
    assert all((row[0], row[-1]) == (0, 2) for row in sentences.rows)
    wanted = brute_force(masked, sentences, lambda row, place: [place])
    for rows in (1, 3, 64):
        found = log_probabilities(loaded(masked), sentences, pieces(), rows=rows)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_within_a_word_the_later_pieces_are_masked_too(tmp_path):
    tok = pieces()
    tiny.stored(tmp_path, "bert", tok=tok, drift=True)
    sentences = encoded(["t1ab t5", "t1abc", "t2 t3d t4"], causal=False)
    names = [tok.convert_ids_to_tokens(row.tolist()) for row in sentences.rows]
    assert names[0] == ["<s>", "t1", "##a", "##b", "t5", "</s>"]

    def rest_of_word(row, place):
        until = place + 1
        while tok.convert_ids_to_tokens(int(row[until])).startswith("##"):
            until += 1
        return list(range(place, until))

    model = tiny.make(tiny.Model(path=str(tmp_path)), tok=tok, model_type="bert")
    found = log_probabilities(model, sentences, tok, rows=4, within_word=True)
    np.testing.assert_allclose(found, brute_force(tmp_path, sentences, rest_of_word), rtol=1e-5)
    plain = log_probabilities(model, sentences, tok, rows=4)
    assert np.all(plain[:2] != found[:2])


def test_punctuation_is_a_word_of_its_own_for_every_kind_of_tokenizer(tmp_path):
    """Also where no mark of a token says so: byte-level ones mark spaces only."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    vocab = {token: n for n, token in enumerate([*specials.values(), *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, **specials)
    sentences = pairs.encoded(["no dog."], ["x:1"], tok, False)
    assert sentences.words == [[0, 0, 1, 1, 1, 1, 2]]
    masked = [row.ids_T.tolist().count(2) for row in pairs._masked_rows(sentences, tok, True)]
    assert masked == [2, 1, 4, 3, 2, 1, 1]
    backend.pre_tokenizer = None
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, **specials)
    told = "^pairs: --within-word: this tokenizer does not split a text into words$"
    with pytest.raises(ConfigError, match=told):
        list(pairs._masked_rows(sentences, whole, True))


def test_the_mean_is_over_paradigms_and_a_tie_is_wrong():
    every = [Pair("g", "b", name, "") for name in ("x", "x", "x", "y")]
    sums = np.array([-1.0, -2.0, -2.0, -1.0, -3.0, -3.0, -1.0, -9.0])
    found = preferred(every, sums)
    assert found.paradigms == {"x": [True, False, False], "y": [True]}
    assert found.all_pairs == 0.5
    assert found.shares == {"x": 1 / 3, "y": 1.0} and found.mean == pytest.approx(2 / 3)


def write(path: Path, *rows: object) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(text)
    return path


def blimp(good: str, bad: str, paradigm: str) -> dict:
    return {"sentence_good": good, "sentence_bad": bad, "UID": paradigm, "field": "syntax"}


ROWS = [blimp(TEXTS[n], " ".join(reversed(TEXTS[n].split())), f"u{n % 2}") for n in (0, 2, 3, 4)]


@pytest.mark.parametrize("model_type", ["gpt2", "roberta"])
def test_the_command_writes_and_prints_what_the_model_and_its_random_twin_prefer(
    tmp_path, capsys, model_type
):
    folder = tmp_path / "model"
    tiny.stored(folder, model_type, tok=pieces(), drift=True)
    file, out = write(tmp_path / "a.jsonl.gz", *ROWS), tmp_path / "out.json"
    assert main(["pairs", str(folder), str(file), str(out), "--rows", "3"]) == 0
    found = json.loads(out.read_text())
    sentences = encoded([text for row in ROWS for text in list(row.values())[:2]],
                        causal=model_type == "gpt2")  # fmt: skip
    model, wanted = loaded(folder), []
    for again in range(2):
        sums = log_probabilities(model, sentences, pieces(), rows=64)
        wanted.append(preferred(read_pairs(file), sums))
        if not again:
            initialise(model, 0)
    assert (found["accuracy"], found["random"]) == (wanted[0].mean, wanted[1].mean)
    assert found["pairs"] == 4 and list(found["paradigms"]) == ["u0", "u1"]
    assert found["paradigms"]["u0"] == {
        "pairs": 3, "accuracy": wanted[0].shares["u0"], "random": wanted[1].shares["u0"],
    }  # fmt: skip
    assert (
        found["score"]
        == {"gpt2": "log-probability", "roberta": "pseudo-log-likelihood"}[model_type]
    )
    lines = capsys.readouterr().out.splitlines()
    assert "mean of the paradigms" in lines[-2] and f"{found['accuracy']:.3f}" in lines[-2]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"sentence_good": "t1", "UID": "x"}, r"a\.jsonl:2: no text under the key 'sentence_bad'"),
        (blimp("t1", "", "x"), r"a\.jsonl:2: an empty text"),
        (blimp("t1", "t1 " * 32, "x"), r"a\.jsonl:2: 33 tokens, but the model has 32 positions"),
    ],
)
def test_lines_that_are_no_pairs_are_refused(tmp_path, row, told):
    tiny.stored(tmp_path / "model", "gpt2", tok=pieces())
    file = write(tmp_path / "a.jsonl", ROWS[0], row)
    with pytest.raises(DataError, match=told):
        pairs_of(tmp_path / "model", file)
    with pytest.raises(DataError, match=r"b\.jsonl: no pair in it"):
        read_pairs(write(tmp_path / "b.jsonl"))


def pairs_of(folder: Path, file: Path, *words: str) -> int:
    from dskd.downstream.pairs_command import main as command

    return command([str(folder), str(file), *words])


def test_a_classifier_is_no_language_model(tmp_path):
    BertForSequenceClassification(
        BertConfig(vocab_size=43, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ).save_pretrained(tmp_path / "model")
    pieces().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"^pairs\.path: "):
        pairs_of(tmp_path / "model", write(tmp_path / "a.jsonl", *ROWS))


@pytest.mark.parametrize(
    ("model_type", "words", "told"),
    [
        ("gpt2", ["--within-word"], "pairs: --within-word: of masked LMs; a causal LM masks no"),
        ("gpt2", ["--rows", "0"], "pairs: --rows 0; at least 1"),
    ],
)
def test_options_that_are_not_for_the_model_are_refused(tmp_path, model_type, words, told):
    tiny.stored(tmp_path / "model", model_type)
    file = write(tmp_path / "a.jsonl", *ROWS)
    with pytest.raises(ConfigError, match=f"^{told}"):
        pairs_of(tmp_path / "model", file, *words)


def test_what_lm_eval_is_handed_over(tmp_path):
    """Its own accuracy of an exported model is that of all pairs."""
    task = LAUNCH / "downstream/lm_eval/minimal_pairs.yaml"
    assert load(task)["target_delimiter"] == ""  # its default is a space
    assert load(task)["doc_to_choice"] == "{{[sentence_good, sentence_bad]}}"
    pytest.importorskip("lm_eval")
    tiny.stored(tmp_path / "model", "gpt2", tok=pieces(), drift=True)
    file = write(tmp_path / "pairs.jsonl", *ROWS)
    pairs_of(tmp_path / "model", file, str(tmp_path / "out.json"))
    words = ["--model", "hf", "--model_args", f"pretrained={tmp_path}/model,dtype=float32"]
    words += ["--tasks", "minimal_pairs", "--include_path", str(task.parent), "--device", "cpu"]
    command = [sys.executable, "-m", "lm_eval", *words, "--output_path", "lm_eval"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | offline)
    (result,) = (tmp_path / "lm_eval").rglob("results*.json")
    theirs = json.loads(result.read_text())["results"]["minimal_pairs"]["acc,none"]
    assert theirs == json.loads((tmp_path / "out.json").read_text())["all_pairs"]


def test_the_sample_of_blimp_is_read_whole():
    if not BLIMP.is_file():
        pytest.skip("shared/data is not here")
    found = read_pairs(BLIMP)
    assert len(found) == 67 * 40 and len({pair.paradigm for pair in found}) == 67
