"""`python -m modelzoo.convert`: other frameworks' checkpoints become Hugging Face folders.

    megatron-bert          NVIDIA's Megatron-BERT releases         -> MegatronBERT
    megatron-lm            Megatron-LM's BERT and GPT, any ranks   -> MegatronBERT, GPT-2
    mesh-transformer-jax   GPT-J's training checkpoints            -> GPT-J
    fairseq                fairseq's RoBERTa checkpoints           -> RoBERTa
    flax                   flax_model.msgpack                      -> the same model
    torch                  pytorch_model.bin                       -> the same model

A format's reader (megatron.py, mesh_transformer.py, fairseq.py, flax_msgpack.py, torch_bin.py) turns a path
into a `Checkpoint`: a config, and Hugging Face names with tensors that are yet to be read (checkpoint.py). writing.py
checks it against the model's class and writes it. No torch is needed, and no code in a checkpoint is run.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelzoo.convert.formats import FORMATS, convert_checkpoint

__all__ = ["FORMATS", "convert_checkpoint"]


def __getattr__(name: str) -> Any:
    # Loaded when first used: `python -m modelzoo.convert --help` should not wait for JAX.
    if name not in __all__:
        raise AttributeError(f"module 'modelzoo.convert' has no attribute {name!r}")
    return getattr(importlib.import_module("modelzoo.convert.formats"), name)
