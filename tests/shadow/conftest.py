"""Marks the tests that need the shadow device; without it they are skipped."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.shadow)
            if "SHADOW_DEVICE" not in os.environ:
                item.add_marker(pytest.mark.skip(reason="bash launch/shadow.sh runs it"))
