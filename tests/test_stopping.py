"""Stop strings: the automaton over tokens against a plain search in bytes."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from inference import stopping

WORDS = ["a", "b", "ab", "ba", "Ġa", "bab", "Ċ", "Ã", "©", "aab", "<end>"]
TEXTS = ["a", "b", "ab", "ba", " a", "bab", "\n", b"\xc3", b"\xa9", "aab", "<end>"]
BYTES = [text.encode() if isinstance(text, str) else text for text in TEXTS]


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS[:-1])}, unk_token="a"))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return made


@pytest.mark.parametrize(
    "texts", [["ab"], ["bab", "aa"], ["b a", "\n"], ["é"], ["<end>", "a"], ["abab", "bab", "b"]]
)
def test_a_token_that_completes_a_text_is_found(tokenizer, texts):
    table = stopping.make_table(tokenizer, texts, len(WORDS) + 2)
    wanted = [text.encode() for text in texts]
    rows = list(itertools.product(range(len(WORDS)), repeat=3))
    wholes, states = [b""] * len(rows), jnp.zeros(len(rows), jnp.int32)
    for place in range(3):
        tokens = [row[place] for row in rows]
        states, found = stopping.step(jnp.asarray(table), states, jnp.array(tokens))
        completes = np.asarray(found)
        for i, token in enumerate(tokens):
            longer = wholes[i] + BYTES[token]
            ends = range(len(wholes[i]) + 1, len(longer) + 1)
            expected = any(longer[:end].endswith(text) for text in wanted for end in ends)
            assert bool(completes[i]) == expected, (rows[i], texts)
            wholes[i] = longer
    assert [stopping.run(table, row) for row in rows] == states.tolist()


def test_ids_that_the_tokenizer_does_not_know_change_nothing(tokenizer):
    table = stopping.make_table(tokenizer, ["ab"], len(WORDS) + 2)
    assert table.shape == (3, len(WORDS) + 2)
    np.testing.assert_array_equal(table[:, -2:], [[0, 0], [1, 1], [2, 2]])


def test_other_decoders_say_what_a_token_adds():
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "##c": 2}, unk_token="a"))
    made.decoder = decoders.WordPiece()
    table = stopping.make_table(made, ["bc", " a"], 3)
    state = stopping.run(table, [0, 1])
    assert table[state, 2] >= stopping.COMPLETES
    assert table[0, 0] >= stopping.COMPLETES


def test_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"stop_strings is set: pass the tokenizer"):
        stopping.make_table(None, ["a"], 5)
