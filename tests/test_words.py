"""Tokenizers of fine-tuning runs: opened, or trained in the style of the model's family."""

import dataclasses
import json
from pathlib import Path

import pytest

import modelzoo
from modelzoo.tokenizing import BERT
from tests import labelled, small_tokenizers
from tests.zoo import TINY
from train.tasks import words
from train.tasks.words import keep_words, open_words, train_words

ROOT = Path(__file__).parents[1]
TEXTS = [*small_tokenizers.SENTENCES] * 3


@pytest.mark.parametrize("name", TINY.values())
def test_special_tokens_have_the_ids_of_the_config(tmp_path, name):
    config = modelzoo.get_config(name, vocab_size=300)
    if config.pad_token_id == config.eos_token_id:
        config = dataclasses.replace(config, pad_token_id=config.eos_token_id + 1)
    words = open_words(keep_words(tmp_path, config, TEXTS), config)
    ids = words.tokenizer.encode("the quick fox").ids
    assert max(ids) < 300
    assert words.tokenizer.decode(ids) == "the quick fox"
    if name in ("tiny-roberta", "tiny-mvp"):
        assert (ids[0], ids[-1], words.special["pad_token"]) == (0, 2, 1)
        pair = words.tokenizer.encode("the", "fox").ids
        assert [i for i in pair if i < 3] == [0, 2, 2, 2]
    elif name == "tiny-megatron-bert":
        assert (ids[0], ids[-1], words.special["mask_token"]) == (2, 3, 4)
        assert set(words.tokenizer.encode("the", "fox").type_ids) == {0, 1}
    else:
        token = words.tokenizer.id_to_token
        assert min(ids) > 3  # nothing stands around a causal model's text
        is_one = config.bos_token_id == config.eos_token_id
        assert token(config.eos_token_id) == ("<|endoftext|>" if is_one else "</s>")
    assert words.special["unk_token"] != words.special["mask_token"]


@pytest.mark.parametrize("name", ["tiny-megatron-bert", "tiny-roberta"])
def test_the_same_texts_give_the_same_tokenizer(name):
    texts = (ROOT / "docs" / "concepts.md").read_text().split("\n\n")
    config = modelzoo.get_config(name, vocab_size=450)
    first, *others = (train_words(config, iter(texts)).to_str() for _ in range(4))
    assert others == [first] * 3
    assert train_words(config, texts).get_vocab_size() == 450


def test_rare_characters_are_unknown(monkeypatch):
    monkeypatch.setattr(words, "MOST_CHARACTERS", 20)
    tokenizer = train_words(modelzoo.get_config("tiny-megatron-bert", vocab_size=300), TEXTS)
    pieces = [piece for piece in tokenizer.get_vocab() if piece not in BERT]
    assert len(set("".join(pieces)) - {"#"}) == 20
    assert tokenizer.encode("the lazy").tokens == ["[CLS]", "the", "[UNK]", "[SEP]"]


def test_what_lies_beside_checkpoints_opens_again(tmp_path):
    config = modelzoo.get_config("tiny-roberta", vocab_size=300)
    made = keep_words(tmp_path / "made", config, TEXTS)
    words = open_words(made, config)
    assert keep_words(tmp_path / "made", config, ["other texts"]) == made
    assert open_words(made, config).files == words.files
    for name, text in words.files.items():
        (tmp_path / name).write_text(text)
    again = open_words(str(tmp_path), config)
    assert again.special == words.special
    assert again.tokenizer.encode("the fox").ids == words.tokenizer.encode("the fox").ids
    assert json.loads(words.files["tokenizer_config.json"])["mask_token"] == "<mask>"
    file = open_words(
        str(tmp_path / "tokenizer.json"), modelzoo.get_config("tiny-roberta", vocab_size=300), []
    )
    assert file.files["tokenizer.json"] == words.files["tokenizer.json"]


def test_a_cutter_cuts_and_leaves_the_tokenizer_alone():
    words = labelled.bert_words()
    assert len(words.cutter(5).encode("the quick brown fox").ids) == 5
    assert len(words.tokenizer.encode("the quick brown fox").ids) > 5


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (dict(vocab_size=200), r"Roberta.vocab_size = 200: a byte-level tokenizer needs at least 261 "),
        (dict(vocab_size=300, eos_token_id=9), r"Roberta.eos_token_id = 9: a tokenizer that is trained here"),
    ],
)
def test_a_config_that_none_can_be_trained_for(config, error):
    with pytest.raises(ValueError, match=error):
        train_words(modelzoo.get_config("tiny-roberta", **config), TEXTS)


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path):
    small_tokenizers.roberta(300).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ValueError,
        match=r"Roberta.vocab_size = 256: the tokenizer of task.tokenizer \(.*\) has ids up to 300: set it to",
    ):
        open_words(str(tmp_path), modelzoo.get_config("tiny-roberta"))
