"""The folder of a training run: what it holds, whether a run may use it, and what is written when.

    train_config.yaml     from the start: the run's configuration, by which resuming knows it again
    made_of.json          from the start: hashes of the examples, and how many a step takes, which resuming compares
    metrics.jsonl         a line for each logged step and each evaluation, as it happens
    checkpoint-N/         vectors, optimizer, schedule and random states after step N
    adapter_model.safetensors, tokenizer files, result.json, README.md, qosora_manifest.json (hashes of these),
    adapter_config.json     at the end, in one go

So a folder with adapter_config.json holds a finished adapter, and one without it does not load. While a process trains
it has locked FOLDER.lock beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from qosora.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_STEM,
    MANIFEST_NAME,
    hashed,
    locked,
    read_json,
    write_atomically,
    write_json,
)
from qosora.errors import ConfigError
from qosora.formats import MANIFEST, RUN, require_known
from qosora.training.config import METRICS, TrainConfig
from qosora.training.config import RUN_CONFIG as CONFIG

__all__ = ["MetricsLog", "RunFolder"]

RESULT = "result.json"
MADE_OF = "made_of.json"
#: A key in there: batch_size times gradient_accumulation times the processes.
STEP_EXAMPLES = "examples_per_step"
#: Files without which a checkpoint cannot be resumed. Trainer writes the last one last.
WHOLE = (f"{ADAPTER_STEM}.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


class MetricsLog:
    """A file of JSON lines, each with its "step"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: dict[str, Any]) -> None:
        """Write a line at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the lines; one that was cut off by a crash is left out."""
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the lines of evaluations."""
        return [line for line in self.read() if "eval_loss" in line]

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be done again."""
        kept = [json.dumps(line) + "\n" for line in self.read() if line["step"] <= step]
        write_atomically(self.path, "".join(kept))


