"""`python -m train.verify RUN`: replays a run between two of its checkpoints and says whether it is what it claims.

Every batch must have the hash that the run wrote down, and the state that the replay arrives at the digests of the
checkpoint: bit for bit on the mesh, processes, kind of device and jax of the run. Where one of these differs, sums are
taken in another order, and the states are compared within a tolerance.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from train.cli import user_errors

Repeated = tyro.conf.UseAppendAction


@dataclasses.dataclass(frozen=True)
class Flags:
    """Replays a run from one of its checkpoints and compares. Exit code 0: it is what it claims; 1: it is not."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    from_step: Annotated[int | None, tyro.conf.arg(name="from", metavar="STEP")] = None
    """The checkpoint to start from, 0 being the run's start; the default is the last but one."""
    to_step: Annotated[int | None, tyro.conf.arg(name="to", metavar="STEP")] = None
    """The checkpoint to arrive at; those between are compared too. The default is the next one."""
    gin_param: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="NAME.PARAMETER=VALUE")] = ()
    """A setting that wins over the run's own, such as --gin_param=mesh.data=1 for another mesh."""
    tolerance: float = 1e-4
    """Where bits cannot be compared: a tensor's difference from the checkpoint's, relative to how far the replay
    moved it (of what it did not move: to its size), at most."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags (those of the command line if `args` is None), replays, and exits with 0 or 1."""
    flags = tyro.cli(Flags, prog="python -m train.verify", args=args, use_underscores=True)
    with user_errors():
        import parallel

        parallel.initialize()
        differs = replay(flags)
    sys.exit(1 if differs else 0)


def replay(flags: Flags) -> bool:
    """Replays and prints what it finds.

    Args:
        flags: the run and the steps.

    Returns:
        Whether anything differs.

    Raises:
        ValueError: the run has no such steps, or no certificates.
        OSError: something cannot be read.
    """
    import jax

    from parallel import checkpoint
    from train import certificate
    from train.certificate import HashedBatches
    from train.experiment import Experiment
    from train.integrity import damage
    from train.saving import Saver
    from train.state import abstract_state, init_state
    from train.work import check_same_data, open_work

    folder = checkpoint.as_path(flags.run) / checkpoint.CHECKPOINTS
    first, stops = choose_steps(checkpoint.finished_steps(folder), flags.from_step, flags.to_step, flags.run)
    for step in [first] * bool(first) + stops:
        if wrong := damage(folder / str(step)):
            say(f"DIFFERS: checkpoint {step}: {wrong}")
            return True
    config = folder / str(stops[0]) / "config.gin"
    experiment = Experiment([str(config)], [f"train.workdir={flags.run!r}", *flags.gin_param])
    run, rules, model = experiment.run, experiment.make_rules(), experiment.model
    work = open_work(experiment, rules)
    batches = HashedBatches(work.batches, experiment.shard(rules))
    saver = Saver(flags.run, model=model, every=1, read_only=True)
    target = abstract_state(model, experiment.optimizer, rules=rules, options=experiment.options)
    if first:
        state, extra = saver.restore(target, first)
        check_same_data(experiment, work, extra["fingerprint"])
        batches.set_state(extra["batches"], first, saver.certificate(first))
    else:
        key = jax.random.key(run.seed)
        params = None if experiment.start is None else experiment.start.read_params(model, rules, key)
        begin: dict[str, Any] = dict(rules=rules, rng=key, params=params, options=experiment.options)
        state = init_state(model, experiment.optimizer, **begin)
    here = certificate.circumstances(rules.mesh.shape)
    train_step = experiment.make_step(rules)
    for start, stop in zip([first, *stops], stops, strict=False):
        claimed = saver.certificate(stop)
        if claimed is None:
            raise ValueError(f"{folder / str(stop)} has no certificate: it is of an older version")
        before = saver.restore(target, start)[0] if start else None
        for _ in range(start, stop):
            state, _ = train_step(state, next(batches))
        if wrong := batches_differ(batches.certify(), claimed["batches"]):
            say(f"DIFFERS: {wrong}")
            return True
        other = [f"{name} {claimed['made'][name]} there, {value} here" for name, value in here.items()]
        other = [text for text, name in zip(other, here, strict=True) if claimed["made"][name] != here[name]]
        names = certificate.differing(saver.digests(state), claimed["state"])
        if not names:
            say(
                f"steps {start} to {stop}: {stop - start} batches and {len(claimed['state'])} tensors are bit-identical"
            )
            continue
        theirs = saver.restore(target, stop)[0]
        found = distances(model, state, theirs, before)
        if not other:
            say(
                f"DIFFERS: step {stop}: {names[0]} is not what the replay gives: {found[names[0]]:.3g} of its change "
                f"({len(names)} of {len(claimed['state'])} tensors differ)"
            )
            return True
        worst = max(found, key=lambda name: found[name])
        far = not found[worst] <= flags.tolerance
        say(
            f"{'DIFFERS: ' if far else ''}steps {start} to {stop}: {stop - start} batches are bit-identical; compared "
            f"within a tolerance, not by bits ({'; '.join(other)}): {worst} differs most, by {found[worst]:.3g} of its "
            f"change, where {flags.tolerance:g} is allowed"
        )
        if far:
            return True
    say(f"{flags.run}: steps {first} to {stops[-1]} are what they claim to be")
    return False


