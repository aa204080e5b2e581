"""A converted model in a real run: the same losses as with a folder that transformers wrote."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from dskd.cli import main
from dskd.settings.yaml_tree import dump
from tests.convert.checkpoints import GOLDEN, LAST
from tests.launching import forked, losses

DICT = GOLDEN / "fairseq_2019/dict.txt"
STUDENT = {
    "model_type": "roberta", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 18, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
RENAMED = [  # by hand, not by the table that is tested
    ("decoder.sentence_encoder.layers.", "roberta.encoder.layer."),
    ("decoder.sentence_encoder.embed_tokens", "roberta.embeddings.word_embeddings"),
    ("decoder.sentence_encoder.embed_positions", "roberta.embeddings.position_embeddings"),
    ("decoder.sentence_encoder.emb_layer_norm", "roberta.embeddings.LayerNorm"),
    ("self_attn.q_proj", "attention.self.query"),
    ("self_attn.k_proj", "attention.self.key"),
    ("self_attn.v_proj", "attention.self.value"),
    ("self_attn.out_proj", "attention.output.dense"),
    ("self_attn_layer_norm", "attention.output.LayerNorm"),
    ("fc1", "intermediate.dense"),
    ("fc2", "output.dense"),
    ("final_layer_norm", "output.LayerNorm"),
    ("decoder.lm_head.weight", "lm_head.decoder.weight"),
    ("decoder.lm_head.", "lm_head."),
]


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of 46 whole words, with fairseq's special tokens at fairseq's places."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{k}" for k in range(41)), "<mask>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    ends = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **own, **ends)


def write_directly(folder: Path) -> None:
    """The golden weights as transformers itself writes them."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(GOLDEN / "fairseq_2019/in_proj.pt", weights_only=True)["model"]
    named = {}
    for name, tensor in state.items():
        if "in_proj_" in name:
            for letter, part in zip("qkv", tensor.float().chunk(3), strict=True):
                named[name.replace("in_proj_", f"{letter}_proj.")] = part.contiguous()
        else:
            named[name] = tensor.float()
    for old, new in RENAMED:
        named = {name.replace(old, new): tensor for name, tensor in named.items()}
    named["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, 24)
    named["lm_head.decoder.bias"] = named["lm_head.bias"]
    sizes = {"vocab_size": 46, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40}
    sizes |= {"num_attention_heads": 3, "max_position_embeddings": 18, "type_vocab_size": 1}
    model = RobertaForMaskedLM(RobertaConfig(layer_norm_eps=1e-5, **sizes))
    model.load_state_dict(named, strict=True)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Both folders of the teacher, and texts."""
    root = tmp_path_factory.mktemp("teacher")
    converted = root / "converted"
    assert main(["convert", "fairseq", str(LAST), str(converted), "--dict", str(DICT)]) == 0
    write_directly(root / "direct")
    for name in ("converted", "direct"):
        words().save_pretrained(root / name)
    for name, salt in (("train", 0), ("valid", 3)):
        lines = (
            " ".join(f"w{(row * k + k * k + salt) % 41}" for k in range(1, 5 + row % 9))
            for row in range(60)
        )
        (root / f"{name}.txt").write_text("\n\n".join(lines) + "\n")
    return root


def run(root: Path, name: str, **model) -> list[float]:
    settings = {
        "seed": 3, "out": str(root / f"run-{name}"), "deepspeed": "zero0",
        "data": {
            "objective": "masked", "folder": str(root / "data"), "block_size": 16,
            "sources": [{"kind": "text", "path": str(root / "train.txt")}],
            "validation": [{"kind": "text", "path": str(root / "valid.txt")}],
            "tokenizer": {"kind": "pretrained", "path": str(root / "direct")},
        },
        "model": model or {"config": STUDENT},
        "teacher": {"kind": "live", "model": {"path": str(root / name)}},
        "method": {"kind": "ki", "temperature": 2.0, "schedule": "constant", "rate": 0.5},
        "train": {
            "steps": 5, "batch": 8, "micro_batch": 4, "lr": 0.01, "warmup": 1, "precision": "fp32",
        },
        "until": "train",
    }  # fmt: skip
    path = root / f"{name}.yaml"
    path.write_text(dump(settings))
    forked(1, str(path))
    return losses(root / f"run-{name}")


def test_a_converted_teacher_equals_the_huggingface_folder(folder):
    converted, direct = run(folder, "converted"), run(folder, "direct")
    assert len(converted) == 5
    assert all(math.isfinite(loss) for loss in converted)
    assert converted == direct


def test_it_does_matter_which_teacher_it_is(folder):
    """Or the losses above would be equal whatever was converted."""
    other = folder / "other"
    model = RobertaForMaskedLM.from_pretrained(folder / "direct")
    torch.nn.init.zeros_(model.lm_head.bias)
    model.save_pretrained(other)
    words().save_pretrained(other)
    assert abs(run(folder, "other")[0] - losses(folder / "run-direct")[0]) > 1e-3
