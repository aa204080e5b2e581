"""dskd: language models that inherit what other models know, on DeepSpeed."""

__version__ = "0.1.0"
