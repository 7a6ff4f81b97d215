import functools
import json
import math

from parallel.chips import parse_topology
from train.planning import Planner, open_experiment
from train.searching import MARGIN, Search, factorings

FILE = ["pretrain/gptj-6b.gin"]
SMALL = ["GPTJ.n_embd=2048", "train.global_batch_size=32"]


@functools.cache
def search(topology):
    planner = Planner(open_experiment(FILE, SMALL), parse_topology(topology))
    return Search(planner, FILE, SMALL).run(5)


def test_all_products():
    found = list(factorings(8, 3))
    assert len(found) == len(set(found)) == 10
    assert all(math.prod(one) == 8 for one in found)


def test_the_best_fit_and_are_ranked():
    found = search("v5e:2x4")
    assert found.fits
    assert 0 < len(found.best) == 5 <= found.num_fitting < found.num_tried
    assert [one.rank for one in found.best] == sorted(one.rank for one in found.best)
    assert all(one.held <= MARGIN * found.planner.topology.chip.hbm_bytes for one in found.best)
    assert found.seconds > 0


def test_the_lines_to_paste_make_the_plan_that_was_ranked():
    found = search("v5e:2x4")
    best = found.best[0]
    planner = Planner(open_experiment(FILE, SMALL, best.choice), found.planner.topology)
    plan = planner.plan(compile=False)
    assert plan.predicted_bytes == best.held
    assert plan.forecast.seconds == best.seconds
    pasted = open_experiment(FILE, [*SMALL, *(line.replace(" = ", "=") for line in best.choice.gin())])
    assert pasted.flat == planner.experiment.flat


def test_where_nothing_fits_the_least_is_named():
    found = search("v5e:1x1")
    assert not found.fits
    assert found.best == []
    assert found.smallest is not None
    assert found.smallest.held > found.planner.topology.chip.hbm_bytes
    assert json.loads(json.dumps(found.to_dict()))["num_fitting"] == 0
