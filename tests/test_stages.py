"""Where layers lie: a chain through all stages, once for every chunk."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import parallel
from parallel import stages


@pytest.mark.parametrize(("virtual", "num_stages"), [(1, 4), (2, 2), (3, 2)])
def test_a_walk_through_chunks_and_stages_passes_the_layers_in_order(virtual, num_stages):
    layers = {"kernel": jnp.arange(12)[:, None] * jnp.ones((1, 3), int)}
    cut = stages.cut(layers, virtual, num_stages)
    walk = [cut["kernel"][c, s, :, 0] for c in range(virtual) for s in range(num_stages)]
    np.testing.assert_array_equal(jnp.concatenate(walk), np.arange(12))
    np.testing.assert_array_equal(stages.join(cut)["kernel"], layers["kernel"])


def test_neighbours():
    assert stages.neighbours(3, 1, False) == [(0, 1), (1, 2)]
    assert stages.neighbours(3, -1, False) == [(1, 0), (2, 1)]
    assert stages.neighbours(3, 1, True) == [(0, 1), (1, 2), (2, 0)]
    assert stages.neighbours(3, -1, True) == [(0, 2), (1, 0), (2, 1)]


def test_pinned_layers_keep_the_parameters_other_shards():
    rules = parallel.make_rules(parallel.make_mesh(stage=2, fsdp=2, tensor=2))
    sharding = rules.sharding(("layers", "embed", "mlp"))
    layers = jax.device_put(jnp.ones((4, 8, 6)), sharding)
    with parallel.use(rules):
        pinned = jax.jit(lambda a: stages.pin(stages.cut(a, 1, 2), sharding))(layers)
    assert pinned.sharding.spec == P(None, "stage", None, "fsdp", "tensor")


def test_inside_a_stage_what_is_pinned_lies_in_the_parameters_shards():
    rules = parallel.make_rules(parallel.make_mesh(stage=2, fsdp=2, tensor=2))
    sharding = rules.sharding(("layers", "embed", "mlp"))
    layers = jax.device_put(jnp.ones((4, 8, 6)), rules.sharding(("layers", None, None)))

    @partial(jax.shard_map, in_specs=P("stage"), out_specs=P("stage"), axis_names={"stage"}, check_vma=False)
    def inside(layers):
        return stages.pin_inside(layers + 1, sharding)

    with parallel.use(rules):
        pinned = jax.jit(inside)(layers)
    assert pinned.sharding.spec == P("stage", "fsdp", "tensor")


def test_one_stages_part():
    layers = {"kernel": jnp.arange(12).reshape(2, 1, 2, 3)}  # [chunk, stage, layer, ...] inside a shard_map
    mine = stages.inner(layers, 1)
    np.testing.assert_array_equal(stages.pick(mine, jnp.int32(1))["kernel"], np.arange(6, 12).reshape(2, 3))
    ring = stages.put(jnp.zeros((2, 3, 4)), jnp.ones(4), jnp.int32(1), jnp.int32(2))
    assert ring[1, 2].sum() == ring.sum() == 4
