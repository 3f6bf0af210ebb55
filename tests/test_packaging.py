"""The package as users get it: layering, contents of the wheel, the ways to import what stands beside the package."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import routingvl
from routingvl.kernels import ROUTINGS

ROOT = Path(__file__).resolve().parent.parent
MOVED = ("kernels", "benchmarks")
SOURCES = {f"routingvl.{name}": ROOT / name for name in MOVED} | {"routingvl": ROOT / "routingvl"}


# ---------------------------------------------------------------------------------------------------------- layering


def python_files() -> dict[str, Path]:
    """{import name: file} of every module that is installed."""
    modules = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return modules


def imported_names(name: str, path: Path) -> set[str]:
    """Dotted names that a module imports anywhere, for types alone too, with ``from a import b`` as ``a.b``."""
    names = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def documented_rows() -> dict[str, int]:
    """{package or module: row} as the table in docs/architecture.md has it, without ``routingvl.``."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    return {unit: int(row) for row, units in rows for unit in re.findall(r"`([\w.]+)`", units)}


def module_of(name: str) -> str:
    """The module of ours in which an imported name stands, or "" for other people's."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def unit_of(module: str) -> str:
    """What the table calls a module of ours: itself, or the nearest package around it; "" if neither is there."""
    unit = module.partition(".")[2]
    while unit and unit not in ROWS:
        unit = unit.rpartition(".")[0]
    return unit


MODULES = python_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
IMPORTS = {name: imported_names(name, path) for name, path in MODULES.items()}
NEEDS = {name: {module_of(imported) for imported in names} - {"", name} for name, names in IMPORTS.items()}
ROWS = documented_rows()


def test_every_module_has_a_row_and_every_row_its_modules():
    assert [name for name in MODULES if not unit_of(name)] == ["routingvl"]
    assert [unit for unit in ROWS if f"routingvl.{unit}" not in MODULES] == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    unit = unit_of(name)
    for needed in NEEDS[name]:
        other = unit_of(needed)
        if other and unit and other != unit:
            assert ROWS[other] < ROWS[unit], f"{name} (row {ROWS[unit]}) imports {needed} (row {ROWS[other]})"


def circle(needs: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next and the last the first; empty when there is no such circle."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        found: list[str] = []
        for needed in sorted(needs.get(name, ())):
            if needed not in done and not found:
                found = follow(needed, [*path, name])
        done.add(name)
        return found

    return next(filter(None, (follow(name, []) for name in sorted(needs))), [])


def test_no_modules_import_each_other():
    assert circle(NEEDS) == []


def test_a_circle_is_found():
    assert circle({"a": {"b", "d"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(name: str) -> list[str]:
    """What a module takes from others of ours although it is private there: by import, or as an attribute."""
    found = [imported for imported in IMPORTS[name] if is_private(imported.rpartition(".")[2]) and module_of(imported)]
    modules = {imported.rpartition(".")[2] for imported in IMPORTS[name] if imported in MODULES}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found += [f"{node.value.id}.{node.attr}"] if is_private(node.attr) else []
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_private_names_stay_in_their_module(name):
    assert private_names(name) == []


def test_the_demo_is_loaded_by_its_command_alone():
    users = {name for name, needed in NEEDS.items() if any(f"{one}.".startswith("routingvl.demo.") for one in needed)}
    assert {name for name in users if not f"{name}.".startswith("routingvl.demo.")} == {"routingvl.commands.demo"}


def roots(prefix: str) -> set[str]:
    """Top-level packages imported by the modules under ``prefix``."""
    return {
        imported.split(".")[0]
        for name, names in IMPORTS.items()
        if f"{name}.".startswith(f"{prefix}.")
        for imported in names
    }


def test_third_party_imports():
    standard = set(sys.stdlib_module_names)
    assert roots("routingvl.kernels") - standard <= {"torch", "triton", "routingvl"}
    in_kernels = [name for name in MODULES if f"{name}.".startswith("routingvl.kernels.")]
    assert {needed for name in in_kernels for needed in NEEDS[name]} <= set(in_kernels)
    assert "transformers" not in roots("routingvl.bottlenecks.layers")
    assert not {"torch", "transformers"} & roots("routingvl.metrics")
    assert not {"torchvision", "kernels", "benchmarks", "configs"} & roots("routingvl")


# ------------------------------------------------------------------------------------------------- wheel and editable

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build(kind: str, source: Path, target: Path) -> zipfile.ZipFile:
    """Build with the installed setuptools, so without network, and unpack into ``target`` as an installer would."""
    folder = target.with_name(f"{target.name}-wheel")
    folder.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD, kind, folder], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    wheel = zipfile.ZipFile(next(folder.glob("*.whl")))
    wheel.extractall(target)
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a build reads, since building leaves files in its folder."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("routingvl", "configs", *MOVED):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    with build("build_wheel", source, target) as archive:
        yield archive, target


def test_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(wheel[0].namelist())
    expected = {f"routingvl/{path.relative_to(ROOT / 'routingvl')}" for path in (ROOT / "routingvl").rglob("*.py")}
    for folder in MOVED:
        expected |= {f"routingvl/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected
    data = {f"routingvl/{path.relative_to(ROOT)}" for path in (ROOT / "configs").glob("*.yaml")}
    data |= {str(path.relative_to(ROOT)) for path in (ROOT / "routingvl" / "demo").glob("*.json")}
    assert data | {"routingvl/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"routingvl", f"routingvl-{routingvl.__version__}.dist-info"}


def metadata(archive: zipfile.ZipFile):
    return message_from_string(archive.read(f"routingvl-{routingvl.__version__}.dist-info/METADATA").decode())


def test_wheel_metadata(wheel):
    entry_points = wheel[0].read(f"routingvl-{routingvl.__version__}.dist-info/entry_points.txt").decode()
    assert "routingvl = routingvl.cli:main" in entry_points
    info = metadata(wheel[0])
    assert info["Version"] == routingvl.__version__
    assert info["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (info["License-Expression"] or info["License"])
    requirements = [Requirement(text) for text in info.get_all("Requires-Dist")]
    core = {item.name for item in requirements if item.marker is None or "extra" not in str(item.marker)}
    assert {"torch", "triton", "transformers", "safetensors", "pycocoevalcap"} <= core
    assert not {"torchvision", "ninja", "gradio", "wandb", "tensorboard"} & core
    (triton,) = [item for item in requirements if item.name == "triton"]
    assert triton.marker.evaluate({"platform_system": "Linux"})
    assert not triton.marker.evaluate({"platform_system": "Darwin"})


def test_constraints_pin_every_dependency_within_its_range(wheel):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin for pin in pins}
    for text in metadata(wheel[0]).get_all("Requires-Dist"):
        requirement = Requirement(text)
        pin = pins[canonicalize_name(requirement.name)]
        (exact,) = [part.version for part in pin.specifier if part.operator == "=="] or [None]
        if requirement.name == "triton":  # a range: a CUDA build of torch brings its own
            assert exact is None
        else:
            assert exact is not None, f"{pin} is no exact version"
            assert requirement.specifier.contains(exact), f"{pin} is outside {requirement}"


def run_python(code: str, cwd: Path, path: Path | None, *flags: str) -> str:
    """Output of a fresh interpreter in ``cwd`` with only ``path`` added to the search path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


