"""GPT-J on meshes of eight simulated devices: the numbers of one device, and only the collectives of the theory."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import modelzoo
import parallel
from tests.hlo import Collective, collectives, compile_anew
from tests.zoo import assert_close, assert_close_relative, random_params, tiny_gptj

SIZES = dict(vocab_size=211, n_embd=32, n_head=8, rotary_dim=4, n_inner=64)  # no mesh divides the vocabulary
MODEL: Any = modelzoo.GPTJForCausalLM(tiny_gptj(**SIZES))
L, B, T, D, F = 2, 8, 12, 32, 64
WARNING = (
    "Involuntary full rematerialization"  # the compiler gathers an array on every device to lay it out anew
)


def make_rules(**sizes):
    return parallel.make_rules(
        parallel.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    )


def make_batch():
    random = np.random.default_rng(5)
    mask = np.ones((B, T), np.int32)
    mask[0, :4] = mask[1, 7:] = mask[2, 3] = 0
    ids, types = random.integers(0, 211, (2, B, T)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


BATCH = make_batch()


@functools.cache
def params():
    return random_params(MODEL)


def loss(model, params, batch, **kwargs):
    """Mean cross-entropy of the next token."""
    logits = model.apply({"params": params}, **batch, **kwargs).logits[:, :-1]
    right = jnp.take_along_axis(logits, batch["input_ids"][:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - right)


def make_step(remat="none", dropout=0.0):
    """A function from (params, batch) to (loss, gradients)."""
    drops = dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    model = MODEL.clone(config=tiny_gptj(**SIZES, **drops), remat=remat)
    kwargs = dict(deterministic=False, rngs={"dropout": jax.random.key(3)}) if dropout else {}
    return jax.value_and_grad(functools.partial(loss, model, **kwargs))


@functools.cache
def step_on_one_device(dropout=0.0):
    return jax.jit(make_step(dropout=dropout))(params(), BATCH)


def check_step(rules, **how):
    """Loss and every gradient on the mesh are those on one device, and no array was gathered to be laid out.

    Returns:
        (the gradients, the compiled step's collectives, its text).
    """
    place = parallel.batch_sharding(rules)
    placed, batch = parallel.shard_params(params(), MODEL, rules), jax.device_put(BATCH, place)
    shardings = (None, parallel.param_shardings(MODEL, rules))
    with parallel.use(rules):
        lowered = jax.jit(make_step(**how), out_shardings=shardings).lower(placed, batch)
        compiled, warnings = compile_anew(lowered)
        value, gradients = compiled(placed, batch)
    expected, expected_gradients = step_on_one_device(how.get("dropout", 0.0))
    assert WARNING not in warnings
    assert abs(float(value) - float(expected)) <= 1e-6 * abs(float(expected))
    assert_close_relative(parallel.unpad_params(gradients, MODEL), expected_gradients, 1e-5)
    return gradients, collectives(compiled), compiled.as_text()


def shard_sizes(rules):
    """How large the layers' and the other parameters are where they are used: whole along embed. In both of these
    sorted lists, one layer's of each."""
    abstract = parallel.abstract_sharded_params(MODEL, rules)

    def in_use(leaf):
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * (
            rules.mesh.shape["fsdp"] if leaf.ndim else 1
        )

    layers = [in_use(leaf) // L for leaf in jax.tree.leaves(abstract["trunk"].pop("layers"))]
    return sorted(layers), sorted(in_use(leaf) for leaf in jax.tree.leaves(abstract))


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_tensor_parallel(tensor):
    """No logits and no parameter travels: nothing but all-reduces of activations, [B, T, D] at most."""
    gradients, found, _ = check_step(make_rules(tensor=tensor))
    padded = [gradients["trunk"]["embed"]["embedding"][211:], gradients["lm_head"]["kernel"][:, 211:]]
    assert padded[0].shape == (-211 % tensor, D)
    assert all((rows == 0).all() for rows in padded)
    assert {one.kind for one in found} == {"all-reduce"}
    assert max(one.size for one in found) == B * T * D


def test_data_parallel():
    """Each gradient is reduced once, a layer's in the loop; nothing else is sent."""
    _, found, _ = check_step(make_rules(data=8))
    assert {one.kind for one in found} == {"all-reduce"}
    layers, rest = shard_sizes(make_rules(data=8))
    assert sorted(one.size for one in found if one.in_loop) == layers
    # Token types are a second look into the table, with a gradient of its own.
    assert sorted(one.size for one in found if not one.in_loop) in (rest, sorted([*rest, 211 * D]))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_fsdp(remat):
    """Parameters are gathered where they are used, in backward again: no stack of gathered kernels is kept for it."""
    rules = make_rules(fsdp=8)
    _, found, text = check_step(rules, remat=remat)
    gathered = [one for one in found if one.kind == "all-gather"]
    assert {one.kind for one in found} - {"reduce-scatter"} == {"all-gather", "all-reduce"}
    assert max(one.size for one in gathered if one.in_loop) == D * F  # one kernel of one layer
    assert f"f32[{L},{D // 8},{F}]" in text  # as it rests
    assert f"f32[{L},{D},{F}]" not in text
    # Nine of a layer's arrays are cut, all but fc_in's bias. Backward has no use for the biases, nor for the scale if
    # what it makes is saved.
    in_loop = sum(one.in_loop for one in gathered)
    assert 9 + 6 <= in_loop <= 9 + 9


def test_data_and_fsdp_and_tensor():
    gradients, found, _ = check_step(make_rules(data=2, fsdp=2, tensor=2))
    assert (gradients["lm_head"]["kernel"][:, 211:] == 0).all()
    kinds = {one.kind for one in found}
    assert {"all-gather", "all-reduce"} <= kinds <= {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.long
def test_dropout_does_not_depend_on_the_mesh():
    """Masks are drawn by position in the whole array; a device-local draw would repeat itself or differ."""
    assert abs(float(step_on_one_device(0.2)[0]) - float(step_on_one_device()[0])) > 1e-3
    check_step(make_rules(data=2, fsdp=2, tensor=2), dropout=0.2)


def test_a_needless_gathering_would_be_seen():
    rules = make_rules(fsdp=4, tensor=2)

    def reshard(x):
        x = jax.lax.with_sharding_constraint(2 * x, P(("fsdp", "tensor"), None))
        return jax.lax.with_sharding_constraint(jnp.sin(x), P(None, "fsdp")).sum()

    with parallel.use(rules):
        _, warnings = compile_anew(jax.jit(reshard).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)))
    assert WARNING in warnings


class TestForward:
    """The trunk alone, from embeddings that lie where it expects them."""

    def trunk(self, rules, scan=True):
        abstract = parallel.abstract_sharded_params(MODEL, rules)["trunk"]
        trunk: Any = modelzoo.GPTJModel(MODEL.config, scan_layers=scan)
        x = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=parallel.batch_sharding(rules))
        with parallel.use(rules):
            function = jax.jit(lambda p, x: trunk.apply({"params": p}, inputs_embeds=x).last_hidden_state)
            return collectives(compile_anew(function.lower(abstract, x))[0])

    def test_tensor_parallel_is_two_all_reduces_a_block(self):
        reduced = Collective("all-reduce", (B, T, D), in_loop=True)
        assert self.trunk(make_rules(tensor=4)) == [reduced, reduced]
        unrolled = self.trunk(make_rules(tensor=4), scan=False)
        assert unrolled == [Collective("all-reduce", (B, T, D), in_loop=False)] * 2 * L

    def test_data_parallel_is_none(self):
        assert self.trunk(make_rules(data=8)) == []

    def test_fsdp_is_one_all_gather_a_parameter(self):
        found = self.trunk(make_rules(fsdp=8))
        assert {one.kind for one in found} == {"all-gather"}
        layers = [F, *(D,) * 3, *(D * D,) * 4, *(D * F,) * 2]
        assert sorted(one.size for one in found if one.in_loop) == sorted(layers)[:3] + sorted(layers)[4:]
        assert [one.size for one in found if not one.in_loop] == [D, D]  # the final norm's


