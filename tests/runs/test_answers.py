"""Answers of an exported model to the questions of named sets: those of a plain greedy loop, the
same for any geometry and after any stop, and scored as by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.settings.yaml_tree import dump, load, merge
from dskd.system.files import write_manifest
from tests.data.test_questions import entry, squad
from tests.launching import forked
from tests.runs.test_plan import recipe_of
from tests.runs.test_question_runs import asked

ROOM, BLOCK, ROWS = 6, 32, 37


def sets_of(folder: Path) -> dict:
    """Three sets: rows of the first task, evenly spaced; questions of the second with several
    answers, and of neither, with details."""
    lines = [json.loads(line) for line in (folder / "down.jsonl").read_text().splitlines()]
    several = [{k: v for k, v in line.items() if k != "answer"} for line in lines]
    for line, row in zip(lines, several, strict=True):
        row["answers"] = [line["answer"], "a b c d e"]
    path = folder / "several.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in several))
    own = folder / "woz.json"
    squad(own, *[("the cat sat", [entry(f"en_{n}", f"turn {n} ?", "x: y")]) for n in range(3)])
    turns = [[f"en_0_{n}", "food: thai;" if n else "None"] for n in range(3)]
    (folder / "turns.json").write_text(json.dumps(turns))
    woz = {"kind": "squad", "path": str(own), "domain": "up"}
    return {
        "up": {"sources": [{"kind": "questions", "path": str(folder / "up.jsonl"),
                            "domain": "up"}], "metric": "em", "rows": ROWS},
        "down.2": {"sources": [{"kind": "questions", "path": str(path), "domain": "down"}],
                   "metric": "nf1", "longest": 3},
        "woz": {"sources": [woz | {"answers": str(folder / "turns.json")}],
                "metric": "joint_goal_em"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a recipe whose only run has been exported, and not yet evaluated."""
    folder = tmp_path_factory.mktemp("answers")
    run = merge(asked(folder), {"model": {"config": {"initializer_range": 0.3}}})
    run["evaluation"] = {"micro_batch": 4, "sets": sets_of(folder)}
    forked(1, str(recipe_of(folder, {"only": run})), "until=export")
    return folder


def evaluated(trained: Path, out: Path, ranks: int = 1, *words: str, status: int = 0) -> Path:
    """A copy of the run, as far as it is not there yet, evaluated."""
    if not out.exists():
        shutil.copytree(trained / "runs" / "only", out)
    tree = load(out / "config.yaml") | {"until": "evaluate", "out": str(out)}
    (out.parent / f"{out.name}.yaml").write_text(dump(tree))
    geometry = ["train.micro_batch=2"] * (ranks == 2)
    forked(ranks, str(out.parent / f"{out.name}.yaml"), *geometry, *words, status=status)
    return out


@pytest.fixture(scope="module")
def one(trained) -> Path:
    return evaluated(trained, trained / "one")


def rows_of(run: Path, name: str) -> list[dict]:
    return [json.loads(li) for li in (run / "answers" / f"{name}.jsonl").read_text().splitlines()]


def scores_of(run: Path) -> dict:
    found = json.loads((run / "scores.json").read_text())
    return {k: v for k, v in found.items() if not k.startswith(("eval_", "eval."))}


def plain(model, tokenizer, row: dict, longest: int) -> str:
    """The answer to one question, token by token, without a cache."""
    context, question = (
        tokenizer(row.get(key, ""), add_special_tokens=False).input_ids
        for key in ("context", "question")
    )
    context = context[: BLOCK - len(question) - 1 - ROOM]
    ids, written = [*context, *question, tokenizer.convert_tokens_to_ids("__ans__")], []
    while len(written) < longest:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    return tokenizer.decode(written, clean_up_tokenization_spaces=False)


