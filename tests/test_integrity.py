"""A checkpoint whose files are not what was written is found, named and set aside."""

import json

import numpy as np
import pytest

from parallel import checkpoint
from train import integrity


def make(folder, step, size=100):
    """A finished checkpoint of two files."""
    path = checkpoint.as_path(folder) / str(step)
    (path / "params" / "d").mkdir(parents=True)
    (path / "params" / "d" / "array").write_bytes(bytes(range(size)))
    (path / "config.gin").write_text("x = 1\n")
    integrity.write_checksums(path)
    (path / "commit_success.txt").write_text("")
    return path


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[50] ^= 1
    path.write_bytes(bytes(raw))


def test_lists_what_was_written(tmp_path):
    path = make(tmp_path, 1)
    listed = json.loads((path / "checksums.json").read_text())["crc32"]
    assert sorted(listed) == ["config.gin", "params/d/array"]
    assert listed["params/d/array"][0] == 100
    assert integrity.damage(path) is None


@pytest.mark.parametrize(
    ("harm", "verdict"),
    [
        (lambda path: flip(path / "params/d/array"), "params/d/array does not have its checksum"),
        (lambda path: (path / "params/d/array").write_bytes(b"torn"), "params/d/array has 4 bytes, not 100"),
        (lambda path: (path / "params/d/array").unlink(), "params/d/array is missing"),
        (lambda path: (path / "checksums.json").write_text('{"crc32": {"a'), "checksums.json is damaged"),
    ],
    ids=["flipped", "torn", "missing", "list"],
)
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, harm, verdict):
    make(tmp_path, 2)
    harm(make(tmp_path, 4))
    with pytest.warns(UserWarning, match=rf"checkpoint .*4 is damaged: {verdict}; set aside as 4\.damaged"):
        assert integrity.newest_sound(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4.damaged"]
    flip(make(tmp_path, 4) / "params/d/array")
    with pytest.warns(UserWarning, match=r"set aside as 4\.damaged-2"):
        assert integrity.newest_sound(tmp_path) == 2


def test_where_all_are_damaged_a_run_begins_anew(tmp_path):
    flip(make(tmp_path, 2) / "params/d/array")
    with pytest.warns(UserWarning, match="is damaged"):
        assert integrity.newest_sound(tmp_path) == 0
    assert integrity.newest_sound(tmp_path / "nowhere") == 0


def test_a_checkpoint_without_checksums_is_taken_as_it_is(tmp_path):
    path = make(tmp_path, 2)
    (path / "checksums.json").unlink()
    flip(path / "params/d/array")
    assert integrity.newest_sound(tmp_path) == 2


def test_processes_share_the_files(tmp_path):
    path = make(tmp_path, 2)
    flip(path / "params/d/array")
    verdicts = [integrity.damage(path, (index, 2)) for index in range(2)]
    assert sorted(verdict or "" for verdict in verdicts) == ["", "params/d/array does not have its checksum"]


def test_one_process_finds_it_and_all_know(tmp_path, monkeypatch):
    make(tmp_path, 2)
    make(tmp_path, 4)
    verdicts = {4: "theirs is torn", 2: ""}

    def gather(value):  # the second process's answer follows ours
        if value.ndim == 0:
            gather.step = int(value)
            return np.array([value, value])
        theirs = np.frombuffer(verdicts[gather.step].encode().ljust(len(value), b"\0"), np.uint8)
        return np.stack([value, theirs])

    monkeypatch.setattr(integrity.jax, "process_count", lambda: 2)
    monkeypatch.setattr(integrity.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(integrity.multihost_utils, "sync_global_devices", lambda name: None)
    with pytest.warns(UserWarning, match="4 is damaged: theirs is torn"):
        assert integrity.newest_sound(tmp_path) == 2


def test_a_store_lists_sizes_alone(tmp_path):
    class Stored:
        def __fspath__(self):
            return "gs://bucket/file"

        def stat(self):
            return type("Stat", (), {"length": 7})

    assert integrity._measure(Stored()) == [7, None]
