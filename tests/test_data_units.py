"""train/data/units.py: the processes of a build, and what they do when one is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.data import building, sources
from train.data.tokens import make_recipe, prepare_tokens
from train.data.units import hash_of

ROOT = Path(__file__).parents[1]


PROGRAM = """
import sys
from pathlib import Path
from train.data import building, sources, units
sources.SHARD_BYTES = building.SHARD_BYTES = 100_000
from train.data.tokens import make_recipe
if __name__ == "__main__":
    with building.locked(folder := Path(sys.argv[2])):
        building.build(folder, make_recipe((sys.argv[1],), None, 300), 2)
"""


def test_a_killed_build_goes_on_and_its_processes_end(tmp_path, monkeypatch):
    """kill -9 of the parent alone, in the midst; then the same again makes what an uninterrupted build makes."""
    (tmp_path / "text").mkdir()
    for i in range(20):
        text = "".join(f"{i} times {j} is {i * j}.\n" for j in range(3000))
        (tmp_path / "text" / f"{i:02}.txt").write_text(text)
    for module in (sources, building):
        monkeypatch.setattr(module, "SHARD_BYTES", 100_000)
    recipe = make_recipe((str(tmp_path / "text"),), None, 300)

    def build(name):
        with building.locked(tmp_path / name):
            building.build(tmp_path / name, recipe, 1)
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    (tmp_path / "build.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "build.py"), str(tmp_path / "text"), str(tmp_path / "out")]
    killed = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not list((tmp_path / "out").glob("unit-*.json")) and killed.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    notes = list((tmp_path / "out").glob("unit-*.json"))

    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert 1 <= len(notes) < 20
    assert build("out") == build("whole")


def test_what_is_held_out_is_a_number_of_the_text():
    assert hash_of("a") == hash_of("a") != hash_of("b")
    assert 0 <= hash_of("a") < 2**64


def test_a_recipe_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path = \[\]"):
        make_recipe((), None, 300)
    with pytest.raises(ValueError, match=r"data\.path and data\.mixture: neither is set"):
        prepare_tokens()
