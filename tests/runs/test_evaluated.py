"""What runs show of their evaluation: domains, bits per byte, examples; the same on 1 and 2 ranks,
and at ZeRO-0 and 3."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from dskd.cli import main
from dskd.data.prepared import Prepared, open_prepared
from dskd.errors import CheckpointError
from dskd.runs.by_domain import by_domain_section
from dskd.runs.examples import Examples, examples_section
from dskd.settings.folders import RunFolder
from dskd.settings.yaml_tree import merge
from dskd.system.files import read_record, write_manifest
from dskd.system.log import read_metrics
from tests.data.conftest import all_rows, make_corpus
from tests.launching import forked
from tests.runs.test_labelled_runs import labelled
from tests.runs.test_plan import BERT, recipe_of
from tests.runs.test_question_runs import asked

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}
CAUSAL = {
    "model": {"config": GPT2},
    "evaluation": {"rows": None},
    "data": {"objective": "causal", "packing": "contiguous"},
}
METRICS = ("nll", "bits", "ppl", "tokens", "bits_per_byte")


def large() -> dict:
    """Another vocabulary, and longer rows."""
    return merge(CAUSAL, {"data": {"tokenizer": {"vocab_size": 2048}, "block_size": 48}})


def runs_of(folder: Path) -> dict:
    """Causal and masked runs of two domains, one of which has markup in its text."""
    make_corpus(folder / "few.txt", 60)
    text = (folder / "few.txt").read_text().replace("garden", "<b>garden</b>")
    (folder / "few.txt").write_text(text)
    few = {"kind": "text", "path": str(folder / "few.txt"), "domain": "few"}
    both = {"data": {"sources": [{"kind": "builtin", "documents": 60}, few]}}
    runs = {
        "small": CAUSAL,
        "slower": merge(CAUSAL, {"train": {"lr": 1e-4}}),
        "large": large(),
        "rows": merge(large(), {"evaluation": {"rows": 5, "examples": 0}}),
        "text": merge(CAUSAL, {"data": {"validation_fraction": 0.1}, "until": "train"}),
        "masked": {"model": {"config": BERT}, "evaluation": {"rows": None}},
        "again": {"model": {"config": BERT}, "evaluation": {"rows": None}, "train": {"lr": 1e-4}},
    }
    runs = {name: merge(both, run) for name, run in runs.items()}
    questions = asked(folder, modelling=True) | {"method": {"kind": "l2kd"}}
    classes = labelled(folder) | {"method": {"kind": "finetune"}}
    return runs | {"questions": questions, "classes": classes}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The runs, carried out by one rank."""
    folder = tmp_path_factory.mktemp("one")
    forked(1, str(recipe_of(folder, runs_of(folder))))
    return folder / "runs"


@pytest.fixture(scope="module")
def sharded(made, tmp_path_factory) -> Path:
    """Two of them, whose exported models are evaluated by two ranks at ZeRO-3, with another
    micro-batch."""
    folder = tmp_path_factory.mktemp("two")
    runs = {name: run for name, run in runs_of(folder).items() if name in ("small", "masked")}
    shutil.copytree(made.parent / "data", folder / "data")
    for name in runs:
        shutil.copytree(made / name, folder / "runs" / name)
        (folder / "runs" / name / "scores.json").unlink()
        (folder / "runs" / name / "examples.json").unlink()
    words = ("deepspeed=zero3", "train.micro_batch=2", "evaluation.micro_batch=3")
    forked(2, str(recipe_of(folder, runs)), *words)
    return folder / "runs"


def scores(run: Path) -> dict:
    return json.loads((run / "scores.json").read_text())


def evaluations(run: Path) -> list[dict]:
    return [line for line in read_metrics(run / "train" / "metrics.jsonl") if "loss" not in line]


def prepared(run: Path) -> Prepared:
    (folder,) = {
        path.parent
        for path in (run.parents[1] / "data").glob("*/manifest.json")
        if (path.parent / "tokenizer").is_dir() and _is_of(path, run)
    }
    return open_prepared(folder)


def _is_of(manifest: Path, run: Path) -> bool:
    own = json.loads((run / "inputs.json").read_text())["data"]
    return json.loads(manifest.read_text())["fingerprint"] == own


