"""SQuAD's metrics against transformers' copy of the official script."""

import random

import pytest
from transformers.data.metrics import squad_metrics

from train.tasks import scores


def test_squad_metrics_are_those_of_the_official_script():
    source = random.Random(0)
    words = ["the", "a", "an", "Cat", "cat.", "dog", "1952", "in", "New-York", "l'eau", "the,"]
    for _ in range(300):
        texts = [
            " ".join(source.choices(words, k=source.randrange(1, 5))) for _ in range(source.randrange(1, 3))
        ]
        guess = " ".join(source.choices(words, k=source.randrange(0, 5)))
        exact = max(squad_metrics.compute_exact(text, guess) for text in texts)
        f1 = max(squad_metrics.compute_f1(text, guess) for text in texts)
        assert scores.squad([texts], [guess]) == pytest.approx({"exact_match": exact, "f1": f1})
