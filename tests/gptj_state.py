"""GPT-J's tensors under transformers' names, turned into parameters: by hand, so as not to trust weights.py."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

import modelzoo


def params_from_state(state: Mapping[str, np.ndarray], config: modelzoo.GPTJConfig) -> dict[str, Any]:
    """The canonical parameter tree of a state dict, with or without a head."""
    has_head = any(name.startswith("transformer.") for name in state)
    prefix = "transformer." if has_head else ""
    num_heads, head_dim = config.n_head, config.n_embd // config.n_head

    def array(name):
        return jnp.asarray(state[name])

    def layers(name, change=lambda a: a):
        stacked = [change(state[f"{prefix}h.{i}.{name}"]) for i in range(config.n_layer)]
        return jnp.asarray(np.stack(stacked))

    def split_heads(a):  # [N·H, D] -> [D, N, H]
        return a.T.reshape(config.n_embd, num_heads, head_dim)

    def join_heads(a):  # [D, N·H] -> [N, H, D]
        return a.T.reshape(num_heads, head_dim, config.n_embd)

    def linear(name):
        return {"kernel": layers(f"{name}.weight", np.transpose), "bias": layers(f"{name}.bias")}

    trunk = {
        "embed": {"embedding": array(f"{prefix}wte.weight")},
        "layers": {
            "norm": {"scale": layers("ln_1.weight"), "bias": layers("ln_1.bias")},
            "attention": {
                "query": {"kernel": layers("attn.q_proj.weight", split_heads)},
                "key": {"kernel": layers("attn.k_proj.weight", split_heads)},
                "value": {"kernel": layers("attn.v_proj.weight", split_heads)},
                "out": {"kernel": layers("attn.out_proj.weight", join_heads)},
            },
            "mlp": {"fc_in": linear("mlp.fc_in"), "fc_out": linear("mlp.fc_out")},
        },
        "final_norm": {"scale": array(f"{prefix}ln_f.weight"), "bias": array(f"{prefix}ln_f.bias")},
    }
    if not has_head:
        return trunk
    params: dict[str, Any] = {"trunk": trunk}
    for head in ("lm_head", "score", "qa_outputs"):
        if f"{head}.weight" in state:
            params[head] = {"kernel": jnp.asarray(state[f"{head}.weight"].T)}
            if f"{head}.bias" in state:
                params[head]["bias"] = array(f"{head}.bias")
    return params
