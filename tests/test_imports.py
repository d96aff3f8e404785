"""Imports go down the levels of the table below only, and importing qosora costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qosora

PACKAGE = Path(qosora.__file__).parent

#: Modules and subpackages from the bottom up: each imports only from levels before its own, a subpackage also from
#: itself. `config` takes the names of the storage formats from `nf4`; `linear` reads what `factorize` makes.
ORDER: tuple[tuple[str, ...], ...] = (
    ("_plugin", "errors", "parallel"),
    ("folders", "svd", "nf4", "pack", "experts", "run_config"),
    ("plain", "triton_kernels"),
    ("checkpoint",),
    ("config", "factorize", "kernels", "partial", "tiling"),
    ("product",),
    ("linear",),
    ("quantizer", "adapter", "optim", "data", "streaming"),
    ("models", "run_folder", "sft_options", "tokens", "generation"),
    ("sources",),
    ("convert", "export", "evaluation", "prepare", "memory"),
    ("trainer", "describe"),
    ("training",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LEVELS = {part: level for level, parts in enumerate(ORDER) for part in parts}


def part_of(path: Path) -> str:
    """The top-level module or subpackage of a file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[tuple[str, int]]:
    """Top-level parts of qosora that a file imports, at any depth of its code, with line numbers."""
    package = ("qosora", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"qosora.{alias.name}" for alias in node.names] if module == "qosora" else [module]
        else:
            continue
        found |= {(name.split(".")[1], node.lineno) for name in names if name.startswith("qosora.")}
    return found


def sources() -> list[Path]:
    """All modules but the package's own `__init__`, which only names what lies below."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_module_has_a_level():
    missing = {part_of(path) for path in sources()} - set(LEVELS)
    assert not missing, f"add to ORDER, and to the table of the design: {sorted(missing)}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path):
    part = part_of(path)
    for other, line in imported_parts(path):
        if other == "__version__" or other == part:
            continue
        assert other in LEVELS, (
            f"{path}:{line} imports {other!r} from qosora: import it from the module that defines it"
        )
        assert LEVELS[other] < LEVELS[part], f"{path}:{line} imports {other}, which is not below {part}"


def test_the_walk_sees_all_forms_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    file = tmp_path / "cli" / "main.py"
    file.parent.mkdir()
    file.write_text(
        "import qosora.svd\nfrom qosora import nf4, linear\nfrom qosora.memory.plan import plan\n"
        "from .. import train\nfrom ..export import export\nfrom . import parser\nimport torch\n"
        "def late():\n    from qosora.demo import run\n"
    )
    found = {name for name, _ in imported_parts(file)}
    assert found == {"svd", "nf4", "linear", "memory", "train", "export", "cli", "demo"}


@pytest.mark.parametrize("module", ["torch", "transformers", "peft", "bitsandbytes", "trl", "datasets"])
def test_importing_qosora_imports_nothing_heavy(module: str):
    code = f"import qosora, sys; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0
