"""`convert_checkpoint`: its formats, its arguments, and what it leaves behind."""

import contextlib
import json

import numpy as np
import pytest

from modelzoo.convert import FORMATS, convert_checkpoint
from tests import torch_files
from tests.converted import read_folder
from tests.gptj_names import CONFIG, gptj_arrays


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    torch_files.save_archive(folder / "pytorch_model.bin", gptj_arrays())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_the_documented_formats():
    assert {"megatron-bert", "megatron-lm", "mesh-transformer-jax", "flax", "torch"} <= set(FORMATS)


def test_progress_counts_every_byte(source, tmp_path):
    seen = []

    @contextlib.contextmanager
    def progress(total):
        seen.append(total)
        yield seen.append

    convert_checkpoint(
        "torch", source, tmp_path / "out", dtype="float16", max_shard_size="10KB", progress=progress
    )
    assert seen[0] == 2 * sum(seen[1:]) == 4 * sum(array.size for array in gptj_arrays().values())
    assert {array.dtype for array in read_folder(tmp_path / "out").values()} == {np.dtype(np.float16)}


def test_arguments_that_are_wrong(source, tmp_path):
    def refuses(what, source_format="torch", path=source, **options):
        with pytest.raises((OSError, ValueError), match=what):
            convert_checkpoint(source_format, path, tmp_path / "out", **options)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]

    refuses("unknown format 'tf': choose from megatron-bert,", "tf")
    refuses("dtype = 'int8': choose from float32", dtype="int8")
    refuses("max_shard_size = 'much'", max_shard_size="much")
    refuses("nothing: no such file or folder", path=tmp_path / "nothing")
    refuses("no such file", config=tmp_path / "nothing.json")
    refuses("not JSON", config=source / "pytorch_model.bin")


def test_a_file_that_ends_early_leaves_nothing(source, tmp_path):
    file = source / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: .*truncated or corrupt"):
        convert_checkpoint("torch", source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_failure_in_the_middle_leaves_nothing(source, tmp_path):
    @contextlib.contextmanager
    def progress(total):
        def fail(nbytes):
            raise OSError("disk full")

        yield fail

    with pytest.raises(OSError, match="disk full"):
        convert_checkpoint("torch", source, tmp_path / "out", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
