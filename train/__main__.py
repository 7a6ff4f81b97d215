"""`python -m train`: from a gin file to a trained model, read top to bottom.

parse -> check -> data -> model -> state (new or restored) -> steps (log, evaluate, save) -> close
"""

import dataclasses
import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from train.cli import StopRequest, user_errors
from train.experiment import DATA, TRAIN, Experiment
from train.gin_names import describe

if TYPE_CHECKING:
    from train.data.tokens import TokenData

Repeated = tyro.conf.UseAppendAction


@dataclasses.dataclass(frozen=True)
class Flags:
    """Trains a model that gin files describe. Run the same command again to go on where a run stopped."""

    gin_file: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="FILE")] = ()
    """A gin file; give several to read them in order. Found from here or from the shipped configs/."""
    gin_param: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="NAME.PARAMETER=VALUE")] = ()
    """A setting that wins over the files. Texts keep their quotes: --gin_param="data.path='my/texts'"."""
    coordinator_address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Where process 0 of several listens. Not needed in Open MPI, SLURM and TPU pods, nor where
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set."""
    num_processes: int | None = None
    """How many processes take part; 1 runs alone, whatever started it."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    start_timeout: float = 300.0
    """Seconds to wait for all processes."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags (those of the command line if `args` is None) and trains."""
    flags = tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Flags),
        prog="python -m train",
        args=args,
        description=_help(),
        use_underscores=True,
    )
    with user_errors():
        if not flags.gin_file and not flags.gin_param:
            raise ValueError("nothing to train: give --gin_file, such as --gin_file=configs/quickstart.gin")
        import parallel

        parallel.initialize(
            flags.coordinator_address, flags.num_processes, flags.process_id, timeout=flags.start_timeout
        )
        train(Experiment(flags.gin_file, flags.gin_param))


def train(experiment: Experiment) -> None:
    """Runs an experiment to its last step, from its newest checkpoint if it has one.

    Args:
        experiment: what to train; its workdir receives checkpoints/STEP/, metrics.jsonl, TensorBoard events,
            config.gin and the loss curve.

    Raises:
        ValueError: the experiment does not fit the devices, the data or the checkpoint that is there.
        OSError: a folder cannot be read or written.
    """
    import jax

    import modelzoo
    import parallel
    from parallel import checkpoint
    from parallel.cluster import process_zero_first
    from train.data import batches as text
    from train.data.tokens import prepare_tokens
    from train.metrics import RunLog, flops_per_token
    from train.saving import Saver
    from train.state import abstract_state, init_state
    from train.step import make_eval_step, make_train_step

    # What can be wrong is found before anything slow: mesh, model, folder, an earlier run in it.
    run, workdir = experiment.run, Path(experiment.run.workdir)
    rules, model, optimizer = experiment.make_rules(), experiment.model, experiment.optimizer
    train_step = make_train_step(
        model,
        optimizer,
        rules=rules,
        microbatches=run.microbatches,
        schedule=run.schedule,
        virtual_stages=run.virtual_stages,
        accumulate=run.accumulate,
        learning_rate=experiment.learning_rate,
    )
    eval_step = make_eval_step(model, rules=rules)
    experiment.check_workdir()
    folder = workdir / checkpoint.CHECKPOINTS
    start = max(checkpoint.finished_steps(folder), default=0)
    if start:
        experiment.check_resume(folder / str(start))
    if start >= run.num_steps:
        say(f"complete: {workdir} is at step {start} of {run.num_steps}; train.num_steps takes it further")
        return
    for binding in experiment.unused():
        say(f"note: {binding} has no effect on this run")
    mesh = ", ".join(f"{axis} {size}" for axis, size in rules.mesh.shape.items() if size > 1) or "one device"
    say(f"model: {run.model_class}, {modelzoo.num_params(model):,} parameters, {run.dtype}, on {mesh}")

    # Data: tokens on disk, then batches whose order follows from (seed, step) alone.
    with process_zero_first("data"):
        tokens = prepare_tokens(**experiment.data, model_vocab_size=experiment.config.vocab_size)
    check_end_of_text(experiment, tokens)
    check_agreement(start, tokens)
    say(
        f"data: {tokens.manifest['documents']:,} documents, {len(tokens.train):,} tokens to train on and "
        f"{len(tokens.validation):,} held out, in {tokens.folder}"
    )
    shard = text.batch_shard(parallel.batch_sharding(rules), run.global_batch_size)
    sizes: Any = dict(
        sequence_length=run.sequence_length, global_batch_size=run.global_batch_size, shard=shard
    )
    batches = iter(text.train_batches(tokens.train, seed=run.seed, **sizes))

    def evaluate(params: Any) -> float | None:
        held_out = text.validation_batches(tokens.validation, max_batches=run.eval_batches, **sizes)
        sums = [eval_step(params, batch) for batch in held_out]
        counted = sum(int(s["tokens"]) for s in sums)
        return sum(float(s["loss_sum"]) for s in sums) / counted if counted else None

    texts = {"config.gin": experiment.text, "tokenizer.json": tokens.tokenizer_file.read_text()}
    saver = Saver(workdir, model=model, every=run.checkpoint_every, keep=run.keep_checkpoints, texts=texts)

    # State: that of the newest checkpoint with its place in the data, or a new one.
    if start:
        state, extra = saver.restore(abstract_state(model, optimizer, rules=rules))
        check_same_data(experiment, tokens, extra)
        batches.set_state(extra["batches"])
        say(f"going on from step {start} of {run.num_steps}")
    else:
        state = init_state(model, optimizer, rules=rules, rng=jax.random.key(run.seed))
    if jax.process_index() == 0:
        (workdir / "config.gin").write_text(experiment.text)

    # The loop. Nothing in it waits for the device but a line of the log, an evaluation and a checkpoint.
    log = RunLog(
        workdir,
        num_steps=run.num_steps,
        tokens_per_step=run.global_batch_size * run.sequence_length,
        flops_per_token=flops_per_token(model, run.sequence_length),
        log_every=run.log_every,
        start_step=start,
    )
    with log, saver, StopRequest() as stop:
        for at in range(start + 1, run.num_steps + 1):
            state, metrics = train_step(state, next(batches))
            log.log(at, metrics)
            done = at == run.num_steps
            paused = time.perf_counter()
            if (done or at % (run.eval_every or run.num_steps) == 0) and (
                loss := evaluate(state.params)
            ) is not None:
                log.eval(at, loss)
            extra = {"batches": batches.get_state(), "fingerprint": tokens.manifest["fingerprint"]}
            stopping = stop.after(at)
            saver.maybe_save(at, state, extra, force=done or stopping)
            log.pause(time.perf_counter() - paused)
            if stopping and not done:
                break
    if not done:
        say(f"stopped at step {at} and saved: run the same command again to go on")
        raise SystemExit(stop.exit_code)
    say(f"done: step {at}\n  files  {workdir}\n  model  {folder / str(at)}\n  plot   {log.plot}")


