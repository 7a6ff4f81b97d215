"""Text from models: one cache-based decode loop, sampling, and the command line `python -m inference`.

    config = inference.GenerationConfig(max_new_tokens=64, do_sample=True, temperature=0.8)
    out = inference.generate(model, params, input_ids, config=config, rng=jax.random.key(0))
    text = tokenizer.decode(out.sequences[0, : out.lengths[0]])

`inference.stream` yields the same tokens while they are made; `inference.prepare` lays parameters out once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.decode import generate, prepare, stream
    from inference.generation_config import GenerationConfig
    from inference.prompts import GenerateOutput

# Loaded on first use: `python -m inference --help` must not wait for JAX.
_OWNERS = {
    "generate": "inference.decode",
    "prepare": "inference.decode",
    "stream": "inference.decode",
    "GenerationConfig": "inference.generation_config",
    "GenerateOutput": "inference.prompts",
}
__all__ = ["GenerateOutput", "GenerationConfig", "generate", "prepare", "stream"]


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module 'inference' has no attribute {name!r}")
    return getattr(importlib.import_module(_OWNERS[name]), name)
