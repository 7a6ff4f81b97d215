"""`python -m train`: from a gin file to a trained model, read top to bottom.

parse -> check -> data -> model -> state (new or restored) -> steps (log, evaluate, save) -> close
"""

import dataclasses
import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from train.cli import StopRequest, user_errors
from train.experiment import DATA, LORA, OBJECTIVE, TASK, TRAIN, Experiment
from train.gin_names import describe

Repeated = tyro.conf.UseAppendAction
BEGAN = time.time()


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
    list: bool = False
    """Say what can be set, instead of training: name, type, default, the value that the files give it and where, what
    uses it; with NAMES what each is, too."""
    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME ...]")] = ()
    """With --list: only settings whose names hold one of these, such as GPTJ or learning_rate."""


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
        if flags.list:
            _list(flags)
            return
        if flags.names:
            raise ValueError(
                f"{flags.names[0]}: gin files follow --gin_file=, and names to list follow --list"
            )
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
    from modelzoo.model import describe_tuning
    from parallel import checkpoint
    from train.certificate import HashedBatches
    from train.goodput import describe as describe_shares
    from train.halting import Halting
    from train.integrity import newest_sound
    from train.metrics import RunLog, flops_per_token, import_wandb
    from train.profiling import Profile
    from train.run_page import write_page
    from train.saving import Saver
    from train.state import abstract_state, init_state
    from train.work import check_agreement, check_same_data, open_work

    # What can be wrong is found before anything slow: mesh, model, folder, an earlier run in it.
    run, workdir = experiment.run, Path(experiment.run.workdir)
    rules, model, optimizer = experiment.make_rules(), experiment.model, experiment.optimizer
    train_step = experiment.make_step(rules)
    if run.wandb is not None:
        import_wandb(run.wandb)
    experiment.check_workdir()
    folder = workdir / checkpoint.CHECKPOINTS
    start = newest_sound(folder)
    if start:
        experiment.check_resume(folder / str(start))
    if start >= run.num_steps:
        say(f"complete: {workdir} is at step {start} of {run.num_steps}; train.num_steps takes it further")
        return
    for binding in experiment.unused():
        say(f"note: {binding} has no effect on this run")
    mesh = ", ".join(f"{axis} {size}" for axis, size in rules.mesh.shape.items() if size > 1) or "one device"
    say(f"model: {run.model_class}, {modelzoo.num_params(model):,} parameters, {run.dtype}, on {mesh}")
    if tuning := describe_tuning(model):
        say(f"tuning: {tuning}")

    # Data: plain text or labelled examples, and batches whose order follows from (seed, step) alone.
    work = open_work(experiment, rules)
    check_agreement(start, work)
    say(f"data: {work.summary}")
    batches = HashedBatches(work.batches, experiment.shard(rules))
    saver = Saver(
        workdir,
        model=model,
        every=run.checkpoint_every,
        keep=run.keep_checkpoints,
        keep_best=run.keep_best,
        texts={"config.gin": experiment.text, **work.texts},
        batches=batches,
        mesh_shape=rules.mesh.shape,
    )

    # State: that of the newest checkpoint with its place in the data, or a new one.
    if start:
        state, extra = saver.restore(
            abstract_state(model, optimizer, rules=rules, options=experiment.options)
        )
        check_same_data(experiment, work, extra["fingerprint"])
        batches.set_state(extra["batches"], start, saver.certificate(start))
        say(f"going on from step {start} of {run.num_steps}")
    else:
        key = jax.random.key(run.seed)
        params = None if experiment.start is None else experiment.start.read_params(model, rules, key)
        state = init_state(model, optimizer, rules=rules, rng=key, params=params, options=experiment.options)
        del params
    if jax.process_index() == 0:
        (workdir / "config.gin").write_text(experiment.text)

    # The loop. Nothing in it waits for the device but a line of the log, an evaluation and a checkpoint.
    log = RunLog(
        workdir,
        num_steps=run.num_steps,
        tokens_per_step=lambda steps: run.batch_sizes.before(steps) * run.sequence_length,
        flops_per_token=flops_per_token(model, run.sequence_length),
        log_every=run.log_every,
        start_step=start,
        began=BEGAN,
        wandb=run.wandb,
    )
    halting = Halting(workdir, batches, every=run.log_every) if run.stop_on_nonfinite else None
    with log, saver, Profile(workdir, run.profile_steps) as profile, StopRequest() as stop:
        for at in range(start + 1, run.num_steps + 1):
            batch = log.take(batches)
            profile.before(at)
            state, metrics = train_step(state, batch)
            profile.after(at, metrics)
            log.log(at, metrics)
            done, stopping = at == run.num_steps, stop.after(at)
            evaluating = done or at % (run.eval_every or run.num_steps) == 0
            extra = {"batches": batches.get_state(), "fingerprint": work.fingerprint}
            if halting is not None:
                halting.check(at, state, batch, extra, saver, now=stopping or evaluating or saver.is_due(at))
            found: dict[str, float] = {}
            if evaluating:
                with log.during("evaluation"):
                    found = work.evaluate(state.averaged)
                if found:
                    log.eval(at, found)
            with log.during("checkpoint"):
                saver.maybe_save(at, state, extra, force=done or stopping, values=found)
            if stopping and not done:
                break
    page = write_page(workdir, experiment.flat) if jax.process_index() == 0 else None
    if not done:
        say(f"stopped at step {at} and saved: run the same command again to go on")
        raise SystemExit(stop.exit_code)
    best = (
        f"\n  best   {folder / str(saver.best[0])} ({run.keep_best} {saver.best[1]:.4g})"
        if saver.best
        else ""
    )
    say(
        f"done: step {at}\n  files  {workdir}\n  model  {folder / str(at)}{best}\n  plot   {log.plot}\n  page   {page}"
    )
    say(f"  time   {describe_shares(log.clock.shares())}")


def _list(flags: Flags) -> None:
    from train.experiment import CONFIGS, run_names
    from train.gin_files import Settings
    from train.listing import rows, show

    settings = Settings(run_names(), flags.gin_file, flags.gin_param, [CONFIGS], complete=False)
    show(rows(settings, flags.names), with_texts=bool(flags.names))


def say(line: str) -> None:
    """Prints a line, once over all processes."""
    import jax

    if jax.process_index() == 0:
        print(line, flush=True)


def _help() -> str:
    lines = [
        *describe("train", TRAIN),
        *describe("data", DATA),
        *describe("task", TASK),
        *describe("objective", OBJECTIVE),
        *describe("lora", LORA),
    ]
    return "\n".join(
        (
            inspect.cleandoc(Flags.__doc__ or ""),
            "",
            "examples:",
            "  python -m train --gin_file=configs/quickstart.gin",
            "  python -m train --gin_file=quickstart.gin --gin_param=\"data.path='my/texts'\" \\",
            "                  --gin_param=\"train.workdir='runs/mine'\"",
            "  python -m train --gin_file=quickstart.gin --list              # what can be set, and what is",
            "  python -m train --list learning_rate                         # every setting of this name",
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
