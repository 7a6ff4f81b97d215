"""What every model class has: parameters without allocation, their axes, inputs and cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import modelzoo
import parallel
from modelzoo.model import StackOptions
from tests.zoo import leaves_by_name, tiny_gptj

CLASSES = modelzoo.get_family("gptj").classes


def test_abstract_params_are_what_init_makes():
    model = modelzoo.GPTJForCausalLM(tiny_gptj(), param_dtype=jnp.float16)
    made = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), input_ids=jnp.zeros((2, 3), jnp.int32)))[
        "params"
    ]
    abstract = modelzoo.abstract_params(model)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), abstract)
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), made)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float16")}
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))


@pytest.mark.parametrize("model_class", CLASSES)
def test_every_dimension_of_every_parameter_is_named(model_class):
    model = model_class(tiny_gptj())
    axes = modelzoo.logical_axes(model)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): names
        for path, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    }
    shapes = {name: leaf.shape for name, leaf in leaves_by_name(modelzoo.abstract_params(model)).items()}
    assert named.keys() == shapes.keys()
    for name, shape in shapes.items():
        assert len(named[name]) == len(shape), name
        assert ("layers" in named[name]) == ("/layers/" in f"/{name}"), name
        assert named[name].index("layers") == 0 if "layers" in named[name] else True, name


def test_axes_are_those_of_the_contract():
    axes = modelzoo.logical_axes(modelzoo.GPTJForCausalLM(tiny_gptj()))
    assert axes["trunk"]["embed"]["embedding"] == ("vocab", "embed")
    assert axes["trunk"]["layers"]["attention"]["query"]["kernel"] == ("layers", "embed", "heads", "head_dim")
    assert axes["trunk"]["layers"]["attention"]["out"]["kernel"] == ("layers", "heads", "head_dim", "embed")
    assert axes["trunk"]["layers"]["mlp"]["fc_in"] == {
        "kernel": ("layers", "embed", "mlp"),
        "bias": ("layers", "mlp"),
    }
    assert axes["trunk"]["layers"]["mlp"]["fc_out"] == {
        "kernel": ("layers", "mlp", "embed"),
        "bias": ("layers", "embed"),
    }
    assert axes["lm_head"] == {"kernel": ("embed", "vocab"), "bias": ("vocab",)}


def test_parameters_are_described_on_a_mesh_as_off_it():
    """Also when asked for the first time while a mesh is in force, on which the traced row would not divide."""
    model, again = (
        modelzoo.GPTJForCausalLM(tiny_gptj(n_positions=31), param_dtype=d) for d in (jnp.float32,) * 2
    )
    # Rules under which no activation of this model could be laid out: parameters have nothing to do with them.
    rules = parallel.make_rules(parallel.make_mesh(data=2, tensor=4), act_length="tensor")
    with parallel.use(rules):
        inside = modelzoo.logical_axes(model), modelzoo.abstract_params(model), modelzoo.num_params(model)
    outside = modelzoo.logical_axes(again), modelzoo.abstract_params(again), modelzoo.num_params(again)
    assert inside == outside
    assert all(leaf.sharding is None for leaf in jax.tree.leaves(inside[1]))


def test_nothing_is_allocated_for_the_large_presets():
    """6 billion parameters, counted and named; the arrays alive on the device are those of before."""
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("gpt-j-6b"))
    before = len(jax.live_arrays())
    assert modelzoo.num_params(model) == 6_050_882_784
    assert modelzoo.logical_axes(model)["trunk"]["final_norm"]["scale"] == ("embed",)
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("model_class", CLASSES)
def test_input_names_are_what_the_model_takes(model_class):
    names = modelzoo.input_names(model_class)
    assert names == modelzoo.input_names(model_class(tiny_gptj()))
    assert {"input_ids", "attention_mask", "cache", *StackOptions.__annotations__} <= names
    assert ("logits_to_keep" in names) == (model_class is modelzoo.GPTJForCausalLM)
    assert not names & {"self", "inputs", "labels", "args", "kwargs"}


def test_a_head_takes_what_its_trunk_takes():
    of_trunk = modelzoo.input_names(modelzoo.GPTJModel)
    assert modelzoo.input_names(modelzoo.GPTJForQuestionAnswering) == of_trunk
    assert modelzoo.input_names(modelzoo.GPTJForCausalLM) == of_trunk | {"logits_to_keep"}


def test_every_parameter_trains_unless_the_model_freezes_it():
    class Frozen(modelzoo.GPTJForCausalLM):
        def is_frozen(self, path):
            return path[0] == "lm_head"

    assert all(jax.tree.leaves(modelzoo.trainable(modelzoo.GPTJForCausalLM(tiny_gptj()))))
    trains = modelzoo.trainable(Frozen(tiny_gptj()))
    assert trains["lm_head"] == {"kernel": False, "bias": False}
    assert all(jax.tree.leaves(trains["trunk"]))


def test_an_unknown_input_is_refused():
    model = modelzoo.GPTJForCausalLM(tiny_gptj())
    with pytest.raises(TypeError, match="attention_masks"):
        jax.eval_shape(
            lambda p, x: model.apply({"params": p}, x, attention_masks=x),
            modelzoo.abstract_params(model),
            jax.ShapeDtypeStruct((1, 2), jnp.int32),
        )


def test_init_cache():
    model = modelzoo.GPTJForCausalLM(tiny_gptj(), dtype=jnp.bfloat16)
    cache = model.init_cache(5, 7)
    assert cache.layers.key.shape == cache.layers.value.shape == (2, 5, 3, 7, 8)  # [L, B, N, S, H]
    assert cache.layers.key.dtype == jnp.bfloat16
    assert model.init_cache(5, 7, jnp.float32).layers.value.dtype == jnp.float32
    assert model.init_cache(5, 32).mask.shape == (5, 32)
    with pytest.raises(ValueError, match="max_length 33 is past the 32 positions"):
        model.init_cache(5, 33)


def test_build_hands_every_field_on():
    model = modelzoo.GPTJForCausalLM(tiny_gptj(), jnp.bfloat16, jnp.float16, "full", False)
    trunk = model.bind({}).trunk  # made by `build` in setup
    fields = ("config", "dtype", "param_dtype", "remat", "scan_layers")
    assert [getattr(trunk, name) for name in fields] == [getattr(model, name) for name in fields]
    assert type(trunk) is modelzoo.GPTJModel


def test_models_are_hashable_values():
    a, b = (modelzoo.GPTJForCausalLM(tiny_gptj(), dtype=jnp.bfloat16) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != a.clone(remat="full")
