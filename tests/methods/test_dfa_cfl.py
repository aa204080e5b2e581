"""DFA and CFL as methods: the golden losses through their settings, maps beside a student that are
the same however it is held, and what they refuse."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from dskd.batch import IGNORE, Panel, Positions
from dskd.engine.engine import decay_groups
from dskd.engine.zero import is_sharded, sharded_construction
from dskd.errors import ConfigError
from dskd.methods.alignment import aligned_layers, cfl_terms, dfa_term
from dskd.methods.base import build_method
from dskd.methods.integration import label_map, vkd_term
from dskd.models.families import COMPANION, positions_of
from dskd.models.writing import export
from dskd.settings.run import Run, Train
from dskd.system import dist
from dskd.teachers.panel import PanelistsWithStates
from dskd.training.objective import Objective
from tests.batches import batch_of
from tests.methods.panels import PRECISIONS, cases, close, named, panel_of, tensor
from tests.methods.test_alignment import CFL_NAMES, DFA_NAMES, set_up
from tests.models import tiny
from tests.models.test_initial import fingerprints
from tests.ranks import run_ranks

OWN = [["a", "b"], ["c", "b", "d"]]
UNION = ["a", "b", "c", "d"]
TEACHERS = [("roberta", {"hidden_size": 48, "num_hidden_layers": 4}), ("gpt2", {})]
"""Of other types, one wider and deeper than the student."""


def run_of(method, teachers=None, **changes):
    """A run of a live panel; ``changes`` are of the panel but for those of ``train`` and of each
    ``member``."""
    train = Train(**{"micro_batch": 8, **changes.pop("train", {})})
    member = changes.pop("member", {})
    members = {
        name: {"model": tiny.settings(kind, **fields).model_dump(), **member}
        for name, (kind, fields) in zip("xy", teachers or TEACHERS, strict=True)
    }
    panel = {"kind": "panel", "scores": "live", "confidence": "logits", "teachers": members}
    labelled = {"kind": "tsv", "path": "rows.tsv", "label": "y"}
    return Run(
        method=method,
        train=train,
        teacher=panel | changes,
        data={"objective": "classification", "sources": [labelled], "validation": [labelled]},
    )


def with_maps(method, student, run):
    """The student with maps beside it, and the hooks."""
    return build_method(method).hooks(student, SimpleNamespace(run=run))


def numbered(states, layers):
    """Hidden states as a model gives them, by those of some layers from the top."""
    found = [torch.full_like(states[0], torch.nan)] * (layers + 1)
    for index, each in enumerate(states):
        found[layers - index] = each
    return found


@pytest.mark.parametrize(("dtype", "extra"), PRECISIONS)
@pytest.mark.parametrize("case", [*cases("dfa_loss"), *cases("cfl_loss")], ids=named)
def test_the_loss_is_the_originals(case, dtype, extra):
    inputs, expected, dfa = case["inputs"], case["expect"], case["fn"] == "dfa_loss"
    kind, names = ("dfa", DFA_NAMES) if dfa else ("cfl", CFL_NAMES)
    other = "align_weight" if dfa else "mmd_weight"
    settings = {
        "kind": kind,
        "temperature": inputs["temperature"],
        "weight": inputs["kd_alpha"],
        "reconstruction_weight": inputs["rec_alpha"],
        other: inputs["almal_alpha"],
        "layers": len(inputs["student_hiddens"]),
    }
    rows = len(inputs["student_hiddens"][0])
    method = build_method(settings if dfa else settings | {"mmd_rows": rows})
    blocks, students, teachers = set_up(case, partial(method.block, dtype=dtype), names, dtype)
    # CFL's layers are the top ones of deeper models.
    layers = len(students) if dfa else len(students) + 2
    by_teacher = [numbered(each, layers) for each in zip(*teachers, strict=True)]
    panel = replace(panel_of(inputs, dtype), states=by_teacher)
    logits_NC = tensor(inputs["student_logits"], dtype)
    positions = Positions(
        logits_NC, lambda hidden_ND: hidden_ND, None, numbered(students, layers),
        nn.ModuleList(blocks),
    )  # fmt: skip
    one_a_row = torch.full(students[0].shape[:2], IGNORE)
    one_a_row[:, 0] = 0
    batch = batch_of(one_a_row)
    counts, terms = method.counts(batch), method.loss(positions, panel, batch, 0)
    assert set(counts) == set(terms) == set(method.terms)
    total = sum(term.total / counts[name] for name, term in terms.items())
    close(total, expected["total"], case, extra)
    parts = {k: v / counts[name] for name, term in terms.items() for k, v in term.parts.items()}
    close(parts["kl"], expected["kd"], case, extra)
    close(parts["reconstruction"], expected["rec"], case, extra)
    part = "align" if dfa else "mmd"
    close(parts[part], expected[part], case, extra)
    total.backward()
    for name, wanted in expected["grads"].items():
        if name.startswith("student_hidden"):
            close(students[int(name.split(".")[1])].grad, wanted, case, 30 * extra)


def classified(lengths):
    """Rows of these lengths, with one supervised position each."""
    generator = torch.Generator().manual_seed(2)
    width = max(lengths)
    ids_BT = torch.randint(5, 43, (len(lengths), width), generator=generator)
    mask_BT = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    labels_BT = torch.full_like(ids_BT, IGNORE)
    labels_BT[:, 0] = 0
    return batch_of(labels_BT, ids_BT=ids_BT.where(mask_BT == 1, 1), mask_BT=mask_BT)


METHODS = {
    "dfa": {"kind": "dfa", "temperature": 2.0, "align_weight": 0.5},
    "cfl": {"kind": "cfl", "layers": 2, "mmd_rows": 2, "mmd_weight": 0.5},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_objective_compares_layers_of_student_and_teachers(name):
    """All of it through the real models; their hidden states are HuggingFace's."""
    method, run = build_method(METHODS[name]), run_of(METHODS[name])
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student = tiny.make("bert", classes=UNION, **still)
    with_maps(METHODS[name], student, run)
    teachers = [
        tiny.make(kind, seed=seed, classes=own, **fields).requires_grad_(False)
        for seed, ((kind, fields), own) in enumerate(zip(TEACHERS, OWN, strict=True))
    ]
    maps = [label_map(own, UNION, "teacher") for own in OWN]
    ask = PanelistsWithStates(teachers, maps)
    batch = classified([9, 5, 7, 3])
    found = Objective(student, method, ask)(batch, 0)
    assert all(each.training for teacher in teachers for each in teacher.modules())  # put back

    def states(model):
        inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT}
        return model.eval()(**inputs, output_hidden_states=True)

    seen = [states(teacher) for teacher in teachers]
    own = states(student)
    assert positions_of(student, batch).states is None, "no evaluation reads them"
    panel = Panel([each.logits for each in seen], maps)
    rule = "even" if name == "dfa" else "top"
    pairs = [aligned_layers(depth, 2, None, rule, "") for depth in (4, 2)]
    assert pairs[0][0] == ([4, 2] if name == "dfa" else [4, 3])
    by_teacher = [
        [each.hidden_states[layer] for layer in layers]
        for each, (layers, _) in zip(seen, pairs, strict=True)
    ]
    aligned = ([own.hidden_states[2], own.hidden_states[1]], list(zip(*by_teacher, strict=True)))
    blocks = student.get_submodule(COMPANION)
    wanted = {"rows": vkd_term(own.logits, panel, temperature=method.temperature)}
    if name == "dfa":
        wanted["tokens"] = dfa_term(blocks, *aligned, batch.mask_BT, align_weight=0.5)
    else:
        wanted |= cfl_terms(blocks, *aligned, batch.mask_BT, rows=2, mmd_weight=0.5)
    assert found.keys() == wanted.keys()
    for term, other in wanted.items():
        torch.testing.assert_close(found[term].total, other.total, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[term].parts, other.parts, rtol=1e-5, atol=1e-6)
    sum(term.total for term in found.values()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in blocks.parameters())
    assert student.classifier.weight.grad.any()
    assert method.counts(batch) == {
        "rows": 4.0, "tokens": 24.0, **({} if name == "dfa" else {"groups": 2.0})
    }  # fmt: skip


