"""Grids of trials on small tasks: what is learnt, resumed, refused and told."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from dskd.cli import main
from dskd.downstream import grid
from dskd.downstream.command import main as downstream_main
from dskd.downstream.processes import Child, ChildError, run_all
from dskd.downstream.trials import splits_of
from dskd.errors import ConfigError
from dskd.settings.checks import check_settings
from dskd.settings.downstream import DownstreamTask
from dskd.settings.recipe import read
from dskd.settings.yaml_tree import dump, merge
from dskd.train import _say_rest
from tests.downstream.test_pairs import ROWS, pieces, write
from tests.launching import ROOT, environment, forked
from tests.models import tiny

GLUE = ROOT / "tests/golden/bridges/glue"
CSV = {"kind": "csv", "path": "x.csv", "label": "y"}
WORDS = {"fruit": ["t1", "t2", "t3", "t4"], "bird": ["t5", "t6", "t7", "t8"]}


def table(folder: Path, *, shuffled: bool = False, splits: str = "train dev test") -> Path:
    """A task of two classes, each of its own words; ``shuffled``: the labels say nothing."""
    draw = random.Random(3)
    folder.mkdir()
    for split in splits.split():
        rows = []
        for n in range(96 if split == "train" else 40):
            name = list(WORDS)[n % 2]
            text = " ".join(draw.choices(WORDS[name], k=draw.randint(2, 5)))
            rows.append({"text": text, "label": draw.choice(list(WORDS)) if shuffled else name})
        write(folder / f"{split}.jsonl", *rows)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.stored(folder, "bert", tok=pieces(), hidden_dropout_prob=0.0)
    return folder


def settings(folder: Path, model: Path, **changes) -> Path:
    task = {"task": "classification", "name": "words", "path": str(folder / "words")}
    section = {
        "models": {"one": {"path": str(model)}},
        "tasks": [task],
        "lr": [1e-5, 5e-3],
        "seeds": [1],
        "batch": 8,
        "epochs": 3,
        "max_length": 16,
    }
    path = folder / "grid.yaml"
    path.write_text(dump({"out": str(folder / "out"), "downstream": merge(section, changes)}))
    return path


@pytest.fixture
def in_forks(monkeypatch) -> list[str]:
    """Children are forks of the test, which is seconds faster; the names of those that ran."""
    ran: list[str] = []

    def run(children: list[Child], at_once: int, say: object) -> None:
        del at_once, say
        for child in children:
            ran.append(child.name)
            if child.words[1] == "dskd.train":
                forked(1, child.words[2])
            else:
                assert main(list(child.words[2:])) == 0
            child.done()

    monkeypatch.setattr(grid, "run_all", run)
    return ran


def downstream(path: Path, *words: str) -> dict:
    assert main(["downstream", str(path), *words]) == 0
    return json.loads((read(path, words).out / "downstream.json").read_text())


def test_what_can_be_learnt_is_and_the_smallest_rate_is_not_chosen(
    tmp_path, model, in_forks, capsys
):
    table(tmp_path / "words")
    path = settings(tmp_path, model)
    found = downstream(path)
    assert in_forks == ["one, words, lr 1e-05, seed 1", "one, words, lr 0.005, seed 1"]
    told = found["tasks"]["words"]
    assert (told["headline"], told["selected_on"]) == ("test_accuracy", "dev")
    one = told["models"]["one"]
    assert one["lr"] == 5e-3 and one["selecting"] == [1.0] and one["failed"] == 0
    assert one["scores"]["test_accuracy"]["mean"] == one["scores"]["dev_accuracy"]["mean"] == 1.0
    out = capsys.readouterr().out
    assert "test accuracy" in out and "1.0000" in out
    page = (tmp_path / "out/report.html").read_text()
    assert "<h1>Downstream</h1>" in page and "Scores of single seeds" in page
    assert not (tmp_path / "out/downstream/one/words/0.005-1/run").exists()  # not kept


def test_labels_that_say_nothing_are_not_learnt(tmp_path, model, in_forks):
    """Or a row's label would reach the model."""
    table(tmp_path / "words", shuffled=True)
    found = downstream(settings(tmp_path, model, lr=[5e-3]))
    assert (
        in_forks
        and 0.2 < found["tasks"]["words"]["models"]["one"]["scores"]["test_accuracy"]["mean"] < 0.8
    )


