"""`from_pretrained` decomposes, `save_pretrained` writes, `from_pretrained` reads back the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    FAMILIES,
    LAYERS,
    assert_same_tensors,
    decompose,
    layer_dtypes,
    load,
    logits,
    make_base,
    make_checkpoint,
    make_model,
    relative_difference,
    rounding,
    token_ids,
)
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from qosora.adapter import model_fingerprint
from qosora.base.quantizer import QosoraHfQuantizer
from qosora.config import OsoraConfig, QosoraConfig
from qosora.decompose.factorize import factorize, measure_error
from qosora.errors import CheckpointError, ConfigError
from qosora.layers.linear import QosoraLinear, qosora_modules

FAMILIES_AND_DTYPES = [
    *((family, torch.float32) for family in FAMILIES),
    *(("llama", dtype) for dtype in (torch.bfloat16, torch.float16)),
    *((family, torch.bfloat16) for family in ("gemma3", "gpt2")),
]
STORED = {torch.uint8, torch.float32}


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a checkpoint of one file; None takes one out. Dots are written as double underscores."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."))
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "llama", dtype=torch.bfloat16)


@pytest.fixture
def source_copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "source"))


@pytest.fixture
def base_copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


class TestRoundTrip:
    @pytest.mark.parametrize(("family", "dtype"), FAMILIES_AND_DTYPES, ids=str)
    def test_every_family_and_dtype(self, tmp_path: Path, family: str, dtype: torch.dtype):
        plain = make_checkpoint(tmp_path / "plain", family, dtype=dtype, max_shard_size="20KB")
        model = decompose(plain)
        model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
        assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
        again = load(tmp_path / "base")

        assert_same_tensors(again.state_dict(), model.state_dict())
        assert torch.equal(logits(again), logits(model))
        assert model.dtype == again.dtype == dtype
        assert layer_dtypes(again) == STORED
        layers = qosora_modules(again)
        assert len(layers) == LAYERS.get(family, 14)
        assert all(isinstance(layer, QosoraLinear) and layer.rank == 8 for layer in layers.values())
        assert not any(p.requires_grad for layer in layers.values() for p in layer.parameters())
        if not model.config.tie_word_embeddings:
            assert type(again.get_output_embeddings()) is nn.Linear

    def test_tied_embeddings_stay_tied(self, tmp_path: Path):
        model = load(make_base(tmp_path / "base", "llama-tied-bias"))
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_logits_are_those_of_the_reconstructed_weights(self, source: Path):
        model, plain = decompose(source), load(source)
        for name, layer in qosora_modules(model).items():
            plain.get_submodule(name).weight.data.copy_(layer.dequantize())
        assert relative_difference(logits(model), logits(plain)) < rounding(torch.float32)

    def test_biases_are_kept(self, tmp_path: Path):
        plain = load(make_checkpoint(tmp_path / "plain", "llama-tied-bias"))
        model = decompose(tmp_path / "plain")
        for name, layer in qosora_modules(model).items():
            assert layer.bias is not None
            assert torch.equal(layer.bias, plain.get_submodule(name).bias)

    @pytest.mark.parametrize(
        "options",
        [
            {"svd": "exact"},
            {"quant_type": "fp4"},
            {"double_quant": False},
            {"blocksize": 128},
            {"rank": 1000},
            {"rank_pattern": {"q_proj": 4, "mlp..*": 20, r"layers\.1\.self_attn\.q_proj": 3}},
            {"modules_to_not_convert": ["q_proj", "model.layers.1.mlp"]},
            {"compute_dtype": "bfloat16"},
        ],
        ids=str,
    )
    def test_options(self, tmp_path: Path, source: Path, options: dict[str, Any]):
        model = decompose(source, QosoraConfig(**{"rank": 8, **options}))
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert_same_tensors(again.state_dict(), model.state_dict())
        assert torch.equal(logits(again), logits(model))
        stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert stored == QosoraConfig(**{"rank": 8, **options}).to_dict()

    def test_what_the_options_do(self, source: Path):
        ranks = {"q_proj": 4, "mlp..*": 20, r"layers\.1\.self_attn\.q_proj": 3}
        layers = qosora_modules(decompose(source, QosoraConfig(rank=1000, rank_pattern=ranks)))
        found = {name.removeprefix("model.layers."): layer.rank for name, layer in layers.items()}
        assert (found["0.self_attn.q_proj"], found["1.self_attn.q_proj"]) == (4, 3)
        assert (found["0.mlp.up_proj"], found["0.self_attn.k_proj"]) == (20, 16)  # k_proj: (16, 32)

        skipped = decompose(source, QosoraConfig(rank=8, modules_to_not_convert=["q_proj", "model.layers.1.mlp"]))
        assert len(qosora_modules(skipped)) == 14 - 2 - 3
        assert type(skipped.model.layers[0].self_attn.q_proj) is nn.Linear
        assert type(skipped.model.layers[1].mlp.up_proj) is nn.Linear

        single = next(iter(qosora_modules(decompose(source, QosoraConfig(rank=8, double_quant=False))).values()))
        assert single.weight_absmax.dtype == torch.float32
        computed = decompose(source, QosoraConfig(rank=8, compute_dtype="bfloat16"))
        assert not torch.equal(logits(computed), logits(decompose(source)))

    def test_same_input_same_base(self, source: Path):
        assert_same_tensors(decompose(source).state_dict(), decompose(source).state_dict())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_base_in_another_dtype(self, base: Path, dtype: torch.dtype):
        stored, model = load(base), load(base, dtype=dtype)
        assert model.dtype == model.lm_head.weight.dtype == dtype
        assert layer_dtypes(model) == STORED
        for name, layer in qosora_modules(model).items():
            assert_same_tensors(layer.state_dict(), stored.get_submodule(name).state_dict())
        assert model_fingerprint(model) == model_fingerprint(stored)
        assert relative_difference(logits(model), logits(stored)) < rounding(torch.bfloat16)

    def test_float32_weights_are_not_rounded_before_they_are_decomposed(self, source: Path):
        exact, model = decompose(source), decompose(source, dtype=torch.bfloat16)
        assert model.lm_head.weight.dtype == torch.bfloat16
        for name, layer in qosora_modules(model).items():
            assert_same_tensors(layer.state_dict(), exact.get_submodule(name).state_dict())
        assert not model._keep_in_fp32_modules_strict, "left as it was"

    def test_options_as_a_dict(self, source: Path, tmp_path: Path):
        """As a YAML or JSON file gives them."""
        model = decompose(source, {"quant_method": "qosora", "rank": 8})  # type: ignore[arg-type]
        assert isinstance(model.config.quantization_config, QosoraConfig)
        assert_same_tensors(model.state_dict(), decompose(source).state_dict())

    def test_sequence_classification(self, tmp_path: Path, source: Path):
        model = AutoModelForSequenceClassification.from_pretrained(
            source, quantization_config=QosoraConfig(rank=4), num_labels=3
        )
        assert type(model.score) is nn.Linear
        model.save_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert_same_tensors(again.state_dict(), model.state_dict())


class TestError:
    """Reconstruction: what the whole method is for."""

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_below_nf4_on_every_trained_like_matrix(self, tmp_path: Path, family: str):
        """Trained weights have a few large singular values over a bulk; here those fall off as 1 / sqrt(i)."""
        model = make_model(family)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.Linear, Conv1D)):
                    U, _, Vh = torch.linalg.svd(torch.randn(module.weight.shape, generator=generator), False)
                    values = torch.arange(1, U.shape[1] + 1).rsqrt()
                    module.weight.copy_((U * values) @ Vh)
        model.save_pretrained(tmp_path)
        plain = load(tmp_path)
        for name, layer in qosora_modules(decompose(tmp_path, QosoraConfig(rank=16))).items():
            weight = plain.get_submodule(name).weight.detach()
            report = measure_error(weight.T if family == "gpt2" else weight, layer.factors)
            assert report.error < 0.9 * report.nf4_error, f"{name}: {report}"


class TestDequantize:
    @pytest.mark.parametrize(("family", "dtype"), FAMILIES_AND_DTYPES, ids=str)
    def test_gives_a_plain_model(self, tmp_path: Path, family: str, dtype: torch.dtype):
        model = load(make_base(tmp_path / "base", family, dtype=dtype))
        before = logits(model)
        plain = model.dequantize()
        assert not qosora_modules(plain)
        assert {p.dtype for p in plain.parameters()} == {dtype}
        assert relative_difference(logits(plain), before) < rounding(dtype)

        plain.save_pretrained(tmp_path / "plain")
        config = json.loads((tmp_path / "plain" / "config.json").read_text())
        assert "quantization_config" not in config
        assert "qosora" not in json.dumps(config)
        again = load(tmp_path / "plain")
        assert type(again) is type(make_model(family))
        assert_same_tensors(again.state_dict(), plain.state_dict())
        assert again.state_dict().keys() == make_model(family).state_dict().keys()
        assert torch.equal(logits(again), logits(plain))

    def test_after_a_save(self, tmp_path: Path, source: Path):
        model = decompose(source)
        model.save_pretrained(tmp_path)  # makes config.dtype a str
        assert logits(model.dequantize()).dtype == torch.float32

    def test_to_another_dtype(self, tmp_path: Path, base: Path):
        plain = load(base).dequantize(torch.float32)
        assert {p.dtype for p in plain.parameters()} == {torch.float32}
        assert logits(plain).dtype == torch.float32
        plain.save_pretrained(tmp_path)
        assert load(tmp_path).dtype == torch.float32

    def test_refused_with_adapters(self, base: Path):
        from peft import get_peft_model

        model = get_peft_model(load(base), OsoraConfig())
        with pytest.raises(ConfigError, match="merge_and_unload"):
            model.dequantize()
        assert not qosora_modules(model.merge_and_unload().dequantize())


class TestRefuses:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_by_name_and_at_once(self, source_copy: Path, value: float, monkeypatch: pytest.MonkeyPatch):
        tried: list[str] = []

        def recorded(*args: Any, **options: Any) -> Any:
            tried.append(options["name"])
            return factorize(*args, **options)

        monkeypatch.setattr("qosora.base.quantizer.factorize", recorded)
        weight = load_file(source_copy / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        weight[3, 5] = value
        edit_tensors(source_copy, model__layers__0__mlp__up_proj__weight=weight)
        with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight: 1 of 1792 values are NaN"):
            decompose(source_copy)
        assert tried[-1] == "model.layers.0.mlp.up_proj.weight"
        assert len(tried) < 14, "the other weights were decomposed for nothing"

    def test_shape_against_the_config(self, source_copy: Path):
        edit_tensors(source_copy, model__layers__0__mlp__up_proj__weight=torch.zeros(40, 32))
        with pytest.raises(CheckpointError, match=r"up_proj\.weight: config\.json makes it \(56, 32\), .* \(40, 32\)"):
            decompose(source_copy)

    def test_missing_weight(self, source_copy: Path):
        edit_tensors(source_copy, model__layers__0__mlp__up_proj__weight=None)
        with pytest.raises(CheckpointError, match="tensors that the model needs are not in the checkpoint"):
            decompose(source_copy)

    @pytest.mark.parametrize("name", ["U", "s", "weight", "weight_absmax_offset"])
    def test_missing_tensor_of_a_base(self, base_copy: Path, name: str):
        edit_tensors(base_copy, **{f"model__layers__0__mlp__up_proj__{name}": None})
        with pytest.raises(CheckpointError, match=rf"1 tensors that .* not in .* 'model.layers.0.mlp.up_proj.{name}'"):
            load(base_copy)

    @pytest.mark.parametrize("name", ["U", "s", "weight"])
    def test_base_whose_config_has_another_rank_or_shape(self, base_copy: Path, name: str):
        tensor = load_file(base_copy / "model.safetensors")[f"model.layers.0.mlp.up_proj.{name}"]
        edit_tensors(base_copy, **{f"model__layers__0__mlp__up_proj__{name}": tensor[:-1].clone()})
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load(base_copy)

    def test_names_that_match_nothing(self, source: Path):
        config = QosoraConfig(rank=8, rank_pattern={"down_porj": 4}, modules_to_not_convert=["c_attn"])
        with pytest.raises(ConfigError) as caught:
            decompose(source, config)
        assert len(caught.value.problems) == 2
        assert "'down_porj' matches no linear layer of LlamaForCausalLM, which has down_proj," in str(
            caught.value
        ).replace("[", "").replace("]", "")

    def test_nothing_left_to_decompose(self, source: Path):
        with pytest.raises(ConfigError, match="no linear layer left to decompose"):
            decompose(source, QosoraConfig(modules_to_not_convert=[".*proj"]))

    @pytest.mark.parametrize("which", ["source", "base"])
    def test_disk_offload(self, which: str, request: pytest.FixtureRequest, tmp_path: Path):
        folder = request.getfixturevalue(which)
        options = {"quantization_config": QosoraConfig(rank=8)} if which == "source" else {}
        device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
        with pytest.raises(ConfigError, match="cannot be offloaded to disk"):
            load(folder, device_map=device_map, offload_folder=tmp_path, **options)

    def test_offload_of_a_part_to_the_cpu(self):
        quantizer = QosoraHfQuantizer(QosoraConfig(rank=8), pre_quantized=True)
        with pytest.raises(ConfigError, match="cannot be offloaded from a GPU to the CPU in part"):
            quantizer.validate_environment(device_map={"model.layers.0": 0, "model.layers.1": "cpu"})
        for device_map in (None, "auto", {"": "cpu"}, {"": 0}, {"model.layers.0": 0, "model.layers.1": 1}):
            quantizer.validate_environment(device_map=device_map)

    def test_bad_options_before_anything_is_read(self, source: Path):
        with pytest.raises(ConfigError, match="2 problems"):
            load(source, quantization_config=QosoraConfig(rank=0, svd="?"))

    def test_unknown_option_in_a_base(self, base_copy: Path):
        config = json.loads((base_copy / "config.json").read_text())
        config["quantization_config"]["bits"] = 3
        (base_copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="unknown option 'bits'"):
            load(base_copy)


class TestUse:
    def test_generation_with_cache(self, base: Path):
        model = load(base, dtype=torch.float32)
        options = {"max_new_tokens": 8, "do_sample": False}
        with_cache = model.generate(token_ids(), use_cache=True, **options)
        assert torch.equal(with_cache, model.generate(token_ids(), use_cache=False, **options))

    def test_casting_keeps_the_statistics(self, base: Path):
        model = load(base)
        before = {n: layer.state_dict() for n, layer in qosora_modules(model).items()}
        model.to(torch.float16)
        assert model.lm_head.weight.dtype == torch.float16
        assert layer_dtypes(model) == STORED
        for name, layer in qosora_modules(model).items():
            assert_same_tensors(layer.state_dict(), before[name])
        assert logits(model).dtype == torch.float16

    def test_device_map_auto_and_by_name(self, base: Path):
        expected = logits(load(base))
        for device_map in ("auto", "cpu", {"": "cpu"}):
            assert torch.equal(logits(load(base, device_map=device_map)), expected)

    def test_memory_is_about_four_bits(self, source: Path):
        layers = qosora_modules(decompose(source, QosoraConfig(rank=4))).values()
        stored = sum(p.nbytes for layer in layers for p in layer.parameters())
        assert stored < 1.1 * sum(layer.factors.nbytes + 4 * layer.out_features for layer in layers)


@pytest.mark.slow
def test_without_qosora_a_base_does_not_load(tmp_path: Path):
    """Fails loudly, rather than giving a model with weights at random."""
    folders = [str(make_base(tmp_path / family, family)) for family in ("llama", "gpt2")]
    code = textwrap.dedent(f"""
        import sys
        sys.modules["qosora"] = None  # any import of it fails
        from transformers import AutoModelForCausalLM
        for folder in {folders!r}:
            try:
                AutoModelForCausalLM.from_pretrained(folder)
            except RuntimeError as error:
                print("refused:", error)
    """)
    own = {"TRANSFORMERS_VERBOSITY": "warning"}  # the command line sets another in this process, once a test has run it
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | own
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused:") == 2
    assert "Unknown quantization type, got qosora" in done.stderr
