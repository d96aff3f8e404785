"""Checkpoints in every format against transformers' own loading of them, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from tiny_bases import FAMILIES, VOCAB, make_checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion

from qosora.checkpoints import folders
from qosora.checkpoints.folders import local_folder
from qosora.checkpoints.source import TensorReader, open_source
from qosora.errors import CheckpointError

State = dict[str, torch.Tensor]


def read(reader: TensorReader) -> State:
    """All tensors, each held against what the reader says of it."""
    state = {}
    for name in reader.names():
        tensor = reader.tensor(name)
        assert tensor.is_contiguous()
        assert (tuple(tensor.shape), tensor.dtype) == (reader.shape(name), reader.dtype(name))
        assert reader.file(name).is_file()
        state[name] = tensor
    return state


def assert_equal(got: State, expected: State) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


# Pickled weights.


def pickle_weights(source: Path, *, shards: int = 1, legacy: bool = False) -> State:
    """Replace a folder's safetensors by pickled weights, and return them."""
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    options = {"_use_new_zipfile_serialization": not legacy}
    if shards == 1:
        torch.save(state, source / "pytorch_model.bin", **options)
        return state
    files = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: state[name] for name in state if files[name] == file}, source / file, **options)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return state


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.bfloat16), ("llama-tied-bias", torch.float16), ("gpt2", torch.float32)]
)
def test_pickled_weights(family: str, dtype: torch.dtype, shards: int, legacy: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source", family, dtype=dtype)
    state = pickle_weights(folder, shards=shards, legacy=legacy)
    with open_source(folder) as source:
        assert_equal(read(source.reader), state)
        assert source.origin == folder
        assert source.files == tuple(sorted(folder.glob("pytorch_model*.bin")))


def test_pickled_tensors_that_share_memory_or_have_strides(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    pickle_weights(folder)
    flat = torch.arange(24.0)
    state = {"a": flat.view(4, 6), "tied": flat.view(4, 6), "part": flat[5:9], "transposed": torch.randn(3, 5).T}
    state["parameter"] = torch.nn.Parameter(torch.ones(2))
    torch.save(state, folder / "pytorch_model.bin")
    with open_source(folder) as source:
        got = read(source.reader)
    assert_equal(got, state)
    assert len({tensor.untyped_storage().data_ptr() for tensor in got.values()}) == len(got)
    assert not got["parameter"].requires_grad


def test_one_shard_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "source")
    files = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(pickle_weights(folder, shards=3))}
    opened: list[str] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: opened.append(path.name) or load(path, **options))
    with open_source(folder) as source:
        assert opened == []
        for name in sorted(files, key=files.__getitem__):
            source.reader.tensor(name)
        for name in files:  # known from the first opening
            source.reader.shape(name)
    assert opened == sorted(set(files.values()))


