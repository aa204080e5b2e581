"""A mixture of experts is trained with its balance loss, on one trajectory for any micro-batch,
number of ranks and ZeRO stage; as a teacher it has none."""

from pathlib import Path
from typing import Any

import pytest

from tests.equivalence.small import CAUSAL, STEPS, Runs, causal, same, step_lines
from tests.launching import losses

_OF = {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
_OWN = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
}  # fmt: skip


def mixture(model_type: str, **fields: Any) -> dict[str, Any]:
    """A student whose coefficient makes the balance a part of the loss that is seen, and whose
    routers have their preferences."""
    own = CAUSAL | _OF | _OWN[model_type] | {"model_type": model_type, "initializer_range": 0.2}
    return own | {"router_aux_loss_coef": 0.1} | fields


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("balance"))


def train(runs: Runs, name: str, ranks: int, *words: str, **fields: Any) -> Path:
    model_type = fields.pop("model_type", "qwen3_moe")
    return runs.run(name, ranks, *words, **causal(mixture(model_type, **fields)))


@pytest.fixture(scope="module")
def single(runs) -> Path:
    """One rank, ZeRO-0, two micro-batches of 4 rows."""
    return train(runs, "single", 1)


def balances(run: Path) -> list[float]:
    return [line["terms"]["balance"] for line in step_lines(run)]


def alike(a: Path, b: Path) -> None:
    same(a, b)
    assert balances(a) == pytest.approx(balances(b), abs=1e-5)


def test_the_loss_is_the_methods_and_a_tenth_of_the_balance(runs, single) -> None:
    found = balances(single)
    assert len(found) == STEPS and all(2.02 < value < 4 for value in found)  # 2: all alike
    changes = causal(mixture("qwen3_moe")) | {"teacher": None, "method": {"kind": "lm"}}
    for line in step_lines(runs.run("plain", 1, **changes)):
        terms = line["terms"]
        assert terms.keys() == {"ce", "balance"}
        assert line["loss"] == pytest.approx(terms["ce"] + 0.1 * terms["balance"], abs=1e-6)


@pytest.mark.parametrize(
    ("ranks", "stage", "micro"), [(1, 0, 1), (2, 0, 4), (2, 1, 2), (2, 2, 1), (2, 3, 2)]
)
def test_one_trajectory(runs, single, ranks: int, stage: int, micro: int) -> None:
    words = (f"deepspeed=zero{stage}", f"train.micro_batch={micro}")
    alike(train(runs, f"{ranks}-{stage}-{micro}", ranks, *words), single)


def test_recomputed_activations_have_the_same_balance(runs, single) -> None:
    words = ("deepspeed=zero3", "train.activation_checkpointing=true")
    alike(train(runs, "recomputed", 2, *words), single)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_other_families_too(runs, model_type: str) -> None:
    one = train(runs, f"{model_type}-1", 1, model_type=model_type)
    words = ("deepspeed=zero3", "train.micro_batch=1")
    alike(train(runs, f"{model_type}-2", 2, *words, model_type=model_type), one)


def test_a_coefficient_of_0_computes_nothing(runs, single) -> None:
    """And leads elsewhere."""
    without = train(runs, "without", 1, router_aux_loss_coef=0.0)
    assert all("balance" not in line["terms"] for line in step_lines(without))
    assert losses(without)[0] < losses(single)[0] - 0.1


def test_a_mixture_teaches_without_a_balance(runs) -> None:
    changes = causal()
    changes["teacher"] = {"kind": "live", "model": {"config": mixture("mixtral")}}
    one = runs.run("taught", 1, **changes)
    words = ("deepspeed=zero3", "teacher.deepspeed=zero3", "train.micro_batch=1")
    two = runs.run("sharded", 2, *words, **changes)
    same(one, two)
    assert all("balance" not in line["terms"] for out in (one, two) for line in step_lines(out))
