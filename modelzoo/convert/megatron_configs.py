"""config.json for Megatron-LM's BERT and GPT: from the options in the file, or transformers' defaults."""

from collections.abc import Collection, Mapping
from typing import Any

from modelzoo.convert import megatron_names as names

BERT_345M: dict[str, Any] = {
    "model_type": "megatron-bert",
    "vocab_size": 29056,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "use_cache": True,
}
"""transformers' MegatronBertConfig(): NVIDIA's cased 345M."""
GPT2_345M: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 1024,
    "n_layer": 24,
    "n_head": 16,
    "n_inner": 4096,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
    "summary_first_dropout": 0.1,
    "scale_attn_weights": True,
    "use_cache": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
"""NVIDIA's GPT-2 345M, as transformers' converter writes it."""
OPTIONS = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "ffn_hidden_size": ("intermediate_size", "n_inner"),
}
"""Megatron's options -> (MegatronBERT's field, GPT-2's)."""
Options = Mapping[str, Any] | None


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in a config of either model, under the letters of `megatron_names`.

    Raises:
        ValueError: the config lacks one, or it is no natural number.
    """
    side = config["model_type"] == "gpt2"
    fields = {letter: OPTIONS[option][side] for option, letter in zip(OPTIONS, SIZES, strict=True)}
    fields |= {"v": "vocab_size"} if side else {"v": "vocab_size", "t": "type_vocab_size"}
    sizes: dict[str, Any] = {letter: config.get(field) for letter, field in fields.items()}
    if side and sizes["f"] is None:
        sizes["f"] = 4 * config[fields["d"]]
    for letter, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"the config's {fields[letter]} is {size!r}, not a size")
    if sizes["d"] % sizes["n"]:
        raise ValueError(f"the config's {sizes['n']} heads do not divide its width {sizes['d']}")
    labels = config.get("id2label")
    num_labels = len(labels) if labels else config.get("num_labels", 2)
    return sizes | {"c": num_labels, "2": 2, "1": 1}


SIZES = ("d", "layers", "n", "p", "f")


def check_options(options: Options, model: str) -> None:
    """Whether transformers' model computes what a run with these options did.

    Raises:
        ValueError: names the option that it does not have.
    """
    options = options or {}

    def is_of(option: str, *values: Any) -> bool:
        return options.get(option, values[0]) in values

    heads = options.get("num_attention_heads")
    width = options.get("hidden_size")
    plain = {
        "swiglu": is_of("swiglu", False, None),
        "squared_relu": is_of("squared_relu", False, None),
        "normalization": is_of("normalization", "LayerNorm", None),
        "apply_layernorm_1p": is_of("apply_layernorm_1p", False, None),
        "apply_residual_connection_post_layernorm": is_of(
            "apply_residual_connection_post_layernorm", False, None
        ),
        "add_bias_linear": is_of("add_bias_linear", True, None),
        "use_rotary_position_embeddings": is_of("use_rotary_position_embeddings", False, None),
        "position_embedding_type": is_of("position_embedding_type", "learned_absolute", None)
        or str(options["position_embedding_type"]).endswith("learned_absolute"),
        "num_experts": is_of("num_experts", None, 0, 1) or options["num_experts"] in ([], [1]),
        "num_query_groups": not options.get("group_query_attention") or is_of("num_query_groups", heads),
        "kv_channels": not (options.get("kv_channels") and heads and width)
        or options["kv_channels"] * heads == width,
    }
    for option, fits in plain.items():
        if not fits:
            raise ValueError(f"was trained with {option} = {options[option]!r}, which {model} cannot express")


def bert_config(
    options: Options, given: Options, found: Collection[str], rows: int, cut: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """MegatronBERT's config.json, with its class.

    Args:
        options: the file's own, if it has any: they decide over `given`.
        given: the user's config.json, or None.
        found: the names of the tensors.
        rows: of the word embeddings, padded.
        cut: whether options may say a vocabulary smaller than that.

    Returns:
        (config, notes for the user).

    Raises:
        ValueError: a config of another model, or a vocabulary larger than the file's.
    """
    config = _base(BERT_345M, given)
    _apply(config, options, side=0)
    vocab, notes = _vocab_size(options, given, rows, rows, cut)
    config["vocab_size"] = vocab
    if options and options.get("tokenizer_type"):
        config["tokenizer_type"] = options["tokenizer_type"]
    config["architectures"] = [names.bert_class(found)]
    # transformers' converter takes neither from the options. The note lets the user decide.
    said = options or {}
    if (epsilon := said.get("layernorm_epsilon")) not in (None, config["layer_norm_eps"]):
        notes += (
            f"the run had layernorm_epsilon {epsilon}; config.json has layer_norm_eps "
            f"{config['layer_norm_eps']}, as transformers' converter writes it: --config with it changes that",
        )
    if (said.get("bias_gelu_fusion") or said.get("openai_gelu")) and config["hidden_act"] == "gelu":
        notes += (
            "the run approximated GELU by tanh; config.json has hidden_act 'gelu', as transformers' converter "
            "writes it: --config with 'gelu_new' changes that",
        )
    return config, notes


def gpt2_config(
    options: Options, given: Options, found: Collection[str], rows: int, cut: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """GPT-2's config.json; arguments, result and errors as of `bert_config`."""
    config = _base(GPT2_345M, given)
    _apply(config, options, side=1)
    default = rows if options else min(rows, GPT2_345M["vocab_size"])
    config["vocab_size"], notes = _vocab_size(options, given, rows, default, cut)
    if not given:
        if options and options.get("bias_gelu_fusion"):
            config["activation_function"] = "gelu_fast"
        elif options and "openai_gelu" in options and not options["openai_gelu"]:
            config["activation_function"] = "gelu"
        if config["vocab_size"] <= config["eos_token_id"]:
            config["bos_token_id"] = config["eos_token_id"] = config["vocab_size"] - 1
    if (options or {}).get("tokenizer_type", "GPT2BPETokenizer") == "GPT2BPETokenizer":
        config.setdefault("tokenizer_class", "GPT2Tokenizer")
    config["tie_word_embeddings"] = "output_layer.weight" not in found
    config["architectures"] = ["GPT2LMHeadModel"]
    return config, notes


