"""`python -m inference.evaluate`: perplexities of files, and one line for what a user can get wrong."""

import json
import sys
import types

import pytest

import modelzoo
from inference import evaluate
from inference.loading import open_checkpoint
from inference.scoring import perplexity
from tests import zoo
from tests.small_tokenizers import SENTENCES, byte_level, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("hf"), byte_level()
    model = modelzoo.GPTJForCausalLM(zoo.tiny_gptj(vocab_size=tokenizer.get_vocab_size(), n_layer=1))
    modelzoo.to_hf(model, zoo.random_params(model), folder)
    save(tokenizer, folder, eos_token="<|endoftext|>")
    return folder


def test_files_and_all_of_them(folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(" ".join(SENTENCES))
    lines = [json.dumps({"text": text}) for text in (*SENTENCES, "é")]
    (tmp_path / "b.jsonl").write_text("\n\n".join(lines) + "\n")
    arguments = [
        "--checkpoint",
        str(folder),
        "--window",
        "16",
        "--stride",
        "8",
        "--output",
        str(tmp_path / "out.json"),
    ]
    for name in ("a.txt", "b.jsonl"):
        arguments += ["--text-file", str(tmp_path / name)]
    evaluate.main(arguments)
    found = json.loads((tmp_path / "out.json").read_text())["perplexity"]
    checkpoint, ids = open_checkpoint(folder, "float32"), byte_level().encode(" ".join(SENTENCES)).ids
    expected = perplexity(checkpoint.model, checkpoint.read_params(), ids, 16, 8)
    one, two, both = found[str(tmp_path / "a.txt")], found[str(tmp_path / "b.jsonl")], found["all"]
    assert one["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert one["num_bytes"] == len(" ".join(SENTENCES))
    assert both["nll"] == pytest.approx(one["nll"] + two["nll"])
    assert two["num_tokens"] == sum(len(byte_level().encode(text).ids) - 1 for text in (*SENTENCES, "é"))
    out = capsys.readouterr().out
    assert f"a.txt: perplexity {expected.perplexity:.4f} over {expected.num_tokens} tokens" in out
    assert "window 16, stride 8" in out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "nothing to measure: give --text-file FILE or --task NAME"),
        (["--text-file", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
        (["--text-file", "bad.txt"], "is not UTF-8 text"),
        (["--text-file", "empty.txt"], "holds no text"),
        (["--text-file", "bad.jsonl"], 'bad.jsonl:2: not an object with a "text"'),
        (["--text-file", "a.txt", "--window", "99"], "window = 99: it is 2 to 32 tokens"),
        (["--text-file", "a.txt", "--batch-size", "0"], "batch_size = 0"),
        (["--text-file", "a.txt", "--output", "no/out.json"], "--output no/out.json: there is no folder no"),
        (["--task", "piqa"], "--task needs lm-evaluation-harness: pip install 'flaxtron[eval]'"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, capsys, arguments, error):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "a.txt").write_text("the end")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"words": 3}\n')
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["--checkpoint", str(folder), *arguments])
    assert exit_.value.code == 2
    assert error in capsys.readouterr().err


def test_tasks_that_are_not_there_are_named_before_a_checkpoint_is_read(tmp_path, monkeypatch, capsys):
    harness, tasks = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")

    class Manager:
        def __init__(self, include_path):
            self.known = ["piqa"] if include_path is None else ["piqa", "mine"]

        def match_tasks(self, names):
            return [name for name in names if name in self.known]

    tasks.__dict__["TaskManager"] = Manager
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setattr("inference.loading.open_checkpoint", lambda *_: pytest.fail("was read"))
    mine = ["--include-path", str(tmp_path)]
    for arguments, error in (
        (["--task", "pika"], "--task pika: there is none in lm-evaluation-harness: --include-path names"),
        (
            ["--task", "mine2", *mine],
            f"--task mine2: there is none in lm-evaluation-harness, nor in {tmp_path}",
        ),
        (
            ["--task", "mine", "--include-path", "no/where"],
            "--include-path no/where: there is no such folder",
        ),
    ):
        with pytest.raises(SystemExit) as exit_:
            evaluate.main(["--checkpoint", "nowhere", *arguments])
        assert exit_.value.code == 2
        assert error in capsys.readouterr().err
