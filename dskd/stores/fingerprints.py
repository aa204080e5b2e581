"""Fingerprints of what the values of a store depend on."""

from __future__ import annotations

from dskd.data.prepared import Prepared
from dskd.data.views import View
from dskd.engine.run_config import teacher_config
from dskd.models.build import model_fingerprint
from dskd.models.frozen import precision_of_teacher
from dskd.settings.run import Run
from dskd.settings.teachers import CachedTeacher, LiveTeacher
from dskd.system import dist
from dskd.system.files import fingerprint


def prints_of_rows(run: Run, prepared: Prepared) -> dict[str, str]:
    """Fingerprints that any store about the training rows must carry."""
    return {
        "blocking": fingerprint({"block_size": run.data.block_size, "packing": run.data.packing}),
        "tokenizer": prepared.tokenizer_fingerprint,
        "data": prepared.train.fingerprint,
    }


def expected(
    run: Run, teacher: CachedTeacher | LiveTeacher, prepared: Prepared, view: View, where: str
) -> dict[str, str]:
    """Fingerprints that a store of what a teacher says must carry; the teacher's only where the
    settings name its model. ``where`` is the teacher's section, for messages."""
    prints = prints_of_rows(run, prepared) | {"masking": view.fingerprint}
    if teacher.model is not None:
        model = teacher.model
        weights = dist.on_rank0(
            lambda: model_fingerprint(model, seed=run.seed, where=f"{where}.model")
        )
        ds = None
        if teacher.deepspeed is not None:
            ds = teacher_config(teacher.deepspeed, teacher.precision, run, hidden=1)
        prints["teacher"] = fingerprint([weights, precision_of_teacher(teacher, ds)])
    return prints
