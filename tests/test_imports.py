"""Imports go down the levels of the table below, packages have one door each, and importing qosora costs nothing."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qosora

PACKAGE = Path(qosora.__file__).parent

#: Modules and packages from the bottom up: each imports only from levels before its own; docs/architecture.md draws it.
#: `checkpoints` lies above `config`, and that above `decompose`, as what is stored says in which of its formats.
ORDER: tuple[tuple[str, ...], ...] = (
    ("_lazy", "errors"),
    ("compat", "dtypes", "formats", "pages", "patterns", "remembered"),
    ("register", "decompose", "places"),
    ("config",),
    ("checkpoints", "layers"),
    ("base", "adapter"),
    ("data",),
    ("tokens",),
    ("inference",),
    ("training", "export"),
    ("memory",),
    ("demo", "doctor", "hub"),
    ("cli",),
    ("__main__",),
)
LEVELS = {part: level for level, parts in enumerate(ORDER) for part in parts}
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
#: Packages of modules that have their tests, and are listed in the package's docstring.
LISTED = [name for name in PACKAGES if name not in ("cli", "demo")]
#: Packages whose names other packages import from the package itself. `compat`'s modules say whose names they have.
DOORS = [name for name in LISTED if name != "compat"]


def part_of(path: Path) -> str:
    """The top-level module or package of a file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, str | None, int]]:
    """What a file imports of qosora, at any depth of its code: module, name in it, line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found: list[tuple[str, str | None]] = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import; name the module"
            found = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in found:
            if module == "qosora" and name is not None and (PACKAGE / name).with_suffix(".py").exists():
                module, name = f"qosora.{name}", None
            if module.split(".")[0] == "qosora":
                yield module, name, node.lineno


def sources() -> list[Path]:
    """All modules but the package's own `__init__`, which only names what lies below."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def short(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_module_has_a_level():
    missing = {part_of(path) for path in sources()} - set(LEVELS)
    assert not missing, f"add to ORDER, and to docs/architecture.md: {sorted(missing)}"


@pytest.mark.parametrize("path", sources(), ids=short)
def test_imports_go_down(path: Path):
    part = part_of(path)
    for module, name, line in imports(path):
        other = (module.split(".")[1:] or [name or "__version__"])[0]  # `import qosora` is for its version, too
        if other in ("__version__", part):
            continue
        assert other in LEVELS, (
            f"{path}:{line} imports {other!r} from qosora: import it from the module that defines it"
        )
        assert LEVELS[other] < LEVELS[part], f"{path}:{line} imports {other}, which is not below {part}"


@pytest.mark.parametrize("package", LISTED)
def test_a_package_lists_its_modules_from_the_bottom_up(package: str):
    """The table in its docstring: all modules, each importing only those above it in the table."""
    folder = PACKAGE / package
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    listed = re.findall(r"^\| `(\w+)` \|", docstring, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    for position, name in enumerate(listed):
        for module, _, line in imports(folder / f"{name}.py"):
            inside = module.split(".")[2:] if module.startswith(f"qosora.{package}.") else []
            assert not inside or inside[0] in listed[:position], f"{package}/{name}.py:{line} imports {inside[0]}"


@pytest.mark.parametrize("path", sources(), ids=short)
def test_other_packages_are_entered_by_the_door(path: Path):
    """A function that is called as its module is imported from that: of two equal names, a package can have one."""
    for module, name, line in imports(path):
        parts = module.split(".")
        if len(parts) == 3 and parts[1] in DOORS and parts[1] != part_of(path):
            assert name == parts[2] and name is not None, f"{path}:{line}: import {name} from qosora.{parts[1]}"  # noqa: PT018


@pytest.mark.parametrize("package", ["", *DOORS])
def test_doors_say_what_they_open(package: str):
    """What type checkers are told a package has is what it has, and no name is also a module's."""
    folder, name = (PACKAGE / package, f"qosora.{package}") if package else (PACKAGE, "qosora")
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared: dict[str, str | None] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        declared |= {alias.name: node.module for alias in node.names}
    door = importlib.import_module(name)
    assert set(declared) <= set(dir(door))
    for exported, module in declared.items():
        assert getattr(door, exported) is getattr(importlib.import_module(str(module)), exported)
    if package:
        assert not set(declared) & {path.stem for path in folder.iterdir()}


@pytest.mark.parametrize("package", LISTED)
def test_every_module_has_its_tests(package: str):
    tests = Path(__file__).parent / package
    names = {path.stem for path in (PACKAGE / package).glob("*.py")} - {"__init__"}
    missing = sorted(name for name in names if not (tests / f"test_{name}.py").exists())
    assert not missing, f"no tests/{package}/test_*.py for {missing}"


@pytest.mark.parametrize(
    "code",
    [
        "import qosora",
        "import qosora.cli",
        "import qosora.compat.trl",
        "import qosora.training; qosora.training.TrainConfig",
    ],
)
def test_importing_costs_nothing(code: str):
    code += "; import sys; print(sorted({'torch', 'transformers', 'peft', 'bitsandbytes', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_every_public_name_exists():
    for name in qosora.__all__:
        assert getattr(qosora, name) is not None
    assert set(qosora.__all__) <= set(dir(qosora))


def test_the_walk_sees_all_forms_of_import(tmp_path: Path):
    file = tmp_path / "main.py"
    file.write_text(
        "import qosora.decompose.svd\nfrom qosora import adapter, train\nfrom qosora.memory.plan import plan\n"
        "import torch, qosora.errors\ndef late():\n    from qosora.demo import run\n"
    )
    assert [(module, name) for module, name, _ in imports(file)] == [
        ("qosora.decompose.svd", None), ("qosora.adapter", None), ("qosora", "train"), ("qosora.memory.plan", "plan"),
        ("qosora.errors", None), ("qosora.demo", "run"),
    ]  # fmt: skip
    file.write_text("from .. import train\n")
    with pytest.raises(AssertionError, match="relative import"):
        list(imports(file))