def check_end_of_text(experiment: Experiment, tokens: "TokenData") -> None:
    """Checks that the model ends a text with the token that the data ends documents with."""
    given, actual = experiment.config.eos_token_id, tokens.manifest["end_of_text_id"]
    if given != actual:
        key = f"{experiment.family}.eos_token_id"
        raise ValueError(
            f"{key} = {given}{experiment.settings.where(key)}, but documents end with token {actual} "
            f"({tokens.manifest['end_of_text']}): set {key} = {actual}"
        )


def check_same_data(experiment: Experiment, tokens: "TokenData", extra: dict[str, Any]) -> None:
    """Checks that a checkpoint was trained on these tokens."""
    if extra["fingerprint"] != tokens.manifest["fingerprint"] and not experiment.run.allow_changes:
        raise ValueError(
            f"data.path = {tokens.manifest['path']!r}: the text has changed since the checkpoint in "
            f"{experiment.run.workdir} was written; bring the old text back, choose another train.workdir, "
            'or go on with the new one by --gin_param="train.allow_changes=True"'
        )


def check_agreement(start: int, tokens: "TokenData") -> None:
    """Checks that all processes go on from one step and read one text."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    fingerprint = np.frombuffer(bytes.fromhex(tokens.manifest["fingerprint"]), np.uint32)
    found: Any = multihost_utils.process_allgather(np.array([start, *fingerprint.tolist()], np.uint32))
    for process, (other, *text) in enumerate(found.tolist()):
        if other != found[0][0]:
            raise ValueError(
                f"train.workdir: process {process} finds step {other} there, process 0 step {found[0][0]}: give all "
                "processes one folder"
            )
        if text != found[0][1:].tolist():
            raise ValueError(
                f"data.path: process {process} reads another text than process 0: give all the same files"
            )


def say(line: str) -> None:
    """Prints a line, once over all processes."""
    import jax

    if jax.process_index() == 0:
        print(line, flush=True)


def _help() -> str:
    lines = [*describe("train", TRAIN), *describe("data", DATA)]
    return "\n".join(
        (
            inspect.cleandoc(Flags.__doc__ or ""),
            "",
            "examples:",
            "  python -m train --gin_file=configs/quickstart.gin",
            "  python -m train --gin_file=quickstart.gin --gin_param=\"data.path='my/texts'\" \\",
            "                  --gin_param=\"train.workdir='runs/mine'\"",
            "  python -m train --gin_file=quickstart.gin --gin_file=parallel/fsdp.gin \\",
            "                  --gin_param=train.num_steps=500",
            "  python -m train --gin_file=big.gin --coordinator_address=10.0.0.1:8476 --num_processes=4 \\",
            "                  --process_id=0     # one on each host; pods and SLURM need none of the three",
            "",
            "settings (also: the model's by family, as GPTJ.n_layer; mesh.AXIS; rules.AXIS; adamw.b2 ...):",
            *(f"  {line}" for line in lines),
        )
    )


if __name__ == "__main__":
    main()
