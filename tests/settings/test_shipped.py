"""The shipped recipes: each is accepted as it is, and says what its head says."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig

from dskd.engine import run_config
from dskd.methods.base import build_method
from dskd.narrowing.layouts import layout_of, widths_of
from dskd.narrowing.widths import Family, Target, Widths, student_widths
from dskd.runs.plan import CONTROL, check
from dskd.settings.compare import differences
from dskd.settings.downstream import downstream_tree
from dskd.settings.model import Model
from dskd.settings.recipe import Recipe, read
from dskd.settings.teachers import CachedTeacher, PanelTeacher
from dskd.settings.yaml_tree import dump

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
RECIPES = sorted(
    p for p in LAUNCH.rglob("*.yaml") if p.relative_to(LAUNCH).parts[0] != "downstream"
)
KI = LAUNCH / "ki"
WID = LAUNCH / "wid"


def methods(recipe: Recipe) -> dict:
    return {name: build_method(run.method) for name, run in recipe.runs.items()}


def parameters(model: Model, auto: type, vocabulary: int) -> int:
    fields = {name: value for name, value in model.config.items() if name != "model_type"}
    config = AutoConfig.for_model(model.config["model_type"], vocab_size=vocabulary, **fields)
    with torch.device("meta"):
        return sum(p.numel() for p in auto.from_config(config).parameters())


def _with_libraries(path: Path) -> None:
    """Skip the test where the recipe's scores lack their library."""
    if path.parent.name == "l2kd" and "rouge" in path.read_text():
        pytest.importorskip("nltk")


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_accepted_on_any_power_of_two_of_ranks(path, world, tmp_path):
    _with_libraries(path)
    recipe = read(path, [f"out={tmp_path}", "train.precision=auto"])  # fp16 wants a GPU
    check(recipe, methods(recipe), world=world)
    controls = {"self_evolution": "random", "muki": "supervised", "l2kd": "multitask"}
    assert controls.get(path.parent.name, CONTROL) in recipe.runs


WORTH = [
    path
    for path in RECIPES
    if path.parent.name in ("ki", "wid", "self_evolution")
    and path.stem not in ("quickstart", "debug")
]


