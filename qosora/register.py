"""Every entry of qosora in the tables of transformers and PEFT, made without importing them.

`import qosora` followed by `AutoModelForCausalLM.from_pretrained(BASE)` must find the "qosora" quantizer, yet importing
qosora must not cost the seconds that transformers takes. So the registries get lazy entries, now where they are
imported already, and else by an import hook when they are. An entry loads the real class on first use.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from qosora.compat.hooks import TABLES
from qosora.compat.names import member

__all__ = ["install", "loaded"]

#: Table, key, entry: what the adapter's tensors' names begin with, or a class and its module.
_ENTRIES: tuple[tuple[str, str, str | tuple[str, str]], ...] = (
    (TABLES["configs"], "qosora", ("qosora.config.base", "QosoraConfig")),
    (TABLES["quantizers"], "qosora", ("qosora.base.quantizer", "QosoraHfQuantizer")),
    (TABLES["adapter configs"], "OSORA", ("qosora.config.adapter", "OsoraConfig")),
    (TABLES["tuners"], "OSORA", ("qosora.adapter", "OsoraModel")),
    (TABLES["prefixes"], "OSORA", "osora_"),
)
_MODULES = frozenset(table.rpartition(".")[0] for table, _, _ in _ENTRIES)


class _Lazy:
    """Stands for a class until it is called or asked for an attribute."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _load(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._load(), attribute)


def _fill(module: ModuleType) -> None:
    for table, key, entry in _ENTRIES:
        if table.rpartition(".")[0] == module.__name__:
            member(module, table).setdefault(key, entry if isinstance(entry, str) else _Lazy(*entry))


class _FillingLoader(Loader):
    """Executes a module with its own loader, then fills its registries."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:  # for inspect and pkgutil, which ask the loader for more
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _fill(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _MODULES else None
        if spec is not None and spec.loader is not None:
            spec.loader = _FillingLoader(spec.loader)
        return spec


def loaded(source: str) -> None:
    """Put a module's classes in the place of what stands for them; to be called at its end."""
    for table, key, entry in _ENTRIES:
        module = sys.modules.get(table.rpartition(".")[0])
        if module is not None and entry[0] == source and isinstance(entry, tuple):
            member(module, table)[key] = getattr(sys.modules[source], entry[1])


def install() -> None:
    """Fill the registries that are imported, and wait for the others."""
    sys.meta_path.insert(0, _Finder())
    for name in _MODULES:
        if name in sys.modules:
            _fill(sys.modules[name])
