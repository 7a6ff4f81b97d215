"""Lays GPT-J's arrays out as mesh-transformer-jax does, from its side: for tests of the converter.

The training state is built as a tree under haiku's names, split as mesh_transformer/layers.py splits it, and
flattened by jax itself.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

FILES = 16


def shards_of(arrays: dict[str, np.ndarray], layers: int, num_shards: int) -> list[dict[str, Any]]:
    """The training state of every shard, without an optimizer, from arrays with transformers' names."""

    def columns(name: str, shard: int) -> np.ndarray:
        return np.split(arrays[name].T, num_shards, -1)[shard]

    def rows(name: str, shard: int) -> np.ndarray:
        return np.split(arrays[name].T, num_shards, 0)[shard]

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": arrays[name + ".weight"], "offset": arrays[name + ".bias"]}

    states = []
    for shard in range(num_shards):
        # A bias that every shard adds before the sum over shards: any that come to the whole. wte has none here,
        # so half of it stands in the shards' biases for the first rows of all.
        shift = np.full(arrays["transformer.wte.weight"].shape[1], 0.25, np.float32)
        words = np.split(arrays["transformer.wte.weight"] - shift * num_shards, num_shards, 0)[shard]
        params: dict[str, Any] = {
            "embedding_shard/~/linear": {"w": words, "b": shift},
            "projection_shard/~/linear": {
                "w": columns("lm_head.weight", shard),
                "b": columns("lm_head.bias", shard),
            },
            "projection_shard/~/replicated_layer_norm": norm("transformer.ln_f"),
        }
        for i in range(layers):
            source = f"transformer.h.{i}."
            own = {
                "linear": {"w": columns(source + "attn.q_proj.weight", shard)},
                "linear_1": {"w": columns(source + "attn.v_proj.weight", shard)},
                "linear_2": {"w": columns(source + "attn.k_proj.weight", shard)},
                "linear_3": {"w": rows(source + "attn.out_proj.weight", shard)},
                "linear_4": {
                    "w": columns(source + "mlp.fc_in.weight", shard),
                    "b": columns(source + "mlp.fc_in.bias", shard),
                },
                "linear_5": {
                    "w": rows(source + "mlp.fc_out.weight", shard),
                    "b": arrays[source + "mlp.fc_out.bias"] / num_shards,
                },
                "replicated_layer_norm": norm(source + "ln_1"),
            }
            params |= {f"layer_{i}/~/{name}": module for name, module in own.items()}
        params = {f"causal_transformer_shard/~/{name}": module for name, module in params.items()}
        states.append({"params": params, "step": np.array(383500)})
    return states


def save_shards(folder: Path, states: list[Any], dtype: Any = None) -> None:
    """The folders shard_0, ... of FILES files; numpy writes bfloat16 as its raw type V2."""
    for number, state in enumerate(states):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        leaves = [leaf.astype(dtype) if dtype and leaf.dtype == np.float32 else leaf for leaf in leaves]
        (folder / f"shard_{number}").mkdir(parents=True)
        each, more = divmod(len(leaves), FILES)
        start = 0
        for i in range(FILES):
            stop = start + each + (i < more)
            np.savez(folder / f"shard_{number}" / f"{i}.npz", *leaves[start:stop])
            start = stop
