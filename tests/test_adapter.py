"""The adapter, used in every way that PEFT users use one."""

from __future__ import annotations

import copy
import json
import re
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import (
    assert_same_tensors,
    decompose,
    layer_dtypes,
    load,
    logits,
    make_base,
    make_checkpoint,
    token_ids,
    train,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from qosora.adapter import OsoraLayer, model_fingerprint
from qosora.base.structure import replace_linears
from qosora.config import OsoraConfig, QosoraConfig
from qosora.errors import CheckpointError, ConfigError, FingerprintError
from qosora.layers.linear import QosoraLinear, qosora_modules


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("adapter") / "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("adapter") / "tied", "llama-tied-bias", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "trained"
    trained(base).save_pretrained(folder)
    return folder


@cache
def loaded(folder: Path, **options: Any) -> PreTrainedModel:
    return load(folder, **options)


def fresh(folder: Path, **options: Any) -> PreTrainedModel:
    """What `load` gives, of which a copy is made in a tenth of the time."""
    return copy.deepcopy(loaded(folder, **options))


def wrap(folder: Path, config: OsoraConfig | None = None, **options: Any) -> Any:
    return get_peft_model(fresh(folder, **options), config or OsoraConfig())


def trained(folder: Path, config: OsoraConfig | None = None, *, seed: int = 0, **options: Any) -> Any:
    """A model whose vectors are all moved, by chance rather than by training: faster."""
    model = wrap(folder, config, **options)
    move(model, "default", seed)
    return model


def move(model: nn.Module, adapter_name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if "osora_" in name and name.endswith(f".{adapter_name}"):
            param.data *= 1 + 0.3 * torch.randn(param.shape, generator=generator)


def layers_of(model: nn.Module) -> dict[str, OsoraLayer]:
    return {
        name.removeprefix("base_model.model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, OsoraLayer)
    }


def trainable(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


class TestNew:
    def test_starts_at_the_base(self, base: Path):
        plain = fresh(base)
        model = get_peft_model(fresh(base), OsoraConfig())
        assert torch.equal(logits(model), logits(plain))
        for name, layer in layers_of(model).items():
            found = plain.model.get_submodule(name)
            assert torch.equal(layer.osora_s["default"], found.s)
            assert torch.equal(layer.osora_o["default"], torch.ones(found.out_features))

    @pytest.mark.parametrize(("vectors", "kinds"), [("both", {"s", "o"}), ("s", {"s"}), ("o", {"o"})])
    def test_only_the_vectors_train(self, base: Path, tmp_path: Path, vectors: str, kinds: set[str]):
        model = wrap(base, OsoraConfig(vectors=vectors))
        names = trainable(model)
        assert names == {
            f"base_model.model.model.{layer}.osora_{kind}.default" for layer in layers_of(model) for kind in kinds
        }
        assert len(layers_of(model)) == 14
        before = {name: param.clone() for name, param in model.named_parameters()}
        train(model)
        changed = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
        assert changed == names

        model.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert set(stored) == {name.removesuffix(".default") for name in names}
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        again = PeftModel.from_pretrained(fresh(base), tmp_path)
        assert_same_tensors(dict(again.named_parameters()), dict(model.named_parameters()))
        assert torch.equal(logits(again), logits(model))
        assert not trainable(again)
        assert trainable(PeftModel.from_pretrained(fresh(base), tmp_path, is_trainable=True)) == names

    def test_vectors_are_float32_on_a_16_bit_base(self, tied: Path):
        model = wrap(tied)
        assert model.dtype == torch.bfloat16
        assert {p.dtype for n, p in model.named_parameters() if "osora_" in n} == {torch.float32}
        train(model)
        assert {p.dtype for n, p in model.named_parameters() if "osora_" in n} == {torch.float32}

    def test_prints_its_parameters(self, base: Path, capsys: pytest.CaptureFixture[str]):
        model = wrap(base)
        model.print_trainable_parameters()
        count = sum(layer.osora_s["default"].numel() + layer.out_features for layer in layers_of(model).values())
        assert f"trainable params: {count:,} " in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, 14),
            ({"target_modules": "all-linear"}, 14),
            ({"target_modules": ["q_proj", "v_proj"]}, 4),
            ({"target_modules": r".*\.(up|down)_proj"}, 4),
            ({"target_modules": ["model.layers.1.mlp.up_proj"]}, 1),
            ({"exclude_modules": ["q_proj"]}, 12),
            ({"exclude_modules": r".*\.mlp\..*"}, 8),
            ({"layers_to_transform": 1}, 7),
            ({"layers_to_transform": [0], "layers_pattern": "layers"}, 7),
            ({"layers_to_transform": [0], "target_modules": "all-linear", "exclude_modules": ["q_proj"]}, 6),
            ({"layers_to_transform": [1], "target_modules": ["q_proj", "k_proj"]}, 2),
        ],
        ids=str,
    )
    def test_selects_layers(self, base: Path, tmp_path: Path, options: dict[str, Any], expected: int):
        model = trained(base, OsoraConfig(**options))
        assert len(layers_of(model)) == expected
        if options.get("layers_to_transform") == 1:
            assert all(name.startswith("layers.1.") for name in layers_of(model))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(fresh(base), tmp_path)
        assert layers_of(again).keys() == layers_of(model).keys()
        assert torch.equal(logits(again), logits(model))

    def test_gpt2(self, tmp_path: Path):
        folder = make_base(tmp_path / "gpt2", "gpt2")
        model = trained(folder)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(fresh(folder), tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))
        merged = model.merge_and_unload()
        assert torch.equal(logits(merged), logits(again))

    def test_config_serves_several_models(self, tmp_path: Path, base: Path):
        """A sweep over ranks makes one config and uses it again."""
        config = OsoraConfig(target_modules="all-linear")
        models = [
            get_peft_model(decompose(base.with_name("llama-source"), QosoraConfig(rank=r)), config) for r in (4, 8)
        ]
        assert config.base_fingerprint is None
        recorded = [model.peft_config["default"].base_fingerprint for model in models]
        assert recorded == [model_fingerprint(model) for model in models]
        assert recorded[0] != recorded[1]

    def test_adapter_of_a_7b_is_a_few_megabytes(self):
        config = LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        replace_linears(model, QosoraConfig(rank=128), ["lm_head"])
        tensors = get_peft_model_state_dict(get_peft_model(model, OsoraConfig(), low_cpu_mem_usage=True))
        header, offset = {}, 0
        for name, tensor in tensors.items():  # as safetensors lays it out
            header[name] = {
                "dtype": "F32",
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        total_bytes = len(struct.pack("<Q", 0)) + len(json.dumps(header)) + offset
        assert len(tensors) == 2 * 7 * 32
        assert offset == 4 * 32 * (7 * 128 + 5 * 4096 + 2 * 11008)
        assert total_bytes < 6_000_000


class TestModulesToSave:
    @pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
    def test_untied(self, base: Path, tmp_path: Path, names: list[str]):
        model = wrap(base, OsoraConfig(modules_to_save=names))
        assert sum("modules_to_save" in name for name in trainable(model)) == len(names)
        train(model)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(fresh(base), tmp_path)
        assert torch.equal(logits(again), logits(model))
        merged = again.merge_and_unload()
        assert torch.equal(logits(merged), logits(model))
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(logits(load(tmp_path / "merged")), logits(model))

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
    def test_tied(self, tied: Path, tmp_path: Path):
        model = wrap(tied, OsoraConfig(modules_to_save=["lm_head"]))
        train(model)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(fresh(tied), tmp_path)
        assert torch.equal(logits(again), logits(model))

    def test_sequence_classification(self, base: Path, tmp_path: Path):
        options = {"num_labels": 3, "ignore_mismatched_sizes": True}
        model = get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(base, **options), OsoraConfig(task_type="SEQ_CLS")
        )
        assert any("score" in name for name in trainable(model))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, **options), tmp_path)
        assert torch.equal(logits(again), logits(model))

    @pytest.mark.parametrize("name", ["q_proj", "lm_head|q_proj"])
    def test_a_decomposed_layer_is_refused(self, base: Path, name: str):
        with pytest.raises(ConfigError, match=r"modules_to_save names 'model\.layers\.0\.self_attn\.q_proj'"):
            wrap(base, OsoraConfig(modules_to_save=[name]))


