"""Triton kernels. Their files are in the checkout's top-level kernels/, which must stay without
``__init__.py``: a real package of that name would hide HuggingFace's ``kernels`` from transformers.
In a wheel kernels/*.py lie here and this file is absent.
"""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[2] / "kernels"))
