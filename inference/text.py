"""Between text and tokens: reading a checkpoint's tokenizer, and turning a stream of tokens into text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\ufffd"
"""What a decoder puts for bytes that are no UTF-8, such as the first bytes of a character that is not
finished."""


def read_tokenizer(folder: Any) -> Tokenizer:
    """Reads the tokenizer that lies in a checkpoint's folder.

    Args:
        folder: a pathlib.Path or the like; holds tokenizer.json, or vocab.json and merges.txt as GPT-2 has
            them.

    Raises:
        OSError: neither is there.
        ValueError: a file is damaged.
    """
    folder = Path(folder)
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
        raise OSError(f"no tokenizer in {folder}: there is no tokenizer.json, nor vocab.json and merges.txt")
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
        else:
            tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            if tokenizer.token_to_id(END_OF_TEXT) is not None:
                tokenizer.add_special_tokens([END_OF_TEXT])
    except Exception as error:  # the library raises a bare Exception for every kind of damage
        raise ValueError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from None
    # A file may ask for truncation or padding; a prompt is to be read as it is.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a prompt.

    Raises:
        ValueError: the text is empty, or no Unicode (bytes of the command line that are no UTF-8).
    """
    if not text:
        raise ValueError("a prompt is empty: generation continues a text of one character or more")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the prompt {text[:40]!a} is not valid UTF-8") from None
    return tokenizer.encode(text).ids


class TextStream:
    """Turns one row's tokens into text as they come; the pieces joined are the whole decoded at once.

    A character may be spread over tokens, so text is held back while it ends in the middle of one.

    Args:
        tokenizer: of the tokens.
        prompt: the ids before; some decoders write a token differently at the start of a text.
    """

    CONTEXT = 8
    """Tokens of the prompt to decode along; more than a character has bytes."""

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt)[-self.CONTEXT :]
        self._num_shown = len(self._ids)

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens; returns the text that is certain by now, which may be empty."""
        self._ids += [int(token) for token in ids]
        shown, text = self._decode(self._ids[: self._num_shown]), self._decode(self._ids)
        if text.endswith(REPLACEMENT):
            return ""
        self._ids = self._ids[self._num_shown :] or self._ids
        self._num_shown = len(self._ids)
        return text[len(shown) :]

    def finish(self) -> str:
        """Ends the stream; returns what was held back."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._num_shown])) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
