"""Runs of `qosora/export/outsider.py` from one process that has loaded what it needs, which takes seconds each time.

That process is begun as `verify` begins one, with `python -I`, and imports nothing of qosora; each run is a fork of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["Outsiders"]

_READY = """
import json, os, runpy, sys
import torch, transformers.models.auto.modeling_auto, transformers.modeling_utils, peft, safetensors.torch

def run(argv, env, outputs):
    for number, name in enumerate(outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return int(error.code is not None and error.code != 0)
    return 0

for line in sys.stdin:
    child = os.fork()
    if not child:
        code = 1
        try:
            code = run(*json.loads(line))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Outsiders:
    """Takes the place of `subprocess.run`, which runs everything else."""

    def __init__(self) -> None:
        self.plain = subprocess.run
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, command: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a command."""
        begins = [sys.executable, "-I"]
        if not (isinstance(command, list) and command[:2] == begins and Path(command[2]).name == "outsider.py"):
            return self.plain(command, **options)
        if self._process is None:
            env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
            pipe = subprocess.PIPE
            self._process = subprocess.Popen([*begins, "-c", _READY], env=env, text=True, stdin=pipe, stdout=pipe)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            job = json.dumps([command[2:], options["env"], [out.name, err.name]])
            self._process.stdin.write(f"{job}\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(command, code, out.read(), err.read())

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