def test_they_are_those_of_a_plain_greedy_loop(trained, one):
    model = AutoModelForCausalLM.from_pretrained(one / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(one / "export", split_special_tokens=True)
    lines = [json.loads(line) for line in (trained / "up.jsonl").read_text().splitlines()]
    up = rows_of(one, "up")
    assert [row["question"] for row in up] == ["up ?"] * ROWS
    assert [row["context"] for row in up] == [
        lines[n * len(lines) // ROWS]["context"] for n in range(ROWS)
    ]
    longest = max(
        len(tokenizer(answer, add_special_tokens=False).input_ids)
        for row in up
        for answer in row["references"]
    )
    assert [row["answer"] for row in up] == [plain(model, tokenizer, row, longest) for row in up]
    down = rows_of(one, "down.2")
    assert [row["answer"] for row in down] == [plain(model, tokenizer, row, 3) for row in down]
    assert len(down) == 60 and len({row["answer"] for row in (*up, *down)}) > 9


GEOMETRIES = [(1, 1, 0), (1, 32, 0), (2, 1, 0), (2, 32, 0), (2, 3, 3)]


@pytest.mark.parametrize(("ranks", "batch", "stage"), GEOMETRIES)
def test_any_geometry_writes_the_same_bytes(trained, one, ranks, batch, stage):
    words = (f"evaluation.micro_batch={batch}", f"deepspeed=zero{stage}")
    other = evaluated(trained, trained / f"{ranks}-{batch}-{stage}", ranks, *words)
    for name in ("up", "down.2", "woz"):
        file = f"answers/{name}.jsonl"
        assert (other / file).read_bytes() == (one / file).read_bytes()
    assert scores_of(other) == scores_of(one)


def stopped(one: Path, out: Path, rows: int) -> None:
    """The run as a kill leaves it that hits while the second set is answered."""
    shutil.copytree(one, out)
    (out / "scores.json").unlink()
    (out / "answers" / "woz.jsonl").unlink()
    (out / "answers" / "woz.jsonl.settings.json").unlink()
    whole = out / "answers" / "down.2.jsonl"
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) > rows
    whole.with_name("down.2.jsonl.part").write_bytes(b"".join(lines[:rows]) + lines[rows][:9])
    whole.unlink()


def test_it_goes_on_where_it_was_stopped(trained, one, tmp_path):
    """What is whole is not answered again: the first answers, of another text here, stay."""
    out = tmp_path / "stopped"
    stopped(one, out, 19)
    part, up = (out / "answers" / name for name in ("down.2.jsonl.part", "up.jsonl"))
    for path in (part, up):
        first, rest = path.read_bytes().split(b"\n", 1)
        path.write_bytes(json.dumps(json.loads(first) | {"answer": "kept"}).encode() + b"\n" + rest)
    evaluated(trained, out)
    for name in ("up", "down.2"):
        found = rows_of(out, name)
        assert found[0]["answer"] == "kept" and found[1:] == rows_of(one, name)[1:]
    assert rows_of(out, "woz") == rows_of(one, "woz")


def answer(run: Path, name: str, answers: list[str]) -> None:
    """Let a finished file have these answers."""
    rows = [row | {"answer": a} for row, a in zip(rows_of(run, name), answers, strict=True)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "answers" / f"{name}.jsonl").write_text(text)


def test_scores_by_hand_of_answers_that_are_there(trained, one, tmp_path):
    before = scores_of(one)
    assert before["up_em"] < 10 and before["down.2_nf1"] < 10
    assert before["woz_joint_goal_em"] == pytest.approx(100 / 3)  # the turn without any slot
    out = tmp_path / "again"
    shutil.copytree(one, out)
    (out / "scores.json").unlink()
    right = [row["references"][0] for row in rows_of(out, "up")]
    answer(out, "up", [*right[:20], "", f"{right[21]}.", *["no"] * 15])
    answer(out, "down.2", ["b c x"] * 30 + ["no"] * 30)  # 2 of 3 words, of 4 without the article
    answer(out, "woz", ["None", "food: thai;", "food: thai;"])
    found = scores_of(evaluated(trained, out))
    assert found["up_em"] == pytest.approx(100 * 20 / 37)
    assert found["down.2_nf1"] == pytest.approx(100 * 30 / 60 * 2 * 2 / (3 + 4))
    assert found["woz_joint_goal_em"] == found["woz_turn_request_em"] == 100
    assert found.keys() == before.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("up.jsonl", "up.jsonl: damaged, 36 answers to 37 questions"),
        ("up.jsonl.settings.json", "up.jsonl was made otherwise (longest: 9, now "),
    ],
)
def test_answers_that_are_damaged_or_of_something_else_are_refused(
    trained, one, tmp_path, capfd, name, message
):
    out = tmp_path / "other"
    shutil.copytree(one, out)
    (out / "scores.json").unlink()
    path = out / "answers" / name
    if name.endswith(".settings.json"):
        content = json.loads(path.read_text())
        assert content.keys() >= {"export", "tokenizer", "questions", "longest"}
        content.pop("checksum")
        write_manifest(path, content | {"longest": 9})
    else:
        path.write_text(path.read_text().split("\n", 1)[1])
    evaluated(trained, out, status=2)
    assert message in capfd.readouterr().err


def test_details_that_are_none_are_refused_with_the_rows(tmp_path, capfd):
    run = asked(tmp_path)
    run["evaluation"] = {"sets": {"woz": sets_of(tmp_path)["woz"]}}
    (tmp_path / "turns.json").write_text(json.dumps([["a", "b"], ["a", "b"], {"sql": 1}]))
    forked(1, str(recipe_of(tmp_path, {"only": run})), "until=data", status=2)
    told = f"error: evaluation.sets.woz: {tmp_path}/woz.json: data 0, paragraph 2, question 0: "
    assert (
        f'{told}joint_goal_em takes ["NAME_OF_DIALOGUE_TURN", "ANSWER"]' in capfd.readouterr().err
    )
