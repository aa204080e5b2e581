"""Panels of teachers from plain lists, and the golden cases about them by function."""

import torch

from dskd.batch import Panel
from tests.goldens import golden

CASES = golden("muki")["cases"]
PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
"""Dtype, and by how much more than the case's own tolerance it may be off."""


def cases(function):
    """The golden cases of one function of the original."""
    return [case for case in CASES if case["fn"] == function]


def named(case):
    """A case's name, for pytest."""
    return case["name"]


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def blocks(logits):
    """Maps of teachers whose classes stand one after the other's."""
    ends = torch.tensor([each.shape[1] for each in logits]).cumsum(0)
    return [torch.arange(end - each.shape[1], end) for each, end in zip(logits, ends, strict=True)]


def panel_of(inputs, dtype=torch.float64):
    """The panel of a golden case."""
    logits = [tensor(each, dtype) for each in inputs["teacher_logits"]]
    maps = [torch.tensor(ids) for ids in inputs.get("class_ids", [])] or blocks(logits)
    confidence = inputs.get("teacher_weight")
    confidence_Nn = None if confidence is None else tensor(confidence, dtype)
    present = inputs.get("available")
    present_Nn = None if present is None else torch.tensor(present, dtype=torch.bool)
    return Panel(logits, maps, confidence_Nn, present_Nn)


def close(found, wanted, case, extra=0.0):
    """Assert equality to the case's tolerance, or a wider one."""
    atol = max(case["atol"], extra)
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), wanted, atol=atol, rtol=extra)
