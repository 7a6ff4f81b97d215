"""train/equivalence.py: the command line, its ledger and exit codes, and a planted difference that it finds."""

import re
import subprocess
import sys

import jax
import pytest

from modelzoo.layers import mlp
from tests.house import ROOT
from train import equivalence as entry

SMALL = ("--set", "vocab_size=67", "--length", "8")


@pytest.mark.long
def test_a_pipeline_agrees(capsys):
    entry.main(
        ["tiny-bloom", "--mesh", "stage=2,data=2", "--schedule", "gpipe", "--microbatches", "2", *SMALL]
    )
    out = capsys.readouterr().out
    assert "tiny-bloom: BloomForCausalLM, no dropout, batch [4, 8] in 2 microbatches\n" in out
    assert re.search(r"\nreference: one device, loss 4\.\d+\n", out)
    assert re.search(r"\nstage=2,data=2, gpipe: agrees in all (\d+)\n", out)
    differences = [float(line.split()[1]) for line in out.splitlines() if line.startswith("  pass")]
    assert f"agrees in all {len(differences)}\n" in out
    assert differences[1:] == sorted(differences[1:], reverse=True)
    assert "  gradient trunk/layers/attention/key/bias\n" in out
    assert "  parameter lm_head/" in out or "  parameter trunk/embed/embedding\n" in out
    assert out.endswith("1 of 1 agree with one device\n")


@pytest.fixture
def planted(monkeypatch):
    """An MLP whose hidden activations are a thousandth too large where their width is sharded."""
    constrain = mlp.constrain

    def wrong(x, *names):
        mesh = jax.sharding.get_abstract_mesh()
        is_it = not mesh.empty and names[-1] == "act_mlp"
        return constrain(x, *names) * (1.001 if is_it else 1.0)

    monkeypatch.setattr(mlp, "constrain", wrong)


def test_a_planted_difference_is_found_and_named(capsys, planted):
    with pytest.raises(SystemExit) as stop:
        entry.main(["tiny-gptj", "--mesh", "tensor=2", "--top", "3", *SMALL])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert re.search(r"\ntensor=2: DIFFERS in \d+ of 31\n", out)
    assert out.count("  FAIL  ") >= 3
    assert "\n  ... and 27 smaller ones\n" in out
    named = "the first module whose output differs is trunk/layers[0]/mlp/fc_out, by "
    assert named in out
    assert out.endswith("0 of 1 agree with one device\n")


@pytest.mark.long
def test_a_planted_backward_difference_is_named_going_back(capsys, monkeypatch):
    """The forward pass is right; what goes back through the hidden activations of a mesh is not."""
    constrain = mlp.constrain

    @jax.custom_vjp
    def through(x):
        return x

    through.defvjp(lambda x: (x, None), lambda _, g: (g * 1.001,))

    def wrong(x, *names):
        mesh = jax.sharding.get_abstract_mesh()
        return constrain(through(x) if not mesh.empty and names[-1] == "act_mlp" else x, *names)

    monkeypatch.setattr(mlp, "constrain", wrong)
    with pytest.raises(SystemExit) as stop:
        entry.main(["tiny-gptj", "--mesh", "tensor=2", "--top", "1", *SMALL])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "  pass" in out  # the loss
    assert "every module's output agrees" in out
    assert "the first module whose gradients differ is trunk/layers[1]/mlp/fc_in\n" in out


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["tiny-gptj"], "nothing to compare: give --mesh"),
        (["small-gptj", "--mesh", "data=2"], "unknown preset 'small-gptj'"),
        (["tiny-gptj", "--mesh", "width=2"], "unknown mesh axis 'width'"),
        (["tiny-gptj", "--mesh", "data=16"], "needs 16 devices, but there are 8"),
        (["tiny-gptj", "--mesh", "data=0"], "mesh axis data=0"),
        (["tiny-gptj", "--mesh", "stage=2", "--schedule", "zigzag"], "schedule 'zigzag' is unknown"),
        (["tiny-gptj", "--mesh", "data=2", "--steps", "0"], "--steps 0: it is at least 1"),
        (["tiny-gptj", "--mesh", "data=2", "--length", "65"], "length = 65"),
        (["tiny-gptj", "--mesh", "data=2", "--set", "n_layers=4"], "GPTJConfig has no field 'n_layers'"),
        (["tiny-gptj", "--mesh", "data=2", "--set", "n_layer"], "write it as FIELD=VALUE"),
        (["tiny-gptj", "--mesh", "data=2", "--model-class", "BloomModel"], "no class of tiny-gptj"),
        (["tiny-gptj", "--mesh", "data=2", "--model-class", "GPTJModel"], "GPTJModel .* has no loss"),
        (
            ["tiny-gptj", "--mesh", "data=2", "--mesh", "tensor=8"],
            "'heads' has size 4, which mesh tensor=8 does not",
        ),
        (["tiny-gptj", "--mesh", "stage=4"], "which mesh stage=4 does not divide"),
        (["tiny-gptj", "--mesh", "data=2", "--reference", "data=2", "--rows", "3"], "a batch of 3 rows"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, flags, error):
    with pytest.raises(SystemExit) as stop:
        entry.main(flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert re.fullmatch(rf"error: [^\n]*{error}[^\n]*\n", captured.err)


def test_help_teaches_and_does_not_import_jax():
    program = [sys.executable, "-m", "train.equivalence", "--help"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    for word in ("examples:", "--mesh AXIS=N", "--schedule NAME", "(default: 1)", "exit code"):
        assert word in done.stdout
    code = "import sys, train.equivalence; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
