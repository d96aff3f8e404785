"""One run of an export: what it writes, tells and refuses, whatever the units are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Trained

from qosora import __version__
from qosora.checkpoints import MANIFEST_NAME, StoredSpec, Unit, read_json
from qosora.errors import CheckpointError
from qosora.export.run import Export, Reports
from qosora.export.verify import Verification

FOUND = Verification("nothing", 1, 0.25, 0.125, 0.1, 0.2, 1.0)


def unit(export: Export) -> Unit:
    """The base's fingerprint, as a tensor."""
    value = torch.tensor([int(export.adapted.fingerprint[:4], 16)])
    return Unit("x", {"x": StoredSpec.of(value)}, 1.0, (), lambda: value, lambda v: ({"x": v}, {"read": int(v)}))


def finish(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def test_reports_come_back(tiny: Trained, tmp_path: Path):
    def check(folder: Path, reports: Reports) -> Verification:
        assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
        assert reports["x"]["read"] == int(load_file(folder / "model.safetensors")["x"])
        return FOUND

    given = {tiny.adapter: 0.5}
    options: dict[str, Any] = {"original": "here", "dtype": torch.float16, "options": {"k": 1}, "max_shard_bytes": 1000}
    with Export(tiny.base, tmp_path / "out", given, trust_remote_code=False) as export:
        reports, common = export.write([unit(export)], finish, check, **options)
        fingerprint = export.adapted.fingerprint
    assert list(reports) == ["x"]
    assert common.pop("wall_seconds") > 0
    assert common == {
        "output": str(tmp_path / "out"),
        "base": str(tiny.base),
        "adapters": {str(tiny.adapter): 0.5},
        "original": "here",
        "fingerprint": fingerprint,
        "dtype": "float16",
        "total_bytes": 8,
        "verification": FOUND,
    }
    manifest = read_json(tmp_path / "out" / MANIFEST_NAME)
    assert manifest["verification"] == asdict(FOUND)
    assert manifest["made_with"] == {
        "fingerprint": fingerprint, "weights": [0.5], "dtype": "torch.float16", "qosora": __version__, "k": 1
    }  # fmt: skip


def test_without_a_check(tiny: Trained, tmp_path: Path):
    with Export(tiny.base, tmp_path / "out", None, trust_remote_code=False) as export:
        assert export.reference.name == "base in 4 bits"
        _, common = export.write(
            [unit(export)], finish, None, original=None, dtype=torch.float32, options={}, max_shard_bytes=1000
        )
    assert common["verification"] is None
    assert "verification" not in read_json(tmp_path / "out" / MANIFEST_NAME)


def test_what_is_read_is_not_replaced(tiny: Trained):
    for output in (tiny.base, tiny.adapter, tiny.adapter.parent):
        with pytest.raises(CheckpointError, match="which is being read; name another folder"):
            Export(tiny.base, output, tiny.adapter, trust_remote_code=False)
    with Export(tiny.base, tiny.original, tiny.adapter, trust_remote_code=False) as export:
        assert export.original is None
        with pytest.raises(CheckpointError, match="which is being read; name another folder"):
            export.open_original(None)
