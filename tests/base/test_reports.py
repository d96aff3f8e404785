"""Reports of a conversion, summed up by kind of layer."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from qosora.base.reports import ConversionReport, LayerReport, by_kind


def layer(name: str, error: float, seconds: float) -> LayerReport:
    return LayerReport(name, (8, 4), 2, error, 2 * error, 5.0, 4.1, seconds)


LAYERS = [
    layer("layers.0.down_proj", 0.1, 1.0),
    layer("layers.0.up_proj", 0.5, 3.0),
    layer("layers.1.down_proj", 0.3, 2.0),
]


def test_means_and_sums_by_the_last_part_of_the_name():
    kinds = ConversionReport("source", LAYERS, 100, 6.5).by_kind()
    assert list(kinds) == ["down_proj", "up_proj"]
    assert kinds["down_proj"]["layers"] == 2
    assert kinds["down_proj"]["error"] == pytest.approx(0.2)
    assert kinds["down_proj"]["nf4_error"] == pytest.approx(0.4)
    assert kinds["down_proj"]["bits_per_parameter"] == 5.0
    assert kinds["down_proj"]["seconds"] == 3.0


def test_what_a_base_keeps_has_no_seconds():
    kept = [{key: value for key, value in asdict(one).items() if key != "seconds"} for one in LAYERS]
    assert "seconds" not in by_kind(kept)["up_proj"]
    assert by_kind([]) == {}


def test_plain_data():
    report = ConversionReport("source", LAYERS, 100, 6.5)
    assert report.to_dict()["by_kind"] == report.by_kind()
    assert report.to_dict()["layers"][0]["name"] == "layers.0.down_proj"