def test_safetensors_win(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    torch.save({"other": torch.ones(1)}, folder / "pytorch_model.bin")
    with open_source(folder) as source:
        assert_equal(read(source.reader), load_file(folder / "model.safetensors"))
        assert source.files == (folder / "model.safetensors",)


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_that_runs_code_is_refused(save: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    pickle_weights(folder)
    save({"weight": Attack(tmp_path / "trace")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin names posix.mkdir, .* get the model as safet"):
        open_source(folder).__enter__()
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("keep", [0, 1, 50, 2000, -100])
def test_a_truncated_pickle_is_refused(keep: int, legacy: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    pickle_weights(folder, legacy=legacy)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: not a whole file of pickled tensors .*another copy"):
        open_source(folder).__enter__()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "expected tensors by name, got Tensor"),
        ({"model": {"weight": torch.ones(3)}}, "expected tensors by name, got dict as 'model'"),
        ({"epoch": 3}, "got int as 'epoch'"),
        ({"weight": torch.eye(3).to_sparse()}, "got Tensor as 'weight'"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    pickle_weights(folder)
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        open_source(folder).__enter__()


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    pickle_weights(folder, shards=2)
    index = folder / "pytorch_model.bin.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    for change, message in [
        ({"model.norm.weight": "../secret.bin"}, "the index is damaged"),
        ({"model.norm.weight": "absent.bin"}, "names absent.bin, which is missing"),
    ]:
        index.write_text(json.dumps({"weight_map": whole | change}))
        with pytest.raises(CheckpointError, match=message):
            open_source(folder).__enter__()
    index.write_text(json.dumps({"weight_map": whole | {"extra.weight": "pytorch_model-0.bin"}}))
    with open_source(folder) as source:
        for call in (source.reader.tensor, source.reader.shape):
            with pytest.raises(CheckpointError, match=r"pytorch_model-0.bin: no tensor 'extra.weight'"):
                call("extra.weight")
        with pytest.raises(CheckpointError, match="no tensor 'none'"):
            source.reader.tensor("none")


# What is quantized already, or is not there.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: edit(f / "config.json", quantization_config={"quant_method": "fp8"}), "fp8"),
        (lambda f: (f / "quantize_config.json").write_text("{}"), "as quantize_config.json says"),
        (lambda f: (f / "quant_config.json").write_text("{}"), "as quant_config.json says"),
        (lambda f: add(f, "model.layers.0.mlp.up_proj.qweight"), "it holds model.layers.0.mlp.up_proj.qweight"),
        (lambda f: add(f, "model.layers.0.mlp.up_proj.weight.absmax"), r"it holds .*\.absmax"),
        (lambda f: add(f, "model.layers.0.mlp.up_proj.weight_scale_inv"), r"it holds .*\.weight_scale_inv"),
    ],
)
def test_what_is_quantized_already_is_refused(change: Callable[[Path], Any], reason: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    change(folder)
    with pytest.raises(CheckpointError, match=f"quantized already \\({reason}.*original 16-bit") as caught:
        open_source(folder).__enter__()
    assert str(folder) in str(caught.value)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def add(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {name: torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights there"):
        open_source(folder).__enter__()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no model there that transformers can load"):
        open_source(folder).__enter__()
    (folder / "tiny.gguf").touch()
    with pytest.raises(CheckpointError, match=r"name the file, as .*tiny\.gguf"):
        open_source(folder).__enter__()
    with pytest.raises(CheckpointError, match="no such file"):
        open_source(folder / "other.gguf").__enter__()


@pytest.mark.parametrize(("present", "downloads"), [("model-00001-of-00002.safetensors", 1), ("README.md", 2)])
def test_pickled_weights_are_downloaded_only_without_safetensors(
    present: str, downloads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / present).touch()
    patterns: list[list[str]] = []

    def download(source: str, *, allow_patterns: list[str], **_: Any) -> str:
        patterns.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(folders, "snapshot_download", download)
    assert local_folder("owner/model", with_pickled=True) == tmp_path
    assert ["pytorch_model*.bin" in each for each in patterns] == [False, True][:downloads]
    local_folder("owner/model")
    assert "pytorch_model*.bin" not in patterns[-1]


# GGUF files.

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
#: Architecture, and variant, -> maker of a model that the metadata of a GGUF file tell all about.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, intermediate_size=256)),  # a row of a K-quant has 256
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, intermediate_size=56, tie_word_embeddings=True)),
    "gemma3": FAMILIES["gemma3"],
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)),
    "gpt2-untied": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False)
    ),
    "qwen3moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_SIZES, intermediate_size=56, head_dim=16, moe_intermediate_size=768, num_experts=3, num_experts_per_tok=2
        )
    ),
    "lfm2": lambda: Lfm2ForCausalLM(
        Lfm2Config(
            **_SIZES, intermediate_size=64, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]
        )
    ),
}
_TOKENS = ["<s>", "</s>", *(chr(33 + i) for i in range(VOCAB - 3)), "!!"]