FIND_ALL = """
import importlib.resources
from importlib.util import find_spec
configs = [entry.name for entry in importlib.resources.files("routingvl.configs").iterdir()]
assert any(name.endswith(".yaml") for name in configs), configs
print(*(find_spec(name).origin for name in ("routingvl", "routingvl.kernels", "routingvl.benchmarks")), sep="\\n")
"""


def assert_found(output: str, package: Path, moved: Path) -> None:
    origins = [Path(line) for line in output.splitlines()]
    assert origins == [folder / "__init__.py" for folder in (package, *(moved / name for name in MOVED))]


def test_import_from_the_repository_and_from_elsewhere(tmp_path):
    for cwd, path in ((ROOT, None), (tmp_path, ROOT)):
        assert_found(run_python(FIND_ALL, cwd, path), ROOT / "routingvl", ROOT)


def test_import_from_the_wheel(wheel, tmp_path):
    target = wheel[1]
    assert_found(run_python(FIND_ALL, tmp_path, target), target / "routingvl", target / "routingvl")
    code = "from routingvl import kernels; print(kernels.__file__, *kernels.ROUTINGS)"
    file, *routings = run_python(code, tmp_path, target).split()
    assert Path(file) == target / "routingvl" / "kernels" / "__init__.py"
    assert routings == list(ROUTINGS)


def test_import_from_an_editable_install(source, tmp_path):
    site = tmp_path / "site"
    build("build_editable", source, site).close()
    # -S leaves out the environment's own packages, an editable install of this repository among them
    code = f"import site; site.addsitedir({str(site)!r})\n{FIND_ALL}"
    assert_found(run_python(code, tmp_path, None, "-S"), source / "routingvl", source)


def test_nothing_is_imported_by_the_package_itself():
    code = "import sys, routingvl; print(*sys.modules)"
    assert not {"torch", "transformers", "numpy"} & set(run_python(code, ROOT, None).split())
