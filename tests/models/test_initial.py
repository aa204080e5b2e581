"""Random weights: the model's own kind, and the same however the model is held."""

import ctypes

import deepspeed
import pytest
import torch
import xxhash

from dskd.engine.zero import full_shape, gathered, is_sharded
from dskd.models.configs import config_of
from dskd.models.families import head_of
from dskd.system import dist
from dskd.system.log import peak_memory, reset_peak_memory
from tests.models.tiny import (
    ALL,
    SIX,
    auto_of,
    count_gathered,
    make,
    settings,
    stored,
    tokenizer,
    zero3,
)
from tests.ranks import run_ranks


def fingerprints(model) -> dict[str, str]:
    """A hash of the bits of every parameter and buffer, by name."""
    prints = {}
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            bits = parameter.detach().contiguous().view(torch.uint8).numpy()
            prints[name] = f"{parameter.dtype} {xxhash.xxh3_64_hexdigest(bits.tobytes())}"
    for name, buffer in model.named_buffers():
        prints[name] = f"{buffer.dtype} {buffer.tolist()}"
    return prints


def _built(rank, model_types, stage3, dtype=torch.float32, **more):
    del rank
    ds = zero3(dist.world(), **more) if stage3 else None
    found = {}
    for model_type in model_types:
        model = make(model_type, ds=ds, dtype=dtype)
        if stage3:
            assert all(is_sharded(p) and p.numel() == 0 for p in model.parameters())
        found[model_type] = fingerprints(model)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_weights_do_not_depend_on_stage_and_world(world):
    expected = _built(0, ALL, stage3=False)
    for found in run_ranks(_built, ALL, True, world=world):
        assert found == expected
    if world > 1:
        for found in run_ranks(_built, SIX, False, world=world):
            assert found == {model_type: expected[model_type] for model_type in SIX}


