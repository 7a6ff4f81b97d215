"""`python -m inference.serve`: a real process, asked by the real `openai` client and by a real browser."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import openai
import pytest

import inference
import modelzoo
import parallel
from inference import serve
from tests.small_tokenizers import byte_level

ROOT = Path(__file__).parents[1]
PROMPT = "the quick"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, model, parameters, tokenizer)."""
    folder, tokenizer = tmp_path_factory.mktemp("serve") / "tiny", byte_level()
    size = tokenizer.get_vocab_size()
    model = modelzoo.GPTJForCausalLM(
        modelzoo.get_config("tiny-gptj", vocab_size=size, initializer_range=0.3, eos_token_id=0)
    )
    params = parallel.init_params(model, jax.random.key(0))
    modelzoo.to_hf(model, params, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, model, params, tokenizer


def start(folder, *flags):
    """(process, address) of a server that listens."""
    command = [
        sys.executable,
        "-m",
        "inference.serve",
        "--checkpoint",
        folder,
        "--port",
        "0",
        "--rows",
        "2",
        *flags,
    ]
    environment = dict(os.environ, XLA_FLAGS="--xla_backend_optimization_level=0")
    process = subprocess.Popen(
        [*map(str, command), "--no-warm-up"], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.match(r"serving tiny at (http://[\d.]+:\d+) \(2 rows of 64 tokens; ", line)
    assert found, line
    return process, found[1]


@pytest.fixture(scope="module")
def server(checkpoint):
    process, address = start(checkpoint[0])
    yield address
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.stdout.close()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="-", max_retries=0, timeout=120)


def test_text_is_that_of_generate(client, checkpoint):
    _, model, params, tokenizer = checkpoint
    ids = tokenizer.encode(PROMPT).ids
    config = inference.GenerationConfig(max_new_tokens=20, eos_token_id=0)
    out = inference.generate(model, params, [ids], config=config)
    want = tokenizer.decode(out.sequences[0, len(ids) : out.lengths[0]])
    asked = dict(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    found = client.completions.create(**asked, logprobs=3)
    assert found.choices[0].text == want
    assert len(found.choices[0].logprobs.top_logprobs[0]) == 3
    streamed = [part.choices[0].text for part in client.completions.create(**asked, stream=True)]
    assert len(streamed) > 1
    assert "".join(streamed) == want


def test_the_same_seed_gives_the_same_texts(client):
    def ask(seed):
        found = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=10, n=3, seed=seed, temperature=2
        )
        return [choice.text for choice in found.choices]

    assert ask(1) == ask(1) != ask(2)
    assert len(set(ask(1))) == 3


def test_the_page_in_a_browser(server):
    """It streams text, shows probabilities, says what is wrong, and asks no other host for anything."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)} is installed")
    api = pytest.importorskip("playwright.sync_api")
    asked, failures = [], []
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        try:
            page = running.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: failures.append(error))
            page.goto(server)
            page.get_by_label("Prompt").fill(PROMPT)
            for name, value in (("max_tokens", "30"), ("temperature", "0")):
                page.fill(f"#{name}", value)
            page.get_by_role("button", name="Continue").click()
            page.wait_for_function(
                "document.querySelector('#status').textContent.includes('limit was reached')"
            )
            assert page.inner_text("#model") == "tiny"
            tokens = page.locator("#output .token")
            assert tokens.count() == 30
            text = openai.OpenAI(base_url=f"{server}/v1", api_key="-").completions.create(
                model="tiny", prompt=PROMPT, max_tokens=30, temperature=0
            )
            shown = page.evaluate("document.querySelector('#output').textContent")
            assert shown == PROMPT + text.choices[0].text
            tokens.nth(2).click()
            shares = [float(cell.rstrip(" %")) for cell in page.locator("td:nth-child(2)").all_inner_texts()]
            assert len(shares) == 5
            assert shares == sorted(shares, reverse=True)
            assert 0 < shares[0] <= sum(shares) <= 100.5
            page.fill("#max_tokens", "5000")
            page.get_by_role("button", name="Continue").click()
            page.wait_for_selector("#status.error")
            assert "past the 64 tokens of a request" in page.inner_text("#status")
        finally:
            running.close()
    assert not failures
    assert {url.startswith((server, "data:")) for url in asked} == {True}


def test_sigterm_finishes_what_is_under_way(checkpoint):
    process, address = start(checkpoint[0], "--api-key", "sesame")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="sesame", max_retries=0, timeout=120)
    finished = []

    def ask():
        asked = dict(model="tiny", prompt="the", max_tokens=60, extra_body=dict(ignore_eos=True))
        finished.append(client.completions.create(**asked).usage.completion_tokens)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    stream = client.completions.create(
        model="tiny", prompt="the", max_tokens=60, stream=True, extra_body=dict(ignore_eos=True), logprobs=0
    )
    next(stream)
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while "flaxtron_prompt_tokens_total 6.0" not in client.get("/../metrics", cast_to=str):
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    assert sum(len(part.choices[0].logprobs.tokens) for part in stream) >= 58
    for thread in threads:
        thread.join(60)
    assert finished == [60] * 5
    assert process.wait(30) == 0
    process.stdout.close()
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--checkpoint", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--rows", "0"], "--rows 0: it is at least 1"),
        (["--port", "70000"], "--port 70000: it is at most 65535"),
        (["--max-waiting", "-1"], "--max-waiting -1: it is at least 0"),
        (["--request-seconds", "0"], "--request-seconds 0.0: it is above 0"),
        (["--api-key", ""], "the API key is empty"),
        (["--max-length", "65"], "max_length = 65: it is from 2 to the model's 64 positions"),
        (["--mesh", "tensor=3"], "needs 3 devices"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1:8000"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(capsys, checkpoint, flags, error):
    if "--checkpoint" not in flags:
        flags = ["--checkpoint", str(checkpoint[0]), *flags]
    with pytest.raises(SystemExit) as stop:
        serve.main(flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", captured.err)
    assert error in captured.err


def test_a_port_that_is_taken_is_one_line(capsys, checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            serve.main(["--checkpoint", str(checkpoint[0]), "--port", str(port)])
    assert capsys.readouterr().err == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_help_teaches_without_jax():
    code = (
        "import sys, inference.serve as s\ntry: s.main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for word in (
        "examples:",
        "curl http://",
        "--max-waiting",
        "(default: 8)",
        "--no-prefix-cache",
        "SIGTERM",
    ):
        assert word in done.stdout
