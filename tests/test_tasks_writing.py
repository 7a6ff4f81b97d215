"""What a model writes is the likeliest token after each: seen by reading it once more without a cache or padding."""

import numpy as np
import pytest

import modelzoo
from tests.zoo import quick_jit, random_params, tiny_gptj, tiny_mvp
from train.tasks.targets import left_padded
from train.tasks.writing import Writer

NEW = 5


def likeliest(model, params, **inputs):
    out = quick_jit(lambda params, inputs: model.apply({"params": params}, **inputs).logits)(params, inputs)
    return np.asarray(out.argmax(axis=-1))


def until_end(tokens, end, fill):
    """Tokens up to the first end, and that all after it is padding."""
    places = np.flatnonzero(tokens == end)
    if not len(places):
        return tokens
    assert (tokens[places[0] + 1 :] == fill).all()
    return tokens[: places[0] + 1]


@pytest.mark.parametrize("end", [2, pytest.param(None, marks=pytest.mark.long)])
def test_a_causal_model_goes_on_with_prompts_of_all_lengths(end):
    model = modelzoo.GPTJForCausalLM(tiny_gptj(eos_token_id=end, n_layer=1))
    params = random_params(model)
    prompts = [[5, 6, 7, 8], [9, 10]]
    ids, mask = left_padded(prompts, 6, 0)
    written = np.asarray(Writer(model, None, NEW)(params, ids, mask))
    assert written.shape == (2, NEW)
    for prompt, tokens in zip(prompts, written, strict=True):
        tokens = until_end(tokens, -1 if end is None else end, 0)
        whole = np.array([[*prompt, *tokens]])
        assert likeliest(model, params, input_ids=whole)[0, len(prompt) - 1 : -1].tolist() == tokens.tolist()


@pytest.mark.long
def test_an_encoder_decoder_writes_from_its_start_token():
    config = tiny_mvp(eos_token_id=3)
    model = modelzoo.MvpForConditionalGeneration(config)
    params = random_params(model)
    rows = [[5, 6, 7, 3], [9, 3]]
    ids, mask = np.full((2, 6), 1), np.zeros((2, 6), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    written = np.asarray(Writer(model, None, NEW)(params, ids, mask))
    for row, tokens in zip(rows, written, strict=True):
        tokens = until_end(tokens, 3, 1)
        read = np.array([[9, *tokens[:-1]]])  # the decoder's start token
        assert (
            likeliest(model, params, input_ids=np.array([row]), decoder_input_ids=read)[0].tolist()
            == tokens.tolist()
        )