def _offloaded(rank):
    del rank
    ds = zero3(2)
    ds["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return fingerprints(make("gpt2", ds=ds))


def test_weights_do_not_depend_on_offload():
    assert run_ranks(_offloaded) == [fingerprints(make("gpt2"))] * 2


def test_half_precision_rounds_the_same_numbers():
    expected = _built(0, SIX, False, torch.bfloat16)
    half = {"bf16": {"enabled": True}}
    for found in run_ranks(lambda rank: _built(rank, SIX, True, torch.bfloat16, **half), world=2):
        assert found == expected
    full, rounded = make("llama"), make("llama", dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(full.named_parameters(), rounded.named_parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.float32


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16
ROPES = {"linear": {"factor": 2.0}, "dynamic": {"factor": 2.0}, "yarn": {"factor": 4.0}}
ROPES["llama3"] = LLAMA3


def _rope(rank, stage3):
    found = {}
    for kind, more in ROPES.items():
        ds = zero3(2, bf16={"enabled": True}) if stage3 else None
        rope = {"rope_type": kind, "rope_theta": 1e4, **more}
        model = make("llama", ds=ds, dtype=torch.bfloat16, rope_parameters=rope)
        found[kind] = {name: (str(b.dtype), b.tolist()) for name, b in model.named_buffers()}
    return found


def test_rotary_frequencies_stay_fp32_under_zero3():
    expected = _rope(0, False)
    assert all(dtype == "torch.float32" for kind in expected.values() for dtype, _ in kind.values())
    for found in run_ranks(_rope, True, world=2):
        assert found == expected


def test_seeds_and_modules_differ():
    a, b = make("llama", seed=1), make("llama", seed=2)
    assert fingerprints(a) == fingerprints(make("llama", seed=1))
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(x, y) == ("norm" in name), name
    layer = a.model.layers[0].mlp
    assert not torch.equal(layer.gate_proj.weight, layer.up_proj.weight)
    assert not torch.equal(layer.up_proj.weight, a.model.layers[1].mlp.up_proj.weight)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    make("gpt2")
    assert torch.equal(torch.get_rng_state(), before)


WIDE = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}
WIDE_OF = {
    "gpt2": {"n_embd": 128, "n_positions": 256},
    "distilbert": {"dim": 128, "hidden_dim": 256, "max_position_embeddings": 256},
    "electra": {**WIDE, "embedding_size": 64},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ALL)
def test_distribution_is_huggingfaces_own(model_type, tied):
    wide = WIDE_OF.get(model_type, WIDE)
    model = make(model_type, tok=tokenizer(600), tie_word_embeddings=tied, **wide)
    theirs = auto_of(model_type).from_config(model.config)
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        mine, reference = parameter.detach(), theirs_by_name[name].detach()
        assert (mine.dtype, mine.shape) == (reference.dtype, reference.shape)
        if reference.ndim < 2:
            assert torch.equal(mine, reference), name  # ones and zeros
            continue
        ratio = (mine.std() / reference.std()).item()
        assert abs(ratio - 1) < 6 / mine.numel() ** 0.5, (name, ratio)
        assert abs(mine.mean().item()) < 6 * mine.std().item() / mine.numel() ** 0.5, name
        assert ((mine == 0).all(-1) == (reference == 0).all(-1)).all(), name  # the padding row
        within = [(x.abs() < x.std()).float().mean().item() for x in (mine, reference)]
        assert abs(within[0] - within[1]) < 4 / mine.numel() ** 0.5, name  # cut off alike
    buffers = zip(model.named_buffers(), theirs.named_buffers(), strict=True)
    for (name, mine), (_, reference) in buffers:
        assert torch.equal(mine, reference), name


def test_gpt2_scales_its_residual_projections():
    model = make("gpt2", tok=tokenizer(600), n_embd=128, n_layer=3, initializer_range=0.05)
    block = model.transformer.h[1]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.05, rel=0.03)
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        assert projection.weight.std().item() == pytest.approx(0.05 / 6**0.5, rel=0.03)


def test_tied_weights_are_one_parameter():
    for model_type in ALL:
        tied = make(model_type, tie_word_embeddings=True)
        untied = make(model_type, tie_word_embeddings=False)
        head = tied.get_output_embeddings().weight
        assert head is tied.get_input_embeddings().weight
        assert torch.equal(head, untied.get_input_embeddings().weight)  # not the head's numbers
        assert not torch.equal(head, untied.get_output_embeddings().weight)


def _largest(rank, model_type):
    """Most elements of the model at full size at one time while it is built; its largest own."""
    del rank
    seen = count_gathered()

    def convert(self, module):
        # those inside it are slices by now
        seen.append(sum(p.numel() for p in module.parameters()))
        original(self, module)

    original = deepspeed.zero.Init._post_init_method
    deepspeed.zero.Init._post_init_method = convert
    model = make(model_type, ds=zero3(2))
    own = [sum(full_shape(p).numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    assert sum(p.numel() for p in model.parameters()) == 0
    return max(seen), len(seen), max(own), sum(full_shape(p).numel() for p in model.parameters())


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "qwen3"])
def test_no_rank_holds_more_than_one_module(model_type):
    for most, times, largest, whole in run_ranks(_largest, model_type):
        assert most == largest
        assert times > 40  # every module was seen, twice
        assert most < whole / 4


META = torch.device("meta")


@pytest.mark.parametrize("model_type", SIX)
def test_whole_parameters_are_made_on_the_device_and_buffers_on_the_cpu(tmp_path, model_type):
    """Here on a device without memory; where they come from makes no difference."""
    expected = dict(make(model_type).named_buffers())
    for what in (settings(model_type), stored(tmp_path, model_type)):
        model = make(what, model_type=model_type, device=META, dtype=torch.bfloat16)
        assert {p.device for p in model.parameters()} == {META}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        names = dict(model.named_parameters(remove_duplicate=False))
        plain = make(what, model_type=model_type)
        whole = dict(plain.named_parameters(remove_duplicate=False))
        assert {n: p.shape for n, p in names.items()} == {n: p.shape for n, p in whole.items()}
        assert len({*map(id, names.values())}) == len({*map(id, whole.values())})  # tied alike
        buffers = dict(model.named_buffers())
        assert buffers.keys() == expected.keys()
        for name, buffer in buffers.items():
            assert torch.equal(buffer, expected[name]) and buffer.dtype == expected[name].dtype


M_MMAP_THRESHOLD = -3
LARGE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}


def _taken(rank, device):
    """Bytes of this process that a model of 47 MB takes while it is made."""
    del rank
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # else glibc keeps what is freed
    make("llama", device=device)  # what is imported and cached on the way
    head_of(config_of(settings("llama", **LARGE), where="x"), "causal", "x")  # so is its head
    libc.malloc_trim(0)  # what earlier tests have freed, and is given out without growing
    reset_peak_memory()
    before = peak_memory()
    model = make("llama", **LARGE, device=device)
    assert 47e6 < sum(4 * p.numel() for p in model.parameters()) < 48e6
    return peak_memory() - before


def test_a_model_made_on_a_device_is_never_whole_in_the_memory_of_the_cpu():
    """Its largest parameter has 1 MB."""
    ((here,), (there,)) = (run_ranks(_taken, device, world=1) for device in (None, META))
    assert here > 40e6
    assert there < 8e6