def test_a_stopped_grid_goes_on_trial_by_trial(tmp_path, model, in_forks, capsys):
    table(tmp_path / "words")
    path = settings(tmp_path, model, seeds=[1, 2], epochs=1)
    whole = downstream(path)
    results = sorted((tmp_path / "out").rglob("result.json"))
    assert len(results) == len(in_forks) == 4
    written = [*results, *(tmp_path / "out").rglob("run.yaml")]
    before = {file: file.stat().st_mtime_ns for file in written}
    results[2].unlink()
    (tmp_path / "out/downstream.json").unlink()
    assert downstream(path) == whole
    assert in_forks[4:] == ["one, words, lr 1e-05, seed 1"] and "1e-05-1" in str(results[2])
    for file in written:
        touched = file.stat().st_mtime_ns != before[file]
        assert touched == (file.parent == results[2].parent), file
    assert downstream(path) == whole and len(in_forks) == 5  # nothing is left to do
    capsys.readouterr()
    assert downstream(path, "downstream.keep=true") == whole
    assert "of 4 trials that are done no run was kept" in capsys.readouterr().out


def test_results_of_other_settings_or_rows_are_refused(tmp_path, model, in_forks):
    table(tmp_path / "words")
    path = settings(tmp_path, model, lr=[5e-3], epochs=1)
    downstream(path)
    told = "0.005-1/result.json: of other settings, rows or another model than now; delete "
    with pytest.raises(ConfigError, match=told):
        grid.Grid(read(path, ["downstream.batch=16"]).downstream, tmp_path / "out").carry_out()
    rows = (tmp_path / "words/test.jsonl").read_text()
    (tmp_path / "words/test.jsonl").write_text(rows + rows)
    with pytest.raises(ConfigError, match=told):
        grid.Grid(read(path).downstream, tmp_path / "out").carry_out()
    (tmp_path / "words/test.jsonl").write_text(rows)
    (tmp_path / "words").rename(tmp_path / "moved")
    free = [f"downstream.tasks.0.path={tmp_path}/moved", "downstream.micro_batch=4"]
    downstream(path, *free)
    assert len(in_forks) == 1


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path, model, in_forks):
    """A run by itself takes another length for the steps to come, and a stored model as it is."""
    table(tmp_path / "words")
    path = settings(tmp_path, model, lr=[5e-3])
    trial = grid.Grid(read(path).downstream, tmp_path / "out").trials[0]
    other = grid.Grid(read(path, ["downstream.epochs=4"]).downstream, tmp_path / "out")
    other.trials[0].prepare()
    trial.prepare()  # no step is taken yet
    trial.run.checkpoints.mkdir(parents=True)
    trial.prepare()
    with pytest.raises(ConfigError, match=r"0\.005-1/run: begun with other settings, rows or"):
        other.carry_out()
    (trial.folder / "begun.json").unlink()
    with pytest.raises(ConfigError, match="begun with other settings"):
        trial.prepare()
    assert not in_forks


def test_a_twin_a_holdout_and_pairs_beside_each_other(tmp_path, model, in_forks, capsys):
    """Two models on a task without a dev file, and on minimal pairs."""
    table(tmp_path / "words", splits="train")
    lm = {"task": "minimal_pairs", "path": str(write(tmp_path / "pairs.jsonl", *ROWS))}
    task = {"task": "classification", "name": "words", "path": str(tmp_path / "words")}
    models = {"one": {"path": str(model)}, "random": {"path": str(model), "random": True}}
    path = settings(tmp_path, model, models=models, tasks=[task | {"holdout": 0.3}, lm], lr=[5e-3])
    found = downstream(path)
    told = found["tasks"]["words"]
    assert (told["headline"], told["selected_on"]) == ("holdout_accuracy", "holdout")
    assert [one["first"] + "-" + one["second"] for one in told["comparisons"]] == ["one-random"]
    assert "words: reported on the very rows that selected" in capsys.readouterr().out
    of = found["pairs"]["minimal_pairs"]
    assert of["one"]["random"] == of["random"]["random"] == of["random"]["accuracy"]
    assert in_forks[:2] == ["one, minimal_pairs", "random, minimal_pairs"]
    assert downstream(path) == found and len(in_forks) == 4


