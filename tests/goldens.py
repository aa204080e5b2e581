"""The numbers of the original code, as they lie in ``tests/golden``."""

import json
from pathlib import Path
from typing import Any


def golden(name: str) -> dict[str, Any]:
    """The content of ``tests/golden/NAME.json``."""
    return json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())
