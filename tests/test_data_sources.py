"""train/data/sources.py: which files are read, in which order, cut into which pieces."""

import json

import pytest

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

    with pytest.raises(ValueError, match=f"{name}: not UTF-8"):
        list(sources.iter_documents([file]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path / "nothing", FileNotFoundError, "no such file or folder"),
        (lambda path: path, ValueError, "no .txt, .md, .py, .jsonl file"),
        (lambda path: write(path / "t.csv", "x"), ValueError, "a .csv file is not read"),
        (lambda path: write(path / "t.txt", ""), ValueError, "no .txt"),
    ],
)
def test_sources_without_text_are_refused(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        sources.find_files(str(make(tmp_path)))


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
