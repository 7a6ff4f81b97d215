"""Lays arrays with transformers' names out as Megatron-LM does, by a way of its own: for tests of the converter.

Written from Megatron's side (what its layers compute), not from the converter's tables: a query-key-value
weight is built head by head, and a rank is cut from the whole.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from tests.torch_files import Call, Global, save_tree
from tests.zoo import drawn

D, HEADS, LAYERS, F, V, P = 12, 4, 2, 20, 22, 9
PADDED = 24
GPT2_SIZES = dict(n_embd=D, n_head=HEADS, n_layer=LAYERS, n_inner=F, vocab_size=V, n_positions=P)
BERT_SIZES = dict(
    hidden_size=D,
    num_attention_heads=HEADS,
    num_hidden_layers=LAYERS,
    intermediate_size=F,
    vocab_size=PADDED,
    max_position_embeddings=P,
)


def bert_arrays() -> dict[str, np.ndarray]:
    """transformers' MegatronBertForPreTraining."""
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (PADDED, D),
        "bert.embeddings.position_embeddings.weight": (P, D),
        "bert.embeddings.token_type_embeddings.weight": (2, D),
        "bert.encoder.ln.weight": (D,),
        "bert.encoder.ln.bias": (D,),
        "bert.pooler.dense.weight": (D, D),
        "bert.pooler.dense.bias": (D,),
        "cls.predictions.transform.dense.weight": (D, D),
        "cls.predictions.transform.dense.bias": (D,),
        "cls.predictions.transform.LayerNorm.weight": (D,),
        "cls.predictions.transform.LayerNorm.bias": (D,),
        "cls.predictions.bias": (PADDED,),
        "cls.seq_relationship.weight": (2, D),
        "cls.seq_relationship.bias": (2,),
    }
    for i in range(LAYERS):
        for name, shape in {
            "attention.ln": (D,),
            "attention.self.query": (D, D),
            "attention.self.key": (D, D),
            "attention.self.value": (D, D),
            "attention.output.dense": (D, D),
            "ln": (D,),
            "intermediate.dense": (F, D),
            "output.dense": (D, F),
        }.items():
            shapes[f"bert.encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"bert.encoder.layer.{i}.{name}.bias"] = shape[:1]
    return {name: drawn(name, shape) for name, shape in shapes.items()}


def gpt2_arrays(vocab_size: int = V) -> dict[str, np.ndarray]:
    """transformers' GPT2LMHeadModel."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab_size, D),
        "transformer.wpe.weight": (P, D),
        "transformer.ln_f.weight": (D,),
        "transformer.ln_f.bias": (D,),
    }
    for i in range(LAYERS):
        for name, shape in {
            "ln_1": (D,),
            "attn.c_attn": (D, 3 * D),
            "attn.c_proj": (D, D),
            "ln_2": (D,),
            "mlp.c_fc": (D, F),
            "mlp.c_proj": (F, D),
        }.items():
            shapes[f"transformer.h.{i}.{name}.weight"] = shape
            shapes[f"transformer.h.{i}.{name}.bias"] = shape[-1:]
    return {name: drawn(name, shape) for name, shape in shapes.items()}


def fused(query: Any, key: Any, value: Any, version: float) -> np.ndarray:
    """Megatron's query-key-value rows of some heads, in a version's order."""
    heads = [array.reshape(-1, D // HEADS, *array.shape[1:]) for array in (query, key, value)]
    rows = []
    if version == 0:
        rows = [row for array in heads for head in array for row in head]
    elif version == 1:
        rows = [array[n, d] for n in range(len(heads[0])) for d in range(D // HEADS) for array in heads]
    else:
        rows = [row for n in range(len(heads[0])) for array in heads for row in array[n]]
    return np.stack(rows)


def _cut(array: np.ndarray, axis: int, rank: int, tp: int) -> np.ndarray:
    return np.split(array, tp, axis)[rank]


def _padded(array: np.ndarray) -> np.ndarray:
    """Rows that no token has, up to the padded vocabulary."""
    return np.concatenate([array, np.full((PADDED - len(array), *array.shape[1:]), 9, array.dtype)])


def bert_rank(arrays: dict[str, np.ndarray], version: float, rank: int = 0, tp: int = 1) -> dict[str, Any]:
    """One tensor rank's `model`."""
    layers: dict[str, np.ndarray] = {}
    for i in range(LAYERS):
        own = {n.split(f".layer.{i}.")[1]: a for n, a in arrays.items() if f".layer.{i}." in n}
        to = f"layers.{i}."
        for kind in ("weight", "bias"):
            qkv = [
                _cut(own[f"attention.self.{part}.{kind}"], 0, rank, tp) for part in ("query", "key", "value")
            ]
            layers |= {
                to + f"input_layernorm.{kind}": own[f"attention.ln.{kind}"],
                to + f"attention.query_key_value.{kind}": fused(*qkv, version),
                to + f"post_attention_layernorm.{kind}": own[f"ln.{kind}"],
                to + f"mlp.dense_h_to_4h.{kind}": _cut(own[f"intermediate.dense.{kind}"], 0, rank, tp),
            }
        layers |= {
            to + "attention.dense.weight": _cut(own["attention.output.dense.weight"], 1, rank, tp),
            to + "attention.dense.bias": own["attention.output.dense.bias"],
            to + "mlp.dense_4h_to_h.weight": _cut(own["output.dense.weight"], 1, rank, tp),
            to + "mlp.dense_4h_to_h.bias": own["output.dense.bias"],
        }
    layers |= {f"final_layernorm.{kind}": arrays[f"bert.encoder.ln.{kind}"] for kind in ("weight", "bias")}
    return {
        "language_model": {
            "embedding": {
                "word_embeddings": {
                    "weight": _cut(arrays["bert.embeddings.word_embeddings.weight"], 0, rank, tp)
                },
                "position_embeddings": {"weight": arrays["bert.embeddings.position_embeddings.weight"]},
                "tokentype_embeddings": {"weight": arrays["bert.embeddings.token_type_embeddings.weight"]},
            },
            "transformer": layers,
            "pooler": {f"dense.{kind}": arrays[f"bert.pooler.dense.{kind}"] for kind in ("weight", "bias")},
        },
        "lm_head": {
            "dense.weight": arrays["cls.predictions.transform.dense.weight"],
            "dense.bias": arrays["cls.predictions.transform.dense.bias"],
            "layernorm.weight": arrays["cls.predictions.transform.LayerNorm.weight"],
            "layernorm.bias": arrays["cls.predictions.transform.LayerNorm.bias"],
            "bias": _cut(arrays["cls.predictions.bias"], 0, rank, tp),
        },
        "binary_head": {kind: arrays[f"cls.seq_relationship.{kind}"] for kind in ("weight", "bias")},
    }


def gpt2_rank(
    arrays: dict[str, np.ndarray], version: float, rank: int = 0, tp: int = 1, stage: int = 0, stages: int = 1
) -> dict[str, Any]:
    """One rank's `model`; a stage has its share of the layers, counted from 0."""
    each = LAYERS // stages
    layers: dict[str, np.ndarray] = {}
    for i in range(each):
        own = {
            n.split(f".h.{stage * each + i}.")[1]: a
            for n, a in arrays.items()
            if f".h.{stage * each + i}." in n
        }
        to = f"layers.{i}."
        for kind in ("weight", "bias"):
            qkv = [_cut(part.T, 0, rank, tp) for part in np.split(own[f"attn.c_attn.{kind}"], 3, -1)]
            layers |= {
                to + f"input_layernorm.{kind}": own[f"ln_1.{kind}"],
                to + f"self_attention.query_key_value.{kind}": fused(*qkv, version),
                to + f"post_attention_layernorm.{kind}": own[f"ln_2.{kind}"],
                to + f"mlp.dense_h_to_4h.{kind}": _cut(own[f"mlp.c_fc.{kind}"].T, 0, rank, tp),
            }
        layers |= {
            to + "self_attention.dense.weight": _cut(own["attn.c_proj.weight"].T, 1, rank, tp),
            to + "self_attention.dense.bias": own["attn.c_proj.bias"],
            to + "mlp.dense_4h_to_h.weight": _cut(own["mlp.c_proj.weight"].T, 1, rank, tp),
            to + "mlp.dense_4h_to_h.bias": own["mlp.c_proj.bias"],
        }
    model: dict[str, Any] = {"language_model": {"encoder": layers}}
    words = {"weight": _cut(_padded(arrays["transformer.wte.weight"]), 0, rank, tp)}
    if stage == 0:
        positions = {"weight": arrays["transformer.wpe.weight"]}
        model["language_model"]["embedding"] = {"word_embeddings": words, "position_embeddings": positions}
    if stage == stages - 1:
        layers |= {
            f"final_layernorm.{kind}": arrays[f"transformer.ln_f.{kind}"] for kind in ("weight", "bias")
        }
        if stages > 1:
            model["word_embeddings_for_head"] = words
    return model


def options(**more: Any) -> argparse.Namespace:
    """A run's options, some of them no plain data."""
    said: dict[str, Any] = dict(
        hidden_size=D,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_hidden_size=F,
        max_position_embeddings=P,
        padded_vocab_size=PADDED,
        tokenizer_type="BertWordPieceLowerCase",
        params_dtype=Global("torch", "float16"),
        attn_mask_type=Call(Global("megatron.model.enums", "AttnMaskType"), 1),
        path=Path("data"),
    )
    return argparse.Namespace(**(said | more))


def save_rank(
    file: Path, model: Any, version: float | None, args: Any, legacy: bool = False, **more: Any
) -> Path:
    """model_optim_rng.pt as a training run writes it."""
    content: dict[Any, Any] = {
        "iteration": 7,
        "model": model,
        "optimizer": {"loss_scaler": Call(Global("megatron.fp16.loss_scaler", "DynamicLossScaler"), 4.0)},
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": np.arange(5, dtype=np.uint8),
    }
    content |= {"checkpoint_version": version} if version is not None else {}
    content |= {"args": args} if args is not None else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tree(file, content | more, legacy)
    return file
