"""What may be asked of the engine."""

import math

import pytest

from inference.requests import SamplingParams


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "max_new_tokens": (-1, 1.5, True, None),
        "min_new_tokens": (-1, 17),
        "temperature": (-0.1, math.nan, math.inf, "1"),
        "top_k": (-1, 0.5),
        "top_p": (0, 1.1, math.nan),
        "min_p": (-0.1, 1.1),
        "repetition_penalty": (0, -1, math.inf),
        "frequency_penalty": (math.inf, None),
        "presence_penalty": (math.nan,),
        "seed": (2**63, 0.5),
        "sample": (-1,),
        "logprobs": (-1, 21, True, 1.0),
        "logit_bias": ({1: math.nan}, {1.5: 1.0}, dict.fromkeys(range(301), 1.0)),
    }.items(),
)
def test_values_out_of_range_are_named(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{field} = .*: it is "):
            SamplingParams(**{field: value})


def test_which_requests_read_their_history():
    assert not SamplingParams(temperature=1.0, logit_bias={1: 2.0}).reads_history
    for field in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        assert SamplingParams(**{field: 0.5}).reads_history
