"""Perplexity by strides against the loop of transformers' documentation, written with torch."""

import numpy as np
import pytest
import torch
import transformers

import modelzoo
from inference.scoring import perplexity


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        vocab_size=97, n_embd=48, n_layer=2, n_head=4, rotary_dim=8, n_positions=64
    )
    theirs = transformers.GPTJForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("gptj")
    theirs.save_pretrained(folder)
    return theirs, *modelzoo.from_hf(folder)


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (64, 64), (40, 7)])
def test_the_reference_loop(pair, window, stride):
    theirs, model, params = pair
    ids = np.random.default_rng(1).integers(0, 97, 300)
    text, total, count, scored = torch.tensor(ids)[None], 0.0, 0, 0
    for begin in range(0, 300, stride):
        end = min(begin + window, 300)
        labels = text[:, begin:end].clone()
        labels[:, : labels.shape[1] - (end - scored)] = -100
        with torch.no_grad():
            loss = theirs(text[:, begin:end], labels=labels).loss
        predicted = int((labels[:, 1:] != -100).sum())  # the model shifts them
        if predicted:
            total, count = total + float(loss) * predicted, count + predicted
        scored = end
        if end == 300:
            break
    found = perplexity(model, params, ids.tolist(), window, stride, batch_size=2)
    assert found.num_tokens == count
    assert found.perplexity == pytest.approx(np.exp(total / count), rel=1e-5)
