"""How long a run is: epochs and shares of steps, as numbers of steps."""

import pytest

from dskd.errors import ConfigError
from dskd.settings.checks import check_settings
from dskd.settings.length import ends_epoch, is_in_steps, with_steps
from dskd.settings.recipe import dump_run, read
from dskd.settings.run import Run, Train


def in_steps(rows: int, **train: object) -> Train:
    return with_steps(Run(train=Train(**train)), rows).train


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "steps"),
    [
        (1, 64, 16, 4), (1, 65, 16, 5), (3, 65, 16, 13), (0.5, 64, 16, 2), (2, 3, 16, 1),
        (0.1, 300, 10, 3),  # as floats, 0.1 * 300 / 10 = 3.0000000000000004
    ],
)  # fmt: skip
def test_epochs_are_so_many_steps_that_no_fewer_rows_are_taken(epochs, rows, batch, steps):
    train = in_steps(rows, epochs=epochs, batch=batch)
    assert (train.steps, train.epochs) == (steps, None)
    assert steps * batch >= round(epochs * rows) > (steps - 1) * batch


@pytest.mark.parametrize(
    ("warmup", "steps", "wanted"),
    [(0.1, 30, 3), (0.1, 31, 4), (0.001, 5, 1), (2, 30, 2), (0, 9, 0)],
)
def test_a_warmup_below_1_is_a_share_of_the_steps(warmup, steps, wanted):
    assert in_steps(7, steps=steps, warmup=warmup).warmup == wanted
    assert in_steps(steps, epochs=16, batch=16, warmup=warmup).warmup == wanted


def test_what_is_in_steps_stays_as_it_is():
    run = Run(train=Train(steps=9, warmup=3))
    assert is_in_steps(run.train) and with_steps(run, 5) == run
    assert not is_in_steps(Train(epochs=1)) and not is_in_steps(Train(warmup=0.5))


@pytest.mark.parametrize(("batch", "rows"), [(8, 30), (8, 32), (8, 3), (1, 1), (7, 100)])
def test_steps_in_which_an_epoch_ends(batch, rows):
    """Those that take the last row of one."""
    for step in range(1, 80):
        taken = range((step - 1) * batch, step * batch)
        assert ends_epoch(step, batch, rows) == any((n + 1) % rows == 0 for n in taken)


def test_epochs_alone_stand_in_place_of_the_default_steps(tmp_path):
    run = read(None, ["train.epochs=2", "train.betas=[0.9, 0.99]"]).runs["run"]
    assert (run.train.epochs, run.train.steps) == (2.0, None)
    (tmp_path / "config.yaml").write_text(dump_run(run))
    assert read(tmp_path / "config.yaml").runs["run"] == run


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train={epochs: 3, steps: 4}", "train.epochs: 3, but train.steps is 4; set one of them"),
        ("train.steps=null", "train.steps: missing; say how long to train, by train.steps or"),
        ("train.epochs=0", "train.epochs: 0 should be greater than 0"),
        (
            "train.warmup=1.5",
            "train.warmup: expected a number of steps, or a share of them below 1",
        ),
        ("train.warmup=-1", "train.warmup: expected a number of steps, or a share of them below 1"),
        ("evaluation.every=0", "evaluation.every: expected a number of steps from 1 on, or epoch,"),
        ("evaluation.every=x", "evaluation.every: expected a number of steps from 1 on, or epoch,"),
    ],
)
def test_what_says_no_length_is_refused(override, line):
    with pytest.raises(ConfigError) as caught:
        check_settings(read(None, [override]), world=1)
    assert str(caught.value).removeprefix("command line: ").startswith(line)
    assert len(str(caught.value).splitlines()) == 1
