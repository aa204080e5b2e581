"""Tokenizers of others: any odd file is one message, and their code is run only if that is set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, dynamic_module_utils

from dskd.data.packing import Encoder
from dskd.data.prepared import open_prepared, prepare
from dskd.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from dskd.errors import ConfigError, DataError
from dskd.settings.data import Data, PretrainedTokenizer
from tests.data.conftest import make_corpus, settings
from tests.data.test_tokenizers import load, saved, trained

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"


def edited(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A saved tokenizer, one of whose files is changed."""
    saved(trained(), folder)
    content = json.loads((folder / name).read_text())
    changed = edit(content)
    (folder / name).write_text(json.dumps(content if changed is None else changed))
    return folder


def setting(*place: str, to: object) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        for part in place[:-1]:
            content = content[part]
        content[place[-1]] = to

    return edit


EDITS = {
    "config list": (CONFIG, lambda _: []),
    "config number": (CONFIG, lambda _: 3),
    "mask number": (CONFIG, setting("mask_token", to=3)),
    "mask object": (CONFIG, setting("mask_token", to={"content": 5})),
    "end surrogate": (CONFIG, setting("eos_token", to="\ud800")),
    "class number": (CONFIG, setting("tokenizer_class", to=3)),
    "class list": (CONFIG, setting("tokenizer_class", to=[])),
    "added list": (CONFIG, setting("added_tokens_decoder", to=[3])),
    "extra number": (CONFIG, setting("extra_special_tokens", to=3)),
    "template list": (CONFIG, setting("chat_template", to=[3])),
    "code list": (CONFIG, setting("auto_map", to=[])),
    "no model": (TOKENIZER, lambda content: content.pop("model") and None),
    "tokenizer list": (TOKENIZER, lambda _: []),
    "tokenizer null": (TOKENIZER, lambda content: "null"),
    "model list": (TOKENIZER, setting("model", to=[])),
    "no merges": (TOKENIZER, setting("model", "vocab", to={})),
    "prefix panic": (TOKENIZER, setting("model", "continuing_subword_prefix", to="zzz")),
    "normalizer panic": (
        TOKENIZER,
        setting("normalizer", to={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ),
    "negative id": (TOKENIZER, setting("model", "vocab", "zz", to=-1)),
    "id of five bytes": (TOKENIZER, setting("model", "vocab", "zz", to=2**32)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_odd_file_is_one_message(tmp_path: Path, edit: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.tokenizer\.path: cannot load .*/odd \("):
        load(edited(tmp_path / "odd", *EDITS[edit]))


@pytest.mark.parametrize("content", ["[" * 50_000, '{"a": ' + "9" * 5000 + "}", "", "\0"])
@pytest.mark.parametrize("name", [CONFIG, TOKENIZER])
def test_what_is_no_json_is_one_message(tmp_path: Path, name: str, content: str) -> None:
    folder = saved(trained(), tmp_path / "odd")
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=r"^data\.tokenizer\.path: cannot load .*/odd \("):
        load(folder)


@pytest.mark.parametrize("last", [2_000_000_000, 70_000, 2**32 - 1])
def test_an_id_far_beyond_the_others_is_refused(tmp_path: Path, last: int) -> None:
    """At once: a table of all ids would not fit into memory, or into any time."""
    folder = edited(tmp_path / "far", TOKENIZER, setting("model", "vocab", "zz", to=last))
    with pytest.raises(ConfigError, match=rf"/far: 'zz' has the id {last}, far beyond .* 301$"):
        load(folder)


def test_holes_of_a_usual_size_pass(tmp_path: Path) -> None:
    folder = edited(tmp_path, TOKENIZER, setting("model", "vocab", "zz", to=60_000))
    assert load(folder).get_vocab()["zz"] == 60_000


def test_an_empty_vocabulary_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({}, "<u>"))
    folder = saved(PreTrainedTokenizerFast(tokenizer_object=backend), tmp_path)
    with pytest.raises(ConfigError, match="its vocabulary is empty"):
        load(folder, "causal")


def test_text_that_it_cannot_encode_is_one_message() -> None:
    """A model of characters, with none for the unknown."""
    characters = {token: index for index, token in enumerate([*"a<e> ", "<e>"])}
    backend = Tokenizer(models.WordLevel(characters, "nowhere"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    encode = Encoder(Data(objective="causal"), tokenizer)
    assert encode(["a ee a"]).ids.tolist() == [0, 4, 2, 2, 4, 0, 5]
    with pytest.raises(DataError, match=r"^data\.tokenizer: cannot encode the text \(.*UNK"):
        encode(["a ee a", "a cat"])


def test_a_tokenizer_without_an_unknown_token_is_one_message(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"cat": 0, "<e>": 1}, "nowhere"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = saved(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>"), tmp_path)
    with pytest.raises(ConfigError, match=r"^data\.tokenizer\.path: .*: cannot encode '<e> a"):
        load(folder, "causal")


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = saved(trained(), tmp_path)
    source = PretrainedTokenizer(kind="pretrained", path=str(folder), revision="main")
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path: .* has no revision 'main'"):
        load_tokenizer(Data(tokenizer=source), ())


CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
marker = Path({marker!r})
marker.write_text(marker.read_text() + "x" if marker.exists() else "x")
class Mine(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer whose class comes with it; the file ``ran`` beside it grows when it is run."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks is allowed
    folder = saved(trained(), tmp_path / "coded")
    content = json.loads((folder / CONFIG).read_text())
    content |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / CONFIG).write_text(json.dumps(content))
    (folder / "mine.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    return folder


def test_code_of_a_tokenizer_is_not_run(with_code: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path: cannot .*trust_remote_code"):
        load(with_code)
    assert not (with_code.parent / "ran").exists()


def test_code_that_is_trusted_makes_the_rows_and_is_not_needed_again(
    with_code: Path, tmp_path: Path
) -> None:
    make_corpus(tmp_path / "corpus.txt")
    source = PretrainedTokenizer(kind="pretrained", path=str(with_code), trust_remote_code=True)
    folder = prepare(settings(tmp_path, tokenizer=source))
    ran = (tmp_path / "ran").read_text()
    opened = open_prepared(folder)
    assert opened.tokenizer_fingerprint == tokenizer_fingerprint(opened.tokenizer)
    assert tokenizer_fingerprint(opened.tokenizer) == tokenizer_fingerprint(trained())
    assert type(opened.tokenizer).__module__.startswith("transformers.")
    opened.tokenizer.save_pretrained(tmp_path / "export")
    for kept in (folder / "tokenizer", tmp_path / "export"):
        assert "auto_map" not in json.loads((kept / CONFIG).read_text())
        assert not list(kept.glob("*.py"))
    assert ran and (tmp_path / "ran").read_text() == ran
