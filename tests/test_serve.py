"""`python -m inference.serve`: a real process, asked by the real `openai` client."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import openai
import pytest

import inference
import modelzoo
import parallel
from inference import serve
from tests.serving import until
from tests.small_tokenizers import byte_level

ROOT = Path(__file__).parents[1]
PROMPT = "the quick"


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


def start(folder, *flags, num_devices=1):
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
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={num_devices}")
    environment = dict(os.environ, XLA_FLAGS=flags)
    process = subprocess.Popen(
        [*map(str, command), "--no-warm-up"], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.match(r"serving tiny at (http://[\d.]+:\d+) \(2 rows of 64 tokens; ", line)
    assert found, line
    return process, found[1]


def test_a_server_from_its_start_to_sigterm(checkpoint):
    """Its text is that of `generate`, samples follow the seed, and what is under way at the end is finished."""
    folder, model, params, tokenizer = checkpoint
    process, address = start(folder)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=120)

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

    def sample(seed):
        found = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=10, n=3, seed=seed, temperature=2
        )
        return [choice.text for choice in found.choices]

    assert sample(1) == sample(1) != sample(2)
    assert len(set(sample(1))) == 3

    finished, long = [], dict(model="tiny", prompt="fox", max_tokens=60, extra_body=dict(ignore_eos=True))
    before = prompt_tokens(address)
    stream = client.completions.create(**long, stream=True, logprobs=0)
    first = next(stream)

    def ask():
        finished.append(client.completions.create(**long).usage.completion_tokens)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    until(lambda: prompt_tokens(address) == before + 6 * len(tokenizer.encode("fox").ids), 60)
    process.send_signal(signal.SIGTERM)
    assert sum(len(part.choices[0].logprobs.tokens) for part in (first, *stream)) >= 50
    for thread in threads:
        thread.join(60)
    assert finished == [60] * 5
    assert process.wait(30) == 0
    process.stdout.close()
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


@pytest.mark.long
def test_a_server_on_a_mesh_with_a_cache_in_int8(checkpoint):
    """Its text is that of one device."""
    folder, model, params, tokenizer = checkpoint
    process, address = start(folder, "--mesh", "tensor=2", "--cache", "int8", num_devices=2)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=120)
    ids = tokenizer.encode(PROMPT).ids
    config = inference.GenerationConfig(max_new_tokens=12, eos_token_id=0)
    out = inference.generate(model.clone(cache_dtype=jnp.int8), params, [ids], config=config)
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    assert found.choices[0].text == tokenizer.decode(out.sequences[0, len(ids) : out.lengths[0]])
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()


def prompt_tokens(address):
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("flaxtron_prompt_tokens_total ")))


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
        (["--mesh", "tensor=16"], "needs 16 devices"),
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
