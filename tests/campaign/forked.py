"""Commands in children that are forked from a process with everything loaded: each takes a fraction of a second."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from qosora.cli import main as qosora

__all__ = ["Child", "start", "warm"]

#: Seconds after which a command hangs.
PATIENCE = 150


@dataclass(frozen=True)
class Child:
    """A command that runs.

    Args:
        pid: Of its process.
        place: The folder it runs in, with what it writes in `.out` and `.err`.
        name: What stands for "" in these names.
    """

    pid: int
    place: Path
    name: str

    def kill(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> tuple[int | None, str, str]:
        """Wait for it; return its status (negative: of the signal it died of; None: it hung), and what it wrote."""
        deadline, left, code = time.monotonic() + PATIENCE, 0, 0
        while not left:
            left, code = os.waitpid(self.pid, os.WNOHANG)
            if not left and time.monotonic() > deadline:
                self.kill(signal.SIGUSR1)
                time.sleep(1)
                self.kill(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return None, "", self._text("err")
            if not left:
                time.sleep(0.002)
        return os.waitstatus_to_exitcode(code), self._text("out"), self._text("err")

    def _text(self, kind: str) -> str:
        path = self.place / f".{kind}{self.name}"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def start(argv: list[str], place: Path, before: Callable[[], object] | None = None, name: str = "") -> Child:
    """Start a command.

    Args:
        argv: Of the command.
        place: The folder to run it in.
        before: Called in the child ahead of it.
        name: Tells children in one place from each other.
    """
    child = os.fork()
    if child:
        return Child(child, place, name)
    status = 130  # of Ctrl-C before the command begins
    try:
        os.chdir(place)
        os.environ["XDG_CACHE_HOME"] = str(place / ".cache")
        out, err = (os.open(f".{kind}{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for kind in ("out", "err"))
        os.dup2(out, 1)
        os.dup2(err, 2)
        tqdm.set_lock(threading.RLock())  # its own is shared with all children, and one that is killed may hold it
        faulthandler.register(signal.SIGUSR1)  # so that one that hangs shows where
        # Streams of their own: those of the parent may be captured.
        with os.fdopen(1, "w", closefd=False) as sys.stdout, os.fdopen(2, "w", closefd=False) as sys.stderr:
            try:
                if before is not None:
                    before()
                status = qosora(argv)
            except SystemExit as stopped:
                status = stopped.code if isinstance(stopped.code, int) else 1
            except KeyboardInterrupt:  # after the command's end
                status = 130
            except BaseException as error:
                print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
                status = 1
    finally:
        os._exit(status)


def warm(intact: Path, commands: Iterable[list[str]]) -> None:
    """Load here what every child would load, by running each command in a copy of a folder."""
    tqdm.monitor_interval = 0  # a thread whose lock a child would find taken for ever
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        place = Path(folder) / "place"
        shutil.copytree(intact, place)
        before = os.getcwd()
        os.chdir(place)
        try:
            for argv in {" ".join(argv): argv for argv in commands}.values():
                assert qosora(argv) == 0, argv
                shutil.rmtree(place / "out", ignore_errors=True)
        finally:
            os.chdir(before)
