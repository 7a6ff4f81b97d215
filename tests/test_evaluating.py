"""One pass over examples: every one counts once, whatever the batches, and has its prediction in the file."""

import json
import math

import numpy as np
import pytest

import train
from modelzoo.registry import FAMILIES
from tests import labelled
from tests.zoo import quick_jit, random_params
from train.tasks.evaluating import Evaluation, head_of
from train.tasks.head import Head
from train.tasks.sequences import Sequences
from train.tasks.targets import Continuations


def evaluation(head, examples, folder):
    return Evaluation(head, examples, rules=None, lengths=(8, 24), batch_size=4, shard=(0, 1), workdir=folder)


def test_the_loss_is_that_of_all_examples_at_once(tmp_path):
    texts = ["the fox", "the quick brown fox jumps", "dog", "over the dog", "lazy"]
    examples = labelled.examples(*({"text": text, "label": i % 2} for i, text in enumerate(texts)))
    fields = dict(problem_type="single_label_classification", num_hidden_layers=1)
    head = labelled.head(Sequences, "MegatronBertForSequenceClassification", labelled.bert_words(), **fields)
    params = random_params(head.model)
    evaluate = evaluation(head, examples, tmp_path)
    metrics = evaluate(params)
    assert tuple(metrics) == evaluate.measures

    batch = head.batch(head.rows(examples), 24)
    inputs = {name: array for name, array in batch.items() if name != "labels"}
    outputs = quick_jit(lambda params, inputs: head.model.apply({"params": params}, **inputs))(params, inputs)
    loss, _ = train.loss(head.model, outputs, batch)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    guesses = np.asarray(outputs.logits).argmax(axis=1)
    assert metrics["accuracy"] == (guesses == batch["labels"]).mean()
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [one.where for one in examples]
    assert [line["prediction"] for line in lines] == [f"LABEL_{guess}" for guess in guesses]


def test_a_language_model_has_a_perplexity_and_writes(tmp_path):
    from tests.test_targets import PAIRS, gpt2_words

    ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=1, n_layer=1)
    head = labelled.head(Continuations, "GPTJForCausalLM", gpt2_words(), task=dict(target_length=4), **ends)
    evaluate = evaluation(head, PAIRS, tmp_path)
    metrics = evaluate(random_params(head.model))
    assert tuple(metrics) == evaluate.measures
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert {"rouge1", "rouge2", "rougeL", "rougeLsum"} < set(metrics)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [one.text("summary") for one in PAIRS]


def test_every_head_that_labels_train_is_known():
    models = [cls(family.config_class()) for family in FAMILIES.values() for cls in family.classes[1:]]
    unlabelled = [model for model in models if model.task in ("masked_lm", "pretraining")]
    assert all(issubclass(head_of(model), Head) for model in models if model not in unlabelled)
    for model in unlabelled:
        with pytest.raises(ValueError, match="learns from plain text, by data.path"):
            head_of(model)
