"""Errors that qosora raises on purpose.

    QosoraError(Exception)
    ├── ConfigError(ValueError)       a configuration that cannot work; all problems in one message
    ├── DataError(ValueError)         training or evaluation data that cannot be used
    ├── CheckpointError(ValueError)   a model folder, shard or tensor that is missing, damaged or unsuitable
    ├── FingerprintError(ValueError)  an adapter and a base that do not belong together
    ├── DependencyError               another package or program, missing or of a version that does not work
    └── EndedElsewhere                another process of the same run failed, and says why

Every message says what must hold, what was got and what to do, and names the module, tensor, file, line or key.
The command line prints the message with its class's code and exits with 1 (`ConfigError`: 2); a traceback is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "CheckpointError", "ConfigError", "DataError", "DependencyError", "EndedElsewhere", "FingerprintError",
    "QosoraError", "first_line", "near_miss",
]  # fmt: skip


class QosoraError(Exception):
    """Base class of all errors that qosora raises on purpose.

    Attributes:
        code: Of its class, for good; docs/errors.md has causes and cures.
    """

    code = "Q-RUN"


class ConfigError(QosoraError, ValueError):
    """A configuration that cannot work.

    Args:
        problems: One sentence per problem; all problems of a configuration are reported together.
    """

    code = "Q-CONFIG"

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = self.problems
        super().__init__(lines[0] if len(lines) == 1 else f"{len(lines)} problems:\n- " + "\n- ".join(lines))


class DataError(QosoraError, ValueError):
    """Training or evaluation data that cannot be used."""

    code = "Q-DATA"


class CheckpointError(QosoraError, ValueError):
    """A model folder, shard or tensor that is missing, damaged or unsuitable."""

    code = "Q-CHECKPOINT"


class FingerprintError(QosoraError, ValueError):
    """An adapter and a base that do not belong together."""

    code = "Q-FINGERPRINT"


class DependencyError(QosoraError):
    """Another package or program is missing, or of a version that does not work; the message says which do."""

    code = "Q-DEPENDENCY"


class EndedElsewhere(QosoraError):
    """Another process of the same run failed, and says why; the command line prints nothing of this one."""


def first_line(error: BaseException) -> str:
    """Return what another library's error says first, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def near_miss(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for a name that is not among the known ones, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
