"""Entries: what they say is checked, at first use, and the line that says what is missing says what works."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest

from qosora.compat import names
from qosora.errors import DependencyError


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A dependency called `hasty`, in version 2.0."""
    module: Any = ModuleType("hasty")
    module.double = lambda x, times=2, **_: "twice" if module.loud else x * times
    module.loud = False
    monkeypatch.setitem(sys.modules, "hasty", module)
    monkeypatch.setitem(names.TRIED, "hasty", names.Tried(("1.0.0", "1.1.2"), "1.2"))
    monkeypatch.setattr(names, "version", lambda name: {"hasty": "2.0.0+cu1"}[name])
    monkeypatch.setattr(names, "ENTRIES", [])
    return module


@pytest.mark.parametrize(
    "entry", ["hasty.double", "hasty.double(x)", "hasty.double(x, times)", "hasty.double(times)", "hasty.double: loud",
              "hasty.double(x): twice"]
)  # fmt: skip
def test_what_holds(package: Any, entry: str):
    assert names.check(entry) is package.double


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("hasty.triple", "has no hasty.triple"),
        ("hasty.double.deep", "has no hasty.double.deep"),
        ("hasty.double(times, x)", "its hasty.double does not take (times, x)"),
        ("hasty.double(y)", "its hasty.double does not take (y)"),
        ("hasty.double: thrice", "its hasty.double does not know 'thrice'"),
    ],
)
def test_what_does_not(package: Any, entry: str, what: str):
    with pytest.raises(DependencyError) as caught:
        names.check(entry)
    assert str(caught.value) == (
        f"qosora works with hasty <1.2 (tried: 1.0.0, 1.1.2); hasty 2.0.0+cu1 is installed and {what}: "
        "pip install 'hasty<1.2'"
    )


@pytest.mark.parametrize("installed", ["1.1.3", "1.2.0.dev1", "1.10"])
def test_a_release_within_the_bounds_is_exchanged_for_one_that_was_tried(
    package: Any, monkeypatch: pytest.MonkeyPatch, installed: str
):
    monkeypatch.setattr(names, "version", lambda name: installed)
    cure = "hasty==1.1.2" if installed == "1.1.3" else "hasty<1.2"
    with pytest.raises(DependencyError, match=rf"pip install '{cure}'$"):
        names.check("hasty.triple")


def test_a_function_is_checked_when_it_is_called_first(package: Any):
    @names.uses("hasty.double", "hasty.later")
    def four() -> int:
        return package.double(2)

    assert names.ENTRIES == ["hasty.double", "hasty.later"]
    for _ in range(2):  # not taken for checked after the first
        with pytest.raises(DependencyError, match=r"hasty\.later"):
            four()
    package.later = None
    assert four() == 4
    del package.later
    assert four() == 4


def test_objects_under_names_of_our_own(package: Any):
    get = names.found("here", {"twice": "hasty.double(x)", "gone": "hasty.triple"})
    assert get("twice") is package.double
    with pytest.raises(DependencyError, match=r"hasty\.triple"):
        get("gone")
    with pytest.raises(AttributeError, match="module 'here' has no attribute 'other'"):
        get("other")


def test_a_module_that_is_being_imported(package: Any):
    assert names.member(package, "hasty.loud") is False
    with pytest.raises(DependencyError, match=r"hasty\.quiet"):
        names.member(package, "hasty.quiet")


def test_documentation_is_not_what_code_knows(package: Any):
    def described() -> None:
        """Mention a thing."""

    package.described = described
    with pytest.raises(DependencyError):
        names.check("hasty.described: a thing")


def test_classes(package: Any):
    class Thing:
        number: int
        kept = 1

        def __init__(self) -> None:
            self.made = json

        @property
        def read(self) -> int:
            return self.inside  # type: ignore[attr-defined]

        @classmethod
        def make(cls) -> str:
            return "a message"

    package.Thing = Thing
    for text in ("number", "kept", "made", "read", "inside", "a message"):
        names.check(f"hasty.Thing: {text}")
    with pytest.raises(DependencyError):
        names.check("hasty.Thing: other")
