"""parallel/terminal.py: what command lines on meshes share."""

import json
import os
import subprocess
import sys

import pytest

import modelzoo
from parallel import terminal
from parallel.mesh import parse_mesh
from tests.house import ROOT

COUNT = """
from parallel.terminal import simulate_devices
simulate_devices(3)
import jax
print(len(jax.devices()), jax.devices()[0].platform)
"""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "3 cpu"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, "5 cpu"),
        ({"XLA_FLAGS": "--xla_cpu_enable_fast_math=false", "JAX_PLATFORMS": "cpu"}, "3 cpu"),
    ],
)
def test_devices_are_simulated_unless_the_environment_says_otherwise(flags, expected):
    bare = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=ROOT, env=bare | flags, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_there_is_a_device():
    with pytest.raises(ValueError, match="0 devices"):
        terminal.simulate_devices(0)


def test_a_mesh_takes_the_devices_that_it_needs():
    rules = terminal.rules_of("fsdp=2, tensor=2")
    assert rules is not None
    assert rules.mesh.size == 4
    rest = terminal.rules_of("tensor=2,data=-1")
    assert rest is not None
    assert rest.mesh.size == 8
    assert terminal.rules_of("") is None
    with pytest.raises(ValueError, match="needs 16 devices, but there are 8"):
        terminal.rules_of("data=16")


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("tiny-gptj", "GPTJForCausalLM"),
        ("tiny-bloom", "BloomForCausalLM"),
        ("tiny-roberta", "RobertaForMaskedLM"),
        ("tiny-megatron-bert", "MegatronBertForPreTraining"),
        ("tiny-mvp", "MvpForConditionalGeneration"),
        ("tiny-gpt2", "GPT2LMHeadModel"),
    ],
)
def test_a_preset_is_the_class_that_it_is_pretrained_as(preset, name):
    assert type(terminal.model_of(preset)).__name__ == name


def test_fields_and_classes():
    fields = ["n_layer=3", "activation_function=gelu", "n_inner = null"]
    model = terminal.model_of("tiny-gptj", "GPTJForQuestionAnswering", fields)
    assert isinstance(model, modelzoo.GPTJForQuestionAnswering)
    assert (model.config.n_layer, model.config.activation_function, model.config.n_inner) == (3, "gelu", None)
    with pytest.raises(ValueError, match="'BloomModel' is no class of tiny-gptj, which has GPTJModel"):
        terminal.model_of("tiny-gptj", "BloomModel")
    with pytest.raises(ValueError, match="'n_layer' changes no field"):
        terminal.model_of("tiny-gptj", fields=["n_layer"])


def test_our_errors_become_one_line(capsys, monkeypatch):
    monkeypatch.delenv("FLAXTRON_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped, terminal.user_errors():
        parse_mesh("width=2")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown mesh axis 'width'")
    with pytest.raises(SystemExit), terminal.user_errors():
        raise OSError("first\nsecond")
    assert capsys.readouterr().err == "error: first\n"
    with pytest.raises(SystemExit) as stopped, terminal.user_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130


def test_defects_keep_their_traceback(monkeypatch):
    with pytest.raises(json.JSONDecodeError), terminal.user_errors():
        json.loads("{")
    monkeypatch.setenv("FLAXTRON_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown mesh axis"), terminal.user_errors():
        parse_mesh("width=2")
