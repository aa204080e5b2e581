"""The house's shape: floors, who may import what, names, and what the packages hold."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS = """
batch errors fused settings ops system tasks data engine models convert stores narrowing hardness
continual methods teachers training runs downstream train cli
""".split()  # noqa: SIM905  prose order, two lines
"""The rooms of dskd, lowest first: folders, and the files that stand beside them. A room imports
those named before it; inside a room there is no cycle."""

NEVER_IN_METHODS = {"training", "runs", "train"}
"""What a method must not know, besides any other method."""

SHARED_BY_METHODS = {
    "methods.alignment",
    "methods.amalgamation",
    "methods.base",
    "methods.inheritance_loss",
    "methods.integration",
    "methods.metrics",
    "methods.panel",
    "methods.panel_summary",
}

MAY_IMPORT = {"deepspeed": {"dskd/engine/"}, "triton": {"kernels/"}}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    """Dotted name below dskd; that of the folder for an __init__.py."""
    parts = path.relative_to(ROOT / "dskd").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module a file imports, in full, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


MODULES = {module_name(path): path for path in sources("dskd") if path.name != "__init__.py"}


def own_imports(path: Path) -> set[str]:
    """The modules of dskd that a file imports, below dskd."""
    below = {name.removeprefix("dskd.") for name in imports(path) if name.startswith("dskd.")}
    return below & MODULES.keys()


def room(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def test_every_module_is_in_a_room():
    assert {room(module) for module in MODULES} - {"kernels"} == {*ROOMS}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    lower = ROOMS[: ROOMS.index(room(module)) + 1]
    upward = {name for name in own_imports(MODULES[module]) if room(name) not in lower}
    assert not upward, f"dskd/{module} imports what is not below it: {sorted(upward)}"


def test_no_import_cycle():
    graph = {module: own_imports(path) for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) == "methods"])
def test_a_method_knows_neither_loop_nor_other_methods(module):
    found = own_imports(MODULES[module])
    assert not {room(name) for name in found} & NEVER_IN_METHODS
    others = {name for name in found if room(name) == "methods"} - SHARED_BY_METHODS
    assert not others, f"dskd/{module} imports another method: {sorted(others)}"


def test_few_files_stand_beside_the_rooms():
    files = {path.name for path in (ROOT / "dskd").glob("*.py")}
    assert files == {"__init__.py", "train.py", "cli.py", "batch.py", "errors.py", "ops.py"}


def test_no_file_is_longer_than_600_lines():
    for path in sources("dskd", "kernels", "launch", "tests"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, path


def test_packages_import_nothing():
    packages = [path for path in sources("dskd") if path.name == "__init__.py"]
    for path in packages:
        assert imports(path) <= {"pathlib", "pathlib.Path"}, path


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_who_imports_a_library(library):
    for path in sources("dskd", "kernels"):
        relative = path.relative_to(ROOT).as_posix()
        if any(relative.startswith(allowed) for allowed in MAY_IMPORT[library]):
            continue
        assert library not in {name.split(".")[0] for name in imports(path)}, relative


def test_kernels_stand_alone():
    for path in sources("kernels"):
        others = {name for name in imports(path) if not name.startswith("dskd.kernels")}
        heads = {name.split(".")[0] for name in others}
        assert heads <= {"torch", "triton", *sys.stdlib_module_names}, path


def test_code_is_ascii():
    for folder in ("dskd", "kernels", "ds_configs", "launch", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".sh", ".yaml", ".json", ".txt"}:
                assert path.read_bytes().isascii(), path


def test_no_name_hides_another_package():
    """`deepspeed dskd/train.py` starts with dskd/ on the path: its names must be nobody else's."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    own = {path.stem for path in (ROOT / "dskd").iterdir() if path.suffix in {"", ".py"}}
    assert own & taken <= {"kernels"}  # a namespace portion only, see below


def python(cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` in a folder, to its good end."""
    options = {"cwd": cwd, "env": os.environ | variables, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *words], check=False, **options)
    assert done.returncode == 0, done.stderr
    return done


HF_KERNELS = """
__version__ = "0.18.2"
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *args, **kwargs: None})
"""


@pytest.mark.parametrize("installed", [True, False], ids=["hf-kernels", "no-hf-kernels"])
def test_the_checkout_on_the_path_does_not_break_transformers(tmp_path, installed):
    """DeepSpeed's multi-node launcher puts it there, and transformers imports a `kernels`."""
    assert not (ROOT / "kernels/__init__.py").exists()
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels/__init__.py").write_text(HF_KERNELS)
        about = tmp_path / "kernels-0.18.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    program = (
        "import importlib.util, transformers.utils.import_utils as u\n"
        "import transformers.integrations.hub_kernels, dskd.kernels\n"
        "origin = importlib.util.find_spec('kernels').origin\n"
        "print(u.is_kernels_available(), origin, list(dskd.kernels.__path__)[-1])"
    )
    done = python(tmp_path, "-c", program, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    hugging_face = tmp_path / "kernels/__init__.py" if installed else None
    assert done.stdout.split() == [str(installed), str(hugging_face), str(ROOT / "kernels")]


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the sdist, built offline from a copy."""
    work = tmp_path_factory.mktemp("packages")
    copy = work / "checkout"
    for name in ("dskd", "kernels", "ds_configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    build = "import sys; from setuptools import build_meta as b; b.build_sdist(sys.argv[1])"
    pip = ["-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps", "-w", str(work)]
    python(copy, "-c", build, str(work))
    python(copy, *pip, ".")
    (wheel,), (sdist,) = work.glob("*.whl"), work.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_one_top_level_package(packages):
    with zipfile.ZipFile(packages[0]) as wheel:
        names = wheel.namelist()
    files = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == {"dskd"}
    checkout = {path.relative_to(ROOT).as_posix() for path in sources("dskd")}
    checkout |= {f"dskd/ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}
    checkout |= {f"dskd/kernels/{path.name}" for path in sources("kernels")}
    assert files == checkout - {"dskd/kernels/__init__.py"}  # the shim serves the checkout only


def test_the_sdist_can_build_the_wheel(packages):
    with tarfile.open(packages[1]) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for path in sources("kernels")}
    wanted |= {f"ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}
    assert wanted | {"setup.py", "pyproject.toml", "README.md", "dskd/train.py"} <= names


def test_an_installed_wheel_works_elsewhere(packages, tmp_path):
    with zipfile.ZipFile(packages[0]) as wheel:
        wheel.extractall(tmp_path / "site")
    program = (
        "import dskd, dskd.cli; from dskd.engine.ds_config import load_preset; "
        "print(dskd.__file__, load_preset('zero1')['zero_optimization']['stage'])"
    )
    done = python(tmp_path, "-c", program, PYTHONPATH=str(tmp_path / "site"))
    assert done.stdout.split() == [str(tmp_path / "site/dskd/__init__.py"), "1"], done.stderr
    (entry,) = tmp_path.glob("site/*.dist-info/entry_points.txt")
    assert "dskd = dskd.cli:main" in entry.read_text()
