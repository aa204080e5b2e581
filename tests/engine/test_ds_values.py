"""Values of a DeepSpeed JSON that DeepSpeed would refuse late, or pass over."""

import pytest

from dskd.engine import ds_values
from dskd.engine.ds_config import fill_auto
from dskd.errors import ConfigError
from dskd.settings.recipe import read


def _refused(ds, cuda=False):
    """What is wrong with a JSON, for two ranks."""
    run = read(None, ["train.precision=fp32"]).runs["run"]
    with pytest.raises(ConfigError) as caught:
        fill_auto(ds, run, world=2, hidden=64, cuda=cuda)
    return str(caught.value).splitlines()


def _zero(stage=2, **more):
    return {"zero_optimization": {"stage": stage, **more}}


def _optimizer(kind, **params):
    return {"optimizer": {"type": kind, "params": params}}


@pytest.mark.parametrize(
    ("ds", "line"),
    [
        (_zero(7), "zero_optimization.stage: 7: Input should be 0, 1, 2, 3 or 3"),
        (_zero(2.5), "zero_optimization.stage: 2.5: Input should be 0, 1, 2, 3 or 3"),
        (_zero(2, offload_optimizer={"device": "gpu"}),
         "zero_optimization.offload_optimizer.device: 'gpu': Input should be 'none', 'cpu' or"),
        (_zero(2, reduce_bucket_size=0),
         "zero_optimization.reduce_bucket_size: 0: Input should be greater than 0"),
        (_zero(2, reduce_bucket_size=-5),
         "zero_optimization.reduce_bucket_size: -5: Input should be greater than 0"),
        (_zero(3, sub_group_size=0), "zero_optimization.sub_group_size: 0: Input should be"),
        (_zero(3, zero_hpz_partition_size="x"), "zero_optimization.zero_hpz_partition_size: 'x'"),
        ({"fp16": {"loss_scale": "x"}}, "fp16.loss_scale: 'x': fp16.loss_scale must be a number"),
        ({"bf16": {"check_grad_overflow": 3}}, "bf16.check_grad_overflow: 3: Input should be a"),
        ({"steps_per_print": "x"}, "steps_per_print: 'x': Input should be a valid integer"),
        ({"gradient_predivide_factor": "x"}, "gradient_predivide_factor: 'x': Input should be a"),
        ({"prescale_gradients": "x"}, "prescale_gradients: 'x': Input should be a valid boolean"),
        ({"communication_data_type": "fp99"}, "communication_data_type: 'fp99': Input should be"),
        ({"data_types": {"grad_accum_dtype": "fp99"}}, "data_types.grad_accum_dtype: 'fp99': "),
        ({"aio": {"block_size": "x"}}, "aio.block_size: 'x': Input should be a valid integer"),
        ({"flops_profiler": {"profile_step": 0}}, "flops_profiler.profile_step: 0: Input should"),
        ({"comms_logger": {"enabled": "x"}}, "comms_logger.enabled: 'x': Input should be a"),
        ({"csv_monitor": {"output_path": 3}}, "csv_monitor.output_path: 3: Input should be a"),
        ({"checkpoint": {"tag_validation": "x"}}, "DeepSpeed refuses it: DeepSpeedConfig"),
        ({"checkpoint": {"bogus": 1}}, "checkpoint.bogus: DeepSpeed has no such setting"),
        ({"checkpoint": {"use_node_local_storage": True}}, "checkpoint.use_node_local_storage: "),
        (_optimizer("Nothing"), "optimizer.type: there is no 'Nothing'"),
        (_optimizer("SGd"), "optimizer.type: there is no 'SGd'; did you mean 'SGD'?"),
        (_optimizer("SGD", momentun=0.9),
         "optimizer.params.momentun: SGD has no such parameter; did you mean 'momentum'?"),
        (_optimizer("SGD", momentum=-1), "optimizer.params: Invalid momentum value: -1"),
        (_optimizer("AdamW", bogus=1), "optimizer.params.bogus: torch.optim.AdamW has no such"),
        (_zero(0, offload_optimizer={"device": "cpu"}),
         "zero_optimization.offload_optimizer: has no effect at stage 0, only from 1 on"),
        (_zero(2, offload_param={"device": "cpu"}),
         "zero_optimization.offload_param: has no effect at stage 2, only from 3 on"),
        (_zero(1, zero_quantized_gradients=True),
         "zero_optimization.zero_quantized_gradients: has no effect at stage 1, only at 3"),
        (_zero(2, zero_hpz_partition_size=2),
         "zero_optimization.zero_hpz_partition_size: has no effect at stage 2, only at 3"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_named_before_anything_starts(ds, line):
    (found,) = _refused(ds)
    assert found.startswith(f"zero1: {line}"), found


def test_deepspeeds_own_adams_have_parameters_of_their_own():
    fused = _refused(_optimizer("AdamW", torch_adam=False, fused=True), cuda=True)
    assert fused == ["zero1: optimizer.params.fused: FusedAdam has no such parameter"]
    offloaded = _zero(2, offload_optimizer={"device": "cpu"})
    found = _refused(offloaded | _optimizer("AdamW", amsgrat=True), cuda=True)
    assert found[0].startswith("zero1: optimizer.params.amsgrat: DeepSpeedCPUAdam has no such")


@pytest.mark.parametrize("monitor", ["wandb", "comet", "tensorboard"])
def test_a_monitor_whose_package_is_missing_is_named(monkeypatch, monitor):
    monkeypatch.setattr(ds_values.importlib.util, "find_spec", lambda name: None)
    package = {"comet": "comet_ml"}.get(monitor, monitor)
    line = f"zero1: {monitor}.enabled: needs the package {package}, which is not installed"
    assert _refused({monitor: {"enabled": True}}) == [line]
