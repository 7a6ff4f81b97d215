"""Corruptions of text: their rates are those of the papers within sampling error, and what they hide can be told."""

import numpy as np
import pytest

from train.objectives import corruption
from train.objectives.corruption import IGNORED, Objective, Vocabulary

SIZE = 200
SPECIAL = np.arange(SIZE) < 5  # 4 is the mask
BEGINS = np.arange(SIZE) % 3 != 0
ENDS = np.arange(SIZE) % 20 == 7
WORDS = Vocabulary(SIZE, 4, SPECIAL, BEGINS, ENDS)
ROWS, LENGTH = 2000, 128


def rng(row):
    return np.random.default_rng((0, 0, row))


def rows(count=ROWS):
    source = np.random.default_rng(1)
    ids = source.integers(5, SIZE, (count, LENGTH)).astype(np.int32)
    ids[:, 0] = 0
    ids[:, 50] = 2
    return ids


def within(share, expected, count):
    """Whether a share of `count` independent draws is within four standard errors of what is expected."""
    return abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("masking", ["tokens", "words", "ngrams"])
def test_rates_of_masks(masking):
    settings, ids = Objective(masking=masking), rows()
    masked = [corruption.mask(row, WORDS, settings, rng(i)) for i, row in enumerate(ids)]
    found, labels = (np.stack(arrays) for arrays in zip(*masked, strict=True))
    chosen = labels != IGNORED
    free = ~SPECIAL[ids]
    assert not (chosen & ~free).any()
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(found[~chosen], ids[~chosen])
    # the number of a row is exact but for rounding (and of words for the last that does not fit)
    share, count = chosen.sum() / free.sum(), int(chosen.sum())
    error = 4 * np.sqrt(0.25 * ROWS) / free.sum()
    assert abs(share - 0.15) <= error + (0 if masking == "tokens" else 0.001)
    is_mask = found[chosen] == 4
    same = found[chosen] == labels[chosen]
    ordinary = SIZE - 5
    assert within(is_mask.mean(), 0.8, count)
    assert within(same.mean(), 0.1 + 0.1 / ordinary, count)
    others = found[chosen][~is_mask & ~same]
    assert within(len(others) / count, 0.1 * (1 - 1 / ordinary), count)
    assert not SPECIAL[others].any()
    assert len(set(others.tolist())) == ordinary


def test_a_row_is_masked_anew_each_time_and_the_same_for_the_same_draw():
    row = rows(1)[0]
    first, again, other = (corruption.mask(row, WORDS, Objective(), rng(i)) for i in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first[1] != other[1]).any()


def test_words_are_hidden_whole():
    settings = Objective(masking="words")
    for i, row in enumerate(rows(50)):
        chosen = corruption.mask(row, WORDS, settings, rng(i))[1] != IGNORED
        for word in corruption.words_of(row, WORDS):
            assert chosen[word.start : word.stop].all() or not chosen[word.start : word.stop].any()


def test_words_of_a_row_cover_it_without_its_special_tokens():
    row = np.array([0, 6, 7, 9, 12, 2, 9, 8, 2], np.int32)  # 6, 9 and 12 go on with a word
    assert corruption.words_of(row, WORDS) == [range(1, 2), range(2, 5), range(6, 7), range(7, 8)]


def test_lengths_of_ngrams():
    # Long rows of one-token words, few chosen: runs hardly meet, and lengths are as likely as 1 / n.
    ids = np.full(4000, 7, np.int32)
    settings = Objective(masking="ngrams", mask_fraction=0.01)
    counts = np.zeros(20)
    for i in range(600):
        chosen = corruption.mask(ids, WORDS, settings, rng(i))[1] != IGNORED
        edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen, [0]]).astype(int)))
        for length in (edges[1::2] - edges[::2]).tolist():
            counts[length] += 1
    expected = np.array([1, 1 / 2, 1 / 3]) / (1 + 1 / 2 + 1 / 3)
    shares = counts[1:4] / counts.sum()
    np.testing.assert_allclose(shares, expected, atol=0.03)  # the last run of a row may be cut, and some meet
    assert counts[4:].sum() < 0.06 * counts.sum()


