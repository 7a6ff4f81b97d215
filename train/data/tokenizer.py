"""Tokenizers: trained here on the data, or read from a tokenizer.json or GPT-2's vocab.json + merges.txt."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from modelzoo import hf_files

END_OF_TEXT = "<|endoftext|>"

MIN_VOCAB_SIZE = 257
"""Every byte and the end-of-text token: the smallest vocabulary of a byte-level tokenizer."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, end_of_text: str = END_OF_TEXT) -> Tokenizer:
    """Trains a byte-level byte-pair tokenizer (as GPT-2's: Radford et al., 2019), which knows every text.

    Args:
        texts: what it is trained on.
        vocab_size: tokens at most; fewer when the texts do not hold that many pairs.
        end_of_text: the token that ends a document; it gets id 0.

    Raises:
        ValueError: vocab_size is too small for the 256 bytes and the end-of-text token.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size = {vocab_size}: a byte-level tokenizer needs at least {MIN_VOCAB_SIZE} (every "
            f"byte, and {end_of_text})"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.

    Args:
        path: a tokenizer.json, a folder that holds one, or GPT-2's vocab.json and merges.txt, or a hub id such as
            "gpt2".

    Raises:
        OSError: nothing of the kind at `path`.
        ValueError: the file is damaged.
    """
    path = _local(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    vocab, merges = path / "vocab.json", path / "merges.txt"
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif vocab.is_file() and merges.is_file():
            tokenizer = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
            if tokenizer.token_to_id(END_OF_TEXT) is not None:
                tokenizer.add_special_tokens([END_OF_TEXT])
        else:
            raise FileNotFoundError(
                f"data.tokenizer = {str(path)!r}: no tokenizer.json there, nor vocab.json with merges.txt"
            )
    except OSError:
        raise
    except Exception as error:  # the library raises a bare Exception for every kind of damage
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"data.tokenizer = {str(path)!r}: not a tokenizer that can be read: {reason}"
        ) from None
    # A file may ask for truncation or padding, which would cut or dilute the text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _local(path: str | Path) -> Path:
    """The file or folder, fetched from the hub if there is none and it may be a repository's name."""
    local = Path(path).expanduser()
    if local.exists() or local.suffix == ".json" or hf_files.is_mistyped(path):
        return local
    try:
        return hf_files.from_hub(path, hf_files.TEXT_FILES)
    except OSError as error:
        raise OSError(f"data.tokenizer = {str(path)!r}: {error}") from None


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
