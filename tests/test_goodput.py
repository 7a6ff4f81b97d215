"""Where a run's time went, over its restarts."""

import json
import time

import pytest

from train.goodput import Goodput, describe, shares_of


def session(first, last, **seconds):
    return {"began": 0.0, "first": first, "last": last, "seconds": seconds}


def test_shares_add_up_and_lost_steps_are_a_restart():
    # Of the first start's 10 steps the last 4 were taken again.
    sessions = [
        session(0, 10, startup=5.0, compile=5.0, steps=20.0, input=1.0),
        session(6, 20, startup=3.0, compile=1.0, steps=14.0, checkpoint=1.0),
    ]
    shares = shares_of(sessions)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["restart"] == pytest.approx((20 * 0.4 + 3 + 1) / 50)
    assert shares["steps"] == pytest.approx((20 * 0.6 + 14) / 50)
    assert shares["startup"] == pytest.approx(5 / 50)
    assert describe(shares).startswith("52.0% in steps, 24.0% restarting")


def test_nothing_done_is_no_share():
    assert set(shares_of([]).values()) == {0.0}
    assert describe(shares_of([])) == ""


def test_the_record_goes_on(tmp_path):
    file = tmp_path / "goodput.json"
    first = Goodput(file, 0, began=time.time() - 2)
    with first.during("checkpoint"):
        time.sleep(0.02)
    first.reach(1, 3.0, "compile")
    first.reach(5, 1.0)
    second = Goodput(file, 3)
    second.reach(6, 1.0)
    told = json.loads(file.read_text())
    assert [(one["first"], one["last"]) for one in told] == [(0, 5), (3, 6)]
    assert told[0]["seconds"]["startup"] == pytest.approx(2, abs=0.5)
    assert 0.02 <= told[0]["seconds"]["checkpoint"] < 1
    assert second.shares() == shares_of(told)
    assert len(json.loads(_again(file).read_text())) == 1  # a run that begins anew forgets


def _again(file):
    Goodput(file, 0).write()
    return file
