"""The HTTP side over an engine without a model, asked by the real `openai` client and by raw sockets."""

import json
import threading
import urllib.error
import urllib.request

import openai
import pytest

from tests.fake_engine import FakeEngine
from tests.serving import KEY, serving, until

PROMPT = "the end of "


@pytest.fixture(scope="module")
def server():
    with serving(api_key=KEY, max_waiting=6, max_body=20_000) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0, timeout=20)


def fetch(address, body=None, key=KEY, method=None):
    headers = {"authorization": f"Bearer {key}"}
    asked = urllib.request.Request(address, body, headers, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def test_text_whole_and_streamed(client):
    asked = dict(model="tiny", prompt=PROMPT, max_tokens=20)
    whole = client.completions.create(**asked)
    assert whole.choices[0].text.startswith(PROMPT)
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (20, 20 + whole.usage.prompt_tokens)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert parts[-1].usage == whole.usage
    assert {part.id for part in parts} == {parts[0].id} != {whole.id}


def test_stop_strings_and_stop_tokens(client):
    stopped = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, stop=["end"])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("the ", "stop")
    ended = client.completions.create(model="tiny", prompt=[70, 0, 71], max_tokens=9)
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens == 2


def test_log_probabilities_of_an_echoed_prompt(client):
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=2)
    logprobs = found.choices[0].logprobs
    assert "".join(logprobs.tokens) == found.choices[0].text == PROMPT
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx([-0.693] * (len(logprobs.tokens) - 1), abs=1e-3)
    assert [len(top) for top in logprobs.top_logprobs[1:]] == [2] * (len(logprobs.tokens) - 1)
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "flaxtron"
    with pytest.raises(openai.NotFoundError, match="there is no model 'large'"):
        client.models.retrieve("large")


def test_a_wrong_key_an_unknown_model_and_path(server, client):
    address = server[0]
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'") as caught:
        client.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found"
    assert fetch(f"{address}/v1/models", key="")[0] == 401
    assert fetch(f"{address}/v1/models", key="ключ".encode().decode("latin-1"))[0] == 401
    for path, method, status in (("/v2", "GET", 404), ("/v1/completions", "GET", 405)):
        found, body, _ = fetch(address + path, method=method)
        assert found == status
        message = json.loads(body)["error"]["message"]
        assert message.startswith(f"{method} {path}: ")
        assert message.endswith("; completions are at POST /v1/completions")
    assert fetch(f"{address}/health", key="")[:2] == (200, '{"status":"ok"}')


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (b"{", 400, "the body is not JSON"),
        (b'{"model": "tiny", "prompt": "\xff"}', 400, "the body is not UTF-8"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "not valid UTF-8"),
        (b'{"model": "tiny", "prompt": ""}', 400, "a prompt is empty"),
        (b'{"model": "tiny", "prompt": [[]]}', 400, "the prompt is empty"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": 1000000000}', 400, "are past the 10000 tokens"),
        (b'{"model": "tiny", "prompt": "' + b"a" * 20_000 + b'"}', 413, "larger than 20000 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_requests_get_an_error_object(server, body, status, error):
    found, answer, _ = fetch(f"{server[0]}/v1/completions", body)
    assert found == status
    assert error in json.loads(answer)["error"]["message"]


def test_past_the_queue_clients_are_told_to_come_back(server, client):
    engine = server[1]
    engine.seconds = 0.05
    try:
        streams = [
            client.completions.create(model="tiny", prompt="a", max_tokens=500, stream=True) for _ in range(8)
        ]
        with pytest.raises(
            openai.RateLimitError, match="the server is busy: 8 of 8 sequences are open"
        ) as caught:
            client.completions.create(model="tiny", prompt="a")
        assert caught.value.response.headers["retry-after"] == "1"
        until(lambda: "flaxtron_sequences_waiting 6.0" in fetch(f"{server[0]}/metrics")[1])
        for stream in streams:
            stream.close()
    finally:
        engine.seconds = 0.0
    until(lambda: engine.is_idle and server[2].service.num_open == 0)
    assert client.completions.create(model="tiny", prompt="a").choices[0].text


def test_five_hundred_requests_at_once():
    with serving(FakeEngine(num_rows=4), max_waiting=100) as (address, engine, ours):
        body, found = json.dumps(dict(model="tiny", prompt="a", max_tokens=20)).encode(), []

        def ask():
            found.append(fetch(f"{address}/v1/completions", body)[0])

        engine.seconds = 0.005
        threads = [threading.Thread(target=ask) for _ in range(500)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == 500
        assert set(found) == {200, 429}
        assert found.count(200) >= 104
        until(lambda: ours.service.num_open == 0)
        assert fetch(f"{address}/health")[0] == 200


def test_metrics_count(server, client):
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4)
    text = fetch(f"{server[0]}/metrics", key="")[1]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['flaxtron_requests_total{code="200",path="/v1/completions"}']) >= 1
    assert float(values["flaxtron_generated_tokens_total"]) >= 4
    assert float(values["flaxtron_time_to_first_token_seconds_count"]) >= 1
    assert float(values['flaxtron_sequences_total{reason="length"}']) >= 1