class RunFolder:
    """`output_dir` of a run. Making one changes nothing on disk.

    Args:
        config: Of the run that wants the folder.

    Raises:
        ConfigError: If the run must not use the folder.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.path = config, Path(config.output_dir).expanduser().resolve()
        self.metrics = MetricsLog(self.path / METRICS)
        self.existed = self.path.exists()
        self.earlier: TrainConfig | None = None  # of the run to go on with
        if self.existed and (not self.path.is_dir() or any(self.path.iterdir())):
            self._check_earlier()

    def _check_earlier(self) -> None:
        if not (self.path / CONFIG).is_file():
            raise ConfigError(f"output_dir {self.path} is not empty and holds no qosora run; name another folder")
        if self.config.overwrite:
            self._check_removable()
            return
        if not self._has_steps():  # nothing would be lost, and nothing can be gone on with
            return
        if not self.config.resume:
            raise ConfigError(
                f"output_dir {self.path} holds an earlier run; name another folder, or go on with it (resume), or "
                "replace it (overwrite)"
            )
        self.earlier = TrainConfig.load(self.path / CONFIG)
        changed = self.config.changed_since(self.earlier)
        if changed:
            raise ConfigError(
                f"the run in {self.path} cannot be resumed with another {', '.join(changed)}; give the values in its "
                f"{CONFIG}, or start a new run in another folder"
            )

    def _has_steps(self) -> bool:
        """Say whether an earlier run trained a step, so that there is something to keep."""
        kept = (ADAPTER_CONFIG, RESULT)
        trained = any("loss" in line for line in self.metrics.read())
        return trained or any((self.path / name).exists() for name in kept) or any(self.path.glob("checkpoint-*"))

    def _check_removable(self) -> None:
        """Refuse to remove, with an earlier run, what this one reads or where the user is."""
        config = self.config
        needed = {name: Path(name).expanduser() for name in (config.model, config.data, config.eval_data) if name}
        for name, path in (needed | {"the current folder": Path.cwd()}).items():
            if path.resolve().is_relative_to(self.path):
                raise ConfigError(
                    f"overwrite would remove all of {self.path}, and {name} lies in there; name another output_dir"
                )

    @property
    def resuming(self) -> bool:
        """Whether there is an earlier run to go on with."""
        return self.config.resume and (self.path / CONFIG).is_file()

    def finished(self) -> dict[str, Any] | None:
        """Return the result of the run to resume, if it is complete already."""
        if not (self.resuming and (self.path / ADAPTER_CONFIG).is_file() and (self.path / RESULT).is_file()):
            return None
        result: dict[str, Any] = json.loads((self.path / RESULT).read_text(encoding="utf-8"))
        return result

    def checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint of the run to resume."""
        return next(filter(_is_whole, self._checkpoints()), None) if self.resuming else None

    def _checkpoints(self) -> list[Path]:
        """Return the folders of checkpoints, the newest first."""
        steps = {p: int(p.name.removeprefix("checkpoint-")) for p in self.path.glob("checkpoint-[0-9]*") if p.is_dir()}
        return sorted(steps, key=lambda p: -steps[p])

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from training in the folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return locked(self.path)

    def check_made_of(self, made_of: dict[str, Any]) -> None:
        """Compare what a run is made of with what the run to resume was.

        Raises:
            ConfigError: If it is something else.
            CheckpointError: If a newer version of qosora began it.
        """
        file = self.path / MADE_OF
        earlier = read_json(file) if self.resuming and file.is_file() else {}
        require_known(file, earlier.get("format_version"), RUN)
        if self.earlier is not None:  # one that says nothing of it was in one process
            before = earlier.get(STEP_EXAMPLES, self.earlier.batch_size * self.earlier.gradient_accumulation)
            if before != made_of[STEP_EXAMPLES]:
                raise ConfigError(
                    f"the run in {self.path} takes {before} examples in a step, and this one would take "
                    f"{made_of[STEP_EXAMPLES]}: batch_size times gradient_accumulation times the processes must be the "
                    "same to go on with it"
                )
        if changed := [what for what in made_of if what in earlier and made_of[what] != earlier[what]]:
            raise ConfigError(
                f"the run in {self.path} cannot be resumed: {' and '.join(changed)} changed since it began, so it "
                "would not be the same run. Put back what was there, or start a new run in another folder"
            )

    def begin(self, step: int, made_of: dict[str, Any]) -> None:
        """Make the folder ready for a run that starts after `step`: the first change on disk."""
        if self.existed and not self.resuming:
            for item in self.path.iterdir():
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        replace(self.config, resume=False, overwrite=False).save(self.path / CONFIG)
        write_json(self.path / MADE_OF, {**made_of, "format_version": RUN})
        self.metrics.forget_after(step)
        self._finish_rotation()

    def _finish_rotation(self) -> None:
        """Remove what was being written, or was to be removed, when the run was interrupted."""
        whole = list(filter(_is_whole, self._checkpoints()))
        state = json.loads((whole[0] / WHOLE[-1]).read_text(encoding="utf-8")) if whole else {}
        kept = [
            checkpoint
            for number, checkpoint in enumerate(whole, 1)
            if number <= (self.config.save_total_limit or number)
            or checkpoint.name == Path(state.get("best_model_checkpoint") or "").name
        ]
        for checkpoint in self._checkpoints():
            if checkpoint not in kept:
                shutil.rmtree(checkpoint)

    def discard(self) -> None:
        """Remove what a run that did not get to its first step has left, and the folder, if it was not there before."""
        if not self.path.is_dir() or self._has_steps():
            return
        for name in (CONFIG, MADE_OF, METRICS):
            (self.path / name).unlink(missing_ok=True)
        if not self.existed and not any(self.path.iterdir()):
            self.path.rmdir()

    def finish(self, result: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Write what makes the folder an adapter, so that it is one only when it is whole.

        Args:
            result: What `finished` gives back.
            write: Writes the adapter and tokenizer into an empty folder.
        """
        temporary = self.path.with_name(f".{self.path.name}.final")  # an adapter names its base from where it is
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        (temporary / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        written = [file.name for file in temporary.iterdir() if file.name != RESULT]
        made = {"format_version": MANIFEST, "files": hashed(temporary, written)}
        (temporary / MANIFEST_NAME).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        for file in sorted(temporary.iterdir(), key=lambda p: p.name == ADAPTER_CONFIG):
            target = self.path / file.name
            file.chmod((self.path / CONFIG).stat().st_mode)  # safetensors makes files for the owner alone
            if target.is_dir():
                shutil.rmtree(target)
            file.replace(target)
        temporary.rmdir()


def _is_whole(checkpoint: Path) -> bool:
    """Say whether writing a checkpoint came to its end."""
    if not all((checkpoint / name).is_file() for name in WHOLE):
        return False
    try:
        json.loads((checkpoint / WHOLE[-1]).read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False
    return True
