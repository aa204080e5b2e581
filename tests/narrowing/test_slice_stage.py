"""``model.slice``: a student that starts as the heaviest units of its teacher, end to end."""

import json
import shutil

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForMaskedLM

from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.narrowing.heaviest import slice_model
from dskd.narrowing.widths import Widths
from dskd.runs.plan import check
from dskd.settings.recipe import read
from tests.launching import cut_back, forked, losses

RECIPE = """
base:
  out: {folder}/runs
  deepspeed: {stage}
  method: {{kind: lm}}
  teacher: null
  data:
    folder: {folder}/data
    sources: [{{kind: builtin, documents: 30}}]
    tokenizer: {{vocab_size: 320}}
    block_size: 32
  train: {{steps: 4, batch: 4, micro_batch: 2, warmup: 0, precision: fp32}}
  evaluation: {{every: 2, rows: 8}}
  checkpoint: {{every: 2}}
runs:
  teacher:
    model: {{config: {{model_type: bert, hidden_size: 32, intermediate_size: 48,
                       num_hidden_layers: 2, num_attention_heads: 4,
                       hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}}}}
  student:
    model: {{path: "run:teacher", slice: {{hidden_size: 16}}}}
"""


def recipe_in(folder, *overrides: str, stage: str = "zero0", more: str = ""):
    """The recipe's settings and methods."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, stage=stage) + more)
    recipe = read(path, list(overrides))
    return recipe, {name: build_method(run.method) for name, run in recipe.runs.items()}


def carried_out(folder, ranks: int = 1, stage: str = "zero0"):
    """The folder of the student's run, by the user's command."""
    recipe_in(folder, stage=stage)
    forked(ranks, str(folder / "recipe.yaml"))
    return folder / "runs" / "student"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return carried_out(tmp_path_factory.mktemp("sliced"))


def test_the_folder_is_the_slice_of_what_the_teacher_exported(done):
    teacher = AutoModelForMaskedLM.from_pretrained(done.parent / "teacher" / "export")
    stored = AutoModelForMaskedLM.from_pretrained(done / "sliced")
    expected = slice_model(teacher, Widths(16, 24, 4, 4, 4), "dim").state_dict()
    found = stored.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert stored.dtype == torch.float32


def test_the_student_starts_there_and_is_exported_in_its_size(done):
    stored, trained = (
        AutoModelForMaskedLM.from_pretrained(done / name) for name in ("sliced", "export")
    )
    config = trained.config
    assert (config.hidden_size, config.intermediate_size) == (16, 24)
    assert config.num_attention_heads == 4
    pairs = zip(stored.named_parameters(), trained.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        if a.dim() == 2:  # 4 steps of at most 1e-3 from weights of about 2e-2
            assert cosine_similarity(a.flatten(), b.flatten(), dim=0).item() > 0.9, name
            assert not torch.equal(a, b), name
    assert json.loads((done / "scores.json").read_text())["eval_nll"] > 0


def test_a_resumed_run_cuts_nothing_and_ends_where_an_uninterrupted_one_does(done, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(done.parents[1], copy)
    student = copy / "runs" / "student"
    shutil.rmtree(student / "export")
    (student / "scores.json").unlink()
    cut_back(student, 2)
    file = student / "sliced" / "model.safetensors"
    before = file.stat().st_ino
    for settings in (copy / "runs").glob("*/config.yaml"):
        settings.write_text(settings.read_text().replace(str(done.parents[1]), str(copy)))
    carried_out(copy)
    assert file.stat().st_ino == before
    again, once = (
        AutoModelForMaskedLM.from_pretrained(folder / "export") for folder in (student, done)
    )
    for a, b in zip(again.parameters(), once.parameters(), strict=True):
        assert torch.equal(a, b)


REFUSED = {
    "runs.student.model.slice.hidden_size=18": r"runs.student.model.slice.hidden_size: 18 is not a "
    r"multiple of the 4 heads .*; nearest possible: 16 or 20",
    "runs.student.model.slice.hidden_size=36": r"model.slice.hidden_size: 36 is not within the "
    r"teacher's 32; nearest possible: 32",
    "runs.student.model.slice.intermediate_size=99": r"model.slice.intermediate_size: 99 .*: 48",
    "runs.student.model.slice.heads=2": r"model.slice.heads: 2 does not go with strategy dim",
    "runs.teacher.model.slice.hidden_size=16": r"runs.teacher.model.slice: needs model.path",
    "runs.teacher.model.config.model_type=electra": "model.slice: cannot cut a electra, only bert",
    "runs.student.teacher={kind: live, model: {path: x, slice: {hidden_size: 4}}}": "teacher.model."
    "slice: only the student can be cut",
    "runs.student.model.slice.strategy=both": "'both' is not one of dim, head",
    "runs.student.model.config={hiden_size: 3}": r"runs.student.model.config.hiden_size: a bert "
    r"config has no such field; did you mean 'hidden_size'\?",
    "runs.student.model.config={model_type: gpt2}": r"model.config.model_type: model.path holds a "
    r"bert",
    "runs.student.model.config={max_position_embeddings: 16}": r"runs.student.model.config."
    r"max_position_embeddings: 16 are too few for data.block_size 32; 32 are needed",
    "runs.student.model.config={layer_norm_eps: small}": r"runs.student.model.config: .*"
    r"layer_norm_eps",
    "runs.student.model.config={hidden_size: 32}": r"runs.student.model.config.hidden_size: "
    r"model.slice sets it; leave it out",
    "runs.student.model.config={tie_word_embeddings: true}": r"tie_word_embeddings: model.slice "
    r"sets it",
}


@pytest.mark.parametrize("override", REFUSED)
def test_an_impossible_slice_is_refused_before_anything_starts(override, tmp_path):
    with pytest.raises(ConfigError, match=REFUSED[override]):
        check(*recipe_in(tmp_path, override), world=1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_every_stage_and_world_starts_from_the_same_slice(done, tmp_path, stage):
    """Two ranks, of which the first cuts, with the teacher of the first run."""
    shutil.copytree(done.parents[1] / "data", tmp_path / "data")
    student = carried_out(tmp_path, ranks=2, stage=stage)
    assert len(losses(student)) == 4
    assert losses(student) == pytest.approx(losses(done), rel=1e-4)


def test_what_a_sliced_run_exports_is_known_to_the_next(tmp_path):
    longer = '  last: {model: {path: "run:student", slice: {hidden_size: 20}}}\n'
    with pytest.raises(ConfigError, match=r"runs.last.*hidden_size: 20 is not within .* 16;"):
        check(*recipe_in(tmp_path, more=longer), world=1)
