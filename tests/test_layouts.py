"""Layouts as people write them."""

import jax
import pytest

import parallel
from parallel.layouts import LAYOUTS, describe, parse_layout
from parallel.terminal import rules_of


def test_sizes_and_variants():
    layout = parse_layout(" data=2, tensor=4 ,sequence,all-gather")
    assert layout.sizes == {"data": 2, "tensor": 4}
    assert layout.variants == {"sequence": True, "context_attention": "all-gather"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_name_is_its_text_and_fits_eight_devices(name):
    rules = rules_of(name)
    assert rules is not None
    assert rules == rules_of(LAYOUTS[name])
    assert rules.mesh.size == len(jax.devices())
    text = describe(rules)
    assert rules_of(text) == rules
    assert ("sequence" in text) == ("sequence" in LAYOUTS[name])


def test_what_is_usual_is_left_out():
    assert describe(parallel.make_rules(parallel.make_mesh(devices=jax.devices()[:1]))) == "one device"
    assert describe(rules_of("context=4,ring")) == "context=4"
    assert describe(rules_of("context=4,all-gather")) == "context=4,all-gather"


def test_no_such_thing():
    with pytest.raises(ValueError, match="'rink' in 'context=2,rink' is no layout and no variant: .* ring"):
        parse_layout("context=2,rink")
    with pytest.raises(ValueError, match="unknown mesh axis 'tensr'"):
        parse_layout("tensr=2")
