"""Adafactor, Lion, Muon and SGD against optax's own, matrix by matrix, and on meshes against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import modelzoo
import parallel
import train
from tests.zoo import assert_close_relative, assert_equal, quick_jit, random_params, tiny_gptj
from train import canonical, optim, optimizers, schedules

MODEL = modelzoo.GPTJForCausalLM(tiny_gptj(vocab_size=38, n_embd=32, n_head=4, n_inner=64))
RATE = schedules.warmup_linear(peak=1e-2, num_steps=5, warmup_steps=2)
STEPS = 4
EACH = {
    "adamw": optim.adamw(learning_rate=RATE),
    "adafactor": optimizers.adafactor(learning_rate=RATE, min_factored=8, momentum=0.9, weight_decay=0.1),
    "lion": optimizers.lion(learning_rate=RATE),
    "muon": optimizers.muon(learning_rate=RATE),
    "sgd": optimizers.sgd(learning_rate=RATE, nesterov=True, weight_decay=0.1),
}


def draw(shapes, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(0, 1, shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def trajectory(optimizer, start, grads):
    """The parameters after these gradients, one after another."""

    @quick_jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):
        params, state = start, quick_jit(optimizer.init)(start)
        for each in grads:
            params, state = step(params, state, each)
    return params


def matrices(tree):
    """A stack's parameters layer by layer, attention kernels as the matrices that they are."""

    def flat(path, leaf):
        layers, (inputs, outputs) = leaf.shape[0], optimizers.matrix_dims(path, leaf.ndim)
        rows, columns = (int(np.prod([leaf.shape[d] for d in dims])) for dims in (inputs, outputs))
        return [leaf[i].reshape(rows, columns) for i in range(layers)]

    return jax.tree_util.tree_map_with_path(flat, tree)


STACK = {
    "layers": {
        "attention": {"query": {"kernel": (2, 6, 3, 4)}, "out": {"kernel": (2, 3, 4, 6)}},
        "mlp": {"fc_in": {"kernel": (2, 6, 10)}, "fc_out": {"kernel": (2, 10, 6)}},
    }
}
FLAT = {"lm_head": {"kernel": (8, 12), "bias": (12,)}, "embed": {"embedding": (9, 8)}}


def test_attention_kernels_are_the_matrices_that_they_multiply_by():
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): optimizers.matrix_dims(path, len(leaf.shape))
        for path, leaf in jax.tree.leaves_with_path(modelzoo.abstract_params(MODEL))
    }
    layers = "trunk/layers/"
    assert found[layers + "attention/query/kernel"] == ((1,), (2, 3))
    assert found[layers + "attention/out/kernel"] == ((1, 2), (3,))
    assert found[layers + "mlp/fc_out/kernel"] == ((1,), (2,))
    assert found["trunk/embed/embedding"] == ((0,), (1,))
    assert found[layers + "mlp/fc_in/bias"] is None


@pytest.mark.parametrize("name", EACH)
def test_a_table_may_have_more_elements_than_int32_counts(name):
    table = {"embed": {"embedding": jax.ShapeDtypeStruct((250_880, 14_336), jnp.float32)}}  # BLOOM-176B's
    with jax.numpy_dtype_promotion("standard"):  # for optax
        state = jax.eval_shape(EACH[name].init, table)
        updates, _ = jax.eval_shape(EACH[name].update, table, state, table)
    assert updates["embed"]["embedding"].shape == (250_880, 14_336)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_adafactor_is_that_of_optax(momentum):
    ours = optimizers.adafactor(learning_rate=RATE, min_factored=1, momentum=momentum)
    theirs = optax.adafactor(RATE, min_dim_size_to_factor=1, momentum=momentum)
    start, grads = draw(FLAT, 0), [draw(FLAT, seed) for seed in range(1, STEPS + 1)]
    assert_close_relative(trajectory(ours, start, grads), trajectory(theirs, start, grads), 1e-5)
    # Of a stack, each layer and each kernel is as if it were a parameter, and a matrix, of its own.
    start, grads = draw(STACK, 0), [draw(STACK, seed) for seed in range(1, STEPS + 1)]
    stacked = matrices(trajectory(ours, start, grads))
    alone = trajectory(theirs, matrices(start), [matrices(each) for each in grads])
    assert_close_relative(stacked, alone, 1e-5)


def test_short_sides_are_not_factored():
    state = optimizers.adafactor(min_factored=9).init(draw(FLAT, 0))
    assert state.full["embed"]["embedding"].shape == (9, 8)
    assert state.row["embed"]["embedding"] is None
    state = optimizers.adafactor(min_factored=8).init(draw(FLAT, 0))
    assert state.full["embed"]["embedding"] is None
    assert state.row["embed"]["embedding"].shape == (9, 1)
    assert state.col["embed"]["embedding"].shape == (1, 8)


