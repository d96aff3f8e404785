"""Damage every file that a command reads, in thousands of ways, and see that each ends rightly.

    python tests/campaign/corruption.py --count 2000 --seconds 800 --seed 0    # or: make campaign

A damaged file must give the result that the intact one gives, or one line that names it; never a traceback, another
result, or no end. Each command runs in a child process that was forked from one with everything loaded, so that a case
takes a fraction of a second. Prints counts by kind of file and of verdict as JSON, and each fault; exits with 1 if
there is one.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as the command line has it, before transformers is loaded

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from campaign.forked import start, warm
from tiny import make_checkpoint, perturbed, sums, write_jsonl

from qosora.base import load_base, quantize
from qosora.checkpoints import MANIFEST_NAME, hashed, write_json
from qosora.config import QosoraConfig

__all__ = ["Case", "Verdict", "cases", "prepare", "run_case"]

ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 3.5, 10**9, 10**30, "", "x", "\x1b[31m\u202e", [], [[]], {}, {"x": {}}, float("nan"), [1] * 50,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A damaged file and the command that reads it.

    Args:
        kind: What the file is of.
        file: The file, from the folder with all.
        damage: Changes the file, with random numbers.
        argv: The command.
    """

    kind: str
    file: str
    damage: Callable[[Path, random.Random], str]
    argv: list[str]


@dataclass(frozen=True)
class Verdict:
    """How a case ended.

    Args:
        kind: "equal", "one line", or a fault: "traceback", "silent", "hang", "lines", "unnamed" or "control".
        text: What was said.
    """

    kind: str
    text: str

    @property
    def fault(self) -> bool:
        """Whether it must not be so."""
        return self.kind not in ("equal", "one line")


# ---- damage


def _cut(path: Path, drawn: random.Random) -> str:
    data = path.read_bytes()
    end = drawn.randrange(len(data) + 1)
    path.write_bytes(data[:end])
    return f"cut to {end} bytes"


