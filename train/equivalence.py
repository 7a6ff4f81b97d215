"""`python -m train.equivalence`: whether one training step is the same on every mesh and schedule.

check the flags -> one problem -> the reference -> each mesh: its ledger, and where it parts -> exit 1 if one did
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from train.comparing import Case, Difference, Problem, Result

EXAMPLES = """\
Takes the same training step on several meshes and schedules and compares, tensor by
tensor: loss, every gradient, every updated parameter. The devices are simulated, unless
JAX_PLATFORMS or XLA_FLAGS say otherwise.

examples:
  python -m train.equivalence tiny-gptj --mesh data=8 --mesh fsdp=4,tensor=2
  python -m train.equivalence tiny-gptj --set n_layer=4 --mesh stage=4,data=2 \\
                              --schedule 1f1b --schedule gpipe --microbatches 8
  python -m train.equivalence tiny-mvp --mesh stage=2,tensor=2
  python -m train.equivalence tiny-bloom --model-class BloomForTokenClassification --mesh tensor=4

A ledger lists the differences, the worst first, each relative to the tensor's largest
element (train/comparing.py says why, and what of tensors that are zero). Limits: loss
1e-6, gradients and updated parameters 1e-5. Where a mesh parts beyond them, the first
module of the forward pass whose output differs is named, and the exit code is 1; bad
input is one line and exit code 2."""
Repeated = tyro.conf.UseAppendAction


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command line."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A preset, such as tiny-gptj, tiny-bloom, tiny-roberta, tiny-megatron-bert or tiny-mvp."""
    mesh: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="AXIS=N,...")] = ()
    """A mesh to compare, such as "stage=2,data=2,tensor=2" (-1: the rest of the devices); give several."""
    reference: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    """The mesh to compare with. By default one device."""
    schedule: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="NAME")] = ()
    """1f1b (the default), gpipe or interleaved; give several to run each on every mesh with stages."""
    virtual_stages: int | None = None
    """Pieces of the model that each stage holds in the interleaved schedule. By default 2."""
    microbatches: int | None = None
    """Pieces that a pipeline cuts the batch into. By default two a stage."""
    steps: int = 1
    """Training steps; tensors are compared after the last, losses at each."""
    rows: int | None = None
    """Rows of the batch. By default what the microbatches and all meshes divide."""
    length: int = 16
    """Tokens of a row."""
    seed: int = 0
    """Of parameters, batch and dropout."""
    model_class: str | None = None
    """Such as GPTJForSequenceClassification. By default the class that the family is pretrained as."""
    set: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="FIELD=VALUE")] = ()
    """A field of the config to change, such as n_layer=4; give several."""
    top: int | None = None
    """Tensors to list for each mesh. By default all."""
    devices: int = 8
    """Devices to simulate on a CPU."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags and compares.

    Args:
        args: the flags; None are those of the command line.
    """
    flags = tyro.cli(
        Flags,
        prog="python -m train.equivalence",
        args=args,
        description=EXAMPLES,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    from parallel.terminal import user_errors  # not before: --help should not wait for jax

    with user_errors():
        agrees = compare_all(flags)
    if not agrees:
        raise SystemExit(1)


def compare_all(flags: Flags) -> bool:
    """Prints every mesh's ledger.

    Returns:
        Whether all agree with the reference.

    Raises:
        ValueError: the flags do not fit the model, the devices or each other.
    """
    import parallel
    from parallel.terminal import model_of, simulate_devices
    from train import comparing
    from train.random_batch import draw_batch
    from train.step import has_dropout

    if not flags.mesh:
        raise ValueError("nothing to compare: give --mesh, such as --mesh data=2,tensor=2")
    for name in ("steps", "microbatches", "virtual_stages", "rows", "top"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it is at least 1")
    simulate_devices(flags.devices)
    model = model_of(flags.model, flags.model_class, flags.set)
    (reference, *_), cases = cases_of(flags.reference, flags), []
    for text in flags.mesh:
        cases += cases_of(text, flags)
    everywhere = [reference, *cases]
    for case in everywhere:  # what does not fit is found before anything is computed
        parallel.abstract_sharded_params(model, case.rules)
    stages = math.lcm(*(case.num_stages for case in everywhere))
    shards = math.lcm(*(case.rules.num_shards("act_batch") for case in everywhere if case.rules))
    microbatches = flags.microbatches or (2 * stages if stages > 1 else 1)
    rows = flags.rows or microbatches * shards * (1 if microbatches * shards >= 4 else 4)
    batch = draw_batch(model, rows, flags.length, flags.seed)
    problem = comparing.make_problem(
        model, batch, seed=flags.seed, microbatches=microbatches, num_steps=flags.steps
    )
    masks = "with dropout" if has_dropout(model) else "no dropout"
    pieces = f"in {microbatches} microbatches" if stages > 1 else "whole"
    if microbatches > 1 and has_dropout(model):
        pieces = f"in {microbatches} microbatches (without stages: as many slices, accumulated)"
    say(f"{flags.model}: {type(model).__name__}, {masks}, batch [{rows}, {flags.length}] {pieces}")
    expected = comparing.run_case(problem, reference)
    say(f"reference: {reference.label}, loss {', '.join(f'{loss:.7g}' for loss in expected.losses)}")
    outputs: list[Any] = []  # of the reference's modules: computed once, and only if a mesh parts
    agree = 0
    for case in cases:
        found = comparing.run_case(problem, case)
        differences = comparing.compare(expected, found)
        agrees = all(one.is_within for one in differences)
        agree += agrees
        for line in ledger(case.label, differences, flags.top):
            say(line)
        if not agrees:
            outputs = outputs or comparing.module_outputs(problem, reference.rules)
            say(f"  {where_it_parts(outputs, problem, case, expected, found)}")
    say(f"\n{agree} of {len(cases)} agree with {reference.label}")
    return agree == len(cases)


def cases_of(text: str, flags: Flags) -> list["Case"]:
    """A mesh under every schedule; one without stages runs once. An empty text is one device.

    Raises:
        ValueError: no such mesh or schedule.
    """
    from parallel.schedule import SCHEDULES
    from parallel.terminal import rules_of
    from train.comparing import Case

    schedules = flags.schedule or ("1f1b",)
    if unknown := [name for name in schedules if name not in SCHEDULES]:
        raise ValueError(f"schedule {unknown[0]!r} is unknown: choose from {', '.join(SCHEDULES)}")
    rules = rules_of(text)
    if rules is None or rules.num_shards("layers") == 1:
        return [Case(rules)]
    pieces = {"interleaved": flags.virtual_stages}
    return [Case(rules, name, pieces.get(name)) for name in schedules]


def ledger(label: str, found: Sequence["Difference"], top: int | None) -> Iterator[str]:
    """The lines of a mesh's ledger."""
    beyond = sum(not one.is_within for one in found)
    yield f"\n{label}: {f'DIFFERS in {beyond} of {len(found)}' if beyond else f'agrees in all {len(found)}'}"
    yield "         difference    limit  what"
    losses = [one for one in found if one.kind == "loss"]
    tensors = [one for one in found if one.kind != "loss"]
    listed = tensors[:top]
    for one in [*losses, *listed]:
        verdict = "pass" if one.is_within else "FAIL"
        yield f"  {verdict}  {one.value:12.1e} {one.tolerance:8.0e}  {one.kind} {one.name}"
    if len(listed) < len(tensors):
        yield f"  ... and {len(tensors) - len(listed)} smaller ones"


def where_it_parts(
    outputs: Any, problem: "Problem", case: "Case", expected: "Result", found: "Result"
) -> str:
    """A line on where a mesh parts from the reference, forward or else going back.

    Args:
        outputs: of the reference's modules.
        problem, case: what was run.
        expected, found: the reference's result and the mesh's.
    """
    from train import comparing

    if parting := comparing.first_parting(outputs, comparing.module_outputs(problem, case.rules)):
        name, difference = parting
        return f"the first module whose output differs is {name}, by {difference:.1e} of its largest element"
    agrees = "every module's output agrees in a forward pass without dropout and schedule"
    names = [name for name, _ in outputs]
    if back := comparing.first_parting_back(names, expected, found):
        return f"{agrees}; going back, the first module whose gradients differ is {back}"
    return f"{agrees}, and so do the gradients: look at the loss, dropout, the schedule or the update"


def say(line: str) -> None:
    """Prints a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