def test_padded_logits_are_minus_infinity_and_stay_apart():
    rules = make_rules(data=2, tensor=4)
    placed = parallel.shard_params(params(), MODEL, rules)
    with parallel.use(rules):
        run = jax.jit(lambda p, b: MODEL.apply({"params": p}, **b, output_hidden_states=True))
        out = run(placed, jax.device_put(BATCH, parallel.batch_sharding(rules)))
    expected = jax.jit(lambda p, b: MODEL.apply({"params": p}, **b, output_hidden_states=True))(
        params(), BATCH
    )
    assert out.logits.shape == (B, T, 212)
    assert jnp.isneginf(out.logits[..., 211:]).all()
    assert_close(out.logits[..., :211], expected.logits, 2e-6 * float(jnp.abs(expected.logits).max()))
    assert_close(
        out.hidden_states, expected.hidden_states, 2e-6 * float(jnp.abs(expected.hidden_states[-1]).max())
    )
    assert out.logits.sharding.spec == P("data", None, "tensor")


def test_activations_lie_where_the_rules_say():
    """From inputs that lie whole on every device: nothing but the model's own constraints can have spread them."""
    rules = make_rules(data=2, fsdp=2, tensor=2)
    whole = jax.device_put((params(), BATCH), rules.sharding(()))

    def run(params, batch):
        out = MODEL.apply({"params": params}, **batch, output_hidden_states=True, output_attentions=True)
        return out.hidden_states[1], out.attentions[0]

    with parallel.use(rules):
        hidden, attention = jax.jit(lambda *a: run(*a))(*whole)
    assert hidden.sharding.is_equivalent_to(rules.sharding(("act_batch", None, None)), 3)
    assert attention.sharding.is_equivalent_to(rules.sharding(("act_batch", "act_heads", None, None)), 4)
    with jax.set_mesh(rules.mesh):  # a mesh without rules: nothing is asked for, and nothing happens
        hidden, _ = jax.jit(lambda *a: run(*a))(*whole)
    assert hidden.sharding.is_fully_replicated


