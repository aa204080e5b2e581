"""Exported folders: equal logits, whole or absent."""

import json
import os

import deepspeed
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dskd.data.tokenizers import tokenizer_fingerprint
from dskd.engine.zero import full_shape
from dskd.errors import DskdError
from dskd.models import writing as exporting
from dskd.models.families import longest_row, positions_of
from dskd.models.writing import export
from dskd.settings.model import Model
from tests.disks import small_disk
from tests.models.test_initial import fingerprints
from tests.models.tiny import (
    ALL,
    SIX,
    LossOf,
    auto_of,
    batch,
    count_gathered,
    make,
    tokenizer,
    zero3,
)
from tests.ranks import run_ranks

CARD = {"title": "A small one", "recipe": {"method": {"kind": "ki"}, "lr": 1e-4}}
CARD |= {"note": "Words.", "nll": 3.25}


def _trained(model):
    """As after training: no parameter at its initial value, the same on every rank."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            moved = torch.linspace(-0.3, 0.2 + index / 100, parameter.numel())
            parameter.add_(moved.view_as(parameter))
    return model.eval()


def _logits(model):
    with torch.no_grad():
        return positions_of(model.eval(), batch()).logits_NV


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ALL)
def test_reloaded_logits_are_equal(tmp_path, model_type, tied):
    model = _trained(make(model_type, tie_word_embeddings=tied))
    folder = tmp_path / "export"
    export(model, tokenizer(), folder, card=CARD)
    theirs, report = auto_of(model_type).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs) is type(model)
    assert torch.equal(_logits(theirs), _logits(model))
    assert (theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight) is tied
    again = make(Model(path=str(folder)), model_type=model_type)
    assert fingerprints(again) == fingerprints(model)


def _sharded(rank, root):
    """Export two sharded models of every type; fingerprints of the gathered weights, by folder."""
    del rank
    seen, found = count_gathered(), {}
    for model_type in SIX:
        for tied in (True, False):
            model = make(model_type, ds=zero3(2), tie_word_embeddings=tied)
            sizes = [full_shape(p).numel() for p in model.parameters()]
            seen.clear()
            folder = f"{model_type}-{tied}"
            export(model, tokenizer(), root / folder, card=CARD)
            assert max(seen) == max(sizes)
            assert len(seen) == len(sizes) + ("bert" in model_type and not tied)  # a bias twice
            assert not any(p.numel() for p in model.parameters())
            found[folder] = fingerprints(model)
    return found


def test_two_zero3_ranks_export_whole_models(tmp_path):
    first, second = run_ranks(_sharded, tmp_path)
    assert first == second
    for folder, expected in first.items():
        model_type, tied = folder.split("-")
        whole = make(model_type, tie_word_embeddings=tied == "True")
        assert fingerprints(whole) == expected
        theirs = auto_of(model_type).from_pretrained(tmp_path / folder)
        assert torch.equal(_logits(theirs), _logits(whole))


def _stepped(rank, folder):
    """Take one step in a ZeRO-3 engine, then export what came out."""
    ds = zero3(2)
    model = make("roberta", ds=ds)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=LossOf(model), optimizer=optimizer, config=ds)
    engine.backward(engine(batch(seed=rank)))
    engine.step()
    export(engine.module.student, tokenizer(), folder, card=CARD)
    return fingerprints(model)


def test_the_weights_after_a_zero3_step_are_exported(tmp_path):
    for found in run_ranks(_stepped, tmp_path / "export"):
        assert fingerprints(auto_of("roberta").from_pretrained(tmp_path / "export")) == found
        name = "lm_head.dense.weight"
        assert found[name] != fingerprints(make("roberta"))[name]


def test_large_models_are_stored_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SHARD_BYTES", 20_000)
    model = _trained(make("llama"))
    export(model, tokenizer(), tmp_path / "export", card={})
    files = sorted(tmp_path.glob("export/model-*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    assert all(file.stat().st_size < 22_000 for file in files)
    index = json.loads((tmp_path / "export/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert set(index["weight_map"]) == {name for name, _ in model.named_parameters()}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(_logits(theirs), _logits(model))
    assert not (tmp_path / "export" / "model.safetensors").exists()


def test_dtype_is_kept(tmp_path):
    model = make("qwen3", dtype=torch.bfloat16)
    export(model, tokenizer(), tmp_path / "export", card={})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(_logits(theirs), _logits(model))


def test_what_lies_beside_the_weights(tmp_path):
    for model_type in ("bert", "gpt2"):
        export(make(model_type), tokenizer(), tmp_path / model_type, card=CARD)
    read = AutoTokenizer.from_pretrained(tmp_path / "bert")
    assert tokenizer_fingerprint(read) == tokenizer_fingerprint(tokenizer())
    assert read.model_max_length == longest_row(make("bert").config) < 1000
    assert tokenizer().model_max_length > 1000, "the run's own tokenizer was changed"
    config = json.loads((tmp_path / "bert/config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert not (tmp_path / "bert/generation_config.json").exists()
    assert GenerationConfig.from_pretrained(tmp_path / "gpt2").eos_token_id == 2
    card = (tmp_path / "gpt2/README.md").read_text()
    head = {"library_name": "transformers", "tags": ["dskd"]}
    assert yaml.safe_load(card.split("---\n")[1]) == head
    assert "\n# A small one\n" in card
    assert "\n## note\n\nWords.\n" in card
    assert card.endswith("\n## nll\n\n3.25\n")
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == CARD["recipe"]


def test_an_exported_causal_model_generates(tmp_path):
    export(_trained(make("llama")), tokenizer(), tmp_path / "export", card={})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    ids = model.generate(torch.tensor([[0, 9, 8]]), max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > 3


def test_an_earlier_export_is_replaced(tmp_path):
    folder = tmp_path / "export"
    export(make("bert"), tokenizer(), folder, card={})
    (folder / "stale").touch()
    other = make("bert", seed=8)
    export(other, tokenizer(), folder, card={})
    assert fingerprints(make(Model(path=str(folder)), model_type="bert")) == fingerprints(other)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert not (folder / "stale").exists()


@pytest.mark.parametrize("moment", ["_make_empty", "_save", "_describe", "_replace"])
def test_a_killed_export_leaves_no_folder_and_does_not_hinder_the_next(tmp_path, moment):
    folder = tmp_path / "export"
    model = make("bert")
    child = os.fork()
    if child == 0:
        work = getattr(exporting, moment)

        def die(*arguments):
            if moment != "_replace":
                work(*arguments)
            os._exit(9)

        setattr(exporting, moment, die)
        export(model, tokenizer(), folder, card={})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not folder.exists()
    assert list(tmp_path.iterdir()) != []
    export(model, tokenizer(), folder, card={})
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert torch.equal(_logits(auto_of("bert").from_pretrained(folder)), _logits(model))


def _full_disk(rank, folder):
    del rank

    def save_file(*arguments, **options):
        raise OSError(28, "No space left on device")

    exporting.save_file = save_file
    model = make("bert", ds=zero3(2))
    try:
        export(model, tokenizer(), folder, card={})
    except DskdError as error:
        return str(error)
    return "written"


def test_a_full_disk_is_told_on_every_rank(tmp_path):
    messages = run_ranks(_full_disk, tmp_path / "export")
    assert messages[0] == messages[1]
    wanted = "cannot write the exported model: the disk is full (No space left on device)"
    assert messages[0] == f"{tmp_path / 'export'}: {wanted}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["32k", "84k"])
def test_what_does_not_fit_leaves_nothing(tmp_path, size):
    """Neither where the weights are written nor where the tokenizer is."""
    model = make("bert")
    with small_disk(tmp_path / "disk", size) as disk:
        with pytest.raises(DskdError, match="cannot write the exported model: the disk is full"):
            export(model, tokenizer(), disk / "export", card=CARD)
        assert list(disk.iterdir()) == []


def test_an_earlier_export_survives_one_that_does_not_fit(tmp_path, monkeypatch):
    folder, model = tmp_path / "export", make("bert")
    export(model, tokenizer(), folder, card={})
    other = make("bert", seed=8)

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(exporting, "sync_to_disk", full)
    with pytest.raises(DskdError, match="the disk is full"):
        export(other, tokenizer(), folder, card={})
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert fingerprints(make(Model(path=str(folder)), model_type="bert")) == fingerprints(model)
