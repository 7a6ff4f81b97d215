"""A causal decoder with any knobs in float64 numpy, written from the papers: what tests hold `modelzoo.decoder` to."""

from typing import Any

import jax
import numpy as np

ERF = np.vectorize(__import__("math").erf, otypes=[np.float64])


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


PLAIN = {"gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "relu": lambda x: np.maximum(x, 0)}
GATES = {
    "swiglu": lambda x: x * _sigmoid(x),
    "geglu": lambda x: x * (1 + ERF(x / np.sqrt(2))) / 2,
    "reglu": lambda x: np.maximum(x, 0),
    "glu": _sigmoid,
}


def logits(config: Any, params: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[B, T, V] of GPT-J or BLOOM for causal language modelling.

    Args:
        config: with any knobs, a power of two of heads.
        params: stacked.
        ids, mask: [B, T].
    """
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    trunk, head = params["trunk"], params.get("lm_head", {})
    x = trunk["embed"]["embedding"][ids]
    count = np.maximum(np.cumsum(mask, axis=1) - 1, 0)  # of real tokens
    places = count if config.model_type == "bloom" else np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    if config.position == "learned":
        x = x + trunk["embed_positions"]["embedding"][places]
    if "embed_norm" in trunk:
        x = _norm(config, trunk["embed_norm"], x)
    for i in range(config.num_layers):
        x = _layer(config, jax.tree.map(lambda a, i=i: a[i], trunk["layers"]), x, mask, places, count)
    if config.norm_placement == "pre":
        x = _norm(config, trunk["final_norm"], x)
    kernel = trunk["embed"]["embedding"].T if config.tie_word_embeddings else head["kernel"]
    return x @ kernel + head.get("bias", 0.0)


def _layer(config, p, x, mask, places, count):
    def attend(x):
        return _attention(config, p["attention"], x, mask, places, count)

    def norm(name, x):
        return _norm(config, p[name], x)

    match config.block, config.norm_placement:
        case "parallel", "pre":
            h = norm("norm", x)
            return x + attend(h) + _mlp(config, p["mlp"], h)
        case "parallel", "post":
            return norm("norm", x + attend(x) + _mlp(config, p["mlp"], x))
        case "sequential", "pre":
            x = x + attend(norm("attention_norm", x))
            return x + _mlp(config, p["mlp"], norm("mlp_norm", x))
        case _:
            x = norm("attention_norm", x + attend(x))
            return norm("mlp_norm", x + _mlp(config, p["mlp"], x))


def _norm(config, p, x):
    epsilon = config.layer_norm_epsilon
    if config.norm == "rms":
        return p["scale"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return (
        p["scale"] * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) + p["bias"]
    )


def _mlp(config, p, x):
    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    if gate := GATES.get(config.activation_function):
        return dense("fc_out", gate(dense("fc_gate", x)) * dense("fc_in", x))
    return dense("fc_out", PLAIN[config.activation_function](dense("fc_in", x)))


def _attention(config, p, x, mask, places, count):
    num_heads, width, length = config.num_heads, config.head_dim, x.shape[1]

    def project(name):
        y = np.einsum("btd,dnh->bnth", x, p[name]["kernel"])
        if "bias" in p[name]:
            y = y + p[name]["bias"][:, None]
        if config.qk_norm and name != "value":
            y = (
                y
                / np.sqrt((y**2).mean(-1, keepdims=True) + config.layer_norm_epsilon)
                * p[f"{name}_norm"]["scale"]
            )
        if config.position == "rotary" and name != "value":
            y = _turn(y, places, config.rotary_features)
        return y if name == "query" else np.repeat(y, num_heads // y.shape[1], axis=1)

    q, k, v = project("query") / np.sqrt(width), project("key"), project("value")
    context = np.zeros_like(q)
    for b, n, t in np.ndindex(*q.shape[:3]):
        scores = k[b, n] @ q[b, n, t]
        if config.position == "alibi":
            scores = scores + 2.0 ** (-8 * (n + 1) / num_heads) * (count[b] - count[b, t])
        if config.position == "relative":
            distances = t - np.arange(length) + config.max_positions - 1
            scores = scores + p["distance"][distances] @ q[b, n, t]
        sees = (np.arange(length) <= t) & (mask[b] > 0)
        if not sees.any():  # a row's padding
            continue
        weights = np.where(sees, np.exp(scores - scores[sees].max()), 0.0)
        context[b, n, t] = weights @ v[b, n] / weights.sum()
    return np.einsum("bnth,nhd->btd", context, p["out"]["kernel"]) + p["out"].get("bias", 0.0)


def _turn(x, places, width):
    """Neighbouring pairs of features as complex numbers, each turned by its own angle a position."""
    angles = places[:, None, :, None] * 10000.0 ** (-2 * np.arange(width // 2) / width)
    pairs = x[..., :width:2] + 1j * x[..., 1:width:2]
    turned = pairs * np.exp(1j * angles)
    return np.concatenate(
        [np.stack([turned.real, turned.imag], -1).reshape(*x.shape[:-1], width), x[..., width:]], -1
    )
