"""Losses, gradients and whole optimizer steps against transformers and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.loss import loss_utils

import modelzoo
import train
from train import optim, schedules

SIZES = dict(
    vocab_size=67, n_embd=48, n_layer=2, n_head=4, rotary_dim=4, n_positions=32, n_inner=80, pad_token_id=0
)
RANDOM = np.random.default_rng(0)


class Outputs:
    def __init__(self, **fields):
        self.__dict__.update(fields)


def assert_same_loss(model, fields, batch, torch_loss):
    """Loss to 1e-5 relative, and gradients with respect to every array of `fields`."""
    tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in fields.items()}
    want = torch_loss(**tensors)
    want.backward()

    def value(fields):
        return train.loss(model, Outputs(**fields), batch)[0]

    got, gradients = jax.value_and_grad(value)({name: jnp.asarray(value) for name, value in fields.items()})
    assert float(got) == pytest.approx(want.item(), rel=1e-5)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(gradients[name], tensor.grad, atol=1e-6)


def logits_of(*shape):
    return RANDOM.normal(0, 3, shape).astype(np.float32)


def test_causal_lm():
    labels = RANDOM.integers(0, 67, (3, 9))
    labels[RANDOM.random((3, 9)) < 0.4] = -100
    model = modelzoo.GPTJForCausalLM(modelzoo.GPTJConfig(**SIZES))
    assert_same_loss(
        model,
        {"logits": logits_of(3, 9, 67)},
        {"labels": labels},
        lambda logits: loss_utils.ForCausalLMLoss(logits, torch.from_numpy(labels), 67),
    )


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        (dict(num_labels=5), RANDOM.integers(0, 5, 6)),
        (dict(num_labels=5), np.asarray([0, -100, 4, 1, -100, 2])),
        (dict(num_labels=5, problem_type="single_label_classification"), RANDOM.integers(0, 5, (6, 1))),
        (dict(num_labels=1), logits_of(6)),
        (dict(num_labels=1), logits_of(6, 1)),
        (dict(num_labels=5, problem_type="regression"), logits_of(6, 5)),
        (dict(num_labels=5), RANDOM.integers(0, 2, (6, 5)).astype(np.float32)),
        (
            dict(num_labels=5, problem_type="multi_label_classification"),
            RANDOM.random((6, 5)).astype(np.float32),
        ),
    ],
)
def test_sequence_classification(config, labels):
    model = modelzoo.GPTJForSequenceClassification(modelzoo.GPTJConfig(**SIZES, **config))
    theirs = transformers.GPTJConfig(**SIZES, **config)
    assert_same_loss(
        model,
        {"logits": logits_of(6, config["num_labels"])},
        {"labels": labels},
        lambda logits: loss_utils.ForSequenceClassificationLoss(torch.from_numpy(labels), logits, theirs),
    )


def test_question_answering():
    model = modelzoo.GPTJForQuestionAnswering(modelzoo.GPTJConfig(**SIZES))
    start, end = np.asarray([0, 8, 9, -4, 3]), np.asarray([[2], [40], [8], [9], [-1]])
    assert_same_loss(
        model,
        {"start_logits": logits_of(5, 9), "end_logits": logits_of(5, 9)},
        {"start_positions": start, "end_positions": end},
        lambda start_logits, end_logits: loss_utils.ForQuestionAnsweringLoss(
            start_logits, end_logits, torch.from_numpy(start), torch.from_numpy(end)
        ),
    )


def test_ten_optimizer_steps_are_those_of_torch(tmp_path):
    """AdamW with clipping, decay by name and a warm-up, over a batch with ignored labels, in accumulated slices."""
    torch.manual_seed(0)
    theirs = transformers.GPTJForCausalLM(transformers.GPTJConfig(**SIZES)).train()
    theirs.save_pretrained(tmp_path)
    plain = [p for n, p in theirs.named_parameters() if "bias" in n or "ln" in n]
    decayed = [p for n, p in theirs.named_parameters() if not ("bias" in n or "ln" in n)]
    numbers = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    torch_optimizer = torch.optim.AdamW(groups, **numbers)
    warmup = torch.optim.lr_scheduler.LambdaLR(torch_optimizer, lambda step: min(1.0, (step + 1) / 4))

    model, params = modelzoo.from_hf(tmp_path)
    rate = schedules.warmup_linear(peak=3e-3, num_steps=14, warmup_steps=4, end_fraction=1.0)
    optimizer = optim.adamw(learning_rate=rate, b2=0.95, weight_decay=0.1, clip_norm=0.5)
    state = train.init_state(model, optimizer, params=params)
    step = train.make_train_step(model, optimizer, accumulate=2, learning_rate=rate)
    for _ in range(10):
        ids = RANDOM.integers(0, 67, (4, 12))
        labels = ids.copy()
        labels[1:3, :9] = -100
        loss = theirs(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        state, metrics = step(state, {"input_ids": ids, "labels": labels})
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
        assert float(metrics["learning_rate"]) == pytest.approx(
            torch_optimizer.param_groups[0]["lr"], rel=1e-6
        )
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        warmup.step()