class TestBatchNorms:
    """As encoders of speech have them; no adapter saves their statistics."""

    def trained(self, folder: Path, **options: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """A model's batch norm, and what it makes of some numbers before and after training on others."""
        base = decompose(make_checkpoint(folder))
        norm = base.model.inner_norm = nn.BatchNorm1d(4)
        numbers = torch.arange(32.0).view(8, 4)
        before = norm.eval()(numbers)
        model = get_peft_model(base, OsoraConfig(**options))
        model.add_adapter("other", OsoraConfig())
        model.train()
        inner = model.get_base_model().model.inner_norm
        for _ in range(3):
            inner(5 + 3 * torch.randn(16, 4))
        return inner, before, inner.eval()(numbers)

    def test_they_keep_the_bases(self, tmp_path: Path):
        norm, before, after = self.trained(tmp_path)
        assert torch.equal(after, before)
        assert int(norm.num_batches_tracked) == 0
        copied = copy.deepcopy(norm).train()
        copied(5 + torch.randn(16, 4))
        assert torch.equal(copied.running_mean, torch.zeros(4))

    def test_those_that_are_trained_in_full_learn_theirs(self, tmp_path: Path):
        _, before, after = self.trained(tmp_path, modules_to_save=["inner_norm"])
        assert not torch.equal(after, before)


class TestRefuses:
    def test_no_base(self, tmp_path: Path):
        model = load(make_checkpoint(tmp_path / "plain"))
        with pytest.raises(ConfigError, match=r"has no decomposed layer\. Load it with from_pretrained.*QosoraConfig"):
            get_peft_model(model, OsoraConfig())

    def test_adapter_onto_no_base(self, base: Path, adapter: Path):
        with pytest.raises(ConfigError, match="Give the base that the adapter was trained on"):
            PeftModel.from_pretrained(fresh(base.with_name("llama-source")), adapter)

    @pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r"model\.layers\.0\..*", ["embed_tokens"]], ids=str)
    def test_other_targets_before_anything_is_changed(self, base: Path, targets: Any):
        model = fresh(base)
        with pytest.raises(ConfigError, match="that are not decomposed, among them"):
            get_peft_model(model, OsoraConfig(target_modules=targets))
        assert not layers_of(model)

    def test_layers_that_do_not_exist(self, base: Path):
        with pytest.raises(ConfigError, match=r"layers_to_transform=\[7\] .* selects none of the 14"):
            wrap(base, OsoraConfig(layers_to_transform=[7]))

    def test_targets_that_do_not_exist(self, base: Path):
        with pytest.raises(ValueError, match="q_porj"):
            wrap(base, OsoraConfig(target_modules=["q_porj"]))

    @pytest.mark.parametrize("other", ["rank", "seed", "model", "blocksize", "merged"])
    def test_another_base(self, base: Path, adapter: Path, other: str, tmp_path: Path):
        source = base.with_name("llama-source")
        if other == "merged":
            model = trained(base).merge_and_unload()
        elif other == "model":
            model = decompose(make_checkpoint(tmp_path / "other", seed=1))
        else:
            options: dict[str, Any] = {"rank": 9} if other == "rank" else {"seed": 1, "svd_oversampling": 0}
            options = {"blocksize": 128} if other == "blocksize" else options
            model = decompose(source, QosoraConfig(**{"rank": 8, **options}))
        expected, found = model_fingerprint(fresh(base)), model_fingerprint(model)
        assert expected != found
        with pytest.raises(FingerprintError, match=f"fingerprint {expected}, but this base has {found}"):
            PeftModel.from_pretrained(model, adapter)
        assert not layers_of(model)

    def test_second_adapter_of_another_base(self, base: Path, tmp_path: Path):
        trained(make_base(tmp_path / "other", seed=1)).save_pretrained(tmp_path / "adapter")
        model = trained(base)
        before = logits(model)
        with pytest.raises(FingerprintError):
            model.load_adapter(tmp_path / "adapter", "second")
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model), before)

    def test_nan_with_safe_merge(self, base: Path):
        model = trained(base)
        next(iter(layers_of(model).values())).osora_s["default"].data[0] = float("nan")
        with pytest.raises(CheckpointError, match="of adapter 'default' holds NaN or infinity: its training"):
            model.merge_and_unload(safe_merge=True)


