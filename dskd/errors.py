"""Errors a user can act on. Each message names the setting, file or row it is about.

All derive from :class:`DskdError`, so that the commands print them without a traceback; any other
exception is a defect of ours and keeps its traceback.
"""


class DskdError(Exception):
    """Something the user can mend; the message says what and where."""

    printed_by_other_rank: bool = False
    """Whether another rank raised the same and prints it for the user."""


class ConfigError(DskdError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(DskdError, ValueError):
    """A corpus, tokenizer or prepared block file cannot be used."""


class StoreError(DskdError, ValueError):
    """A row store (logit cache) is missing, damaged, or belongs to something else."""


class DiskError(StoreError):
    """A file cannot be read or written: a full disk, a missing right."""


class CheckpointError(DskdError, ValueError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class NonFiniteError(DskdError, ArithmeticError):
    """A loss term became NaN or infinite during training."""


class LostRankError(DskdError):
    """A rank has died, hangs, or never came."""

    status = 69
    """Exit status of all ranks then."""
