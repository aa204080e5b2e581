"""What a job leaves half-written in a recipe's folders when it is killed."""

from __future__ import annotations

import shutil

from dskd.engine.checkpoints import Checkpoints
from dskd.models.writing import remove_half_written
from dskd.settings.folders import folder_of
from dskd.settings.recipe import Recipe
from dskd.system import dist
from dskd.system.files import remove_temporaries


def remove_leftovers(recipe: Recipe) -> None:
    """Remove it, while no other job is at work there (collective).

    It comes before anything is written: on a full disk there is no other room. What is
    half-written of a store goes when the store is gone on with, under the store's own lock.

    Raises:
        DiskError: it cannot be removed.
    """
    with dist.agreed():
        if dist.rank() == 0:
            remove_temporaries(recipe.out)
    for run in recipe.runs.values():
        folder = folder_of(run)
        Checkpoints(folder.checkpoints, run.checkpoint.keep, None).clean()
        with dist.agreed():
            if dist.rank() == 0:
                for place in (folder.path, folder.train):
                    remove_temporaries(place)
                for doomed in folder.path.glob(".*.gone"):  # of ``runs/changes.py``
                    shutil.rmtree(doomed)
                for place in (folder.sliced, folder.export):
                    remove_half_written(place)
