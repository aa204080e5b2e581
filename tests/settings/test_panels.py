"""Settings of panels: what may be written, and what is refused by name."""

from pathlib import Path

import pytest

from dskd.errors import ConfigError
from dskd.methods.base import build_method
from dskd.methods.checks import validate
from dskd.runs.plan import check
from dskd.settings.folders import cache_folder
from dskd.settings.recipe import dump_run, read
from dskd.settings.teachers import CachedTeacher, PanelMember, each_teacher, section_name

CONFIG = "{config: {model_type: roberta}}"
LIVE = f"a: {{model: {CONFIG}}}, b: {{model: {CONFIG}}}"
KEPT = f"{{kind: cached, model: {CONFIG}, temperatures: [1.0, 2.0]"
CACHED = f"a: {KEPT}}}, b: {KEPT}}}"
SOFT = "mixture: {rule: confidence_soft}"
DRAWS = "data.masking.draws=1"


def panel(teachers: str = LIVE, more: str = SOFT) -> str:
    return f"teacher={{kind: panel, teachers: {{{teachers}}}, {more}}}"


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        run = read(None, [*overrides, DRAWS]).runs["run"]
        validate(run, build_method(run.method), world=1)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("rule", ["uniform", "confidence_soft", "confidence_hard"])
@pytest.mark.parametrize("teachers", [LIVE, CACHED], ids=["live", "cached"])
def test_panels_of_language_models_are_sound(teachers, rule, objective):
    words = [panel(teachers, f"mixture: {{rule: {rule}}}"), f"data.objective={objective}", DRAWS]
    run = read(None, words).runs["run"]
    validate(run, build_method(run.method), world=2)


def test_a_teacher_of_a_panel_is_live_unless_it_says_so(tmp_path):
    """Also where its model is what an earlier run exports."""
    text = f"base: {{out: o, method: {{kind: lm}}, model: {CONFIG}, "
    text += "data: {sources: [{kind: builtin}]}}\n"
    text += "runs:\n  t: {}\n  s: {teacher: {kind: panel, mixture: {rule: uniform}, teachers: "
    text += "{a: {model: {path: 'run:t'}}, b: {kind: cached, k: 4, model: {path: 'run:t'}}}}}\n"
    (tmp_path / "r.yaml").write_text(text)
    a, b = read(tmp_path / "r.yaml").runs["s"].teacher.teachers.values()
    assert isinstance(a, PanelMember) and isinstance(b, CachedTeacher)
    assert (a.kind, a.model.path, b.model.path) == ("live", "o/t/export", "o/t/export")


def test_it_can_be_read_back(tmp_path):
    """Its config.yaml names all settings, those that are of classifiers included."""
    more = "mixture: {rule: fixed, weights: {a: 1, b: 0.5}}"
    run = read(None, [panel(CACHED, more), DRAWS]).runs["run"]
    (tmp_path / "config.yaml").write_text(dump_run(run))
    again = read(tmp_path / "config.yaml").runs["run"]
    assert again == run
    validate(again, build_method(again.method), world=1)


def test_each_has_a_cache_of_its_own(tmp_path):
    """Below the run's, at a path of its own, or in what another run's teacher of the name left."""
    first = panel(CACHED).removeprefix("teacher=")
    other = "a: {kind: cached, path: 'run:x', temperatures: [1.0, 2.0]}, b: " + KEPT + ", path: p}"
    second = panel(other).removeprefix("teacher=")
    text = f"base: {{out: o}}\nruns:\n  x: {{teacher: {first}}}\n  y: {{teacher: {second}}}\n"
    (tmp_path / "r.yaml").write_text(
        text.replace("base: {out: o}", f"base: {{out: o, method: {{kind: ki, steps: 3}}, model: "
                     f"{CONFIG}, data: {{masking: {{draws: 1}}, sources: [{{kind: builtin}}]}}}}")
    )  # fmt: skip
    recipe = read(tmp_path / "r.yaml")
    x, y = recipe.runs["x"], recipe.runs["y"]
    names = [*each_teacher(x.teacher)]
    assert [section_name(name) for name in names] == ["teacher.teachers.a", "teacher.teachers.b"]
    assert [cache_folder(x, name) for name in names] == [Path("o/x/cache/a"), Path("o/x/cache/b")]
    assert [cache_folder(y, name) for name in names] == [Path("o/x/cache/a"), Path("p")]
    check(recipe, {name: build_method(run.method) for name, run in recipe.runs.items()}, world=1)


