"""Continuous batching, with a fake model whose every token is known in advance."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelzoo
import parallel
from inference.engine import Engine
from inference.requests import SamplingParams
from inference.row_sampling import with_logprobs
from modelzoo.layers.cache import begin, init_cache
from modelzoo.outputs import CausalLMOutput

VOCAB = 50


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    vocab_size: int = VOCAB
    max_positions: int = 64


class FakeLM(modelzoo.Model):
    """Its next token is (3 x the sum of all tokens so far + the last position) mod V, at every position."""

    config: Any = FakeConfig()
    task: ClassVar[str] = "causal_lm"

    def init_cache(self, batch_size, max_length, dtype=None):
        return init_cache(1, batch_size, max_length, 1, 1, jnp.float32)

    def __call__(self, input_ids, attention_mask=None, position_ids=None, cache=None, logits_to_keep=0):
        num_new, at = input_ids.shape[1], cache.index
        places, _, num_keys, cache = begin(cache, attention_mask, num_new)
        layer = cache.layers[0].write(*[input_ids[:, None, :, None].astype(jnp.float32)] * 2, at)
        visible = jnp.arange(num_keys) <= jnp.atleast_2d(places)[:, :, None]
        total = jnp.sum(jnp.where(visible, layer.key[:, 0, None, :, 0], 0.0), axis=2).astype(jnp.int32)
        following = (3 * total + position_ids) % self.config.vocab_size
        distance = (jnp.arange(self.config.vocab_size) - following[..., None]) % self.config.vocab_size
        logits = -0.25 * distance.astype(jnp.float32)
        if not isinstance(logits_to_keep, int):
            logits = jnp.take(logits, logits_to_keep, axis=1)
        return CausalLMOutput(logits, cache.advance((layer,), num_new))


def expected(prompt, num_new):
    tokens = list(prompt)
    for _ in range(num_new):
        tokens.append((3 * sum(tokens) + len(tokens) - 1) % VOCAB)
    return tokens[len(prompt) :]


def most_probable(logits, params, seen, counts, step):
    stops = jnp.where(step[:, None] < params.min_new[:, None], params.stop_ids, -1)
    held = (jnp.arange(VOCAB) == stops[:, :, None]).any(1)
    token = jnp.argmax(jnp.where(held, -1e9, logits), axis=-1).astype(jnp.int32)
    return with_logprobs(logits, token, params.num_logprobs)


@pytest.fixture(scope="module")
def small():
    """Cache lengths and chunks so short that every way through the engine is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inference.engine.SHRINK_AFTER", 3)
        with pytest.MonkeyPatch.context() as sizes:
            sizes.setattr("inference.engine.SHORTEST_CACHE", 32)
            sizes.setattr("inference.engine.CHUNKS", (4, 8))
            engine = Engine(FakeLM(), {}, num_rows=3)
        # Sampling is most of what is compiled; tests/test_row_sampling.py and tests/test_slots.py have it.
        patch.setattr("inference.slots.choose_rows", most_probable)
        yield engine


def requests(engine, count, seed=0, **fields):
    random = np.random.default_rng(seed)
    for _ in range(count):
        prompt = random.integers(1, VOCAB, random.integers(1, 45)).tolist()
        num_new = int(random.integers(1, 20))
        yield engine.submit(prompt, SamplingParams(max_new_tokens=num_new, **fields))


def test_requests_join_and_leave_and_each_gets_its_own_tokens(small):
    taken = list(requests(small, 20))
    assert small.num_waiting == 20
    events = list(small.run())
    for request in taken:
        num_new = request.params.max_new_tokens
        assert request.output == expected(request.prompt, num_new)
        mine = [event for event in events if event.request is request]
        assert [event.token for event in mine] == request.output
        assert [event.finish_reason for event in mine] == [None] * (num_new - 1) + ["length"]
    assert small.is_idle
    assert (small.num_waiting, small.num_running) == (0, 0)


def test_running_rows_go_on_while_a_long_prompt_is_read(small):
    first = small.submit([1, 2], SamplingParams(max_new_tokens=30))
    while not first.output:
        small.step()
    small.submit(list(range(1, 41)), SamplingParams(max_new_tokens=2))
    for _ in range(5):  # ten chunks of the shortest length
        before = len(first.output)
        small.step()
        assert len(first.output) == before + 1
    assert small._reading is not None
    assert len(list(small.run())) > 2


def test_the_cache_grows_and_shrinks(small):
    list(small.run())
    long = small.submit([1] * 30, SamplingParams(max_new_tokens=30))
    short = small.submit([2], SamplingParams(max_new_tokens=1))
    list(small.run())
    assert small._state.num_slots == 64
    assert long.output == expected([1] * 30, 30)
    again = small.submit([3], SamplingParams(max_new_tokens=12))
    list(small.run())
    assert small._state.num_slots == 32
    assert (short.output, again.output) == (expected([2], 1), expected([3], 12))