def transformers_refuses_peft() -> str | None:
    """What transformers' own methods for adapters say of the installed PEFT, for a LoRA of an ordinary model as for us.

    transformers 5.24 wants PEFT 0.22 for all of them but `load_adapter`, which came out before that did.
    """
    plain = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8))
    try:
        plain.add_adapter(LoraConfig(target_modules=["q_proj"]))
    except ValueError as error:
        if "version of PEFT you are using is not compatible" in str(error):
            return re.escape(str(error))
        raise
    return None


class TestLoad:
    def test_auto_class(self, base: Path, adapter: Path):
        expected = logits(trained(base))
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), expected)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_low_cpu_mem_usage(self, base: Path, adapter: Path, low_cpu_mem_usage: bool):
        model = PeftModel.from_pretrained(fresh(base), adapter, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(model), logits(trained(base)))

    def test_transformers_own_way_to_load(self, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch):
        expected = logits(trained(base))
        model = fresh(base)
        model.load_adapter(adapter)
        assert torch.equal(logits(model), expected)
        monkeypatch.chdir(adapter)  # from where it names its base
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter)), expected)

    def test_transformers_own_way_to_switch(self, base: Path, adapter: Path):
        expected = logits(trained(base))
        model = fresh(base)
        model.load_adapter(adapter)
        if refusal := transformers_refuses_peft():
            with pytest.raises(ValueError, match=refusal):
                model.disable_adapters()
            return
        model.disable_adapters()
        assert torch.equal(logits(model), logits(fresh(base)))
        model.enable_adapters()
        assert torch.equal(logits(model), expected)

    def test_transformers_own_way_to_add_and_save(self, base: Path, adapter: Path, tmp_path: Path):
        expected = logits(trained(base))
        new = fresh(base)
        if refusal := transformers_refuses_peft():
            with pytest.raises(ValueError, match=refusal):
                new.add_adapter(OsoraConfig())
            return
        new.add_adapter(OsoraConfig())
        move(new, "default", 0)
        assert torch.equal(logits(new), expected)
        new.save_pretrained(tmp_path)
        again = fresh(base)
        again.load_adapter(tmp_path)
        assert torch.equal(logits(again), expected)

    def test_onto_the_base_in_another_dtype(self, base: Path, adapter: Path):
        model = PeftModel.from_pretrained(fresh(base, dtype=torch.bfloat16), adapter)
        assert logits(model).dtype == torch.bfloat16

    def test_same_adapter_same_bytes(self, base: Path, adapter: Path, tmp_path: Path):
        PeftModel.from_pretrained(fresh(base), adapter).save_pretrained(tmp_path)
        name = "adapter_model.safetensors"
        assert (tmp_path / name).read_bytes() == (adapter / name).read_bytes()

    def test_incomplete_adapter_warns(self, base: Path, adapter: Path, tmp_path: Path):
        PeftModel.from_pretrained(fresh(base), adapter).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        tensors.pop(next(iter(tensors)))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.warns(UserWarning, match="missing adapter keys"):
            PeftModel.from_pretrained(fresh(base), tmp_path)


