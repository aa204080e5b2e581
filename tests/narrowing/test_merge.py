"""Dense models of students with compactors: the original's tensors, and the same logits."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from dskd.engine.zero import gathered, is_sharded
from dskd.errors import DskdError
from dskd.models.families import head_in, projection_of
from dskd.models.writing import export
from dskd.narrowing.insert import insert, kept_widths, replica
from dskd.narrowing.layouts import widths_of
from dskd.narrowing.merge import (
    check_exact,
    checked_merge,
    largest_removed,
    merged_student,
    zero_removed,
)
from dskd.narrowing.narrow import narrowed_config
from dskd.narrowing.widths import Widths
from dskd.system.dist import sum_over_ranks
from tests.batches import batch_of
from tests.models.tiny import auto_of, batch, tokenizer, zero3
from tests.narrowing.test_insert import golden_keep, golden_logits
from tests.narrowing.wid_golden import (
    GOLDEN,
    assert_matches,
    parameter_name,
    student,
)
from tests.narrowing.wid_students import SHAPES, logits_of, small_student
from tests.ranks import run_ranks

MODEL = GOLDEN["model"]


def plain_name(golden: str) -> str:
    """Of the HuggingFace model."""
    return parameter_name(golden).replace("embeddings.LayerNorm.1", "embeddings.LayerNorm")


@pytest.mark.parametrize("strategy", ["dim", "head"])
def test_tensors_of_the_original(strategy):
    golden = MODEL["merge"][strategy]
    surgery = student(MODEL["config"], identity=False, statistics="hf")
    merged = merged_student(surgery, golden_keep(strategy))
    assert len(golden["tensors"]) == len(list(merged.parameters())) == 43
    for name, record in golden["tensors"].items():
        assert_matches(merged.get_parameter(plain_name(name)), record, 1e-9)
    for name, row in (("L0.q.W", slice(None)), ("L0.o.b", slice(None)), ("mlm2.W", 7)):
        key = name.replace(".", "_") + ("_row7" if row == 7 else "")
        found = merged.get_parameter(plain_name(name))[row]
        expected = torch.tensor(golden[key], dtype=torch.float64)
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-9)
    hidden = golden["student_config"]
    config = merged.config
    assert (config.hidden_size, config.intermediate_size) == (hidden["H"], hidden["FF"])
    assert config.num_attention_heads == hidden["heads"]
    assert widths_of(config).head_dim == hidden["hd"]
    assert config.tie_word_embeddings is False


@pytest.mark.parametrize("strategy", ["dim", "head"])
def test_logits_of_the_originals_export(strategy):
    surgery = student(MODEL["config"], identity=False, statistics="hf")
    keep = golden_keep(strategy)
    merged = merged_student(surgery, keep).eval()
    logits = golden_logits(merged).detach()
    golden = MODEL["merge"][strategy]["hf_export"]["logits_1_3"]
    expected = torch.tensor(golden, dtype=torch.float64)
    torch.testing.assert_close(logits[1, 3], expected, rtol=0, atol=1e-9)
    zero_removed(surgery, keep)
    surgery.mask(keep)
    hard = golden_logits(surgery.model.eval()).detach()
    real = torch.tensor(MODEL["seg"]) > 0
    torch.testing.assert_close(hard[real], logits[real], rtol=0, atol=1e-12)
    surgery.compact(keep)
    compact = golden_logits(surgery.model).detach()
    torch.testing.assert_close(compact[real], logits[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", ["dim", "head"])
def test_norms_of_the_originals_code_are_exported_as_huggingfaces(strategy):
    """Of the same logits but for the eps, which the comparison of both tells apart from a mistake;
    the weights of the others are what they are by HuggingFace's norms."""
    surgery, keep = (
        student(MODEL["config"], identity=False, statistics="uer"),
        golden_keep(strategy),
    )
    zero_removed(surgery, keep)
    merged = merged_student(surgery, keep).eval()
    ids_BT = torch.tensor(MODEL["src"])
    rows = batch_of(ids_BT, ids_BT=ids_BT)
    found = check_exact(surgery, merged, keep, rows, soft=False)
    assert found.hard < 1e-12 < found.soft < 1e-4
    assert surgery.statistics == "biased"  # as it was exported
    plain = student(MODEL["config"], identity=False, statistics="hf")
    zero_removed(plain, keep)
    same = merged_student(plain, keep)
    for name, parameter in merged.named_parameters():
        ratio = (7 / 8) ** 0.5 if name.endswith("LayerNorm.weight") else 1.0
        torch.testing.assert_close(parameter, ratio * same.get_parameter(name), rtol=1e-12, atol=0)
    wrong = student(MODEL["config"], identity=False, statistics="uer")
    zero_removed(wrong, keep)
    with pytest.raises(DskdError, match="export: the merged model is not the trained one"):
        check_exact(wrong, same.eval(), keep, rows, soft=False)


