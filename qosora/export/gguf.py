"""A base and adapters as a GGUF file, for llama.cpp, Ollama and what is built on them.

    merged checkpoint  ->  llama.cpp's converter  ->  its quantizer, where there is one to be  ->  OUT/NAME-Q8_0.gguf

The checkpoint is in OUT.partial, as long as that is there. On request the file is compared with it: the tokens of a few
texts, and the probabilities of what follows, as llama.cpp's own server tells them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qosora import __version__
from qosora.base import load_tokenizer
from qosora.checkpoints import Progress, expanded, read_json, refuse_input_as_output, require_space, stream
from qosora.dtypes import dtype_named
from qosora.errors import CheckpointError, ConfigError
from qosora.export.adapters import AdapterChoice, weighted
from qosora.export.llama_cpp import CONVERTED, LlamaCpp, Server, find_llama_cpp
from qosora.export.merged import ExportReport, export_merged
from qosora.export.modelfile import modelfile
from qosora.export.verify import TEXTS, TOKENS, logits_elsewhere, padded
from qosora.places import published_name

__all__ = ["GGUF_KINDS", "GgufReport", "export_gguf"]

#: Kinds of values, with the bits of each.
GGUF_KINDS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.5, "q5_1": 6.0,
    "q5_0": 5.5, "q4_k_m": 4.9, "q4_k_s": 4.6, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5, "iq4_xs": 4.3, "q3_k_l": 4.2,
    "q3_k_m": 3.9, "q3_k_s": 3.5, "q2_k": 3.2,
}  # fmt: skip
#: Nats by which the logarithms of the probabilities may differ on average, each weighted by its probability; by the
#: bits of a value. A model that answers nonsense is several nats off.
_TOLERANCES = ((16.0, 0.05), (8.0, 0.1), (5.0, 0.5), (0.0, 1.5))
#: Of the places in the texts, every so manieth is looked at; and so many of the likeliest tokens.
_EVERY, _ALTERNATIVES = 4, 20


@dataclass(frozen=True)
class GgufVerification:
    """How far what llama.cpp makes of a file is from the merged model, in float32, at places in a few texts.

    Attributes:
        tokens: Of the texts; they are the same in both.
        places: Where what follows was looked at.
        mean_difference: Of the logarithms of the likeliest tokens' probabilities, weighted by these; in nats.
        tolerance: That it must not exceed.
        equal_top_tokens: Part of the places whose likeliest token is the same.
    """

    tokens: int
    places: int
    mean_difference: float
    tolerance: float
    equal_top_tokens: float


@dataclass(frozen=True)
class GgufReport:
    """What an export as GGUF did.

    Attributes:
        output: The folder written.
        file: Name of the GGUF file in it.
        quant: Kind of its values.
        total_bytes: Of the file.
        modelfile: Whether a Modelfile is there, too.
        template: Whether that has the model's chat template.
        merged: What was converted.
        wall_seconds: Time it took.
        verification: What the comparison with the merged model found, or None where none was asked for.
    """

    output: str
    file: str
    quant: str
    total_bytes: int
    modelfile: bool
    template: bool
    merged: ExportReport
    wall_seconds: float
    verification: GgufVerification | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def export_gguf(
    base: str | Path,
    output: str | Path,
    adapter: AdapterChoice | None = None,
    *,
    quant: str = "q8_0",
    llama_cpp: str | Path | None = None,
    ollama: bool = False,
    onto: str = "dequantized",
    original: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    verify: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> GgufReport:
    """Write a base, with adapters merged into it, as a GGUF file.

    Args:
        base: Folder or hub id of a qosora base.
        output: Folder to make.
        adapter: As `export_merged` takes it.
        quant: Kind of the file's values: "f32", "f16", "bf16" and "q8_0" are written by llama.cpp's converter, others,
            such as "q4_k_m", by its quantizer.
        llama_cpp: Folder of llama.cpp, a checkout or a release; what is not there is looked for on the path.
        ollama: Whether to write an Ollama Modelfile beside the file.
        onto: As `export_merged` takes it, and so `original` and `dtype`, which is that of the merged weights before
            they are converted: by default the base's; float32 for "f32".
        original: See `onto`.
        dtype: See `onto`.
        verify: Whether to compare the merged model with the adapted one, and what llama.cpp makes of the file with the
            merged model; where one differs by more than rounding explains, nothing is left.
        overwrite: Whether what an earlier call wrote into `output` may be replaced.
        restart: Whether to throw away what an unfinished call has left.
        trust_remote_code: Whether to run model code that the base brings.
        progress: Of the merging.

    Raises:
        CheckpointError: If base, adapter, original or output cannot be used, llama.cpp cannot write or load such a
            model, or the verification fails.
        ConfigError: If an option makes no sense.
        DependencyError: If llama.cpp is not there, or one of its programs is not.
        FingerprintError: If the adapter was trained on another base.

    Example:
        >>> export_gguf("llama-2-7b-qosora", "tuned-gguf", "my-adapter", quant="q4_k_m")  # doctest: +SKIP
    """
    start = time.perf_counter()
    if quant not in GGUF_KINDS:
        raise ConfigError(f"quant must be one of {', '.join(GGUF_KINDS)}, got {quant!r}")
    programs = find_llama_cpp(llama_cpp, quantizer=quant not in CONVERTED, server=verify)
    target = Path(expanded(output)).resolve()
    inputs = [Path(expanded(base)), *(folder for folder, _ in weighted(adapter))]
    refuse_input_as_output(target, *filter(Path.is_dir, inputs))
    file = f"{target.name}-{quant.upper()}.gguf"
    done: dict[str, Any] = {}

    def make(folder: Path, _: Any) -> dict[str, Any]:
        plain = folder.with_name("extra") / "merged"
        try:
            merged = done["merged"] = export_merged(
                base,
                plain,
                adapter,
                onto=onto,
                original=original,
                dtype=dtype or ("float32" if quant == "f32" else None),
                verify=verify,
                overwrite=True,  # what a call that was killed has left
                restart=restart,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
            require_space(folder, _bytes_needed(merged, quant))
            _write(programs, plain, folder / file, quant)
            if ollama:
                done["template"] = _write_modelfile(folder, file, plain, trust_remote_code)
            adapters = {published_name(place): weight for place, weight in merged.adapters.items()}
            manifest = {"base": published_name(merged.base), "adapters": adapters, "quant": quant, "gguf": file}
            if verify:
                done["found"] = _verified(programs, folder / file, plain, quant, trust_remote_code)
                manifest["verification"] = asdict(done["found"])
        except Exception:  # and not an interruption, after which the merging goes on
            shutil.rmtree(plain.parent, ignore_errors=True)
            raise
        return manifest

    job = {"gguf": quant, "qosora": __version__}
    stream(target, [], make, job=job, max_shard_bytes=1, stem=None, overwrite=overwrite, restart=restart)
    return GgufReport(
        output=str(output),
        file=file,
        quant=quant,
        total_bytes=(target / file).stat().st_size,
        modelfile=ollama,
        template=done.get("template", False),
        merged=done["merged"],
        wall_seconds=time.perf_counter() - start,
        verification=done.get("found"),
    )


def _write_modelfile(folder: Path, file: str, checkpoint: Path, trust_remote_code: bool) -> bool:
    """Write a Modelfile, and say whether the chat template is in it."""
    settings = checkpoint / "generation_config.json"
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    text = modelfile(file, tokenizer, read_json(settings) if settings.is_file() else {})
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return "\nTEMPLATE " in text


def _bytes_needed(merged: ExportReport, quant: str) -> int:
    """Return what the files take, the one between the converter and the quantizer included."""
    values = merged.total_bytes / dtype_named(merged.dtype).itemsize
    return int(values * (GGUF_KINDS[quant] + (0 if quant in CONVERTED else 16)) / 8)


def _write(programs: LlamaCpp, checkpoint: Path, file: Path, quant: str) -> None:
    if quant in CONVERTED:
        programs.convert(checkpoint, file, quant)
        return
    between = file.with_name(f".{file.name}.16")
    try:
        programs.convert(checkpoint, between, "auto")  # 16 bits, of the kind that the checkpoint has
        programs.quantize(between, file, quant)
    finally:
        between.unlink(missing_ok=True)


def _verified(
    programs: LlamaCpp, file: Path, checkpoint: Path, quant: str, trust_remote_code: bool
) -> GgufVerification:
    """Compare a GGUF file with the checkpoint that it was made of.

    Raises:
        CheckpointError: If llama.cpp does not load it, or makes other tokens of a text or other probabilities of what
            follows.
    """
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    rows = [tokenizer(text)["input_ids"][:TOKENS] for text in TEXTS]
    expected = iter(logits_elsewhere(checkpoint, None, padded(rows), trust_remote_code).log_softmax(-1))
    differences, equal = [], 0
    with Server(programs, file) as server:
        for text, row in zip(TEXTS, rows, strict=True):
            if (got := server.tokens(text)[: len(row)]) != row:
                i = next((i for i, (a, b) in enumerate(zip(got, row, strict=False)) if a != b), min(len(got), len(row)))
                raise CheckpointError(
                    f"llama.cpp makes other tokens of {text!r} than the tokenizer does, from the {i + 1}. on: "
                    f"{got[i : i + 4]}, not {row[i : i + 4]}. Nothing of the export is kept"
                )
            for i, reference in zip(range(len(row)), expected, strict=False):
                if i % _EVERY == 0 or i == len(row) - 1:
                    likely = server.likeliest(row[: i + 1], _ALTERNATIVES)
                    p = reference[torch.tensor(list(likely))]
                    weights = p.softmax(0)  # of these few alone, which have little of the whole where all are alike
                    differences.append(float((weights * (p - torch.tensor(list(likely.values()))).abs()).sum()))
                    equal += int(reference.argmax()) == next(iter(likely))
    found = GgufVerification(
        tokens=sum(map(len, rows)),
        places=len(differences),
        mean_difference=sum(differences) / len(differences),
        tolerance=next(tolerance for bits, tolerance in _TOLERANCES if GGUF_KINDS[quant] >= bits),
        equal_top_tokens=equal / len(differences),
    )
    if not found.mean_difference <= found.tolerance:
        raise CheckpointError(
            f"what llama.cpp makes of {file.name} differs from the merged model by {found.mean_difference:.3g} nats on "
            f"average; {quant} makes at most {found.tolerance:.3g}. Nothing of the export is kept"
        )
    return found