class TestSeveral:
    def test_switch_and_delete(self, base: Path, tmp_path: Path):
        expected = {seed: logits(trained(base, seed=seed)) for seed in (0, 1)}
        trained(base, seed=1).save_pretrained(tmp_path / "one")
        model = trained(base)
        model.load_adapter(tmp_path / "one", "one")
        assert torch.equal(logits(model), expected[0])
        model.set_adapter("one")
        assert torch.equal(logits(model), expected[1])
        assert trainable(model) == {n for n, _ in model.named_parameters() if n.endswith(".one")}
        model.set_adapter("default")
        assert torch.equal(logits(model), expected[0])
        model.save_pretrained(tmp_path / "both")
        assert (
            load_file(tmp_path / "both" / "one" / "adapter_model.safetensors").keys()
            == load_file(tmp_path / "both" / "adapter_model.safetensors").keys()
        )
        with pytest.warns(UserWarning, match="Setting active adapter to one"):
            model.delete_adapter("default")
        assert torch.equal(logits(model), expected[1])
        assert not any(n.endswith(".default") for n, _ in model.named_parameters())
        model.delete_adapter("one")  # after which PEFT's own wrapper cannot be called
        assert torch.equal(logits(model.unload()), logits(fresh(base)))

    def test_add(self, base: Path):
        model = trained(base)
        model.add_adapter("second", OsoraConfig(vectors="s", target_modules=["q_proj"]))
        assert torch.equal(logits(model), logits(trained(base)))
        assert all(name.endswith(".default") for name in trainable(model))
        model.set_adapter("second")
        assert torch.equal(logits(model), logits(fresh(base))), "a new adapter starts at the base"
        assert len(trainable(model)) == 2

    def test_add_while_another_is_merged(self, base: Path):
        model = trained(base)
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"):  # PEFT's way
            model.add_adapter("second", OsoraConfig())
        assert torch.equal(logits(model), logits(trained(base)))
        model.set_adapter("second")
        assert torch.equal(logits(model), logits(fresh(base)))

    def test_two_at_once_are_refused(self, base: Path):
        model = trained(base)
        model.add_adapter("second", OsoraConfig())
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(
            ConfigError, match=r"\['default', 'second'\] are active together.*call set_adapter with one"
        ):
            logits(model)
        with pytest.raises(ConfigError, match="only one OSoRA adapter can be merged"):
            model.merge_adapter()
        assert not any(layer.merged for layer in layers_of(model).values())

    def test_one_per_sample_is_refused(self, base: Path):
        model = trained(base)
        for call in (model, model.generate):
            with pytest.raises(ConfigError, match="one adapter at a time"):
                call(input_ids=token_ids(), adapter_names=["default", "__base__"])

    def test_two_on_different_layers_are_active_together(self, base: Path):
        """Nothing is replaced twice there."""
        model = wrap(base, OsoraConfig(target_modules=["q_proj"]))
        model.add_adapter("second", OsoraConfig(target_modules=["v_proj"]))
        for name in ("default", "second"):
            move(model, name, 0)
        model.base_model.set_adapter(["default", "second"])
        both = logits(model)
        model.merge_adapter(["default", "second"])
        assert torch.equal(logits(model), both)

    def test_disable(self, base: Path):
        model, plain = trained(base), logits(fresh(base))
        expected = logits(model)
        names = trainable(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
            with model.disable_adapter():
                assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), expected)
        assert trainable(model) == names
        model.base_model.disable_adapter_layers()
        assert torch.equal(logits(model), plain)
        model.base_model.enable_adapter_layers()
        assert torch.equal(logits(model), expected)


