"""`python -m modelzoo.convert`: help that teaches, one line for what is wrong, and a folder that opens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import modelzoo
from modelzoo.convert import FORMATS
from modelzoo.convert import __main__ as entry
from tests import megatron_state as megatron
from tests import torch_files
from tests.gptj_names import CONFIG, gptj_arrays

ROOT = Path(__file__).parents[1]


def fails(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        entry.main([str(arg) for arg in args])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_runs_as_a_program(tmp_path):
    torch_files.save_archive(tmp_path / "weights.bin", gptj_arrays())
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    (tmp_path / "vocab.json").write_text("{}")
    flags = ["--from", "torch", "--input", "weights.bin", "--output", "new/out", "--config", "c.json"]
    command = [sys.executable, "-m", "modelzoo.convert", *flags, "--max-shard-size", "10KB"]
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "GPTJForCausalLM: 115 tensors" in done.stdout
    assert "written: new/out" in done.stdout
    assert (tmp_path / "new" / "out" / "vocab.json").exists()
    assert type(modelzoo.from_hf(tmp_path / "new" / "out")[0]) is modelzoo.GPTJForCausalLM


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        entry.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(name in text for name in FORMATS)
    for flag in ("--from", "--input", "--output", "--config", "--dtype", "--max-shard-size", "examples:"):
        assert flag in text


def test_one_line_for_what_is_wrong(tmp_path, capsys):
    file = megatron.save_rank(
        tmp_path / "a.pt", megatron.gpt2_rank(megatron.gpt2_arrays(), 2), 2.0, megatron.options()
    )
    where = ("--input", file, "--output", tmp_path / "out")
    assert "unknown format 'tf'" in fails(capsys, "--from", "tf", *where)
    assert "holds a GPT, not a BERT" in fails(capsys, "--from", "megatron-bert", *where)
    assert "no config.json beside" in fails(capsys, "--from", "torch", *where)
    assert "no shard_0" in fails(
        capsys, "--from", "mesh-transformer-jax", "--input", tmp_path, "--output", tmp_path / "out"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_notes_are_printed(tmp_path, capsys):
    args = megatron.options(layernorm_epsilon=1e-5)
    file = megatron.save_rank(tmp_path / "a.pt", megatron.bert_rank(megatron.bert_arrays(), 2), 2.0, args)
    entry.main(["--from", "megatron-lm", "--input", str(file), "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "note: keeps all 24 rows of the vocabulary" in out
    assert "note: the run had layernorm_epsilon 1e-05" in out


def test_short_conversions_have_no_bar(capsys):
    with entry.progress(10) as advance:
        advance(10)
    with entry.progress(10**12) as advance:  # no terminal here
        advance(10)
    assert capsys.readouterr().err == ""


def test_defects_keep_their_traceback(monkeypatch):
    def broken(flags):
        raise TypeError("a defect")

    monkeypatch.setattr(entry, "run", broken)
    with pytest.raises(TypeError, match="a defect"):
        entry.main(["--from", "torch", "--input", "a", "--output", "b"])


def test_an_interrupt_says_that_nothing_was_written(monkeypatch, capsys):
    def interrupted(flags):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        entry.main(["--from", "torch", "--input", "a", "--output", "b"])
    assert stopped.value.code == 130
    assert "nothing was written" in capsys.readouterr().err
