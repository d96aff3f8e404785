"""Activations measured while a model streams by are those of the model in memory, and scales are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    FAMILIES,
    MIXTURES,
    VOCAB,
    assert_same_tensors,
    decompose,
    load,
    make_checkpoint,
    relative_difference,
    token_ids,
    write_jsonl,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Llama4TextConfig,
    LongcatFlashConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from qosora.base import calibrate
from qosora.base.calibrate import PRIOR_TOKENS, AllThere, calibration_rows, second_moments, streamed_model
from qosora.base.convert import quantize
from qosora.checkpoints import open_source
from qosora.cli import main
from qosora.config import QosoraConfig
from qosora.errors import CheckpointError, ConfigError
from qosora.layers import qosora_modules, split_experts

TOKENS = [[(7 * i + 3 * j * j) % VOCAB for j in range(31)] for i in range(13)]


def calibrated(**options: Any) -> QosoraConfig:
    return QosoraConfig(**{"rank": 8, "scale": "calibrated", "calibration": TOKENS, **options})


def long(family: str) -> dict[str, Any]:
    """Options of a family for room for all tokens in one row."""
    return {"n_positions" if family == "gpt2" else "max_position_embeddings": 512}


def streamed(source: Path, names: list[str], file: Path | None = None) -> dict[str, torch.Tensor]:
    with open_source(source) as checkpoint:
        rows = calibration_rows(calibrated(), checkpoint.origin)
        return second_moments(checkpoint, rows, names, device=torch.device("cpu"), file=file)


@torch.no_grad()
def in_memory(model: PreTrainedModel, names: list[str]) -> dict[str, torch.Tensor]:
    """Every input that each layer gets, in float64; an expert's in one row each."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2).double())
        )
    flat = [i for row in TOKENS for i in row]
    model.eval()(input_ids=torch.tensor(flat[: len(flat) // 31 * 31]).view(1, -1))
    return {name: torch.cat(found) for name, found in seen.items() if found}


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "LENGTH", 403)  # all tokens of TOKENS in one row
    monkeypatch.setattr(calibrate, "fast_dtype", lambda dtype: torch.float32)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXTURES])
