"""Our classes override what there is, and can be called as it is; the tables have our entries."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from qosora.compat.hooks import HOOKS, TABLES
from qosora.compat.names import check

OVERRIDES = [(ours, entry) for ours, entries in HOOKS.items() for entry in entries if ": " not in entry]


def ours_of(dotted: str) -> type:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("ours", "entry"), OVERRIDES)
def test_an_override_takes_what_it_is_called_with(ours: str, entry: str):
    name, _, parameters = entry.removesuffix(")").partition("(")
    cls, method = ours_of(ours), name.rpartition(".")[2]
    theirs = check(name)
    own = inspect.getattr_static(cls, method)
    if isinstance(own, property):
        return
    signature = inspect.signature(getattr(cls, method))
    wanted = [p for p in parameters.split(", ") if p]
    signature.bind(object(), *wanted)  # by position
    required = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    assert len(required) <= len(inspect.signature(theirs).parameters)


@pytest.mark.parametrize(
    ("ours", "entry"), [pair for pair in OVERRIDES if not re.search(r"set_adapter|_replace_module", pair[1])]
)
def test_it_is_overridden(ours: str, entry: str):
    method = entry.partition("(")[0].rpartition(".")[2]
    assert method in vars(ours_of(ours))


@pytest.mark.parametrize("table", TABLES.values())
def test_tables_have_our_entry(table: str):
    assert {"qosora", "OSORA"} & set(check(table))
