"""What several tests of layers look at."""

from __future__ import annotations

from typing import Any

import pytest

from qosora.layers import ops


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    names: list[str] = []
    launch = ops._launch

    def recorded(kernel: str, *args: Any, **kwargs: Any) -> None:
        names.append(kernel)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(ops, "_launch", recorded)
    return names