def _built(rank, stage3, dtype=torch.float32, **more):
    del rank
    ds = tiny.zero3(dist.world(), **more) if stage3 else None
    found = {}
    for name, method in METHODS.items():
        student = tiny.make("bert", ds=ds, dtype=dtype, classes=UNION)
        with sharded_construction(ds):
            with_maps(method, student, run_of(method))
        maps = student.get_submodule(COMPANION)
        if stage3:
            assert all(is_sharded(p) and p.numel() == 0 for p in maps.parameters())
        found |= {f"{name}.{key}": value for key, value in fingerprints(maps).items()}
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_maps_do_not_depend_on_stage_and_world(world):
    expected = _built(0, False)
    assert run_ranks(_built, True, world=world) == [expected] * world
    half = {"bf16": {"enabled": True}}
    rounded = run_ranks(lambda rank: _built(rank, True, torch.bfloat16, **half), world=world)
    assert rounded == [_built(0, False, torch.bfloat16)] * world
    assert all(value.startswith("torch.bfloat16") for value in rounded[0].values())


def test_maps_are_drawn_as_the_original_does_and_by_seed():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))  # which nothing may depend on
        student = tiny.make("bert", classes=UNION)
        run = run_of(METHODS["dfa"]).model_copy(update={"seed": seed})
        state = torch.get_rng_state()
        with_maps(METHODS["dfa"], student, run)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(dict(student.get_submodule(COMPANION).named_parameters()))
    first, same, other = drawn
    weights = torch.cat([p.flatten() for name, p in first.items() if name.endswith("weight")])
    error = 0.02 / len(weights) ** 0.5
    assert weights.std().item() == pytest.approx(0.02, abs=4 * error)
    assert weights.mean().item() == pytest.approx(0.0, abs=4 * error)
    for name, parameter in first.items():
        assert torch.equal(parameter, same[name])
        assert torch.equal(parameter, other[name]) == name.endswith("bias")
        assert not (name.endswith("bias") and parameter.any())


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_is_in_one_group_and_the_maps_have_their_rate(name, decay_all):
    method = METHODS[name] | {"lr_scale": 50.0}
    student = tiny.make("bert", classes=UNION)
    hooks = with_maps(method, student, run_of(method))
    objective = Objective(student, build_method(method), None)
    groups = hooks.groups(decay_groups(objective, 0.1, decay_all))
    where = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(where)
    assert where.keys() == {id(p) for p in objective.parameters()}
    for parameter_name, parameter in student.named_parameters():
        group = where[id(parameter)]
        assert group.get("lr_scale", 1.0) == (50.0 if COMPANION in parameter_name else 1.0)
        decays = decay_all or parameter.dim() > 1
        assert group["weight_decay"] == (0.1 if decays else 0.0)


