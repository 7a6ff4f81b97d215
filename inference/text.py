"""Between text and tokens: a checkpoint's tokenizer (`modelzoo.tokenizing`), and a stream of tokens as text."""

from collections.abc import Iterable

from tokenizers import Tokenizer

from modelzoo.tokenizing import read_tokenizer as read_tokenizer
from modelzoo.tokenizing import special_tokens as special_tokens

REPLACEMENT = "\ufffd"
"""What a decoder puts for bytes that are no UTF-8, such as the first bytes of a character that is not
finished."""


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a prompt.

    Raises:
        ValueError: the text is empty, or no Unicode (bytes of the command line that are no UTF-8).
    """
    if not text:
        raise ValueError("a prompt is empty: generation continues a text of one character or more")
    check_unicode(text, "prompt")
    return tokenizer.encode(text).ids


def check_unicode(text: str, what: str = "text") -> None:
    """Refuses a text with bytes that are no UTF-8, as a command line may hold them.

    Raises:
        ValueError: it has such.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the {what} {text[:40]!a} is not valid UTF-8") from None


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
