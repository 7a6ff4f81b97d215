"""Texts to write: what an encoder and a decoder read, and what a causal model learns of text and target."""

import numpy as np
import pytest

from tests import labelled, small_tokenizers
from train.tasks.targets import Continuations, Targets, left_padded
from train.tasks.words import Words

PAIRS = labelled.examples(
    {"text": "the quick brown fox jumps over the lazy dog", "summary": "the fox"},
    {"text": "the dog", "summary": "the lazy dog jumps over the fox and the fox over the dog"},
)


def gpt2_words():
    return Words(small_tokenizers.byte_level(special=("<|endoftext|>", "<pad>")), {}, {})


def test_an_encoder_reads_the_text_and_the_decoder_learns_the_target():
    head = labelled.head(
        Targets, "MvpForConditionalGeneration", labelled.roberta_words(), task=dict(target_length=8)
    )
    rows = head.rows(PAIRS)
    tokenizer = labelled.roberta_words().tokenizer
    assert rows[0].ids == tokenizer.encode(PAIRS[0].text("text")).ids
    assert rows[0].labels["labels"] == tokenizer.encode("the fox").ids  # <s> ... </s>, as BART has them
    assert len(rows[1].labels["labels"]) == 8
    assert rows[1].labels["labels"][-1] == 2  # cut, and ended all the same
    assert head.num_cut == 1
    batch = head.batch(rows, 24, counted=1)
    assert batch["labels"].shape == (2, 8)
    assert (batch["labels"][1] == -100).all()
    assert batch["input_ids"].shape == (2, 24)
    metrics, found = head.measure(PAIRS, rows, {"written": ["the fox", "nothing"]})
    assert metrics["rouge1"] == 0.5
    assert tuple(metrics) == head.metrics
    assert found[0] == {"prediction": "the fox", "label": "the fox"}


@pytest.mark.parametrize("model", ["GPTJForCausalLM", "MvpForCausalLM"])
def test_a_causal_model_learns_the_target_alone(model):
    words = gpt2_words()
    ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    task = dict(target_length=6, suffix=" of")
    head = labelled.head(Continuations, model, words, 16, task=task, **ends)
    rows = head.rows(PAIRS)
    end = words.tokenizer.encode(" of").ids
    for row, example in zip(rows, PAIRS, strict=True):
        labels, prompt = np.array(row.labels["labels"]), row.about
        if model == "MvpForCausalLM":  # each label stands where its logits do
            labels = np.concatenate([[-100], labels[:-1]])
        assert (labels[:prompt] == -100).all()
        assert labels[prompt:].tolist() == row.ids[prompt:]
        assert row.ids[-1] == 0
        assert row.ids[prompt - len(end) : prompt] == end  # stays where the text is cut
        assert len(row.ids) <= 16
        assert head.prompts([row]) == [row.ids[:prompt]]
        assert words.tokenizer.encode(example.text("summary")).ids[:5] == row.ids[prompt:][:5] or prompt


def test_lengths_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"task.target_length = 16: train.sequence_length = 16 holds the text too"
    ):
        labelled.head(Continuations, "GPTJForCausalLM", gpt2_words(), 16, task=dict(target_length=16))
    with pytest.raises(ValueError, match=r"task.target_length = 99: the model has 64 positions"):
        labelled.head(
            Targets, "MvpForConditionalGeneration", labelled.roberta_words(), task=dict(target_length=99)
        )


def test_a_target_that_is_not_there():
    head = labelled.head(Targets, "MvpForConditionalGeneration", labelled.roberta_words())
    with pytest.raises(ValueError, match="a.jsonl:1: no 'summary'"):
        head.rows(labelled.examples({"text": "the fox"}))
    assert head.rows(labelled.examples({"text": "the fox", "target": "fox"}))


def test_prompts_end_at_the_last_place():
    ids, mask = left_padded([[5, 6], [7]], 3, 1)
    assert ids.tolist() == [[1, 5, 6], [1, 1, 7]]
    assert mask.tolist() == [[0, 1, 1], [0, 0, 1]]