def test_moments_are_those_of_the_model_in_memory(family: str, tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", family, **long(family))
    names = list(qosora_modules(decompose(source)))
    got = streamed(source, names)
    assert list(got) == names
    for name, x in in_memory(load(source), names).items():
        torch.testing.assert_close(got[name].double(), x.square().mean(0), rtol=1e-4, atol=1e-8)


def test_experts_are_drawn_towards_all(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", "mixtral", max_position_embeddings=512)
    names = list(qosora_modules(decompose(source)))
    got = streamed(source, names)
    model = load(source, experts_implementation="eager")
    state = model.state_dict()
    with torch.device("meta"):
        apart = type(model)(model.config)
    split_experts(apart)
    weights = {n: state[n] for n in apart.state_dict() if n in state}
    for name, module in apart.named_modules():  # the experts' matrices out of their stacks
        block, _, expert = name.partition(".experts.")
        if isinstance(module, nn.Linear) and expert:
            index, projection = expert.split(".")
            gate_up, down = (state[f"{block}.experts.{key}"][int(index)] for key in ("gate_up_proj", "down_proj"))
            half = len(gate_up) // 2
            matrices = {"gate_proj": gate_up[:half], "up_proj": gate_up[half:], "down_proj": down}
            matrices |= {"w1": gate_up[:half], "w3": gate_up[half:], "w2": down}
            weights[f"{name}.weight"] = matrices[projection]
    apart.load_state_dict(weights, assign=True)
    for name, buffer in model.named_buffers():
        parent, _, key = name.rpartition(".")
        setattr(apart.get_submodule(parent), key, buffer)
    inputs = in_memory(apart, names)
    experts = [name for name in names if ".experts." in name]
    for name in experts:
        layer, _, rest = name.partition(".experts.")
        kind = rest.partition(".")[2]
        alike = [n for n in inputs if n.startswith(f"{layer}.experts.") and n.endswith(f".{kind}")]
        shared = torch.cat([inputs[n] for n in alike]).square().mean(0)
        own = inputs.get(name, torch.zeros(0, len(shared)))
        expected = (own.square().sum(0) + PRIOR_TOKENS * shared) / (len(own) + PRIOR_TOKENS)
        torch.testing.assert_close(got[name].double(), expected.double(), rtol=1e-4, atol=1e-8)
    assert experts


def test_only_one_modules_weights_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_checkpoint(tmp_path / "source", max_position_embeddings=512)
    models: list[PreTrainedModel] = []
    present: list[set[str]] = []
    make = calibrate.streamed_model

    def watched(*args: Any) -> PreTrainedModel:
        models.append(make(*args))
        inner = models[0].get_submodule("model.layers.1.mlp.act_fn")
        inner.register_forward_hook(
            lambda *_: present.append({n for n, p in models[0].named_parameters() if not p.is_meta})
        )
        return models[0]

    monkeypatch.setattr(calibrate, "streamed_model", watched)
    streamed(source, ["model.layers.0.mlp.down_proj"])
    assert present == [set()]
    assert all(p.is_meta for p in models[0].parameters())


def test_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_checkpoint(tmp_path / "source")
    monkeypatch.setattr(calibrate, "LENGTH", 31)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    whole = streamed(source, names)
    finish, file = calibrate._Totals.finish_batch, tmp_path / "moments"
    counted: list[int] = []

    def interrupted(self: Any) -> None:
        finish(self)
        counted.append(self.batches)
        if len(counted) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(calibrate._Totals, "finish_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        streamed(source, names, file)
    assert_same_tensors(streamed(source, names, file), whole)
    assert counted == [1, 2, 3, 4]
    assert_same_tensors(streamed(source, names, file), whole)  # nothing is run
    file.write_bytes(file.read_bytes()[:-9])
    assert_same_tensors(streamed(source, names, file), whole)
    assert counted == [1, 2, 3, 4, 1, 2, 3, 4]


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_streamed_and_from_pretrained_are_the_same(family: str, tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", family, **long(family))
    quantize(source, tmp_path / "streamed", calibrated())
    model = decompose(source, calibrated())
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(load(tmp_path / "streamed").state_dict(), load(tmp_path / "saved").state_dict())
    config = json.loads((tmp_path / "streamed" / "config.json").read_text())["quantization_config"]
    assert config["scale"] == "calibrated"
    assert "calibration" not in config
    manifest = json.loads((tmp_path / "streamed" / "qosora_manifest.json").read_text())
    assert manifest["calibration"]["tokens"] == 403
    columns = decompose(source, QosoraConfig(rank=8))
    for name, layer in qosora_modules(model).items():
        assert relative_difference(layer.c, qosora_modules(columns)[name].c) > 0.01  # type: ignore[arg-type]


def test_a_conversion_goes_on_with_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_checkpoint(tmp_path / "source", max_position_embeddings=512)
    quantize(source, tmp_path / "whole", calibrated())

    def failing(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    def begun(folder: Path) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("qosora.base.convert.factorize_with_report", failing)
            with pytest.raises(KeyboardInterrupt):
                quantize(source, folder, calibrated())

    begun(tmp_path / "base")
    with monkeypatch.context() as patched:
        patched.setattr(calibrate, "streamed_model", failing)
        quantize(source, tmp_path / "base", calibrated())
    assert not (tmp_path / "base.partial").exists()
    for name in ("model.safetensors", "config.json", "qosora_manifest.json"):
        assert (tmp_path / "base" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    begun(tmp_path / "other")
    with pytest.raises(ConfigError, match="calibration was"):
        quantize(source, tmp_path / "other", calibrated(calibration=TOKENS[1:]))


def test_activations_decide_what_is_kept(tmp_path: Path):
    """Of a layer whose inputs differ in size by far, the calibrated base gives outputs that are nearer."""
    source = make_checkpoint(tmp_path / "source", max_position_embeddings=512)
    model = load(source)
    name = "model.layers.0.mlp.gate_proj"
    with torch.no_grad():  # a large norm's weight in front of weights that are as large as any
        model.get_submodule("model.layers.0.post_attention_layernorm").weight[:4] = 30.0
    model.save_pretrained(source)
    x = in_memory(load(source), [name])[name]
    errors = {}
    for scale, config in {"columns": QosoraConfig(rank=8), "calibrated": calibrated()}.items():
        layer = qosora_modules(decompose(source, config))[name]
        weight = model.get_submodule(name).weight.detach().double()
        errors[scale] = float((x @ (layer.dequantize().double() - weight).T).square().mean())
    assert errors["calibrated"] < 0.5 * errors["columns"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = make_checkpoint(tmp_path / "source", "llama-text")
    data = write_jsonl(
        tmp_path / "data.jsonl", [{"prompt": f"What is {i} + {i}?", "completion": f" {2 * i}"} for i in range(40)]
    )
    args = ["quantize", str(source), str(tmp_path / "base"), "--rank", "8", "--calibration", str(data)]
    assert main(args) == 0
    assert json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]["scale"] == "calibrated"
    assert main([*args, "--scale", "columns"]) == 2
    assert "--calibration is a scale of its own" in capsys.readouterr().err


def test_texts_are_tokenized(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", "llama-text")
    texts = calibrated(calibration=["one", "two"])
    ids = calibrated(calibration=[[257 - 1, *b"one"], [257 - 1, *b"two"]])
    assert calibration_rows(texts, source).shape == calibration_rows(ids, source).shape == (1, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibration": None}, "is made from text"),
        ({"calibration": [[]]}, "no token in the texts"),
    ],
)
def test_what_is_missing(tmp_path: Path, options: dict[str, Any], said: str):
    source = make_checkpoint(tmp_path / "source")
    for make in (decompose, lambda source, config: quantize(source, tmp_path / "base", config)):
        with pytest.raises(ConfigError, match=said):
            make(source, calibrated(**options))
    assert not list(tmp_path.glob("base*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": "columns"}, "calibration is for scale='calibrated', got scale='columns'"),
        ({"calibration": "text.jsonl"}, "must be a list of texts"),
        ({"calibration": [1, 2]}, "must be a list of texts"),
        ({"calibration": ["text", [1]]}, "must be a list of texts"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        calibrated(**options)


def test_a_model_that_does_not_run_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_checkpoint(tmp_path / "source", max_position_embeddings=512)
    forward = torch.nn.functional.silu
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.LlamaMLP.forward",
        lambda self, x: nn.functional.linear(forward(x), self.gate_proj.weight),
    )
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM cannot be calibrated, .* use scale='columns'"):
        quantize(source, tmp_path / "base", calibrated())
    assert not list(tmp_path.glob("base*"))


def test_a_weight_that_is_not_there_is_not_computed_with():
    """torch.nn.functional.linear returns whatever lay in memory."""
    x, weight = torch.ones(2, 3), torch.empty(4, 3, device="meta")
    with AllThere(), pytest.raises(RuntimeError, match="uses a weight whose module is not called"):
        torch.nn.functional.linear(x, weight)
    with AllThere():
        assert torch.nn.functional.linear(x, torch.ones(4, 3)).sum() == 24
        assert torch.nn.functional.linear(x.to("meta"), weight).is_meta


_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "pad_token_id": 1,
}  # fmt: skip
#: Models whose code reads a weight of a module that it does not call, or its device.
READERS: dict[str, PreTrainedConfig] = {
    "llama4": Llama4TextConfig(
        **_SIZES, intermediate_size=40, intermediate_size_mlp=56, num_hidden_layers=2, num_key_value_heads=2,
        num_local_experts=4,
    ),
    "longcat": LongcatFlashConfig(
        **_SIZES, num_key_value_heads=4, ffn_hidden_size=48, expert_ffn_hidden_size=24, n_routed_experts=4,
        zero_expert_num=2, moe_topk=2, num_layers=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    ),
    "mamba": MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=1),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_the_streamed_model_computes_what_the_whole_one_does(name: str, tmp_path: Path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(READERS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    ids = token_ids(2)
    with open_source(str(tmp_path)) as checkpoint, torch.inference_mode(), AllThere():
        streamed = streamed_model(checkpoint, torch.device("cpu"), False, torch.float32)
        for _ in range(2):  # nothing of the first run is left in the second
            torch.testing.assert_close(
                streamed(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
            )
        assert all(parameter.is_meta for parameter in streamed.parameters())
