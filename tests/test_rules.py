"""Rules: the table from logical to mesh axes, its checks, and its being in force."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from modelzoo import axes
from modelzoo.axes import constrain
from parallel import make_mesh, make_rules, use
from parallel.rules import DEFAULT, LARGE_PARAMETER, PADDED_AXES


@pytest.fixture(scope="module")
def rules():
    return make_rules(make_mesh(data=2, fsdp=2, tensor=2))


def test_every_logical_axis_has_a_rule():
    assert set(DEFAULT) == {*axes.PARAMETER_AXES, *axes.ACTIVATION_AXES}


def test_megatron_and_zero():
    """What the table means: a product is split as its parameter is, and FSDP leaves activations be."""
    for parameter, activation in axes.COMPUTE_AXES.items():
        assert DEFAULT[parameter] == DEFAULT[activation]
    assert DEFAULT["embed"] == ("fsdp",)
    assert DEFAULT["act_embed"] == ()
    assert set(DEFAULT["act_batch"]) == {"data", "fsdp"}
    assert set(PADDED_AXES) <= set(axes.PARAMETER_AXES)


@pytest.mark.parametrize(
    ("names", "spec"),
    [
        ((), P()),
        (("vocab", "embed"), P("tensor", "fsdp")),
        (("layers", "embed", "heads", "head_dim"), P("stage", "fsdp", "tensor", None)),
        (("act_batch", "act_length", "act_embed"), P(("data", "fsdp"), "context", None)),
        ((None, "mlp"), P(None, "tensor")),
    ],
)
def test_spec(rules, names, spec):
    assert rules.spec(names) == spec
    assert rules.sharding(names) == NamedSharding(rules.mesh, spec)


def test_num_shards(rules):
    assert [rules.num_shards(name) for name in ("act_batch", "heads", "layers", None)] == [4, 2, 1, 1]


def test_unknown_logical_axis(rules):
    with pytest.raises(ValueError, match="unknown logical axis 'widht': the rules know .*'embed'"):
        rules.spec(("widht", None))


def test_one_mesh_axis_twice(rules):
    with pytest.raises(
        ValueError, match="mesh axis 'tensor' twice .* logical axes 'heads' and 'mlp' both lie on it"
    ):
        rules.spec(("heads", "mlp"))


def test_a_dimension_that_the_mesh_does_not_divide(rules):
    with pytest.raises(
        ValueError, match="axis 'heads' has size 5, which mesh tensor=2 does not divide: .* is tensor=1"
    ):
        rules.spec(("embed", "heads"), (4, 5))
    with pytest.raises(
        ValueError,
        match="axis 'act_batch' has size 6, which mesh data=2 x fsdp=2 .*: .* 3 shards rather than 4",
    ):
        rules.spec(("act_batch",), (6,))
    assert rules.spec(("embed", "heads"), (4, 6)) == P("fsdp", "tensor")


def test_padded_shape():
    rules = make_rules(make_mesh(fsdp=2, tensor=4))
    assert rules.padded_shape(("vocab", "embed"), (211, 10)) == (212, 10)
    assert rules.padded_shape(("embed", "vocab"), (10, 212)) == (10, 212)
    assert rules.padded_shape(("mlp", None), (211, 211)) == (211, 211)  # only vocabularies
    assert make_rules(make_mesh(data=8)).padded_shape(("vocab",), (211,)) == (211,)


def test_overrides():
    mesh = make_mesh(data=4, tensor=2)
    rules = make_rules(mesh, embed="data", mlp=None, act_length=("context", "tensor"))
    assert rules.spec(("embed", "mlp")) == P("data", None)
    assert rules.spec(("act_length",)) == P(("context", "tensor"))
    assert rules.spec(("heads",)) == P("tensor")
    assert make_rules(mesh).spec(("embed",)) == P("fsdp")  # the default is not changed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(widht="data"), "unknown logical axis 'widht' in make_rules: the axes are .*'vocab'"),
        (dict(mlp="model"), "unknown mesh axis 'model' in the rule of 'mlp': the mesh has .*'tensor'"),
        (dict(act_batch=("data", "fsdp", "fsdp")), "mesh axis 'fsdp' twice in the rule of 'act_batch'"),
    ],
)
def test_overrides_that_are_none(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_rules(make_mesh(data=8), **overrides)


def test_silent_replication():
    """A large parameter that a rule leaves whole along an axis which the default table cuts it by."""
    names, shape = ("embed", "mlp"), (256, LARGE_PARAMETER // 256)
    rules = make_rules(make_mesh(data=4, tensor=2), mlp=None)
    message = r"parameter fc_in \(256, 256\) would lie whole on each of the 2 devices of mesh axis 'tensor': .* 'mlp'"
    with pytest.raises(ValueError, match=message):
        rules.check_replication("fc_in", names, shape)
    rules.check_replication("fc_in", names, (256, LARGE_PARAMETER // 256 - 1))  # not large
    make_rules(make_mesh(data=8), mlp=None).check_replication(
        "fc_in", names, shape
    )  # tensor=1: nothing is lost
    make_rules(make_mesh(data=4, tensor=2)).check_replication("fc_in", names, shape)
    # Another of its dimensions lies on that axis instead.
    make_rules(make_mesh(data=4, tensor=2), mlp=None, embed="tensor").check_replication("fc_in", names, shape)


def test_a_large_parameter_without_names():
    rules = make_rules(make_mesh(data=4, tensor=2))
    with pytest.raises(ValueError, match="parameter table .* has no logical axes, so nothing shards it"):
        rules.check_replication("table", (None, None), (1024, 1024))
    rules.check_replication("table", (None, None), (10, 10))
    make_rules(make_mesh(data=8)).check_replication("table", (None, None), (1024, 1024))


def test_rules_are_hashable_values(rules):
    """A static argument of jit, so that one function under two tables is two programs."""
    again = make_rules(make_mesh(data=2, fsdp=2, tensor=2))
    assert rules == again
    assert hash(rules) == hash(again)
    variant = make_rules(rules.mesh, act_mlp=None)
    assert rules != variant

    @jax.jit(static_argnums=1)
    def double(x, table):
        return constrain(2 * x, "act_batch", "act_mlp")

    x = jax.device_put(jnp.ones((4, 4)), rules.sharding(()))
    with use(rules):
        assert double(x, rules).sharding.spec == P(("data", "fsdp"), "tensor")
    with use(variant):
        assert double(x, variant).sharding.is_equivalent_to(variant.sharding(("act_batch", None)), 2)


def test_use_is_in_force_inside_alone(rules):
    def state():
        return jax.sharding.get_mesh().shape, nn.get_logical_axis_rules()

    before = state()
    with use(rules):
        assert jax.sharding.get_mesh() == rules.mesh
        inside = state()
        assert dict(inside[1])["act_batch"] == ("data", "fsdp")
        assert dict(inside[1])["heads"] == "tensor"
        assert dict(inside[1])["head_dim"] is None
        with use(make_rules(make_mesh(data=8), heads=None)):
            assert jax.sharding.get_mesh().shape["data"] == 8
            assert dict(nn.get_logical_axis_rules())["heads"] is None
        assert state() == inside
        with use(None):
            assert state() == inside
    assert state() == before


def test_use_ends_after_an_error(rules):
    with pytest.raises(RuntimeError, match="planted"), use(rules):
        raise RuntimeError("planted")
    assert not nn.get_logical_axis_rules()
    assert jax.sharding.get_mesh().empty


def test_sequence_splits_the_stream_between_layers_alone():
    mesh = make_mesh(context=2, tensor=4)
    rules = make_rules(mesh, sequence=True)
    assert rules.spec(("act_stream",)) == P(("context", "tensor"))
    assert rules.spec(("act_length", "act_heads")) == P("context", "tensor")
    assert make_rules(mesh).spec(("act_stream",)) == P("context")
    with pytest.raises(ValueError, match="sequence=True .* tensor, which is 1 here: .* has tensor=2"):
        make_rules(make_mesh(data=8), sequence=True)
    with pytest.raises(ValueError, match="context_attention='rink' is unknown: choose ring or all-gather"):
        make_rules(mesh, context_attention="rink")


def test_rules_for_decoding():
    """One token at a time leaves no sequence to split: the rest stays."""
    mesh = make_mesh(data=2, tensor=4)
    rules = make_rules(mesh, sequence=True).for_decoding()
    assert rules.spec(("act_stream", "heads")) == P(None, "tensor")
    for axis, what in (("context", "sequence"), ("stage", "layers")):
        sizes: dict[str, Any] = {axis: 2, "tensor": 4}
        message = f"mesh axis {axis}=2 splits the {what}, .* has {axis}=1,tensor=8"
        with pytest.raises(ValueError, match=message):
            make_rules(make_mesh(**sizes)).for_decoding()
