"""Logical axis names take hold of activations and parameters under rules, and do nothing without them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import parallel
from modelzoo import axes
from modelzoo.axes import constrain, gather_parameter


@pytest.fixture(scope="module")
def rules():
    return parallel.make_rules(parallel.make_mesh(data=2, fsdp=2, tensor=2))


def laid_out(rules, function, *arrays):
    """The spec that jit gives the result, all inputs lying whole on every device."""
    whole = rules.sharding(())
    with parallel.use(rules):
        result = jax.jit(lambda *a: function(*a))(*(jax.device_put(a, whole) for a in arrays))
    return result.sharding.spec


def test_constrain_without_rules_returns_its_argument():
    x = jnp.ones((2, 3))
    assert constrain(x, "act_batch", "a name that nobody knows") is x


def test_constrain_takes_hold(rules):
    """Without a constraint the result stays whole; with it, each dimension lies where the rules say."""
    x = jnp.ones((4, 6, 8))
    assert laid_out(rules, lambda x: x * 2.0, x) == P()
    spec = laid_out(rules, lambda x: constrain(x * 2.0, "act_batch", "act_length", "act_mlp"), x)
    assert spec == P(("data", "fsdp"), None, "tensor")  # the mesh has context=1


def test_constrain_keeps_values(rules):
    x = jnp.arange(24.0).reshape(4, 6)
    with parallel.use(rules):
        y = jax.jit(lambda x: constrain(x, "act_batch", "act_mlp"))(x)
    assert (y == x).all()


def test_constrain_takes_hold_in_the_middle_of_a_program(rules):
    """An activation that is no output: its device-local shape stands in the compiled program, and only with rules."""

    def program(x):
        h = constrain(jnp.sin(x) @ jnp.ones((8, 24)), "act_batch", "act_mlp")
        return jnp.cos(h) @ jnp.ones((24, 5))

    def compiled(x):
        x = jax.device_put(x, rules.sharding(()))
        return str(jax.jit(lambda x: program(x)).lower(x).compile().as_text())

    x = jnp.ones((16, 8))
    with parallel.use(rules):
        text = compiled(x)
    assert "f32[4,12]" in text
    with jax.set_mesh(rules.mesh):
        text = compiled(x)
    assert "f32[4,12]" not in text


def test_constrain_unknown_name(rules):
    with parallel.use(rules), pytest.raises(ValueError, match="unknown logical axis 'act_widht'"):
        jax.jit(lambda x: constrain(x, "act_batch", "act_widht"))(jnp.ones((4, 4)))


def test_constrain_one_mesh_axis_twice(rules):
    with (
        parallel.use(rules),
        pytest.raises(ValueError, match="'tensor' twice .* 'act_heads' and 'act_mlp'"),
    ):
        jax.jit(lambda x: constrain(x, "act_heads", "act_mlp"))(jnp.ones((4, 4)))


def test_constrain_needs_a_name_per_dimension(rules):
    with parallel.use(rules), pytest.raises(AssertionError, match="2 names for an array of rank 3"):
        jax.jit(lambda x: constrain(x, "act_batch", None))(jnp.ones((4, 4, 4)))


@pytest.mark.parametrize(
    ("names", "spec"),
    [
        (("embed", "heads", "head_dim"), P(None, "tensor", None)),
        (("heads", "head_dim", "embed"), P("tensor", None, None)),
        (("embed", "mlp"), P(None, "tensor")),
        (("vocab", "embed"), P("tensor", None)),
        (("embed", None), P()),
        (("embed",), P()),
    ],
)
def test_gather_parameter_keeps_only_what_its_activations_have(rules, names, spec):
    value = jnp.ones((8, 8, 8)[: len(names)])
    with parallel.use(rules):
        resting = jax.device_put(value, rules.sharding(names))
        assert "fsdp" in resting.sharding.spec
        used = jax.jit(lambda v: gather_parameter(v, names))(resting)
    assert used.sharding.is_equivalent_to(jax.NamedSharding(rules.mesh, spec), value.ndim)


def test_parameter_and_activation_names_differ():
    assert not set(axes.PARAMETER_AXES) & set(axes.ACTIVATION_AXES)
    assert set(axes.COMPUTE_AXES) <= set(axes.PARAMETER_AXES)
    assert set(axes.COMPUTE_AXES.values()) <= set(axes.ACTIVATION_AXES)
