"""The command line: what it prints, what it returns, and that it never shows a traceback for a user's mistake."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from classifiers import make_bert, temperatures
from tiny import make_base, make_checkpoint, perturbed, sums, write_jsonl

import qosora
from qosora import cli
from qosora.base.load import load_base
from qosora.cli.output import size, table
from qosora.config import QosoraConfig
from qosora.training.config import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a base, and data; the tests add to it."""
    folder = tmp_path_factory.mktemp("cli")
    make_base(folder / "base", make_checkpoint(folder / "source", "llama-text"), QosoraConfig(rank=16))
    write_jsonl(folder / "train.jsonl", sums(24))
    write_jsonl(folder / "test.jsonl", sums(8, 24))
    return folder


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    code = cli.main(
        ["train", "--model", str(folder / "base"), "--data", str(folder / "train.jsonl"), "--max-steps", "2",
         "--output-dir", str(folder / "adapter"), "--eval-data", str(folder / "test.jsonl"), "--no-progress"]
    )  # fmt: skip
    assert code == 0
    return folder / "adapter"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as exit:  # argparse's own
        code = int(str(exit.code))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["quantize", "--help"], ["--version"]], ids=" ".join)
def test_help_does_not_import_torch(argv: list[str]) -> None:
    code = (
        "import sys; from qosora import cli\n"
        f"try: cli.main({argv!r})\n"
        "except SystemExit as exit: assert not exit.code\n"
        "assert not {'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "qosora" in done.stdout


def test_every_command_has_help_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("quantize", "train", "eval", "generate", "export", "inspect", "demo"):
        code, out, _ = run(capsys, name, "--help")
        assert code == 0
        assert f"  qosora {name}" in out.partition("examples:")[2]


def test_train_has_a_flag_for_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "train", "--help")
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in out


def test_examples_in_help_parse() -> None:
    parser = cli.build_parser()
    for module in cli._COMMANDS:
        for line in module.EXAMPLES.replace("\\\n", " ").splitlines():
            words = shlex.split(line.rpartition("|")[2])
            assert words[0] == "qosora" or words[:2] == ["accelerate", "launch"]
            parser.parse_args(words[words.index("qosora") + 1 :])


def test_quantize(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "quantize", folder / "source", tmp_path / "base", "--rank", 8, "--rank-pattern",
                       "q_proj=4", "--report", tmp_path / "report.json")  # fmt: skip
    assert code == 0
    assert "down_proj" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert {layer["rank"] for layer in report["layers"]} == {4, 8}
    code, out, _ = run(capsys, "inspect", tmp_path / "base")
    assert code == 0
    assert "plain nf4" in out
    code, out, _ = run(capsys, "inspect", tmp_path / "base", "--json")
    assert json.loads(out)["decomposed_layers"] == 14