def _flip(path: Path, drawn: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at = drawn.randrange(len(data))
    data[at] ^= 1 << drawn.randrange(8)
    path.write_bytes(data)
    return f"a bit of byte {at} flipped"


def _replace(path: Path, drawn: random.Random) -> str:
    content = drawn.choice(
        [b"", b"\0" * 64, b"\xff\xfe\x00", b"null", b"[]", b"{}", b"7", b'"x"', b"[" * 100_000, b"{" * 5, b"\x80" * 999,
         b'{"a": ' + b"9" * 5000 + b"}"]
    )  # fmt: skip
    path.write_bytes(content)
    return f"replaced by {content[:20]!r}"


def _spots(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(spot for key, item in items for spot in _spots(item, (*at, key)))] if at else [
        spot for key, item in items for spot in _spots(item, (key,))
    ]  # fmt: skip


def _json_value(path: Path, drawn: random.Random) -> str:
    value = json.loads(path.read_text(encoding="utf-8"))
    spot = drawn.choice(_spots(value))
    holder = value
    for key in spot[:-1]:
        holder = holder[key]
    if drawn.random() < 0.25:
        del holder[spot[-1]]
        new = "nothing"
    else:
        holder[spot[-1]] = new = copy.deepcopy(drawn.choice(ODD_VALUES))
    path.write_text(json.dumps(value), encoding="utf-8")
    return f"{'.'.join(map(str, spot))} set to {str(new)[:30]!r}"


def _header(path: Path, drawn: random.Random) -> str:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = drawn.choice([key for key in header if key != "__metadata__"])
    how = drawn.choice(["drop", "dtype", "shape", "offsets", "rename"])
    entry = header.pop(name)
    if how == "dtype":
        entry["dtype"] = drawn.choice(["F16", "BF16", "F64", "I8", "U8", "X1"])
    elif how == "shape":
        entry["shape"] = drawn.choice([[], [1, *entry["shape"]], [n + 1 for n in entry["shape"]], entry["shape"][::-1]])
    elif how == "offsets":
        entry["data_offsets"] = [n + drawn.choice([-8, 8, 10**12]) for n in entry["data_offsets"]]
    if how != "drop":
        header[f"{name}x" if how == "rename" else name] = entry
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return f"{how} {name}"


def _values(path: Path, drawn: random.Random) -> str:
    """Write what cannot be into a float tensor of a safetensors file."""
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    floats = {k: v for k, v in header.items() if k != "__metadata__" and v["dtype"] == "F32" and 0 not in v["shape"]}
    name = drawn.choice(sorted(floats))
    start, end = floats[name]["data_offsets"]
    at = 8 + size + start + 4 * drawn.randrange((end - start) // 4)
    value = drawn.choice([float("nan"), float("inf"), -float("inf")])
    data[at : at + 4] = struct.pack("<f", value)
    path.write_bytes(data)
    return f"{value} in {name}"


def _line(path: Path, drawn: random.Random) -> str:
    """Change a line of JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    at = drawn.randrange(len(lines))
    row = json.loads(lines[at])
    key = drawn.choice(sorted(row))
    how = drawn.choice(["drop", "value", "garbage", "surrogate"])
    if how == "drop":
        del row[key]
    elif how == "value":
        row[key] = copy.deepcopy(drawn.choice(ODD_VALUES))
    lines[at] = {
        "garbage": lines[at][: len(lines[at]) // 2],
        "surrogate": '{"prompt": "\\ud83d", "completion": "a"}',
    }.get(how, json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"line {at + 1}: {how} {key}"


RAW, JSON, TENSORS = (_cut, _flip, _replace), (_json_value,) * 4, (_header,) * 3 + (_values,) * 2


# ---- what is damaged


def prepare(folder: Path) -> None:
    """Make a source, a base, an adapter and data."""
    source = make_checkpoint(folder / "source", "llama-text")
    quantize(source, folder / "base", QosoraConfig(rank=8))
    shutil.copytree(folder / "base", folder / "plain")  # as save_pretrained writes it: without a manifest
    (folder / "plain" / "qosora_manifest.json").unlink()
    model = perturbed(load_base(folder / "plain"))
    model.save_pretrained(folder / "loose")
    shutil.copytree(folder / "loose", folder / "adapter")  # as `qosora train` leaves it: with a manifest
    names = [file.name for file in (folder / "loose").iterdir()]
    write_json(folder / "adapter" / MANIFEST_NAME, {"files": hashed(folder / "adapter", names)})
    write_jsonl(folder / "data.jsonl", sums(6))
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": str(i)}] for i in range(4)]
    write_jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in chats])


def cases() -> list[Case]:
    """Return every kind of damage to every file, with each command that reads the file."""
    on_model = [["inspect"], ["eval", "--data", "data.jsonl"], ["export", "--dtype", "float32"]]
    found: list[Case] = []

    def add(kind: str, file: str, damages: Any, argv: list[str]) -> None:
        found.extend(Case(kind, file, damage, argv) for damage in damages)

    for folder in ("base", "plain", "adapter", "loose"):
        adapter = folder in ("adapter", "loose")
        weights = "adapter_model.safetensors" if adapter else "model.safetensors"
        config = "adapter_config.json" if adapter else "config.json"
        raw = (_cut, _replace) if folder == "plain" else RAW  # without hashes a flipped bit is a value like any other
        for name, *options in on_model:
            argv = [name, folder, *(["out"] if name == "export" else []), *options, "--json"]
            add(f"{folder} tensors", f"{folder}/{weights}", (*raw, *TENSORS), argv)
            add(f"{folder} config", f"{folder}/{config}", (*RAW, *JSON), argv)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        argv = ["generate", "plain", "--prompt", "ab", "--max-new-tokens", "2", "--json"]
        add("tokenizer", f"plain/{name}", (*RAW, *JSON), argv)
    for name, damages in (("config.json", (*RAW, *JSON)), ("model.safetensors", (*RAW, *TENSORS))):
        add("source", f"source/{name}", damages, ["quantize", "source", "out", "--rank", "8", "--json"])
    for name in ("data", "chats"):
        add("data", f"{name}.jsonl", (*RAW, *(_line,) * 4), ["eval", "plain", "--data", f"{name}.jsonl", "--json"])
    add("manifest", "base/qosora_manifest.json", (*RAW, *JSON), ["inspect", "base", "--json"])
    add("manifest", "base/qosora_manifest.json", (*RAW, *JSON), ["verify", "base", "--json"])
    return found


# ---- a case


def run_case(case: Case, intact: Path, seed: int) -> tuple[str, Verdict]:
    """Damage a copy of a file, run the command, and judge. Returns what was done, and the verdict."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for entry in intact.iterdir():  # hard links: only the damaged file is a copy
            if entry.is_dir():
                shutil.copytree(entry, place / entry.name, copy_function=os.link)
            else:
                os.link(entry, place / entry.name)
        file = place / case.file
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
        done = case.damage(file, random.Random(seed))
        status, out, err = start(case.argv, place).end()
    return done, _judged(case, intact, status, out, err)


def _expected(argv: list[str], intact: Path, known: dict[str, Any] = {}) -> Any:  # noqa: B006  (a memory)
    key = json.dumps([argv, str(intact)])
    if key not in known:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "place"
            shutil.copytree(intact, place)
            status, out, err = start(argv, place).end()
            assert status == 0, err
            known[key] = _result(out)
    return known[key]


def _result(out: str) -> Any:
    """What a command says, without what differs from run to run."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                k: plain(v)
                for k, v in value.items()
                if "seconds" not in k and k not in ("source", "base", "folder", "file_bytes")
            }
        return [plain(v) for v in value] if isinstance(value, list) else value

    return plain(json.loads(out))


def _judged(case: Case, intact: Path, status: int | None, out: str, err: str) -> Verdict:
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("qosora: ")]
    shown = " | ".join(lines[-2:])[:300]
    if status is None:
        return Verdict("hang", shown)
    if any((ord(c) < 32 and c not in "\n\t\r") or c == "\u202e" for c in out + err):
        return Verdict("control", repr(shown))
    if "Traceback" in err or "unforeseen" in err or status not in (0, 1, 2):
        return Verdict("traceback", shown)
    if status == 0:
        try:
            same = _result(out) == _expected(case.argv, intact)
        except json.JSONDecodeError:
            return Verdict("silent", f"no result: {out[:100]!r}")
        # Of configurations, manifests, tokenizers and data another one may mean something else, and rightly so.
        return Verdict("equal" if same or "tensors" not in case.kind else "silent", "" if same else "another result")
    if len([line for line in lines if "error:" in line]) != 1:
        return Verdict("lines", shown)
    names = (
        Path(case.file).name,
        Path(case.file).parts[0],
        *case.argv[1:2],
        "tokenizer",
        "adapter",
        "model.",
        "lm_head.",
        "chat template",
    )
    return Verdict("one line" if any(name in err for name in names) else "unnamed", shown)


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="damaged files to try")
    parser.add_argument("--seconds", type=float, default=800, help="end after these in any case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="kinds that begin so")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, counts, faults = time.monotonic(), Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        intact = Path(folder)
        prepare(intact)
        warm(intact, [case.argv for case in cases()])
        chosen = [case for case in cases() if not args.only or case.kind.startswith(args.only)]
        drawn = random.Random(args.seed)
        for number in range(args.count):
            if time.monotonic() - start > args.seconds:
                break
            case = chosen[number % len(chosen)]
            done, verdict = run_case(case, intact, drawn.randrange(2**32))
            counts[f"{case.kind}: {verdict.kind}"] += 1
            if verdict.fault:
                fault = {"kind": verdict.kind, "command": " ".join(case.argv), "file": case.file, "damage": done}
                faults.append({**fault, "said": verdict.text})
                print(json.dumps(faults[-1], ensure_ascii=True), file=sys.stderr, flush=True)
    summary = {"tried": counts.total(), "faults": len(faults), "seconds": round(time.monotonic() - start), **counts}
    print(json.dumps(summary, indent=1, sort_keys=True))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
