"""train/data/sources.py: which files are read, in which order, cut into which pieces and shards."""

import gzip
import json

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from train.data import sources


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_folder_is_read_recursively_in_a_fixed_order(tmp_path):
    for name in ("b.txt", "a/z.py", "a/c.md", "a.jsonl", "skip.csv", ".hidden.txt", ".git/x.txt"):
        write(tmp_path / name, '{"text": "x"}')
    write(tmp_path / "empty.txt", "")

    files = sources.find_files(str(tmp_path))

    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "a.jsonl",
        "a/c.md",
        "a/z.py",
        "b.txt",
    ]


def test_stdlib_is_python_itself_without_its_tests():
    files = sources.find_files("stdlib")
    names = {file.name for file in files}

    assert {"argparse.py", "dataclasses.py"} <= names
    assert all(file.suffix == ".py" for file in files)
    assert not any(part in ("test", "tests", "site-packages") for file in files for part in file.parts[-3:-1])


def test_documents_of_every_kind(tmp_path):
    files = [
        write(tmp_path / "a.txt", "\ufeffplain\n"),
        write(tmp_path / "b.jsonl", '{"text": "one"}\n\n{"text": "two", "id": 2}\n{"text": "  "}\n'),
        write(tmp_path / "blank.md", " \n "),
    ]
    latin = tmp_path / "c.py"
    latin.write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"))

    documents = list(sources.iter_documents([*files, latin]))

    assert documents == ["plain\n", "one", "two", "# -*- coding: latin-1 -*-\nx = 'é'\n"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ('{"txt": "x"}', 'a "text" string'),
        ('["text"]', 'a "text" string'),
        ('{"text": 3}', 'a "text" string'),
        (json.dumps({"text": "\ud800"}), "surrogate"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path, line, reason):
    file = write(tmp_path / "bad.jsonl", f'{{"text": "fine"}}\n{line}\n')

    with pytest.raises(ValueError, match=r"bad\.jsonl:2: .*" + reason):
        list(sources.iter_documents([file]))


@pytest.mark.parametrize("name", ["x.txt", "x.py", "x.jsonl"])
def test_text_that_is_not_utf8_names_the_file(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b'{"text": "\xff\xfe"}')

    with pytest.raises(ValueError, match=rf"{name}(:1)?: not UTF-8"):
        list(sources.iter_documents([file]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path / "nothing", FileNotFoundError, "no such file or folder"),
        (lambda path: path, ValueError, "no .txt, .*or code file"),
        (lambda path: write(path / "t.csv", "x"), ValueError, "a .csv file is not read"),
        (lambda path: write(path / "t.txt", ""), ValueError, "no .txt"),
    ],
)
def test_sources_without_text_are_refused(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        sources.find_files(str(make(tmp_path)))


def lines(count, size=20):
    return "".join(json.dumps({"text": f"line {i} " + "x" * (i % size)}) + "\n" for i in range(count))


def texts_of(text):
    return [json.loads(line)["text"] for line in text.splitlines()]


def test_packed_files_are_unpacked(tmp_path):
    text = lines(50)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"plain"))
    write(tmp_path / "d.csv.gz", "no")
    table = pyarrow.table({"body": [*texts_of(text), None], "id": list(range(51))})
    parquet.write_table(table, tmp_path / "e.parquet", row_group_size=10)
    files = sources.find_files(str(tmp_path))
    tally = sources.Tally()

    assert [file.name for file in files] == ["a.jsonl.gz", "b.jsonl.zst", "c.txt.gz", "e.parquet"]
    assert list(sources.iter_documents(files[:3])) == texts_of(text) * 2 + ["plain"]
    assert list(sources.iter_documents(files[3:], "body", tally)) == texts_of(text)
    assert (tally.documents, tally.empty) == (50, 1)
    with pytest.raises(ValueError, match=r"e\.parquet: no column 'text': its columns are body, id"):
        list(sources.iter_documents(files[3:]))


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_a_torn_file_is_named(tmp_path, name):
    text = lines(500).encode()
    packed = gzip.compress(text) if name.endswith("gz") else zstandard.compress(text)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2] if "zst" not in name else b"nonsense")

    with pytest.raises(ValueError, match=rf"{name}: (cannot be unpacked|not a Parquet file)"):
        list(sources.iter_documents([tmp_path / name]))


@pytest.mark.parametrize("size", [64, 100, 1000])
def test_a_large_file_is_read_in_stretches(tmp_path, size):
    text = "\n" + lines(40)
    file = write(tmp_path / "large.jsonl", text)
    table = pyarrow.table({"text": texts_of(lines(40))})
    parquet.write_table(table, tmp_path / "large.parquet", row_group_size=4)
    small = [write(tmp_path / f"{i}.txt", "x" * 30) for i in range(4)]
    shards = sources.cut_into_shards([*small, file, tmp_path / "large.parquet"], size)
    whole = ["x" * 30] * 4 + texts_of(lines(40)) * 2

    assert len(shards) >= len(text) // size
    assert list(sources.iter_documents(part for parts in shards for part in parts)) == whole


def test_a_bad_line_of_a_later_stretch_has_its_number_in_the_file(tmp_path):
    text = lines(30) + "oops\n" + lines(30)
    file = write(tmp_path / "large.jsonl", text)
    stretches = sources.cut_into_shards([file], 100)
    bad = next(parts for parts in stretches if parts[0].stop > text.index("oops"))

    assert bad[0].start > 0
    with pytest.raises(ValueError, match=r"large\.jsonl:31: not JSON"):
        list(sources.iter_documents(bad))


def test_long_documents_are_cut_at_line_ends(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARS", 10)
    text = "12345\n1234567\n" + "x" * 25

    pieces = list(sources.iter_pieces([text, "short"]))

    assert "".join(piece.text for piece in pieces) == text + "short"
    assert [len(piece.text) for piece in pieces] == [6, 8, 10, 10, 5, 5]
    assert [piece.ends_document for piece in pieces] == [False] * 4 + [True, True]


def test_max_bytes_counts_bytes_not_characters():
    documents = ["éé", "abcd", "x"]

    assert [piece.text for piece in sources.iter_pieces(documents, max_bytes=8)] == ["éé", "abcd"]
    assert [piece.text for piece in sources.iter_pieces(documents, max_bytes=7)] == ["éé"]