def test_the_export_is_a_plain_classifier(tmp_path):
    student = tiny.make("bert", classes=UNION)
    plain = list(student.state_dict())
    hooks = with_maps(METHODS["cfl"], student, run_of(METHODS["cfl"]))
    assert len(student.state_dict()) > len(plain)
    assert hooks.defines_export and build_method(METHODS["cfl"]).remakes_student
    exported = hooks.exported(None, None)
    assert list(exported.state_dict()) == plain
    batch = classified([6, 4])
    assert positions_of(exported, batch).states is None
    export(exported, tiny.tokenizer(), tmp_path / "export", card={})
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    with torch.no_grad():
        wanted_NC = positions_of(exported.eval(), batch).logits_NV
        found_NC = loaded.eval()(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
    assert torch.equal(found_NC, wanted_NC)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert not config.get("output_hidden_states")


def test_weights_are_looked_for_once():
    """What cannot be exported is refused at the first step; later ones cost nothing."""
    student = tiny.make("bert", classes=UNION)
    hooks = with_maps(METHODS["dfa"], student, run_of(METHODS["dfa"]))
    assert hooks.touches_weights
    hooks.before_step(None, 0, 0.1)
    assert not hooks.touches_weights


DEEP = tiny.make("bert", num_hidden_layers=3).config
REFUSED = [
    ("dfa", {"scores": "stored"}, r"teacher\.scores: stored, but method dfa reads the hidden"),
    ("cfl", {"confidence": "passes", "dropout": 0.1},
     r"teacher\.confidence: passes, but method cfl does not ask .*; set it to logits"),
    ("dfa", {"confidence": "c.npy"}, r"teacher\.confidence: c\.npy, but method dfa"),
    ("cfl", {"member": {"domains": ["tsv"]}},
     r"teacher\.teachers\.x\.domains: \['tsv'\], but method cfl aligns each row with all"),
    ("cfl", {"train": {"micro_batch": 7}},
     r"train\.micro_batch: 7 is not a multiple of method\.mmd_rows 2"),
    ({"kind": "dfa", "layers": 4}, {}, r"method\.layers: 4, but the student has 3 layers"),
    ({"kind": "dfa", "layer_rule": "stride"}, {},
     r"method\.layers: 3 of the student's 3 .* rule stride .* 4 of a teacher's 4; the rule even"),
    ({"kind": "cfl", "layers": 3}, {}, r"rule top these are 2 of a teacher's 2; the rule even"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "changes", "message"), REFUSED)
def test_what_cannot_be_is_refused(method, changes, message):
    settings = METHODS.get(method, method) if isinstance(method, str) else method
    with pytest.raises(ConfigError, match=message):
        build_method(settings).check(run_of(settings, **changes), DEEP)


def test_a_student_too_narrow_for_a_quarter_is_refused():
    narrow = tiny.make("bert", hidden_size=2, num_attention_heads=1).config
    with pytest.raises(ConfigError, match=r"model: its hidden size is 2, .* at least 4"):
        build_method({"kind": "cfl", "mmd_rows": 2}).check(run_of(METHODS["cfl"]), narrow)


def test_layers_that_are_known_late_are_refused_before_training():
    """A teacher that an earlier run exports is not there when the settings are checked."""
    method = {"kind": "dfa", "layer_rule": "stride"}
    run = run_of(method)
    student = tiny.make("bert", num_hidden_layers=3, classes=UNION)
    with pytest.raises(ConfigError, match=r"method\.layers: 3 of the student's 3"):
        with_maps(method, student, run)
    assert not hasattr(student, COMPANION)


def test_teachers_without_dropout_need_no_passes():
    teachers = [("llama", {}), ("roberta", {})]
    build_method(METHODS["dfa"]).check(run_of(METHODS["dfa"], teachers), DEEP)
