"""Which parameters become int8 in every class of the zoo, and where the parts lie on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
from modelzoo import quantizing, registry
from modelzoo import weights as tables
from modelzoo.layers import linear
from modelzoo.layers.quantized import dequantize, is_quantized
from tests import zoo

CLASSES = [cls for family in registry.FAMILIES.values() for cls in family.classes]


def tiny(cls):
    family = next(f for f in registry.FAMILIES.values() if cls in f.classes)
    return cls(next(config for name, config in family.presets.items() if name.startswith("tiny")))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_scale_is_shared_along_what_a_kernel_contracts(cls, monkeypatch):
    """The rule that reads inputs off logical axes agrees with what the layers contract."""
    contracted = []
    declare = linear.parameter

    def spy(module, name, init, shape, axes, *rest):
        if name == "kernel" and isinstance(module, linear.Linear):
            contracted.append((shape, axes, len(module.inputs)))
        return declare(module, name, init, shape, axes, *rest)

    monkeypatch.setattr(linear, "parameter", spy)
    model = tiny(cls)
    modelzoo.model._abstract_init.cache_clear()
    axes, shapes = (
        tables.flatten(tree) for tree in (modelzoo.logical_axes(model), modelzoo.abstract_params(model))
    )
    shared = quantizing.shared_dims(model)
    assert shared
    for path, dims in shared.items():
        stacked = axes[path][0] == "layers"
        assert path[-1] in ("kernel", "embedding")
        if path[-1] == "kernel" and path != ("lm_head", "kernel"):
            seen = [
                n
                for shape, names, n in contracted
                if (shape, names) == (shapes[path].shape[stacked:], axes[path][stacked:])
            ]
            assert set(seen) == {len(dims)}
            assert dims == tuple(range(len(dims)))
    # Nothing large is forgotten but tables that no head is tied to, and MVP's prompts.
    left = {
        path for path, spec in shapes.items() if spec.ndim - (axes[path][0] == "layers") > 1
    } - shared.keys()
    assert all(
        path[-1] in ("embedding", "distance", "bias") or not {"layers", "lm_head"} & set(path)
        for path in left
    )


def test_a_tied_table_is_quantized_by_row():
    assert quantizing.shared_dims(tiny(modelzoo.BloomForCausalLM))["trunk", "embed", "embedding"] == (1,)
    assert ("trunk", "embed", "embedding") not in quantizing.shared_dims(tiny(modelzoo.GPTJForCausalLM))
    assert ("trunk", "embed", "embedding") not in quantizing.shared_dims(
        tiny(modelzoo.BloomForTokenClassification)
    )


@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_quantize_params_changes_what_it_says(form):
    model = modelzoo.GPTJForCausalLM(zoo.tiny_gptj())
    params = zoo.random_params(model)
    given = params if form == "stacked" else modelzoo.unstack_layers(params)
    packed = quantizing.quantize_params(model, given)
    back = jax.tree.map(dequantize, packed, is_leaf=is_quantized)
    assert jax.tree.structure(back) == jax.tree.structure(given)
    zoo.assert_close(back, given, 0.5 * 1.0 / 127 + 1e-6)
    again = quantizing.quantize_params(model, packed)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(packed), strict=True))
    layers = packed["trunk"]["layers"]
    kernel = (layers if form == "stacked" else layers[1])["attention"]["out"]["kernel"]
    assert kernel.scale.shape == ((2, 1, 1, 24) if form == "stacked" else (1, 1, 24))
    assert packed["lm_head"]["bias"] is given["lm_head"]["bias"]
    with pytest.raises(ValueError, match="quantize = 'int4'"):
        quantizing.check_kind("int4")


def test_scales_lie_with_their_outputs():
    rules = parallel.make_rules(parallel.make_mesh(fsdp=2, tensor=4))
    kernel = jax.device_put(
        jnp.asarray(np.random.default_rng(0).standard_normal((8, 4, 6)), jnp.float32),
        rules.sharding(("embed", "heads", "head_dim")),
    )
    packed = quantizing.quantize_array(kernel, (0,))
    assert packed.values.sharding == kernel.sharding
    assert packed.scale.sharding == rules.sharding((None, "heads", "head_dim"))
    alone = quantizing.quantize_array(np.asarray(kernel), (0,))
    zoo.assert_equal(packed, alone)  # the maximum runs over all shards
