"""What a task leaves for the next one: sums of importances, and one of two anchors."""

import pytest
import torch

from dskd.continual.kept_weights import ANCHOR_FILE, OMEGA_FILE, KeptWeights, keep_weights
from dskd.errors import StoreError
from tests.ranks import run_ranks

PRINTS = {"model": "abc"}


def model_of(value):
    """A model of two parameters, one of which is not trained."""
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, value)
    model.bias.requires_grad_(False)
    return model


def importance(model):
    """Twice the weights."""
    return {"weight": 2 * model.weight.detach()}


def keep(folder, value, **more):
    return keep_weights(folder, lambda: model_of(value), importance, fingerprints=PRINTS, **more)


def values(folder):
    kept = KeptWeights.of(folder, PRINTS)
    kept.check_model(model_of(0.0))
    wholes = [file.whole("weight") for file in kept]
    assert all(whole.shape == (2, 3) and (whole == whole[0, 0]).all() for whole in wholes)
    return [whole[0, 0].item() for whole in wholes]


@pytest.mark.parametrize("start", [None, 7.0])
def test_importances_add_up_and_the_anchor_is_the_last_or_the_first_model(tmp_path, start):
    more = {} if start is None else {"start": lambda: model_of(start)}
    assert keep(tmp_path / "a", 1.5, **more)
    assert values(tmp_path / "a") == [3.0, start or 1.5]
    earlier = KeptWeights.of(tmp_path / "a", PRINTS)
    # of a later task: the model that this one starts from is not the first one's
    more = {} if start is None else {"start": lambda: model_of(8.0)}
    assert keep(tmp_path / "b", 2.5, earlier=earlier, **more)
    assert values(tmp_path / "b") == [8.0, start or 2.5]


def test_what_is_whole_is_not_made_again_and_what_is_not_is(tmp_path):
    keep(tmp_path, 1.5)
    assert not keep(tmp_path, 2.5)
    (tmp_path / OMEGA_FILE).unlink()  # killed between the two files
    assert keep(tmp_path, 2.5)
    assert values(tmp_path) == [5.0, 2.5]
    damaged = (tmp_path / ANCHOR_FILE).read_bytes()[:-1] + b"!"
    (tmp_path / ANCHOR_FILE).write_bytes(damaged)
    with pytest.raises(StoreError, match=r"anchor\.safetensors: damaged"):
        keep(tmp_path, 2.5)
    with pytest.raises(StoreError, match=r"omega\.safetensors: made with another model"):
        KeptWeights.of(tmp_path, {"model": "xyz"})


def test_what_another_model_left_is_refused_before_anything_is_measured(tmp_path):
    keep(tmp_path / "a", 1.5)
    earlier = KeptWeights.of(tmp_path / "a", PRINTS)
    other = {"trained": lambda: torch.nn.Linear(4, 2), "importance": lambda model: 1 / 0}
    with pytest.raises(StoreError, match=r"omega\.safetensors: of another model: .* bias"):
        keep_weights(tmp_path / "b", **other, fingerprints=PRINTS, earlier=earlier)


def _kept(rank, folder):
    del rank
    return keep(folder, 1.5), keep(folder, 1.5), values(folder)


def test_ranks_keep_it_together(tmp_path):
    assert run_ranks(_kept, tmp_path / "a") == [(True, False, [3.0, 1.5])] * 2
