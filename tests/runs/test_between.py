"""What one run of a recipe takes from another and cannot fit is refused before anything is made."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dskd.errors import ConfigError
from dskd.settings.yaml_tree import merge
from dskd.train import main
from tests.launching import forked
from tests.models.tiny import make
from tests.runs.test_plan import BERT, checked, recipe_of

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}
KI = {"kind": "ki", "schedule": "constant", "temperature": 2.0}
FIRST = {"model": {"config": BERT}}
FROM_A = {"path": "run:a"}
TAUGHT = {"model": {"config": BERT}, "method": KI, "teacher": {"kind": "live", "model": FROM_A}}
CAPTURES = merge(TAUGHT, {"teacher": {"kind": "cached", "k": 8, "model": {"config": BERT}}})
CAPTURES = merge(CAPTURES, {"data": {"masking": {"draws": 2}}})
READS = merge(CAPTURES, {"teacher": {"path": "run:a"}})
del READS["teacher"]["model"], READS["teacher"]["k"]
SCORES = merge(FIRST, {"data": {"masking": {"kind": "hard_tokens"}}})
TAKES = merge(SCORES, {"data": {"masking": {"store": "run:a"}}})


def refused(tmp_path: Path, a: dict, b: dict) -> str:
    """What the checks say of two runs, with nothing made."""
    with pytest.raises(ConfigError) as caught:
        checked(recipe_of(tmp_path, {"a": a, "b": b}))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()
    return str(caught.value)


def words(folder: Path, *more: str) -> Path:
    """A stored tokenizer of whole words."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *more]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict:
    return {"tokenizer": {"kind": "pretrained", "path": str(folder)}}


# ---- vocabularies --------------------------------------------------------------------------------

OTHER_TEXT = {"sources": [{"kind": "builtin", "documents": 31}]}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"tokenizer": {"vocab_size": 321}}, "data.tokenizer.vocab_size"),
        (OTHER_TEXT, "data.sources"),
        ({"validation_fraction": 0.1}, "data.validation_fraction"),
        ({"validation": [{"kind": "builtin"}]}, "data.validation"),
    ],
)
@pytest.mark.parametrize(
    ("run", "place"), [({"model": FROM_A}, "model"), (TAUGHT, "teacher.model")]
)
def test_a_model_of_a_run_that_trains_another_tokenizer(tmp_path, run, place, data, why):
    assert refused(tmp_path, FIRST, merge(run, {"data": data})) == (
        f"runs.b.{place}.path: run a has another tokenizer than this run ({why}); set "
        "data.tokenizer: {kind: pretrained, path: 'run:a'}"
    )


@pytest.mark.parametrize("run", [{"model": FROM_A}, TAUGHT])
def test_the_same_tokenizer_by_its_run_or_by_its_settings(tmp_path, run):
    by_run = {"tokenizer": {"kind": "pretrained", **FROM_A}} | OTHER_TEXT
    packed = {"packing": "complete_doc", "block_size": 16}  # which change the rows only
    for data in (by_run, packed):
        checked(recipe_of(tmp_path, {"a": FIRST, "b": merge(run, {"data": data})}))