@pytest.mark.parametrize("path", WORTH, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_says_on_which_tasks_its_models_are_compared(path):
    """GLUE where the models are as large as its papers'; each against others of the recipe."""
    recipe = read(path)
    section = recipe.downstream
    exports = {str(run.out / "export") for run in recipe.runs.values()}
    own = [model for model in section.models.values() if model.path in exports]
    assert len(own) >= 2 and len(section.seeds) >= 3
    tasks = {task.task for task in section.tasks}
    assert (len(tasks) == 8) == (path.stem in ("paper_roberta", "bert_dim", "bert_head"))


@pytest.mark.parametrize(
    "path",
    [*WORTH, *sorted((LAUNCH / "downstream").glob("*.yaml"))],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_a_section_that_is_shown_can_be_read_back(path, tmp_path):
    section, file = read(path).downstream, tmp_path / "shown.yaml"
    file.write_text(dump({"out": "x", "downstream": downstream_tree(section)}))
    assert read(file).downstream == section


@pytest.mark.parametrize("path", [None, *RECIPES], ids=lambda path: path.stem if path else "toy")
def test_a_recipe_is_accepted_on_gpus_in_its_own_precision(path, tmp_path, monkeypatch):
    """Which is bf16 where it says nothing."""
    if path is not None:
        _with_libraries(path)
    for name in ("on_gpu", "has_bf16"):
        monkeypatch.setattr(run_config, name, lambda: True)
    recipe = read(path, [f"out={tmp_path}"])
    check(recipe, methods(recipe), world=2 if path is None else 8)


@pytest.mark.parametrize("path", sorted(KI.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_student_and_its_control_differ_in_what_is_inherited_only(path):
    runs = read(path).runs
    last = runs["ki" if "ki" in runs else "large"]
    changed = differences(last, runs[CONTROL])
    others = [d for d in changed if not d.startswith(("method", "teacher"))]
    tokenizer_is_the_controls = path.stem == "domains"
    assert all(d.startswith("data.tokenizer") for d in others), others
    assert bool(others) == tokenizer_is_the_controls


def test_quickstart_uses_nothing_that_must_be_downloaded():
    runs = read(KI / "quickstart.yaml").runs
    assert list(runs) == ["teacher", "ki", "scratch"]
    for run in runs.values():
        assert [source.kind for source in run.data.sources] == ["builtin"]
        assert run.data.tokenizer.kind == "trained"
        assert run.model.path is None
    assert isinstance(runs["ki"].teacher, CachedTeacher)
    vocabulary = runs["ki"].data.tokenizer.vocab_size
    teacher, student = (
        parameters(runs[name].model, AutoModelForCausalLM, vocabulary) for name in ("teacher", "ki")
    )
    assert teacher < student / 2


def test_paper_recipe_is_the_original_script():
    """train_base_to_base_plus.sh and the task's defaults, option by option."""
    run = read(KI / "paper_roberta.yaml").runs["ki"]
    train, data, method = run.train, run.data, build_method(run.method)
    masking = data.masking
    assert (train.betas, train.eps, train.clip) == ((0.9, 0.98), 1e-6, 0.0)
    assert (train.schedule, train.lr, train.warmup) == ("polynomial", 3.5e-4, 11000)
    assert (train.steps, train.power, train.end_lr) == (125000, 1.0, 0.0)
    assert (train.weight_decay, train.decay_all, train.precision) == (0.01, True, "fp16")
    assert (train.micro_batch, train.batch) == (16, 16 * 16 * 8)  # update-freq 16, 8 GPUs
    assert (data.block_size, data.packing, data.objective) == (512, "complete", "masked")
    assert (masking.probability, masking.keep, masking.random) == (0.15, 0.1, 0.1)
    assert (masking.whole_word, masking.sampler, run.seed) == (False, "fairseq", 1)
    assert (method.temperature, method.schedule, method.steps) == (2.0, "linear", 55000)
    assert (run.checkpoint.every, run.log_every) == (2500, 100)
    config = run.model.config
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0.1
    token_types = 864  # one row, which the original has not
    assert parameters(run.model, AutoModelForMaskedLM, 50265) == 210_601_017 + token_types
    assert run.teacher.kind == "live"


def test_modern_recipe_is_a_larger_student_of_a_cached_top_64():
    run = read(KI / "llama_topk.yaml").runs["ki"]
    assert (run.data.objective, run.teacher.kind, run.teacher.k) == ("causal", "cached", 64)
    assert run.model.config["model_type"] == "llama"
    count = parameters(run.model, AutoModelForCausalLM, 49152)
    assert math.isclose(count, 362e6, rel_tol=0.01)  # SmolLM2-360M


@pytest.mark.parametrize("path", sorted(WID.glob("*.yaml")), ids=lambda path: path.stem)
def test_controls_of_wid_see_the_same_rows_and_end_in_the_same_sizes(path):
    runs = read(path).runs
    control = runs[CONTROL]
    narrowed = [run for run in runs.values() if run.method["kind"] == "wid"]
    assert narrowed
    for run in [*narrowed, runs["slice"]]:
        changed = differences(run, control)
        assert all(d.startswith(("method", "model", "teacher", "train.lr:")) for d in changed)
    config = control.model.config
    cut = runs["slice"].model.slice
    assert cut.hidden_size == config["hidden_size"]
    for run in narrowed:
        for name in ("hidden_size", "intermediate_size", "heads", "kv_heads"):
            assert run.method.get(name) == getattr(cut, name), name
    if cut.intermediate_size is not None:
        assert cut.intermediate_size == config["intermediate_size"]
    if cut.heads is not None:
        assert cut.heads == config["num_attention_heads"]
        assert cut.kv_heads == config["num_key_value_heads"]


@pytest.mark.parametrize(("strategy", "heads"), [("dim", 12), ("head", 3)])
def test_bert_recipes_are_the_run_of_the_originals_readme(strategy, heads):
    """Spec, section 1: the run 12-192 and the options' defaults."""
    runs = read(WID / f"bert_{strategy}.yaml").runs
    wid = runs["wid"]
    train, masking, method = wid.train, wid.data.masking, build_method(wid.method)
    assert (train.steps, train.warmup, train.lr) == (400_000, 4000, 1e-6)
    assert (train.micro_batch, train.batch) == (120, 8 * 120)
    assert (train.betas, train.eps, train.weight_decay) == ((0.9, 0.999), 1e-6, 0.01)
    assert (train.schedule, train.end_lr, train.clip) == ("linear", 0.0, 0.0)
    assert (train.precision, train.decay_all) == ("fp32", False)
    assert (masking.probability, masking.keep, masking.random) == (0.15, 0.1, 0.1)
    assert wid.data.block_size == 128
    assert (method.rule, method.strategy, method.hidden_size) == ("original", strategy, 192)
    assert (method.every, method.penalty, method.lr) == (500, 20.0, 5e-5)
    assert method.inherit is None
    small = runs["scratch"].model
    assert small.config["num_attention_heads"] == heads
    # BERT-base as it is: its config says all that the settings do not.
    teacher = BertConfig()
    target = Target(**runs["slice"].model.slice.model_dump(), rule="original")
    widths = student_widths(widths_of(teacher), target, layout_of(teacher).demands)
    assert widths == Widths(192, 768, heads, heads, 192 // heads)
    tables = (30522 + 512 + 2) * 192 + 2 * 192
    layer = 12 * 192**2 + 13 * 192
    head = 192**2 + 3 * 192 + 30522 * 192 + 2 * 30522  # HuggingFace's has two biases
    assert parameters(small, AutoModelForMaskedLM, 30522) == tables + 12 * layer + head
    assert math.isclose(tables + 12 * layer, 11.30e6, rel_tol=1e-3)


def test_the_llama_of_wid_is_as_wide_as_the_smaller_one():
    runs = read(WID / "llama_ki.yaml").runs
    method = build_method(runs["wid"].method)
    # SmolLM2-360M, which is not downloaded here
    teacher = Widths(960, 2560, 15, 5, 64)
    target = Target(**runs["slice"].model.slice.model_dump())
    widths = student_widths(teacher, target, Family(rotary=True, divides=True))
    assert widths == Widths(576, 1536, 9, 3, 64)
    assert (method.hidden_size, method.heads, method.inherit.schedule) == (576, 9, "linear")
    steps = runs["wid"].train.steps
    assert method.inherit.steps == steps / 2
    assert round(method.inherit.alpha(method.every * method.ramp + method.anneal - 1), 2) == 0.63
    assert runs["scratch"].model.config["rope_theta"] == 100_000
    assert method.every * method.ramp + method.anneal < runs["wid"].train.steps / 4


@pytest.mark.parametrize("path", sorted((LAUNCH / "muki").glob("*.yaml")), ids=lambda p: p.stem)
def test_students_of_a_panel_differ_from_the_supervised_one_in_what_teaches_them(path):
    runs = read(path).runs
    students = {
        name: run
        for name, run in runs.items()
        if isinstance(run.teacher, PanelTeacher) and run.until == "evaluate"
    }
    assert students
    for name, run in students.items():
        changed = {place.split(":")[0] for place in differences(runs["supervised"], run)}
        allowed = ("method", "teacher", "evaluation.patience")
        if path.stem == "cnews":  # the original's batches, and how often it evaluates
            allowed += ("train.batch", "evaluation.every", "checkpoint.every")
        assert [place for place in changed if not place.startswith(allowed)] == [], name


def test_cnews_has_the_original_hyper_parameters():
    runs = read(LAUNCH / "muki" / "cnews.yaml").runs
    methods_of = {name: build_method(run.method) for name, run in runs.items()}
    for name, run in runs.items():
        train = run.train
        assert (train.epochs, train.lr, train.warmup, train.precision) == (3, 2e-5, 0.1, "fp16")
        assert (train.weight_decay, train.betas, train.eps) == (0, (0.9, 0.999), 1e-8)
        assert run.data.block_size == 128 and run.evaluation.micro_batch == 64
        batch = 16 if name == "muki" else 64 if run.teacher is None else 32
        assert train.batch == batch, name
        assert methods_of[name].selection().metric == "eval_accuracy"
    muki = methods_of["muki"]
    assert (muki.choice, muki.sharpness, muki.margin) == ("soft", 0.2, True)
    assert (muki.temperature, muki.squared, muki.weight) == (1, False, 1)
    assert runs["muki"].teacher.passes == 16 and runs["muki"].teacher.confidence == "passes"
    assert (methods_of["vkd"].squared, methods_of["uhc"].squared) == (True, True)


L2KD = LAUNCH / "l2kd"


@pytest.mark.parametrize("path", sorted(L2KD.glob("*.yaml")), ids=lambda path: path.stem)
def test_ways_to_learn_tasks_differ_in_their_method_and_what_it_reads(path):
    """Of each task; GEM's memories take its own clipping, and are allowed fewer epochs."""
    runs = read(path).runs
    tasks = list(runs["multitask"].evaluation.sets)
    allowed = ("method", "model", "teacher", "data.sources", "data.memory", "data.questions")
    for name, run in runs.items():
        task = next((task for task in tasks if name.split("-")[-1] == task), None)
        if task is None:  # all of them, or a teacher
            continue
        changed = {place.split(":")[0] for place in differences(runs[f"finetune-{task}"], run)}
        own = ("train.epochs", "train.clip") if name.startswith("gem") else ()
        assert [place for place in changed if not place.startswith((*allowed, *own))] == [], name
        assert run.evaluation.sets.keys() == set(tasks)


@pytest.mark.parametrize(
    ("name", "tasks", "orders", "metrics"),
    [
        ("wcs", ["woz", "cnn", "wikisql"], 6, ["joint_goal_em", "avg_rouge", "lfem"]),
        ("nlg", ["e2enlg", "rest", "hotel", "tv", "laptop"], 2, ["avg_rouge"] * 5),
        ("tc", ["amazon", "yelp", "yahoo", "ag", "dbpedia"], 2, ["em"] * 5),
    ],
)
def test_streams_of_the_original(name, tasks, orders, metrics):
    """Spec, sections 1 to 4: its shapes, orders and the options' defaults."""
    runs = read(L2KD / f"{name}.yaml").runs
    sets = runs["multitask"].evaluation.sets
    assert list(sets) == tasks and [each.metric for each in sets.values()] == metrics
    assert len({run for run in runs if run.startswith("soft") and run.endswith(tasks[0])}) == orders
    for run_name, run in runs.items():
        train, method = run.train, build_method(run.method)
        assert (train.epochs, train.lr, train.eps, train.warmup) == (9, 6.25e-5, 1e-4, 0.005), run
        assert (train.betas, train.weight_decay, train.clip) == ((0.9, 0.999), 0.01, 1.0)
        assert (run.checkpoint.export, method.adamw, method.temperature) == ("fp32", "original", 2)
        assert method.text_weight in (0.25, 0) and run.data.block_size == 1024
        first = run.model.path == "gpt2"
        assert first == run.model.new_tokens
        assert list(run.data.questions.task_tokens) == tasks
        if run.data.replayed_domains:
            assert not first and (method.replay.share, method.replay.top_k) == (0.2, 20), run_name
    assert runs[f"{tasks[1]}-teacher"].model.path == "gpt2"
    assert runs[f"word-{tasks[1]}"].teacher.model.path.endswith(f"{tasks[1]}-teacher/export")


def test_the_toys_are_the_small_tasks_of_the_study():
    runs = read(L2KD / "toys.yaml").runs
    assert len(runs) == 11 * 3 + 3 + 1
    config = runs["rev"].model.config
    assert (config["n_layer"], config["n_embd"], runs["rev"].train.lr) == (2, 64, 3e-3)
    last = {name.removesuffix("-shift"): run for name, run in runs.items() if "shift" in name}
    shares = {name: build_method(run.method).replay for name, run in last.items()}
    assert {n: r.share for n, r in shares.items() if r} == {
        "shift": 0.2, "lll5": 0.05, "word": 0.2, "counts": 0.2, "seq": 0.2, "soft": 0.2,
        "real": 0.2,
    }  # fmt: skip
    penalty = build_method(last["ewc"].method).penalty
    assert penalty.folder == runs["ewc-maj"].out
    assert build_method(runs["ewc-rev"].method).penalty.folder is None
    assert [s.domain for s in last["gem"].data.memory] == ["rev", "maj"]
