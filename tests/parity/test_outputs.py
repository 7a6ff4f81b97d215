"""Every class's outputs against transformers 4.57 (torch, eager attention): every field, layer and option."""

import pytest

import modelzoo
from tests.parity import cases
from tests.parity.pairs import (
    ask,
    check_within,
    differences,
    forward,
    keywords,
    make_pair,
    our_fields,
    pair,
    their_fields,
)

TOLERANCE = 2e-5
WITHOUT_EFFECT = {"BloomForQuestionAnswering": {"position_ids"}}
"""What transformers takes and warns that it does nothing with."""


def test_every_family_has_cases():
    assert cases.CLASSES
    assert not cases.WITHOUT_CASES


@cases.every_cell("grids")
def test_outputs(name, title, options, measured):
    both = pair(name, title)
    inputs = both.inputs(options)
    expected = ask(both.theirs, inputs, output_attentions=True, output_hidden_states=True)
    out = forward(both.ours, both.params, inputs)
    measured(name, outputs=check_within(differences(our_fields(out), their_fields(expected)), TOLERANCE))
    measured(name, configs=title)


@cases.every_class()
def test_nothing_is_returned_unasked(name):
    """Fields and shapes alone; hidden states and attentions are None."""
    both = pair(name, cases.titles(name)[0])
    options = cases.cells("grids", name)[0][1]
    inputs = both.inputs(options)
    out = forward(both.ours, both.params, inputs, output_attentions=False, output_hidden_states=False)
    check_within(differences(our_fields(out), their_fields(ask(both.theirs, inputs))), TOLERANCE)


@cases.every_class()
def test_every_keyword(name):
    """Ours takes what transformers takes, and the cases leave none out."""
    both = pair(name, cases.titles(name)[0])
    wanted = keywords(name) - WITHOUT_EFFECT.get(name, set())
    assert wanted <= modelzoo.input_names(both.ours)
    used = {key for title, options in cases.cells("grids", name) for key in pair(name, title).inputs(options)}
    assert wanted <= used


@cases.every_class()
def test_attention_is_far_from_uniform(name):
    """What is compared is worth comparing: heads differ, and many attend to few."""
    title, options = cases.cells("grids", name)[0]
    both = pair(name, title)
    out = our_fields(forward(both.ours, both.params, both.inputs(options)))
    attentions = next(out[key] for key in ("attentions", "decoder_attentions") if key in out)
    last = attentions[-1][:, :, -1]
    assert (last.max(-1) > 2 / last.shape[-1]).mean() > 0.3


@pytest.mark.parametrize("name", ["GPTJForCausalLM"])
def test_another_seed_is_another_model(name):
    """The weights reach the outputs: a pair with other weights gives other logits."""
    one, other = (make_pair(name, cases.cases_of(name).configs["three heads"], seed) for seed in (0, 1))
    inputs = one.inputs("plain")
    logits = [forward(both.ours, both.params, inputs).logits for both in (one, other)]
    assert abs(logits[0] - logits[1]).max() > 0.1
