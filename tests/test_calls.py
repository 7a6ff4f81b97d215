"""One request to /v1/completions from its first event to its end, over an engine without a model."""

import json
import socket

import openai
import pytest

from tests.fake_engine import FakeEngine
from tests.serving import serving, until


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="-", max_retries=0, timeout=20)


def test_several_prompts_and_choices_stand_in_order(client):
    asked = dict(model="tiny", prompt=["the", "fox"], n=2, max_tokens=3, echo=True)
    found = client.completions.create(**asked)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in found.choices] == ["the", "the", "fox", "fox"]
    parts = client.completions.create(**asked, stream=True)
    texts = {}
    for part in parts:
        texts[part.choices[0].index] = texts.get(part.choices[0].index, "") + part.choices[0].text
    assert texts == {choice.index: choice.text for choice in found.choices}


def test_the_best_are_returned_best_first(client):
    found = client.completions.create(model="tiny", prompt="the", n=2, best_of=4, max_tokens=3, logprobs=1)
    firsts = [choice.logprobs.token_logprobs[0] for choice in found.choices]
    assert firsts == sorted(firsts, reverse=True)  # the fake engine's samples grow less probable
    assert firsts[0] == pytest.approx(-0.693, abs=1e-3)
    assert found.usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_requests(server, stream):
    _, engine, ours = server
    engine.seconds = 0.01
    body = json.dumps(dict(model="tiny", prompt=["a", "b", "c"], max_tokens=5000, stream=stream)).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: a", f"Content-Length: {len(body)}"]
    head = "\r\n".join([*lines, "", ""])
    port = int(server[0].rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + body)
    until(lambda: engine.num_running == 2)
    connection.close()
    until(lambda: engine.is_idle and ours.service.num_open == 0)
    engine.seconds = 0.0
    assert "cancelled" in ours.metrics.text().decode()


def test_deadlines():
    with serving(FakeEngine(seconds=0.02), request_seconds=0.3) as (address, engine, ours):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        asked = dict(model="tiny", prompt="a", max_tokens=5000)
        with pytest.raises(openai.InternalServerError, match="took longer than 0.3 s") as caught:
            client.completions.create(**asked)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="took longer than 0.3 s"):
            list(client.completions.create(**asked, stream=True))
        until(lambda: engine.is_idle and ours.service.num_open == 0)


def test_an_engine_that_fails_is_told():
    with serving() as (address, engine, ours):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        engine.seconds, engine.failure = 0.01, RuntimeError("no memory")
        for stream in (False, True):
            with pytest.raises(openai.APIError, match="no memory"):
                list(client.completions.create(model="tiny", prompt="a", stream=stream))
        assert not ours.service.is_alive
