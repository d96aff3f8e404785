"""Names that other packages do not promise: each is an entry here, found through one function, and missed in one line.

An entry is a text in one of three forms:

    a.b.c             there is such a name
    a.b.c(x, y)       it takes these parameters, in this order, maybe others between
    a.b.c: text       its code sets or reads the attribute `text`, or says it in a message

`uses` and `found` put entries into `ENTRIES` and check them where they are used first; the tests check all of them, and
what is relied on beside the name.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from functools import wraps
from importlib.metadata import version
from types import CodeType, ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from qosora.errors import DependencyError, first_line

__all__ = ["ENTRIES", "TRIED", "check", "found", "member", "missing", "untried", "uses"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Tried(NamedTuple):
    """Versions of a package that the tests were run with, and the first that is not to be installed."""

    versions: tuple[str, ...]
    below: str


#: The one table of versions; upper bounds in pyproject.toml are equal to it.
TRIED = {
    "torch": Tried(("2.11.0", "2.13.0", "2.14.1"), "2.15"),  # 2.11.0 on a GPU
    "transformers": Tried(("5.23.0", "5.24.0"), "5.25"),
    "peft": Tried(("0.21.2",), "0.22"),
    "trl": Tried(("1.16.0",), "1.17"),
    "bitsandbytes": Tried(("0.50.2",), "0.51"),
}

#: All entries of the modules that are imported.
ENTRIES: list[str] = []


def uses(*entries: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Say what a function relies on. It is checked at the first call.

    Raises:
        DependencyError: From the function, if an entry does not hold.
    """
    ENTRIES.extend(entries)

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        unchecked = list(entries)

        @wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            while unchecked:
                check(unchecked[-1])
                unchecked.pop()
            return function(*args, **kwargs)

        return checked

    return decorate


def found(module: str, entries: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` (PEP 562) of a module that has other packages' objects under names of its own.

    Args:
        module: Its `__name__`.
        entries: Name -> entry.
    """
    ENTRIES.extend(entries.values())

    def getattribute(name: str) -> Any:
        if name not in entries:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return check(entries[name])

    return getattribute


def check(entry: str) -> Any:
    """Return what an entry names.

    Raises:
        DependencyError: If it is not there, or not as the entry says.
    """
    dotted, parameters, text = re.fullmatch(r"([\w.]+)(?:\((.*)\))?(?:: (.+))?", entry).groups()  # type: ignore[union-attr]
    here = _resolve(dotted)
    if parameters:
        wanted = parameters.split(", ")
        if [name for name in _parameters(here) if name in wanted] != wanted:
            raise _gone(dotted, f"its {dotted} does not take ({parameters})")
    if text and not _mentions(here, text):
        raise _gone(dotted, f"its {dotted} does not know {text!r}")
    return here


def missing() -> dict[str, list[str]]:
    """Check all entries. Returns what does not hold, a line for each, by the package that it is of."""
    found: dict[str, list[str]] = {}
    for entry in dict.fromkeys(ENTRIES):
        try:
            check(entry)
        except Exception as error:  # a package that is not there or does not load raises what it likes
            found.setdefault(_package(entry), []).append(first_line(error))
    return found


def untried(package: str, installed: str) -> str | None:
    """Return "older" or "newer" for a version outside of those that were tried, None for one within."""
    tried, numbers = TRIED[package], _numbers(installed)
    if numbers >= _numbers(tried.below):
        return "newer"
    return "older" if numbers < _numbers(tried.versions[0]) else None


def member(owner: Any, dotted: str) -> Any:
    """Return a name of a module that is being imported, whose dotted name this is."""
    try:
        return getattr(owner, dotted.rpartition(".")[2])
    except AttributeError:
        raise _gone(dotted, f"has no {dotted}") from None


def _resolve(dotted: str) -> Any:
    importlib.import_module(_package(dotted))  # which has operators registered, too
    path, *rest = dotted.split(".")
    here: Any = importlib.import_module(path)
    for part in rest:
        path += f".{part}"
        if hasattr(here, part):
            here = getattr(here, part)
            continue
        try:
            here = importlib.import_module(path) if isinstance(here, ModuleType) else member(here, dotted)
        except ModuleNotFoundError:
            raise _gone(dotted, f"has no {dotted}") from None
    return here


def _package(dotted: str) -> str:
    return "bitsandbytes" if dotted.startswith("torch.ops.bitsandbytes.") else dotted.split(".")[0]


def _parameters(function: Any) -> list[str]:
    if hasattr(function, "_schema"):  # one of PyTorch's operators
        return [argument.name for argument in function._schema.arguments]
    return list(inspect.signature(function).parameters)


def _mentions(owner: Any, text: str) -> bool:
    """Say whether a class has an attribute, or the code of it or of a function sets, reads or says a text."""
    if not inspect.isclass(owner):
        return _in_code(inspect.unwrap(owner), text)
    members = [getattr(value, "fget", None) or getattr(value, "__func__", value) for value in vars(owner).values()]
    named = text in vars(owner) or text in inspect.get_annotations(owner)
    return named or any(_in_code(value, text) for value in members if inspect.isfunction(value))


def _in_code(function: Any, text: str) -> bool:
    """Say whether a text is a name in a function's code, or in a constant that is not its documentation."""
    codes: list[CodeType] = [function.__code__]
    for code in codes:
        if text in code.co_names:
            return True
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        said = (str(c) for c in code.co_consts if isinstance(c, str | int | float) and c != function.__doc__)
        if any(text in constant for constant in said):
            return True
    return False


def _gone(dotted: str, what: str) -> DependencyError:
    package = _package(dotted)
    installed, tried = version(package), TRIED[package]
    new = untried(package, installed) == "newer"
    return DependencyError(
        f"qosora works with {package} <{tried.below} (tried: {', '.join(tried.versions)}); {package} {installed} is "
        f"installed and {what}: pip install '{package}{f'<{tried.below}' if new else f'=={tried.versions[-1]}'}'"
    )


def _numbers(text: str) -> list[int]:
    """Return a version's numbers: of 2.13.0+cpu, and of 2.15.0.dev1, those of the release."""
    return [int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", text)[0])][:3]  # type: ignore[index]