class TestMerge:
    @pytest.mark.parametrize("safe_merge", [False, True])
    @pytest.mark.parametrize("vectors", ["both", "s", "o"])
    def test_merge_and_unload(self, base: Path, tmp_path: Path, vectors: str, safe_merge: bool):
        model = trained(base, OsoraConfig(vectors=vectors))
        expected = logits(model)
        merged = model.merge_and_unload(safe_merge=safe_merge)
        assert torch.equal(logits(merged), expected)
        assert not layers_of(merged)
        assert all(isinstance(m, QosoraLinear) for m in qosora_modules(merged).values())
        merged.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert_same_tensors(again.state_dict(), merged.state_dict())
        assert torch.equal(logits(again), expected)
        assert torch.equal(logits(get_peft_model(again, OsoraConfig())), expected)

    def test_is_idempotent_and_undone(self, base: Path):
        model = trained(base)
        expected, before = logits(model), {n: p.clone() for n, p in model.named_parameters()}
        fingerprint = model_fingerprint(model)
        model.merge_adapter()
        assert torch.equal(logits(model), expected)
        with pytest.warns(UserWarning, match="All adapters are already merged"):
            model.merge_adapter()
        assert torch.equal(logits(model), expected)
        assert model_fingerprint(model) == fingerprint, "the base under a merged adapter is still that base"
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
        assert_same_tensors(dict(model.named_parameters()), before)
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()

    def test_save_while_merged(self, base: Path, adapter: Path, tmp_path: Path):
        model = trained(base)
        model.merge_adapter()
        model.save_pretrained(tmp_path)
        name = "adapter_model.safetensors"
        assert (tmp_path / name).read_bytes() == (adapter / name).read_bytes()

    def test_disabled_while_merged_is_the_base(self, base: Path):
        model = trained(base)
        expected = logits(model)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(fresh(base)))
        assert torch.equal(logits(model), expected)

    def test_cast_while_merged(self, base: Path):
        model = trained(base)
        before = {n: p.clone() for n, p in model.named_parameters() if "layernorm" not in n and "layers" in n}
        model.merge_adapter()
        model.to(torch.bfloat16)
        model.unmerge_adapter()
        assert_same_tensors({n: p for n, p in model.named_parameters() if n in before}, before)

    def test_unload_gives_the_base(self, base: Path):
        assert torch.equal(logits(trained(base).unload()), logits(fresh(base)))

    @pytest.mark.parametrize("merged", [False, True])
    def test_delta_weight(self, base: Path, merged: bool):
        model = trained(base)
        if merged:
            model.merge_adapter()
        unmerged = fresh(base)
        moved = trained(base).merge_and_unload()
        for name, layer in layers_of(model).items():
            delta = moved.model.get_submodule(name).dequantize() - unmerged.model.get_submodule(name).dequantize()
            assert torch.equal(layer.get_delta_weight("default"), delta)
            assert delta.abs().max() > 0

    def test_delete_while_merged_is_refused(self, base: Path):
        model = trained(base)
        model.merge_adapter()
        with pytest.raises(ValueError, match="while they are merged"):
            model.delete_adapter("default")


