import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import modelzoo
from modelzoo import hf_files
from tests import hubs, torch_files


def write(folder, name, **arrays):
    folder.mkdir(exist_ok=True)
    save = safetensors.numpy.save_file if name.endswith("safetensors") else None
    if save:
        save(arrays, folder / name)
    else:
        torch_files.save_archive(folder / name, arrays)


ONE, TWO = np.ones(2, np.float32), np.full((2, 2), 2, np.float32)


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_parts_and_their_index(tmp_path, extension):
    stem = "model" if extension == "safetensors" else "pytorch_model"
    parts = [f"{stem}-0000{i}-of-00002.{extension}" for i in (1, 2)]
    write(tmp_path, parts[0], a=ONE)
    write(tmp_path, parts[1], b=TWO)
    index = tmp_path / f"{stem}.{extension}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": parts[0], "b": parts[1]}}))
    refs = hf_files.find_tensors(tmp_path)
    assert {name: ref.shape for name, ref in refs.items()} == {"a": (2,), "b": (2, 2)}
    assert refs["b"].file.name == parts[1]

    index.write_text(json.dumps({"weight_map": {"a": parts[0], "c": parts[1]}}))
    with pytest.raises(ValueError, match="c in " + parts[1]):
        hf_files.find_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": parts[0], "b": "gone.bin", "c": "lost.bin"}}))
    with pytest.raises(FileNotFoundError, match=r"2 of 3 parts are missing: gone\.bin, lost\.bin"):
        hf_files.find_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../" + parts[0]}}))
    with pytest.raises(ValueError, match="not a file of its own folder"):
        hf_files.find_tensors(tmp_path)
    for content in ("{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[]", "{"):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"index\.json"):
            hf_files.find_tensors(tmp_path)


def test_safetensors_come_before_pickles(tmp_path):
    write(tmp_path, "pytorch_model.bin", a=ONE)
    assert set(hf_files.find_tensors(tmp_path)) == {"a"}
    write(tmp_path, "model.safetensors", b=ONE)
    assert set(hf_files.find_tensors(tmp_path)) == {"b"}


def test_folders_without_weights_or_config(tmp_path):
    with pytest.raises(OSError, match=r"no model\.safetensors or pytorch_model\.bin"):
        hf_files.find_tensors(tmp_path)
    with pytest.raises(OSError, match=r"config\.json: no such file"):
        hf_files.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        hf_files.read_json(tmp_path / "config.json")


def test_find_folder(tmp_path, monkeypatch):
    assert hf_files.find_folder(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file"):
        hf_files.find_folder(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("/no/such/folder", "./no-such-folder", "../a", "a/b/c", "runs/mistyped"):
        with pytest.raises(OSError, match="no such folder"):
            hf_files.find_folder(path)


def test_a_training_run_is_no_hugging_face_folder(tmp_path):
    step = tmp_path / "run/checkpoints/10"
    (step / "params").mkdir(parents=True)
    for folder in (tmp_path / "run", step):
        with pytest.raises(
            OSError, match=rf"^{folder} is a training run's: `python -m train.export {folder} FOLDER`"
        ):
            modelzoo.from_hf(folder)
    hf_files.check_is_no_run(tmp_path)


ASK = """
import sys
from modelzoo import hf_files
for name in sys.argv[1:]:
    try:
        print("folder", *sorted(file.name for file in hf_files.find_folder(name).iterdir()))
    except OSError as error:
        print(error)
"""


def ask(hub, *names):
    """What `find_folder` finds, in a process of its own: huggingface_hub reads its surroundings once."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *names], env=os.environ | hub, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_hub_is_asked_for_one_format_at_a_time(tmp_path):
    for name in ("both", "old", "gated"):
        folder = tmp_path / "someone" / name
        folder.mkdir(parents=True)
        for file in ("config.json", "tokenizer.json", "flax_model.msgpack"):
            (folder / file).write_text("{}")
        write(folder, "pytorch_model.bin", a=ONE)
    write(tmp_path / "someone/both", "model.safetensors", a=ONE)
    with hubs.serve(tmp_path) as (hub, fetched):
        both, old = ask(hub, "someone/both", "someone/old")
        assert both == "folder config.json model.safetensors tokenizer.json"
        assert old == "folder config.json pytorch_model.bin tokenizer.json"
        assert len(fetched) == 6
        ask(hub, "someone/both")
        assert len(fetched) == 6  # it is kept
        gated, none = ask(hub, "someone/gated", "someone/none")
    assert re.search(
        "access is restricted: ask for it at http://.*/someone/gated, then `hf auth login`", gated
    )
    assert "someone/none: no such folder here, and the Hugging Face hub did not give it: it has none" in none
    kept, never = ask(hub, "someone/both", "someone/other")  # the hub is gone
    assert kept == both
    assert "cannot be reached, and this was not fetched before" in never


def test_a_hub_that_is_not_asked_is_one_clear_line():
    """HF_HUB_OFFLINE is set for the tests, so this is huggingface_hub's own error."""
    with pytest.raises(OSError, match="someone/no-such-model: no such folder here") as error:
        hf_files.find_folder("someone/no-such-model")
    assert "\n" not in str(error.value)


def test_parse_size():
    sizes = {
        "5GB": 5 * 10**9,
        "1.5MB": 1_500_000,
        "2GiB": 2**31,
        "10 kb": 10_000,
        77: 77,
        "64": 64,
        "3B": 3,
        "1T": 10**12,
    }
    for text, size in sizes.items():
        assert hf_files.parse_size(text) == size
    for text in ("", "GB", "-1", 0, "0GB", "5 gigabytes", "1e9"):
        with pytest.raises(ValueError, match="max_shard_size"):
            hf_files.parse_size(text)


def test_plan_shards():
    sizes = {"a": 4, "b": 4, "c": 3, "d": 20, "e": 1}
    (one,) = hf_files.plan_shards(sizes, 32)
    assert (one.name, one.tensors) == ("model.safetensors", tuple(sizes))
    shards = hf_files.plan_shards(sizes, 8)
    assert [shard.tensors for shard in shards] == [("a", "b"), ("c",), ("d",), ("e",)]
    assert shards[1].name == "model-00002-of-00004.safetensors"


def fill(folder, *names):
    for name in names:
        (folder / name).write_text("new")


def test_replacing_leaves_the_new_checkpoint_alone(tmp_path):
    old = ["model.safetensors", "config.json", "tokenizer.json", "model-00001-of-00002.safetensors"]
    new = ["model-00001-of-00003.safetensors", "model.safetensors.index.json", "config.json"]
    for name in old:
        (tmp_path / name).write_text("old")
    with hf_files.replacing(tmp_path) as scratch:
        fill(scratch, *new)
        assert {path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*new, "tokenizer.json"])
    with hf_files.replacing(tmp_path) as scratch:
        fill(scratch, "model.safetensors", "config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_replacing_moves_config_last(tmp_path, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, to: (moved.append(to.name), replace(source, to)))
    with hf_files.replacing(tmp_path) as scratch:
        fill(scratch, "config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors")
    assert moved == ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "config.json"]


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    (tmp_path / "model.safetensors").write_text("old")

    def interrupted():
        with hf_files.replacing(tmp_path) as scratch:
            fill(scratch, "model.safetensors")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.safetensors", "old")]


def test_unwritable_folders(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(OSError, match="cannot write to"), hf_files.replacing(hf_files.Path(folder)):
            pass


def test_a_full_disk_is_one_clear_line(tmp_path):
    with pytest.raises(OSError, match=r"cannot write to .*No space left"), hf_files.replacing(tmp_path):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
