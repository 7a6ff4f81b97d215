"""Parameters on meshes: the same values everywhere, in even shards, padded and cut back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import modelzoo
import parallel
from tests.zoo import leaves_by_name, max_difference, random_params, tiny_gptj

MODEL = modelzoo.GPTJForCausalLM(tiny_gptj(vocab_size=211, n_embd=32, n_head=8, rotary_dim=4, n_inner=64))
MESHES = [dict(data=8), dict(fsdp=8), dict(tensor=8), dict(data=2, fsdp=2, tensor=2)]


def make_rules(**sizes):
    return parallel.make_rules(parallel.make_mesh(**sizes))


@pytest.fixture(scope="module")
def unsharded():
    return parallel.init_params(MODEL, jax.random.key(0))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_init_does_not_depend_on_the_mesh(sizes, unsharded):
    rules = make_rules(**sizes)
    params = parallel.init_params(MODEL, jax.random.key(0), rules)
    assert jax.tree.map(lambda a: a.sharding, params) == parallel.param_shardings(MODEL, rules)
    cut = parallel.unpad_params(params, MODEL)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(lambda a: a.shape, modelzoo.abstract_params(MODEL))
    assert max_difference(cut, unsharded) == 0
    for name, axis in (("trunk/embed/embedding", 0), ("lm_head/kernel", 1), ("lm_head/bias", 0)):
        leaf = leaves_by_name(params)[name]
        assert leaf.shape[axis] == -(-211 // sizes.get("tensor", 1)) * sizes.get("tensor", 1)
        assert (jnp.take(leaf, jnp.arange(211, leaf.shape[axis]), axis=axis) == 0).all()


def test_init_inside_use_is_init_outside(unsharded):
    rules = make_rules(data=2, fsdp=4)
    with parallel.use(rules):
        params = parallel.init_params(MODEL, jax.random.key(0), rules)
    assert max_difference(params, unsharded) == 0
    with parallel.use(parallel.make_rules(rules.mesh, act_length="fsdp", act_heads="fsdp")):
        params = parallel.init_params(MODEL, jax.random.key(0), rules)
    assert max_difference(params, unsharded) == 0


def test_init_of_bfloat16(unsharded):
    """Parameters are created in param_dtype, whatever the computation's."""
    model = MODEL.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = parallel.init_params(model, jax.random.key(0), make_rules(fsdp=8))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def bytes_per_device(tree):
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize(
    "sizes", [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(fsdp=2, tensor=4), dict(tensor=8)], ids=str
)
@pytest.mark.parametrize("vocab_size", [50400, 50257])
def test_each_device_holds_an_eighth_of_gpt_j(sizes, vocab_size):
    """Within 2%: padding and the few parameters that the mesh does not cut are all that may lie over."""
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("gpt-j-6b", vocab_size=vocab_size))
    held = bytes_per_device(parallel.abstract_sharded_params(model, make_rules(**sizes)))
    assert 1.0 <= held / (4 * modelzoo.num_params(model) / 8) <= 1.02


def test_devices_hold_what_the_shardings_promise():
    params = parallel.init_params(MODEL, jax.random.key(0), make_rules(data=2, fsdp=2, tensor=2))
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {bytes_per_device(params)}


def test_abstract_sharded_params_are_what_init_makes():
    rules = make_rules(data=2, fsdp=2, tensor=2)
    abstract = parallel.abstract_sharded_params(MODEL, rules)
    made = parallel.init_params(MODEL, jax.random.key(0), rules)
    describe = lambda a: (a.shape, a.dtype, a.sharding)  # noqa: E731
    assert jax.tree.map(describe, abstract) == jax.tree.map(describe, made)
    assert parallel.abstract_sharded_params(MODEL, None) == modelzoo.abstract_params(MODEL)
    assert abstract["trunk"]["layers"]["attention"]["query"]["kernel"].sharding.spec == P(
        "stage", "fsdp", "tensor", None
    )


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
@pytest.mark.parametrize("source", ["host", "unsharded", "another mesh"])
def test_shard_params(form, source):
    """From numpy, from one device, from a mesh with other padding; layers stacked or apart."""
    params = random_params(MODEL)
    before = {
        "host": lambda: jax.tree.map(np.asarray, params),
        "unsharded": lambda: params,
        "another mesh": lambda: parallel.shard_params(params, MODEL, make_rules(tensor=8)),
    }[source]()
    rules = make_rules(data=2, fsdp=2, tensor=2)
    if form == "unstacked":
        params, before = modelzoo.unstack_layers(params), modelzoo.unstack_layers(before)
    placed = parallel.shard_params(before, MODEL, rules)
    assert max_difference(parallel.unpad_params(placed, MODEL), params) == 0
    assert placed["lm_head"]["kernel"].shape == (32, 212)
    assert placed["lm_head"]["kernel"].sharding.spec == P("fsdp", "tensor")
    layers = placed["trunk"]["layers"]
    if form == "unstacked":
        assert layers[1]["mlp"]["fc_in"]["kernel"].sharding.spec == P("fsdp", "tensor")
    else:
        assert placed["trunk"]["layers"]["mlp"]["fc_in"]["kernel"].sharding.spec == P(
            "stage", "fsdp", "tensor"
        )
    # Onto a mesh that pads less than this one.
    smaller = parallel.shard_params(placed, MODEL, make_rules(data=8))
    assert max_difference(smaller, params) == 0


