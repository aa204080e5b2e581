"""``dskd generate``: a line for each prompt, in order, whatever stops it in between."""

import gzip
import json
import multiprocessing
import random
import subprocess
import time
from pathlib import Path

import pytest
import torch
from tokenizers import models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from dskd.cli import main
from dskd.models import generate
from dskd.settings.yaml_tree import dump
from dskd.system import rows_file
from tests.disks import limited
from tests.equivalence.small import settings
from tests.faults.runs import die
from tests.launching import BINARY, ROOT, environment
from tests.models import tiny
from tests.ranks import free_port, run_ranks

TEXTS = [" ".join(f"t{(5 * row + k) % 30}" for k in range(1 + row % 6)) for row in range(40)]
DRAW = ["--top-k", "6", "--temperature", "1.5", "--seed", "3", "--max-new-tokens", "9"]
KILLS = 5
ENDS = {7, 12, 21, 30}
SMALL = ["--batch", "3"]
"""Windows of 12 prompts a rank."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One that takes words for tokens."""
    found = tiny.tokenizer()
    found.backend_tokenizer.model = models.WordLevel(found.get_vocab(), "<unk>")
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.stored(folder, "llama", tok=tokenizer(), drift=True)
    wishes = {"eos_token_id": list(ENDS), "repetition_penalty": 3.0, "max_length": 2}
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in TEXTS])


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generated(*words: object) -> list[dict]:
    assert main(["generate", *map(str, words)]) == 0
    return read(Path(words[2]))


