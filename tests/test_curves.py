"""The picture of a study."""

import pytest
from matplotlib.figure import Figure

from tests.small_study import VALUES, small_study
from tests.sweeps import finish
from train.sweeping import curves
from train.sweeping.summary import summarize


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a study and gives the figure."""
    figures = []
    save = Figure.savefig

    def keep(self, *args, **options):
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(values, **options):
        study = small_study(tmp_path, **options)
        finish(study, values, options.get("metric", "eval_loss"))
        assert curves.draw_study(summarize(study), dpi=40).startswith(b"\x89PNG")
        return figures[-1]

    return draw


def test_means_bands_and_differences(drawn):
    training, held_out, ends = drawn(VALUES).axes

    assert [line.get_label() for line in training.lines] == ["a=1", "a=2", "a=3"]
    assert len(training.collections) == 3
    assert [round(line.get_ydata()[-1], 4) for line in held_out.lines] == [2.6, 2.1333, 2.1667]
    assert ends.get_title(loc="left") == "eval_loss: difference to baseline"
    dots = [line for line in ends.lines if line.get_alpha() == 0.4]
    assert sorted(round(x, 4) for x in dots[0].get_xdata()) == [0.4, 0.5, 0.5]


def test_the_training_loss_needs_one_panel(drawn):
    assert len(drawn(VALUES, metric="loss").axes) == 2


def test_without_a_baseline_the_values_are_shown(drawn):
    *_, ends = drawn({"a=1": VALUES["a=1"]}).axes
    assert ends.get_title(loc="left") == "eval_loss at the end"


def test_two_seeds_do_not_stretch_the_picture(drawn):
    *_, ends = drawn(VALUES, seeds=(0, 1)).axes
    low, high = ends.get_xlim()
    assert high - low < 2.0
