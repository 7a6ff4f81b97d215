"""What a run works on, as the loop sees it: labelled examples here, plain text in tests/test_train_main.py."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from tests import small_tokenizers
from train import __main__ as entry
from train.experiment import Experiment
from train.work import check_same_data, open_work

LEAST = {
    "train.workdir": "'run'",
    "train.num_steps": "4",
    "train.global_batch_size": "8",
    "mesh.data": "-1",
    "train.sequence_length": "16",
    "train.model_class": "'MegatronBertForSequenceClassification'",
    "train.preset": "'tiny-megatron-bert'",
    "MegatronBert.num_hidden_layers": "1",
    "train.optimizer": "@adamw()",
    "task.train_file": "'a.jsonl'",
    "task.tokenizer": "'words'",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": ("the fox", "the lazy dog")[i % 2] + " jumps" * (i % 3), "label": "ab"[i % 2]}
        for i in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words").mkdir()
    small_tokenizers.save(small_tokenizers.bert(), tmp_path / "words", **small_tokenizers.BERT_PURPOSES)
    return tmp_path


def params(**changes):
    return [f"{key}={value}" for key, value in {**LEAST, **changes}.items()]


def experiment(**changes):
    return Experiment(gin_params=params(**{key.replace("__", "."): value for key, value in changes.items()}))


def work_of(built):
    return open_work(built, built.make_rules(jax.devices()[:1]))


def test_examples_become_batches(here):
    built = experiment()
    assert built.config.id2label == ((0, "a"), (1, "b"))
    work = work_of(built)
    batch = next(work.batches)
    assert batch["input_ids"].shape == (8, 16)
    assert batch["labels"].shape == (8,)
    assert set(work.texts) == {"tokenizer.json", "tokenizer_config.json"}
    assert work.origin == "task.train_file = 'a.jsonl'"
    assert re.fullmatch(r"\d+ examples to train on and \d+ held out", work.summary)
    again = next(work_of(built).batches)
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    int(work.fingerprint, 16)

    (here / "a.jsonl").write_text((here / "a.jsonl").read_text().replace("lazy", "quick"))
    other = work_of(experiment())
    with pytest.raises(
        ValueError, match=r"^task.train_file = 'a.jsonl': the text has changed since the checkpoint"
    ):
        check_same_data(built, other, work.fingerprint)
    check_same_data(experiment(train__allow_changes="True"), other, work.fingerprint)


def test_the_resolved_config_describes_the_same_task(here):
    built = experiment(task__columns="{'text': 'text'}", task__buckets="(8,)")
    file = here / "config.gin"
    file.write_text(built.text)
    again = Experiment([str(file)])
    assert again.text == built.text
    assert again.config == built.config
    assert again.task == built.task


@pytest.mark.parametrize(
    ("changes", "line", "error"),
    [
        ({}, '{"text": \n', r"a.jsonl:21: not JSON"),
        ({}, '{"text": "", "label": "a"}', r"a.jsonl:21: text is empty"),
        (
            {"task.labels": "('a', 'c')"},
            "",
            r"unknown label 'b': the classes are 'a', 'c'; task.labels names them",
        ),
        ({"MegatronBert.num_labels": "3"}, "", r"MegatronBert.num_labels = 3: there are 2 classes: 'a', 'b'"),
        ({"task.train_file": "'no.jsonl'"}, "", r"task.train_file = 'no.jsonl': cannot be read"),
        ({"task.tokenizer": "'a'"}, "", r"no tokenizer in a"),
        ({"task.eval_fraction": "2.0"}, "", r"task.eval_fraction = 2.0: a share .*--gin_param"),
        ({"train.init_from": "'nothing'"}, "", r"train.init_from = 'nothing'"),
        (
            {"train.model_class": "'MegatronBertForMaskedLM'"},
            "",
            "task.train_file trains heads that read labels",
        ),
        (
            {"train.keep_best": "'mse'"},
            "",
            r"train.keep_best = 'mse'.*: what is measured is accuracy, f1, loss, matthews",
        ),
        ({"task.column": "3"}, "", r"unknown setting task.column .*did you mean columns\?"),
    ],
)
def test_every_slip_is_one_line(here, capsys, changes, line, error):
    with (here / "a.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(SystemExit) as stopped:
        entry.main([f"--gin_param={param}" for param in params(**changes)])
    assert stopped.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(error, said), said


@pytest.mark.long
def test_a_run_learns_its_examples_and_goes_on_bit_for_bit(here, capsys):
    changes = {"train.num_steps": "40", "train.checkpoint_every": "20", "adamw.learning_rate": "3e-3"}
    dropout = {"MegatronBert.hidden_dropout_prob": "0.0", "MegatronBert.attention_probs_dropout_prob": "0.0"}

    def run(**more):
        entry.main([f"--gin_param={param}" for param in params(**changes, **dropout, **more)])
        return [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]

    whole = run()
    assert whole[-1]["eval_accuracy"] == 1.0
    assert (here / "run" / "predictions.jsonl").read_text().count("\n") >= 1
    shutil.rmtree(here / "run" / "checkpoints" / "40")
    again = run()
    assert "going on from step 20 of 40" in capsys.readouterr().out
    assert [line["loss"] for line in again if "loss" in line][-1] == [
        line["loss"] for line in whole if "loss" in line
    ][-1]
