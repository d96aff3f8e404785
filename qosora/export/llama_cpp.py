"""llama.cpp's own programs, each in a process of its own: its converter, its quantizer, its server.

They are looked for in a folder that the user names, a checkout or what a release unpacks to, then on the path. The
server also comes with the package xllamacpp, which speaks the same protocol.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

from qosora.errors import CheckpointError, ConfigError, DependencyError
from qosora.export import gguf_converter

__all__ = ["CONVERTED", "LlamaCpp", "Server", "find_llama_cpp"]

#: What the converter writes by itself, by the names that it has for them; everything else is the quantizer's.
CONVERTED = ("f32", "f16", "bf16", "q8_0")
_CONVERTERS = ("convert_hf_to_gguf.py", "convert_hf_to_gguf", "convert-hf-to-gguf")
#: Where programs are in a checkout that was built, and in a release.
_FOLDERS = ("", "build/bin", "bin", "build/bin/Release")
#: Seconds that the server may take to load a model, and to answer.
_LOAD, _ANSWER = 600.0, 300.0
#: xllamacpp's server, in a process that prints where it listens.
_SERVER = """\
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers, params.port = sys.argv[1], 512, 0, int(sys.argv[2])
server = xllamacpp.Server(params)
sys.stdin.read()
"""


@dataclass(frozen=True)
class LlamaCpp:
    """Where llama.cpp's programs are.

    Attributes:
        converter: The command that makes GGUF files of Hugging Face checkpoints.
        quantizer: The program that quantizes GGUF files, if it is there.
        server: The command that serves a GGUF file, to be followed by the file and a port; if it is there.
    """

    converter: tuple[str, ...]
    quantizer: str | None
    server: tuple[str, ...] | None

    def convert(self, checkpoint: Path, file: Path, kind: str) -> None:
        """Write a checkpoint as a GGUF file.

        Args:
            checkpoint: Its folder.
            file: To make.
            kind: One of `CONVERTED`.

        Raises:
            CheckpointError: If the converter does not know the model or its tokenizer, or fails.
            DependencyError: If the converter lacks a package.
        """
        why = _run([*self.converter, str(checkpoint), "--outfile", str(file), "--outtype", kind], file)
        if why is None:
            return
        if why.startswith("ModuleNotFoundError"):
            raise DependencyError(
                f"llama.cpp's converter ({self.converter[-1]}) needs a package that is not here: {why}; install what "
                "its requirements file names (gguf, sentencepiece, protobuf)"
            )
        raise CheckpointError(f"llama.cpp's converter ({self.converter[-1]}) cannot write this model as GGUF: {why}")

    def quantize(self, source: Path, file: Path, kind: str) -> None:
        """Write a GGUF file of 16 or 32 bits in fewer.

        Raises:
            CheckpointError: If the quantizer fails; it says why.
        """
        assert self.quantizer is not None
        if (why := _run([self.quantizer, str(source), str(file), kind.upper()], file)) is not None:
            raise CheckpointError(f"{self.quantizer} cannot quantize to {kind}: {why}")


def find_llama_cpp(folder: str | os.PathLike[str] | None, *, quantizer: bool, server: bool) -> LlamaCpp:
    """Find llama.cpp's programs.

    Args:
        folder: That is searched first; the path is searched, too.
        quantizer: Whether the quantizer is needed.
        server: Whether the server is needed.

    Raises:
        ConfigError: If the folder is none.
        DependencyError: If one that is needed is not there.
    """
    place = None if folder is None else Path(folder).expanduser()
    if place is not None and not place.is_dir():
        raise ConfigError(f"llama_cpp must be a folder of llama.cpp (a checkout or a release), got {folder}")
    converter = next(filter(None, (_program(name, place) for name in _CONVERTERS)), None)
    missing = [] if converter else ["its converter, convert_hf_to_gguf.py"]
    found = _program("llama-quantize", place)
    if quantizer and not found:
        missing.append("llama-quantize")
    serve: tuple[str, ...] | None = None
    if program := _program("llama-server", place):
        serve = (program, "--ctx-size", "512", "--n-gpu-layers", "0", "--host", "127.0.0.1", "--model")
    elif find_spec("xllamacpp") is not None:
        serve = (sys.executable, "-c", _SERVER)
    if server and not serve:
        missing.append("llama-server (or the package xllamacpp)")
    if missing or not converter:
        where = "on the path" if place is None else f"in {place} or on the path"
        raise DependencyError(
            f"GGUF needs llama.cpp, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not {where}; "
            "name a folder with llama.cpp (--llama-cpp DIR): its sources have the converter, a build or a release the "
            "programs"
        )
    beside = Path(converter).with_name("conversion")
    own = converter.endswith(".py") and beside.is_dir()
    ours = [gguf_converter.__file__] if own else []
    python = [sys.executable, *ours] if converter.endswith(".py") else []
    return LlamaCpp((*python, converter), found, serve)


def _program(name: str, folder: Path | None) -> str | None:
    """Return a program's file, in a folder or on the path, if it is there."""
    names = (name, f"{name}.exe")
    places = [folder / inner / file for inner in _FOLDERS for file in names] if folder is not None else []
    return next((str(place) for place in places if place.is_file()), None) or shutil.which(name)


