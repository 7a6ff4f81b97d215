"""The log of a run: what it writes, and that a resumed run does not write it twice."""

import json
import re

import jax.numpy as jnp
import pytest

import modelzoo
from train.metrics import RunLog, flops_per_token, peak_flops


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def run(workdir, first, last, **kwargs):
    with RunLog(workdir, num_steps=20, tokens_per_step=100, log_every=5, start_step=first - 1, **kwargs) as log:
        for step in range(first, last + 1):
            log.log(step, {"loss": jnp.float32(10 / step), "grad_norm": jnp.float32(1)})
        log.eval(last, 0.5)
    return log


def test_writes_lines_files_and_plot(tmp_path, capsys):
    log = run(tmp_path, 1, 20, flops_per_token=1e6, peak=1e12)
    printed = capsys.readouterr().out
    steps = [int(step) for step in re.findall(r"^step (\d+).* loss [\d.]+", printed, re.MULTILINE)]
    assert steps == [1, 5, 10, 15, 20, 20]
    assert "loss 10.0000" in printed
    assert "perplexity 1.65" in printed
    assert "MFU" in printed
    found = lines(tmp_path)
    assert [line["step"] for line in found] == steps
    last = found[-2]
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * 1e6 / 1e12)
    assert last["eta_seconds"] == 0
    assert log.plot.read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_resumed_run_drops_what_it_will_repeat(tmp_path):
    run(tmp_path, 1, 12)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "los')  # a line that a crash cut off
    run(tmp_path, 8, 20)
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == [1, 5, 8, 10, 15, 20, 20]


def test_no_steps_at_all_still_closes(tmp_path):
    with RunLog(tmp_path, num_steps=1, tokens_per_step=1) as log:
        pass
    assert log.plot.exists()


def test_model_flops_follow_palm():
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("gpt-j-6b"))
    table = 50400 * 4096
    assert flops_per_token(model, 2048) == 6 * (6_050_882_784 - table) + 12 * 28 * 4096 * 2048


def test_a_cpu_has_a_measured_peak():
    peak, source = peak_flops()
    assert 1e8 < peak < 1e14
    assert source.startswith("measured")
