"""Slice-init: the heaviest units of a teacher, and nothing but selected."""

import pytest
import torch

from dskd.narrowing.heaviest import heaviest, slice_model, unit_weights
from dskd.narrowing.insert import insert
from dskd.narrowing.layouts import layout_of, widths_of
from dskd.narrowing.merge import merged_student, zero_removed
from dskd.narrowing.widths import Target, student_widths
from tests.models.tiny import make
from tests.narrowing.wid_students import logits_of


def sizes(model, hidden, strategy, **more):
    target = Target(hidden, strategy=strategy, **more)
    return student_widths(widths_of(model.config), target, layout_of(model.config).demands)


@pytest.mark.parametrize("strategy", ["dim", "head"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "llama", "qwen2", "qwen3"])
def test_it_is_a_merge_with_identity_compactors(model_type, strategy):
    teacher = make(model_type, **({"head_dim": 8} if model_type == "qwen3" else {})).eval()
    student = sizes(teacher, 16, strategy)
    keep = heaviest(teacher, student, strategy)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    sliced = slice_model(teacher, student, strategy)
    assert widths_of(sliced.config) == student
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
    surgery = insert(teacher)
    expected = merged_student(surgery, keep).state_dict()
    for name, value in sliced.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    zero_removed(surgery, keep)
    surgery.mask(keep)
    torch.testing.assert_close(logits_of(sliced), logits_of(surgery.model), rtol=0, atol=1e-5)


def test_a_whole_teacher_is_itself():
    teacher = make("llama", tie_word_embeddings=False).eval()
    student = widths_of(teacher.config)
    sliced = slice_model(teacher, student, "dim")
    torch.testing.assert_close(logits_of(sliced), logits_of(teacher), rtol=0, atol=0)


@torch.no_grad()
def test_unit_weights_are_sums_over_the_group():
    """GPT-2 of ones: units of the stream are in 3H + 2F + H rows or columns of a layer, and in the
    tables and the projection."""
    teacher = make("gpt2")
    for parameter in teacher.parameters():
        parameter.fill_(2.0)
    H, F, layers, tables = 32, 128, 2, 43 + 32 + 43
    assert teacher.transformer.wte.weight.shape[0] == 43
    found = unit_weights(teacher, 4)
    assert set(found) == {"R", "A.0", "F.0", "A.1", "F.1"}
    stream = 4.0 * (tables + layers * (3 * H + H + 2 * F))
    torch.testing.assert_close(found["R"], torch.full((H,), stream, dtype=torch.float64))
    # a head: 8 entries, each a row of 3 maps of H and a column of one
    torch.testing.assert_close(found["A.1"], torch.full((4,), 4.0 * 8 * 4 * H, dtype=torch.float64))
    torch.testing.assert_close(found["F.0"], torch.full((F,), 4.0 * 2 * H, dtype=torch.float64))


@torch.no_grad()
def test_the_heaviest_stay():
    teacher = make("llama")
    layer = teacher.model.layers[1]
    layer.mlp.up_proj.weight[:24] *= 100
    layer.self_attn.k_proj.weight[8:16] *= 100  # the second kv-group
    teacher.model.embed_tokens.weight[:, 5:21] *= 100
    keep = heaviest(teacher, sizes(teacher, 16, "dim", intermediate_size=24), "dim")
    assert keep["F.1"].nonzero().flatten().tolist() == list(range(24))
    assert keep["A.1"].tolist() == [False, True]
    assert keep["R"].nonzero().flatten().tolist() == list(range(5, 21))
    assert all(int(keep[name].sum()) == count for name, count in (("F.0", 24), ("A.0", 1)))


@torch.no_grad()
def test_what_reads_and_what_writes_a_unit_counts():
    """Columns of readers, rows of writers; of a masked LM the projection reads the transform."""
    teacher = make("bert", tie_word_embeddings=False)
    attention = teacher.bert.encoder.layer[0].attention
    attention.output.dense.weight[:, 8:24] *= 100  # reads the second and third head
    attention.self.query.weight[:, 3:19] *= 100  # reads the stream
    teacher.cls.predictions.decoder.weight[:, 16:] *= 100
    keep = heaviest(teacher, sizes(teacher, 16, "head"), "head")
    assert keep["A.0"].tolist() == [False, True, True, False]
    assert keep["R"].nonzero().flatten().tolist() == list(range(3, 19))
    assert keep["T"].nonzero().flatten().tolist() == list(range(16, 32))


@torch.no_grad()
def test_dim_keeps_as_many_of_every_head():
    teacher = make("bert")
    teacher.bert.encoder.layer[0].attention.self.value.weight[:16] *= 100  # two heads of four
    dim = heaviest(teacher, sizes(teacher, 16, "dim"), "dim")["A.0"]
    assert dim.view(4, 8).sum(1).tolist() == [4, 4, 4, 4]
    head = heaviest(teacher, sizes(teacher, 16, "head"), "head")["A.0"]
    assert head.tolist() == [True, True, False, False]
