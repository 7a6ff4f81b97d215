import json
import subprocess
import sys

import pytest

from tests.house import ROOT
from train import plan as entry

GPTJ = ["--gin_file=pretrain/gptj-6b.gin", "--analytic"]


def test_a_page(capsys):
    entry.main([*GPTJ, "--topology", "v5p:4x4x4", "--mesh", "fsdp=16,tensor=4"])
    out = capsys.readouterr().out
    assert "6,050,882,784 parameters: 512 x 2048 tokens a step" in out
    assert "on v5p:4x4x4 (64 chips), mesh fsdp=16,tensor=4" in out
    assert "by arithmetic alone" in out
    assert "predicted, not measured" in out


def test_flags_win_over_the_file_and_json_is_whole(capsys):
    flags = [
        "--mesh",
        "stage=4,fsdp=16",
        "--microbatches",
        "8",
        "--schedule",
        "gpipe",
        "--remat",
        "dots",
        "--json",
    ]
    entry.main([*GPTJ, "--topology", "v5p:4x4x4", *flags])
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"stage": 4, "data": 1, "fsdp": 16, "context": 1, "tensor": 1}
    assert "remat dots, gpipe, 8 microbatches" in found["title"]
    assert found["predicted_mfu"] > 0.3
    assert found["fits"] is True


def test_the_exit_code_says_that_it_does_not_fit(capsys):
    with pytest.raises(SystemExit) as stopped:
        entry.main([*GPTJ, "--topology", "v5e:2x2", "--mesh", "fsdp=4"])
    assert stopped.value.code == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--topology", "v5p:4x4x4"], "nothing to plan: give --gin_file"),
        ([*GPTJ, "--topology", "v5p"], "write it as CHIP:SHAPE"),
        ([*GPTJ, "--topology", "v5p:4x4x4", "--mesh", "fsdp=7"], "needs 7 devices, but there are 64"),
        ([*GPTJ, "--topology", "v5p:4x4x4", "--microbatches", "0"], "it is at least 1"),
        ([*GPTJ, "--topology", "v5p:4x4x4", "--picture", "x.gif"], "ends in .svg or .png"),
        (["--gin_file=no.gin", "--topology", "v5p:4x4x4"], "no such gin file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        entry.main(flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert error.count("\n") == 1


def test_the_picture_is_drawn(tmp_path, capsys):
    path = tmp_path / "plan.svg"
    entry.main([*GPTJ, "--topology", "h100:64", "--mesh", "fsdp=64", "--picture", str(path)])
    assert path.stat().st_size > 1000
    assert "on h100:64 (64 chips)" in capsys.readouterr().out


def test_help_answers_without_jax():
    code = (
        "import sys; from train import plan\ntry: plan.main(['--help'])\nfinally: print('jax' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--topology" in found.stdout
    assert found.stdout.endswith("False\n")
