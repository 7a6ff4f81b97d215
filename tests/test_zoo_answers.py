"""Every class against transformers' stored answers (tests/parity/make_fixtures.py), through files and without torch.

Weights are drawn from their names, written under transformers' names and read by `from_hf`: a class passes only if
its weight table, its wiring, its loss and its gradients are all transformers'.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import modelzoo
import train
from modelzoo import registry
from tests.stored import CLASSES, Stored, stored, together
from tests.zoo import assert_close, drawn, quick_jit


@functools.partial(quick_jit, static_argnums=(0, 3))
def forward(model: Any, params: Any, inputs: Any, asked: bool) -> Any:
    return model.apply({"params": params}, **inputs, output_attentions=asked, output_hidden_states=asked)


def check_fields(out: Any, expected: dict[str, Any], tolerance: float) -> None:
    for field, want in together(expected).items():
        assert_close(getattr(out, field), want, tolerance)


@pytest.mark.parametrize("name", CLASSES)
def test_outputs(name):
    """A trunk's also with layers that are unrolled, and with layers in a tuple: these differ by 1e-6."""
    for one in stored(name):
        assert type(one.model).__name__ == name
        for answer in one.answers.values():
            inputs, is_trunk = together(answer["inputs"]), one.model.task == "base"
            out = forward(one.model, one.params, inputs, is_trunk)
            assert len(answer["outputs"]) >= 1
            check_fields(out, answer["outputs"], 2e-5)
        layers_apart = modelzoo.unstack_layers(one.params)
        assert jax.tree.structure(layers_apart) != jax.tree.structure(one.params)
        if is_trunk:
            scale = max(1.0, *(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(out)))
            assert_close(forward(one.model, layers_apart, inputs, is_trunk), out, 1e-6 * scale)
            unrolled = forward(one.model.clone(scan_layers=False), one.params, inputs, is_trunk)
            assert_close(unrolled, out, 1e-6 * scale)


@pytest.mark.parametrize("name", CLASSES)
def test_files_go_round(name, tmp_path):
    """What `to_hf` writes are the same names and the same bits."""
    for one in stored(name):
        modelzoo.to_hf(one.model, one.params, tmp_path)
        written = load_file(tmp_path / "model.safetensors")
        assert written.keys() == one.weights.keys()
        for key, want in one.weights.items():
            assert written[key].tobytes() == want.tobytes(), key
        assert modelzoo.from_hf(tmp_path)[0].config == one.model.config


@pytest.mark.parametrize("name", [n for n in CLASSES if modelzoo.get_model_class(n).task != "base"])
def test_losses(name):
    for one in stored(name):
        for answer in one.answers.values():
            out = forward(one.model, one.params, together(answer["inputs"]), False)
            value, _ = train.loss(one.model, out, together(answer["inputs"]) | answer["labels"])
            np.testing.assert_allclose(value, answer["loss"], rtol=1e-5)


@pytest.mark.parametrize("model_type", registry.FAMILIES)
def test_gradients(model_type, tmp_path):
    """Of one class of each family: every tensor's norm, and its slope along a drawn direction."""
    shown = 0
    for cls in registry.FAMILIES[model_type].classes:
        for one in stored(cls.__name__):
            for answer in one.answers.values():
                if "gradients" in answer:
                    check_gradients(one, answer, tmp_path)
                    shown += 1
    assert shown == 1


def check_gradients(one: Stored, answer: dict[str, Any], folder: Path) -> None:
    inputs = together(answer["inputs"])

    def loss(params: Any) -> jax.Array:
        out = one.model.apply({"params": params}, **inputs)
        return train.loss(one.model, out, inputs | answer["labels"])[0]

    modelzoo.to_hf(one.model, quick_jit(jax.grad(loss))(one.params), folder)
    ours = load_file(folder / "model.safetensors")
    largest = max(norm for norm, _ in answer["gradients"].values())
    for key, (norm, slope) in answer["gradients"].items():
        direction = drawn(f"{key} direction", ours[key].shape).astype(np.float64)
        tolerance = 1e-4 * max(norm, 1e-6 * largest)
        assert abs(np.linalg.norm(ours[key].astype(np.float64)) - norm) <= max(tolerance, 1e-6 * largest)
        apart = abs(np.vdot(direction, ours[key]) - slope)
        assert apart <= max(tolerance, 1e-6 * largest) * np.linalg.norm(direction), key


def test_a_swapped_tensor_shows():
    """The test can fail: two kernels of one shape, exchanged, give other outputs."""
    one = stored("GPTJModel")[0]
    answer = next(iter(one.answers.values()))
    attention = one.params["layers"]["attention"]
    swapped = dict(attention, query=attention["key"], key=attention["query"])
    params = dict(one.params, layers=dict(one.params["layers"], attention=swapped))
    out = forward(one.model, params, answer["inputs"], True)
    with pytest.raises(AssertionError, match="differs by"):
        check_fields(out, answer["outputs"], 2e-5)
