"""Metrics of each field, by the libraries that the field uses: scikit-learn, SciPy, seqeval, rouge-score.

SQuAD's have no library without torch or a download; they are written here after the official script
(https://rajpurkar.github.io/SQuAD-explorer/) and held against transformers' copy of it in the tests.
"""

import collections
import importlib
import re
import string
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

LIBRARIES = {"sklearn": "scikit-learn", "scipy": "scipy", "seqeval": "seqeval", "rouge_score": "rouge-score"}

# What each function below finds, known before anything is evaluated.
ONE_CLASS = ("accuracy", "f1", "matthews")
SEVERAL_CLASSES = ("f1_micro", "f1", "accuracy")
REGRESSION = ("mse", "pearson", "spearman")
TAGGING = ("precision", "recall", "f1", "accuracy")
CHOICES = ("accuracy",)
SQUAD = ("exact_match", "f1")
SUMMARIES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def lower_is_better(name: str) -> bool:
    """Whether a metric is best where it is lowest: a loss, a perplexity, an error, a norm, a time."""
    return any(word in name for word in ("loss", "perplexity", "error", "mse", "norm", "seconds"))


def require(*modules: str) -> None:
    """Checks that libraries are there, before anything slow.

    Raises:
        OSError: one is not.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            raise OSError(
                f"evaluating this head needs {LIBRARIES[module]}: pip install 'flaxtron[finetune]'"
            ) from None


def one_class(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 (of class 1 where there are two, else the classes' mean) and Matthews' correlation."""
    metrics: Any = importlib.import_module("sklearn.metrics")

    seen = np.union1d(labels, predicted)
    average = "binary" if set(seen.tolist()) <= {0, 1} else "macro"
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1": float(metrics.f1_score(labels, predicted, average=average, zero_division=0)),
        "matthews": float(metrics.matthews_corrcoef(labels, predicted)) if len(seen) > 1 else 0.0,
    }


def several_classes(labels: np.ndarray, predicted: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """F1 over all labels and over classes, the share of rows that are right in every class, and the loss."""
    metrics: Any = importlib.import_module("sklearn.metrics")

    loss = np.logaddexp(0, logits) - labels * logits
    return {
        "loss": float(loss.mean()),
        "f1_micro": float(metrics.f1_score(labels, predicted, average="micro", zero_division=0)),
        "f1": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0)),
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
    }


def regression(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation, and the mean squared error (the loss).

    Args:
        labels, predicted: [rows, numbers]; correlations are those of all numbers together, 0 of a constant side.
    """
    stats: Any = importlib.import_module("scipy.stats")

    x, y = np.asarray(labels, np.float64).ravel(), np.asarray(predicted, np.float64).ravel()
    error = float(np.mean((x - y) ** 2))
    constant = len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0
    return {
        "loss": error,
        "mse": error,
        "pearson": 0.0 if constant else float(stats.pearsonr(x, y).statistic),
        "spearman": 0.0 if constant else float(stats.spearmanr(x, y).statistic),
    }


def tagging(labels: Sequence[list[str]], predicted: Sequence[list[str]]) -> dict[str, float]:
    """seqeval's precision, recall and F1 of names (B-, I-), and the accuracy of words."""
    metrics: Any = importlib.import_module("seqeval.metrics")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes without the prefixes of names, and classes never predicted
        arguments: Any = (list(labels), list(predicted))
        return {
            "precision": float(metrics.precision_score(*arguments, zero_division=0)),
            "recall": float(metrics.recall_score(*arguments, zero_division=0)),
            "f1": float(metrics.f1_score(*arguments, zero_division=0)),
            "accuracy": float(metrics.accuracy_score(*arguments)),
        }


def choices(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """The share of right choices."""
    metrics: Any = importlib.import_module("sklearn.metrics")

    return {"accuracy": float(metrics.accuracy_score(labels, predicted))}


def squad(accepted: Sequence[list[str]], predicted: Sequence[str]) -> dict[str, float]:
    """SQuAD's exact match and F1, in [0, 1]: the best over the accepted answers, the mean over the questions."""
    exact, overlap = [], []
    for texts, guess in zip(accepted, predicted, strict=True):
        exact.append(max(float(_normal(guess) == _normal(text)) for text in texts or [""]))
        overlap.append(max(_word_f1(text, guess) for text in texts or [""]))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def _normal(text: str) -> str:
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _word_f1(wanted: str, guess: str) -> float:
    gold, found = _normal(wanted).split(), _normal(guess).split()
    if not gold or not found:
        return float(gold == found)
    same = sum((collections.Counter(gold) & collections.Counter(found)).values())
    return 2 * same / (len(gold) + len(found))


def summaries(targets: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2, -L and -Lsum (F1, with stemming), means over the texts."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(list(SUMMARIES), use_stemmer=True)
    each = [scorer.score(target, text) for target, text in zip(targets, written, strict=True)]
    return {kind: float(np.mean([found[kind].fmeasure for found in each])) for kind in SUMMARIES}
