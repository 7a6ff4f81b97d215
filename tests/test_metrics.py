"""The log of a run: what it writes, and that a resumed run does not write it twice."""

import json
import math
import re
import struct
import sys
import time

import jax.numpy as jnp
import pytest

import modelzoo
from train.metrics import RunLog, flops_per_token, peak_flops


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def run(workdir, first, last, **kwargs):
    with RunLog(
        workdir, num_steps=20, tokens_per_step=100, log_every=5, start_step=first - 1, **kwargs
    ) as log:
        for step in range(first, last + 1):
            log.log(step, {"loss": jnp.float32(10 / step), "grad_norm": jnp.float32(1)})
        log.eval(last, {"loss": 0.5, "perplexity": math.exp(0.5)})
    return log


def test_writes_lines_files_and_plot(tmp_path, capsys):
    log = run(tmp_path, 1, 20, flops_per_token=1e6, peak=1e12)
    printed = capsys.readouterr().out
    steps = [int(step) for step in re.findall(r"^step (\d+).* loss [\d.]+", printed, re.MULTILINE)]
    assert steps == [1, 5, 10, 15, 20, 20]
    assert "loss 10.0000" in printed
    assert "perplexity 1.65" in printed
    assert re.search(r"[\d.]+% MFU", printed)
    assert re.search(r"step 15/20 .* 0:00:\d\d left", printed)
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


def test_a_loss_that_is_no_number_is_null(tmp_path):
    with RunLog(tmp_path, num_steps=1, tokens_per_step=1) as log:
        log.log(1, {"loss": jnp.float32(jnp.nan)})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"loss": null' in line


def test_only_the_steps_that_are_shown_are_waited_for(tmp_path):
    class Unread:
        def __float__(self):
            raise AssertionError("read")

    with RunLog(tmp_path, num_steps=9, tokens_per_step=1, log_every=4) as log:
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": Unread()})
        with pytest.raises(AssertionError, match="read"):
            log.log(4, {"loss": Unread()})


def test_pauses_do_not_count(tmp_path):
    with RunLog(tmp_path, num_steps=2, tokens_per_step=100, log_every=1) as log:
        log.log(1, {"loss": 1.0})
        time.sleep(0.2)
        log.pause(0.199)
        log.log(2, {"loss": 1.0})
    assert lines(tmp_path)[1]["tokens_per_second"] > 100 / 0.1


def test_a_measured_peak_is_not_called_mfu(tmp_path, capsys):
    with RunLog(tmp_path, num_steps=2, tokens_per_step=1, flops_per_token=1e3, log_every=1) as log:
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 1.0})
    assert "% of the matmul peak" in capsys.readouterr().out


def test_model_flops_follow_palm():
    model = modelzoo.GPTJForCausalLM(modelzoo.get_config("gpt-j-6b"))
    table = 50400 * 4096
    assert flops_per_token(model, 2048) == 6 * (6_050_882_784 - table) + 12 * 28 * 4096 * 2048


def test_a_cpu_has_a_measured_peak():
    peak, source = peak_flops()
    assert 1e8 < peak < 1e14
    assert source.startswith("measured")


def test_says_where_time_and_memory_go(tmp_path):
    with RunLog(tmp_path, num_steps=2, tokens_per_step=100, log_every=1) as log:
        batches = iter([{"x": 1}, {"x": 2}])
        assert log.take(batches) == {"x": 1}
        log.log(1, {"loss": jnp.float32(1)})
        with log.during("checkpoint"):
            time.sleep(0.05)
        log.take(batches)
        log.log(2, {"loss": jnp.float32(1), "grad_norm/embed": jnp.float32(0.5)})
    first, second = lines(tmp_path)
    assert 0 <= second["input_wait"] < 1
    assert second["tokens_per_second"] > 100 / 0.05
    assert 0 <= second["goodput"] <= 1
    assert second["host_bytes_peak"] >= second["host_bytes"] > 1e6
    assert second["grad_norm/embed"] == 0.5
    assert json.loads((tmp_path / "goodput.json").read_text())[0]["seconds"]["checkpoint"] >= 0.05
    assert "compile_seconds" in first


def test_a_hidden_wait_does_not_count(tmp_path):
    class Running:
        def is_ready(self):
            return False

        def __float__(self):
            return 1.0

    def slowly():
        time.sleep(0.05)
        yield {}

    with RunLog(tmp_path, num_steps=9, tokens_per_step=1) as log:
        log.log(1, {"loss": Running()})
        log.take(slowly())
        assert log.clock.spent["input"] == 0
        log.log(2, {"loss": 1.0})
        log.take(slowly())
        assert log.clock.spent["input"] >= 0.05


def told_to_wandb(file):
    """(project, run id, the lines logged) of a run that Weights & Biases keeps on disk: a LevelDB log of messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, begun = file.read_bytes(), 7, b""
    project, run, lines = "", "", []
    while at < len(data):
        left = 2**15 - at % 2**15  # of a block
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        begun += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind not in (1, 4):  # whole, or the last part
            continue
        record, begun = Record.FromString(begun), b""
        if record.HasField("run"):
            project, run = record.run.project, record.run.run_id
        elif record.HasField("history"):
            items = record.history.item
            line = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            lines.append((record.history.step.num, line))
    return project, run, lines


def test_weights_and_biases_gets_every_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in ((1, 2), (3,)):
        with RunLog(
            tmp_path, num_steps=3, tokens_per_step=1, log_every=1, start_step=steps[0] - 1, wandb="project"
        ) as log:
            for at in steps:
                log.log(at, {"loss": 2.0 / at})
            log.eval(steps[-1], {"loss": 5.0})
    files = sorted(
        (tmp_path / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime
    )
    first, second = map(told_to_wandb, files)
    assert first[:2] == second[:2] == ("project", (tmp_path / "wandb-id").read_text())  # the same run goes on
    told = [(step, line["loss"]) for step, line in first[2] + second[2] if "loss" in line]
    assert told == [(1, 2.0), (2, 1.0), (3, 2.0 / 3)]
    assert [line["eval_loss"] for _, line in first[2] + second[2] if "eval_loss" in line] == [5.0, 5.0]


def test_weights_and_biases_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ValueError, match=r"train\.wandb = 'p': the package wandb is not installed: pip install"
    ):
        RunLog(tmp_path, num_steps=1, tokens_per_step=1, wandb="p")
