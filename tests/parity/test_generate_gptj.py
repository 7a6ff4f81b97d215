"""Generation against transformers' `generate` (torch, eager) with the same weights: token for token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import inference
import modelzoo
from inference import GenerationConfig, sampling

VOCAB, PAD = 97, 0
CONFIG: dict[str, Any] = dict(
    vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, rotary_dim=8, n_positions=96, n_inner=80
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(torch model, our model, our parameters), with logits at unit scale."""
    torch.manual_seed(0)
    config = transformers.GPTJConfig(**CONFIG, bos_token_id=1, eos_token_id=2, attn_implementation="eager")
    theirs = transformers.GPTJForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("gptj")
    theirs.save_pretrained(folder)
    ours, params = modelzoo.from_hf(folder)
    return theirs, ours, inference.prepare(ours, params)


@pytest.fixture(scope="module")
def batch():
    """Four left-padded prompts of different lengths."""
    ids = np.random.default_rng(0).integers(3, VOCAB, (4, 11))
    mask = np.ones_like(ids)
    for row, padding in enumerate((0, 4, 10, 1)):
        mask[row, :padding] = 0
        ids[row, :padding] = PAD
    return ids, mask


def both(pair, batch, **fields):
    theirs, ours, params = pair
    ids, mask = batch
    with torch.no_grad():
        want = theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            return_dict_in_generate=True,
            output_scores=True,
            **{"pad_token_id": PAD, "eos_token_id": None, **fields},
        )
    config = GenerationConfig(**{"pad_token_id": PAD, "output_scores": True, **fields})
    return inference.generate(ours, params, ids, mask, config), want


def ends_of(pair, batch):
    """Two ids that end rows of the batch at different steps."""
    out, _ = both(pair, batch, max_new_tokens=30)
    new = out.sequences[:, 11:]
    return [int(new[0, 12]), int(new[1, 5])]


@pytest.mark.parametrize(
    "fields",
    [
        dict(max_new_tokens=40),
        dict(),
        dict(max_length=30),
        dict(max_new_tokens=40, repetition_penalty=1.5),
        dict(max_new_tokens=40, repetition_penalty=0.8, pad_token_id=5),
        dict(max_new_tokens=20, forced_eos_token_id=2),
        dict(max_new_tokens=20, suppress_tokens=[4, 5, 6, 7], renormalize_logits=True),
    ],
    ids=str,
)
def test_greedy_tokens_and_scores(pair, batch, fields):
    out, want = both(pair, batch, **fields)
    np.testing.assert_array_equal(out.sequences, want.sequences.numpy())
    assert out.scores is not None
    scores = np.stack([step.numpy() for step in want.scores])
    assert out.scores.shape == scores.shape
    np.testing.assert_array_equal(np.isneginf(out.scores), np.isneginf(scores))
    finite = np.isfinite(scores)
    np.testing.assert_allclose(out.scores[finite], scores[finite], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        dict(max_new_tokens=40),
        dict(max_new_tokens=40, min_new_tokens=9),
        dict(max_new_tokens=40, min_length=19),
        dict(max_length=40, min_new_tokens=3, repetition_penalty=1.2),
        dict(max_new_tokens=40, pad_token_id=None),
    ],
    ids=str,
)
def test_rows_end_where_theirs_do(pair, batch, fields):
    ends = ends_of(pair, batch)
    out, want = both(pair, batch, eos_token_id=ends, **fields)
    np.testing.assert_array_equal(out.sequences, want.sequences.numpy())
    ended = np.isin(want.sequences.numpy()[:, 11:], ends)
    counts = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, ended.shape[1])
    assert out.lengths.tolist() == (11 + counts).tolist()
    assert len(set(out.lengths.tolist())) > 1


def test_mask_that_is_not_given_is_inferred_alike(pair, batch):
    theirs, ours, params = pair
    ids = torch.tensor(batch[0])
    want = theirs.generate(ids, max_new_tokens=8, pad_token_id=PAD, eos_token_id=2, do_sample=False)
    config = GenerationConfig(max_new_tokens=8, pad_token_id=PAD, eos_token_id=2)
    np.testing.assert_array_equal(inference.generate(ours, params, ids.numpy(), None, config).sequences, want)


def test_right_padded_rows_give_what_each_prompt_gives_alone(pair, batch):
    theirs, ours, params = pair
    prompts = [row[keep == 1] for row, keep in zip(*batch, strict=True)]
    ids, mask = np.full((4, 11), PAD), np.zeros((4, 11), int)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    config = GenerationConfig(max_new_tokens=25, pad_token_id=PAD)
    out = inference.generate(ours, params, ids, mask, config)
    for row, prompt in enumerate(prompts):
        alone = theirs.generate(
            torch.tensor(prompt[None]), max_new_tokens=25, pad_token_id=PAD, eos_token_id=None
        )
        assert out.sequences[row, : out.lengths[row]].tolist() == alone[0].tolist()


@pytest.mark.parametrize(
    "fields",
    [
        dict(temperature=0.7),
        dict(top_k=7),
        dict(top_k=0, top_p=0.6),
        dict(top_k=0, min_p=0.1),
        dict(top_k=30, top_p=0.95, min_p=0.02, temperature=1.4, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_the_distribution_that_is_sampled(pair, batch, fields):
    out, want = both(pair, batch, max_new_tokens=1, do_sample=True, **fields)
    assert out.scores is not None
    theirs = torch.softmax(want.scores[0], dim=-1).numpy()
    np.testing.assert_allclose(jax.nn.softmax(out.scores[0], axis=-1), theirs, atol=2e-6, rtol=0)
    assert (theirs[np.arange(4), out.sequences[:, -1]] > 0).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("size", [50, 5000])
def test_top_p_keeps_the_same_tokens(p, size):
    logits = 4 * np.random.default_rng(size).standard_normal((8, size)).astype(np.float32)
    warp: Any = transformers.TopPLogitsWarper(p)
    want = warp(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(np.asarray(sampling.keep_top_p(jnp.asarray(logits), p)), want)
