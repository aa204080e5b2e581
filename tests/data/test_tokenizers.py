"""Tokenizers: layout, fingerprints by content, and the comparison of vocabularies."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dskd.data.prepared import Prepared
from dskd.data.tokenizers import (
    check_same_vocabulary,
    continues_word,
    encoder,
    end_id,
    load_tokenizer,
    real_ids,
    special_ids,
    start_id,
    tokenizer_fingerprint,
    vocabulary_size,
)
from dskd.errors import ConfigError, DataError
from dskd.settings.data import Data, PretrainedTokenizer, TrainedTokenizer

TEXTS = ["the cat sat on the mat\nand the cat ran", "a small dog in the garden"] * 3
TEXTS += ["while two black horses jumped over every broken fence", "nobody knew who painted it"]


def trained(size: int = 300, objective: str = "masked") -> PreTrainedTokenizerFast:
    data = Data(tokenizer=TrainedTokenizer(vocab_size=size), objective=objective)
    return load_tokenizer(data, TEXTS)


def load(path: Path, objective: str = "masked") -> PreTrainedTokenizerFast:
    source = PretrainedTokenizer(kind="pretrained", path=str(path))
    return load_tokenizer(Data(tokenizer=source, objective=objective), ())


def words(tokens: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with exactly these tokens."""
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, tokens[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.save_pretrained(str(folder))
    return folder


def test_trained_layout_is_robertas() -> None:
    tokenizer = trained()
    assert len(tokenizer) == 300
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 299]) == special
    assert np.flatnonzero(special_ids(tokenizer)).tolist() == [0, 1, 2, 3, 299]
    assert start_id(tokenizer, "masked") == 0 and end_id(tokenizer, "masked") == 2
    text = "caf\u00e9  \u4f60 the cat\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == 0 and ids[-1] == 2 and 3 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_causal_tokenizer_leaves_the_end_open() -> None:
    ids = trained(objective="causal")("the cat").input_ids
    assert ids[0] == 0 and ids[-1] != 2


def test_training_is_deterministic_and_follows_the_text() -> None:
    assert tokenizer_fingerprint(trained()) == tokenizer_fingerprint(trained())
    data = Data(tokenizer=TrainedTokenizer(vocab_size=300))
    other = load_tokenizer(data, [t.replace("cat", "owl") for t in TEXTS])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(trained())


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="too little text"):
        load_tokenizer(Data(), [])


def test_fingerprint_is_of_content(tmp_path: Path) -> None:
    tokenizer = trained()
    before = tokenizer_fingerprint(tokenizer)
    loaded = AutoTokenizer.from_pretrained(str(saved(tokenizer, tmp_path / "a")))
    assert tokenizer_fingerprint(loaded) == before
    loaded.chat_template = "{{ messages }}"
    loaded.model_max_length = 17
    assert tokenizer_fingerprint(loaded) == before
    loaded("the cat", truncation=True, max_length=4, padding="max_length")  # sets the backend up
    assert tokenizer_fingerprint(loaded) == before
    loaded.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer_fingerprint(loaded) != before


@pytest.mark.parametrize("part", ["merges", "pre_tokenizer", "role"])
def test_fingerprint_sees_each_part(tmp_path: Path, part: str) -> None:
    before = tokenizer_fingerprint(trained())
    folder = saved(trained(), tmp_path)
    path = folder / ("tokenizer_config.json" if part == "role" else "tokenizer.json")
    content = json.loads(path.read_text())
    if part == "merges":
        content["model"]["merges"][:2] = reversed(content["model"]["merges"][:2])
    elif part == "pre_tokenizer":
        content["pre_tokenizer"]["add_prefix_space"] = True
    else:
        content["sep_token"] = "<unk>"
    path.write_text(json.dumps(content))
    assert tokenizer_fingerprint(load(folder)) != before


def test_same_vocabulary_passes() -> None:
    check_same_vocabulary(trained(), trained(objective="causal"), "teacher", "data")


def test_permuted_vocabulary_of_equal_size_is_refused() -> None:
    a = words(["<u>", "cat", "dog", "owl", "mat"])
    b = words(["<u>", "cat", "owl", "dog", "mat"])
    with pytest.raises(ConfigError) as caught:
        check_same_vocabulary(a, b, "the teacher", "data.tokenizer")
    message = str(caught.value)
    assert "2 of 5 entries" in message
    assert "id 2: 'dog' in the teacher, 'owl' in data.tokenizer" in message
    assert "id 3: 'owl' in the teacher, 'dog' in data.tokenizer" in message
    assert "id 1" not in message and "id 4" not in message


def test_longer_vocabulary_is_refused_with_its_first_entries() -> None:
    a = words(["<u>", "cat"])
    b = words(["<u>", "cat", *"abcdefgh"])
    with pytest.raises(ConfigError) as caught:
        check_same_vocabulary(a, b, "A", "B")
    assert "8 of 10 entries" in str(caught.value)
    assert "id 2: no token in A, 'a' in B" in str(caught.value)
    assert "id 6: " in str(caught.value) and "id 7: " not in str(caught.value)


def test_other_mask_token_is_refused() -> None:
    tokens = ["<u>", "<m>", "<n>", "cat"]
    a, b = words(tokens, mask_token="<m>"), words(tokens, mask_token="<n>")
    with pytest.raises(ConfigError, match=r"A masks with <m> \(1\), B with <n> \(2\)"):
        check_same_vocabulary(a, b, "A", "B")


def test_causal_pads_with_the_end_of_text(tmp_path: Path) -> None:
    folder = saved(words(["<e>", "cat"], eos_token="<e>", bos_token="<e>"), tmp_path)
    tokenizer = load(folder, "causal")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert start_id(tokenizer, "causal") is None  # the end-of-text token begins nothing


