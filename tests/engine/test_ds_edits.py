"""Who edits what is named in a refusal; all that is refused: ``tests/methods/test_wid_refused``."""

import json

import pytest

from dskd.engine.ds_edits import check_adam, check_edits, check_unscaled
from dskd.errors import ConfigError
from dskd.settings.run import Run, Train

WHO = "method.gem"


def test_edits_of_gradients_before_clipping_are_refused_with_an_offloaded_optimizer():
    run = Run(train=Train(clip=1.0), deepspeed="zero2_offload")
    refused = r"^train\.clip: 1\.0: .* \(zero2_offload\) measures gradients before method\.gem"
    with pytest.raises(ConfigError, match=refused):
        check_edits(run, WHO)
    check_edits(run, WHO, gradients=False)  # of weights after the step
    check_edits(Run(train=Train(clip=0.0), deepspeed="zero2_offload"), WHO)
    with pytest.raises(ConfigError, match=r"zero3_nvme: method\.gem cannot edit an optimizer on"):
        check_edits(Run(deepspeed="zero3_nvme"), WHO, gradients=False)


def test_fp16_is_refused_wherever_it_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"^train\.precision: method\.gem knows no loss scale"):
        check_unscaled(Run(train=Train(precision="fp16"), deepspeed="zero1"), WHO)
    path = tmp_path / "fp16.json"
    path.write_text(json.dumps({"fp16": {"enabled": True}}))
    with pytest.raises(ConfigError, match=r"fp16\.json: fp16\.enabled: true, but method\.gem"):
        check_unscaled(Run(deepspeed=str(path)), WHO)
    check_unscaled(Run(train=Train(precision="bf16"), deepspeed="zero1"), WHO)
    check_edits(Run(train=Train(precision="fp16"), deepspeed="zero1"), WHO)


def test_another_optimizer_than_adam_is_refused(tmp_path):
    path = tmp_path / "lion.json"
    path.write_text(json.dumps({"optimizer": {"type": "Lion"}}))
    with pytest.raises(ConfigError, match=r"lion\.json: optimizer\.type: Lion, but method\.gem"):
        check_adam(Run(deepspeed=str(path)), WHO)
    check_edits(Run(deepspeed=str(path)), WHO)
    check_adam(Run(deepspeed="zero1"), WHO)
