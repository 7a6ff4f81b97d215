"""`python -m inference TASK`: texts and files in, lines or JSON out, and one line for what a user can get wrong."""

import json

import pytest

import modelzoo
from inference import __main__ as entry
from inference.task_cli import COMMANDS, find_task
from inference.text_tasks import TASKS
from tests import zoo
from tests.small_tokenizers import ROBERTA_PURPOSES, roberta, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("roberta"), roberta(280)
    sizes = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=32)
    config = modelzoo.RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=34, pad_token_id=1, **sizes
    )
    model = modelzoo.RobertaForMaskedLM(config)
    modelzoo.to_hf(model, zoo.random_params(model), folder)
    save(tokenizer, folder, **ROBERTA_PURPOSES)
    return folder


def test_texts_and_files(folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the <mask> fox\n\n<mask> dog\n")
    (tmp_path / "b.jsonl").write_text('{"text": "over <mask>", "more": 1}\n')
    common = ["fill-mask", "--checkpoint", str(folder), "--top-k", "2", "--text", "end <mask>"]
    for name in ("a.txt", "b.jsonl"):
        common += ["--file", str(tmp_path / name)]
    entry.main([*common, "--output", str(tmp_path / "out.jsonl")])
    assert capsys.readouterr().out == f"4 results in {tmp_path / 'out.jsonl'}\n"
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["end <mask>", "the <mask> fox", "<mask> dog", "over <mask>"]
    assert all(len(line["result"]) == 2 for line in lines)
    entry.main(["--checkpoint", str(folder), "--task", "fill-mask", "--text", "end <mask>", "--top-k", "2"])
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "end <mask>"
    for shown, one in zip(rest, lines[0]["result"], strict=True):
        assert shown == f"  {one['score']:.4f}  {one['token_str']!r:16} {one['sequence']}"


def test_every_task_has_a_command_that_teaches(capsys):
    assert set(COMMANDS) == set(TASKS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as exit_:
            entry.main([name, "--help"])
        assert exit_.value.code == 0
        shown = capsys.readouterr().out
        assert f"python -m inference {name} --checkpoint" in " ".join(shown.replace("│", " ").split())
        assert ".jsonl" in shown
    assert find_task(["--prompt", "the"]) is None
    assert find_task(["generate", "--prompt", "the"]) is None
    assert find_task(["summarise", "--text", "a"]) == ("summarize", ["--text", "a"])


BAD = [
    (["fil-mask"], "unknown task 'fil-mask': choose from fill-mask"),
    (["fill-mask"], "nothing to do: give --text TEXT, or --file FILE"),
    (["fill-mask", "--file", "nowhere.txt"], "cannot read nowhere.txt"),
    (["fill-mask", "--file", "bad.jsonl"], "bad.jsonl:2: not an object with text"),
    (["fill-mask", "--text", "no mask"], "has no mask"),
    (["answer", "--question", "who?"], "--question needs the text to look in"),
    (["answer", "--file", "a.txt"], "answer reads .jsonl files, whose lines have question and context"),
    (["choose", "--text", "a", "--choice", "b"], "--text needs two or more of --choice TEXT"),
    (["classify", "--text", "a"], "RobertaForMaskedLM does not do sequence classification"),
    (["classify", "--text", "a"], "it is for `python -m inference fill-mask`"),
    (
        ["fill-mask", "--file", "other.jsonl"],
        "other.jsonl:1: not an object with text: it has sentence, stars",
    ),
    (
        ["fill-mask", "--file", "a.csv"],
        'a.csv: tables are not read here: write a .jsonl file of lines such as {"text"',
    ),
    (
        ["fill-mask", "--file", "a.txt", "--output", "no/out.jsonl"],
        "--output no/out.jsonl: there is no folder no",
    ),
    (["fill-mask", "--file", "a.txt", "--output", "."], "--output .: it is a folder"),
]


@pytest.mark.parametrize(("arguments", "error"), BAD)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, capsys, arguments, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the end\n")
    (tmp_path / "a.csv").write_text("sentence,stars\ngood,1\n")
    (tmp_path / "other.jsonl").write_text('{"sentence": "good", "stars": 1}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a <mask>"}\n[1]\n')
    with pytest.raises(SystemExit) as exit_:
        entry.main([*arguments, "--checkpoint", str(folder)])
    assert exit_.value.code == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: ")
    assert error in captured