def test_train_evaluate_generate_export(adapter: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", adapter)
    assert code == 0
    assert "s and o of 14 layers" in out

    code, out, _ = run(capsys, "eval", adapter, "--data", folder / "test.jsonl", "--json", "--exact-match",
                       "--max-new-tokens", 4)  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert found["examples"] == 8
    assert 0 <= found["exact_match"] <= 1
    code, out, _ = run(capsys, "eval", adapter, "--data", folder / "test.jsonl")
    assert f"loss         {found['loss']:.4f}" in out

    code, out, _ = run(capsys, "generate", adapter, "--prompt", "1 + 2 =", "--prompt", "2 + 4 =",
                       "--max-new-tokens", 3, "--json")  # fmt: skip
    assert code == 0
    assert [answer["prompt"] for answer in json.loads(out)] == ["1 + 2 =", "2 + 4 ="]

    code, out, _ = run(capsys, "export", adapter, folder / "export", "--dtype", "float32", "--json")
    assert code == 0
    assert json.loads(out)["dtype"] == "float32"
    assert (folder / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_ways_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "quantize", folder / "source", tmp_path / "base", "--rank", 8)[0] == 0
    perturbed(load_base(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    merged = ["export", tmp_path / "base", tmp_path / "merged", "--adapter", f"{tmp_path / 'adapter'}=0.5"]
    code, out, _ = run(capsys, *merged, "--onto", "original", "--verify")
    assert code == 0
    assert "left behind: the base's quantization error, 0.0" in out
    assert re.search(r"verified on \d+ tokens against the original model with the adapter: .* 100.0% equal top", out)
    lora = ["export", tmp_path / "adapter", tmp_path / "lora", "--base", tmp_path / "base", "--format", "lora"]
    code, out, _ = run(capsys, *lora, "--rank-reduce", 2, "--dtype", "bfloat16")
    assert code == 0
    assert re.search(rf"rank 2, [\d.]+ KiB in bfloat16, a LoRA of {folder / 'source'}\nreducing .* [1-9][\d.]+%", out)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--format", "lora", "--onto", "original"], "--onto says nothing about --format lora"),
        (["--format", "lora", "--max-shard-size", "1"], "--max-shard-size says nothing"),
        (["--rank-reduce", "4"], "--rank-reduce says nothing about --format merged"),
        (["--format", "lora"], "is a base; name the adapter"),
        (["--adapter", "=0.5"], "DIR=WEIGHT"),
        (["--adapter", "x=nan"], "DIR=WEIGHT"),
        (["--adapter", "x=1", "--adapter", "x=2"], "the same folder twice"),
        (["--onto", "original"], "name its folder, hub id or GGUF file with --original"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_export_options_that_make_no_sense(
    options: list[str], part: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "export", folder / "base", tmp_path / "out", *options)
    assert (code, out) == (2, "")
    assert part in err
    assert not (tmp_path / "out").exists()


def test_flags_win_over_the_config_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {folder / 'base'}\ndata: {folder / 'train.jsonl'}\nmax_steps: 7\nlearning_rate: 1e-3\n"
    )
    code, out, _ = run(capsys, "train", "--config", tmp_path / "run.yaml", "--max-steps", 1, "--output-dir",
                       tmp_path / "adapter", "--trl", "dataloader_drop_last=true", "--json")  # fmt: skip
    assert code == 0
    assert json.loads(out)["steps"] == 1
    saved = TrainConfig.load(tmp_path / "adapter" / "train_config.yaml")
    assert (saved.max_steps, saved.learning_rate, saved.trl) == (1, 1e-3, {"dataloader_drop_last": True})


def bad_data(tmp_path: Path) -> dict[str, Path]:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("empty", "broken", "column", "long")}
    files["empty"].write_text("")
    files["broken"].write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    files["column"].write_text('{"question": "a", "answer": "b"}\n')
    files["long"].write_text(json.dumps({"prompt": "a" * 400, "completion": "b"}) + "\n")
    return {**files, "missing": tmp_path / "missing.jsonl"}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("empty", "empty.jsonl"),
        ("broken", "line 2"),
        ("column", "question"),
        ("long", "max_length"),
        ("missing", "missing.jsonl"),
    ],
)
def test_bad_data(name: str, part: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "train", "--model", folder / "base", "--data", bad_data(tmp_path)[name],
                         "--output-dir", tmp_path / "out", "--max-length", 64)  # fmt: skip
    assert code in (1, 2)
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("qosora train: error: ")
    assert part in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "code", "part"),
    [
        (["quantize", "{source}", "{base}"], 1, "exists and is not empty"),
        (["quantize", "{source}", "{out}", "--rank", "0"], 2, "rank must be an integer of at least 1, got 0"),
        (["quantize", "{source}", "{out}", "--rank-pattern", "q_proj"], 2, "NAME=RANK"),
        (["quantize", "{base}", "{out}"], 1, "quantized already (qosora)"),
        (["train", "--model", "{source}", "--data", "{train}", "--output-dir", "{out}"], 1, "qosora quantize"),
        (["train", "--model", "{base}", "--data", "{train}"], 2, "output_dir is missing"),
        (["train", "--config", "{out}"], 2, "No such file"),
        (["quantize", "{source}", "{out}", "--device", "gpu"], 2, "device 'gpu' cannot be used here"),
        (
            ["train", "--model={base}", "--data={train}", "--output-dir={out}", "--schedule=warmup_stable_decay"],
            2,
            "set num_decay_steps",
        ),
        (["eval", "{out}", "--data", "{train}"], 1, "{out}"),
        (["eval", "{base}", "--data", "{train}", "--batch-size", "0"], 2, "an integer of at least 1, got '0'"),
        (["generate", "{base}", "--prompt", "x", "--batch-size", "many"], 2, "an integer of at least 1, got 'many'"),
        (["generate", "{base}", "--prompt", ""], 2, "no prompt"),
        (["generate", "{base}", "--prompt-file", "{out}"], 1, "No such file"),
        (["export", "{source}", "{out}"], 1, "not a qosora base"),
        (["inspect", "{out}"], 1, "neither"),
        (["inspect"], 2, "required"),
        (["fly"], 2, "invalid choice"),
    ],
)
def test_mistakes(
    argv: list[str], code: int, part: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "source": folder / "source",
        "base": folder / "base",
        "train": folder / "train.jsonl",
        "out": tmp_path / "out",
    }
    status, out, err = run(capsys, *(a.format(**places) for a in argv))
    assert status == code
    assert out == ""
    assert part.format(**places) in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_output_that_lacks_characters(folder: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    argv = ["generate", str(folder / "base"), "--prompt", "Привет", "--prompt", "Hello", "--max-new-tokens", "1"]
    assert cli.main(argv) == 0
    stream.flush()
    text = written.getvalue().decode(encoding)
    assert text.startswith("> \\u041f\\u0440\\u0438")
    assert "\n> Hello\n" in text


def test_what_nobody_foresaw_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise LookupError("no such thing\nat all")

    monkeypatch.setattr("qosora.base.describe.describe", fail)
    code, _, err = run(capsys, "inspect", folder / "base")
    assert code == 1
    assert err == (
        "qosora inspect: error: LookupError: no such thing (unforeseen: --verbose shows where; please report it)\n"
    )


def test_table_and_size() -> None:
    assert table(["a", "bb"], [["x", 1], ["yyy", 22]]) == "a    bb\n---  --\nx     1\nyyy  22"
    assert [size(n) for n in (0, 1023, 1536, 5 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3072.0 GiB",
    ]


@pytest.mark.parametrize("option", ["rank", "svd", "svd_iterations", "quant_type", "blocksize"])
def test_help_of_quantize_names_the_defaults(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = " ".join(run(capsys, "quantize", "--help")[1].split()).partition("options:")[2]
    text = options.partition(f"--{option.replace('_', '-')} ")[2].partition(" --")[0]
    assert f"(default: {getattr(QosoraConfig(), option)})" in text


def test_versions_for_a_report(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["qosora"] == qosora.__version__
    assert found["packages"]["torch"]
    assert {"python", "system", "machine"} <= found.keys()


def test_the_schema_is_printed_without_a_run(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["model", "data", "output_dir"]


def test_a_shell_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Commands, options, choices, and files where an option takes a place."""
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["--print-completion", "bash"])
    script = tmp_path / "qosora.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "my-model").mkdir()

    def completed(*words: str) -> set[str]:
        line = f"COMP_WORDS=(qosora {shlex.join(words)}); COMP_CWORD={len(words)}; _shtab_qosora; "
        command = ["bash", "-c", f'source {script}; {line} printf "%s\\n" "${{COMPREPLY[@]}}"']
        return set(subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout.split())

    assert completed("qu") == {"quantize"}
    assert {"--method", "--batch-size"} <= completed("train", "--")
    assert completed("train", "--method", "d") == {"dpo"}
    assert completed("export", "my") == {"my-model"}


def test_a_classifier_from_checkpoint_to_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_bert(tmp_path / "bert")
    write_jsonl(tmp_path / "train.jsonl", temperatures(16))
    source, base, data = (str(tmp_path / name) for name in ("bert", "base", "train.jsonl"))
    assert cli.main(["quantize", source, base, "--rank", "8", "--labels", "cold", "warm"]) == 0
    assert "qosora train --method classify --model" in capsys.readouterr().out
    assert cli.main(["inspect", base]) == 0
    assert "classes        cold, warm" in capsys.readouterr().out
    run = ["train", "--method", "classify", "--model", base, "--data", data, "--output-dir", str(tmp_path / "run")]
    assert cli.main([*run, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "[[ -> cold]]" in shown
    assert "16 examples" in shown
    assert cli.main([*run, "--max-steps", "2", "--no-progress"]) == 0
    last = capsys.readouterr().out
    assert "next: qosora export" in last
    assert cli.main(["eval", str(tmp_path / "run"), "--data", data]) == 0
    scores = capsys.readouterr().out
    assert "accuracy" in scores
    assert "cold" in scores
    assert cli.main(["eval", str(tmp_path / "run"), "--data", data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == 16
    assert cli.main(["eval", str(tmp_path / "run"), "--data", data, "--exact-match"]) == 2
    assert cli.main(["quantize", source, str(tmp_path / "b"), "--labels", "a", "b", "--check", data]) == 2
    assert cli.main(["generate", str(tmp_path / "run"), "--prompt", "x"]) == 1


def test_ctrl_c_that_becomes_another_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(args: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type") from None

    monkeypatch.setattr("qosora.cli.inspect.run", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs tests beside it
    try:
        assert cli.main(["inspect", "x"]) == 130
        assert capsys.readouterr().err == "qosora inspect: interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
