"""Metrics against published examples, hand counts, and the libraries that they are from."""

import math

import numpy as np
import pytest

from train.tasks import scores


def test_one_class():
    # two right of three; the counts by hand: tp 1, fp 1, fn 0, tn 1
    found = scores.one_class(np.array([0, 0, 1]), np.array([0, 1, 1]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["matthews"] == pytest.approx((1 * 1 - 1 * 0) / math.sqrt(2 * 1 * 2 * 1))
    three = scores.one_class(np.array([0, 1, 2, 2]), np.array([0, 2, 2, 2]))
    assert three["f1"] == pytest.approx((1 + 0 + 0.8) / 3)


def test_scikit_learn_s_own_example():
    # https://scikit-learn.org/stable/modules/generated/sklearn.metrics.matthews_corrcoef.html, f1_score.html
    labels, predicted = np.array([1, 1, 1, -1]), np.array([1, -1, 1, 1])
    assert scores.one_class(labels, predicted)["matthews"] == pytest.approx(-1 / 3)
    macro = scores.one_class(np.array([0, 1, 2, 0, 1, 2]), np.array([0, 2, 1, 0, 0, 1]))
    assert macro["f1"] == pytest.approx(0.26666666666666666)


def test_several_classes():
    labels = np.array([[1, 0], [1, 1]], bool)
    logits = np.array([[2.0, 1.0], [3.0, 1.0]])
    found = scores.several_classes(labels, logits > 0, logits)
    assert found["accuracy"] == 0.5
    assert found["f1_micro"] == pytest.approx(6 / 7)
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 2)
    probs = 1 / (1 + np.exp(-logits))
    assert found["loss"] == pytest.approx(-np.log(np.where(labels, probs, 1 - probs)).mean())


def test_regression():
    # SciPy's examples of pearsonr and spearmanr
    x, y = np.array([1, 2, 3, 4, 5, 6, 7.0]), np.array([10, 9, 2.5, 6, 4, 3, 2])
    found = scores.regression(x[:, None], y[:, None])
    assert found["pearson"] == pytest.approx(-0.828503883588428)
    assert found["mse"] == found["loss"] == pytest.approx(((x - y) ** 2).mean())
    ranked = scores.regression(np.array([1, 2, 3, 4, 5]), np.array([5, 6, 7, 8, 7]))
    assert ranked["spearman"] == pytest.approx(0.8207826816681233)
    assert scores.regression(x, np.ones(7))["pearson"] == 0.0


def test_seqeval_s_own_example():
    # https://github.com/chakki-works/seqeval, README: precision, recall and F1 are 0.50, accuracy 0.80
    true = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    guess = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert scores.tagging(true, guess) == pytest.approx(
        {"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": 0.8}
    )
    assert scores.tagging([["O"]], [["O"]])["f1"] == 0.0


ANSWERS = [
    (["The Denver Broncos", "Denver Broncos"], "denver broncos!", 1.0, 1.0),
    (["a cat"], "The cat", 1.0, 1.0),
    (["in 1952"], "1952", 0.0, 2 / 3),
    (["blue red"], "green", 0.0, 0.0),
    ([], "", 1.0, 1.0),
    ([], "something", 0.0, 0.0),
    (["the"], "an", 1.0, 1.0),
]


@pytest.mark.parametrize(("accepted", "guess", "exact", "f1"), ANSWERS)
def test_squad(accepted, guess, exact, f1):
    assert scores.squad([accepted], [guess]) == pytest.approx({"exact_match": exact, "f1": f1})


def test_squad_is_a_mean():
    assert scores.squad([["x"], ["y"]], ["x", "z"]) == {"exact_match": 0.5, "f1": 0.5}


def test_rouge_s_own_example():
    # https://pypi.org/project/rouge-score: precision 0.75, recall 0.667 of unigrams
    target, text = "The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log."
    found = scores.summaries([target], [text])
    assert found["rouge1"] == pytest.approx(2 * 0.75 * (6 / 9) / (0.75 + 6 / 9))
    assert found["rougeL"] == pytest.approx(2 * 0.625 * (5 / 9) / (0.625 + 5 / 9))
    assert scores.summaries([target, target], [target, ""])["rouge2"] == 0.5


def test_choices():
    assert scores.choices(np.array([0, 1, 2, 0]), np.array([0, 1, 0, 0])) == {"accuracy": 0.75}


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(scores.LIBRARIES, "no_such_module", "no-such-package")
    scores.require("sklearn")
    with pytest.raises(OSError, match=r"needs no-such-package: pip install 'flaxtron\[finetune\]'"):
        scores.require("no_such_module")
