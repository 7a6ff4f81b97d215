"""Rows of plain text for every model that learns from it: what they hold, and that they follow from (seed, step)."""

import json
import types

import numpy as np
import pytest

import modelzoo
from tests import small_tokenizers
from train.objectives.corruption import Objective
from train.objectives.rows import ObjectiveBatches, TextRows, vocabulary_of

IGNORED = -100
SENTENCE = "the quick brown fox jumps over the lazy dog . "


class Split:
    """Documents in memory, as `train.data` shows them."""

    def __init__(self, tokenizer, end, count=12):
        texts = [SENTENCE * (3 + i % 4) for i in range(count)]
        self._documents = [
            np.array([*tokenizer.encode(text, add_special_tokens=False).ids, end], np.int32) for text in texts
        ]
        self.ends = np.cumsum([len(document) for document in self._documents])
        self.num_tokens = int(self.ends[-1])

    def document(self, index):
        return self._documents[index]


class Windows:
    """A source of windows, each step's known by its number."""

    def __init__(self, ids, size, length, shard):
        index, count = shard
        share = size // count
        self.rows, self.step = range(index * share, (index + 1) * share), 0
        self.rows_of = lambda step: self.rows
        self._ids, self._size, self._length = ids, size, length

    def __next__(self):
        first = self.step * self._size
        self.step += 1
        starts = [(first + row) * self._length % (len(self._ids) - self._length) for row in self.rows]
        ids = np.stack([self._ids[start : start + self._length] for start in starts])
        return {"input_ids": ids, "labels": ids}

    def set_state(self, state):
        self.step = state["step"]


def sentences_tokenizer(kind):
    tokenizer = getattr(small_tokenizers, kind)()
    end = tokenizer.token_to_id("</s>" if kind == "roberta" else "[SEP]")
    return tokenizer, end


def data_of(folder, kind):
    tokenizer, end = sentences_tokenizer(kind)
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    split = Split(tokenizer, end)
    return types.SimpleNamespace(
        train=(split,),
        validation=(split,),
        weights=(1.0,),
        tokenizer_file=file,
        manifest={"end_of_text_id": end},
    )


def model_of(name, kind, size=400):
    family = "tiny-roberta" if kind == "roberta" else "tiny-megatron-bert"
    family = "tiny-mvp" if name.startswith("Mvp") else family
    return modelzoo.get_model_class(name)(modelzoo.get_config(family, vocab_size=size))


def source(folder, name, kind, shard=(0, 1), seed=0, length=32, **settings):
    data = data_of(folder, kind)
    rows = TextRows(model_of(name, kind), data, Objective(**settings), length)
    split = data.train[0]
    ids = np.concatenate([split.document(i) for i in range(len(split.ends))])
    return ObjectiveBatches(Windows(ids, 4, length, shard), rows, seed)


