"""The tokenizer of a fine-tuning run: that of a folder, or one trained on the examples in the model's own style."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from modelzoo.tokenizing import BERT, read_tokenizer, special_tokens, word_piece_tokenizer

MOST_CHARACTERS = 1000
"""That word pieces are made of; rarer ones are unknown. WordPieceTrainer's own limit."""


@dataclasses.dataclass(frozen=True)
class Words:
    """A tokenizer and what its special tokens are for.

    Attributes:
        tokenizer: without truncation or padding.
        special: ids by purpose, such as "mask_token".
        files: what to lay beside checkpoints, so that inference reads texts likewise: name -> contents.
    """

    tokenizer: Tokenizer
    special: Mapping[str, int]
    files: Mapping[str, str]

    def cutter(self, length: int, **options: Any) -> Tokenizer:
        """A copy that cuts texts to so many tokens."""
        copy = Tokenizer.from_str(self.tokenizer.to_str())
        copy.enable_truncation(length, **options)
        return copy


def keep_words(folder: Path, config: Any, texts: Iterable[str]) -> str:
    """Trains a tokenizer into a folder, unless it lies there.

    Args:
        folder: to be made.
        config, texts: as `train_words`.

    Returns:
        The folder.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        tokenizer = train_words(config, texts)
        folder.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(".tmp")
        tokenizer.save(str(aside))
        os.replace(aside, file)
    return str(folder)


def open_words(path: str, config: Any, setting: str = "task.tokenizer") -> Words:
    """Opens a tokenizer.

    Args:
        path: a checkpoint's folder, or a tokenizer.json.
        config: of the model.
        setting: where the path is from, for messages.

    Raises:
        OSError: no tokenizer there.
        ValueError: it is damaged, or larger than the model's vocabulary.
    """
    folder = Path(path).expanduser()
    folder = folder.parent if folder.is_file() else folder
    tokenizer = read_tokenizer(folder)
    special = special_tokens(folder, tokenizer)
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        family = type(config).__name__.removesuffix("Config")
        raise ValueError(
            f"{family}.vocab_size = {config.vocab_size}: the tokenizer of {setting} ({folder}) has ids up to "
            f"{largest}: set it to {largest + 1} or more"
        )
    about: dict[str, Any] = {name: tokenizer.id_to_token(number) for name, number in special.items()}
    about |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(about, indent=2) + "\n",
    }
    return Words(tokenizer, special, files)


def train_words(config: Any, texts: Iterable[str]) -> Tokenizer:
    """Trains a tokenizer in a family's style: BERT's word pieces, RoBERTa's bytes with tokens around, or GPT-2's bytes.

    Raises:
        ValueError: the config's special tokens are not among the first ids, or its vocabulary is too small.
    """
    reads_both_ways = hasattr(config, "type_vocab_size") or getattr(config, "is_encoder_decoder", False)
    if reads_both_ways and config.bos_token_id is None:
        return _word_pieces(config.vocab_size, texts)
    special = _special_names(config)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    least = 256 + len(special)
    if config.vocab_size < least:
        family = type(config).__name__.removesuffix("Config")
        raise ValueError(
            f"{family}.vocab_size = {config.vocab_size}: a byte-level tokenizer needs at least {least} (every "
            f"byte, and {', '.join(special)})"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(name, lstrip=name == "<mask>", special=True) for name in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if reads_both_ways:
        first, last = config.bos_token_id, config.eos_token_id
        around = ("</s>", last), ("<s>", first)
        tokenizer.post_processor = processors.RobertaProcessing(*around, add_prefix_space=False)
    return tokenizer


def _special_names(config: Any) -> list[str]:
    """Names of the first ids, such that each purpose has the id that the config gives it."""
    family, placed = type(config).__name__.removesuffix("Config"), {}
    for field, name in (("bos_token_id", "<s>"), ("pad_token_id", "<pad>"), ("eos_token_id", "</s>")):
        number = getattr(config, field)
        if number is None:
            continue
        if number > 7:
            raise ValueError(
                f"{family}.{field} = {number}: a tokenizer that is trained here has its special tokens first: set it "
                "below 8, or name a tokenizer by task.tokenizer"
            )
        placed[number] = "<|endoftext|>" if placed.get(number) == "<s>" else name
    others = iter(("<unk>", "<mask>", "<unused0>", "<unused1>", "<unused2>", "<unused3>", "<unused4>"))
    names = [placed.get(number) or next(others) for number in range(max(placed, default=-1) + 1)]
    names += [name for name in ("<unk>", "<mask>") if name not in names]
    return names


def _word_pieces(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """Word pieces in lower case, the same in every process.

    WordPieceTrainer numbers the characters inside words as a hash map hands it the words, and breaks ties between
    pairs by those numbers. Characters that it has been given beforehand keep their order.
    """
    texts = list(texts)
    # Knows no special tokens yet: it would take a text that spells one for a word of such characters.
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizer = normalizers.BertNormalizer(lowercase=True)
    trained.pre_tokenizer = splitter = pre_tokenizers.BertPreTokenizer()
    every, inside = Counter[str](), set[str]()
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            every.update(word)
            inside.update(word[1:])
    kept = sorted(every, key=lambda character: (-every[character], character))[:MOST_CHARACTERS]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BERT, *(f"##{character}" for character in sorted(inside.intersection(kept)))],
        initial_alphabet=kept,
        limit_alphabet=len(kept),
        show_progress=False,
        min_frequency=2,
    )
    trained.train_from_iterator(texts, trainer)
    # The one that was trained takes every piece that was given beforehand for a special token.
    return word_piece_tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