def test_some_of_the_classes_alone(tmp_path, model, in_forks):
    """Rows of the others are left out of all splits, also of what is reported."""
    table(tmp_path / "words")
    for split in ("train", "dev", "test"):
        path = tmp_path / f"words/{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write(
            path, *(row | {"label": "third"} if n % 5 == 0 else row for n, row in enumerate(rows))
        )
    task = {"task": "classification", "name": "words", "path": str(tmp_path / "words")}
    task["labels"] = ["bird", "fruit"]
    found = downstream(settings(tmp_path, model, tasks=[task], lr=[5e-3]))
    kept = (tmp_path / "out/downstream/_files/words/test.jsonl").read_text().splitlines()
    assert len(kept) == 32 and not any("third" in row for row in kept) and len(in_forks) == 1
    assert found["tasks"]["words"]["models"]["one"]["scores"]["test_accuracy"]["mean"] == 1.0


def test_folders_of_glue_as_tasks(tmp_path, model, in_forks):
    """MNLI selects on its matched file and reports the other, too."""
    folders = {"rte": "RTE", "mnli": "MNLI"}
    tasks = [{"task": name, "path": str(GLUE / folder)} for name, folder in folders.items()]
    found = downstream(settings(tmp_path, model, tasks=tasks, lr=[1e-3], epochs=1, batch=2))
    assert len(in_forks) == 2 and found["glue"] == {}
    scores = {name: [*told["models"]["one"]["scores"]] for name, told in found["tasks"].items()}
    assert scores == {"rte": ["dev_accuracy"], "mnli": ["dev_accuracy", "mismatched_accuracy"]}
    assert found["tasks"]["mnli"]["headline"] == "dev_accuracy"


def test_sources_of_any_kind(tmp_path, model, in_forks):
    """Saved tables, of which the classes have names, and no label at the rows of a split."""
    import datasets

    names = datasets.ClassLabel(names=["bird", "fruit"])
    features = datasets.Features({"words": datasets.Value("string"), "is": names})
    rows = {"words": ["t1 t2", "t5"] * 20, "is": [1, 0] * 20}
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "saved"))
    of = {"kind": "datasets", "path": str(tmp_path / "saved"), "field": "words", "label": "is"}
    task = {"task": "classification", "name": "saved", "train": [of | {"split": "train"}]}
    task |= {"test": [of | {"split": "test"}], "holdout": 0.5, "labels": ["bird", "fruit"]}
    told = downstream(settings(tmp_path, model, tasks=[task], lr=[5e-3], epochs=6))["tasks"][
        "saved"
    ]
    assert told["models"]["one"]["scores"]["test_accuracy"]["mean"] >= 0.5 and len(in_forks) == 1


def test_numbers_are_chosen_by_the_smallest_loss(tmp_path, model, in_forks):
    """Of rows of two texts, whose number the first one says."""
    (tmp_path / "words").mkdir()
    draw = random.Random(1)
    for split, count in (("train", 64), ("dev", 24)):
        lines = ["a\tb\tscore"]
        for _ in range(count):
            one = draw.choice(["t1", "t9"])
            lines.append(f"{one}\tt3 t4\t{1.0 if one == 't1' else 0.0}")
        (tmp_path / f"words/{split}.tsv").write_text("\n".join(lines) + "\n")
    task = {"task": "regression", "name": "share", "path": str(tmp_path / "words")}
    task |= {"text": ["a", "b"], "label": "score", "metric": "loss"}
    path = settings(tmp_path, model, tasks=[task], epochs=4)
    told = downstream(path)["tasks"]["share"]
    assert not told["higher_is_better"] and told["models"]["one"]["lr"] == 5e-3
    assert told["models"]["one"]["selecting"][0] < 0.05 < told["models"]["one"]["rates"]["1e-05"]
    assert len(in_forks) == 2


