"""AdamW against optax's own, its decay mask, its memory; what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import modelzoo
from tests.zoo import assert_close_relative, random_params, tiny_gptj
from train import optim, schedules


def tree(seed, scale=1.0):
    random = np.random.default_rng(seed)
    shapes = {"kernel": (4, 8, 6), "bias": (4, 6), "scale": (8,), "embedding": (10, 8)}
    return {name: jnp.asarray(random.normal(0, scale, shape), jnp.float32) for name, shape in shapes.items()}


def trajectory(optimizer, steps=5, scale=1.0):
    params = tree(0)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for at in range(steps):
        params, state = step(params, state, tree(at + 1, scale))
    return params


@pytest.mark.parametrize("scale", [10.0, 1e-3])  # clipped, and not
@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_adamw_is_that_of_optax(scale, clip_norm):
    rate = schedules.warmup_cosine(peak=1e-2, num_steps=5, warmup_steps=2)
    numbers = dict(b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.2)
    ours = optim.adamw(learning_rate=rate, clip_norm=clip_norm, **numbers)
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    with jax.numpy_dtype_promotion("standard"):
        theirs = trajectory(
            optax.chain(clip, optax.adamw(rate, mask=optim.decay_mask, **numbers)), scale=scale
        )
    assert_close_relative(trajectory(ours, scale=scale), theirs, 1e-6)


def test_decay_spares_biases_and_norms_of_stacked_layers():
    mask = optim.decay_mask(modelzoo.abstract_params(modelzoo.GPTJForCausalLM(tiny_gptj())))
    by_name = {path[-1].key: set() for path, _ in jax.tree.leaves_with_path(mask)}
    for path, decays in jax.tree.leaves_with_path(mask):
        by_name[path[-1].key].add(decays)
    assert by_name == {"bias": {False}, "scale": {False}, "kernel": {True}, "embedding": {True}}


def test_decay_acts_where_the_mask_says():
    def decayed(mask):
        optimizer = optim.adamw(learning_rate=0.1, weight_decay=0.5, mask=mask)
        params = tree(0)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        return {name: float(jnp.max(jnp.abs(u + 0.05 * params[name]))) < 1e-6 for name, u in updates.items()}

    assert decayed(optim.decay_mask) == {"kernel": True, "embedding": True, "bias": False, "scale": False}
    assert all(decayed(None).values())


def test_moments_are_float32_whatever_the_parameters():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree(0))
    optimizer = optim.adamw()
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    assert {x.dtype for x in jax.tree.leaves((state.mu, state.nu, updates))} == {jnp.dtype(jnp.float32)}


def test_the_update_writes_nothing_to_memory_but_its_results():
    shape = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    params = {f"kernel{i}": shape for i in range(4)}

    def temporary(optimizer):
        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        with jax.numpy_dtype_promotion("standard"):
            state = jax.eval_shape(optimizer.init, params)
            compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_parameter = 4 * 512 * 512
    assert temporary(optim.adamw()) < one_parameter / 8
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    assert temporary(chain) > one_parameter  # what `adamw` avoids: clipped gradients in memory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.adamw(learning_rate=-1.0), r"adamw.learning_rate = -1.0 is out of range"),
        (lambda: optim.adamw(b2=1.0), r"adamw.b2 = 1.0"),
        (lambda: optim.adamw(clip_norm=0.0), r"adamw.clip_norm = 0.0"),
        (lambda: optim.adamw(weight_decay=-0.1), r"adamw.weight_decay"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_frozen_has_no_state_and_no_step():
    class HeadOnly(modelzoo.GPTJForCausalLM):
        def is_frozen(self, path):
            return path[0] != "lm_head"

    model = HeadOnly(tiny_gptj())
    params = random_params(model)
    optimizer = optim.only_trainable(model, optim.adamw())
    state = optimizer.init(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    head = jax.tree.leaves(params["lm_head"])
    assert sorted(leaf.shape for leaf in moments) == sorted(leaf.shape for leaf in head * 2)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, state, params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates["trunk"]))
    alone = optim.adamw()
    expected, _ = alone.update(grads["lm_head"], alone.init(params["lm_head"]), params["lm_head"])
    jax.tree.map(np.testing.assert_array_equal, updates["lm_head"], expected)


def test_an_optimizer_is_left_alone_where_everything_trains():
    optimizer = optim.adamw()
    assert optim.only_trainable(modelzoo.GPTJForCausalLM(tiny_gptj()), optimizer) is optimizer
