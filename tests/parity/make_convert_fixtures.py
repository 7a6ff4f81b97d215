"""Writes tests/fixtures/convert: Megatron files, and what transformers' own scripts make of them.

    python -m tests.parity.make_convert_fixtures FOLDER

FOLDER holds convert_megatron_bert_checkpoint.py and checkpoint_reshaping_and_interoperability.py of transformers
4.57, which are in its repository and not in its wheel. The tensors are drawn by name (tests.zoo.drawn), laid
out by nothing: a file's numbers mean what the script says they mean.
"""

import argparse
import contextlib
import importlib.util
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests import megatron_state as megatron
from tests.zoo import FIXTURES

FOLDER = FIXTURES / "convert"
VERSIONS = (None, 1.0, 2.0)
BUFFERS = (".attn.bias", ".attn.masked_bias", "lm_head.weight", "cls.predictions.decoder.weight")
load = torch.load


def script(folder: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location("script", folder / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(tree: Any) -> Any:
    """The tree for torch, in half precision."""
    if isinstance(tree, dict):
        return {key: tensors(value) for key, value in tree.items()}
    return torch.from_numpy(tree.astype(np.float16))


def save(file: Path, model: Any, version: float | None, stream: bool = True, **said: Any) -> None:
    plain = {"params_dtype": torch.float16, "attn_mask_type": None}
    args = argparse.Namespace(**(vars(megatron.options(**said)) | plain))
    content = {
        "iteration": 7,
        "model": tensors(model),
        "args": args,
        "np_rng": np.random.RandomState(0).rand(3),
    }
    content |= {"checkpoint_version": version} if version is not None else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file, _use_new_zipfile_serialization=not stream)


def run(main: Any, *argv: str) -> None:
    trusting = lambda *args, **keywords: load(*args, **(keywords | {"weights_only": False}))  # noqa: E731
    with (
        mock.patch.object(torch, "load", trusting),
        mock.patch.object(sys, "argv", ["script", *argv]),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        main()


def store(name: str, state: dict[str, torch.Tensor]) -> None:
    kept = {key: value.numpy().copy() for key, value in state.items() if not key.endswith(BUFFERS)}
    np.savez_compressed(FOLDER / f"{name}.npz", **kept)


def make(scripts: Path) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    bert = script(scripts, "convert_megatron_bert_checkpoint.py")
    for i, version in enumerate(VERSIONS):
        name = f"megatron-bert-{i}"
        file = FOLDER / name / "model_optim_rng.pt"
        save(file, megatron.bert_rank(megatron.bert_arrays(), 0), version, stream=i != 1)
        with tempfile.TemporaryDirectory() as scratch:
            copy = shutil.copy(file, scratch)
            run(bert.main, str(copy))
            store(name, load(Path(scratch) / "pytorch_model.bin"))

    reshaping = script(scripts, "checkpoint_reshaping_and_interoperability.py")
    ranks = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    said = dict(orig_vocab_size=megatron.V, bias_gelu_fusion=True, openai_gelu=False)
    for rank in range(2):
        for stage in range(2):
            model = megatron.gpt2_rank(megatron.gpt2_arrays(), 2, rank, 2, stage, 2)
            file = FOLDER / "megatron-lm" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            save(file, model, 2.0, **ranks, **said)
    caught: dict[str, torch.Tensor] = {}

    class Caught(Exception):
        pass

    def catch(state: Any, **_: Any) -> None:  # what comes after it in the script needs a tokenizer and fails
        caught.update(state)
        raise Caught

    asked = argparse.Namespace(
        load_path=str(FOLDER / "megatron-lm"),
        save_path=tempfile.mkdtemp(),
        tokenizer_name=None,
        max_shard_size="10GB",
        print_checkpoint_structure=False,
    )
    tokenizer = mock.Mock(from_pretrained=lambda name: None)
    with (
        mock.patch.object(reshaping, "split_torch_state_dict_into_shards", catch),
        mock.patch.object(reshaping, "AutoTokenizer", tokenizer),
        contextlib.suppress(Caught),
    ):
        run(lambda: reshaping.convert_checkpoint_from_megatron_to_transformers(asked))
    store("megatron-lm", caught)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
