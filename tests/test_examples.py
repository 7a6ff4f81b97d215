"""Labelled files: what they may look like, and a slip in them named by file and line."""

import json

import pytest

from train.tasks.examples import hold_out, read_examples


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_jsonl_and_csv_hold_the_same(tmp_path):
    lines = write(
        tmp_path, "a.jsonl", '{"text": "one, two", "label": "x"}\n\n{"text": "three", "label": "y"}\n'
    )
    table = write(tmp_path, "a.csv", '\ufefftext,label\n"one, two",x\nthree,y\n')
    found, same = read_examples(lines, {}), read_examples(table, {})
    assert [one.fields for one in found] == [one.fields for one in same]
    assert [one.where for one in found] == ["a.jsonl:1", "a.jsonl:3"]
    assert [one.where for one in same] == ["a.csv:2", "a.csv:3"]


def test_columns_may_have_other_names(tmp_path):
    (one,) = read_examples(write(tmp_path, "a.jsonl", '{"sentence": "hello"}'), {"text": "sentence"})
    assert one.text("text") == "hello"
    assert one.has("text")
    assert not one.has("label")
    with pytest.raises(ValueError, match=r"a.jsonl:1: no 'label': its columns are sentence; task.columns = "):
        one.value("label")


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": "x"}\n["x"]\n', r"a.jsonl:2: not an object"),
        ("a.csv", "text,label\nx,1\nx,1,2\n", r"a.csv:3: it has not the 2 columns"),
        ("a.csv", "text,label\nx\n", r"a.csv:2: it has not the 2 columns"),
        ("a.jsonl", "\n", "it holds no example"),
        ("a.txt", "x", "examples come in .jsonl or .csv files"),
    ],
)
def test_malformed_files_are_named_with_the_line(tmp_path, name, text, error):
    with pytest.raises(ValueError, match=error):
        read_examples(write(tmp_path, name, text), {})


def test_a_file_that_is_not_there():
    with pytest.raises(OSError, match=r"task.eval_file = 'no.jsonl': cannot be read: No such file"):
        read_examples("no.jsonl", {}, "task.eval_file")


@pytest.mark.parametrize(
    ("fields", "read", "error"),
    [
        ({"text": "  "}, lambda one: one.text("text"), "a.jsonl:1: text is empty"),
        ({"text": 3}, lambda one: one.text("text"), "a.jsonl:1: text is 3: it is a text"),
        ({"tokens": ["a", ""]}, lambda one: one.words("tokens"), "a.jsonl:1: tokens holds ''"),
        ({"tokens": []}, lambda one: one.words("tokens"), r"a.jsonl:1: tokens is \[\]"),
    ],
)
def test_texts_that_are_none(tmp_path, fields, read, error):
    (one,) = read_examples(write(tmp_path, "a.jsonl", json.dumps(fields)), {})
    with pytest.raises(ValueError, match=error):
        read(one)


def test_what_is_held_out_does_not_depend_on_the_order(tmp_path):
    lines = [json.dumps({"text": f"number {i}"}) for i in range(200)]
    there = read_examples(write(tmp_path, "a.jsonl", "\n".join(lines)), {})
    back = read_examples(write(tmp_path, "b.jsonl", "\n".join(reversed(lines))), {})
    (train, held), (_, again) = hold_out(there, 0.2), hold_out(back, 0.2)
    assert len(train) + len(held) == 200
    assert 20 <= len(held) <= 60
    assert {one.text("text") for one in held} == {one.text("text") for one in again}
    assert len(hold_out(there[:2], 0.001)[1]) == 1
    with pytest.raises(ValueError, match="too few to hold some out"):
        hold_out(there[:1], 0.5)