def test_gaps_are_poisson_and_cover_their_share():
    settings = Objective()
    lengths = [corruption.gap_lengths(500, settings, rng(i)) for i in range(2000)]
    assert {int(each.sum()) for each in lengths} == {150}  # 30% of 500, exactly
    whole = np.concatenate([each[:-1] for each in lengths])  # the last is cut to meet the share
    # A gap that would not fit is cut and so the last: gaps before it are Poisson but for that choice, below 1 in 50.
    assert abs(whole.mean() - 3) < 0.1
    for length in range(8):
        poisson = np.exp(-3) * 3**length / np.prod(np.arange(1, length + 1))
        assert abs((whole == length).mean() - poisson) < 0.012


def test_gaps_keep_the_rest_in_order():
    settings = Objective()
    for i, row in enumerate(rows(200)):
        found = corruption.make_gaps(row, WORDS, settings, rng(i))
        count = int((found == 4).sum())
        lengths = corruption.gap_lengths(len(row), settings, rng(i))
        assert count == len(lengths)
        kept = found[found != 4]
        assert len(kept) == len(row) - lengths.sum() == len(row) - np.ceil(0.3 * len(row))
        place = 0
        for token in kept:  # a subsequence of the row
            while row[place] != token:
                place += 1
            place += 1


def test_gaps_may_lie_anywhere():
    settings = Objective(gap_fraction=0.1)
    hidden = np.zeros(60)
    row = np.arange(5, 65, dtype=np.int32)
    for i in range(3000):
        found = set(corruption.make_gaps(row, WORDS, settings, rng(i)).tolist())
        hidden += [token not in found for token in row]
    assert within(hidden.mean() / 3000, 0.1, 60 * 3000)
    assert hidden[10:50].min() > 0.7 * hidden.mean()


def test_sentences_are_permuted_whole():
    row = np.array([8, 7, 9, 10, 27, 11, 12], np.int32)  # 7 and 27 end sentences
    assert [s.tolist() for s in corruption.sentences_of(row, WORDS)] == [[8, 7], [9, 10, 27], [11, 12]]
    orders = {}
    for i in range(3000):
        found = tuple(corruption.permute(row, WORDS, rng(i)).tolist())
        orders[found] = orders.get(found, 0) + 1
    assert len(orders) == 6
    assert all(within(count / 3000, 1 / 6, 3000) for count in orders.values())
    alone = np.array([8, 9], np.int32)
    assert corruption.permute(alone, WORDS, rng(0)) is alone


def test_half_of_the_pairs_are_of_two_documents():
    settings = Objective()
    first = [np.arange(100 * s + 1000, 100 * s + 1000 + 12) for s in range(8)]
    other = [np.arange(100 * s + 5000, 100 * s + 5000 + 12) for s in range(8)]
    labels, room = [], 60
    for i in range(4000):
        a, b, label = corruption.pair(first, other, room, settings, rng(i))
        labels.append(label)
        assert len(a) >= 1
        assert len(b) >= 1
        assert len(a) + len(b) <= room
        assert (a < 5000).all()
        assert (b >= 5000).all() if label else (b < 5000).all()
        if label == 0:
            assert b[0] > a[-1]  # it follows
    assert within(np.mean(labels), 0.5, 4000)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (dict(mask_fraction=0.0), "objective.mask_fraction = 0.0: a share lies between 0 and 1"),
        (dict(random_next=1.0), "objective.random_next = 1.0"),
        (dict(max_ngram=0), "objective.max_ngram = 0: it is at least 1"),
        (dict(gap_length=0.0), "objective.gap_length = 0.0: it is above 0"),
    ],
)
def test_values_that_do_not_fit(fields, error):
    with pytest.raises(ValueError, match=error):
        Objective(**fields)
