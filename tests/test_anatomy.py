import pytest

import modelzoo
from modelzoo import registry
from parallel import terminal
from parallel.anatomy import anatomy_of
from tests.zoo import TINY
from train.metrics import flops_per_token

LARGEST = [[p for p in family.presets if p not in TINY.values()][-1] for family in registry.FAMILIES.values()]


def model_of(preset, name):
    return modelzoo.get_model_class(name)(modelzoo.get_config(preset))


@pytest.mark.parametrize("preset", LARGEST)
def test_parameters_and_flops_are_those_of_the_model(preset):
    model = terminal.model_of(preset)
    anatomy = anatomy_of(model)
    assert anatomy.num_params == modelzoo.num_params(model)
    # Training's figure also counts biases and norms as if they were multiplied.
    assert 3 * anatomy.flops_per_token(512) == pytest.approx(flops_per_token(model, 512), rel=2e-2)


def test_stacks_are_told_apart():
    encoder, decoder = anatomy_of(model_of("mvp", "MvpForConditionalGeneration")).stacks
    assert (encoder.path[-1], decoder.path[-1]) == ("encoder", "decoder")
    assert (encoder.num_attentions, decoder.num_attentions) == (1, 2)
    assert not encoder.norm_first

    (stack,) = anatomy_of(model_of("gpt-j-6b", "GPTJForCausalLM")).stacks
    assert (stack.num_layers, stack.hidden, stack.mlp_dim, stack.num_heads) == (28, 4096, 16384, 16)
    assert stack.is_parallel
    assert stack.norm_first


def test_a_head_is_tied_or_not():
    bloom = anatomy_of(model_of("bloom-176b", "BloomForCausalLM"))
    assert bloom.tied
    assert bloom.head_kernels == ()
    gptj = anatomy_of(model_of("gpt-j-6b", "GPTJForCausalLM"))
    assert not gptj.tied
    assert [leaf.path for leaf in gptj.head_kernels] == [("lm_head", "kernel")]


def test_a_shard_of_a_parameter():
    table = anatomy_of(model_of("gpt-j-6b", "GPTJForCausalLM")).table
    assert table.size_on({"vocab": 64, "embed": 1}) == 788 * 4096  # padded up
    assert table.size_on({"vocab": 4, "embed": 16}) == 12600 * 256


def test_knobs_are_counted():
    knobs = dict(position="learned", block="sequential", norm_placement="post", qk_norm=True, norm="rms")
    sizes = dict(num_key_value_heads=4, activation_function="swiglu")
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("gpt-j-6b", **knobs, **sizes))
    anatomy = anatomy_of(model)
    (stack,) = anatomy.stacks
    assert (stack.num_heads, stack.num_kv_heads, stack.head_dim) == (16, 4, 256)
    assert (stack.mlp_dim, stack.mlp_inputs, stack.num_norms) == (10944, 2, 2)
    assert not stack.is_parallel
    assert not stack.norm_first
    assert 3 * anatomy.flops_per_token(512) == pytest.approx(flops_per_token(model, 512), rel=2e-2)
