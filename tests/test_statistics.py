"""Statistics of a study against numbers from elsewhere: Student's own data as R gives them, and p.adjust."""

import pytest

from train.sweeping.statistics import Difference, Estimate, corrected, estimate, paired_difference

# Student (1908), R's data set `sleep`; what R 4.3 prints for
#   t.test(sleep$extra[1:10], sleep$extra[11:20], paired = TRUE):
#   t = -4.0621, df = 9, p-value = 0.002833, 95 percent confidence interval -2.4598858 -0.7001142, mean -1.58
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_a_paired_difference_is_students():
    found = paired_difference(dict(enumerate(DRUG_1)), dict(enumerate(DRUG_2)))

    assert found is not None
    assert found.estimate.mean == pytest.approx(-1.58)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)
    assert found.p == pytest.approx(0.002833, abs=5e-7)


def test_an_interval_of_three_seeds():
    found = estimate([1.0, 2.0, 3.0])

    # t(0.975, 2 degrees of freedom) = 4.302653, of any table; standard error 1 / sqrt(3)
    assert found == Estimate(2.0, 1.0, pytest.approx(2 - 4.302653 / 3**0.5), pytest.approx(4.484138), 3)
    assert found.half == pytest.approx(2.484138)


def test_one_seed_has_no_interval():
    assert estimate([2.5]) == Estimate(2.5, None, None, None, 1)
    assert estimate([2.5]).half is None
    assert estimate([]) is None
    one = paired_difference({0: 3.0}, {0: 2.0, 1: 5.0})
    assert one == Difference(Estimate(1.0, None, None, None, 1), None)


def test_only_seeds_that_both_have_are_paired():
    found = paired_difference({0: 1.0, 1: 2.0, 7: 100.0}, {0: 0.5, 1: 1.0, 8: -100.0})
    assert found.estimate.mean == pytest.approx(0.75)
    assert found.estimate.count == 2
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_equal_runs_have_no_p_value():
    found = paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert (found.estimate.mean, found.p) == (0.0, None)


def test_holms_correction():
    def of(p):
        return None if p is None else Difference(Estimate(0.0, 1.0, -1.0, 1.0, 3), p)

    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") gives 0.03 0.06 0.06 0.02
    found = corrected([of(0.01), None, of(0.04), of(0.03), of(0.005)])
    assert [one and one.holm for one in found] == [
        pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06), pytest.approx(0.02)
    ]  # fmt: skip
    assert corrected([of(0.8), of(0.9)])[1].holm == 1.0
