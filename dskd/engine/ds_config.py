"""DeepSpeed's JSON: load it, refuse what contradicts the settings, fill in every ``"auto"``.

The JSON says how a model is trained (ZeRO stage, offload, buckets, monitors) in DeepSpeed's own
words; the YAML says what (batch, rates, precision). A number given on both sides must be the same.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

from dskd.engine.ds_values import problems_of
from dskd.engine.ds_words import BROKEN, NESTED, TOP, UNUSED
from dskd.errors import ConfigError
from dskd.settings.parsing import nearest, show
from dskd.settings.run import Run
from dskd.settings.teachers import Precision

DS = dict[str, Any]
Role = Literal["student", "teacher"]

_ADAM = ("adam", "adamw")
_FROZEN = ("optimizer", "gradient_clipping", "tensorboard", "wandb", "csv_monitor", "comet")
"""Words about training, dropped where a JSON made for a student shards a frozen teacher."""
SLOW_STEP = (
    "0 in bf16 lets the host wait twice for its GPU at every parameter tensor of a step, where"
    " DeepSpeed looks for infinities; the preset zero1 does not, and trains alike"
)
"""What is wrong with the setting, on several GPUs and on one."""
_NEVER_PRINT = 1_000_000_000
_SMALLEST_BUCKET = 5_000_000
"""Elements of a bucket for small models, below which communication is all latency."""
_LARGEST_BUCKETS = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 200_000_000}
"""Elements of a bucket at ZeRO-1 and 2 for large models. DeepSpeed holds two whole ones to reduce
while it goes backward (200 MB in 16 bits), however few gradients there are to fill them."""


def load_preset(name: str | Path) -> DS:
    """Read a DeepSpeed JSON: a path that ends in ``.json``, or the name of a shipped preset.

    Raises:
        ConfigError: no such file or preset (with the nearest name), or not a JSON object.
    """
    path = Path(name)
    if path.suffix != ".json":
        folder = presets()
        path = folder / f"{name}.json"
        names = sorted(preset.stem for preset in folder.glob("*.json"))
        if str(name) not in names:
            known = f"; there are {', '.join(names)}, or give the path of a .json file"
            near = nearest(str(name), names)
            raise ConfigError(f"deepspeed: no preset {str(name)!r}{near}{known}")
    if not path.is_file():
        raise ConfigError(f"deepspeed: {path}: no such file")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except json.JSONDecodeError as problem:
        place = f"{path}:{problem.lineno}:{problem.colno}"
        raise ConfigError(f"{place}: not readable as JSON: {problem.msg}") from problem
    except ValueError as problem:
        raise ConfigError(f"{path}: not readable as JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {show(content)}")
    return content


def optimizer_device(name: str | Path) -> str:
    """Where the config of that name keeps the optimizer; ``none``: with the model."""
    zero = load_preset(name).get("zero_optimization") or {}
    return (zero.get("offload_optimizer") or {}).get("device", "none")


def presets() -> Path:
    """Folder of the shipped JSON files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "ds_configs"
    return inside if inside.is_dir() else package.parent / "ds_configs"


def precision_of(ds: DS) -> Literal["fp32", "bf16", "fp16"]:
    """The precision of a filled config."""
    for name in ("bf16", "fp16"):
        if ds.get(name, {}).get("enabled", False):
            return name
    return "fp32"


def fill_auto(
    ds: DS,
    run: Run,
    world: int,
    hidden: int,
    cuda: bool,
    *,
    parameters: int | None = None,
    role: Role = "student",
    precision: Precision | None = None,
    bf16: bool | None = None,
    ranks_per_node: int | None = None,
    where: str = "",
) -> DS:
    """A copy of ``ds`` with every value settled, as ``deepspeed.initialize`` takes it.

    Args:
        ds: a JSON of :func:`load_preset`; it is not changed.
        run: the settings.
        world: number of ranks.
        hidden: the model's hidden size, which scales the buckets of ZeRO-3.
        parameters: the model's, which bound the buckets of ZeRO-1 and 2; None: many.
        cuda: whether the ranks have GPUs. On CPU, Adam is PyTorch's, because DeepSpeed's are
            compiled with g++ at first use; on GPUs it is PyTorch's fused one, or DeepSpeed's CPU
            Adam where the optimizer is offloaded.
        role: a teacher is frozen: its stage must be 3 and what concerns training is dropped.
        precision: the setting that decides, None: ``train.precision``.
        bf16: whether the GPUs compute in bf16, None: they do if there are any.
        ranks_per_node: GPUs of a node (the ZeRO++ group that shares weights), None: ``world``.
        where: name of the JSON for messages, empty: ``run.deepspeed``.

    Raises:
        ConfigError: unknown words (with the nearest right one), values that contradict the settings
            (naming both), an ``"auto"`` that nothing fills; one line each.
    """
    filling = _Filling(copy.deepcopy(ds), cuda)
    filling.check_words()
    if not filling.problems:  # what has the wrong shape would be stumbled over again
        if role == "teacher":
            filling.freeze()
        else:
            filling.training(run)
        filling.batch(run, world)
        setting = "train.precision" if precision is None else f"the {role}'s precision"
        wanted = run.train.precision if precision is None else precision
        filling.precision(wanted, setting, cuda if bf16 is None else bf16, world)
        per_node = world if ranks_per_node is None else ranks_per_node
        filling.buckets(hidden, parameters)
        filling.zero(hidden, world, per_node, run.out / "swap" / role)
        filling.left(filling.ds)
    if not filling.problems:
        filling.problems += problems_of(filling.ds)
    if filling.problems:
        where = where or run.deepspeed
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in filling.problems))
    return filling.ds