def test_caches_and_scores_are_told_apart(tmp_path):
    """By the teacher that reads them, too."""
    cached = "{kind: cached, model: {config: {model_type: bert}}}"
    panel = "teacher: {kind: panel, %s}"
    makers = {
        "cached": f"teacher: {cached}",
        "mixed": panel % f"mixture: {{rule: uniform}}, teachers: {{x: {cached}}}",
        "scores": panel % "teachers: {x: {model: {path: m}}}",
    }
    readers = {
        "cached": "teacher: {kind: cached, path: 'run:a'}",
        "scores": panel % "path: 'run:a', teachers: {x: {model: {path: m}}}",
    }
    base = f"out: o, method: {{kind: lm}}, model: {CONFIG}, data: {{sources: [{{kind: builtin}}]}}"
    wrong = {"cached": "has no cache, its", "scores": "has no cache of scores, its"}
    for made, maker in makers.items():
        for read_as, reader in readers.items():
            recipe = f"base: {{{base}}}\nruns:\n  a: {{{maker}}}\n  b: {{{reader}}}\n"
            (tmp_path / "r.yaml").write_text(recipe)
            if made == read_as:
                assert read(tmp_path / "r.yaml").runs["b"].teacher.path == Path("o/a/cache")
                continue
            told = rf"runs\.b\.teacher\.path: 'run:a' {wrong[read_as]}"
            with pytest.raises(ConfigError, match=told):
                read(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (panel(more="mixture: null"),
         "teacher.mixture: missing; say how much each language model says, as {rule: "),
        (panel(more="mixture: {}"), "teacher.mixture.rule: missing"),
        (panel(more="mixture: {rule: confident}"),
         "command line: teacher.mixture.rule: 'confident' is not one of uniform, fixed, conf"),
        (panel(more="mixture: {rule: fixed}"),
         "teacher.mixture.weights: missing; the rule fixed needs a number for each"),
        (panel(more="mixture: {rule: uniform, weights: {a: 1, b: 1}}"),
         "command line: teacher.mixture.weights: of the rule fixed, but the rule is uniform"),
        (panel(more="mixture: {rule: fixed, weights: {a: 0, b: 0}}"),
         "command line: teacher.mixture.weights: {'a': 0.0, 'b': 0.0}: one must be more than 0"),
        (panel(more="mixture: {rule: fixed, weights: {a: -1, b: 1}}"),
         "command line: teacher.mixture.weights.a: -1"),
        (panel(more="mixture: {rule: fixed, weights: {a: 1, b: 1}, sharpness: 0.1}"),
         "command line: teacher.mixture.sharpness: 0.1, but the rule fixed has none; leave it out"),
        (panel(more="mixture: {rule: confidence_soft, sharpness: 0}"),
         "command line: teacher.mixture.sharpness: 0"),
        (panel(more="mixture: {rule: fixed, weights: {a: 1}}"),
         "teacher.mixture.weights: no number for the teacher 'b'"),
        (panel(more="mixture: {rule: fixed, weights: {a: 1, b: 1, bb: 1}}"),
         "teacher.mixture.weights.bb: no teacher has this name; did you mean 'b'?"),
        (panel(f"a: {{model: {CONFIG}}}, b: {KEPT}}}"),
         "teacher.teachers: all must be live or all cached, but: a live, b cached"),
        (panel("a: {kind: liv, model: {path: x}}"),
         "command line: teacher.teachers.a.kind: 'liv' is not one of live, cached"),
        (panel(f"a: {KEPT}, path: p}}, b: {KEPT}, path: p}}"),
         "teacher.teachers.b.path: the same folder as that of 'a'"),
        (panel(CACHED.replace("[1.0, 2.0]", "[2.0]", 1)),
         "teacher.teachers.a.temperatures: [2.0] has no 1.0, at which the rule confidence_soft"),
        (panel(CACHED.replace("[1.0, 2.0]", "[1.0]", 1)),
         "method.temperature: 2.0 is not in teacher.teachers.a.temperatures: 1.0"),
        (panel(CACHED.replace("kind: cached", "kind: cached, k: 4, use_k: 5", 1)),
         "teacher.teachers.a.use_k: 5 is more than teacher.teachers.a.k 4"),
        (panel(more=f"{SOFT}, scores: live"),
         "teacher.scores: of a panel of classifiers, but data.objective is masked"),
        (panel(more=f"{SOFT}, confidence: logits"), "teacher.confidence: of a panel of class"),
        (panel(more=f"{SOFT}, passes: 1"), "teacher.passes: of a panel of classifiers"),
        (panel(more=f"{SOFT}, dropout: 0.1"), "teacher.dropout: of a panel of classifiers"),
        (panel(more=f"{SOFT}, path: p"), "teacher.path: of a panel of classifiers"),
        (panel(f"a: {{model: {CONFIG}, labels: [x, y]}}"),
         "teacher.teachers.a.labels: of a panel of classifiers"),
        (panel(f"a: {{model: {CONFIG}, domains: [x]}}"),
         "teacher.teachers.a.domains: of a panel of classifiers"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(override, line):
    (found,) = problems(override)
    assert found.startswith(line), found


def test_a_divergence_of_all_logits_is_refused_of_caches():
    run = read(None, [panel(CACHED), "method.divergence=jsd"]).runs["run"]
    with pytest.raises(ConfigError, match=r"method\.divergence: jsd needs all of a teacher's log"):
        build_method(run.method).check(run, None)
    live = read(None, [panel(LIVE), "method.divergence=jsd"]).runs["run"]
    build_method(live.method).check(live, None)


@pytest.mark.parametrize("kept", ["k: 2049", "k: 4000, use_k: 2049"])
def test_more_tokens_than_the_kernels_take_are_refused(kept):
    each = KEPT.replace("kind: cached", f"kind: cached, {kept}")
    teachers = f"a: {each}}}, b: {KEPT}, k: 2048}}"
    name = "use_k" if "use_k" in kept else "k"
    told = f"teacher.teachers: teacher.teachers.a.{name} 2049 + teacher.teachers.b.k 2048 may be "
    large = "data.tokenizer.vocab_size=5000"
    (found,) = problems(panel(teachers), large)
    assert found.startswith(f"{told}more than the 4096 tokens of a position"), found
    for words in ([panel(teachers)], [panel(teachers.replace("2049", "2048")), large]):
        run = read(None, [*words, DRAWS]).runs["run"]
        validate(run, build_method(run.method), world=1)


ROWS = "data={objective: classification, labels: [x, y], sources: [{kind: csv, path: p}]}"


def test_classifiers_are_not_mixed_by_the_teacher_nor_have_caches():
    words = [ROWS, "method={kind: muki}"]
    lines = [line for line in problems(*words, panel(LIVE)) if line.startswith("teacher")]
    assert lines == [
        "teacher.mixture: of language models, but data.objective is classification; leave it out"
    ]
    several = problems(*words, panel(CACHED, "micro_batch: 4"))
    lines = [line for line in several if line.startswith("teacher")]
    told = "cached, which keeps a language model's logits; leave it out: teacher.scores stored"
    assert lines == [f"teacher.teachers.{name}.kind: {told} keeps a classifier's" for name in "ab"]


@pytest.mark.parametrize(
    ("member", "line"),
    [
        ("domains: [b]", "teacher.teachers: none is asked about the domain 'a' of data.sources"),
        ("labels: [y, xx]", "teacher.teachers.t.labels: 'xx' is not one of data.labels; did you m"),
    ],
)
def test_domains_and_classes_that_the_settings_tell(member, line):
    rows = "data={objective: classification, labels: [x, y], sources: [%s]}"
    sources = ", ".join(f"{{kind: csv, path: {name}, domain: {name}}}" for name in "ab")
    words = [rows % sources, "method={kind: muki}"]
    told = problems(*words, panel(f"t: {{model: {CONFIG}, {member}}}", "passes: 1"))
    (found,) = [each for each in told if each.startswith("teacher")]
    assert found.startswith(line), found
    sound = f"t: {{model: {CONFIG}, {member}}}, u: {{model: {CONFIG}}}".replace("xx", "x")
    told = problems(*words, panel(sound, "passes: 1"))
    assert not [each for each in told if each.startswith("teacher")]