def test_equal_beginnings_are_taken_over(small):
    prompt = np.random.default_rng(5).integers(1, VOCAB, 20).tolist()
    one, two, other = (
        small.submit(ids, SamplingParams(max_new_tokens=6)) for ids in (prompt, prompt, [9, *prompt])
    )
    list(small.run())
    assert (one.cached_tokens, two.cached_tokens, other.cached_tokens) == (0, 19, 0)
    assert one.output == two.output == expected(prompt, 6)
    chat = small.submit([*prompt, *one.output, 7, 8], SamplingParams(max_new_tokens=6))
    list(small.run())
    assert chat.cached_tokens == 25  # the newest token of an answer has not been read
    assert chat.output == expected(chat.prompt, 6)
    assert other.output == expected([9, *prompt], 6)


def test_stop_tokens_and_lengths(small):
    new = expected([9], 12)
    stop = new[4]
    at = new.index(stop)
    ended, held, read = (
        small.submit([9], SamplingParams(max_new_tokens=12, **fields))
        for fields in (dict(stop_token_ids=(stop,)), dict(stop_token_ids=(new[0],), min_new_tokens=3), {})
    )
    only = small.submit([9, 8, 7], SamplingParams(max_new_tokens=0))
    events = list(small.run())
    assert (ended.output, ended.finish_reason) == (new[: at + 1], "stop")
    assert new[0] not in held.output[:3]
    assert (read.output, read.finish_reason) == (new, "length")
    assert (only.output, only.finish_reason) == ([], "length")
    assert [event.token for event in events if event.request is only] == [None]


def test_log_probabilities_of_prompt_and_output(small):
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    asked = small.submit(prompt, SamplingParams(max_new_tokens=2, logprobs=2, prompt_logprobs=True))
    events = list(small.run())
    logits = -0.25 * np.arange(VOCAB)
    logits = logits - np.log(np.exp(logits).sum())
    assert [detail.token for detail in asked.prompt_logprobs] == prompt[1:]
    for i, detail in enumerate(asked.prompt_logprobs):
        (best,) = expected(prompt[: i + 1], 1)
        assert [token for token, _ in detail.top] == [best, (best + 1) % VOCAB]
        assert detail.logprob == pytest.approx(logits[(prompt[i + 1] - best) % VOCAB], abs=1e-5)
    for event in events:
        assert event.logprob is not None
        assert event.logprob.top[0] == (event.token, pytest.approx(logits[0], abs=1e-5))


def test_requests_are_cancelled_wherever_they_are(small):
    running, reading, waiting = (
        small.submit(ids, SamplingParams(max_new_tokens=20)) for ids in ([1], [2] * 40, [3])
    )
    while not running.output:
        small.step()
    small.step()
    assert small._reading is not None
    more = [small.submit([4], SamplingParams(max_new_tokens=9)) for _ in range(4)]
    for request in (running, reading, waiting, more[3]):
        small.cancel(request)
        small.cancel(request)
    events = list(small.run())
    assert [event.finish_reason for event in events].count("cancelled") == 4
    for request in more[:3]:
        assert request.output == expected([4], 9)
    small.cancel(more[0])
    assert small.is_idle


@pytest.mark.parametrize(
    ("prompt", "fields", "error"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 50], {}, "prompt holds the id 50: the vocabulary has ids 0 to 49"),
        ([-1], {}, "prompt holds the id -1"),
        ([1], dict(stop_token_ids=(50,)), "stop_token_ids holds the id 50"),
        ([1], dict(stop_token_ids=tuple(range(17))), "stop_token_ids names 17 ids: 16 are allowed"),
        ([1], dict(logit_bias={99: 1.0}), "logit_bias holds the id 99"),
        ([1] * 60, dict(max_new_tokens=5), "a prompt of 60 tokens and 5 new ones are past the 64 tokens"),
    ],
)
def test_requests_that_do_not_fit_are_refused(small, prompt, fields, error):
    with pytest.raises(ValueError, match=error):
        small.submit(prompt, SamplingParams(**fields))
    assert small.is_idle


def test_engines_that_do_not_fit_are_refused():
    classifier = modelzoo.GPTJForSequenceClassification(modelzoo.get_config("tiny-gptj"))
    with pytest.raises(ValueError, match=r"^GPTJForSequenceClassification does not generate"):
        Engine(classifier, {})
    with pytest.raises(ValueError, match=r"num_rows = 0: it is a positive multiple of 1"):
        Engine(FakeLM(), {}, num_rows=0)
    for length in (1, 65):
        with pytest.raises(
            ValueError, match=rf"max_length = {length}: it is from 2 to the model's 64 positions"
        ):
            Engine(FakeLM(), {}, max_length=length)
    rules = parallel.make_rules(parallel.make_mesh(data=2, devices=jax.devices()[:2]))
    with pytest.raises(ValueError, match="num_rows = 3: it is a positive multiple of 2"):
        Engine(FakeLM(), {}, num_rows=3, rules=rules)