def _base(default: Mapping[str, Any], given: Options) -> dict[str, Any]:
    model_type = (given or {}).get("model_type", default["model_type"])
    if model_type != default["model_type"]:
        raise ValueError(
            f"the config is of model_type {model_type!r}, where the file holds a {default['model_type']}"
        )
    return {**default, **(given or {})}


def _apply(config: dict[str, Any], options: Options, side: int) -> None:
    """Writes the sizes that a run's options say into a config."""
    if options is None:
        return
    for option, fields in OPTIONS.items():
        value = options.get(option)
        if value is None and option == "ffn_hidden_size" and options.get("hidden_size") is not None:
            value = 4 * options["hidden_size"]
        if value is not None:
            config[fields[side]] = value


def _vocab_size(
    options: Options, given: Options, rows: int, default: int, cut: bool
) -> tuple[int, tuple[str, ...]]:
    """(the true size of the vocabulary, or the padded one where nothing says it; notes for the user)."""
    options = options or {}
    said = {"the config's vocab_size": (given or {}).get("vocab_size")}
    if cut:
        size = options.get("vocab_size")
        if type(size) is int and str(options.get("tokenizer_type")).startswith("Null"):
            size += 1  # that tokenizer's end of text
        said = {"the run's orig_vocab_size": options.get("orig_vocab_size")} | said
        said |= {"the run's vocab_size": size}
    for what, size in said.items():
        if size is not None:
            if type(size) is not int or not 0 < size <= rows:
                raise ValueError(f"{what} is {size!r}, where the file holds {rows} rows of word embeddings")
            return size, ()
    size = options.get("padded_vocab_size", default)
    if cut and size >= rows:
        note = f"keeps all {rows} rows of the vocabulary, padding included: pass --config with vocab_size to cut it"
        return size, (note,)
    return size, ()
