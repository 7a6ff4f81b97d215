"""config.json from a run's options, a given config, or neither."""

import pytest

from modelzoo.convert.megatron_configs import bert_config, check_options, gpt2_config, sizes_of

OPTIONS = dict(
    hidden_size=32, num_layers=3, num_attention_heads=4, max_position_embeddings=64, padded_vocab_size=128
)
PRETRAINING = ("lm_head.bias", "binary_head.weight", "pooler.dense.weight")


def test_bert_follows_the_options():
    config, notes = bert_config(OPTIONS | {"tokenizer_type": "T"}, None, PRETRAINING, 128, cut=False)
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]) == (32, 3, 4)
    assert (config["intermediate_size"], config["vocab_size"], config["tokenizer_type"]) == (128, 128, "T")
    assert config["architectures"] == ["MegatronBertForPreTraining"]
    assert (config["layer_norm_eps"], notes) == (1e-12, ())


def test_bert_says_where_transformers_departs_from_the_run():
    run = OPTIONS | {"layernorm_epsilon": 1e-5, "bias_gelu_fusion": True}
    config, notes = bert_config(run, None, PRETRAINING, 128, cut=False)
    assert (config["layer_norm_eps"], config["hidden_act"]) == (1e-12, "gelu")
    assert "layernorm_epsilon 1e-05" in notes[0]
    assert "approximated GELU" in notes[1]
    given = {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new"}
    config, notes = bert_config(run, given, PRETRAINING, 128, cut=False)
    assert given.items() <= config.items()
    assert notes == ()


def test_bert_without_options_is_the_345m():
    config, _ = bert_config(None, None, PRETRAINING, 30592, cut=False)
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (1024, 24, 30592)


@pytest.mark.parametrize(
    ("options", "given", "size"),
    [
        ({"orig_vocab_size": 100}, None, 100),
        ({"orig_vocab_size": 100}, {"vocab_size": 90}, 100),
        ({}, {"vocab_size": 90}, 90),
        ({"vocab_size": 99}, None, 99),
        ({"vocab_size": 99, "tokenizer_type": "NullTokenizer"}, None, 100),
        ({}, None, 128),
    ],
)
def test_padding_is_cut_where_the_true_size_is_known(options, given, size):
    config, notes = gpt2_config(OPTIONS | options, given, (), 128, cut=True)
    assert config["vocab_size"] == size
    assert bool(notes) == (size == 128)


def test_vocabularies_that_cannot_be():
    for options in ({"orig_vocab_size": 129}, {"orig_vocab_size": 0}, {"orig_vocab_size": "100"}):
        with pytest.raises(ValueError, match="the run's orig_vocab_size is"):
            gpt2_config(OPTIONS | options, None, (), 128, cut=True)
    with pytest.raises(ValueError, match="the config's vocab_size is 200, where the file holds 128 rows"):
        bert_config(OPTIONS, {"vocab_size": 200}, PRETRAINING, 128, cut=False)


@pytest.mark.parametrize(
    ("options", "activation"),
    [
        ({"bias_gelu_fusion": True}, "gelu_fast"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_new"),
        ({"bias_gelu_fusion": False, "openai_gelu": False}, "gelu"),
        (None, "gelu_new"),
    ],
)
def test_gpt2_activation(options, activation):
    said = None if options is None else OPTIONS | options
    assert gpt2_config(said, None, (), 128, cut=True)[0]["activation_function"] == activation


def test_gpt2_special_tokens_and_head():
    config, _ = gpt2_config(None, None, (), 50304, cut=True)
    assert (config["vocab_size"], config["eos_token_id"], config["tie_word_embeddings"]) == (
        50257,
        50256,
        True,
    )
    config, _ = gpt2_config(OPTIONS, None, ("output_layer.weight",), 128, cut=True)
    assert (config["eos_token_id"], config["tie_word_embeddings"]) == (127, False)


def test_a_config_of_another_model():
    with pytest.raises(ValueError, match="model_type 'roberta', where the file holds a gpt2"):
        gpt2_config(None, {"model_type": "roberta"}, (), 128, cut=True)


@pytest.mark.parametrize(
    "option",
    [
        {"swiglu": True},
        {"normalization": "RMSNorm"},
        {"apply_layernorm_1p": True},
        {"add_bias_linear": False},
        {"position_embedding_type": "rope"},
        {"num_experts": 8},
        {"group_query_attention": True, "num_query_groups": 2},
        {"kv_channels": 16},
        {"apply_residual_connection_post_layernorm": True},
    ],
    ids=str,
)
def test_options_that_transformers_cannot_express(option):
    with pytest.raises(ValueError, match=f"{list(option)[-1]} = .*GPT-2 cannot express"):
        check_options(OPTIONS | option, "GPT-2")


def test_options_that_change_nothing():
    plain = {
        "swiglu": False,
        "kv_channels": 8,
        "num_experts": None,
        "position_embedding_type": "learned_absolute",
    }
    check_options(OPTIONS | plain | {"group_query_attention": False, "num_query_groups": 1}, "GPT-2")
    check_options(None, "GPT-2")
    assert sizes_of(gpt2_config(OPTIONS, None, (), 128, cut=True)[0])["f"] == 128


def test_sizes_that_are_none():
    config, _ = gpt2_config(OPTIONS, None, (), 128, cut=True)
    for change, what in [
        ({"n_embd": 0}, "n_embd is 0"),
        ({"n_head": 5}, "5 heads do not divide its width 32"),
    ]:
        with pytest.raises(ValueError, match=what):
            sizes_of(config | change)
    assert sizes_of(config | {"n_inner": None})["f"] == 128
