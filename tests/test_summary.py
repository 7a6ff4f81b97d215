"""A study in numbers, whole or not."""

import pytest
from scipy import stats

from tests.small_study import VALUES, small_study
from tests.sweeps import end, finish
from train.sweeping.summary import summarize


def test_every_arm_against_the_baseline(tmp_path):
    study = small_study(tmp_path)
    finish(study, VALUES)
    first, base, last = summarize(study).arms

    assert (first.done, first.count, first.seconds) == (3, 3, 7.0)
    assert base.difference is None
    assert first.difference.estimate.mean == pytest.approx(0.466667, abs=1e-6)
    # scipy's own, for the arms as lists
    lists = {name: list(values.values()) for name, values in VALUES.items()}
    expected = [stats.ttest_rel(lists[name], lists["a=2"]).pvalue for name in ("a=1", "a=3")]
    assert [first.difference.p, last.difference.p] == pytest.approx(expected)
    assert first.difference.holm == pytest.approx(2 * expected[0])
    assert last.difference.holm == pytest.approx(expected[1])
    interval = stats.t.interval(0.95, 2, loc=2.6, scale=stats.sem(lists["a=1"]))
    assert (first.value.low, first.value.high) == pytest.approx(interval)


def test_the_best_is_the_lowest_loss_or_the_highest_score(tmp_path):
    for metric, best in (("eval_loss", "a=2"), ("eval_f1", "a=1")):
        study = small_study(tmp_path / metric, metric=metric)
        finish(study, VALUES, metric)
        assert summarize(study).best == best


def test_an_unfinished_study_says_so(tmp_path):
    study = small_study(tmp_path)
    finish(study, {"a=1": {0: 2.5, 1: 2.7}, "a=2": {0: 2.0}})
    end(study.runs[2], {}, status="failed")
    summary = summarize(study)

    assert [(row.done, row.failed) for row in summary.arms] == [(2, 0), (1, 0), (0, 1)]
    assert summary.arms[0].difference.p is None  # one seed in common
    assert summary.arms[0].difference.estimate.count == 1
    assert summary.arms[2].value is None
    assert summary.notes[0] == "3 of 9 runs are done, 1 failed: the figures are of those."


def test_one_seed_is_no_evidence(tmp_path):
    study = small_study(tmp_path, seeds=(0,))
    finish(study, VALUES)
    summary = summarize(study)
    assert summary.arms[0].value.low is None
    assert "One seed: there is no interval and no p-value" in summary.notes[0]


def test_a_metric_that_no_run_has_is_named(tmp_path):
    study = small_study(tmp_path, metric="eval_f1")
    finish(study, VALUES, "eval_loss")
    notes = " ".join(summarize(study).notes)
    assert "No run has eval_f1; they have eval_loss, loss: choose one by --metric." in notes


def test_a_baseline_that_failed(tmp_path):
    study = small_study(tmp_path)
    finish(study, {"a=1": VALUES["a=1"]})
    summary = summarize(study)
    assert all(row.difference is None for row in summary.arms)
    assert "The baseline, a=2, has no value yet" in " ".join(summary.notes)


def test_a_run_without_a_finite_value_is_left_out_and_said(tmp_path):
    study = small_study(tmp_path)
    finish(study, VALUES | {"a=1": {0: 2.5, 1: None, 2: 2.6}})
    summary = summarize(study)
    assert summary.arms[0].value.count == 2
    assert "1 of the runs that are done have no finite eval_loss and are left out." in summary.notes
