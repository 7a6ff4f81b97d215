"""Text from models: one cache-based decode loop, sampling, and the command line `python -m inference`.

    config = inference.GenerationConfig(max_new_tokens=64, do_sample=True, temperature=0.8)
    out = inference.generate(model, params, input_ids, config=config, rng=jax.random.key(0))
    text = tokenizer.decode(out.sequences[0, : out.lengths[0]])

`inference.stream` yields the same tokens while they are made; `inference.prepare` lays parameters out once.
`inference.Engine` lets requests join and leave a running batch; `python -m inference.serve` puts it behind HTTP.
`inference.open_task` does what other heads are for: filling masks, classifying, answering, tagging, choosing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.decode import generate, stream
    from inference.dry_run import plan_load
    from inference.engine import Engine
    from inference.generation_config import GenerationConfig
    from inference.preparing import prepare
    from inference.prompts import GenerateOutput
    from inference.requests import SamplingParams
    from inference.text_tasks import open_task

# Loaded on first use: `python -m inference --help` must not wait for JAX.
_OWNERS = {
    "Engine": "inference.engine",
    "SamplingParams": "inference.requests",
    "generate": "inference.decode",
    "plan_load": "inference.dry_run",
    "prepare": "inference.preparing",
    "stream": "inference.decode",
    "GenerationConfig": "inference.generation_config",
    "GenerateOutput": "inference.prompts",
    "open_task": "inference.text_tasks",
}
__all__ = [
    "Engine",
    "GenerateOutput",
    "GenerationConfig",
    "SamplingParams",
    "generate",
    "open_task",
    "plan_load",
    "prepare",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module 'inference' has no attribute {name!r}")
    return getattr(importlib.import_module(_OWNERS[name]), name)
