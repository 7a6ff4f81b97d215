"""Tokenizers trained on a sentence or two, and the files that folders keep them in."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

import modelzoo
from modelzoo.tokenizing import BERT
from train.tasks.words import train_words

SENTENCES = ["the quick brown fox jumps over the lazy dog", "def main(): return the end of the function"]


def byte_level(vocab_size: int = 290, special: tuple[str, ...] = ("<|endoftext|>",)) -> Tokenizer:
    """Byte-level BPE, as GPT-2 and its descendants have; special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **purposes: Any) -> None:
    """tokenizer.json and tokenizer_config.json; purposes such as mask_token="<mask>"."""
    tokenizer.save(str(folder / "tokenizer.json"))
    content = dict(purposes, tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")


def roberta(vocab_size: int = 300) -> Tokenizer:
    """Byte-level, with tokens around a text and a mask."""
    tokenizer = byte_level(vocab_size, ROBERTA_TOKENS)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


ROBERTA_PURPOSES = dict(
    zip(("bos_token", "pad_token", "eos_token", "unk_token"), ROBERTA_TOKENS, strict=True),
    **dict(cls_token="<s>", sep_token="</s>", mask_token="<mask>"),
)
BERT_PURPOSES = dict(
    zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), BERT, strict=True)
)


def bert(vocab_size: int = 90) -> Tokenizer:
    """Word pieces in lower case, with tokens around a text or two."""
    return train_words(modelzoo.get_config("tiny-megatron-bert", vocab_size=vocab_size), SENTENCES * 3)
