"""What `to_hf` writes, read in a process's way that version 5 shares: see tests/parity/exported.py."""

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.parity import cases, exported
from tests.parity.make_exports import export


@cases.every_class()
def test_exports_open(name, tmp_path):
    titles = cases.exported_titles(name)
    export(name, titles[-1], tmp_path)
    assert exported.check(tmp_path) == []


def test_faults_are_found(tmp_path):
    """Both kinds: an output that differs, a tensor that is missing."""
    name = "GPTJForCausalLM"
    export(name, "three heads", tmp_path)
    with np.load(tmp_path / "answers.npz") as arrays:
        answers = dict(arrays)
    answers["outputs/logits"] = answers["outputs/logits"] + 1e-3
    np.savez(tmp_path / "answers.npz", **answers)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    missing, apart = exported.check(tmp_path)
    assert missing == f"{name}: missing_keys: ['lm_head.bias']"
    assert "outputs/logits" in apart
