"""``dskd hard-tokens``: the counts are those of a plain loop, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from dskd.batch import IGNORE
from dskd.cli import main
from dskd.data.prepared import open_prepared, prepare
from dskd.data.tokenizers import special_ids
from dskd.hardness.masks import hard_view
from dskd.hardness.report import EDGES, find, run_at
from dskd.hardness.scoring import scoring_view
from dskd.hardness.store import Hardness, encode, hardness_spec
from dskd.settings.recipe import dump_run, read
from dskd.stores.fingerprints import prints_of_rows
from tests.data.conftest import make_corpus
from tests.stores.caches import write_store

BAR = "\u2502"  # between the cells of rich's tables


def answer(ids, places):
    """The NLL and wrongness of token ``ids`` at ``places`` of a row."""
    nll = np.where(ids % 5 == 0, 1.0 + ids / 256, 0.01 + ids / 10_000) + (places % 32) / 1000
    return nll.astype(np.float32), (ids % 5 == 0) & (places % 2 == 0)


def fill(run, name="questions", model="M", more=0.0):
    """Write a store of the run without a model; return the opened rows and store."""
    prepared = open_prepared(prepare(run.data))
    view = scoring_view(run.data, prepared.tokenizer, run.seed)
    prints = {**prints_of_rows(run, prepared), "scoring": view.fingerprint}
    spec = hardness_spec(run.data.masking, prepared.train, view, {**prints, "model": model})

    def content(draw, row_ids):
        labels_BT = view(prepared.train.rows(row_ids, np.full_like(row_ids, draw))).labels_BT
        asked_BT = labels_BT != IGNORE
        places_BT = np.broadcast_to(np.arange(labels_BT.shape[1]), labels_BT.shape)
        nll_N, wrong_N = answer(labels_BT[asked_BT], places_BT[asked_BT])
        return asked_BT.sum(1), encode(nll_N + np.float32(more), wrong_N)

    write_store(run.out / name, spec, content)
    return prepared, Hardness(run.out / name, prints)


def make_run(folder: Path, *overrides: str):
    """The folder of a run whose model scored its rows: two domains, the second of one sentence."""
    make_corpus(folder / "a.txt", 60)
    (folder / "b.txt").write_text("\n\n".join(f"a cat number {i} sat" for i in range(80)))
    sources = [f"{{kind: text, path: {folder / x}.txt, domain: {x}}}" for x in "ab"]
    words = [
        f"out={folder / 'run'}",
        f"data.folder={folder / 'rows'}",
        f"data.sources=[{', '.join(sources)}]",
        "data.tokenizer.vocab_size=320",
        "data.block_size=32",
        "data.masking={kind: hard_tokens, rows_per_shard: 50}",
    ]
    run = read(None, [*words, *overrides]).runs["run"]
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(dump_run(run))
    return run, *fill(run)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("causal"), "data.objective=causal")


def counts_by_loop(run, prepared, shift=0):
    """(tokens, hard, wrong, NLL) by domain, tokens and hard ones by id; hard is NLL > 0.1."""
    special_V = special_ids(prepared.tokenizer)
    by_domain, seen, hard_of = {}, {}, {}
    for row in range(len(prepared.train)):
        ids_BT, lengths_B = prepared.train.rows(np.array([row]), np.array([0]))[3:5]
        domain = prepared.domains[prepared.train.domains_B(np.array([row]))[0]]
        for place in range(lengths_B[0] - shift):
            token = int(ids_BT[0, place + shift])
            if special_V[token]:
                continue
            nll, wrong = answer(np.array(token), np.array(place))
            nll = float(np.float16(nll))
            of = by_domain.setdefault(domain, [0, 0, 0, 0.0])
            by_domain[domain] = [of[0] + 1, of[1] + (nll > 0.1), of[2] + bool(wrong), of[3] + nll]
            seen[token] = seen.get(token, 0) + 1
            hard_of[token] = hard_of.get(token, 0) + (nll > 0.1)
    return by_domain, seen, hard_of


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_counts_are_those_of_a_loop(made, causal, objective):
    run, prepared, hardness = made if objective == "masked" else causal
    found = find(run, prepared, hardness)
    by_domain, seen, hard_of = counts_by_loop(run, prepared, shift=objective == "causal")
    assert found.domains == ["a", "b"] and found.cut == 0.1
    for index, domain in enumerate(found.domains):
        tokens, hard, wrong, nll = by_domain[domain]
        assert tokens > 100 and 0 < wrong < hard < tokens
        assert found.tokens_D[index] == tokens
        assert (found.hard_D[index], found.wrong_D[index]) == (hard, wrong)
        assert found.nll_D[index] == pytest.approx(nll, rel=1e-6)
    total = sum(of[0] for of in by_domain.values())
    assert found.magnitudes.sum() == total
    assert found.above(0.1) == found.hard_D.sum() and found.above(-1) == total
    assert found.above(0) == total  # 0.01 at least
    assert {i: n for i, n in enumerate(found.seen_V.tolist()) if n} == seen
    hard_of = {i: n for i, n in hard_of.items() if n}
    assert {i: n for i, n in enumerate(found.hard_V.tolist()) if n} == hard_of
    want = sorted(hard_of, key=lambda i: (-hard_of[i], i))
    assert found.most_often_hard(7).tolist() == want[:7]
    assert found.most_often_hard(10_000).tolist() == want


def test_what_is_taken(made, causal):
    run, prepared, hardness = made
    found = find(run, prepared, hardness)
    kwargs = {"scores": hardness.fingerprint, "rowset": prepared.train}
    view = hard_view(run.data, prepared.tokenizer, run.seed, lambda _: hardness, **kwargs)
    row_ids = np.arange(len(prepared.train))
    labels_BT = view(prepared.train.rows(row_ids, row_ids * 0)).labels_BT
    assert found.taken_D.sum() == (labels_BT != IGNORE).sum()
    assert found.taken_D.sum() / found.tokens_D.sum() == pytest.approx(0.15, abs=0.01)
    unbounded = run.data.masking.model_copy(update={"least": 0.0, "most": 1.0})
    data = run.data.model_copy(update={"masking": unbounded})
    found = find(run.model_copy(update={"data": data}), prepared, hardness)
    assert (found.taken_D == found.hard_D).all()
    run, prepared, hardness = causal
    found = find(run, prepared, hardness)
    assert (found.taken_D == found.hard_D).all()


def test_printed(made, capsys, tmp_path):
    run, prepared, hardness = made
    found = find(run, prepared, hardness)
    plot = tmp_path / "hard.png"
    assert main(["hard-tokens", str(run.out), "--plot", str(plot), "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "Hard tokens: NLL above 0.1 nats" in out
    assert out.startswith(f"scores in {run.out}/questions, of the model with fingerprint M\n")
    lines = [[cell.strip() for cell in line.split(BAR)[1:-1]] for line in out.splitlines()]
    rows = {cells[0]: cells[1:] for cells in reversed(lines) if cells}  # the first of a name
    tokens, hard = int(found.tokens_D.sum()), int(found.hard_D.sum())
    assert rows["all"][:3] == [f"{tokens:,}", f"{hard:,}", f"{hard / tokens:.2%}"]
    assert rows["a"][0] == f"{found.tokens_D[0]:,}"
    # The table of NLLs adds up, and its "above" falls.
    spread = [rows[f"{edge:g}"] for edge in EDGES]
    assert sum(int(cells[0].replace(",", "")) for cells in spread) == tokens
    assert rows["0.1"][2] == f"{hard / tokens:.2%}"
    index = int(found.most_often_hard(1)[0])
    named = [cells[1:4] for cells in lines if cells[1:2] == [str(index)]]
    assert named[-1] == [str(index), f"{found.seen_V[index]:,}", f"{found.hard_V[index]:,}"]
    assert imread(plot).shape[:2] == (495, 1210)


def test_other_settings_can_be_tried(made, capsys):
    run, prepared, hardness = made
    for override, heading in (
        ("data.masking.threshold=1.5", "NLL above 1.5 nats"),
        ("data.masking.metric=correctness", "those that are not the model's first guess"),
        ("data.masking.metric=quantile", "nats, the hardest 0.2"),
    ):
        assert main(["hard-tokens", str(run.out), override]) == 0
        assert heading in capsys.readouterr().out
    correct = find(run_at(run.out, ["data.masking.metric=correctness"]), prepared, hardness)
    assert (correct.hard_D == correct.wrong_D).all() and correct.cut is None
    hardest = find(run_at(run.out, ["data.masking.metric=quantile"]), prepared, hardness)
    assert 0.15 < hardest.hard_D.sum() / hardest.tokens_D.sum() <= 0.2


def test_a_later_epoch(made, capsys):
    """The masks are those of that epoch, and of the student that scored the rows before it."""
    run, prepared, hardness = made
    _, later = fill(run, "questions-epoch-00002", model="S", more=1.0)
    refresh = "data.masking.refresh=2"
    found = find(run_at(run.out, [refresh]), prepared, later, epoch=3)
    assert found.hard_D.tolist() == found.tokens_D.tolist()  # all are 1 nat harder
    begins = f"scores in {run.out}/questions"
    for epoch, words in (
        (0, f"{begins}, of the model with fingerprint M\n"),
        (3, f"{begins}-epoch-00002, of the model with fingerprint S\n"),
    ):
        assert main(["hard-tokens", str(run.out), refresh, "--epoch", str(epoch)]) == 0
        assert capsys.readouterr().out.startswith(words)
    first, other = (find(run, prepared, hardness, epoch).taken_D for epoch in (0, 1))
    assert first.tolist() != other.tolist()  # the masks alone are others
    assert (first.sum() - other.sum()) / first.sum() == pytest.approx(0, abs=0.02)


def test_refusals(made, capsys, tmp_path):
    run = made[0]

    def refused(*words):
        assert main(["hard-tokens", *map(str, words)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    assert "config.yaml: no such file" in refused(tmp_path)
    assert "is hard_tokens in none of its runs" in refused(run.out, "data.masking.kind=random")
    assert "is not one of png, svg, pdf" in refused(run.out, "--plot", tmp_path / "x.docx")
    assert "no such store" in refused(run.out, f"data.masking.store={tmp_path / 'none'}")
    assert "made with another blocking" in refused(run.out, "data.block_size=24")
    assert "made with another scoring" in refused(run.out, "data.masking.shown=mask")
    assert "data.masking.least" in refused(run.out, "data.masking.least=0.5")
    assert "--epoch: -1 is less than 0" in refused(run.out, "--epoch", -1)
    after = refused(run.out, "data.masking.refresh=2", "--epoch", 5)
    assert "questions-epoch-00004: no such store; training, once 4 epochs are over" in after
    recipe = tmp_path / "a.yaml"
    runs = "runs: {a: {}, b: {}}\n"
    data = "data: {sources: [{kind: builtin}], masking: {kind: hard_tokens}}"
    base = f"base: {{out: o, method: {{kind: lm}}, model: {{path: m}}, {data}}}\n"
    recipe.write_text(base + runs)
    assert "name the folder of one: o/a, o/b" in refused(recipe)
