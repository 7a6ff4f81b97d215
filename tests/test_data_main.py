"""`python -m train.data`: a folder of text to a prepared folder, and one line for what may be wrong."""

import json
import re

import pytest

from train.data import __main__ as entry
from train.data.tokenizer import train_tokenizer
from train.data.tokens import prepare_tokens


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i}: the square of {i} is {i * i}. " * 5)
    lines = [json.dumps({"body": f"line {i}"}) for i in range(9)]
    (tmp_path / "lines.jsonl").write_text("\n".join([*lines, '{"body": ""}']))
    train_tokenizer(["the square of a number " * 5], 280).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_prepares_and_says_what(here, capsys):
    command = ["text", "--output", "out", "--train-tokenizer", "300", "--validation-fraction", "0.2"]
    entry.main(command)
    first = capsys.readouterr().out
    entry.main(command)
    second = capsys.readouterr().out
    data = prepare_tokens("out", model_vocab_size=300)

    assert re.search(r"  text: 20 documents \(0 empty ones left out\) of 20 files, \d", first)
    assert re.search(r"done: 20 documents .* 1 shards in out, [\d.]+ MB/s", first)
    assert "complete: 20 documents" in second
    assert data.manifest["documents"] == 20
    assert data.tokenizer_file.parent.name == "out"


def test_several_inputs_are_counted_each(here, capsys):
    entry.main(
        [
            "text/1.txt",
            "lines.jsonl",
            "--text-field",
            "body",
            "--output",
            "out",
            "--tokenizer",
            "tokenizer.json",
        ]
    )
    out = capsys.readouterr().out

    assert "  text/1.txt: 1 documents (0 empty ones left out) of 1 files" in out
    assert "  lines.jsonl: 9 documents (1 empty ones left out) of 1 files" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("text --output new", r"give one of --tokenizer PATH and --train-tokenizer N"),
        (
            "text --output new --tokenizer no",
            r"--tokenizer = 'no': .*no such folder here, and the .* hub did not",
        ),
        ("no --output new --tokenizer tokenizer.json", r"INPUT = 'no': no such file or folder"),
        (
            "lines.jsonl --output new --tokenizer tokenizer.json",
            r'lines\.jsonl:1: each line .* "text" string',
        ),
        ("text --output new --train-tokenizer 9", r"--train-tokenizer = 9: .* at least 257"),
        (
            "text --output new --train-tokenizer 300 --model-vocab-size 290",
            r"--train-tokenizer = 300 is larger",
        ),
        (
            "text --output new --tokenizer tokenizer.json --model-vocab-size 200",
            r"ids up to \d+, but the model's vocab_size is 200",
        ),
        ("text --output new --tokenizer tokenizer.json --max-bytes 0", r"--max-bytes = 0"),
        ("text --output text --tokenizer tokenizer.json", r"--output text: it holds other files"),
        (
            "text --output lines.jsonl --tokenizer tokenizer.json",
            r"--output lines\.jsonl: a file is in the way",
        ),
        (
            "text --output out --train-tokenizer 290",
            r"of something else: tokenizer was \w+, is trained, vocab_size 290",
        ),
        ("text/1.txt --output out --tokenizer tokenizer.json", r"paths was \['text'\], is \['text/1.txt'\]"),
    ],
)
def test_every_slip_is_one_line(here, capsys, args, message):
    if "--output out" in args:
        entry.main(["text", "--output", "out", "--tokenizer", "tokenizer.json"])
        capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        entry.main(args.split())
    error = capsys.readouterr().err.splitlines()

    assert stopped.value.code == 2
    assert len(error) == 1
    assert re.search(message, error[0])


def test_a_size_that_was_too_small_can_be_mended(here, capsys):
    with pytest.raises(SystemExit):
        entry.main(["text", "--output", "new", "--train-tokenizer", "9"])
    assert not (here / "new").exists()
    entry.main(["text", "--output", "new", "--train-tokenizer", "290"])
    assert "done" in capsys.readouterr().out