class TestUse:
    def test_casts_keep_the_vectors(self, base: Path):
        model = trained(base)
        params = dict(model.named_parameters())
        before = {n: p.detach().clone() for n, p in params.items() if "osora_" in n}
        model.to(torch.bfloat16)
        assert model.base_model.model.lm_head.weight.dtype == torch.bfloat16
        assert layer_dtypes(model) == {torch.uint8, torch.float32}
        assert_same_tensors({n: p for n, p in model.named_parameters() if n in before}, before)
        assert all(param is params[name] for name, param in model.named_parameters()), "optimizers hold them"
        for cast in ("half", "float", "bfloat16"):
            getattr(model, cast)()
            assert_same_tensors({n: p for n, p in model.named_parameters() if n in before}, before)
        train(model, steps=1)

    def test_biases_are_cast(self, tmp_path: Path):
        model = wrap(make_base(tmp_path / "base", "llama-tied-bias")).to(torch.bfloat16)
        assert {layer.bias.dtype for layer in layers_of(model).values()} == {torch.bfloat16}
        assert logits(model).dtype == torch.bfloat16

    def test_prepared_for_kbit_training_by_habit(self, tied: Path):
        """PEFT turns 16-bit parameters into float32 there; needless here, but harmless."""
        expected = model_fingerprint(fresh(tied))
        model = prepare_model_for_kbit_training(fresh(tied))
        assert model_fingerprint(model) == expected
        model = get_peft_model(model, OsoraConfig())
        assert all("osora_" in name for name in trainable(model))
        before = logits(model)
        train(model)
        assert not torch.equal(logits(model), before)

    @pytest.mark.parametrize("input_grads", [False, True])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, base: Path, reentrant: bool, input_grads: bool):
        def gradients(model: Any) -> dict[str, torch.Tensor]:
            model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
            return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

        expected = gradients(trained(base))
        model = trained(base)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if input_grads or reentrant:
            model.enable_input_require_grads()
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            assert torch.equal(found[name], grad), name

    def test_deepcopy(self, base: Path):
        model = trained(base)
        other = copy.deepcopy(model)
        expected = logits(model)
        assert torch.equal(logits(other), expected)
        move(other, "default", 5)
        other.merge_adapter()
        assert torch.equal(logits(model), expected)
        assert_same_tensors(copy.deepcopy(model.state_dict()), dict(model.state_dict()))

    def test_generation_with_cache(self, base: Path):
        model = trained(base)
        options = {"input_ids": token_ids(), "max_new_tokens": 8, "do_sample": False}
        with_cache = model.generate(**options, use_cache=True)
        assert torch.equal(with_cache, model.generate(**options, use_cache=False))
        assert torch.equal(with_cache, trained(base).merge_and_unload().generate(**options))

    def test_names_itself(self, base: Path):
        text = repr(next(iter(layers_of(wrap(base)).values())))
        assert text.startswith("osora.OsoraLayer(")
        assert "rank=8" in text
