"""Checks folders that `to_hf` wrote against whichever transformers is installed; needs torch, transformers and numpy.

    python -m tests.parity.make_exports /tmp/exports          # with flaxtron: every class, with its answers
    OTHER/bin/python tests/parity/exported.py /tmp/exports    # with, for one, transformers 5

It reports unexpected and missing tensors, and outputs further than 2e-5 from ours; the exit status says whether any.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

TOLERANCE = 2e-5


def check(folder: Path) -> list[str]:
    """What is wrong with one class's folder."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    model.config.use_cache = (
        False  # whose size is wrong where an encoder-decoder's two stacks differ in layers
    )
    wrong = [f"{name}: {kind}: {sorted(map(str, found))}" for kind, found in report.items() if found]
    with np.load(folder / "answers.npz") as arrays:
        answers = {key: arrays[key] for key in arrays.files}
    inputs: dict[str, Any] = {}
    for key, value in answers.items():
        if key.startswith("inputs/"):
            inputs[key.removeprefix("inputs/")] = torch.from_numpy(value)
    with torch.no_grad():
        out = model.eval()(**{k: v.long() if v.dtype == torch.int32 else v for k, v in inputs.items()})
    for key, want in answers.items():
        if key.startswith("outputs/"):
            have = out[key.removeprefix("outputs/")].numpy()
            apart = float(np.abs(have - want).max()) if have.shape == want.shape else float("inf")
            if not apart <= TOLERANCE:
                wrong.append(f"{name}: {key} is {apart:.3g} apart")
    return wrong


def main(root: str) -> int:
    """Checks every folder under `root`."""
    folders = sorted(path.parent for path in Path(root).glob("*/answers.npz"))
    wrong = []
    for folder in folders:
        try:
            wrong += check(folder)
        except Exception as error:  # whatever transformers raises is what it has against the folder
            wrong.append(f"{folder.name}: {type(error).__name__}: {' '.join(str(error).split())}")
    print(
        "\n".join(
            [
                *wrong,
                f"transformers {transformers.__version__}: {len(folders)} checkpoints, {len(wrong)} faults",
            ]
        )
    )
    return int(bool(wrong) or not folders)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
