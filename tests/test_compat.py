"""`qosora.compat` is the only place that touches other packages' undocumented names, and misses each by name."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import qosora.compat
from qosora.compat import names
from qosora.errors import DependencyError, QosoraError

PACKAGE = Path(qosora.compat.__file__).parent.parent
for path in sorted((PACKAGE / "compat").glob("*.py")):
    importlib.import_module(f"qosora.compat.{path.stem}".removesuffix(".__init__"))
ENTRIES = sorted(set(names.ENTRIES))


def dotted(entry: str) -> str:
    return re.split(r"[(:]", entry)[0]


# ---- each entry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
def test_it_is_as_relied_on(entry: str):
    names.check(entry)


class Without:
    """A module, class or object without one of its names."""

    def __init__(self, whole: Any, name: str) -> None:
        self._whole, self._name = whole, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)


@pytest.mark.parametrize("name", sorted({dotted(entry) for entry in ENTRIES}))
def test_its_loss_is_told_by_name(name: str, monkeypatch: pytest.MonkeyPatch):
    owner, _, last = name.rpartition(".")
    above, _, middle = owner.rpartition(".")
    without = Without(names.check(owner), last)
    if above:  # in whatever way the owner has the name
        monkeypatch.setattr(names.check(above), middle, without, raising=False)
    else:
        monkeypatch.setitem(sys.modules, owner, without)
    with pytest.raises(DependencyError, match=rf"has no {re.escape(name)}: pip install '[\w.<=]+'$") as caught:
        names.check(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if ": " in entry])
def test_the_loss_of_what_its_code_knows_is_told(entry: str, monkeypatch: pytest.MonkeyPatch):
    name, _, text = entry.partition(": ")
    owner, _, last = name.rpartition(".")
    other: Any = type(last, (), {}) if isinstance(names.check(name), type) else lambda: None
    stand_in = SimpleNamespace(**{last: other})
    above, _, middle = owner.rpartition(".")
    if above:
        monkeypatch.setattr(names.check(above), middle, stand_in, raising=False)
    else:
        monkeypatch.setitem(sys.modules, owner, stand_in)
    with pytest.raises(DependencyError, match=re.escape(f"its {name} does not know {text!r}")):
        names.check(entry)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.endswith(")")])
def test_the_loss_of_a_parameter_is_told(entry: str):
    name, _, parameters = entry.removesuffix(")").partition("(")
    with pytest.raises(DependencyError, match=re.escape(f"its {name} does not take (no_such, {parameters})")):
        names.check(f"{name}(no_such, {parameters})")


@pytest.mark.slow
def test_only_commands_that_need_it_end_with_the_line():
    code = (
        "import sys, trl.kernels.chunked_logprob as loss\n"
        "del loss.TOKEN_CHUNK_SIZE\n"
        "from qosora.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    plan, other = (
        subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
        for command in (["plan", "llama-2-7b"], ["inspect", "no-such-folder"])
    )
    assert plan.returncode == 1
    (line,) = plan.stderr.splitlines()
    assert line.startswith("qosora plan: error: qosora works with trl <1.17 (tried: 1.16.0); trl ")
    assert "has no trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE: pip install 'trl" in line
    assert "no-such-folder" in other.stderr
    assert "trl" not in other.stderr


# ---- nobody else ---------------------------------------------------------------------------------------------------

#: Underscore names outside of `compat`: file, name, why.
ALLOWED = {
    ("memory/predict.py", "_replace"): "of named tuples, which Python documents with an underscore",
    ("layers/tiling.py", "_tiled_source"): "qosora's own mark on a tensor",
}


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "compat")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The underscore names that a file asks objects or modules for, and does not define itself."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("qosora"):
            for name in [*(node.module or "").split("."), *(alias.name for alias in node.names)]:
                if is_private(name):
                    yield name, node.lineno
        elif isinstance(node, ast.Import):
            yield from ((n, node.lineno) for a in node.names for n in a.name.split(".") if is_private(n))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            argument = node.args[1]
            if isinstance(argument, ast.Constant) and is_private(str(argument.value)) and argument.value not in own:
                yield str(argument.value), node.lineno


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_are_its_own(path: Path):
    from qosora.compat.hooks import HOOKS

    file = str(path.relative_to(PACKAGE))
    module = "qosora." + file.removesuffix(".py").replace("/", ".")
    hooks = {
        re.split(r"[.: ]", re.split(r"[(]", entry)[0])[-1]
        for owner, entries in HOOKS.items()
        for entry in entries
        if owner.startswith(f"{module}.")
    }
    found = [
        f"{file}:{line}: {name}"
        for name, line in private_names(ast.parse(path.read_text(encoding="utf-8")))
        if name not in hooks and (file, name) not in ALLOWED
    ]
    assert not found, f"touch it in qosora/compat, and say what is relied on: {found}"


def test_what_is_allowed_is_needed():
    for file, name in ALLOWED:
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        assert name in dict(private_names(tree)), f"{file} has no {name} any more: take it out of ALLOWED"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_compat_has_is_imported_from_there(path: Path):
    # A class of which something inside is an entry may be documented itself.
    hidden = {dotted(entry) for entry in ENTRIES if ": " not in entry}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            taken = {f"{node.module}.{alias.name}" for alias in node.names} & hidden
            assert not taken, f"{path}:{node.lineno}: import it from qosora.compat: {sorted(taken)}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in hidden:
            pytest.fail(f"{path}:{node.lineno}: {ast.unparse(node)}: import it from qosora.compat")


def test_the_walk_sees_all_forms():
    code = "import a._b\nfrom c._d import _e\nx._f\ngetattr(x, '_g')\nself._h\n"
    code += "self._own = y._own\ndef _mine(): z._mine()\n"
    assert [name for name, _ in private_names(ast.parse(code))] == ["_b", "_d", "_e", "_f", "_g", "_h"]


def test_nobody_patches_where_nothing_is():
    for path in PACKAGE.rglob("*.py"):
        calls = [
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.keyword)
        ]
        made = [node.lineno for node in calls if node.arg == "create"]
        assert not made or path.name == "trl.py", f"{path}:{made}"
        assert len(made) <= 1


# ---- versions ------------------------------------------------------------------------------------------------------


def test_requirements_end_where_nothing_was_tried():
    import tomllib

    with (PACKAGE.parent / "pyproject.toml").open("rb") as file:
        required = tomllib.load(file)["project"]["dependencies"]
    bounds = {re.split(r"[<>=]", line)[0]: line.partition("<")[2] for line in required}
    assert {package: bounds[package] for package in names.TRIED} == {p: t.below for p, t in names.TRIED.items()}


def test_the_error_is_a_usual_one():
    assert issubclass(DependencyError, QosoraError)