def test_the_same_text_in_another_place(tmp_path):
    """It is the text that counts."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("The same words.\n\nAnd more of them.\n")
    (tmp_path / "else.txt").write_text("Other words.\n")

    def of(name: str) -> dict:
        return {"data": {"sources": [{"kind": "text", "path": f"{tmp_path}/{name}.txt"}]}}

    a = merge(FIRST, of("one"))
    checked(recipe_of(tmp_path, {"a": a, "b": merge({"model": FROM_A}, of("two"))}))
    assert "(data.sources)" in refused(tmp_path, a, merge({"model": FROM_A}, of("else")))


def test_a_chain_of_runs_has_the_tokenizer_of_its_first(tmp_path):
    by_b = {"tokenizer": {"kind": "pretrained", "path": "run:b"}} | OTHER_TEXT
    runs = {"a": FIRST, "b": {"model": FROM_A}, "c": {"model": FROM_A, "data": by_b}}
    checked(recipe_of(tmp_path, runs))


def test_two_stored_tokenizers_are_compared_at_once(tmp_path):
    one, two = words(tmp_path / "one", "cat", "dog"), words(tmp_path / "two", "dog", "cat")
    a = merge(FIRST, {"data": stored(one)})
    message = refused(tmp_path, a, {"model": FROM_A, "data": stored(two)})
    assert message.startswith("runs.b.model.path: the data's tokenizer and model.path (")
    assert "different vocabularies (2 of 7 entries)" in message
    assert "id 5: 'dog' in the data's tokenizer, 'cat' in" in message
    checked(recipe_of(tmp_path, {"a": a, "b": {"model": FROM_A, "data": stored(one)}}))


def test_a_stored_tokenizer_that_no_training_comes_to(tmp_path):
    one = words(tmp_path / "one", "cat")
    a = merge(FIRST, {"data": stored(one)})
    assert f"(one is trained, the other is {one})" in refused(tmp_path, a, {"model": FROM_A})
    b = {"model": FROM_A, "data": stored(one)}
    assert f"(one is trained, the other is {one})" in refused(tmp_path, FIRST, b)


def test_a_tokenizer_that_a_later_run_exports(tmp_path):
    data = {"tokenizer": {"kind": "pretrained", "path": f"{tmp_path}/runs/b/export"}}
    message = refused(tmp_path, merge(FIRST, {"data": data}), FIRST)
    assert re.match(r"runs\.a\.data\.tokenizer\.path: \S+ is what the later run b exports", message)


def test_a_teacher_that_the_method_does_not_want_may_speak_anything(tmp_path):
    idle = merge(TAUGHT, {"method": {"kind": "lm"}, "data": OTHER_TEXT})
    checked(recipe_of(tmp_path, {"a": FIRST, "b": idle}))


# ---- other families, objectives and sizes --------------------------------------------------------


def test_a_teacher_of_another_objective(tmp_path):
    causal = {"model": {"config": GPT2}, "data": {"objective": "causal"}}
    assert refused(tmp_path, causal, TAUGHT) == (
        "runs.b.teacher.model.path: run a trains a causal LM, data.objective is masked"
    )
    # whose config is still to be downloaded
    hub = {"model": {"path": "somebody/else"}, "data": {"objective": "causal"}}
    assert "run a trains a causal LM" in refused(tmp_path, hub, {"model": FROM_A})


def test_a_teacher_of_too_few_positions(tmp_path):
    short = merge(FIRST, {"model": {"config": {"max_position_embeddings": 32}}})
    message = refused(tmp_path, short, merge(TAUGHT, {"data": {"block_size": 40}}))
    assert message.startswith("runs.b.teacher.model.config.max_position_embeddings: 32 are too few")


# ---- caches and scores ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"block_size": 16}}, "other rows or masks: data.block_size differ"),
        ({"data": {"packing": "contiguous"}}, "data.packing differ"),
        ({"data": OTHER_TEXT}, "data.sources, data.tokenizer differ"),
        ({"data": {"tokenizer": {"vocab_size": 400}}}, "data.tokenizer differ"),
        ({"data": {"masking": {"probability": 0.2}}}, "data.masking.probability differ"),
        ({"data": {"masking": {"draws": 3}}}, "data.masking.draws differ"),
        ({"seed": 2}, "seed differ"),
    ],
)
def test_a_cache_of_other_rows(tmp_path, change, message):
    checked(recipe_of(tmp_path, {"a": CAPTURES, "b": READS}))
    found = refused(tmp_path, CAPTURES, merge(READS, change))
    assert found.startswith("runs.b.teacher.path: run a captures it with other rows or masks: ")
    assert found.endswith(message)


def test_a_cache_that_holds_too_little(tmp_path):
    found = refused(tmp_path, CAPTURES, merge(READS, {"teacher": {"use_k": 9}}))
    assert found == "runs.b.teacher.use_k: 9 is more than the 8 of run a"
    change = {"method": {"temperature": 4.0}, "teacher": {"temperatures": [4.0]}}
    found = refused(tmp_path, CAPTURES, merge(READS, change))
    assert found.startswith("runs.b.method.temperature: 4.0 is not among the temperatures of run a")
    own = {"teacher": {"k": 9, "model": {"config": BERT}}}
    found = refused(tmp_path, CAPTURES, merge(READS, own))
    assert found == "runs.b.teacher.k: run a captures the cache with another one"


def test_a_cache_that_nobody_captures(tmp_path):
    idle = merge(CAPTURES, {"method": {"kind": "lm"}})
    found = refused(tmp_path, idle, READS)
    assert re.match(r"runs\.b\.teacher\.path: no cache in \S+/a/cache, and none of the ear", found)


ROUTED = {
    "data": {
        "sources": [
            {"kind": "builtin", "documents": 30},
            {"kind": "builtin", "documents": 30, "domain": "other"},
        ],
        "masking": {"draws": 2},
    },
    "teacher": {
        "kind": "routed",
        "domains": {
            "builtin": {"kind": "cached", "k": 8, "model": {"config": BERT}},
            "other": {"kind": "cached", "k": 8, "model": {"config": BERT}},
        },
    },
}


def test_domains_of_other_runs(tmp_path):
    """Live and cached ones do not mix, whatever run they come from; nor do domains."""
    a = {"model": {"config": BERT}, "method": KI, **ROUTED}
    live = {"kind": "live", "model": FROM_A}
    by_run = {"kind": "cached", "path": "run:a"}
    b = merge(a, {"teacher": {"domains": {"other": live, "builtin": by_run}}})
    b["teacher"]["domains"]["builtin"] = by_run
    found = refused(tmp_path, a, b)
    assert found.startswith("runs.b.teacher.domains: all must be live or all cached, but: ")
    b["teacher"]["domains"] = {"builtin": by_run, "other": by_run}
    checked(recipe_of(tmp_path, {"a": a, "b": b}))
    swapped = {"kind": "cached", "path": f"{tmp_path}/runs/a/cache/builtin"}
    b["teacher"]["domains"] = {"builtin": by_run | {"path": f"{tmp_path}/x"}, "other": swapped}
    found = refused(tmp_path, a, b)
    assert "runs.b.teacher.domains.builtin.path: no cache in" in found
    assert "other.path: run a captures rows of the domain 'builtin' only" in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": OTHER_TEXT}, "data.sources, data.tokenizer differ"),
        ({"data": {"masking": {"shown": "mask"}}}, "data.masking.shown differ"),
        ({"model": {"config": {"hidden_size": 16}}}, "the model that scores differ"),
        ({"seed": 2}, "seed differ"),
    ],
)
def test_scores_of_other_rows(tmp_path, change, message):
    checked(recipe_of(tmp_path, {"a": SCORES, "b": TAKES}))
    found = refused(tmp_path, SCORES, merge(TAKES, change))
    assert found.startswith("runs.b.data.masking.store: run a fills it otherwise: ")
    assert found.endswith(message)


# ---- folders at hand -----------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path) -> Path:
    """A stored model with a tokenizer of its own."""
    folder = words(tmp_path / "bert", *["the", "of", "and", "to", "a", "in", "is", "for", "it"])
    make("bert").save_pretrained(folder)
    return folder


def test_a_folder_of_another_vocabulary_is_refused_before_the_data(tmp_path, bert):
    b = {"model": {"path": str(bert)}}
    message = refused(tmp_path, FIRST, b)
    assert message.startswith(f"runs.b.model.path: {bert} has a tokenizer of its own, which data.")
    assert f"set data.tokenizer: {{kind: pretrained, path: {bert}}}" in message
    checked(recipe_of(tmp_path, {"a": FIRST, "b": b | {"data": stored(bert)}}))
    other = words(tmp_path / "other", "cat")
    message = refused(tmp_path, FIRST, b | {"data": stored(other)})
    assert "different vocabularies" in message and f"model.path ({bert})" in message


def test_a_vocabulary_that_a_model_has_no_rows_for(tmp_path, bert):
    wide = words(bert, *(f"w{i}" for i in range(2000)))
    message = refused(tmp_path, FIRST, {"model": {"path": str(bert)}, "data": stored(wide)})
    assert re.search(r"model: its vocabulary of \d+ is smaller than the tokenizer's 2005", message)


# ---- the toy with another student ----------------------------------------------------------------


def test_the_toy_with_a_stored_student(tmp_path, bert, capfd):
    """Its data and its steps with a model of one's own; what does not fit is one message."""
    student = [f"model.path={bert}", f"out={tmp_path}/runs/toy", f"data.folder={tmp_path}/data"]
    student += ["data.block_size=32"]
    speaks = ["data.tokenizer.kind=pretrained", f"data.tokenizer.path={bert}"]
    for words, message in (
        (student, f"error: model.path: {bert} has a tokenizer of its own, which data.tokenizer"),
        ([*student, *speaks], "error: teacher: the toy's has another vocabulary than model.path"),
    ):
        assert main(words) == 2
        told = capfd.readouterr()
        assert told.err.startswith(message) and told.err.count("\n") == 1 and not told.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert"]
    one = ["train.steps=1", "train.warmup=0", "evaluation.rows=4", "until=train"]
    forked(1, *student, *speaks, "method.kind=lm", *one)
    summary = json.loads((tmp_path / "runs" / "toy" / "train" / "summary.json").read_text())
    assert summary["steps"] == 1
