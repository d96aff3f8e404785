"""One run of an export, of either kind: base and adapters are opened and checked, then a folder of units is written.

What the units are, and what else is in the folder, is `merged`'s and `lora`'s own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qosora import __version__
from qosora.checkpoints import Unit, local_folder, read_manifest, refuse_input_as_output, stream
from qosora.errors import CheckpointError
from qosora.export.adapters import AdapterChoice, weighted
from qosora.export.original import Original, open_original
from qosora.export.stored import AdaptedBase
from qosora.export.verify import Reference, Verification
from qosora.places import published_name

__all__ = ["Export", "Reports"]

#: Of the units of an export, by name.
Reports = Mapping[str, dict[str, Any]]


class Export:
    """A base and adapters, open to be exported. Use as a context manager.

    Args:
        base: Folder or hub id of a qosora base.
        output: Folder to make.
        adapter: Folder or hub id of an adapter, or several with their weights, or none.
        trust_remote_code: Whether to run model code that the base brings.

    Attributes:
        adapted: The base with the adapters.
        original: The model that the base was made of, once `open_original` has opened it.

    Raises:
        CheckpointError: If one of them cannot be used, or they do not fit.
        ConfigError: If a weight of an adapter makes no sense.
        FingerprintError: If an adapter was trained on another base.
    """

    def __init__(
        self, base: str | Path, output: str | Path, adapter: AdapterChoice | None, *, trust_remote_code: bool
    ) -> None:
        self._start = time.perf_counter()
        self._base, self._output, self._trust_remote_code = base, output, trust_remote_code
        adapters = weighted(adapter)
        try:
            folder = local_folder(base, trust_remote_code=trust_remote_code)
        except CheckpointError as error:
            hint = (
                f" (the base of the adapter {adapters[0][0]}; if it has moved, give its new place)" if adapters else ""
            )
            raise CheckpointError(f"{error}{hint}") from error
        refuse_input_as_output(output, folder, *(adapter_folder for adapter_folder, _ in adapters))
        self._stack = ExitStack()
        self.adapted = self._stack.enter_context(AdaptedBase(folder, adapters, trust_remote_code=trust_remote_code))
        self.original: Original | None = None

    def __enter__(self) -> Export:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def open_original(self, original: str | Path | None) -> Original:
        """Open the model that the base was made of, by default where its manifest says, for the rest of the run.

        Raises:
            CheckpointError: If it is not that, or would be replaced.
            ConfigError: If it is not given and not known.
        """
        opened = open_original(original, self.adapted, trust_remote_code=self._trust_remote_code)
        self.original = self._stack.enter_context(opened)
        refuse_input_as_output(self._output, Path(self.original.name))
        return self.original

    @property
    def reference(self) -> Reference:
        """The adapted model that the export stands for: with the original, where that is open."""
        return Reference(self.adapted, self.original, self._trust_remote_code)

    def write(
        self,
        units: Sequence[Unit],
        finish: Callable[[Path], None],
        check: Callable[[Path, Reports], Verification] | None,
        *,
        original: str | None,
        dtype: torch.dtype,
        options: Mapping[str, Any],
        **how: Any,
    ) -> tuple[Reports, dict[str, Any]]:
        """Write the export, which takes its place when it is whole and has passed the check.

        Args:
            units: What it holds.
            finish: Writes the other files into a folder.
            check: Compares the folder with `reference`, given the units' reports, or None.
            original: The model that it is for or is made with, as the manifest names it.
            dtype: Of its weights.
            options: What else determines its tensors: plain data.
            **how: Handed to `stream`.

        Returns:
            The units' reports, and the fields that the reports of both kinds of export have.

        Raises:
            CheckpointError: If it cannot be written, a value does not fit into its dtype, or the check fails.
            ConfigError: If an earlier run that did not end had other options.
        """
        job = {
            "fingerprint": self.adapted.fingerprint,
            "weights": self.adapted.weights,
            "dtype": str(dtype),
            "qosora": __version__,
            **options,
        }
        made_of = {"base": str(self._base), "adapters": self.adapted.folders, "original": original}

        def finished(folder: Path, _: Reports) -> dict[str, Any]:
            finish(folder)
            names = {"base": published_name(self._base), "original": original and published_name(original)}
            adapters = {published_name(place): weight for place, weight in self.adapted.folders.items()}
            return {**names, "adapters": adapters, "made_with": job}

        def checked(folder: Path, reports: Reports) -> dict[str, Any]:
            return {} if check is None else {"verification": asdict(check(folder, reports))}

        reports = stream(self._output, units, finished, job=job, check=checked, **how)
        found = read_manifest(Path(self._output)).get("verification")
        return reports, {
            **made_of,
            "output": str(self._output),
            "fingerprint": self.adapted.fingerprint,
            "dtype": str(dtype).removeprefix("torch."),
            "total_bytes": sum(spec.nbytes for unit in units for spec in unit.specs.values()),
            "wall_seconds": time.perf_counter() - self._start,
            "verification": Verification(**found) if found else None,
        }