CASES = [
    ("RobertaForMaskedLM", "roberta"),
    ("MegatronBertForMaskedLM", "bert"),
    ("MegatronBertForPreTraining", "bert"),
    ("MegatronBertForNextSentencePrediction", "bert"),
    ("MvpForConditionalGeneration", "roberta"),
    ("MvpForCausalLM", "roberta"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rows_follow_from_seed_step_and_row_alone(tmp_path, name, kind):
    whole, parts = source(tmp_path, name, kind), [source(tmp_path, name, kind, (i, 2)) for i in range(2)]
    batches = [next(whole) for _ in range(3)]
    for batch in batches:
        pieces = [next(part) for part in parts]
        for key, value in batch.items():
            np.testing.assert_array_equal(value, np.concatenate([piece[key] for piece in pieces]), key)
            assert value.dtype == np.int32
    again = source(tmp_path, name, kind)
    again.set_state({"step": 2})
    for key, value in next(again).items():
        np.testing.assert_array_equal(value, batches[2][key], key)
    assert again.get_state() == whole.get_state() == {"step": 3}
    if name != "MvpForCausalLM":
        other = next(source(tmp_path, name, kind, seed=1))
        assert (other["input_ids"] != batches[0]["input_ids"]).any()


def test_masked_rows_begin_with_the_token_that_stands_before_texts(tmp_path):
    batch = next(source(tmp_path, "RobertaForMaskedLM", "roberta", mask_fraction=0.5))
    assert (batch["input_ids"][:, 0] == 0).all()
    assert (batch["labels"][:, 0] == IGNORED).all()
    chosen = batch["labels"] != IGNORED
    assert 0.3 < chosen.mean() < 0.6
    assert set(batch) == {"input_ids", "labels"}


def test_pairs_are_laid_out_as_bert_has_them(tmp_path):
    rows = source(tmp_path, "MegatronBertForPreTraining", "bert", length=48)
    seen = set()
    for _ in range(20):
        batch = next(rows)
        seen |= set(batch["next_sentence_label"].tolist())
        for ids, types_, mask, labels in zip(
            *(batch[name] for name in ("input_ids", "token_type_ids", "attention_mask", "labels")),
            strict=True,
        ):
            length = mask.sum()
            assert ids[0] == 2
            assert ids[length - 1] == 3
            seps = np.flatnonzero(ids[:length] == 3)
            assert len(seps) == 2
            assert types_[:length].tolist() == [0] * (seps[0] + 1) + [1] * (length - seps[0] - 1)
            assert not mask[length:].any()
            assert (ids[length:] == 0).all()
            assert (labels[length:] == IGNORED).all()
            assert (labels[seps] == IGNORED).all()
    assert seen == {0, 1}
    follows = next(source(tmp_path, "MegatronBertForNextSentencePrediction", "bert"))
    assert follows["labels"].shape == (4,)


def test_gaps_are_filled_by_the_target(tmp_path):
    batch = next(
        source(tmp_path, "MvpForConditionalGeneration", "roberta", permute_sentences=False, length=64)
    )
    mask_id = small_tokenizers.roberta().token_to_id("<mask>")
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        target = labels[labels != IGNORED].tolist()
        assert (target[0], target[-1]) == (0, 2)
        left = [token for token in ids.tolist() if token not in (mask_id, 1)]
        assert mask_id in ids
        place = 0
        for token in left:  # what is left of the text, in its order
            place = target.index(token, place) + 1


def test_a_decoder_alone_learns_each_token_where_its_logits_stand(tmp_path):
    batch = next(source(tmp_path, "MvpForCausalLM", "roberta"))
    np.testing.assert_array_equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
    assert (batch["labels"][:, -1] == IGNORED).all()


@pytest.mark.parametrize(("name", "kind"), CASES[:3])
def test_what_is_held_out_is_corrupted_in_one_way(tmp_path, name, kind):
    rows = TextRows(model_of(name, kind), data_of(tmp_path, kind), Objective(), 32)
    window = {"input_ids": np.full((4, 32), 40, np.int32), "labels": np.full((4, 32), 40, np.int32)}
    window["labels"][3] = IGNORED  # fills the batch up
    first, again = (list(rows.held_out(iter([window]), range(4), 4, 1)) for _ in range(2))
    assert len(first) == len(again) == 1
    for key, value in first[0].items():
        np.testing.assert_array_equal(value, again[0][key])
    if name != "MegatronBertForPreTraining":
        assert (first[0]["labels"][3] == IGNORED).all()
        assert (first[0]["labels"][:3] != IGNORED).any()


def test_words_and_sentences_of_a_vocabulary():
    tokenizer = small_tokenizers.roberta()
    special = {"mask_token": tokenizer.token_to_id("<mask>")}
    found = vocabulary_of(tokenizer, special, 2)
    numbers = tokenizer.get_vocab()
    assert found.special[[0, 1, 2, 3, special["mask_token"]]].all()
    assert found.special.sum() == 5
    assert found.ends[numbers["."]]
    assert not found.ends[numbers["t"]]
    assert found.begins[[i for token, i in numbers.items() if token.startswith("Ġ")]].all()
    assert not found.begins[numbers["t"]]
    bert = small_tokenizers.bert()
    pieces = vocabulary_of(bert, {"mask_token": 4}, 3)
    for token, number in bert.get_vocab().items():
        assert pieces.begins[number] == (not token.startswith("##"))


def test_what_a_tokenizer_lacks_is_named(tmp_path):
    small_tokenizers.byte_level().save(str(tmp_path / "tokenizer.json"))
    data = types.SimpleNamespace(tokenizer_file=tmp_path / "tokenizer.json", manifest={"end_of_text_id": 0})
    with pytest.raises(ValueError, match=r"data.tokenizer: RobertaForMaskedLM needs a mask_token"):
        TextRows(model_of("RobertaForMaskedLM", "roberta"), data, Objective(), 32)
    model = modelzoo.RobertaForMaskedLM(modelzoo.get_config("tiny-roberta", vocab_size=400, pad_token_id=7))
    with pytest.raises(ValueError, match=r"Roberta.pad_token_id = 7: the tokenizer pads with 1"):
        TextRows(model, data_of(tmp_path, "roberta"), Objective(), 32)


def test_what_special_tokens_are_for_is_told(tmp_path):
    rows = TextRows(model_of("RobertaForMaskedLM", "roberta"), data_of(tmp_path, "roberta"), Objective(), 32)
    assert json.loads(rows.tokenizer_config)["mask_token"] == "<mask>"