@pytest.mark.parametrize("consistent_rms", [0.2, None])
def test_muon_is_that_of_optax_on_each_layers_matrix(consistent_rms):
    options = dict(weight_decay=0.1, consistent_rms=consistent_rms)
    ours = optimizers.muon(learning_rate=RATE, clip_norm=None, **options)
    theirs = contrib.muon(RATE, **options)
    start, grads = draw(STACK, 0), [draw(STACK, seed) for seed in range(1, STEPS + 1)]
    stacked = matrices(trajectory(ours, start, grads))
    alone = trajectory(theirs, matrices(start), [matrices(each) for each in grads])
    assert_close_relative(stacked, alone, 1e-5)
    start, grads = draw(FLAT, 0), [draw(FLAT, seed) for seed in range(1, STEPS + 1)]
    adamw = optax.adamw(RATE, b1=0.9, b2=0.95, weight_decay=0.1, mask=optim.decay_mask)
    assert_close_relative(trajectory(ours, start, grads), trajectory(adamw, start, grads), 1e-5)


def test_lion_and_sgd_are_those_of_optax_behind_clipping():
    start, grads = draw(FLAT, 0), [draw(FLAT, seed) for seed in range(1, STEPS + 1)]
    clip, mask = optax.clip_by_global_norm(1.0), optim.decay_mask
    lion = optax.chain(clip, optax.lion(RATE, b1=0.9, b2=0.99, weight_decay=1.0, mask=mask))
    assert_close_relative(trajectory(EACH["lion"], start, grads), trajectory(lion, start, grads), 1e-6)
    sgd = optax.chain(clip, optax.sgd(RATE, momentum=0.9))
    ours = optimizers.sgd(learning_rate=RATE)
    assert_close_relative(trajectory(ours, start, grads), trajectory(sgd, start, grads), 1e-6)


def rules_of(**axes):
    return parallel.make_rules(
        parallel.make_mesh(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    )


def updated(optimizer, rules, state, grads):
    """The state after these gradients of the whole model, on a mesh."""
    optimizer = optim.fitted(MODEL, optimizer)

    def step(state, grads):
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state, step=state.step + 1)

    sharding = None if rules is None else jax.tree.map(lambda a: a.sharding, state)
    step = quick_jit(step, out_shardings=sharding)
    for each in grads:
        state = step(state, each if rules is None else parallel.shard_params(each, MODEL, rules))
    return state


def on_disk(state):
    """Everything in a state, at its true size, on the host."""
    return {
        name: np.asarray(array)[tuple(map(slice, shape))]
        for name, (array, shape) in canonical.leaves_of(MODEL, state).items()
    }


QUICK = ("adafactor", "muon")  # whose state or arithmetic is not AdamW's, whose own tests are in test_saving


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in EACH]
)
def test_a_mesh_gives_what_one_device_gives_and_is_read_on_another(name, tmp_path):
    optimizer, params = EACH[name], random_params(MODEL)
    grads = [random_params(MODEL, seed) for seed in range(1, STEPS + 1)]
    rules = rules_of(fsdp=2, tensor=4)  # which pads the vocabulary, 38, to 40
    one = train.init_state(MODEL, optimizer, params=params)
    many = train.init_state(MODEL, optimizer, params=params, rules=rules)
    alone = updated(optimizer, None, one, grads)
    state = updated(optimizer, rules, many, grads)
    assert_close_relative(on_disk(state), on_disk(alone), 1e-5)
    # Nothing of a matrix's or of its rows' size is held whole by a device.
    kept = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 256]
    assert all(leaf.addressable_shards[0].data.size <= leaf.size // 4 for leaf in kept)
    with train.Saver(tmp_path, model=MODEL, every=1) as saver:
        saver.maybe_save(STEPS, state)
    for other in (None, rules_of(fsdp=4, tensor=2)):
        target = train.abstract_state(MODEL, optimizer, rules=other)
        restored, _ = saver.restore(target)
        assert_equal(on_disk(restored), on_disk(state))
    again, _ = saver.restore(train.abstract_state(MODEL, optimizer, rules=rules))
    more = [random_params(MODEL, 9)]
    assert_equal(
        on_disk(updated(optimizer, rules, again, more)), on_disk(updated(optimizer, rules, state, more))
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimizers.adafactor(decay_rate=1.0), r"adafactor.decay_rate = 1.0 is out of range"),
        (lambda: optimizers.lion(b2=1.0), r"lion.b2 = 1.0"),
        (lambda: optimizers.muon(ns_steps=0), r"muon.ns_steps = 0"),
        (lambda: optimizers.sgd(clip_norm=0.0), r"sgd.clip_norm = 0.0"),
        (lambda: optimizers.lion(learning_rate=-1.0), r"lion.learning_rate = -1.0"),
        (lambda: optimizers.sgd(momentum=1.0), r"sgd.momentum = 1.0"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
