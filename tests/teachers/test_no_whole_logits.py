"""Whoever looks at a model's logits does so chunk by chunk: [N, V] exists nowhere."""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dskd.batch import Batch, MixtureRule
from dskd.data.prepared import RowBatch
from dskd.data.views import CausalView
from dskd.fused.topk_teacher import largest_of
from dskd.hardness.question import token_scores
from dskd.methods.metrics import LM_LOSS
from dskd.models.families import positions_of
from dskd.ops import positions_kd
from dskd.teachers.mixture import FrozenMixture
from dskd.teachers.teacher import (
    FrozenTeacher,
    RoutedTeachers,
    ShownUnmasked,
    StudentAsTeacher,
    group_by_domain,
)
from tests.heads import Largest, small_chunks

ROWS, TOKENS, VOCABULARY, CHUNK = 8, 49, 3000, 16


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))


def full_batch(rows: int = ROWS, tokens: int = TOKENS) -> Batch:
    """Rows of two domains, with the columns of routed teachers."""
    torch.manual_seed(5)
    ids_BT, rows_B = torch.randint(VOCABULARY, (rows, tokens)), torch.arange(rows)
    tensors = (rows_B, rows_B * 0, rows_B % 2, ids_BT, torch.full((rows,), tokens))
    batch = RowBatch(*(tensor.numpy() for tensor in tensors))
    shown = CausalView()(batch)
    columns = group_by_domain(batch, shown)
    return Batch.of(
        row_ids_B=rows_B,
        domains_B=rows_B % 2,
        ids_BT=ids_BT,
        mask_BT=torch.ones_like(ids_BT),
        labels_BT=torch.from_numpy(shown.labels_BT),
        columns={name: torch.from_numpy(column) for name, column in columns.items()},
    )


def taught(teacher_of, batch: Batch) -> None:
    """Forward and backward of a student and its teacher."""
    student = model_of(0)
    signal = teacher_of(student)(batch)
    positions_kd(positions_of(student, batch), signal, temperature=2.0).total.backward()


@torch.no_grad()
def evaluated(batch: Batch) -> None:
    LM_LOSS.sums(positions_of(model_of(0), batch), batch)


@torch.no_grad()
def questioned(batch: Batch) -> None:
    token_scores(positions_of(model_of(0), batch), VOCABULARY)


def captured(batch: Batch) -> None:
    largest_of(FrozenTeacher(model_of(1), VOCABULARY)(batch), 8, (1.0, 2.0))


def frozen(seed: int) -> FrozenTeacher:
    return FrozenTeacher(model_of(seed), VOCABULARY)


def panel(student) -> FrozenMixture:
    return FrozenMixture([frozen(1), frozen(2), frozen(3)], MixtureRule((1.0, 1.0, 1.0), 0.2))


LOOKS = {
    "evaluated": evaluated,
    "questioned": questioned,
    "captured": captured,
    "live": partial(taught, lambda student: frozen(1)),
    "routed": partial(taught, lambda student: RoutedTeachers({0: frozen(1), 1: frozen(2)})),
    "panel": partial(taught, panel),
    "itself": partial(taught, lambda student: ShownUnmasked(StudentAsTeacher(student, VOCABULARY))),
}


@pytest.mark.parametrize("name", LOOKS)
def test_only_a_chunk_of_logits_exists(monkeypatch, name):
    """384 positions, 16 at a time; the closed forms of losses have scratch of 5 such chunks."""
    batch = full_batch()
    assert batch.supervised == ROWS * (TOKENS - 1)
    small_chunks(monkeypatch, CHUNK)
    with Largest(monkeypatch) as largest:
        LOOKS[name](batch)
    assert CHUNK * VOCABULARY <= largest.elements <= 5 * CHUNK * VOCABULARY
