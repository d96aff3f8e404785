"""Live bytes are counted once, follow storages to their end, and go to the right category, phase and module."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from qosora.memory.tracer import Event, Tracer

DEVICES = ("cpu", "meta")


@pytest.mark.parametrize("device", DEVICES)
def test_a_storage_counts_once_and_while_it_lives(device: str):
    tracer = Tracer()
    with tracer:
        x = torch.zeros(100, device=device)
        views = [x.view(10, 10), x[:50], x.detach()]
        assert tracer.total == 400
        y = x + 1
        assert tracer.total == 800
        del x
        assert tracer.total == 800, "views keep their memory"
        views.clear()
        assert tracer.total == 400
        del y
    assert tracer.total == 0
    assert tracer.peak()[1].total == 800


def test_windows_made_by_dlpack_are_part_of_the_buffer():
    tracer = Tracer()
    flat = torch.zeros(512)
    window = from_dlpack(flat[256:300])
    assert window.untyped_storage()._cdata != flat.untyped_storage()._cdata
    with tracer:
        tracer.register([flat], "adapter")
        tracer.register([window], "adapter")
        assert tracer.total == 2048
        other = torch.zeros(10)
        assert tracer.total == 2088
    del other, window
    assert tracer.total == 2048


def test_freed_addresses_are_free_for_others():
    tracer = Tracer()
    with tracer:
        for size in (1000, 10, 500, 1000, 100):
            x = torch.zeros(size)
            assert tracer.total == 4 * size
            del x


def test_rounding_is_a_category_of_its_own():
    tracer = Tracer(granularity=512)
    with tracer:
        x = torch.zeros(1, device="meta")
        assert tracer.total == 512
        assert tracer.live() == {"layer temporaries": 4, "rounding": 508}
    del x
    assert tracer.total == 0


def test_memory_inside_operations_counts_at_the_peak_only():
    tracer = Tracer(workspaces={"aten::mm": lambda a, b: 1000})
    with tracer:
        x = torch.zeros(2, 2)
        y = x @ x
        assert tracer.total == 32
    peak = tracer.peak()[1]
    assert (peak.total, peak.op, peak.live["workspace"]) == (1016, "aten::mm", 1000)
    del y


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        self.gradient_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x))


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("device", DEVICES)
def test_sites_name_phase_module_and_layer(device: str):
    model, tracer = _Stack().to(device), Tracer()
    x = torch.ones(2, 4, device=device)
    with tracer, tracer.following(model, model, model.layers):
        tracer.register(model.parameters(), "adapter")
        tracer.register([x], "batch")
        tracer.enter_phase("forward")
        loss = model(x).exp().sum()
        assert tracer.phase == "loss"
        saved = tracer.live()["saved activations"]
        assert saved == 3 * 32, "three ReLU results; their inputs are not kept"
        loss.backward()
        assert tracer.phase == "backward"
    sites = {(site.phase, site.module, site.layer) for site in tracer.sites}
    for layer in range(3):
        assert ("forward", "layers.*.fc", layer) in sites
        assert ("backward", "layers.*.fc", layer) in sites
    assert ("loss", "", -1) in sites
    assert all(site.phase != "setup" for site in tracer.sites if site.module)


def test_what_forward_made_is_saved_once_its_layer_has_ended():
    model, tracer = _Stack(), Tracer()
    with tracer, tracer.following(model, model, model.layers):
        tracer.enter_phase("forward")
        model(torch.ones(2, 4))
    first = next(p for s, p in tracer.sites.items() if s.layer == 0 and s.module == "layers.*.fc")
    last = next(p for s, p in tracer.sites.items() if s.layer == 2 and s.module == "layers.*.fc")
    assert "saved activations" not in first.live or first.live["saved activations"] == 32  # the input
    assert last.live["saved activations"] > first.live.get("saved activations", 0)


def test_hooks_are_removed():
    model = _Stack()
    with Tracer().following(model, model, model.layers):
        assert model.layers[0]._forward_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_events_add_up():
    events: list[Event] = []
    tracer = Tracer(log=events)
    with tracer:
        x = torch.zeros(100)
        y = x * 2
        del x
    del y
    gc.collect()
    assert [event.nbytes for event in events] == [400, 400, -400, -400]


def test_tensors_of_other_devices_do_not_count():
    with Tracer(device="meta") as tracer:
        there = torch.empty(8, device="meta")
        here = torch.zeros(4)
        tracer.register([here], "batch")
        assert tracer.total == there.nbytes
        copy = there + 1
        assert tracer.live() == {"layer temporaries": there.nbytes + copy.nbytes}