def test_cached_decoding():
    """A prompt, then two single tokens, on unstacked parameters and cache."""
    rules, ids = make_rules(data=2, fsdp=2, tensor=2), jnp.asarray(BATCH["input_ids"])
    placed = modelzoo.unstack_layers(parallel.shard_params(params(), MODEL, rules))
    cache, logits = modelzoo.unstack_layers(MODEL.init_cache(B, 16)), []
    with parallel.use(rules):
        step = jax.jit(lambda p, i, c: MODEL.apply({"params": p}, i, cache=c))
        for chunk in (ids[:, :10], ids[:, 10:11], ids[:, 11:12]):
            out = step(placed, chunk, cache)
            cache = out.cache
            logits.append(out.logits[..., :211])
    key = cache.layers[0].key
    assert key.sharding.is_equivalent_to(rules.sharding(("act_batch", "act_heads", None, None)), 4)
    expected = jax.jit(lambda p, i: MODEL.apply({"params": p}, i).logits)(params(), ids)
    assert_close(jnp.concatenate(logits, axis=1), expected, 2e-6 * float(jnp.abs(expected).max()))


def test_bfloat16_kernels_are_gathered_as_such():
    """The cast comes before the gathering. Read before XLA's CPU backend, which widens bfloat16 collectives."""
    model, rules = MODEL.clone(dtype=jnp.bfloat16), make_rules(fsdp=8)
    abstract = parallel.abstract_sharded_params(model, rules)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=parallel.batch_sharding(rules))
    with parallel.use(rules):
        text = jax.jit(lambda p, i: model.apply({"params": p}, i).logits).lower(abstract, ids).as_text()
    constraints = [line for line in text.splitlines() if "sharding_constraint" in line]
    assert any(f"tensor<{D}x{F}xbf16>" in line for line in constraints)
    assert not any(f"tensor<{D}x{F}xf32>" in line for line in constraints)
