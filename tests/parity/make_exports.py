"""Writes every class with `to_hf`, and what ours answers, for tests/parity/exported.py to read elsewhere.

python -m tests.parity.make_exports FOLDER
"""

import sys
from pathlib import Path

import numpy as np

import modelzoo
from tests.parity import cases
from tests.parity.pairs import forward, our_fields, pair


def export(name: str, title: str, folder: Path) -> None:
    """One class under one config: the checkpoint, padded inputs, and its outputs without hidden states."""
    both = pair(name, title)
    inputs = both.inputs("right")  # without head masks, which version 5 dropped
    out = forward(both.ours, both.params, inputs, output_attentions=False, output_hidden_states=False)
    modelzoo.to_hf(both.ours, both.params, folder)
    arrays = {f"inputs/{key}": value for key, value in inputs.items()}
    arrays |= {f"outputs/{key}": np.asarray(value) for key, value in our_fields(out).items()}
    np.savez(folder / "answers.npz", **arrays)


if __name__ == "__main__":
    for class_name in cases.CLASSES:
        for number, title in enumerate(cases.exported_titles(class_name)):
            export(class_name, title, Path(sys.argv[1], f"{class_name}-{number}"))