def choose_steps(finished: list[int], first: int | None, last: int | None, run: str) -> tuple[int, list[int]]:
    """Where to start, and the checkpoints to compare with.

    Args:
        finished: steps of the run's checkpoints, in order.
        first, last: as asked for; None chooses.
        run: its folder, for messages.

    Raises:
        ValueError: there are no such checkpoints.
    """
    have = ", ".join(map(str, finished)) or "none"
    if not finished:
        raise ValueError(f"{run}: it has no finished checkpoint")
    if last is not None and last not in finished:
        raise ValueError(f"--to {last}: {run} has no such checkpoint: it has {have}")
    if first is None:
        earlier = [step for step in finished if step < (finished[-1] if last is None else last)]
        first = earlier[-1] if earlier else 0
    if first and first not in finished:
        raise ValueError(
            f"--from {first}: {run} has no such checkpoint: it has {have}, and 0 is the run's start"
        )
    later = [step for step in finished if step > first and (last is None or step <= last)]
    if not later:
        raise ValueError(f"--from {first}: {run} has no checkpoint after it: it has {have}")
    return first, later[:1] if last is None else later


def batches_differ(found: dict[str, Any], claimed: dict[str, Any]) -> str | None:
    """The first batch that differs, in words, or None."""
    theirs = dict(enumerate(claimed["hashes"], claimed["first"]))
    for step, text in enumerate(found["hashes"], found["first"]):
        if theirs.get(step, text) != text:
            return (
                f"the batch of step {step} has hash {text[:16]}, and the run learned from {theirs[step][:16]}"
            )
    if found["chain"] != claimed["chain"]:
        last = found["first"] + len(found["hashes"]) - 1
        return f"one of the batches up to step {last} is not the one that the run learned from"
    return None


def distances(model: Any, ours: Any, theirs: Any, before: Any) -> dict[str, float]:
    """How far two states are apart, tensor by tensor.

    Args:
        model: the states'.
        ours, theirs: states on one mesh.
        before: the state that they come from; None measures against the tensors' size.

    Returns:
        {name: Euclidean distance, relative to what `theirs` moved from `before`, or to its size if it did not}.
    """
    import jax
    import jax.numpy as jnp

    from train.canonical import leaves_of

    @jax.jit
    def measure(a: Any, b: Any, c: Any) -> Any:
        a, b, c = (x.astype(jnp.float32) for x in (a, b, c))
        return [jnp.sqrt(jnp.sum(jnp.square(x))) for x in (a - b, b - c, b)]

    ours, theirs = leaves_of(model, ours), leaves_of(model, theirs)
    start = None if before is None else leaves_of(model, before)
    found = {}
    for name, (array, _) in ours.items():
        b = theirs[name][0]
        apart, moved, size = map(
            float, measure(array, b, jnp.zeros_like(b) if start is None else start[name][0])
        )
        found[name] = apart / (moved or size or 1.0) if apart else 0.0
    return found


def say(line: str) -> None:
    """Prints a line, once over all processes."""
    import jax

    if jax.process_index() == 0:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