@pytest.mark.parametrize("strategy", ["dim", "head"])
def test_the_attention_scale_is_folded_where_heads_narrow(strategy):
    """Undone, logits differ by what the original's own convert.py is off."""
    surgery = student(MODEL["config"], identity=False, statistics="hf")
    small = merged_student(surgery, golden_keep(strategy)).eval()
    merged = insert(small, "unbiased").model  # of which the number is
    logits = golden_logits(merged).detach()
    for layer in merged.bert.encoder.layer:
        attention = layer.attention.self
        ratio = (attention.attention_head_size / 4) ** 0.5
        attention.query.weight.data /= ratio
        attention.query.bias.data /= ratio
        attention.query.merging.forget()
    off = (golden_logits(merged).detach() - logits).abs().max()
    expected = MODEL["merge"][strategy]["max_diff_if_attention_scale_not_folded"]
    assert float(off) == pytest.approx(expected, abs=1e-12)


def test_counts_of_student_sizes():
    """Embeddings and encoder of 12-layer students (the original's tables have 3 token types)."""
    for name, count in GOLDEN["counts"]["student_embedding_plus_encoder"].items():
        hidden = int(name.partition("-")[2])
        heads = 1 if hidden % 12 else 12  # which the count does not depend on
        widths = Widths(hidden, 4 * hidden, heads, heads, hidden // heads)
        config = narrowed_config(BertConfig(), widths)
        with torch.device("meta"):
            model = BertModel(config, add_pooling_layer=False)
        assert sum(p.numel() for p in model.parameters()) == count, name


@pytest.mark.parametrize("model_type, shape", SHAPES)
def test_exported_and_reloaded_logits_are_the_students(tmp_path, model_type, shape):
    surgery, keep = small_student(model_type, shape)
    surgery.mask(keep)
    zero_removed(surgery, keep)
    soft = logits_of(surgery.model)
    merged = merged_student(surgery, keep)
    assert merged.config.tie_word_embeddings is False
    export(merged, tokenizer(), tmp_path / "small", card={})
    small, report = auto_of(model_type).from_pretrained(
        tmp_path / "small", output_loading_info=True
    )
    assert not any(report.values()), report
    widths = widths_of(small.config)
    assert widths == kept_widths(surgery.model.config, keep)
    assert (widths.hidden, widths.intermediate, widths.kv_heads, widths.head_dim) == shape
    torch.testing.assert_close(logits_of(small), soft, rtol=0, atol=1e-5)
    surgery.compact(keep)
    torch.testing.assert_close(logits_of(surgery.model), soft, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type, shape", SHAPES)
def test_an_export_holds_nothing_that_could_be_left_out(tmp_path, model_type, shape):
    """Every value once, but for what transformers would miss: the second name of a head's bias."""
    merged = merged_student(*small_student(model_type, shape))
    export(merged, tokenizer(), tmp_path, card={})
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    second = {f"{head_in(merged).bias}.bias"} & stored.keys()
    assert bool(second) == (model_type in ("bert", "roberta", "xlm-roberta"))
    assert len(stored) - len(second) == len(list(merged.parameters()))
    for name in second:
        assert torch.equal(stored[name], projection_of(merged).bias)
        save_file({n: v for n, v in stored.items() if n != name}, path, {"format": "pt"})
        auto = auto_of(model_type)
        _, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert report["missing_keys"] == second


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "qwen3"])
def test_merging_a_compacted_student_is_the_same(model_type):
    surgery, keep = small_student(model_type, dict(SHAPES)[model_type])
    before = merged_student(surgery, keep).state_dict()
    surgery.compact(keep)
    after = merged_student(surgery, keep).state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)


def test_values_come_from_the_masters_where_there_are_some():
    """fp32 masters of a bf16 student: the merged model is that of the masters, in fp32."""
    surgery, keep = small_student("llama", (16, 24, 1, 8))
    expected = merged_student(surgery, keep).state_dict()
    masters = {n: p.detach().clone() for n, p in surgery.model.named_parameters()}
    surgery.model.to(torch.bfloat16)
    asked = []
    merged = merged_student(surgery, keep, lambda name: asked.append(name) or masters[name])
    for name, value in expected.items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=0)
    # the tied table serves the embedding and the projection
    assert sorted(set(asked)) == sorted(masters)
    assert next(merged_student(surgery, keep).parameters()).dtype == torch.bfloat16


def _merged_from_shards(rank, model_type):
    surgery, keep = small_student(model_type, dict(SHAPES)[model_type], ds=zero3(2))
    assert all(is_sharded(p) for p in surgery.model.parameters())

    def whole(name):
        with gathered([surgery.model.get_parameter(name)]):
            return surgery.model.get_parameter(name).detach().clone()

    models = merged_student(surgery, keep), replica(surgery, whole).model
    return [{n: p.tolist() for n, p in model.named_parameters()} for model in models]


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_sharded_students_are_merged_and_copied_whole(model_type):
    surgery, keep = small_student(model_type, dict(SHAPES)[model_type])
    models = merged_student(surgery, keep), surgery.model
    expected = [{n: p.tolist() for n, p in model.named_parameters()} for model in models]
    for found in run_ranks(_merged_from_shards, model_type):
        assert found == expected


