"""Which of a Megatron checkpoint's files are read, and one line for what is missing."""

import zipfile

import numpy as np
import pytest

from modelzoo.convert.megatron_files import read_ranks
from tests.torch_files import save_tree

MODEL = {"w": np.zeros(2, np.float32)}


def save(file, **content):
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tree(file, {"model": MODEL, "iteration": 7} | content)
    return file


@pytest.fixture
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def places(ranks, root):
    return [[rank.file.relative_to(root).as_posix() for rank in stage] for stage in ranks]


def test_every_height_of_a_run(tmp_path, scratch):
    for iteration in ("iter_0000007", "iter_0000008"):
        save(tmp_path / iteration / "mp_rank_00" / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8\n")
    folder = tmp_path / "iter_0000008"
    file = folder / "mp_rank_00" / "model_optim_rng.pt"
    for path in (tmp_path, folder, file.parent, file):
        assert [[rank.file for rank in stage] for stage in read_ranks(path, scratch)] == [[file]]


def test_release_and_a_lone_iteration(tmp_path, scratch):
    file = save(tmp_path / "release" / "mp_rank_00" / "model_rng.pt")
    assert read_ranks(tmp_path, scratch)[0][0].file == file
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert read_ranks(tmp_path, scratch)[0][0].file == file


def test_stages_and_ranks_in_order(tmp_path, scratch):
    for rank in range(2):
        for stage in range(3):
            save(tmp_path / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt")
    assert places(read_ranks(tmp_path, scratch), tmp_path) == [
        [f"mp_rank_{rank:02d}_{stage:03d}/model_optim_rng.pt" for rank in range(2)] for stage in range(3)
    ]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_release_zip(tmp_path, scratch, compression):
    file = save(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as archive:
        archive.write(file, "release/mp_rank_00/model_optim_rng.pt")
        archive.writestr("latest_checkpointed_iteration.txt", "release")
        archive.writestr("../outside.txt", "no")
    ranks = read_ranks(tmp_path / "a.zip", scratch)
    assert places(ranks, scratch) == [["release/mp_rank_00/model_optim_rng.pt"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.zip"]


def test_names_what_is_missing(tmp_path, scratch):
    def refuses(what, path=tmp_path):
        with pytest.raises((OSError, ValueError), match=what) as error:
            read_ranks(path, scratch)
        assert str(error.value).startswith(str(path))

    refuses("no such file", tmp_path / "nothing")
    refuses("has no release/mp_rank_00/model_optim_rng.pt")
    for rank in (0, 3):
        save(tmp_path / "iter_0000001" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
    refuses("2 ranks are missing: mp_rank_01, mp_rank_02")
    save(tmp_path / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt")
    refuses("several checkpoints and no latest.*iter_0000001, iter_0000002")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("3")
    refuses("no folder iter_0000003")
    tracker.write_text("soon")
    refuses("says 'soon'")
    (tmp_path / "iter_0000002" / "mp_rank_01").mkdir()
    refuses("mp_rank_01 has no model_optim_rng.pt", tmp_path / "iter_0000002")
    save(tmp_path / "iter_0000002" / "mp_rank_01" / "model_optim_rng.pt", iteration=9)
    refuses("different iterations: 7, 9", tmp_path / "iter_0000002")


def test_other_files(tmp_path, scratch):
    def refuses(what, path):
        with pytest.raises(ValueError, match=what) as error:
            read_ranks(path, scratch)
        assert str(error.value).startswith(str(path))

    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    refuses("has no release/mp_rank_00/model_optim_rng.pt; it holds readme.txt", tmp_path / "b.zip")
    refuses("it has no `model`, but weights", _tree(tmp_path / "c.pt", {"weights": MODEL}))
    whole = save(tmp_path / "d.pt").read_bytes()
    (tmp_path / "d.pt").write_bytes(whole[: len(whole) // 2])
    refuses("truncated or corrupt", tmp_path / "d.pt")
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.writestr("release/mp_rank_00/model_optim_rng.pt", whole[: len(whole) // 2])
    refuses("truncated or corrupt", tmp_path / "e.zip")


def _tree(path, tree):
    save_tree(path, tree)
    return path
