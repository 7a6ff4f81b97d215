"""GPT-J's tensors under transformers' names, for tests of the converter's formats."""

import numpy as np

from tests.zoo import drawn

CONFIG = dict(
    model_type="gptj",
    architectures=["GPTJForCausalLM"],
    vocab_size=24,
    n_positions=16,
    n_embd=16,
    n_layer=11,
    n_head=4,
    rotary_dim=2,
)


def gptj_arrays() -> dict[str, np.ndarray]:
    """transformers' GPTJForCausalLM; 11 layers, so that the order of names is not that of numbers."""
    vocab, width = 24, 16
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, width)}
    for i in range(11):
        block = {f"attn.{part}_proj.weight": (width, width) for part in ("q", "k", "v", "out")}
        block |= {"mlp.fc_in.weight": (4 * width, width), "mlp.fc_in.bias": (4 * width,)}
        block |= {"mlp.fc_out.weight": (width, 4 * width), "mlp.fc_out.bias": (width,)}
        block |= {"ln_1.weight": (width,), "ln_1.bias": (width,)}
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    shapes |= {"lm_head.weight": (vocab, width), "lm_head.bias": (vocab,)}
    return {name: drawn(name, shape) for name, shape in shapes.items()}
