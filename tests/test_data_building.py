"""train/data/building.py: the same folder however it came about, and what its manifest says."""

import hashlib
import json

import pytest

from train.data import building, sources, units
from train.data.tokens import make_recipe, open_prepared


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Documents for three shards."""
    monkeypatch.setattr(sources, "SHARD_BYTES", 3000)
    monkeypatch.setattr(building, "SHARD_BYTES", 3000)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"document {i}: " + f"the square of {i} is {i * i}. " * 10)
    (folder / "empty.txt").write_text(" \n")
    return folder


def recipe_of(*paths, **changes):
    options = dict(tokenizer=None, vocab_size=300, validation_fraction=0.2) | changes
    return make_recipe(tuple(map(str, paths)), **options)


def built(folder, recipe, processes=1):
    with building.locked(folder):
        building.build(folder, recipe, processes)
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def test_the_manifest_counts(corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    files = built(tmp_path / "out", recipe_of(corpus, other))
    manifest = json.loads(files["manifest.json"])
    found = open_prepared(tmp_path / "out")
    text, lines = manifest["sources"]

    assert len(manifest["shards"]["train"]) == 4
    assert sorted(files) == sorted(
        ["manifest.json", "tokenizer.json"]
        + [f"{split}-{i:05}.arrayrecord" for split in ("train", "validation") for i in range(4)]
    )
    assert (text["path"], text["files"], text["documents"], text["empty"]) == (str(corpus), 31, 30, 1)
    assert (lines["path"], lines["files"], lines["documents"], lines["empty"]) == (str(other), 1, 2, 1)
    assert text["bytes"] == sum(file.stat().st_size for file in corpus.iterdir()) - 2
    assert manifest["documents"] == found.train.num_documents + found.validation.num_documents == 32
    assert manifest["train_tokens"] == found.train.num_tokens
    for shard in (*manifest["shards"]["train"], *manifest["shards"]["validation"]):
        assert hashlib.sha256(files[shard["file"]]).hexdigest() == shard["sha256"]


def test_processes_make_the_same(corpus, tmp_path):
    one, two = (built(tmp_path / f"out{n}", recipe_of(corpus), n) for n in (1, 2))

    assert one == two


@pytest.mark.parametrize("done", [0, 2])
def test_a_build_that_was_stopped_goes_on(corpus, tmp_path, monkeypatch, done):
    whole = built(tmp_path / "whole", recipe_of(corpus))
    make, made = units._make_unit, []

    def interrupted(unit, advance):
        if len(made) == done:
            raise KeyboardInterrupt
        made.append(unit.number)
        return make(unit, advance)

    with monkeypatch.context() as patch:
        patch.setattr(units, "_make_unit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            built(tmp_path / "out", recipe_of(corpus))
    (tmp_path / "out" / ".train-00002.arrayrecord.tmp").write_text("left by a kill")
    monkeypatch.setattr(building, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(
        units, "_make_unit", lambda unit, advance: made.append(unit.number) or make(unit, advance)
    )

    assert built(tmp_path / "out", recipe_of(corpus)) == whole
    assert made == [0, 1, 2]


def test_a_bad_line_ends_a_build_of_processes_with_one_line(corpus, tmp_path):
    (corpus / "z.jsonl").write_text('{"text": "fine"}\noops\n' + "x" * 5000)
    with pytest.raises(ValueError, match=r"z\.jsonl:2: not JSON") as caught:
        built(tmp_path / "out", recipe_of(corpus, max_bytes=None, validation_fraction=0.0, vocab_size=257), 2)
    assert caught.traceback[-1].path.name in ("units.py", "sources.py")


def test_max_bytes_stops_between_shards(corpus, tmp_path):
    files = built(tmp_path / "out", recipe_of(corpus, max_bytes=5000))
    manifest = json.loads(files["manifest.json"])

    assert len(manifest["shards"]["train"]) == 2
    assert 4500 < manifest["bytes"] <= 5000
    with pytest.raises(ValueError, match=r"no text, or none within data\.max_bytes"):
        built(tmp_path / "none", recipe_of(corpus, max_bytes=5))
