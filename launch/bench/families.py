"""What every architecture's logits, loss and gradients are here, against HuggingFace and torch.

    python launch/bench/families.py [--only NAME ...] [--out FILE.md]

Tiny random models on the CPU in fp32; a batch of padded rows, one of them without a label. As the
student: its cross entropy and all gradients, against HuggingFace's own forward pass and torch's
cross entropy. As the live and as the cached teacher (all logits kept) of a student of its own
kind: the divergence and the student's gradients, against torch's of HuggingFace's logits. At
ZeRO-3: a student and a teacher on two ranks, against one rank without. Losses are means over the
supervised positions; the largest absolute differences are shown. Then every other model type of
transformers, with its config as it is by default: proved, or refused and why.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dskd.batch import IGNORE, Batch
from dskd.engine.engine import shard_teacher, start
from dskd.engine.zero import gathered
from dskd.errors import ConfigError
from dskd.fused.topk_teacher import largest_of
from dskd.models.build import construct
from dskd.models.families import head_of, positions_of, tie_head_bias
from dskd.models.initial import initialise
from dskd.models.structure import language_head, language_objective, language_types
from dskd.ops import positions_ce, positions_kd
from dskd.teachers.teacher import FrozenTeacher
from launch.bench.measure import about, markdown, short

VOCABULARY = 60
TEMPERATURE = 2.0
_PAD = 1

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_FALCON = {name: size for name, size in _SIZES.items() if name != "intermediate_size"}
_GEMMA = {**_GROUPED, "head_dim": 8}
_LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "roberta": _SIZES,
    "xlm-roberta": _SIZES,
    "camembert": _SIZES,
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "modernbert": {**_SIZES, "local_attention": 8},
    "electra": {**_SIZES, "embedding_size": 24},
    "deberta-v2": {**_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2 (legacy: false)": {**_SIZES, "legacy": False},
    "deberta": {**_SIZES, "pos_att_type": ["p2c", "c2p"], "relative_attention": True},
    "albert": {**_SIZES, "embedding_size": 24},
    "mpnet": _SIZES,
    "roformer": {**_SIZES, "embedding_size": 24},
    "mobilebert": {
        **_SIZES,
        "embedding_size": 24,
        "intra_bottleneck_size": 16,
        "num_feedforward_networks": 2,
    },
    "eurobert": _GROUPED,
    "ernie": _SIZES,
    "esm": {**_SIZES, "position_embedding_type": "rotary"},
    "convbert": {**_SIZES, "embedding_size": 32, "head_ratio": 2},
    "nomic_bert": _SIZES,
    "megatron-bert": _SIZES,
    "rembert": {**_SIZES, "input_embedding_size": 24, "output_embedding_size": 24},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 4},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, **_LOCAL, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**_GEMMA, **_LOCAL, "query_pre_attn_scalar": 8},
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "gpt_neox": _SIZES,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 32,
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 24,
        "max_position_embeddings": 32,
        "do_layer_norm_before": False,
    },
    "granite": {**_GROUPED, "logits_scaling": 6.0, "embedding_multiplier": 3.0},
    "cohere": {**_GROUPED, "logit_scale": 0.3},
    "cohere2": {**_GROUPED, **_LOCAL, "logit_scale": 0.3},
    "smollm3": {**_GROUPED, "no_rope_layers": [1, 0]},
    "falcon": {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon (alibi)": {**_FALCON, "alibi": True, "multi_query": True, "parallel_attn": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "expansion_ratio": 2},
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "helium": {**_GROUPED, "head_dim": 8},
    "glm": {**_GROUPED, "head_dim": 8},
    "nanochat": _GROUPED,
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4},
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
}
"""The fields of a tiny config, by model type and what is special about it in brackets."""

KINDS = {
    "weight reached from outside of its module": "deberta-v2",
    "scale": "cohere",
    "softcap": "gemma2",
    "experts": "mixtral",
    "transform": "albert",
    "concatenated decoder": "mobilebert",
    "embeddings as decoder": "deberta-v2 (legacy: false)",
    "bias beside the decoder": "esm",
    "alibi": "bloom",
    "projection out of the body": "opt",
}
"""One architecture of each kind of head or body."""

Gradients = dict[str, Tensor]
"""Of a model's parameters, by name."""


class Apart(NamedTuple):
    """The largest differences of a loss and of its gradients."""

    loss: float
    gradient: float


def config_of(name: str) -> PreTrainedConfig:
    """The tiny config of an architecture."""
    model_type = name.partition(" (")[0]
    plain = {"vocab_size": VOCABULARY, "pad_token_id": _PAD, "bos_token_id": 0, "eos_token_id": 2}
    return AutoConfig.for_model(model_type, **plain, **FAMILIES[name])


