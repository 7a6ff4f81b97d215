"""Groups of beams: apart they are beam searches, and the penalty sets them apart."""

import numpy as np
import pytest

from tests.test_beam import search, table  # noqa: F401


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_without_a_penalty_to_speak_of_each_group_is_the_same_search(table, early_stopping):  # noqa: F811
    fields = dict(eos_token_id=1, early_stopping=early_stopping)
    _, beams = search(table, 6, num_beams=6, num_beam_groups=3, diversity_penalty=1e-30, **fields)
    groups = np.asarray(beams.ended.tokens[0]).reshape(3, 2, -1)
    np.testing.assert_array_equal(groups[0], groups[1])
    np.testing.assert_array_equal(groups[0], groups[2])
    assert bool(beams.is_ended.all())
    assert not bool(beams.goes_on)


def test_without_an_end_a_group_finds_what_a_search_of_its_size_does(table):  # noqa: F811
    alone, _ = search(table, 5, num_beams=2)
    found, beams = search(table, 5, num_beams=4, num_beam_groups=2, diversity_penalty=50.0)
    first = np.asarray(beams.ended.tokens[0, :2, 1:])
    assert sorted(map(tuple, first.tolist())) == sorted(tokens for _, tokens in alone)
    own, others = np.asarray(beams.ended.tokens[0, :2, 1]), np.asarray(beams.ended.tokens[0, 2:, 1])
    assert not set(own.tolist()) & set(others.tolist())
    assert len({tokens for _, tokens in found}) == 4
