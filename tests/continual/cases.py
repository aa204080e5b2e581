"""The golden cases of what a sequence of tasks keeps."""

from typing import Any

from tests.goldens import golden

CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in golden("continual")["cases"]}
GEM = [name for name, case in CASES.items() if case["kind"] == "gem"]
