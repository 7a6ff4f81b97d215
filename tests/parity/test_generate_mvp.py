"""MVP's generation against transformers: outputs that are begun by the caller."""

import numpy as np
import pytest

from tests.parity.generation import EOS, VOCAB, assert_same, both

BEGUN = np.random.default_rng(1).integers(6, VOCAB, (4, 3))
START = 9
STARTED = np.concatenate([np.full((4, 1), START), BEGUN], axis=1)


@pytest.mark.parametrize(
    ("begun", "fields"),
    [
        (BEGUN, dict(forced_bos_token_id=13)),  # which the start token and three more leave no place for
        (STARTED, dict(begin_suppress_tokens=list(range(40)), repetition_penalty=1.3)),
        (np.full((4, 1), START), dict(forced_bos_token_id=13)),
        (BEGUN, dict(num_beams=4, length_penalty=2.0, num_return_sequences=2, max_length=18)),
    ],
    ids=["no start token", "start token", "start token alone", "beams"],
)
def test_outputs_that_are_begun(begun, fields):
    fields = dict(eos_token_id=[EOS, 33], max_new_tokens=None if "max_length" in fields else 14) | fields
    assert_same(*both("MvpForConditionalGeneration", "other tokens", begun=begun, **fields))
