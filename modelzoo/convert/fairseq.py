"""fairseq's RoBERTa checkpoints: one .pt file of a run's options, its model and its optimizer.

Reference: transformers 4.57, models/roberta/convert_roberta_original_pytorch_checkpoint_to_pytorch.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelzoo.convert.checkpoint import Checkpoint, Tensor, part_of_rows, stored
from modelzoo.tensor_files import TensorRef
from modelzoo.torch_names import Record
from modelzoo.unpickle import read_torch_tree

LAYER = "roberta.encoder.layer."
RENAMES = tuple(
    (re.compile(old), new)
    for old, new in (
        # The encoder's name in fairseq's versions.
        (r"^decoder\.sentence_encoder\.", "encoder.sentence_encoder."),
        (r"^decoder\.lm_head\.", "encoder.lm_head."),
        (r"^encoder\.lm_head\.weight$", "lm_head.decoder.weight"),
        (r"^encoder\.lm_head\.", "lm_head."),
        (r"^encoder\.sentence_encoder\.embed_tokens\.", "roberta.embeddings.word_embeddings."),
        (r"^encoder\.sentence_encoder\.embed_positions\.", "roberta.embeddings.position_embeddings."),
        (
            r"^encoder\.sentence_encoder\.(emb_layer_norm|layernorm_embedding)\.",
            "roberta.embeddings.LayerNorm.",
        ),
        (r"^encoder\.sentence_encoder\.layers\.", LAYER),
        (r"\.self_attn\.q_proj\.", ".attention.self.query."),
        (r"\.self_attn\.k_proj\.", ".attention.self.key."),
        (r"\.self_attn\.v_proj\.", ".attention.self.value."),
        (r"\.self_attn\.out_proj\.", ".attention.output.dense."),
        (r"\.self_attn_layer_norm\.", ".attention.output.LayerNorm."),
        (r"\.fc1\.", ".intermediate.dense."),
        (r"\.fc2\.", ".output.dense."),
        (r"^(roberta\.encoder\.layer\.\d+)\.final_layer_norm\.", r"\1.output.LayerNorm."),
    )
)
FUSED = re.compile(r"(.*\.self_attn\.)in_proj_(weight|bias)")
PADDING = 1


def read_fairseq(path: Path, config: Mapping[str, Any] | None, scratch: Path) -> Checkpoint:
    """Reads a RoBERTa language model that fairseq trained.

    Args:
        path: the .pt file.
        config: a config.json for what the options do not say; its fields win over theirs.
        scratch: not needed.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is corrupt, it names something that is not known to be inert, or it is no RoBERTa.
    """
    del scratch
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not a file: pass fairseq's checkpoint, such as model.pt")
    content = read_torch_tree(path)
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{path}: not a fairseq checkpoint: it has no table `model`")
    tensors: dict[str, Tensor] = {}
    for name, ref in model.items():
        if isinstance(ref, TensorRef) and not name.endswith(("version", "_float_tensor")):
            tensors |= _renamed(name, ref)
    options = content.get("args")
    try:
        hf_config = _config(options.fields if isinstance(options, Record) else {}, tensors)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: no RoBERTa of fairseq: it has no {error}") from None
    words = tensors["roberta.embeddings.word_embeddings.weight"]
    if "lm_head.decoder.weight" in tensors and tensors["lm_head.decoder.weight"].shape == words.shape:
        del tensors["lm_head.decoder.weight"]  # the word embeddings once more
    shape, dtype = (1, words.shape[1]), words.dtype  # fairseq has no token types; transformers adds one
    tensors["roberta.embeddings.token_type_embeddings.weight"] = Tensor(
        "token types", shape, dtype, lambda: np.zeros(shape, dtype)
    )
    return Checkpoint(hf_config | dict(config or {}), tensors, path.parent)


def _renamed(name: str, ref: TensorRef) -> dict[str, Tensor]:
    if match := FUSED.fullmatch(name):  # versions before 0.9 fuse the three projections
        parts = (part_of_rows(name, ref, (3, ref.shape[0] // 3), 0, i) for i in range(3))
        names = (f"{match[1]}{letter}_proj.{match[2]}" for letter in "qkv")
        return {_spelling(own): part for own, part in zip(names, parts, strict=True)}
    return {_spelling(name): stored(name, ref)}


def _spelling(name: str) -> str:
    for old, new in RENAMES:
        name = old.sub(new, name)
    return name


def _config(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """RoBERTa's config.json, from the tensors' shapes and what only the options know."""
    vocab_size, hidden_size = tensors["roberta.embeddings.word_embeddings.weight"].shape
    heads = options.get("encoder_attention_heads", options.get("decoder_attention_heads"))
    numbers = {int(name.removeprefix(LAYER).split(".")[0]) for name in tensors if name.startswith(LAYER)}
    return {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(numbers),
        "num_attention_heads": heads if heads is not None else hidden_size // 64,
        "intermediate_size": tensors[LAYER + "0.intermediate.dense.bias"].shape[0],
        "max_position_embeddings": tensors["roberta.embeddings.position_embeddings.weight"].shape[0],
        "hidden_act": options.get("activation_fn", "gelu"),
        "hidden_dropout_prob": options.get("dropout", 0.1),
        "attention_probs_dropout_prob": options.get("attention_dropout", 0.1),
        "layer_norm_eps": 1e-5,
        "type_vocab_size": 1,
        "pad_token_id": PADDING,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