def read(path: Path) -> list[dict]:
    assert not path.with_name(f"{path.name}.part").exists()
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main(["generate", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.out == ""
    return captured.err


def test_greedy_rows_are_what_transformers_makes_of_each_prompt(model, prompts, tmp_path):
    found = generated(model, prompts, tmp_path / "out.jsonl", "--max-new-tokens", 9, *SMALL)
    words = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    network.generation_config = GenerationConfig(eos_token_id=[2, *ENDS], pad_token_id=1)
    assert len(found) == len(TEXTS)
    for row, text in zip(found, TEXTS, strict=True):
        ids = torch.tensor([[0, *words(text, add_special_tokens=False).input_ids]])
        out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
        new = out[0, ids.shape[1] :].tolist()
        assert row["ended"] == (new[-1] in {2, *ENDS})
        assert row["ids"] == new[: len(new) - row["ended"]]
        assert row["text"] == words.decode(row["ids"])
    assert {row["ended"] for row in found} == {False, True}


def test_a_run_its_export_and_prompts_as_ids_and_compressed(model, prompts, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(model)
    (tmp_path / "run" / "config.yaml").write_text(dump(settings(tmp_path)))
    wanted = generated(tmp_path / "run", prompts, tmp_path / "a.jsonl", *DRAW)
    assert wanted == generated(model, prompts, tmp_path / "b.jsonl", *DRAW)
    words = AutoTokenizer.from_pretrained(model)
    with gzip.open(tmp_path / "ids.jsonl.gz", "wt") as stream:
        for text in TEXTS:
            ids = [0, *words(text, add_special_tokens=False).input_ids]
            stream.write(json.dumps({"q": ids}) + "\n")
    words = ["--text", "q", *DRAW]
    assert wanted == generated(model, tmp_path / "ids.jsonl.gz", tmp_path / "c.jsonl", *words)


def test_draws_do_not_depend_on_the_batch(model, prompts, tmp_path):
    wanted = generated(model, prompts, tmp_path / "a.jsonl", *DRAW)
    assert generated(model, prompts, tmp_path / "b.jsonl", *DRAW, *SMALL) == wanted
    all_tokens = [*DRAW[2:], "--batch", 1]
    assert generated(model, prompts, tmp_path / "c.jsonl", *all_tokens) != wanted
    greedy = generated(model, prompts, tmp_path / "d.jsonl", "--max-new-tokens", 9)
    assert generated(model, prompts, tmp_path / "e.jsonl", *DRAW, "--top-k", 1) == greedy


def _command(rank: int, words: list[str]) -> int:
    return main(words)


def test_ranks_share_the_prompts(model, prompts, tmp_path):
    generated(model, prompts, tmp_path / "a.jsonl", *DRAW)
    words = ["generate", model, prompts, tmp_path / "b.jsonl", *DRAW, *SMALL]
    assert run_ranks(_command, [*map(str, words)]) == [0, 0]
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


@pytest.mark.launch
def test_ranks_that_a_launcher_starts(model, prompts, tmp_path):
    generated(model, prompts, tmp_path / "a.jsonl", *DRAW)
    out = tmp_path / "b.jsonl"
    words = ["generate", *map(str, (model, prompts, out)), *DRAW, *SMALL]
    place = ["--num_gpus", "2", "--master_port", str(free_port()), "--module", "dskd.cli"]
    options = {"capture_output": True, "text": True, "timeout": 240, "env": environment()}
    done = subprocess.run([str(BINARY), *place, *words], cwd=ROOT, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("40 rows: ") == 1
    assert out.read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def _killed(rank: int, words: list[str], part: Path, call: int) -> None:
    """The command, which dies in the middle of a write."""
    plain, calls = rows_file.write_all, 0

    def half(stream, data):
        nonlocal calls
        calls += 1
        if calls == call:
            plain(stream, data[:-2])  # 11 rows, and a part of one
            die()
        plain(stream, data)

    rows_file.write_all = half
    main(words)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(model, prompts, tmp_path, capsys, precision):
    words = [*map(str, (model, prompts)), str(tmp_path / "b.jsonl"), *DRAW, *SMALL]
    words += ["--precision", precision]
    generated(model, prompts, tmp_path / "a.jsonl", *words[3:])
    part = tmp_path / "b.jsonl.part"
    for call in (1, 2, 2):  # of each call's writes, of 12 rows each
        with pytest.raises(AssertionError, match="died with exit status"):
            run_ranks(_killed, ["generate", *words], part, call, world=1)
        assert not (tmp_path / "b.jsonl").exists()
        assert not part.read_bytes().endswith(b"\n")
    capsys.readouterr()
    generated(*words)
    assert "goes on behind the 24 of 40 rows" in capsys.readouterr().out
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(model, prompts, tmp_path):
    """SIGKILL, while it starts, reads, generates or writes."""
    began = time.monotonic()
    generated(model, prompts, tmp_path / "a.jsonl", *DRAW, *SMALL)
    took = time.monotonic() - began
    fork, draw, kills = multiprocessing.get_context("fork"), random.Random(5), 0
    while kills < KILLS:
        out = tmp_path / f"{draw.getrandbits(32):08x}.jsonl"
        words = ["generate", *map(str, (model, prompts, out)), *DRAW, *SMALL]
        while not out.exists():
            child = fork.Process(target=_command, args=(0, words))
            child.start()
            child.join(draw.uniform(0.2 * took, 1.2 * took))
            if child.is_alive():
                child.kill()
                kills += 1
            child.join()
        assert main(words) == 0
        assert out.read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_a_full_disk_is_named_and_what_fitted_stays(model, prompts, tmp_path, capsys):
    out, part = tmp_path / "b.jsonl", tmp_path / "b.jsonl.part"
    wanted = generated(model, prompts, tmp_path / "a.jsonl", *DRAW, *SMALL)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    with limited(len(b"".join(lines[:12])) + 100):
        told = refused(capsys, model, prompts, out, *DRAW, *SMALL)
    assert f"{part}: cannot write the generated rows: a file may not be that large here" in told
    assert part.read_bytes() == b"".join(lines[:12])
    assert generated(model, prompts, out, *DRAW, *SMALL) == wanted


def test_what_is_done_is_not_done_again(model, prompts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    wanted = generated(model, prompts, out, *DRAW)
    monkeypatch.setattr(generate, "_generate", None)  # nothing may be generated now
    assert generated(model, prompts, out, *DRAW) == wanted
    capsys.readouterr()
    # Killed when all was written and nothing named.
    out.rename(tmp_path / "out.jsonl.part")
    assert generated(model, prompts, out, *DRAW) == wanted


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seed", "4"], "(--seed: 3, now 4)"),
        (
            ["--top-k", "7", "--temperature", "1"],
            "(--top-k: 6, now 7; --temperature: 1.5, now 1.0)",
        ),
        (["--precision", "bf16"], "--precision: 'fp32', now 'bf16'; --batch: null, now 3"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "begun"])
def test_rows_of_other_settings_are_refused(model, prompts, tmp_path, capsys, whole, words, told):
    out = tmp_path / "out.jsonl"
    generated(model, prompts, out, *DRAW, *SMALL)
    name = "out.jsonl"
    if not whole:
        name = "out.jsonl.part"
        (tmp_path / name).write_bytes(out.read_bytes()[:200])
        out.unlink()
    before = (tmp_path / name).read_bytes()
    message = refused(capsys, model, prompts, out, *DRAW, *SMALL, *words)
    assert f"{tmp_path / name} was made otherwise " in message and told in message
    assert message.endswith("; remove it, or name another file\n")
    assert (tmp_path / name).read_bytes() == before


def test_other_prompts_another_model_and_foreign_files_are_refused(
    model, prompts, tmp_path, capsys
):
    out = tmp_path / "out.jsonl"
    generated(model, prompts, out, *DRAW)
    write(prompts, [{"prompt": "t1"}])
    assert "was made otherwise (PROMPTS: '" in refused(capsys, model, prompts, out, *DRAW)
    (tmp_path / "out.jsonl.settings.json").unlink()
    told = f"{out} is there already, without out.jsonl.settings.json, which says what its rows are"
    assert told in refused(capsys, model, prompts, out, *DRAW)
    tiny.stored(tmp_path / "gpt2", "gpt2")
    out.unlink()
    generated(model, prompts, out)
    assert "was made otherwise (model: '" in refused(capsys, tmp_path / "gpt2", prompts, out)


def test_a_damaged_beginning_is_refused(model, prompts, tmp_path, capsys):
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    generated(model, prompts, out, *DRAW)
    out.rename(part)
    lines = part.read_bytes().split(b"\n")
    part.write_bytes(b"\n".join([*lines[:2], lines[2][:-1], *lines[3:]]))
    assert f"{part}:3: damaged" in refused(capsys, model, prompts, out, *DRAW)
    part.write_bytes(b"\n".join([*lines, *lines]))
    assert f"{part}:41: damaged" in refused(capsys, model, prompts, out, *DRAW)


def test_two_at_a_time_are_refused(model, prompts, tmp_path, capsys):
    with rows_file.RowsFile(tmp_path / "o", "x", {}, 3):
        other = rows_file.RowsFile(tmp_path / "o", "x", {}, 3)
        with pytest.raises(rows_file.StoreError, match=r"o\.part: another process writes it"):
            other.__enter__()


LONG = " ".join(["t1"] * 31)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": ', ":2: not JSON: "),
        ('["t1"]', ":2: no prompt under the key 'prompt'; it is no object but a list"),
        ('{"text": "t1"}', ":2: no prompt under the key 'prompt'; its keys are ['text']"),
        ('{"prompt": 3}', ":2: no text under the key 'prompt' but a number"),
        ('{"prompt": [5, "t1"]}', ":2: the prompt's list holds a value of type str"),
        ('{"prompt": [5, true]}', ":2: the prompt's list holds a boolean, and no token id"),
        ('{"prompt": [5, 43]}', ":2: the prompt's token 43 is none of the model's 43"),
        ('{"prompt": []}', ":2: the prompt has 0 tokens; between 1 and 31 leave a position"),
        (json.dumps({"prompt": LONG}), ":2: the prompt has 32 tokens; between 1 and 31 leave"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_before_anything_is_generated(
    model, tmp_path, capsys, line, told
):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "t1"}\n' + line + '\n{"prompt": "t2"}\n')
    assert f"error: {prompts}{told}" in refused(capsys, model, prompts, tmp_path / "out.jsonl")
    assert sorted(tmp_path.iterdir()) == [prompts]


@pytest.mark.parametrize(
    ("path", "words", "told"),
    [
        ("MODEL", ["--top-k", "0"], "generate: --top-k: 0 is less than 1"),
        ("MODEL", ["--max-new-tokens", "-1"], "generate: --max-new-tokens: -1 is less than 1"),
        ("MODEL", ["--batch", "0"], "generate: --batch: 0 is less than 1"),
        ("MODEL", ["--temperature", "0"], "generate: --temperature: 0 is not above 0; without it"),
        ("MODEL", ["--temperature", "nan"], "generate: --temperature: nan is not above 0"),
        ("MODEL", ["--seed", "1"], "generate: --seed: without --top-k or --temperature nothing"),
        ("nowhere", [], "generate: nowhere is the folder of no run (config.yaml) and no model"),
        ("BERT", [], "holds a BertForMaskedLM, which is no causal LM"),
        ("CLASSES", [], "holds a GPT2ForSequenceClassification, which is no causal LM"),
    ],
)
def test_what_cannot_generate_is_refused(model, prompts, tmp_path, capsys, path, words, told):
    if path == "BERT":
        tiny.stored(tmp_path / path, "bert")
    elif path == "CLASSES":
        tiny.make("gpt2", classes=["a", "b"]).save_pretrained(tmp_path / path)
        tiny.tokenizer().save_pretrained(tmp_path / path)
    where = {"MODEL": model, "nowhere": "nowhere"}.get(path, tmp_path / path)
    out = tmp_path / "out.jsonl"
    assert told in refused(capsys, where, prompts, out, *words)
    assert not list(tmp_path.glob("out*"))


def test_files_that_are_not_there_or_empty(model, tmp_path, capsys):
    out, empty = tmp_path / "out.jsonl", tmp_path / "empty.jsonl"
    told = f"generate: {tmp_path / 'a.jsonl'}: no such file"
    assert told in refused(capsys, model, tmp_path / "a.jsonl", out)
    empty.write_text("\n")
    assert f"{empty}: no prompt in it" in refused(capsys, model, empty, out)