@pytest.mark.parametrize("name", ["small", "large", "masked"])
def test_each_domain_is_in_the_metrics_and_the_scores(made, name):
    """Weighed by what each counted, the domains' losses are the total's."""
    for line in (*evaluations(made / name), scores(made / name)):
        causal = name != "masked"
        metrics = METRICS if causal else METRICS[:-1]
        assert {key for key in line if key.startswith("eval.")} == {
            f"eval.{domain}_{metric}"
            for domain in ("builtin", "few")
            for metric in (*metrics, "rows")
        }
        assert ("eval_bits_per_byte" in line) == causal
        parts = [(line[f"eval.{d}_nll"], line[f"eval.{d}_tokens"]) for d in ("builtin", "few")]
        total = math.fsum(nll * tokens for nll, tokens in parts)
        assert total / line["eval_tokens"] == pytest.approx(line["eval_nll"], rel=1e-12)
        if causal:
            text = prepared(made / name).validation.text.domains["few"]
            assert text.tokens == line["eval.few_tokens"]  # rows have a start token
            bits = line["eval.few_nll"] * text.tokens / math.log(2) / text.bytes
            assert line["eval.few_bits_per_byte"] == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("name", ["small", "masked"])
def test_ranks_stages_and_micro_batches_change_nothing(made, sharded, name):
    one, two = scores(made / name), scores(sharded / name)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-6), key
    files = [(folder / name / "examples.json").read_bytes() for folder in (made, sharded)]
    assert files[0] == files[1]


# ---- bits per byte -------------------------------------------------------------------------------


def report(capsys, made: Path, *names: str) -> str:
    """What a report on these runs prints, with single spaces."""
    words = ["report", *(str(made / name) for name in names), "--out", str(made / "out")]
    assert main([*words, "--control", names[0]]) == 0
    return " ".join(re.sub("[^ -~]", " ", capsys.readouterr().out).split())