def finished(model_type, shape):
    """A student whose removed units are 0, what it keeps, and its merged model."""
    surgery, keep = small_student(model_type, shape)
    zero_removed(surgery, keep)
    return surgery, keep, merged_student(surgery, keep)


@pytest.mark.parametrize("model_type, shape", SHAPES)
def test_the_gate_lets_a_finished_student_pass(model_type, shape):
    surgery, keep, merged = finished(model_type, shape)
    found = check_exact(surgery, merged, keep, batch())
    assert found.removed == 0 and found.where == "none"
    assert 0 < found.soft < 1e-5 and found.soft == found.hard


def test_the_gate_names_the_largest_removed_norm():
    surgery, keep = small_student("bert", (16, 24, 4, 4))
    zero_removed(surgery, keep)
    name = "bert.encoder.layer.1.output.dense.left"
    unit = int((~keep["F.1"]).nonzero()[3])
    with torch.no_grad():
        compactor = surgery.model.get_parameter(name)
        compactor[:2, unit] += torch.tensor([0.3, 0.4])
        # what is read there must not be 0 either, or the models are the same all the same
        surgery.model.get_parameter("bert.encoder.layer.1.intermediate.dense.right")[unit, 0] = 0.1
    norm, where = largest_removed(surgery, keep)
    assert norm == pytest.approx(0.5) and where == name
    merged = merged_student(surgery, keep)
    with pytest.raises(DskdError, match=rf"largest norm of a removed unit is 0\.5, in {name}"):
        check_exact(surgery, merged, keep, batch())
    # the gate set it to 0, and then it passes
    assert check_exact(surgery, merged, keep, batch()).removed == 0


def test_the_gate_refuses_another_model():
    surgery, keep, merged = finished("gpt2", (16, 64, 2, 8))
    with torch.no_grad():
        merged.transformer.h[1].mlp.c_fc.bias[0] += 0.01
    with pytest.raises(DskdError, match="the merged model is not the trained one"):
        check_exact(surgery, merged, keep, batch())


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_gate_refuses_what_is_not_finite(value, soft):
    """In the merged model, or in both."""
    for both in (False, True):
        surgery, keep, merged = finished("bert", (16, 24, 4, 4))
        with torch.no_grad():
            merged.bert.embeddings.word_embeddings.weight[:] = value
            if both:
                surgery.model.get_parameter("bert.embeddings.word_embeddings.weight")[:] = value
        with pytest.raises(DskdError, match="the merged model is not the trained one"):
            check_exact(surgery, merged, keep, batch(), soft=soft)


def test_a_student_that_needs_its_removed_units_is_refused():
    """The original's: near zero is near enough, and nothing else."""
    for size, refused in ((3e-4, False), (0.3, True)):
        surgery, keep = small_student("bert", (16, 24, 4, 4))
        as_is = {n: p.detach().clone() for n, p in surgery.model.named_parameters()}
        zero_removed(surgery, keep)
        with torch.no_grad():
            for name, parameter in surgery.model.named_parameters():
                if name.endswith((".left", ".right")):
                    gone = parameter != as_is[name]
                    noise = torch.randn(gone.shape, generator=torch.Generator().manual_seed(1))
                    parameter[gone] += size * noise[gone]
        merged = merged_student(surgery, keep)
        if refused:
            told = r"needs? longer .* raise train\.steps, method\.penalty .* lower method\.every"
            with pytest.raises(DskdError, match=rf"largest norm of a removed unit is .*{told}"):
                check_exact(surgery, merged, keep, batch(), soft=False)
        else:
            found = check_exact(surgery, merged, keep, batch(), soft=False)
            assert 1e-5 < found.soft < 0.01 and 3e-4 < found.removed < 0.01


def _checked(rank, size):
    """What each rank gets of a student whose ranks all take part in gathering it."""
    surgery, keep = small_student("llama", (16, 24, 1, 8))
    zero_removed(surgery, keep)
    asked = []

    def whole(name):
        asked.append(name)
        return sum_over_ranks(surgery.model.get_parameter(name).detach() * (1 - rank))

    for name, parameter in surgery.model.named_parameters():
        if name.endswith((".left", ".right")):
            parameter.data += size
    try:
        model, found = checked_merge(surgery, keep, whole, batch())
    except DskdError as problem:
        return str(problem), problem.printed_by_other_rank
    kinds = {parameter.device.type for parameter in model.parameters()}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return kinds, shapes, asked, found.hard


def test_only_rank_0_merges_and_all_take_its_word():
    first, second = run_ranks(_checked, 0.0)
    assert (first[0], second[0]) == ({"cpu"}, {"meta"})
    assert first[1:] == second[1:]
    first, second = run_ranks(_checked, 0.5)
    assert first[0] == second[0] and first[0].startswith("export: the merged model is not")
    assert (first[1], second[1]) == (False, True)


def test_a_half_way_ramp_makes_no_model():
    surgery, keep = small_student("bert", (16, 24, 4, 4))
    keep["T"] = torch.ones(32, dtype=torch.bool)
    with pytest.raises(DskdError, match=r"no dense model .*R 16/32.* T 32/32"):
        merged_student(surgery, keep)