def model_of(name: str, seed: int = 1, ds: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A tiny random model, in eval mode; no weight is next to nothing."""
    config = config_of(name)
    head_of(config, language_objective(config.model_type), name)
    model = construct(config, "auto", None if ds is None else dict(ds), torch.float32, name)
    initialise(model, seed)
    tie_head_bias(model)
    for number, parameter in enumerate(model.parameters()):
        with gathered([parameter], write=True), torch.no_grad():
            generator = torch.Generator().manual_seed(100 * seed + number)
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def batch(seed: int = 0) -> Batch:
    """Three rows of 14, 9 and 11 tokens, the last one without a label."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(5, VOCABULARY, (3, 14), generator=generator)
    labels_BT = torch.randint(5, VOCABULARY, (3, 14), generator=generator)
    mask_BT = (torch.arange(14) < torch.tensor([[14], [9], [11]])).long()
    supervised_BT = (mask_BT == 1) & (torch.arange(14) % 3 != 1)
    supervised_BT[2] = False
    return Batch.of(
        row_ids_B=torch.arange(3),
        domains_B=torch.zeros(3, dtype=torch.long),
        ids_BT=torch.where(mask_BT == 1, ids_BT, _PAD),
        mask_BT=mask_BT,
        labels_BT=torch.where(supervised_BT, labels_BT, IGNORE),
    )


def whole_row(ids_BT: Tensor) -> Batch:
    """Rows without padding, every position supervised."""
    return Batch.of(
        row_ids_B=torch.arange(len(ids_BT)),
        domains_B=torch.zeros(len(ids_BT), dtype=torch.long),
        ids_BT=ids_BT,
        mask_BT=torch.ones_like(ids_BT),
        labels_BT=ids_BT,
    )


def their_logits(model: PreTrainedModel, data: Batch) -> Tensor:
    """HuggingFace's own at the supervised positions [N, V]."""
    logits_BTV = model(input_ids=data.ids_BT, attention_mask=data.mask_BT).logits
    return logits_BTV.flatten(0, 1).index_select(0, data.positions_N)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's by name, which it forgets; zeros where there is none."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def apart(mine: tuple[Tensor, Gradients], theirs: tuple[Tensor, Gradients]) -> Apart:
    """How far a loss and its gradients are from others."""
    (loss, grads), (their_loss, their_grads) = mine, theirs
    assert grads.keys() == their_grads.keys()
    assert sum(bool(grad.any()) for grad in their_grads.values()) > 3
    largest = max((grads[n] - their_grads[n]).abs().max().item() for n in grads)
    return Apart((loss - their_loss).abs().item(), largest)


def as_student(name: str) -> Apart:
    """Cross entropy and gradients of every parameter."""
    model, data = model_of(name), batch()
    loss = positions_ce(positions_of(model, data)).total / data.supervised
    loss.backward()
    mine = loss.detach(), gradients(model)
    loss = cross_entropy(their_logits(model, data), data.labels_N)
    loss.backward()
    return apart(mine, (loss.detach(), gradients(model)))


def as_teacher(name: str, *, cached: bool) -> Apart:
    """Divergence from the architecture as a teacher, and the gradients of a student of its kind."""
    student, teacher, data = model_of(name), model_of(name, seed=2), batch()
    signal = FrozenTeacher(teacher, VOCABULARY)(data)
    if cached:
        signal = largest_of(signal, VOCABULARY, [TEMPERATURE])
    losses = positions_kd(positions_of(student, data), signal, temperature=TEMPERATURE)
    loss = losses.total / data.supervised
    loss.backward()
    mine = loss.detach(), gradients(student)
    with torch.no_grad():
        logprobs_NV = (their_logits(teacher, data) / TEMPERATURE).log_softmax(1)
    student_NV = (their_logits(student, data) / TEMPERATURE).log_softmax(1)
    loss = kl_div(student_NV, logprobs_NV, reduction="batchmean", log_target=True)
    loss.backward()
    return apart(mine, (loss.detach(), gradients(student)))


class Distilled(nn.Module):
    """A student against a teacher and labels, as an objective of a DeepSpeed engine."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self._unregistered = (FrozenTeacher(teacher, VOCABULARY),)

    def forward(self, data: Batch) -> Tensor:
        """The summed loss of the supervised positions."""
        signal = self._unregistered[0](data)
        positions = positions_of(self.student, data)
        how = {"temperature": TEMPERATURE, "label_weight": 0.5}
        return positions_kd(positions, signal, **how).total / data.supervised


def zero3(world: int) -> dict[str, Any]:
    """A DeepSpeed config that shards every parameter, whatever its size."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    return {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def alone(name: str) -> dict[str, Tensor]:
    """Gradients and loss of :class:`Distilled` on the batches of two ranks, on one without ZeRO."""
    objective = Distilled(model_of(name), model_of(name, seed=2))
    losses = [objective(batch(seed)) for seed in (0, 1)]
    sum(losses).backward()
    return gradients(objective.student) | {"loss": sum(losses).detach()}


def sharded(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """The same at ZeRO-3, student and teacher; the loss is this rank's. In the second of two
    passes, which follows the recorded order of the modules."""
    ds = zero3(world)
    teacher = shard_teacher(model_of(name, seed=2, ds=ds).requires_grad_(False), ds)
    student = model_of(name, ds=ds)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    objective = Distilled(student, teacher)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=ds)
    for _ in range(2):
        loss = engine(batch(rank))
        engine.backward(loss * world, scale_wrt_gas=False)
        named = objective.student.named_parameters()
        grads = {each: (p, safe_get_full_grad(p)) for each, p in named}
        found = {  # none of what is not trained
            each: torch.zeros(p.ds_shape) if grad is None else grad.clone()
            for each, (p, grad) in grads.items()
        }
        engine.step()
    return found | {"loss": loss.detach()}


def of_two_ranks(name: str, found: list[dict[str, Tensor]]) -> Apart:
    """How far two ranks' :func:`sharded` are from :func:`alone`."""
    wanted = alone(name)
    loss = (found[0]["loss"] + found[1]["loss"] - wanted["loss"]).abs().item()
    largest = 0.0
    for grads in found:
        assert grads.keys() == wanted.keys()
        for each in grads.keys() - {"loss"}:
            largest = max(largest, (grads[each] - wanted[each]).abs().max().item())
    return Apart(loss, largest)


def ranks(names: Sequence[str], folder: Path) -> None:
    """Run :func:`sharded` on two ranks of this machine; results as ``<number>.<rank>.pt``."""
    same = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    same |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", folder, "--only", *names],
            env={**os.environ, **same, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    if any([each.wait() for each in started]):
        raise SystemExit("a rank failed")


def one_rank(names: Sequence[str], folder: Path) -> None:
    """What a rank of :func:`ranks` does."""
    torch.set_num_threads(1)
    start()
    rank = int(os.environ["RANK"])
    for number, name in enumerate(names):
        torch.save(sharded(name, rank, 2), folder / f"{number}.{rank}.pt")


def table(names: Sequence[str]) -> tuple[list[str], float]:
    """The lines of the table of architectures, and the largest difference in it."""
    rows, largest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        ranks(names, Path(folder))
        for number, name in enumerate(names):
            found = [torch.load(Path(folder) / f"{number}.{rank}.pt") for rank in (0, 1)]
            all_apart = (
                as_student(name),
                as_teacher(name, cached=False),
                as_teacher(name, cached=True),
                of_two_ranks(name, found),
            )
            largest = max(largest, *(max(each) for each in all_apart))
            objective = language_objective(config_of(name).model_type)
            cells = [f"{each.loss:.0e} / {each.gradient:.0e}" for each in all_apart]
            rows.append([name, str(objective), *cells])
    header = ["family", "LM", "student", "live teacher", "cached teacher", "ZeRO-3"]
    return markdown(header, rows), largest


def others() -> tuple[list[str], list[list[str]]]:
    """The other model types that are proved, and those that are refused, with the message."""
    proved, refused = [], []
    shown = {name.partition(" (")[0] for name in FAMILIES}
    for model_type in sorted(set(language_types()) - shown):
        try:
            language_head(AutoConfig.for_model(model_type), "model")
        except ConfigError as reason:
            refused.append([model_type, str(reason).partition("\n")[0].replace("|", "/")[:220]])
        except Exception as reason:  # of a config that does not allow its own defaults
            refused.append([model_type, short(reason)])
        else:
            proved.append(model_type)
    return proved, refused


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[*FAMILIES], choices=[*FAMILIES])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    if options.rank is not None:
        one_rank(options.only, options.rank)
        return
    lines, largest = table(options.only)
    proved, refused = others()
    told = about(torch.device("cpu"), ["torch", "transformers", "deepspeed"])
    versions = ", ".join(f"{name} {value}" for name, value in told["versions"].items())
    page = [
        f"# Families of language models, {told['date']}",
        "",
        f"`python launch/bench/families.py` on the CPU; {versions}.",
        f"{len(options.only)} architectures; each cell: the largest difference of the loss / of a",
        f"gradient. The largest of all is {largest:.1e}.",
        "",
        *lines,
        "",
        f"Of the other model types, {len(proved)} are proved with the configs that transformers",
        "has for them by default: " + ", ".join(proved) + ".",
        "",
        f"{len(refused)} are refused (some only because a default lacks what a stored config has):",
        "",
        *markdown(["model type", "message"], refused),
        "",
    ]
    text = "\n".join(page)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
