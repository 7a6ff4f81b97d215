"""One set of GPT-J weights in both frameworks."""

import tempfile
from typing import Any

import jax

import modelzoo


def gptj_config(width: int, layers: int, heads: int, vocab_size: int) -> modelzoo.GPTJConfig:
    """GPT-J's shape at another size; all features of a head rotate, up to 64."""
    return modelzoo.GPTJConfig(
        vocab_size=vocab_size,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        rotary_dim=min(64, width // heads),
        n_positions=1024,
        bos_token_id=0,
        eos_token_id=0,
    )


def make_pair(config: modelzoo.GPTJConfig) -> tuple[Any, Any, Any]:
    """The same random weights as (torch model or None where torch is not installed, flaxtron model, its parameters)."""
    try:
        import torch
        import transformers
    except ImportError:
        model = modelzoo.GPTJForCausalLM(config)
        params = jax.jit(model.init)(jax.random.key(0), input_ids=jax.numpy.zeros((1, 1), int))["params"]
        return None, model, params
    torch.manual_seed(0)
    peer = transformers.GPTJForCausalLM(transformers.GPTJConfig(**config.to_hf())).eval()
    peer.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return peer, *modelzoo.from_hf(folder)
