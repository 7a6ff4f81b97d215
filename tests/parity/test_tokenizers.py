"""Tokenizers made from vocabulary files against transformers' own classes."""

import json

import pytest
import transformers

from inference.text import read_tokenizer
from tests.small_tokenizers import bert, roberta

TEXTS = ["The quick, BROWN fox!", "naïve über-dog  of\tmain\n", "the <mask> fox [MASK]", "日本 x = 'é'"]


@pytest.mark.parametrize("lower", [True, False])
def test_bert(tmp_path, lower):
    vocab = bert().get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    theirs = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=lower)
    check_same(read_tokenizer(tmp_path), theirs)


def test_roberta(tmp_path):
    content = json.loads(roberta().to_str())["model"]
    vocab = content["vocab"] | {"<mask>": len(content["vocab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = ["#version: 0.2", *map(" ".join, content["merges"]), ""]  # transformers drops the last line
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    theirs = transformers.RobertaTokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    check_same(read_tokenizer(tmp_path), theirs)


def check_same(ours, theirs):
    for text, other in zip(TEXTS, reversed(TEXTS), strict=True):
        for one, wanted in (
            (ours.encode(text), theirs(text)),
            (ours.encode(text, other), theirs(text, other)),
        ):
            assert one.ids == wanted["input_ids"]
            if "token_type_ids" in wanted:
                assert one.type_ids == wanted["token_type_ids"]
        ids = ours.encode(text).ids
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert ours.encode(text).offsets == theirs(text, return_offsets_mapping=True)["offset_mapping"]
