"""Corruptions of rows of tokens: pure functions of the tokens and a random generator.

- Masks (Devlin et al., 2018, arXiv:1810.04805; drawn anew each time a row is read, Liu et al., 2019, arXiv:1907.11692):
  of the tokens that are chosen 80% become the mask, 10% a random token, 10% stay. Chosen are single tokens, whole
  words, or n-grams of words, n with a probability of 1 / n up to three (Shoeybi et al., 2019, as Megatron-LM does it).
- Gaps and permuted sentences (Lewis et al., 2019, arXiv:1910.13461): spans of Poisson(3) tokens, 30% of all, become one
  mask each, a span of none puts one in; sentences come in a random order.
"""

import dataclasses
from typing import Literal

import numpy as np

IGNORED = -100
"""The label that is not learned from."""
LEFT_TO_RIGHT = "causal_lm"
"""The task of models that read text as it is."""
TEXT_TASKS = (LEFT_TO_RIGHT, "unshifted_lm", "masked_lm", "pretraining", "next_sentence", "seq2seq_lm")
"""Tasks of models that plain text trains."""
Masking = Literal["tokens", "words", "ngrams"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """How plain text is corrupted for models that do not read it from left to right; gin sets `objective.<name>`.

    Attributes:
        masking: what is chosen to be masked: 'tokens', 'words' or 'ngrams' of words.
        mask_fraction: share of the tokens that are chosen.
        max_ngram: words of an n-gram at most.
        random_next: share of pairs whose second part is of another document.
        gap_fraction: share of the tokens that lie in gaps (encoder-decoders).
        gap_length: mean of the lengths of gaps.
        permute_sentences: encoder-decoders read sentences in a random order.
    """

    masking: Masking = "tokens"
    mask_fraction: float = 0.15
    max_ngram: int = 3
    random_next: float = 0.5
    gap_fraction: float = 0.3
    gap_length: float = 3.0
    permute_sentences: bool = True

    def __post_init__(self) -> None:
        for name in ("mask_fraction", "random_next", "gap_fraction"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(f"objective.{name} = {value}: a share lies between 0 and 1")
        if self.max_ngram < 1:
            raise ValueError(f"objective.max_ngram = {self.max_ngram}: it is at least 1")
        if self.gap_length <= 0:
            raise ValueError(f"objective.gap_length = {self.gap_length}: it is above 0")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What corruptions know of tokens.

    Attributes:
        size: V, tokens that a random one is drawn from.
        mask: the id that stands for what is hidden.
        special: bool [V], tokens that are never hidden nor drawn.
        begins: bool [V], tokens that begin a word.
        ends: bool [V], tokens that end a sentence.
    """

    size: int
    mask: int
    special: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


def mask(
    ids: np.ndarray, vocabulary: Vocabulary, settings: Objective, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hides tokens of a row.

    Args:
        ids: int32 [T].
        vocabulary, settings: see there.
        rng: of the row.

    Returns:
        (the row with masks, its labels: the token where one was chosen, else -100), int32 [T] each.
    """
    free = ~vocabulary.special[ids]
    wanted = int(
        settings.mask_fraction * free.sum() + rng.random()
    )  # rounded at random, so the mean is exact
    chosen = np.zeros(len(ids), bool)
    if settings.masking == "tokens":
        chosen[rng.choice(np.flatnonzero(free), wanted, replace=False)] = True
    else:
        _choose_words(chosen, words_of(ids, vocabulary), wanted, settings, rng)
    labels = np.where(chosen, ids, IGNORED).astype(np.int32)
    draw = rng.random(len(ids))
    found = np.where(chosen & (draw < 0.8), vocabulary.mask, ids)
    ordinary = np.flatnonzero(~vocabulary.special)
    replaced = chosen & (draw >= 0.8) & (draw < 0.9)
    found[replaced] = rng.choice(ordinary, int(replaced.sum()))
    return found.astype(np.int32), labels


def words_of(ids: np.ndarray, vocabulary: Vocabulary) -> list[range]:
    """The places of every word of a row; special tokens belong to none."""
    special = vocabulary.special[ids]
    starts = ~special & (vocabulary.begins[ids] | np.concatenate([[True], special[:-1]]))
    found = []
    for start in np.flatnonzero(starts).tolist():
        end = start + 1
        while end < len(ids) and not special[end] and not starts[end]:
            end += 1
        found.append(range(start, end))
    return found


def _choose_words(
    chosen: np.ndarray, words: list[range], wanted: int, settings: Objective, rng: np.random.Generator
) -> None:
    """Marks words, or runs of them, until about so many tokens are marked; none goes past the number by itself."""
    longest = settings.max_ngram if settings.masking == "ngrams" else 1
    weights = 1.0 / np.arange(1, longest + 1)
    sizes = rng.choice(np.arange(1, longest + 1), len(words), p=weights / weights.sum())
    left = wanted
    for first, size in zip(rng.permutation(len(words)), sizes, strict=True):
        if left <= 0:
            return
        for count in range(int(size), 0, -1):  # a shorter run where the long one does not fit
            run = words[first : first + count]
            places = range(run[0].start, run[-1].stop)
            apart = any(after.start != before.stop for before, after in zip(run, run[1:], strict=False))
            if len(places) <= left and not apart and not chosen[places.start : places.stop].any():
                chosen[places.start : places.stop] = True
                left -= len(places)
                break


def gap_lengths(count: int, settings: Objective, rng: np.random.Generator) -> np.ndarray:
    """The lengths of the gaps in a text of `count` tokens: Poisson, the last cut so that the share is met."""
    wanted = int(np.ceil(count * settings.gap_fraction))
    lengths: list[int] = []
    left = wanted
    while left > 0:
        for length in rng.poisson(settings.gap_length, max(4, left)).tolist():
            lengths.append(min(length, left))
            left -= lengths[-1]
            if left == 0:
                break
    return np.array(lengths, np.int64)


def make_gaps(
    ids: np.ndarray, vocabulary: Vocabulary, settings: Objective, rng: np.random.Generator
) -> np.ndarray:
    """Puts one mask in place of every gap.

    Args:
        ids: int32 [n].
        vocabulary, settings: see there.
        rng: of the row.

    Returns:
        int32 [m], shorter on the whole, and never longer than n + the number of gaps.
    """
    lengths = gap_lengths(len(ids), settings, rng)
    kept = len(ids) - int(lengths.sum())
    places = np.sort(rng.integers(0, kept + 1, len(lengths)))  # how many kept tokens stand before each gap
    pieces, read, done = [], 0, 0
    for place, length in zip(places.tolist(), lengths.tolist(), strict=True):
        pieces += [ids[read : read + place - done], [vocabulary.mask]]
        read, done = read + place - done + length, place
    return np.concatenate([*pieces, ids[read:]]).astype(np.int32)


def sentences_of(ids: np.ndarray, vocabulary: Vocabulary) -> list[np.ndarray]:
    """The sentences of a text; the last may have no end."""
    ends = np.flatnonzero(vocabulary.ends[ids]) + 1
    return [piece for piece in np.split(ids, ends) if len(piece)]


def permute(ids: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """The same sentences in a random order, int32 [n]."""
    sentences = sentences_of(ids, vocabulary)
    if len(sentences) < 2:
        return ids
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def pair(
    first: list[np.ndarray], other: list[np.ndarray], room: int, settings: Objective, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, int]:
    """Two parts of documents, of which the second may follow the first.

    Args:
        first: sentences of a document, two or more.
        other: sentences of another one.
        room: tokens of both together at most.
        settings: see there.
        rng: of the row.

    Returns:
        (the first part, the second, 0 where it follows and 1 where it is of the other document).
    """
    begin = int(rng.integers(0, len(first) - 1))
    chunk = first[begin:]
    total = np.cumsum([len(sentence) for sentence in chunk])
    chunk = chunk[: max(2, int(np.searchsorted(total, room)) + 1)]
    cut = int(rng.integers(1, len(chunk)))
    a, is_random = np.concatenate(chunk[:cut]), bool(rng.random() < settings.random_next)
    if is_random:
        b = np.concatenate(other[int(rng.integers(0, len(other))) :])[:room]
    else:
        b = np.concatenate(chunk[cut:])
    while len(a) + len(b) > room:  # from either end of the longer one, as BERT does
        longer_is_a = len(a) > len(b)
        longer, over = (a, b) if longer_is_a else (b, a)
        cut_off = max(1, min(len(a) + len(b) - room, len(longer) - len(over)) // 2)
        longer = longer[cut_off:] if rng.random() < 0.5 else longer[:-cut_off]
        a, b = (longer, b) if longer_is_a else (a, longer)
    return a, b, int(is_random)
