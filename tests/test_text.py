"""Tokenizers from a checkpoint's folder, and text that comes in pieces."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from inference.text import TextStream, encode
from tests.small_tokenizers import byte_level


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, trained on ASCII: every other character takes several tokens."""
    return byte_level()


def pieces(tokenizer, ids, prompt=(), chunk=1):
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)), stream.finish()]


@pytest.mark.parametrize("text", ["the end", "naïve café", "日本語です", "a👩‍👩‍👧b🎉", "\n\tx = '€'\n"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_pieces_join_to_the_text_and_never_split_a_character(tokenizer, text, chunk):
    ids = tokenizer.encode(text).ids
    parts = pieces(tokenizer, ids, chunk=chunk)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_multi_byte_characters_are_held_back_until_they_end(tokenizer):
    ids = tokenizer.encode("€").ids
    assert len(ids) == 3
    assert pieces(tokenizer, ids) == ["", "", "€", ""]
    assert pieces(tokenizer, ids[:2]) == ["", "", "\ufffd"]


def test_any_tokens_give_what_one_decode_gives(tokenizer):
    source = random.Random(0)
    for _ in range(200):
        ids = [source.randrange(tokenizer.get_vocab_size()) for _ in range(source.randrange(1, 30))]
        assert "".join(pieces(tokenizer, ids, chunk=source.randrange(1, 4))) == tokenizer.decode(ids)


def test_words_keep_the_space_that_a_decoder_drops_at_a_start():
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2}, unk_token="c"))
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([1, 2]) == "bc"
    assert "".join(pieces(tokenizer, [1, 2], prompt=[0])) == " bc"


@pytest.mark.parametrize(("text", "error"), [("", "a prompt is empty"), ("a\udcff", "not valid UTF-8")])
def test_prompts_that_are_no_text_are_refused(tokenizer, text, error):
    with pytest.raises(ValueError, match=error):
        encode(tokenizer, text)