def test_a_diverged_trial_is_counted_and_never_chosen(tmp_path, model, monkeypatch):
    """What its process says tells it from one that failed."""
    table(tmp_path / "words")

    def run(children: list[Child], at_once: int, say: object) -> None:
        del at_once, say
        for child in children:
            child.log.parent.mkdir(parents=True, exist_ok=True)
            if "lr 0.005" in child.name:
                child.log.write_text(
                    "error: step 3: the loss is nan; the last checkpoint is intact\n"
                )
                assert child.survives()
            else:
                child.log.write_text("error: train.steps: missing\n")
                assert not child.survives()
                forked(1, child.words[2])
            child.done()

    monkeypatch.setattr(grid, "run_all", run)
    one = downstream(settings(tmp_path, model, epochs=1))["tasks"]["words"]["models"]["one"]
    assert one["lr"] == 1e-5 and one["failed_of_all"] >= 1 and one["rates"]["0.005"] is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks": [{"task": "classification", "path": "nowhere"}]},
         r"downstream\.tasks\.0\.path: nowhere has no train\.jsonl or train\.tsv or train\.csv"),
        ({"models": {"one": {"path": "runs/no/export"}}},
         r"downstream\.models\.one\.path: runs/no/export is no folder of a model"),
        ({"tasks": [{"task": "minimal_pairs", "path": "nowhere"}]},
         r"downstream\.tasks\.0\.path: nowhere: no such file"),
        ({"precision": "fp16"}, r"downstream\.tasks\.0 \(words, one\): .*fp16"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_is_trained(tmp_path, model, changes, told, in_forks):
    table(tmp_path / "words")
    path = settings(tmp_path, model, **changes)
    with pytest.raises(ConfigError, match=told):
        grid.Grid(read(path).downstream, tmp_path / "out")
    assert not in_forks


def test_metrics_are_known_by_name(tmp_path, model):
    table(tmp_path / "words")
    task = {"task": "classification", "path": str(tmp_path / "words"), "metric": "acuracy"}
    path = settings(tmp_path, model, tasks=[task])
    with pytest.raises(ConfigError, match=r"tasks\.0: 'acuracy' is not one of .*mean 'accuracy'"):
        grid.Grid(read(path).downstream, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lr": [1e-3, 1e-3]}, r"downstream\.lr: \[0\.001, 0\.001\] has one twice"),
        ({"lr": [1e-3, 1.0000001e-3]}, r"downstream\.lr: .* has one twice"),
        ({"batch": 8, "micro_batch": 3}, r"downstream\.batch: 8 is not a multiple of micro_batch"),
        ({"tasks": [{"task": "rte", "path": "x"}] * 2}, r"tasks\.1\.name: another task is called"),
        ({"tasks": [{"task": "rte", "path": "x", "text": ["a"]}]},
         r"tasks\.0\.text: plays no part in a task of kind rte; leave it out"),
        ({"tasks": [{"task": "squad", "path": "x"}]}, r"downstream\.tasks\.0\.task: "),
        ({"models": {"a/b": {"path": "x"}}}, r"downstream\.models\.a/b: a name is made of"),
        ({"tasks": [{"task": "rte", "path": "x", "holdout": 1.5}]}, r"tasks\.0\.holdout: 1\.5"),
        ({"tasks": [{"task": "rte"}]}, r"downstream\.tasks\.0\.path: missing"),
        ({"tasks": [{"task": "classification", "path": "x", "dev": [CSV]}]},
         r"tasks\.0\.dev: is beside train only"),
        ({"tasks": [{"task": "classification", "path": "x", "train": [CSV]}]},
         r"tasks\.0\.path: beside train; one of the two"),
        ({"tasks": [{"task": "classification", "train": [CSV], "label": "z"}]},
         r"tasks\.0\.label: plays no part in a task of kind classification"),
        ({"lrs": [1e-3]}, r"downstream\.lrs: no such setting; did you mean 'lr'"),
        ({"models": {"a": {"path": "run:x"}}}, r"models\.a\.path: 'run:x' names no earlier run"),
    ],
)  # fmt: skip
def test_settings_that_contradict_themselves(tmp_path, changes, told):
    path = tmp_path / "a.yaml"
    tasks = {"models": {"one": {"path": "x"}}, "tasks": [{"task": "rte", "path": "x"}]}
    path.write_text(dump({"out": "x", "downstream": merge(tasks, changes)}))
    with pytest.raises(ConfigError, match=told):
        read(path)


