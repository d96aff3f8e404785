"""Doors of packages: names that load what they need on first use (PEP 562), so that `qosora --help` loads no torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["door"]


def door(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package.

    Args:
        package: Its `__name__`.
        modules: For each module below it, the names in it that the package has, too. None may be called as a module
            beside it: which of the two the package has would depend on what was imported before.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def getattribute(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    def directory() -> list[str]:
        return sorted([*vars(sys.modules[package]), *module_of])

    return getattribute, directory