def _run(command: Sequence[str], makes: Path) -> str | None:
    """Run a program that makes a file; return why it did not, or None where it did."""
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode == 0 and makes.is_file():
        return None
    return _why(f"{done.stdout}\n{done.stderr}", done.returncode)


def _why(said: str, status: int | None) -> str:
    """Return why a program failed: the signal that ended it, its last line of an error, or its last line."""
    if status is not None and status < 0:
        hint = "; this build is for another processor" if -status == signal.SIGILL else ""
        return f"it ended by {signal.Signals(-status).name} ({signal.strsignal(-status)}){hint}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    found = [i for i, line in enumerate(lines) if "error" in line.lower()] or list(range(len(lines)))
    if not found:
        return f"it ended with status {status}"
    last = lines[found[-1]]
    return f"{last} ({lines[found[-1] - 1]})" if last.isidentifier() and found[-1] else last  # an error without a text


class Server:
    """llama.cpp's server with a model, for as long as the context lasts.

    Args:
        llama_cpp: Has its command.
        file: GGUF file.

    Raises:
        CheckpointError: On entering, if it does not load the file.
    """

    def __init__(self, llama_cpp: LlamaCpp, file: Path) -> None:
        assert llama_cpp.server is not None
        self._command, self._file = llama_cpp.server, file
        self._whole: int | None = None

    def __enter__(self) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        binary = "--model" in self._command
        self._address = f"http://127.0.0.1:{port}"
        self._log = TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            [*self._command, str(self._file), *(["--port"] if binary else []), str(port)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
        )
        end = time.monotonic() + _LOAD
        while time.monotonic() < end and self._process.poll() is None:
            # It does not listen yet, or answers 503 while it loads
            with suppress(OSError), urllib.request.urlopen(f"{self._address}/health", timeout=5) as answer:
                if answer.status == 200:
                    return self
            time.sleep(0.05)
        why = self._said()
        self.__exit__(None, None, None)
        raise CheckpointError(f"llama.cpp does not load {self._file.name}: {why}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _said(self) -> str:
        self._log.seek(0)
        return _why(self._log.read(), self._process.poll())

    def tokens(self, text: str) -> list[int]:
        """Return a text's tokens, with those that the model begins with."""
        return list(self._ask("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])

    def continued(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return what greedily follows some tokens: `count` tokens, or as many as come before one that ends a text."""
        request = {"prompt": list(tokens), "n_predict": count, "temperature": 0.0, "return_tokens": True}
        return list(self._ask("completion", request)["tokens"])

    def likeliest(self, tokens: Sequence[int], count: int) -> dict[int, float]:
        """Return the likeliest tokens to follow some, by id, with the logarithms of their probabilities, in order.

        The server tells them with the token that it takes, if that is a whole piece of text: so it is made to take one.
        What it tells are the model's own probabilities all the same.
        """
        if self._whole is None:
            self._whole = self.tokens("a")[-1]
        request = {
            "prompt": list(tokens),
            "n_predict": 1,
            "n_probs": count,
            "temperature": 0.0,
            "logit_bias": [[self._whole, 1e4]],
        }
        (place,) = self._ask("completion", request)["completion_probabilities"]
        return {one["id"]: one["logprob"] for one in place["top_logprobs"]}

    def _ask(self, what: str, request: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(request).encode()
        asked = urllib.request.Request(f"{self._address}/{what}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=_ANSWER) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            raise CheckpointError(
                f"llama.cpp's server refuses {what}: {error.read().decode(errors='replace')}"
            ) from error
        except OSError as error:
            raise CheckpointError(f"llama.cpp's server ended: {self._said()}") from error
