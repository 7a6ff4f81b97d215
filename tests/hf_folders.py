"""Small GPT-J folders as transformers writes them, for tests of what reads and writes such."""

import json

import jax
import numpy as np
import safetensors.numpy

from tests import torch_files

V, D, L, N = 67, 32, 3, 4
HF_CONFIG = {
    "model_type": "gptj",
    "architectures": ["GPTJForCausalLM"],
    "vocab_size": V,
    "n_positions": 16,
    "n_embd": D,
    "n_layer": L,
    "n_head": N,
    "rotary_dim": 4,
    "n_inner": 48,
    "torch_dtype": "float32",
    "some_field_of_the_future": {"a": 1},
}


def make_tensors(prefix="transformer.", **heads):
    """A GPT-J checkpoint as transformers writes it."""
    rng = np.random.default_rng(0)
    shapes = {"wte.weight": (V, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    for i in range(L):
        layer = {"ln_1.weight": (D,), "ln_1.bias": (D,), "mlp.fc_in.weight": (48, D), "mlp.fc_in.bias": (48,)}
        layer |= {"mlp.fc_out.weight": (D, 48), "mlp.fc_out.bias": (D,)}
        layer |= {f"attn.{name}_proj.weight": (D, D) for name in ("q", "k", "v", "out")}
        shapes |= {f"h.{i}.{name}": shape for name, shape in layer.items()}
    shapes = {prefix + name: shape for name, shape in shapes.items()} | heads
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


LM_HEAD = {"lm_head.weight": (V, D), "lm_head.bias": (V,)}


def write(folder, tensors, name="model.safetensors", **hf_config):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | hf_config))
    if name.endswith("safetensors"):
        safetensors.numpy.save_file(tensors, folder / name)
    else:
        torch_files.save_archive(folder / name, tensors)
    return folder


def equal(tree, other):
    same = jax.tree.map(
        lambda a, b: (
            a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        ),
        tree,
        other,
    )
    return all(jax.tree.leaves(same))
