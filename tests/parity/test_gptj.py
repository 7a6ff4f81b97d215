"""What GPT-J has in particular, against transformers 4.57; the rest is in test_outputs.py and its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

from modelzoo.layers.mlp import ACTIVATIONS
from modelzoo.layers.position import rotary_tables
from tests.parity.cases_gptj import BASE
from tests.parity.pairs import ask, forward, make_pair, pair
from tests.zoo import assert_close

TOLERANCE = 2e-5


def test_weights_of_unit_scale():
    """Scores of some hundreds: a softmax that is nearly hard, whose arguments must be right in the last bits."""
    theirs, ours, params = both = make_pair("GPTJModel", BASE, scale=0.6)
    inputs = both.inputs("left")
    expected = ask(theirs, inputs, output_attentions=True)
    out = forward(ours, params, inputs)
    assert max(float(a.max()) for a in expected.attentions) > 0.999
    assert_close(out.attentions, tuple(a.numpy() for a in expected.attentions), 1e-4)
    assert_close(out.last_hidden_state, expected.last_hidden_state.numpy(), 1e-3)


def check_logits(both, inputs) -> None:
    have = forward(both.ours, both.params, inputs, output_attentions=False, output_hidden_states=False).logits
    np.testing.assert_allclose(have, ask(both.theirs, inputs).logits.numpy(), atol=TOLERANCE)


class TestSequenceClassification:
    """Which token is classified."""

    name = "GPTJForSequenceClassification"

    @pytest.mark.parametrize(
        "pads",
        [
            [[], [], []],
            [[6, 7], [7], []],
            [[0, 1], [0], []],
            [[0, 6, 7], [3], [2, 5]],
            [[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6]],
        ],
        ids=["none", "right", "left", "inside", "only"],
    )
    def test_the_rightmost_token_that_is_not_padding(self, pads):
        ids = np.random.default_rng(0).integers(1, 211, (3, 8)).astype(np.int32)
        for row, places in zip(ids, pads, strict=True):
            row[places] = 0
        check_logits(pair(self.name, "three heads"), {"input_ids": ids})
        masked = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int32)}
        check_logits(pair(self.name, "three heads"), masked)

    def test_without_a_padding_token(self):
        theirs, ours, params = both = make_pair(self.name, BASE | dict(pad_token_id=None))
        one = np.array([[5, 6, 0, 0]], np.int32)
        check_logits(both, {"input_ids": one})
        two = {"input_ids": np.concatenate([one, one])}
        with pytest.raises(ValueError, match="batch sizes > 1"):
            ask(theirs, two)
        with pytest.raises(ValueError, match="batch of 2 sequences without a padding token"):
            forward(ours, params, two)


def test_activations_are_those_of_transformers():
    """Name by name; those with parameters of their own are no config's to name."""
    assert ACTIVATIONS.keys() == ACT2CLS.keys() - {"prelu", "xielu"}
    x = torch.cat([torch.linspace(-15, 15, 3001), torch.tensor([0.0, -1e-6, 1e-6])])
    for name, ours in ACTIVATIONS.items():
        np.testing.assert_allclose(
            ours(jnp.asarray(x.numpy())), ACT2FN[name](x).numpy(), atol=3e-6, err_msg=name
        )


@pytest.mark.parametrize("rotary_dim", [2, 4, 6, 10, 24, 64, 80, 128, 256])
def test_rotary_tables_at_every_position(rotary_dim):
    """To 1e-6 up to position 2047, where one rounding of a frequency would show as 1e-4."""
    expected = create_sinusoidal_positions(2048, rotary_dim).numpy()
    sin, cos = rotary_tables(jnp.arange(2048)[None], rotary_dim)
    np.testing.assert_allclose(sin[0, :, ::2], expected[:, : rotary_dim // 2], atol=1e-6)
    np.testing.assert_allclose(cos[0, :, ::2], expected[:, rotary_dim // 2 :], atol=1e-6)
    np.testing.assert_array_equal(sin[..., ::2], sin[..., 1::2])


def test_far_positions():
    """Of a model as wide a head as GPT-J's rotates, near the end of 2048 positions."""
    wide = BASE | dict(n_positions=2048, n_embd=128, n_head=1, rotary_dim=64, n_layer=1)
    theirs, ours, params = both = make_pair("GPTJModel", wide, scale=0.1)
    inputs = both.inputs("plain") | {"position_ids": np.arange(2039, 2048, dtype=np.int32)[None]}
    expected = ask(theirs, inputs, output_attentions=True)
    out = forward(ours, params, inputs)
    np.testing.assert_allclose(out.attentions[0], expected.attentions[0].numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(out.last_hidden_state, expected.last_hidden_state.numpy(), atol=TOLERANCE)


def test_bfloat16_is_as_far_off_as_theirs():
    """From float32's answer; the two round differently, so they are compared by size of error alone."""
    theirs, ours, params = both = make_pair("GPTJForCausalLM", BASE)
    inputs = both.inputs("left")
    exact = ask(theirs, inputs).logits.numpy()
    rounded = ask(theirs.to(torch.bfloat16), inputs).logits.float().numpy()
    out = forward(
        ours.clone(dtype=jnp.bfloat16), jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), inputs
    )
    error = np.sqrt(np.mean((np.asarray(out.logits, np.float32) - exact) ** 2))
    assert error <= 1.3 * np.sqrt(np.mean((rounded - exact) ** 2))