def make_model(name: str) -> PreTrainedModel:
    """A random model, its biases and norms not at zero and one."""
    model = MODELS[name]()
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)
    return model


def write_gguf(
    path: Path,
    name: str,
    model: PreTrainedModel,
    kinds: dict[str, Kind] | None = None,
    *,
    tokenizer: bool = True,
    head_counts: bool = True,
    extra: Callable[[gguf.GGUFWriter], Any] | None = None,
) -> Path:
    """Write a model as llama.cpp's converter does, its tensors as F32 or as `kinds` says by part of the name."""
    architecture = name.partition("-")[0]
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        if head_counts:
            writer.add_head_count_kv([0, 2] if architecture == "lfm2" else 2)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
        writer.add_rope_freq_base(10000.0)
        writer.add_key_length(getattr(config, "head_dim", None) or 8)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    elif architecture == "lfm2":
        writer.add_shortconv_l_cache(config.conv_L_cache)
    elif architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if tokenizer:
        add_tokenizer(writer)
    else:
        writer.add_vocab_size(VOCAB)
    for key, values in gguf_tensors("llama" if architecture == "mpt" else architecture, model).items():
        kind = next((k for part, k in (kinds or {}).items() if part in key), Kind.F32)
        data = random_blocks(values.shape, kind) if kind == Kind.Q4_K else gguf.quantize(values, kind)
        writer.add_tensor(key, data, raw_dtype=kind)
    if extra:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(_TOKENS)
    writer.add_token_types([3, 3, *[1] * (VOCAB - 2)])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")


def random_blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Blocks of a kind that the gguf package cannot quantize to; their two scales are 0.5."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    data[..., :4] = np.frombuffer(np.array([0.5, 0.5], np.float16).tobytes(), np.uint8)
    return data.reshape(shape[0], -1)


