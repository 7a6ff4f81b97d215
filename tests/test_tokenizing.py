"""Tokenizers from a checkpoint's folder, and what their special tokens are for."""

import json

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from modelzoo.tokenizing import read_tokenizer, special_tokens
from tests.small_tokenizers import byte_level


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, trained on ASCII: every other character takes several tokens."""
    return byte_level()


def test_tokenizer_json_is_read_without_truncation_or_padding(tokenizer, tmp_path):
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(4)
    copy.enable_padding(length=32)
    copy.save(str(tmp_path / "tokenizer.json"))
    text = "the end of the function"
    assert read_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids


def test_vocab_and_merges_make_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.model.save(str(tmp_path))
    again = read_tokenizer(tmp_path)
    text = "def main(): €<|endoftext|>"
    assert again.encode(text).ids == tokenizer.encode(text).ids
    assert again.decode(again.encode(text).ids) == "def main(): €"


def test_missing_and_damaged_tokenizers_are_named(tmp_path):
    with pytest.raises(OSError, match=r"no tokenizer in .*there is no tokenizer.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        read_tokenizer(tmp_path)


def test_vocabularies_of_other_families(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    bert = read_tokenizer(tmp_path)
    pair = bert.encode("The foxes!", "fox [MASK] zebra")
    assert pair.tokens == ["[CLS]", "the", "fox", "##es", "!", "[SEP]", "fox", "[MASK]", "[UNK]", "[SEP]"]
    assert pair.type_ids == [0] * 6 + [1] * 4
    assert bert.decode(pair.ids) == "the foxes! fox"
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "unk_token": "[UNK]"}')
    assert read_tokenizer(tmp_path).encode("The").tokens == ["[CLS]", "[UNK]", "[SEP]"]
    assert special_tokens(tmp_path, bert)["mask_token"] == 4

    for file in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    letters = ["<s>", "<pad>", "</s>", "<unk>", *pre_tokenizers.ByteLevel.alphabet(), "th", "the", "<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    roberta = read_tokenizer(tmp_path)
    ids = roberta.encode("the a <mask>", "the").ids
    around = ["<s>", "the", "Ġ", "a", "<mask>", "</s>", "</s>", "the", "</s>"]
    assert [roberta.id_to_token(number) for number in ids] == around
    assert special_tokens(tmp_path, roberta)["cls_token"] == 0


def test_names_of_special_tokens(tmp_path, tokenizer):
    assert special_tokens(tmp_path, tokenizer) == {"eos_token": 0}
    (tmp_path / "special_tokens_map.json").write_text(
        '{"bos_token": {"content": "the"}, "pad_token": "nowhere"}'
    )
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": null, "unk_token": "a", "model_max_length": 9}'
    )
    found = special_tokens(tmp_path, tokenizer)
    assert found["bos_token"] == tokenizer.token_to_id("the")
    assert found["unk_token"] == tokenizer.token_to_id("a")
    assert "pad_token" not in found
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json is not a JSON object"):
        special_tokens(tmp_path, tokenizer)
