"""Writes tests/fixtures/gptj.npz: weights, inputs and transformers' answers, so that tests need no torch.

python -m tests.parity.make_fixtures
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import modelzoo
from tests.parity.gptj_torch import CLASSES, ask, make_pair, to_torch
from tests.zoo import tiny_gptj

FILE = Path(__file__).parents[1] / "fixtures" / "gptj.npz"
OUTPUTS = ("last_hidden_state", "logits", "start_logits", "end_logits", "hidden_states", "attentions")
CONFIGS = {
    "three heads": tiny_gptj(num_labels=3),
    "one head": tiny_gptj(
        n_embd=10, n_head=1, rotary_dim=None, n_layer=1, n_inner=None, activation_function="relu"
    ),
}


def make_inputs(config: modelzoo.GPTJConfig) -> dict[str, dict[str, np.ndarray]]:
    """Inputs by the name of their case: [2, 6] tokens; the rich case is padded left and right."""
    random = np.random.default_rng(11)
    ids = random.integers(1, config.vocab_size, (2, 6)).astype(np.int32)
    padded, mask = ids.copy(), np.ones((2, 6), np.int32)
    padded[0, :2] = padded[1, 5:] = mask[0, :2] = mask[1, 5:] = 0
    return {
        "plain": {"input_ids": ids},
        "rich": {
            "input_ids": padded,
            "attention_mask": mask,
            "token_type_ids": random.integers(0, config.vocab_size, (2, 6)).astype(np.int32),
            "position_ids": random.integers(0, config.n_positions, (2, 6)).astype(np.int32),
            "head_mask": random.uniform(0.0, 1.5, (config.n_layer, config.n_head)).astype(np.float32),
        },
    }


def main() -> None:
    """Writes the file."""
    arrays: dict[str, Any] = {}
    for title, config in CONFIGS.items():
        arrays[f"{title}/config"] = np.array(json.dumps(dataclasses.asdict(config)))
        for case, inputs in make_inputs(config).items():
            arrays |= {f"{title}/{case}/inputs/{name}": value for name, value in inputs.items()}
        for name in CLASSES:
            # The same seed, so the same trunk: torch draws its weights first.
            # transformers' answer head has num_labels outputs, and works with two alone.
            labels = 2 if name == "GPTJForQuestionAnswering" else config.num_labels
            theirs, *_ = make_pair(name, dataclasses.replace(config, num_labels=labels))
            for key, tensor in theirs.state_dict().items():
                stored = f"{title}/state/{key if name != 'GPTJModel' else f'transformer.{key}'}"
                assert stored not in arrays or (arrays[stored] == tensor.numpy()).all(), stored
                arrays[stored] = tensor.numpy().copy()
            for case, inputs in make_inputs(config).items():
                is_trunk = name == "GPTJModel"
                answer = ask(theirs, inputs, output_attentions=is_trunk, output_hidden_states=is_trunk)
                for output in OUTPUTS:
                    value = getattr(answer, output, None)
                    if value is not None:
                        value = torch.stack(value) if isinstance(value, tuple) else value
                        arrays[f"{title}/{case}/{name}/{output}"] = value.numpy()
            if name == "GPTJForCausalLM":
                ids = to_torch(make_inputs(config)["plain"]["input_ids"])
                loss = theirs(ids, labels=ids).loss
                loss.backward()
                arrays[f"{title}/loss"] = loss.detach().numpy()
                for key, tensor in theirs.named_parameters():
                    arrays[f"{title}/gradient/{key}"] = tensor.grad.numpy()
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
