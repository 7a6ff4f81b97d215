"""What a client may ask for, and the text that goes back."""

import json
import math

import pytest

from inference.completions import ApiError, ChoiceText, CompletionRequest, choice_body, show_token
from inference.requests import Event, Request, SamplingParams, TokenLogprob
from tests.small_tokenizers import byte_level

TOKENIZER = byte_level()


def parse(**fields):
    wanted = CompletionRequest.parse(json.dumps({"model": "m", "prompt": "a", **fields}).encode())
    wanted.check(8)
    wanted.sampling((0,))
    return wanted


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "the body is not JSON: "),
        (b"{", "the body is not JSON: "),
        (b"\xff", "the body is not UTF-8: invalid start byte at byte 0"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "the body is a JSON list, and has to be an object"),
        (b'{"model": "m"}', "prompt is missing"),
        (b'{"prompt": "a", "model": 3}', "model: input should be a valid string"),
    ],
)
def test_bodies_that_are_no_request(body, error):
    with pytest.raises(ApiError, match=error) as caught:
        CompletionRequest.parse(body)
    assert caught.value.status == 400
    assert caught.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "error"),
    [
        (dict(max_tokens=-1), "max_tokens", "greater than or equal to 0"),
        (dict(max_tokens=1.5), "max_tokens", "valid integer"),
        (dict(max_tokens=True), "max_tokens", "valid integer"),
        (dict(max_tokens=0), "max_tokens", "asks for nothing, unless echo"),
        (dict(temperature=-1), "temperature", "greater than or equal to 0"),
        (dict(temperature=math.inf), "temperature", "finite"),
        (dict(temperature="hot"), "temperature", "valid number"),
        (dict(top_p=0), "top_p", "greater than 0"),
        (dict(n=0), "n", "greater than or equal to 1"),
        (dict(n=9), "n", r"9 sequences \(prompts x best_of or n\) are asked for: at most 8 fit"),
        (dict(prompt=["a"] * 3, n=3), "n", "9 sequences"),
        (dict(best_of=1, n=2), "best_of", "best_of = 1 is below n = 2"),
        (dict(best_of=2, stream=True), "best_of", "cannot be streamed"),
        (dict(logprobs=21), "logprobs", "less than or equal to 20"),
        (dict(stop=[""]), "stop", "none of them empty"),
        (dict(stop=["a"] * 17), "stop", "up to 16 strings"),
        (dict(stop=3), "stop", "valid string"),
        (dict(presence_penalty=2.1), "presence_penalty", "less than or equal to 2"),
        (dict(logit_bias={"a": 1}), "logit_bias", "token ids, written as integers"),
        (dict(logit_bias={"1": 101}), "logit_bias", "from -100 to 100"),
        (dict(seed=2**63), "seed", "less than"),
        (dict(stream="yes"), "stream", "valid boolean"),
        (dict(stream_options={"include_usage": True}), "stream_options", "goes with stream"),
        (dict(suffix="x"), "suffix", "none"),
        (dict(functions=[]), "functions", "there is no parameter 'functions'"),
        (dict(prompt=[]), "prompt", "empty list"),
        (dict(prompt=[1, "a"]), "prompt", "a string, a list of strings, a list of token ids, or"),
        (dict(prompt={"a": 1}), "prompt", "a string, a list of strings"),
        (dict(prompt=None), "prompt", "a string, a list of strings"),
        (dict(min_tokens=17), "min_tokens", "from 0 to 16"),
        (dict(repetition_penalty=0), "repetition_penalty", "greater than 0"),
    ],
    ids=str,
)
def test_fields_out_of_range_are_named(fields, param, error):
    with pytest.raises(ApiError, match=error) as caught:
        parse(**fields)
    assert caught.value.status == 400
    assert caught.value.body["error"]["param"] == param


def test_prompts_of_every_form():
    assert parse(prompt="a").prompts() == ["a"]
    assert parse(prompt=[1, 2]).prompts() == [[1, 2]]
    assert parse(prompt=["a", "b"]).prompts() == ["a", "b"]
    assert parse(prompt=[[1], [2, 3]]).prompts() == [[1], [2, 3]]