@pytest.mark.parametrize(
    "place",
    [
        lambda p: parallel.unpad_params(p, MODEL),
        lambda p: parallel.shard_params(p, MODEL, make_rules(data=8)),
    ],
)
@pytest.mark.parametrize("form", ["stacked", "unstacked"])
@pytest.mark.parametrize("n_inner", [32, 128])
def test_parameters_of_another_config_are_refused(place, form, n_inner):
    """Neither padded nor cut to fit: only vocabularies are."""
    params = random_params(
        MODEL.clone(config=tiny_gptj(vocab_size=211, n_embd=32, n_head=8, n_inner=n_inner))
    )
    params = modelzoo.unstack_layers(params) if form == "unstacked" else params
    with pytest.raises(
        ValueError, match=rf"parameter trunk/layers/.*mlp/fc_in/bias has shape .*{n_inner}.* makes it .*64"
    ):
        place(params)


def test_a_vocabulary_that_is_too_small_is_refused():
    params = random_params(MODEL.clone(config=tiny_gptj(vocab_size=210, n_embd=32, n_head=8, n_inner=64)))
    with pytest.raises(
        ValueError, match=r"parameter lm_head/bias has shape \(210,\), but the config makes it \(211,\)"
    ):
        parallel.shard_params(params, MODEL, make_rules(data=8))


def test_parameters_of_another_class_are_refused():
    params = random_params(modelzoo.GPTJForQuestionAnswering(MODEL.config))
    for place in (parallel.unpad_params, lambda p, m: parallel.shard_params(p, m, make_rules(data=8))):
        with pytest.raises(ValueError, match="not those of GPTJForCausalLM: their tree differs"):
            place(params, MODEL)


@pytest.mark.parametrize(
    ("config", "sizes", "overrides", "message"),
    [
        (
            dict(n_head=2),
            dict(tensor=8),
            {},
            r"parameter \S*/(key|out|query|value)/kernel .*'heads' has size 2, .* tensor=8 .* tensor=2",
        ),
        (
            dict(n_inner=36),
            dict(tensor=8),
            {},
            "parameter .*/fc_in/bias .*'mlp' has size 36, .* tensor=8 .* tensor=6",
        ),
        (
            dict(n_embd=36, n_head=4),
            dict(fsdp=8),
            {},
            "parameter .* 'embed' has size 36, .* fsdp=8 .* fsdp=6",
        ),
        ({}, dict(stage=8), {}, "parameter .* 'layers' has size 2, .* stage=8 .* stage=2"),
        ({}, dict(tensor=8), dict(heads="fsdp"), "parameter .* mesh axis 'fsdp' twice .*'embed' and 'heads'"),
        (
            dict(n_embd=256, n_inner=512),
            dict(tensor=8),
            dict(mlp=None),
            "parameter .*fc_in/kernel .* would lie whole",
        ),
    ],
)
def test_what_cannot_be_placed_names_the_parameter(config, sizes, overrides, message):
    sized = dict(vocab_size=211, n_embd=32, n_head=8, n_inner=64) | config
    model = MODEL.clone(config=tiny_gptj(**sized))
    rules = parallel.make_rules(parallel.make_mesh(**sizes), **overrides)
    for check in (parallel.param_shardings, parallel.abstract_sharded_params):
        with pytest.raises(ValueError, match=message):
            check(model, rules)
    with pytest.raises(ValueError, match=message):
        parallel.init_params(model, jax.random.key(0), rules)


def test_batch_sharding():
    rules = make_rules(data=2, fsdp=2, tensor=2)
    batch = jax.device_put(jnp.arange(12.0).reshape(4, 3), parallel.batch_sharding(rules))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(1, 3)}
    labels = jax.device_put(jnp.arange(8), parallel.batch_sharding(rules))
    assert {shard.data.shape for shard in labels.addressable_shards} == {(2,)}
