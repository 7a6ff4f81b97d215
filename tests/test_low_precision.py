"""Products in eight bits: near the whole ones, forward and backward, where they should be and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
import train
from modelzoo.layers import linear
from tests.zoo import random_params, tiny_gptj
from train import low_precision, optim

pytest.importorskip("qwix")

X = np.random.default_rng(0).normal(0, 1, (3, 5, 16)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(0, 0.1, (16, 4, 6)).astype(np.float32)
WEIGHTS = np.random.default_rng(2).normal(0, 1, (3, 5, 4, 6)).astype(np.float32)


def three(multiply):
    """The product and the gradients of both factors."""
    value, back = jax.vjp(lambda x, kernel: multiply(x, kernel, 1), jnp.asarray(X), jnp.asarray(KERNEL))
    return value, *back(jnp.asarray(WEIGHTS))


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.02), ("fp8", 0.1)])
def test_near_the_whole_product(kind, limit):
    for found, want in zip(three(low_precision.multiplication(kind)), three(linear.contract), strict=True):
        assert found.dtype == want.dtype
        apart = np.linalg.norm(found - want) / np.linalg.norm(want)
        assert 0 < apart < limit or (kind == "int8" and apart == pytest.approx(0, abs=1e-6))


def test_only_kernels_of_attention_and_mlps_are_rounded():
    model = modelzoo.GPTJForCausalLM(tiny_gptj())
    ids, seen = np.ones((1, 4), np.int32), []

    def spy(x, kernel, num_in):
        seen.append(kernel.shape)
        return linear.contract(x, kernel, num_in)

    params = random_params(model)
    with linear.multiply_by(spy):
        jax.eval_shape(lambda p: model.apply({"params": p}, input_ids=ids), params)
    assert sorted(set(seen)) == sorted({(24, 3, 8), (3, 8, 24), (24, 31), (31, 24)})
    seen.clear()
    jax.eval_shape(lambda p: model.apply({"params": p}, input_ids=ids), params)
    assert not seen


@pytest.mark.long
@pytest.mark.parametrize("kind", low_precision.KINDS)
def test_a_mesh_learns_as_one_device_does(kind):
    model = modelzoo.GPTJForCausalLM(tiny_gptj(vocab_size=38, n_embd=32, n_head=4, n_inner=64))
    ids = np.random.default_rng(0).integers(0, 37, (8, 12)).astype(np.int32)
    losses = []
    for mesh in (None, parallel.make_mesh(data=2, fsdp=2, tensor=2), parallel.make_mesh(stage=2, data=4)):
        optimizer = optim.adamw(learning_rate=1e-2)
        state = train.init_state(model, optimizer, mesh=mesh)
        step = train.make_train_step(model, optimizer, mesh=mesh, quantize=kind)
        for _ in range(4):
            state, metrics = step(state, {"input_ids": ids, "labels": ids})
        losses.append(float(metrics["loss"]))
    assert losses[0] < 3.5
    np.testing.assert_allclose(
        losses, losses[0], rtol=1e-2
    )  # a value on an edge of rounding may go either way


def test_what_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match=r"train\.quantize = 'int4': choose from 'int8', 'fp8', or None"):
        low_precision.multiplication("int4")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(low_precision.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"qwix is not installed: pip install 'flaxtron\[quantize\]'"):
        low_precision.multiplication("int8")
