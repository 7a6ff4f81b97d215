"""train/data/shards.py: documents written and read at random, and damage that is named."""

import concurrent.futures

import numpy as np
import pytest

from train.data.shards import ShardWriter, Split

DTYPE = np.dtype(np.uint16)
RANDOM = np.random.default_rng(0)
DOCUMENTS = [RANDOM.integers(0, 60_000, size) for size in (3, 1, 70, 2, 500, 9, 9)]
FLAT = np.concatenate(DOCUMENTS)


@pytest.fixture
def files(tmp_path):
    files = [tmp_path / f"{i}.arrayrecord" for i in range(4)]
    for file, part in zip(files, (DOCUMENTS[:2], [], DOCUMENTS[2:6], DOCUMENTS[6:]), strict=True):
        writer = ShardWriter(file, DTYPE)
        for document in part:
            writer.add(document)
        assert not file.exists()
        told = writer.finish()
        assert (told["documents"], told["tokens"]) == (len(part), sum(map(len, part)))
        assert told["bytes"] == file.stat().st_size
    return files


def test_documents_and_stretches_come_back(files):
    split = Split(files, DTYPE)

    assert split.lengths.tolist() == [len(document) for document in DOCUMENTS]
    for i, document in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(split.document(i), document)
    for start, stop in [(0, 594), (0, 0), (2, 5), (70, 80), (590, 10_000), (3, 4), (700, 800)]:
        found = split.read(start, stop)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, FLAT[start:stop])
    with pytest.raises(IndexError, match="document 7 of 7"):
        split.document(7)


def test_threads_may_read_at_once(files):
    split = Split(files, DTYPE)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: split.read(i, i + 50), list(range(500)) * 4))
    for i, tokens in enumerate(found):
        np.testing.assert_array_equal(tokens, FLAT[i % 500 : i % 500 + 50])


def test_the_same_documents_make_the_same_bytes(files, tmp_path):
    writer = ShardWriter(tmp_path / "again", DTYPE)
    for document in DOCUMENTS[2:6]:
        writer.add(document)
    writer.finish()

    assert (tmp_path / "again").read_bytes() == files[2].read_bytes()


def test_what_is_discarded_leaves_nothing(tmp_path):
    writer = ShardWriter(tmp_path / "no", DTYPE)
    writer.add(DOCUMENTS[0])
    writer.discard()

    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(files):
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[:40])
    with pytest.raises(OSError, match=r"2\.arrayrecord: this shard cannot be read"):
        Split(files, DTYPE)
    files[2].write_bytes(whole[:70] + b"damage" + whole[76:])
    split = Split(files, DTYPE)
    with pytest.raises(OSError, match=r"2\.arrayrecord: this shard cannot be read .*hash mismatch"):
        split.read(0, 594)
    files[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.arrayrecord: the manifest names this shard"):
        Split(files, DTYPE)
