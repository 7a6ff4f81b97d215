"""The state of a run: laid out like the parameters, the same on every mesh, never twice in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import modelzoo
import parallel
import train
from tests.zoo import assert_equal, leaves_by_name, tiny_gptj
from train import optim

MODEL = modelzoo.GPTJForCausalLM(tiny_gptj(vocab_size=38, n_embd=32, n_head=4, n_inner=64))
OPTIMIZER = optim.adamw()


def mesh_of(**axes):
    return parallel.make_mesh(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])


def test_optimizer_state_lies_like_the_parameters():
    state = train.init_state(MODEL, OPTIMIZER, mesh=mesh_of(data=2, fsdp=2, tensor=2))
    for moments in (state.opt_state.mu, state.opt_state.nu):
        assert jax.tree.all(jax.tree.map(lambda m, p: m.sharding == p.sharding, moments, state.params))
    assert state.params["trunk"]["layers"]["mlp"]["fc_in"]["kernel"].sharding.spec == P(
        "stage", "fsdp", "tensor"
    )
    for scalar in (state.step, state.rng, state.opt_state.count):
        assert scalar.sharding.is_fully_replicated
        assert len(scalar.sharding.device_set) == 8


def test_nothing_is_replicated_that_can_be_sharded():
    state = train.init_state(MODEL, OPTIMIZER, mesh=mesh_of(fsdp=4, tensor=2))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    first = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state))
    )
    assert first < 1.1 * total / 8  # a tiny model's biases and norms weigh more than a real one's


@pytest.mark.long
def test_the_values_do_not_depend_on_the_mesh():
    one = train.init_state(MODEL, OPTIMIZER, rng=jax.random.key(3))
    for mesh in (mesh_of(tensor=4), mesh_of(data=2, fsdp=4)):
        other = train.init_state(MODEL, OPTIMIZER, mesh=mesh, rng=jax.random.key(3))
        assert_equal(parallel.unpad_params(other.params, MODEL), one.params)
        assert jnp.array_equal(jax.random.key_data(one.rng), jax.random.key_data(other.rng))
    assert one.step == 0
    assert not np.any(one.opt_state.mu["lm_head"]["kernel"])


@pytest.mark.parametrize("axes", [None, {"fsdp": 2, "tensor": 4}])
def test_abstract_state_is_what_init_makes(axes):
    mesh = None if axes is None else mesh_of(**axes)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.ema(0.9))
    abstract, real = (make(MODEL, optimizer, mesh=mesh) for make in (train.abstract_state, train.init_state))
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    assert jax.tree.all(jax.tree.map(lambda a, r: (a.shape, a.dtype) == (r.shape, r.dtype), abstract, real))
    if axes is not None:
        assert jax.tree.all(jax.tree.map(lambda a, r: a.sharding == r.sharding, abstract, real))


def test_state_of_another_shape_lies_whole():
    # Adafactor keeps sums over rows and columns under the parameters' names.
    with jax.numpy_dtype_promotion("standard"):
        optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=8)
        state = train.init_state(MODEL, optimizer, mesh=mesh_of(fsdp=2, tensor=2))
    named = leaves_by_name(state.opt_state)
    rows = next(leaf for name, leaf in named.items() if "v_row" in name and name.endswith("fc_in/kernel"))
    assert rows.sharding.is_fully_replicated


@pytest.mark.parametrize("axes", [None, {"fsdp": 2, "tensor": 4}])
def test_given_parameters_are_taken_and_left_alone(axes):
    mesh = None if axes is None else mesh_of(**axes)
    params = parallel.init_params(MODEL, jax.random.key(9))
    state = train.init_state(MODEL, OPTIMIZER, mesh=mesh, params=params)
    assert_equal(parallel.unpad_params(state.params, MODEL), params)
    jax.jit(lambda s: jax.tree.map(lambda p: p * 0, s.params), donate_argnums=0)(state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    numpy_params = jax.tree.map(np.asarray, params)
    again = train.init_state(MODEL, OPTIMIZER, mesh=mesh, params=numpy_params)
    assert_equal(parallel.unpad_params(again.params, MODEL), params)


def test_keys_of_either_kind():
    old, new = (
        train.init_state(MODEL, OPTIMIZER, rng=key) for key in (jax.random.PRNGKey(5), jax.random.key(5))
    )
    assert_equal(old.params, new.params)
    assert old.rng == new.rng


def test_errors():
    mesh, other = mesh_of(data=2), mesh_of(data=4)
    with pytest.raises(ValueError, match="the rules are of mesh"):
        train.init_state(MODEL, OPTIMIZER, mesh=mesh, rules=parallel.make_rules(other))
    with pytest.raises(ValueError, match="heads"):
        train.init_state(MODEL, OPTIMIZER, mesh=mesh_of(tensor=8))
    wrong = parallel.init_params(modelzoo.GPTJForQuestionAnswering(MODEL.config), jax.random.key(0))
    for mesh in (None, mesh_of(data=2)):
        with pytest.raises(ValueError, match="parameters are not those of GPTJForCausalLM"):
            train.init_state(MODEL, OPTIMIZER, mesh=mesh, params=wrong)
