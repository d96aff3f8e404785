"""The examples run, on the demo's model and data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from tiny import TEXT_VOCAB, make_base, make_checkpoint, make_tokenizer, perturbed, sums, write_jsonl
from tokenizers import processors
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from qosora import QosoraConfig, quantize
from qosora.base.load import load_base
from qosora.checkpoints.stored_config import adapter_config
from qosora.demo import assets
from qosora.training.rewards import load_rewards

ROOT = Path(__file__).parent.parent
#: Hertz of the tone that stands for a word.
TONES = {"do": 300, "mi": 900, "so": 2700}


@pytest.mark.slow
def test_the_qlora_shaped_script(tmp_path: Path) -> None:
    with assets() as source:
        command = [sys.executable, ROOT / "examples" / "finetune_7b.py", "--model", source / "model"]
        command += ["--data", source / "train.jsonl", "--rank", "16", "--max-steps", "2", "--max-length", "128"]
        command += ["--base-dir", tmp_path / "base", "--output-dir", tmp_path / "adapter"]
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "trainable params: 5,568" in run.stdout, run.stdout
    assert adapter_config(tmp_path / "adapter").vectors == "both"


@pytest.mark.slow
def test_the_ways_out(tmp_path: Path) -> None:
    quantize(make_checkpoint(tmp_path / "original", "llama-text"), tmp_path / "base", QosoraConfig(rank=8))
    perturbed(load_base(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    command = [sys.executable, str(ROOT / "examples" / "export_merged.py"), "adapter", "out", "--base", "base"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["out/merged", "out/lora", "LlamaForCausalLM", "PeftModelForCausalLM"]  # fmt: skip  # noqa: E501
    assert "reference='original model with the adapter'" in lines[1]


@pytest.mark.slow
def test_profile_memory(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    command = [sys.executable, ROOT / "examples" / "profile_memory.py", base, "--seq-len", "16"]
    run = subprocess.run([*map(str, command), "--output-dir", "out"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "+0.00%" in run.stdout, run.stdout
    assert (tmp_path / "out" / "measured" / "memory.html").is_file()


@pytest.mark.slow
def test_the_configuration_for_two_cards(tmp_path: Path) -> None:
    """In one process, on a tiny base: that it says what it means is for the tests of several processes."""
    base = make_base(tmp_path / "base", make_checkpoint(tmp_path / "source", "llama-text"))
    data = write_jsonl(tmp_path / "train.jsonl", sums(16))
    command = [
        sys.executable,
        "-m",
        "qosora",
        "train",
        "--config",
        ROOT / "examples" / "two_cards.yaml",
        "--model",
        base,
    ]
    command += ["--data", data, "--output-dir", tmp_path / "adapter", "--max-steps", "1", "--no-progress"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert adapter_config(tmp_path / "adapter").vectors == "both"


@pytest.mark.slow
def test_a_tiny_t5_translates(tmp_path: Path) -> None:
    """Words by a dictionary; said by plain transformers, from the merged weights."""
    raw = make_tokenizer(chat=False).backend_tokenizer
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 257)])
    words = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<s>")
    words.save_pretrained(tmp_path / "t5")
    torch.manual_seed(0)
    config = T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=TEXT_VOCAB, pad_token_id=256,
        eos_token_id=257, decoder_start_token_id=256, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    dictionary = {"one": "eins", "two": "zwei", "red": "rot", "dog": "hund", "sun": "sonne", "go": "geh"}
    pairs = [{"source": word, "target": said} for word, said in dictionary.items()] * 24
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    command = [sys.executable, ROOT / "examples" / "translate.py", "--model", "t5", "--data", data, "--rank", "16"]
    command += ["--output-dir", "adapter", "--merged-dir", "merged", "--epochs", "12", "--batch-size", "8"]
    command += ["--learning-rate", "5e-2"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    inputs = words([row["source"] for row in pairs[:6]], return_tensors="pt", padding=True)
    written = plain.generate(**inputs, max_new_tokens=12)
    assert words.batch_decode(written, skip_special_tokens=True) == [row["target"] for row in pairs[:6]]


def note(hertz: float) -> torch.Tensor:
    """Half a second of a tone, a little off, with noise."""
    times = torch.arange(8000) / 16000
    return torch.sin(2 * torch.pi * hertz * (1 + 0.02 * torch.randn(())) * times) + 0.05 * torch.randn(8000)


@pytest.mark.slow
def test_a_tiny_whisper_writes_what_it_hears(tmp_path: Path) -> None:
    """Words said as tones; written by plain transformers, from the merged weights."""
    raw = make_tokenizer(chat=False).backend_tokenizer
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 257)])
    words = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<s>")
    extractor = WhisperFeatureExtractor(chunk_length=1)  # seconds
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=TEXT_VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=50,
        max_target_positions=32, pad_token_id=256, bos_token_id=257, eos_token_id=257, decoder_start_token_id=256,
        begin_suppress_tokens=None, init_std=0.2,
    )  # fmt: skip
    for part in (words, extractor, WhisperForConditionalGeneration(config)):
        part.save_pretrained(tmp_path / "whisper")
    rows = []
    for k in range(48):
        word = [*TONES][k % 3]
        soundfile.write(tmp_path / f"{k}.wav", note(TONES[word]).numpy(), 16000)
        rows.append({"audio": f"{k}.wav", "text": word})
    data = write_jsonl(tmp_path / "said.jsonl", rows)
    command = [sys.executable, ROOT / "examples" / "transcribe.py", "--model", "whisper", "--data", data]
    command += ["--output-dir", "adapter", "--merged-dir", "merged", "--epochs", "30", "--batch-size", "8"]
    command += ["--rank", "16", "--learning-rate", "5e-2"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    plain = WhisperForConditionalGeneration.from_pretrained(tmp_path / "merged")
    heard = [note(hertz).numpy() for hertz in TONES.values()]
    inputs = extractor(heard, sampling_rate=16000, return_tensors="pt")
    written = plain.generate(**inputs, max_new_tokens=8)
    assert words.batch_decode(written, skip_special_tokens=True) == [*TONES]


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("That is 3*4 = <<3*4=12>>12 and 12/2 = <<12/2=6>>6.\n#### 6", 1.0),
        ("<<3*4=13>>13 and <<13-3=10>>10.\n#### 10", 0.5),
        ("<<(3+4)*1,000=7000>>7000\n#### 7,000", 1.0),
        ("<<3*4=12>>12 and so on", 0.0),
        ("<<3*4=12>>12\n#### 3", 0.0),
        ("<<5*5=25>>25\n#### 25", 0.0),
        ("<<3=3>>\n#### 3", 0.0),
        ("#### 3", 0.0),
        ("<<3**4=81>> <<4**4**4**4=4>> <<3/(3-3)=4>> <<f(3)=3>> <<3(4)=12>> <<x+3=3>> <<03+1=4>>\n#### 4", 0.0),
        (f"<<{'(' * 9999}3+4=7>> <<{'-' * 9999}3+4=7>> <<3+\0=3>> <<3+4'=7>> <<=>> <<3+4=>>", 0.0),
    ],
)
def test_the_reward_of_sums(answer: str, worth: float) -> None:
    (reward,) = load_rewards([f"{ROOT / 'examples' / 'gsm8k_reward.py'}:sums"], ["prompt", "answer"])
    question = "He has 3 bags of 4 apples, gives half of them away, and 1,000 more."
    assert reward(prompts=[question], completions=[answer], answer=["#### 6"]) == [worth]
