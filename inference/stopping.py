"""Stop strings inside the compiled loop: an automaton over tokens that knows when a text has just been completed.

The texts make one Aho-Corasick automaton over bytes (Aho & Corasick, 1975), and every token of the vocabulary moves it
by all of its bytes at once: a table [states, V] that the loop looks up, a row of it for each row of the batch. A token
that completes a text in its middle ends the row too, as in transformers. Departure: texts are matched as bytes, so that
one whose characters are spread over tokens is found.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

COMPLETES = 1 << 30
"""Added to the next state where a token completes a text."""
ANCHOR = "a"
"""A text that tokens are decoded behind: some decoders write a token differently at the start."""


def make_table(tokenizer: Any, texts: Sequence[str], vocab_size: int) -> np.ndarray:
    """The automaton of some texts over a tokenizer's tokens.

    Args:
        tokenizer: a tokenizers.Tokenizer, or a transformers tokenizer that holds one.
        texts: one or more, none empty.
        vocab_size: V, of the model; ids that the tokenizer does not know have no bytes.

    Returns:
        int32 [states, V]: the state after the token, with COMPLETES added where it completes a text. State 0 is the
        first.

    Raises:
        ValueError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ValueError(
            "GenerationConfig.stop_strings is set: pass the tokenizer that its texts are to be read with"
        )
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    steps, completes = _byte_automaton(tuple(text.encode() for text in texts))
    tokens = _token_bytes(tokenizer, vocab_size)
    by_length = sorted(range(vocab_size), key=lambda token: -len(tokens[token]))
    lengths = np.array([len(tokens[token]) for token in by_length])
    state = np.repeat(np.arange(len(steps))[:, None], vocab_size, axis=1)
    hit = np.zeros(state.shape, bool)
    for place in range(lengths[0] if vocab_size else 0):
        num_left = int(np.searchsorted(-lengths, -place))  # tokens longer than that stand first
        byte = np.array([tokens[token][place] for token in by_length[:num_left]])
        state[:, :num_left] = steps[state[:, :num_left], byte]
        hit[:, :num_left] |= completes[state[:, :num_left]]
    table = np.empty(state.shape, np.int32)
    table[:, by_length] = state + COMPLETES * hit
    return table


def run(table: np.ndarray, tokens: Sequence[int]) -> int:
    """The state after some tokens of a prompt, whatever they complete."""
    state = 0
    for token in tokens:
        state = int(table[state, token]) % COMPLETES
    return state


def step(table: jax.Array, states: jax.Array | None, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token more.

    Args:
        table: from `make_table`.
        states: int32 of the tokens' shape; never None where there is a table.
        tokens: int32.

    Returns:
        (the next states, bool: whether the token completes a text).
    """
    assert states is not None
    moved = table[states, tokens]
    return moved % COMPLETES, moved >= COMPLETES


def _byte_automaton(texts: tuple[bytes, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(next state [states, 256], bool [states]: some text ends there)."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for text in texts:
        state = 0
        for byte in text:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                ends.append(False)
            state = children[state][byte]
        ends[state] = True
    steps = np.zeros((len(children), 256), np.int64)
    fallback = [0] * len(children)
    queue = [0]
    for state in queue:  # breadth first: a state's fallback is done before it
        if state:
            steps[state] = steps[fallback[state]]
            ends[state] = ends[state] or ends[fallback[state]]
        for byte, child in children[state].items():
            fallback[child] = int(steps[state, byte])
            steps[state, byte] = child
            queue.append(child)
    return steps, np.array(ends)


def _token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """What each id adds to a text."""
    decoder = tokenizer.decoder
    alphabet = (
        _byte_alphabet() if "ByteLevel" in json.dumps(json.loads(tokenizer.to_str())["decoder"]) else None
    )
    found = [b""] * vocab_size
    for text, token in tokenizer.get_vocab(with_added_tokens=True).items():
        if token >= vocab_size:
            continue
        if alphabet is not None and all(letter in alphabet for letter in text):
            found[token] = bytes(alphabet[letter] for letter in text)
        elif decoder is None or alphabet is not None:
            found[token] = text.encode()
        else:
            found[token] = decoder.decode([ANCHOR, text]).removeprefix(ANCHOR).encode()
    return found


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as: visible ones as themselves, the others as 256 and on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in visible}
    others = [byte for byte in range(256) if byte not in visible]
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}