@pytest.mark.parametrize(
    ("roles", "objective", "problem"),
    [
        ({"eos_token": "<e>", "pad_token": "<e>"}, "masked", "has no mask_token"),
        ({"eos_token": "<e>", "mask_token": "<m>"}, "masked", "has no pad_token"),
        ({"bos_token": "<e>"}, "causal", "has no end token"),
    ],
)
def test_missing_special_tokens(tmp_path: Path, roles: dict, objective: str, problem: str) -> None:
    folder = saved(words(["<e>", "<m>", "cat"], **roles), tmp_path)
    with pytest.raises(ConfigError, match=problem):
        load(folder, objective)


@pytest.mark.parametrize("content", [None, '{"version"', '{"version": "1.0"}'])
def test_tokenizer_that_cannot_be_loaded(tmp_path: Path, content: str | None) -> None:
    folder = saved(trained(), tmp_path / "broken")
    (folder / "tokenizer.json").unlink()
    if content is None:
        (folder / "tokenizer_config.json").unlink()
    else:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data.tokenizer.path: cannot load .*broken"):
        load(folder)


def test_words_of_byte_level(prepared: Prepared) -> None:
    tokenizer = prepared.tokenizer
    continues_V = continues_word(tokenizer)
    vocab = tokenizer.get_vocab()
    assert continues_V[vocab["a"]] and not continues_V[vocab["\u0120"]]
    assert not continues_V[vocab["\u0120the"]] and not continues_V[vocab["\u010a"]]
    assert not continues_V[[0, 1, 2, 3, len(tokenizer) - 1]].any()


def test_words_of_word_pieces_and_metaspace() -> None:
    pieces = Tokenizer(models.WordPiece({"[U]": 0, "cat": 1, "##s": 2}, unk_token="[U]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)
    assert continues_word(tokenizer).tolist() == [False, False, True]
    spaced = Tokenizer(models.BPE({"<u>": 0, "\u2581cat": 1, "s": 2}, []))
    spaced.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spaced, unk_token="<u>")
    assert continues_word(tokenizer).tolist() == [False, False, True]


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.masking.whole_word.*WordLevel"):
        continues_word(words(["<u>", "cat"]))


def test_ids_with_holes() -> None:
    backend = Tokenizer(models.WordLevel({"<u>": 0, "cat": 1, "dog": 4, "<m>": 6}, "<u>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<u>", mask_token="<m>")
    assert len(tokenizer) == 4 and vocabulary_size(tokenizer) == 7
    assert real_ids(tokenizer).tolist() == [0, 1, 4, 6]
    assert np.flatnonzero(special_ids(tokenizer)).tolist() == [0, 6]


_NAMES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
_ROLES = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
_ROLES |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}


def _unigram() -> Tokenizer:
    """As of XLM-R: the special tokens are among the pieces, and NFKC makes some of other text."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=_NAMES, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _tiktoken() -> Tokenizer:
    """A byte-level BPE that takes a whole word of its vocabulary before any merge."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=_NAMES, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _pieces(model: type, split: pre_tokenizers.PreTokenizer) -> Tokenizer:
    letters = sorted(set("".join([*TEXTS, *_NAMES])) - set(" \n"))
    vocabulary = [*_NAMES, *letters, *(f"##{letter}" for letter in letters), "cat"]
    backend = Tokenizer(model({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = split
    return backend


BACKENDS = {
    "unigram": _unigram,
    "tiktoken": _tiktoken,
    "bpe": lambda: trained().backend_tokenizer,
    "wordpiece": lambda: _pieces(models.WordPiece, pre_tokenizers.WhitespaceSplit()),
    "wordlevel": lambda: _pieces(models.WordLevel, pre_tokenizers.WhitespaceSplit()),
}
_NAMED = "the cat <mask> sat<mask> </s> <s>on <pad><pad> the \uff1cmask\uff1e mat </s>"


@pytest.mark.parametrize("kind", BACKENDS)
def test_names_of_special_tokens_in_the_text_are_text(tmp_path: Path, kind: str) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=BACKENDS[kind](), **_ROLES)
    tokenizer = load(saved(plain, tmp_path / "plain"))
    backend, special_V = encoder(tokenizer), special_ids(tokenizer)
    special_V[plain.convert_tokens_to_ids("<unk>")] = False  # what a piece is missing for
    ids = backend.encode(_NAMED, add_special_tokens=False).ids
    assert not special_V[ids].any()
    for text in TEXTS:
        found = backend.encode(text, add_special_tokens=False).ids
        assert found == plain(text, add_special_tokens=False).input_ids
    assert tokenizer.get_vocab() == plain.get_vocab()
    again = AutoTokenizer.from_pretrained(saved(tokenizer, tmp_path / "saved"))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert again(_NAMED, add_special_tokens=False).input_ids == ids
    named = again("<mask>", add_special_tokens=False, split_special_tokens=False).input_ids
    assert named == [plain.mask_token_id], "who wants the name read as the token still can"


def test_the_name_of_the_unknown_token_is_text(tmp_path: Path) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=_unigram(), **_ROLES)
    found = encoder(load(saved(plain, tmp_path))).encode("the <unk> cat", add_special_tokens=False)
    assert "".join(found.tokens) == "\u2581the\u2581<unk>\u2581cat" and "<unk>" not in found.tokens


def test_a_special_token_of_one_character_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<u>": 0, "|": 1, "cat": 2}, "<u>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {"eos_token": "|", "unk_token": "<u>"}
    folder = saved(PreTrainedTokenizerFast(tokenizer_object=backend, **roles), tmp_path)
    with pytest.raises(ConfigError, match=r"data.tokenizer.path: .*the special token '\|' of the"):
        load(folder, "causal")