def test_sampling_parameters():
    (params,) = parse().sampling((0,))
    assert (params.max_new_tokens, params.temperature, params.stop_token_ids, params.logprobs) == (
        16,
        1.0,
        (0,),
        None,
    )
    assert parse().sampling(())[0].seed != parse().sampling(())[0].seed
    three = parse(n=2, best_of=3, seed=4, logit_bias={"5": -7}, temperature=None).sampling((0,))
    assert [(each.seed, each.sample) for each in three] == [(4, 0), (4, 1), (4, 2)]
    assert three[0].logit_bias == {5: -7}
    assert three[0].logprobs == 0  # to rank them by
    assert parse(ignore_eos=True, stop_token_ids=[7]).sampling((0,))[0].stop_token_ids == (7,)
    assert parse(echo=True, logprobs=1).sampling(())[0].prompt_logprobs


def events(text, logprobs=None, reason="length", token=None):
    ids = TOKENIZER.encode(text).ids if token is None else token
    request = Request(0, (5,), SamplingParams(max_new_tokens=99, logprobs=logprobs))
    return [
        Event(
            request,
            id,
            None if logprobs is None else TokenLogprob(id, -1.0, ((id, -1.0), (id + 1, -2.0))[:logprobs]),
            reason if i == len(ids) - 1 else None,
        )
        for i, id in enumerate(ids)
    ]


def read(text, said):
    deltas = [text.take([event]) for event in said if not text.is_over]
    return "".join(delta.text for delta in deltas), deltas


@pytest.mark.parametrize(
    ("stops", "whole", "cut"),
    [
        ((), "the end", "the end"),
        (("end",), "the end of it", "the "),
        (("of", "d o"), "the end of it", "the en"),
        (("the",), "the end", ""),
        (("end of time",), "the end of it", "the end of it"),
        (("ends",), "the end", "the end"),
        (("é",), "caf é now", "caf "),
    ],
)
def test_text_is_cut_at_stop_strings_however_it_comes(stops, whole, cut):
    found, deltas = read(ChoiceText(TOKENIZER, [5], stops), events(whole))
    assert found == cut
    assert deltas[-1].finish_reason == ("length" if cut == whole else "stop")
    at_once = ChoiceText(TOKENIZER, [5], stops).take(events(whole))
    assert at_once.text == cut


def test_nothing_of_a_stop_string_is_given_away_before_it_is_certain():
    text = ChoiceText(TOKENIZER, [5], ("return of",))
    given = [text.take([event]).text for event in events("the return on")]
    assert "".join(given) == "the return on"
    assert not any("ret" in part and "on" not in part for part in given)


def test_tokens_beside_text():
    text = ChoiceText(TOKENIZER, [5], ("end",))
    _, deltas = read(text, events("the end of", logprobs=2))
    tokens = [token for delta in deltas for token in delta.tokens]
    assert "".join(token[0] for token in tokens).startswith("the")
    assert all(offset < len("the ") for *_, offset in tokens)
    body = choice_body(2, deltas[0], True)
    assert body["index"] == 2
    assert set(body["logprobs"]) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert body["logprobs"]["token_logprobs"] == [-1.0] * len(deltas[0].tokens)
    assert choice_body(0, deltas[0], False)["logprobs"] is None


def test_the_token_that_ends_a_text_is_no_part_of_it():
    said = [*events("the", reason=None), *events("", reason="stop", token=[0])]
    found, deltas = read(ChoiceText(TOKENIZER, [5], eos_ids=(0,)), said)
    assert (found, deltas[-1].finish_reason) == ("the", "stop")


def test_tokens_that_are_no_whole_character_are_shown_as_bytes():
    ids = TOKENIZER.encode("€").ids
    assert len(ids) > 1
    assert all(show_token(TOKENIZER, token).startswith("bytes:") for token in ids)
    assert show_token(TOKENIZER, TOKENIZER.encode("a").ids[0]) == "a"