class _Filling:
    """A config being filled, and what is wrong with it."""

    def __init__(self, ds: DS, cuda: bool) -> None:
        self.ds = ds
        self.cuda = cuda
        self.problems: list[str] = []

    def check_words(self) -> None:
        """Refuse words that DeepSpeed does not have, and those whose work dskd does itself."""
        for key, value in self.ds.items():
            if key in UNUSED:
                self.problems.append(f"{key}: {UNUSED[key]}")
            elif key not in TOP:
                known = [*TOP, *UNUSED]
                self.problems.append(f"{key}: DeepSpeed has no such setting{nearest(key, known)}")
            elif key in NESTED:
                self._check_nested(key, value)

    def _check_nested(self, name: str, section: Any) -> None:
        if not isinstance(section, dict):
            self.problems.append(f"{name}: expected an object, found {show(section)}")
            return
        words = NESTED[name]
        for key, value in section.items():
            inner = f"{name}.{key}"
            if key not in words:
                self.problems.append(f"{inner}: DeepSpeed has no such setting{nearest(key, words)}")
            elif inner in BROKEN and value:
                self.problems.append(f"{inner}: {BROKEN[inner]}")
            elif inner in NESTED and value is not None:
                self._check_nested(inner, value)

    def settle(self, name: str, value: Any, setting: str) -> None:
        """Put ``value`` where the JSON says nothing or "auto"; anything else must equal it."""
        *above, key = name.split(".")
        section = self.ds
        for part in above:
            section = section[part]
        given = section.get(key, "auto")
        if given == "auto":
            section[key] = value
        elif given != value:
            problem = f"{name} is {show(given)}, but {setting} is {show(value)}"
            self.problems.append(problem + '; write "auto" to follow the setting')

    def freeze(self) -> None:
        """Leave only what shards a frozen model."""
        zero = self.ds.get("zero_optimization", {})
        if zero.get("stage") != 3:
            stage = show(zero.get("stage", 0))
            self.problems.append(
                f"zero_optimization.stage is {stage}, but a teacher's must be 3"
                f" (a teacher without a deepspeed setting is a replica on every rank)"
            )
        for key in _FROZEN:
            self.ds.pop(key, None)
        zero.pop("offload_optimizer", None)

    def batch(self, run: Run, world: int) -> None:
        """The three batch sizes."""
        train = run.train
        sizes = "train.batch / (train.micro_batch x ranks)"
        self.settle("train_batch_size", train.batch, "train.batch")
        self.settle("train_micro_batch_size_per_gpu", train.micro_batch, "train.micro_batch")
        steps = train.batch // (train.micro_batch * world)
        self.settle("gradient_accumulation_steps", steps, sizes)
        self.ds.setdefault("steps_per_print", _NEVER_PRINT)

    def precision(self, wanted: Precision, setting: str, bf16: bool, world: int) -> None:
        """Switch bf16 and fp16 on or off; "auto" is bf16 where the hardware has it, else fp32."""
        given = {
            name: self.ds.setdefault(name, {}).get("enabled", "auto") for name in ("bf16", "fp16")
        }
        wrong = [name for name, value in given.items() if value not in (True, False, "auto")]
        for name in wrong:
            text = f'{show(given[name])} is not true, false or "auto"'
            self.problems.append(f"{name}.enabled: {text}")
        fixed = [name for name, value in given.items() if value is True]
        if len(fixed) == 2:
            self.problems.append("bf16.enabled and fp16.enabled are both true; choose one")
        if wrong or len(fixed) == 2:
            return
        if wanted == "auto":
            free = bf16 and given["bf16"] == "auto"
            wanted = fixed[0] if fixed else "bf16" if free else "fp32"
        if not self.ds.get("zero_optimization", {}).get("stage", 0):
            if wanted == "fp16":
                text = "fp16 needs ZeRO-1, 2 or 3: at stage 0 DeepSpeed does not scale the loss"
                self.problems.append(text)
            elif wanted == "bf16" and self.cuda and world > 1:
                self.problems.append(f"zero_optimization.stage: {SLOW_STEP}")
        for name, value in given.items():
            self.ds[name]["enabled"] = name == wanted
            if value not in ("auto", name == wanted):
                self.problems.append(f"{name}.enabled is {show(value)}, but {setting} is {wanted}")

    def training(self, run: Run) -> None:
        """Clipping and the optimizer."""
        train = run.train
        self.settle("gradient_clipping", train.clip, "train.clip")
        optimizer = self.ds.setdefault("optimizer", {"type": "AdamW"})
        kind, params = optimizer.get("type"), optimizer.setdefault("params", {})
        if not isinstance(kind, str) or not isinstance(params, dict):
            self.problems.append('optimizer: expected {"type": "AdamW", "params": {...}}')
            return
        adam = kind.lower() in _ADAM
        for key in ("lr", "betas", "eps", "weight_decay"):
            if adam or key == "lr" or key in params:  # other optimizers do not have all of them
                value = list(train.betas) if key == "betas" else getattr(train, key)
                self.settle(f"optimizer.params.{key}", value, f"train.{key}")
        if adam:
            self._adam(params)

    def _adam(self, params: DS) -> None:
        """Whose implementation of Adam runs."""
        offload = self.ds.get("zero_optimization", {}).get("offload_optimizer") or {}
        offloaded = offload.get("device", "none") != "none"
        if params.get("torch_adam", "auto") == "auto":
            params["torch_adam"] = not (self.cuda and offloaded)
        if not params["torch_adam"]:
            if params.get("fused") == "auto":
                del params["fused"]
        elif params.get("fused", "auto") == "auto":
            params["fused"] = self.cuda and not offloaded

    def buckets(self, hidden: int, parameters: int | None) -> None:
        """Bucket sizes that follow the model."""
        zero = self.ds.setdefault("zero_optimization", {"stage": 0})
        if zero.get("stage", 0) == 3:  # around a layer, as its weights are gathered
            size = max(hidden * hidden, _SMALLEST_BUCKET)
            autos = dict.fromkeys(_LARGEST_BUCKETS, size)
        else:
            autos = {
                name: most if parameters is None else min(max(parameters, _SMALLEST_BUCKET), most)
                for name, most in _LARGEST_BUCKETS.items()
            }
            size = autos["reduce_bucket_size"]
        autos["stage3_prefetch_bucket_size"] = size * 9 // 10
        autos["stage3_param_persistence_threshold"] = 10 * hidden
        _fill(zero, autos)

    def zero(self, hidden: int, world: int, ranks_per_node: int, swap: Path) -> None:
        """The ZeRO++ group, quantisation and offload."""
        zero = self.ds["zero_optimization"]
        several = world > ranks_per_node > 1
        autos: DS = {
            "zero_hpz_partition_size": ranks_per_node if several else 1,
            "zero_quantized_weights": self.cuda,  # it has no CPU operator
        }
        _fill(zero, autos)
        name = "zero_hpz_partition_size"
        size = zero.get(name, 1)
        if isinstance(size, int) and size > 0 and world % size:
            self.problems.append(f"zero_optimization.{name} {size} does not divide {world} ranks")
        # A buffer must hold the largest parameter: the embedding of at most 2^18 tokens.
        size = max(100_000_000, hidden * 2**18)
        autos = {"pin_memory": self.cuda, "nvme_path": str(swap), "buffer_size": size}
        for name in ("offload_param", "offload_optimizer"):
            _fill(zero.get(name) or {}, autos)

    def left(self, value: Any, name: str = "") -> None:
        """Refuse an "auto" that nothing has filled."""
        if isinstance(value, dict):
            for key, entry in value.items():
                self.left(entry, f"{name}.{key}" if name else key)
        elif value == "auto":
            text = 'dskd fills no "auto" here; write a value or leave it out'
            self.problems.append(f"{name}: {text}")


def _fill(section: DS, autos: DS) -> None:
    for key, value in autos.items():
        if section.get(key) == "auto":
            section[key] = value


def _once(pairs: list[tuple[str, Any]]) -> DS:
    """A JSON object, unless a key is given twice."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key!r} is given twice")
    return dict(pairs)