def test_runs_on_the_same_text_are_compared_by_bits_per_byte(made, capsys):
    """Whatever their tokens and rows are."""
    out = report(capsys, made, "small", "slower", "large")
    whole = [prepared(made / name).validation.text for name in ("small", "large")]
    assert whole[0].fingerprint == whole[1].fingerprint
    assert whole[0].whole.bytes == whole[1].whole.bytes
    assert whole[0].whole.tokens > whole[1].whole.tokens
    apart = "large: not to be compared with small, since they differ in: the vocabulary"
    together = (
        "small, slower, large: compared by bits per byte, as their validation text is the same"
    )
    assert apart in out and together in out
    page = (made / "out" / "report.html").read_text()
    first, second, third = page.split("<h1>")[1:]
    assert "<td>slower</td>" in first and "<td>large</td>" not in first
    assert "steps to small&#x27;s final loss" in first and "<th>bits per byte</th>" in first
    assert second.startswith("large: not to be") and "fewer by" not in second
    assert "steps to small&#x27;s final bits per byte" in third
    for name in ("small", "slower", "large"):
        bits = evaluations(made / name)[-1]["eval_bits_per_byte"]
        assert f"<td>{name}</td>" in third and f"<td>{bits:.4f}</td>" in third
    assert third.count("<h2>") == 1 and "ppl" not in third


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("small", "text"), "; nor by bits per byte, since their validation text differs"),
        (("small", "rows"),
         "; nor by bits per byte, which {rows} does not have (evaluation.rows leaves rows out, or "
         "its data stage says why)"),
        (("small", "masked"), ""),
    ],
)  # fmt: skip
def test_other_text_is_refused(made, capsys, names, why):
    assert main(["report", *(str(made / name) for name in names)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: report: {made / names[0]} and {made / names[1]} cannot be ")
    end = f"(data.masking){why}\n" if why == "" else f"{why}\n".format(rows=made / "rows")
    assert told.endswith(end)


def test_a_run_whose_text_or_bits_are_not_there(made, tmp_path, capsys):
    """As by a method that is not evaluated by the loss; or damaged."""
    old = tmp_path / "old"
    shutil.copytree(made / "large", old)
    metrics, summary = old / "train" / "metrics.jsonl", old / "train" / "summary.json"
    metrics.write_text(metrics.read_text().replace("eval_bits_per_byte", "eval_other"))
    assert main(["report", str(made / "small"), str(old)]) == 2
    assert f"; nor by bits per byte, which {old} does not have (" in capsys.readouterr().err
    content = json.loads(summary.read_text())
    content["evaluated_on"]["text"] = 3
    summary.write_text(json.dumps(content))
    assert main(["report", str(made / "small"), str(old)]) == 2
    assert f"{summary}: damaged, 'evaluated_on'" in capsys.readouterr().err


def test_without_all_rows_there_are_no_bits_per_byte(made):
    assert not any("bits_per_byte" in key for key in scores(made / "rows"))


# ---- the report ----------------------------------------------------------------------------------


def folders(made: Path, *names: str) -> dict[str, RunFolder]:
    return {name: RunFolder(made / name) for name in names}


def test_domains_have_a_table(made):
    page = by_domain_section(folders(made, "small", "slower", "text"))
    rows = [re.findall("<t[hd]>(.*?)</t", line) for line in page.splitlines() if "<tr>" in line]
    assert rows[0] == ["domain", "run", "rows", "nll", "bits", "ppl", "tokens", "bits per byte"]
    places = [(domain, run) for domain in ("builtin", "few", "all") for run in ("small", "slower")]
    assert [tuple(row[:2]) for row in rows[1:]] == places
    found = scores(made / "slower")
    assert rows[4][3:5] == [f"{found[f'eval.few_{name}']:.6g}" for name in ("nll", "bits")]
    assert rows[6][2] == "-" and rows[6][6] == f"{found['eval_tokens']:,}"
    assert by_domain_section({"none": RunFolder(made / "none")}) == ""
    own = scores(made / "small")
    (made / "single").mkdir(exist_ok=True)
    single = {key: value for key, value in own.items() if not key.startswith("eval.")}
    (made / "single" / "scores.json").write_text(json.dumps(single))
    assert by_domain_section(folders(made, "single")) == ""


def examples(run: Path) -> Examples:
    return read_record(run / "examples.json", Examples, AssertionError)


def texts(of_run: Prepared) -> list[str]:
    """The validation rows as text."""
    return [of_run.tokenizer.decode(row) for row in all_rows(of_run.validation)]


def test_a_causal_model_goes_on_with_validation_rows(made):
    found = examples(made / "small")
    assert len(found.continued) == 3 and not found.filled
    whole = texts(prepared(made / "small"))
    for one in found.continued:
        assert one.prompt and one.text and one.written
        assert any(f"<s>{one.prompt}{one.text}" == text for text in whole)
        assert one.ended or len(one.written) >= 8
    assert {one.domain for one in found.continued} == {"builtin", "few"}


def test_a_masked_model_fills_in_what_is_hidden(made):
    found = examples(made / "masked")
    assert len(found.filled) == 3 and not found.continued
    for row in found.filled:
        hidden = row.seen.count("<mask>")
        assert 0 < hidden <= len(row.places)  # some stay, some are random
        for place in row.places:
            assert 0 < place.of_token <= place.probability < 1
            assert (place.filled == place.token) == (place.of_token == place.probability)


def test_a_question_is_answered(made):
    """The prompt ends where the answer begins, whatever the method's rows are besides; it is no
    text of which bits per byte are known."""
    found, of_run = examples(made / "questions"), prepared(made / "questions")
    assert len(found.continued) == 3 and not found.filled
    pairs = [text.removeprefix("<s>").partition("__ans__") for text in texts(of_run)]
    wanted = {(question + mark, own.removesuffix("</s>")) for question, mark, own in pairs}
    for one in found.continued:
        assert (one.prompt, one.text.removesuffix("</s>")) in wanted
    assert of_run.validation.text is None
    own = scores(made / "questions")
    assert "eval.up_nll" in own and not any("per_byte" in key for key in own)


def test_labelled_rows_have_no_examples(made):
    assert not (made / "classes" / "examples.json").exists()
    assert not any(key.startswith("eval.") for key in scores(made / "classes"))  # of one domain


def test_no_examples_are_made_where_none_are_asked_for(made):
    assert not (made / "rows" / "examples.json").exists()


def test_runs_are_shown_side_by_side(made):
    """Each prompt once, with its markup as text; runs of other rows apart."""
    page = examples_section(folders(made, "small", "slower", "text", "rows"))
    own = examples(made / "small")
    assert page.count('<div class="example">') == 3
    assert page.count("<td>small</td>") == page.count("<td>slower</td>") == 3
    assert any("<b>garden" in one.prompt + one.text for one in own.continued)
    assert "<b>garden" not in page and "&lt;b&gt;garden" in page
    page = examples_section(folders(made, "masked", "again"))
    assert page.count('<div class="example">') == 3
    assert page.count("<th>the text</th><th>masked</th><th>again</th>") == 3
    place = examples(made / "again").filled[0].places[0]
    assert f" {place.probability:.1%}" in page
    assert re.search(r"<td>[^ ]*\u2423[^ ]* \d+\.\d%", page)  # spaces are seen
    assert page.count("<mask>") == 0 and "&lt;mask&gt;" in page
    assert examples_section(folders(made, "rows", "none")) == ""


def test_damaged_examples_are_named(made, tmp_path):
    path = tmp_path / "examples.json"
    write_manifest(path, {"filled": [{"domain": "a"}]})
    with pytest.raises(CheckpointError, match=r"examples\.json: damaged, .* filled\.0\.seen"):
        examples_section({"a": RunFolder(tmp_path)})
