"""Files are opened without running what lies in them."""

import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from dskd.cli import main
from dskd.convert import fairseq, gpt2, uer
from dskd.convert.loading import FAIRSEQ, opened
from dskd.errors import ConfigError
from tests.convert.checkpoints import BEST, GOLDEN, LAST, golden, save


class Hostile:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(mark):
    """Each would make the file ``mark``."""
    return {
        "posix.mkdir": Hostile(os.mkdir, str(mark)),
        "posix.system": Hostile(os.system, f"touch {mark}"),
        "__builtin__.exec": Hostile(exec, f"open({str(mark)!r}, 'w')"),
        "numpy.fromfile": Hostile(np.fromfile, str(mark)),
    }


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "mark"


def test_the_attacks_would_work(mark):
    pickle.loads(pickle.dumps(attacks(mark)["posix.mkdir"], protocol=2))
    assert mark.exists()


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
@pytest.mark.parametrize("name", attacks("x"))
def test_a_hostile_file_is_refused_and_nothing_of_it_runs(tmp_path, mark, capsys, name, legacy):
    content = golden() | {"extra_state": attacks(mark)[name]}
    path = save(tmp_path / "a.pt", content, legacy=legacy)
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("a\n")
    folder = tmp_path / "task"
    folder.mkdir()
    save(folder / gpt2.WEIGHTS, content, legacy=legacy)
    (folder / "config.json").write_text("{}")
    for words in (
        ["fairseq", path],
        ["uer", path, "--vocab", vocab, "--heads", 4],
        ["gpt2", folder],
    ):
        kind, source, *options = map(str, words)
        out = tmp_path / "out"
        assert main(["convert", kind, source, str(out), *options]) == 2
        error = capsys.readouterr().err
        plain = {"__builtin__.exec": "exec", "numpy.fromfile": "fromfile"}.get(name, name)
        assert f"{plain}, which no weights need, and is not opened" in error
        assert "weights_only" not in error  # torch's advice to switch its guard off
        assert not out.exists()
        assert not mark.exists()


def test_meters_keep_nothing():
    """What may be named gets its state by a method that drops it."""
    meters = opened(LAST, FAIRSEQ)["extra_state"]["train_meters"]
    assert len(meters) == 7
    assert all(vars(meter) == {} for meter in meters.values())


def test_only_what_is_listed_is_opened(tmp_path):
    with pytest.raises(ConfigError, match=r"it names argparse.Namespace, which no weights need"):
        opened(LAST)
    assert opened(BEST)["args"] is None  # a file of 2021 needs no list
    assert str(opened(LAST, FAIRSEQ)["extra_state"]["best"]) == "2.5"


def test_a_config_of_omegaconf_gets_advice(tmp_path):
    """Its class is not here; a class of that name is enough."""

    class DictConfig:
        pass

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    module = types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = DictConfig
    sys.modules |= {"omegaconf": types.ModuleType("omegaconf"), "omegaconf.dictconfig": module}
    try:
        path = save(tmp_path / "a.pt", golden() | {"cfg": DictConfig()})
    finally:
        del sys.modules["omegaconf"], sys.modules["omegaconf.dictconfig"]
    with pytest.raises(ConfigError, match=r"omegaconf.dictconfig.DictConfig, .*where it was made"):
        fairseq.convert(path)


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "zip"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97])
def test_a_truncated_file_is_damaged(tmp_path, share, legacy):
    whole = save(tmp_path / "whole.pt", golden(), legacy=legacy).read_bytes()
    path = tmp_path / "a.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ConfigError, match=r"a.pt.* is damaged"):
        fairseq.convert(path)


def test_what_is_no_file_of_tensors(tmp_path):
    with pytest.raises(ConfigError, match=r"no.pt: no such file"):
        opened(tmp_path / "no.pt")
    (tmp_path / "ds/step10").mkdir(parents=True)
    (tmp_path / "ds/step10/mp_rank_00_model_states.pt").touch()
    message = (
        "is a folder, not a file of weights; name one of .*: step10/mp_rank_00_model_states.pt"
    )
    with pytest.raises(ConfigError, match=message):
        uer.convert(tmp_path / "ds", GOLDEN / "bpe/dict.txt", heads=4)
    (tmp_path / "a.pt").write_text("words\n")
    with pytest.raises(ConfigError, match="is damaged"):
        opened(tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="holds a Tensor, not tensors by name"):
        opened(save(tmp_path / "b.pt", torch.zeros(2)))