def test_a_file_without_runs_is_shown_but_not_trained(tmp_path, model, capsys):
    table(tmp_path / "words")
    path = settings(tmp_path, model)
    with pytest.raises(ConfigError, match="no run is in the file; `dskd downstream FILE`"):
        check_settings(read(path), 1)
    assert main(["settings", str(path)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["out"] == str(tmp_path / "out") and shown["downstream"]["batch"] == 8
    with pytest.raises(ConfigError, match="out: a=b: a name without ="):
        grid.Grid(read(path).downstream, Path("a=b"))
    empty = tmp_path / "runs.yaml"
    run = {"out": "x", "method": {"kind": "lm"}, "model": {"config": {"model_type": "bert"}}}
    empty.write_text(dump(run | {"data": {"sources": [{"kind": "builtin"}]}}))
    with pytest.raises(ConfigError, match=r"runs\.yaml: downstream: missing; the section with"):
        downstream_main([str(empty)])


def test_a_recipe_names_the_models_of_its_runs(tmp_path, capsys):
    base = {"out": str(tmp_path / "out"), "method": {"kind": "lm"}}
    base["data"] = {"sources": [{"kind": "builtin", "documents": 5}]}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    section = {"models": {"it": {"path": "run:a"}}, "tasks": [{"task": "rte", "path": "~/rte"}]}
    runs = {"a": {"model": {"config": {"model_type": "bert", **sizes}}}}
    path = tmp_path / "a.yaml"
    path.write_text(dump({"base": base, "runs": runs, "downstream": section}))
    found = read(path, ["downstream.seeds=[7]"])
    assert list(found.runs) == ["a"] and found.downstream.seeds == [7]
    assert found.downstream.models["it"].path == str(tmp_path / "out/a/export")
    assert found.downstream.tasks[0].path == str(Path.home() / "rte")
    with pytest.raises(
        ConfigError, match=r"models\.it\.path: .*/a/export is no folder of a model; is"
    ):
        downstream_main([str(path)])
    assert main(["settings", str(path), "downstream.seeds=[7]"]) == 0
    shown = capsys.readouterr().out.split("--- # of dskd downstream\n")[1]
    assert yaml.safe_load(shown)["downstream"]["seeds"] == [7]
    path.write_text(dump({"base": base, "runs": {"downstream": runs["a"]}, "downstream": section}))
    with pytest.raises(ConfigError, match=r"runs\.downstream: its folder is that of the section"):
        read(path, ["downstream.models.it.path=x"])
    _say_rest([str(path)], True)
    _say_rest([str(path)], False)
    assert capsys.readouterr().out == f"its section downstream: dskd downstream {path}\n"


@pytest.mark.parametrize("name", ["glue", "quickstart", "small"])
def test_shipped_grids_are_read(name):
    found = read(ROOT / f"launch/downstream/{name}.yaml")
    assert len(found.downstream.tasks) == (8 if name == "glue" else 5) and not found.runs


def test_metrics_of_two_classes_are_refused_of_more(tmp_path, model):
    mnli = {"task": "mnli", "path": str(GLUE / "MNLI"), "further_metrics": ["f1"]}
    path = settings(tmp_path, model, tasks=[mnli])
    told = r"downstream\.tasks\.0: f1 is of two classes, but the rows have 3"
    with pytest.raises(ConfigError, match=told):
        grid.Grid(read(path).downstream, tmp_path / "out")


def test_the_average_of_glue_is_of_its_own_metrics(tmp_path, model, monkeypatch):
    """A loss, or a task that is there twice, is no part of it."""
    names = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]
    folders = ["CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI", "QNLI", "RTE"]
    tasks = [{"task": n, "path": str(GLUE / f)} for n, f in zip(names, folders, strict=True)]
    monkeypatch.setattr(grid.Grid, "_check_runs", lambda self: None)  # which take scikit-learn

    def average(*changed: dict) -> dict:
        path = settings(tmp_path, model, tasks=[*tasks[:-1], *changed])
        made = grid.Grid(read(path).downstream, tmp_path / "out")
        scores = {
            f"{s}_{m}": {"mean": 0.5}
            for s in ("dev", "mismatched")
            for m in ("accuracy", "matthews", "accuracy_and_f1", "pearson_and_spearman", "loss")
        }
        told = {
            task.own_name: {
                "task": task.task,
                "metric": task.scores[0],
                "models": {"one": {"scores": scores}},
            }
            for task in made.section.tasks
        }
        return made._glue(told)

    of = {"over": "8 tasks, without WNLI", "average": 0.5}
    assert average(tasks[-1]) == {"one": of}
    assert average(tasks[-1] | {"metric": "loss"}) == {}
    assert average(tasks[-1], tasks[-1] | {"name": "again"}) == {}


def test_what_a_task_of_glue_selects_and_reports_by():
    mnli = splits_of(DownstreamTask(task="mnli", path="x"), "t")
    assert (mnli.dev[0]["split"], mnli.reported) == ("dev_matched", ["dev", "mismatched"])
    held = splits_of(DownstreamTask(task="rte", path="x", holdout=0.1), "t")
    assert (held.dev, held.reported, held.selecting) == (None, ["dev"], "holdout")
    assert DownstreamTask(task="mrpc", path="x").scores == ("accuracy_and_f1", ("accuracy", "f1"))
    assert DownstreamTask(task="rte", path="x").scores == ("accuracy", ())


def child(name: str, folder: Path, program: str, **more) -> Child:
    ended = more.pop("ended", [])
    return Child(name, ["-c", program], folder / f"{name}.txt", lambda: ended.append(name), **more)


def test_children_run_some_at_a_time_and_a_failed_one_is_told(tmp_path):
    ended: list[str] = []
    good = [child(f"c{n}", tmp_path, "print('good')", ended=ended) for n in range(3)]
    run_all(good, 2, lambda text: None)
    assert sorted(ended) == ["c0", "c1", "c2"] and (tmp_path / "c0.txt").read_text() == "good\n"
    says = "import sys; print('error: no such row'); sys.exit(2)"
    survivor = child("s", tmp_path, says, ended=ended, survives=lambda: True)
    run_all([survivor], 1, lambda text: None)
    assert ended[-1] == "s"
    sleeps = child("sleeps", tmp_path, "import time; time.sleep(60)", ended=ended)
    begun = time.monotonic()
    with pytest.raises(ChildError, match=r"bad: status 2 \(.*bad\.txt\): error: no such row"):
        run_all([sleeps, child("bad", tmp_path, says, ended=ended)], 2, lambda text: None)
    assert time.monotonic() - begun < 30 and "sleeps" not in ended


def test_many_children_leave_nothing_in_memory(tmp_path):
    """20 trials one after the other: the process that starts them grows by less than 5 per cent."""
    own = psutil.Process()

    def run(names: range) -> int:
        run_all([Child(f"{n}", ["-c", "pass"], tmp_path / "log", int) for n in names], 1, str)
        return own.memory_info().rss

    first = run(range(1))
    assert run(range(20)) < 1.05 * first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_children_end_with_the_process_that_started_them(tmp_path, number):
    """Also where that has no moment left to end them."""
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text(
        "import os, time\n"
        "from dskd.system.launcher import stop_with_launcher\n"
        "stop_with_launcher(75); print(os.getpid(), flush=True); time.sleep(60)"
    )
    program = (
        "import signal, sys; from pathlib import Path\n"
        "from dskd.downstream.processes import Child, run_all\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"log = Path({str(tmp_path / 'log.txt')!r})\n"
        f"run_all([Child('x', [{str(sleeper)!r}], log, int)], 1, print)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment(), cwd=ROOT)
    log, until = tmp_path / "log.txt", time.monotonic() + 60
    while not (log.exists() and log.read_text().strip()):
        assert time.monotonic() < until and parent.poll() is None
        time.sleep(0.1)
    parent.send_signal(number)
    assert parent.wait(timeout=30) == (75 if number == signal.SIGTERM else -number)
    child = int(log.read_text().split()[0])
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.1)
    said = "what started this process has died; it stops" in log.read_text()
    assert said == (number == signal.SIGKILL)


@pytest.mark.launch
def test_the_users_own_command(tmp_path, model):
    """With real processes of their own, two at a time."""
    table(tmp_path / "words")
    path = settings(tmp_path, model, lr=[5e-3], seeds=[1, 2], epochs=1, jobs=2)
    command = [sys.executable, "-m", "dskd.cli", "downstream", str(path)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path / 'out/report.html'}"
    assert len(list((tmp_path / "out").rglob("result.json"))) == 2