def gguf_tensors(architecture: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """A model's tensors as llama.cpp names and lays them out."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys)
    found: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        values = tensor.numpy()
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            found[f"blk.{layer}.ffn_gate_exps.weight"], found[f"blk.{layer}.ffn_up_exps.weight"] = np.split(
                values, 2, axis=1
            )
            continue
        stem, _, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
        new = f"{names.get_name(stem)}.{suffix}"
        if architecture == "llama" and (".attn_q." in new or ".attn_k." in new):
            heads = model.config.num_attention_heads if ".attn_q." in new else model.config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        elif architecture == "gemma3" and "norm" in new:
            values = values + 1
        elif architecture == "gpt2" and values.ndim == 2 and new.startswith("blk"):
            values = values.T
        elif architecture == "lfm2" and values.ndim == 3:
            values = values[:, 0]
        found[new] = np.ascontiguousarray(values)
    return found


def loaded_by_transformers(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model


def as_on_disk(model: PreTrainedModel, state: State) -> State:
    """The tensors that an ordinary checkpoint has, by their names there."""
    kept = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
    converted: State = revert_weight_conversion(model, kept)
    return converted


@pytest.mark.parametrize("name", MODELS)
def test_gguf(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    file = write_gguf(tmp_path / "tiny.gguf", name, model)
    with open_source(file) as source:
        got = read(source.reader)
        config = json.loads((source.origin / "config.json").read_text())
        assert source.files == (file,)
    assert not source.origin.exists()
    reference = loaded_by_transformers(file)
    assert_equal(got, as_on_disk(model, reference.state_dict()))
    exactly = not name.startswith("gemma3")  # 1 was added to its norms, and they were rounded
    for key, tensor in as_on_disk(model, model.state_dict()).items():
        assert torch.allclose(got[key], tensor, rtol=0, atol=0 if exactly else 1e-7), key

    expected = json.loads(reference.config.to_json_string())
    assert config["dtype"] == "bfloat16"
    apart = {"dtype", "architectures", "quantization_config"}
    assert {k: v for k, v in config.items() if k not in apart} == {k: v for k, v in expected.items() if k not in apart}


KINDS = {"attn_q": Kind.Q8_0, "attn_k": Kind.Q5_0, "ffn_down": Kind.Q4_K, "ffn_up": Kind.F16, "ffn_gate": Kind.BF16}


@pytest.mark.parametrize("chunk", [1 << 20, 300])
def test_quantized_gguf(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qosora.checkpoints.gguf_file._CHUNK_NUMEL", chunk)
    model = make_model("llama")
    file = write_gguf(tmp_path / "tiny.gguf", "llama", model, KINDS)
    with open_source(file) as source:
        got = read(source.reader)
    assert_equal(got, loaded_by_transformers(file).state_dict())
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(got[up], model.get_parameter(up).half().float())


def test_a_gguf_tensor_costs_its_float32_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qosora.checkpoints.gguf_file._CHUNK_NUMEL", 1024)
    model = LlamaForCausalLM(LlamaConfig(**_SIZES, intermediate_size=8192))
    file = write_gguf(tmp_path / "tiny.gguf", "llama", model, {"ffn": Kind.Q8_0})
    with open_source(file) as source:
        source.reader.tensor("model.layers.0.mlp.up_proj.weight")
        tracemalloc.start()
        for name in source.reader.names():
            source.reader.tensor(name)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1.2 * 8192 * 32 * 4


def test_the_tokenizer_is_that_of_the_gguf_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "llama", make_model("llama"))
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    (tmp_path / "tokenizer.json").write_text("another model's")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "another"}')
    with open_source(file) as source:
        tokenizer = AutoTokenizer.from_pretrained(source.origin)
        texts = [path.read_text() for path in source.origin.iterdir()]
    assert tokenizer("!!!ABC</s>")["input_ids"] == expected("!!!ABC</s>")["input_ids"]
    assert tokenizer.chat_template == expected.chat_template == "{{ messages }}"
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<s>", 1)
    assert not any(tempfile.gettempdir() in text for text in texts)


def test_a_gguf_file_without_a_tokenizer(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "llama", make_model("llama"), tokenizer=False)
    with open_source(file) as source:
        assert {path.name for path in source.origin.iterdir()} == {"config.json", "generation_config.json"}
        assert AutoConfig.from_pretrained(source.origin).vocab_size == VOCAB


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 1000, 4000, -1000, -1])
def test_a_truncated_gguf_file_is_refused(keep: int, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "llama", make_model("llama"))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tiny.gguf: .* get another copy"):
        open_source(file).__enter__()


def test_gguf_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, architecture: str = "llama", **options: Any) -> None:
        file = write_gguf(tmp_path / "tiny.gguf", architecture, make_model("llama"), **options)
        with pytest.raises(CheckpointError, match=message):
            open_source(file).__enter__()

    refused("one of 3 parts .* llama-gguf-split --merge tiny.gguf", extra=lambda w: w.add_uint16("split.count", 3))
    integers = np.ones((2, 32), np.int8)
    refused("cannot read blk.0.other", extra=lambda w: w.add_tensor("blk.0.other", integers, raw_dtype=Kind.I8))
    experts = np.ones((4, 56, 32), np.float32)  # as of Mixtral, which llama.cpp calls llama, too
    refused(
        "blk.0.ffn_up_exps.weight stacks 4 experts", extra=lambda w: w.add_tensor("blk.0.ffn_up_exps.weight", experts)
    )
    refused("cannot read this 'mpt' model", architecture="mpt")
    refused(
        r"attn_k.weight has shape \(16, 32\), but .* \(32, 32\)",
        extra=lambda w: w.add_head_count_kv(4),
        head_counts=False,
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"needs the gguf package; pip install 'qosora\[gguf\]'")


@pytest.mark.parametrize("header", [b"GGML" + bytes(20), b"GGUF\x00\x00\x00\x03" + bytes(20), b"GGUF\x04" + bytes(23)])
def test_other_files_are_not_taken_for_gguf(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(header)
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        open_source(tmp_path / "tiny.gguf").__enter__()
