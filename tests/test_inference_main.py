"""`python -m inference`: text from both kinds of checkpoint, and one line for what a user can get wrong."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import inference
import modelzoo
import parallel
from inference import __main__ as entry
from parallel.checkpoint import save_tree

ROOT = Path(__file__).parents[1]
PROMPT = "def the end"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def main(): return the end of the function"] * 3, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    size = tokenizer.get_vocab_size()
    config = modelzoo.get_config("tiny-gptj", vocab_size=size, initializer_range=0.3, eos_token_id=0)
    return modelzoo.GPTJForCausalLM(config)


@pytest.fixture(scope="module")
def params(model):
    return parallel.init_params(model, jax.random.key(0))


@pytest.fixture(scope="module")
def hf(model, params, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    modelzoo.to_hf(model, params, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def run(model, params, tokenizer, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    folder = run / "checkpoints" / "7"
    save_tree(folder / "params", params, jax.tree.map(lambda leaf: leaf.shape, params))
    content = model.config.to_hf() | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "commit_success.txt").write_text("")
    tokenizer.save(str(folder / "tokenizer.json"))
    return run


def call(capsys, *args):
    entry.main([str(arg) for arg in args])
    return capsys.readouterr().out


def body(out):
    """What stands between `generated:` and the line on the speed."""
    return out.removeprefix("generated:\n").rsplit("\n\n", 1)[0]


def expected(model, params, tokenizer, prompt, num_new, rng=None, **fields):
    ids = tokenizer.encode(prompt).ids
    config = inference.GenerationConfig(max_new_tokens=num_new, eos_token_id=0, **fields)
    out = inference.generate(model, params, [ids], config=config, rng=rng)
    new = out.sequences[0, len(ids) : out.lengths[0]]
    return prompt + tokenizer.decode(new[new != 0])


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_prints_prompt_text_speed_and_checkpoint(capsys, hf, model, params, tokenizer, stream):
    out = call(capsys, "--checkpoint", hf, "--prompt", PROMPT, "--max-new-tokens", 24, stream)
    assert out.startswith("generated:\n" + PROMPT)
    assert body(out) == expected(model, params, tokenizer, PROMPT, 24)
    speed, checkpoint = out.splitlines()[-2:]
    assert re.match(r"[\d.]+ tokens/s: 23 tokens decoded in [\d.]+ s; .* compiling and prefill", speed)
    assert checkpoint == f"checkpoint: {hf}"


def test_a_run_generates_from_its_newest_checkpoint(capsys, run, model, params, tokenizer):
    out = call(capsys, "--checkpoint", run, "--prompt", PROMPT, "--max-new-tokens", 24)
    assert body(out) == expected(model, params, tokenizer, PROMPT, 24)
    assert out.splitlines()[-1] == f"checkpoint: {run / 'checkpoints' / '7'}"


def test_sampling_follows_the_seed(capsys, hf, model, params, tokenizer):
    def sample(seed):
        flags = ("--temperature", 2.0, "--top-p", 0.9, "--max-new-tokens", 12, "--seed", seed)
        return body(call(capsys, "--checkpoint", hf, "--prompt", PROMPT, *flags))

    fields = dict(do_sample=True, temperature=2.0, top_p=0.9, rng=jax.random.key(3))
    assert sample(3) == expected(model, params, tokenizer, PROMPT, 12, **fields) != sample(4)


def test_several_prompts_and_files_stand_in_order(capsys, hf, model, params, tokenizer, tmp_path):
    (tmp_path / "story.txt").write_text("€ of\n", encoding="utf-8")
    out = call(
        capsys, "--checkpoint", hf, "--prompt", PROMPT, "--prompt", "m",
        "--prompt-file", tmp_path / "story.txt", "--max-new-tokens", 8,
    )  # fmt: skip
    texts = [expected(model, params, tokenizer, prompt, 8) for prompt in (PROMPT, "m", "€ of")]
    assert body(out) == "\n\n".join(texts)


def test_a_mesh_gives_the_same_text(capsys, hf, model, params, tokenizer):
    flags = ("--mesh", "tensor=2,fsdp=-1", "--max-new-tokens", 8, "--repetition-penalty", 1.3)
    out = call(capsys, "--checkpoint", hf, "--prompt", PROMPT, *flags)
    assert body(out) == expected(model, params, tokenizer, PROMPT, 8, repetition_penalty=1.3)


@pytest.mark.long
def test_guesses_give_the_same_text_and_are_counted(capsys, hf, model, params, tokenizer):
    flags = ("--checkpoint", hf, "--prompt", PROMPT, "--max-new-tokens", 24)
    out = call(capsys, *flags, "--draft", hf, "--draft-tokens", 5)
    assert body(out) == expected(model, params, tokenizer, PROMPT, 24)
    # A model guesses itself: 23 tokens at 6 a pass, in chunks of 16 and 7, whose last tokens are guesses too.
    assert "; 20 of 20 guesses were right, and 23 tokens took 5 passes;" in out.splitlines()[-2]
    out = call(capsys, *flags, "--lookup", 3)
    assert body(out) == expected(model, params, tokenizer, PROMPT, 24)
    assert re.search(r"; \d+ of \d+ guesses were right, and 23 tokens took \d+ passes;", out)


def test_a_cache_in_int8_gives_the_text_of_such_a_model(capsys, hf, model, params, tokenizer):
    out = call(
        capsys,
        "--checkpoint",
        hf,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        16,
        "--no-stream",
        "--cache",
        "int8",
    )
    assert body(out) == expected(model.clone(cache_dtype=jnp.int8), params, tokenizer, PROMPT, 16)


def test_without_a_length_the_window_is_filled(capsys, hf, model, params, tokenizer):
    out = call(capsys, "--checkpoint", hf, "--prompt", PROMPT)
    room = model.config.max_positions - len(tokenizer.encode(PROMPT).ids)
    assert body(out) == expected(model, params, tokenizer, PROMPT, room)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--checkpoint", "/nowhere/at/all", "--prompt", "a"], "/nowhere/at/all"),
        (["--prompt", ""], "a prompt is empty"),
        ([], "nothing to continue"),
        (["--prompt", "a" * 500], "tokens leaves no room"),
        (["--prompt", "a", "--max-new-tokens", "64"], "past the model's 64 positions"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: it is"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0: it is above 0, or 0"),
        (["--prompt", "a", "--top-p", "1.5"], "--top-p 1.5: it is"),
        (["--prompt", "a", "--top-k", "-2"], "--top-k -2: it is"),
        (["--prompt", "a", "--min-p", "2"], "--min-p 2.0: it is"),
        (["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty 0.0: it is"),
        (["--prompt", "a", "--mesh", "tensor=16"], "needs 16 devices"),
        (["--prompt", "a", "--mesh", "fsdp=-1,tensor=3"], "3 does not divide the 8 devices"),
        (["--prompt", "a", "--mesh", "width=2"], "unknown mesh axis 'width'"),
        (["--prompt", "a", "--mesh", "tensor=8"], "does not divide"),
        (["--prompt", "a", "--lookup", "0"], "--lookup 0: it is"),
        (["--prompt", "a", "--draft-tokens", "2"], "--draft-tokens 2: there is no --draft"),
        (["--prompt", "a", "--draft", "/nowhere/draft"], "/nowhere/draft"),
        (["--prompt", "a", "--hosts", "2"], "--hosts 2 plans a load: give --dry-run with it"),
        (["--prompt-file", "/nowhere/story.txt"], "cannot read /nowhere/story.txt"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, hf, flags, error):
    if "--checkpoint" not in flags:
        flags = ["--checkpoint", str(hf), *flags]
    with pytest.raises(SystemExit) as stop:
        entry.main(flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", captured.err)
    assert error in captured.err


def test_checkpoints_that_cannot_generate_are_one_line(capsys, hf, tmp_path):
    content = json.loads((hf / "config.json").read_text())
    for changes, error in (
        ({"architectures": ["LlamaForCausalLM"]}, "unknown model class"),
        ({}, "no tokenizer in"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content | changes))
        with pytest.raises(SystemExit):
            entry.main(["--checkpoint", str(tmp_path), "--prompt", "a"])
        assert re.fullmatch(rf"error: [^\n]*{error}[^\n]*\n", capsys.readouterr().err)


def test_a_draft_of_other_tokens_is_one_line(capsys, hf, tmp_path):
    for file in hf.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SystemExit):
        entry.main(["--checkpoint", str(hf), "--prompt", "a", "--draft", str(tmp_path)])
    assert re.fullmatch(
        r"error: --draft \S+: its tokens are others than those of \S+\n", capsys.readouterr().err
    )


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"), entry.user_errors():
        json.loads("1", parse_int=lambda _: int("x"))


def test_help_teaches_and_is_quick():
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "inference", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - started < 10  # 0.5 s on an idle machine; importing JAX alone is 1 s
    for word in ("examples:", "--prompt-file FILE", "--top-p", "(default: 1.0)", "--no-stream"):
        assert word in done.stdout


def test_help_does_not_import_jax():
    code = "import sys, inference.__main__; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
