"""`python -m train.plan`: what a training step takes on chips that are not here, and whether it fits them.

gin files -> the arithmetic -> the TPU compiler, if it is installed -> a page (--search: a ranked table) -> exit code
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from train.cli import user_errors

EXAMPLES = """\
Plans a training step on TPUs or GPUs that are not here: memory of a chip by class, every
collective, FLOPs, a roofline, predicted time and what limits it. The step of the gin
files is compiled by the TPU's own compiler (the extra `tpu`; no TPU is needed), nothing
is allocated; without it, and for GPUs, the page is arithmetic alone and says so.

examples:
  python -m train.plan --gin_file=pretrain/gptj-6b.gin --topology v5p:4x4x4 --mesh data=4,fsdp=16
  python -m train.plan --gin_file=pretrain/bloom-176b.gin --topology v5p:8x8x8 \\
                       --mesh fsdp=64,tensor=8,sequence --remat dots --picture plan.svg
  python -m train.plan --gin_file=pretrain/gptj-6b.gin --topology v5e:16x16 --search --compile 2
  python -m train.plan --gin_file=pretrain/gptj-6b.gin --topology h100:64 --mesh fsdp=64 --json

exit code: 0 it fits, 1 it does not, 2 bad input."""
Repeated = tyro.conf.UseAppendAction


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command line."""

    topology: Annotated[str, tyro.conf.arg(metavar="CHIP:SHAPE")]
    """Such as v5p:8x8x8 or v5e:16x16 (v4, v5e, v5p, v6e), 2*v5e:16x16 for two slices, h100:64 (a100, h100, h200)."""
    gin_file: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="FILE")] = ()
    """The gin files of the run, as of python -m train; workdir and data may be left open."""
    gin_param: Annotated[tuple[str, ...], Repeated, tyro.conf.arg(metavar="NAME.PARAMETER=VALUE")] = ()
    """A setting that wins over the files."""
    mesh: Annotated[str | None, tyro.conf.arg(metavar="AXIS=N,...")] = None
    """Such as fsdp=16,tensor=4,sequence; by default that of the gin files. One axis may be -1: the rest."""
    microbatches: int | None = None
    """Of a pipeline."""
    schedule: str | None = None
    """Of a pipeline: 1f1b, gpipe or interleaved."""
    virtual_stages: int | None = None
    """Pieces of the model that a stage holds, with interleaved."""
    remat: str | None = None
    """What the backward pass recomputes: none, dots or full."""
    accumulate: int | None = None
    """Slices of the batch that are computed one after another."""
    analytic: bool = False
    """The arithmetic alone: at once, and without the compiler."""
    search: bool = False
    """Rank meshes, policies and schedules by the arithmetic instead, and print the best."""
    compile: int = 0
    """With --search: compile so many of the best."""
    top: int = 10
    """With --search: print so many."""
    json: bool = False
    """Print the plan as JSON."""
    picture: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw memory and roofline into this file, .svg or .png."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags (those of the command line if `args` is None), plans and prints."""
    flags = tyro.cli(
        tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Flags),
        prog="python -m train.plan",
        args=args,
        description=EXAMPLES,
        use_underscores=True,
    )
    with user_errors():
        fits = search(flags) if flags.search else make_plan(flags)
    if not fits:
        raise SystemExit(1)


def make_plan(flags: Flags) -> bool:
    """Prints one plan's page.

    Returns:
        Whether it fits.

    Raises:
        ValueError, OSError: the flags do not fit the model, the chips or each other.
    """
    planner = _planner(flags)
    from parallel.plan_page import check_picture

    check_picture(flags.picture)
    found = planner.plan(compile=not flags.analytic)
    if flags.picture is not None:
        found.save_picture(flags.picture)
    _show(found.to_dict() if flags.json else found)
    return found.fits


def search(flags: Flags) -> bool:
    """Prints the best layouts, ranked.

    Returns:
        Whether any fits.

    Raises:
        ValueError, OSError: as `make_plan`.
    """
    from train.searching import Search

    for name, value in (("compile", flags.compile), ("top", flags.top - 1)):
        if value < 0:
            raise ValueError(f"--{name} {getattr(flags, name)}: it is at least {int(name == 'top')}")
    found = Search(_planner(flags), flags.gin_file, flags.gin_param).run(flags.top, flags.compile)
    _show(found.to_dict() if flags.json else found)
    return found.fits


def _planner(flags: Flags) -> Any:
    from parallel.chips import parse_topology
    from parallel.topology import stay_on_cpu

    if not flags.gin_file and not flags.gin_param:
        raise ValueError("nothing to plan: give --gin_file, such as --gin_file=pretrain/gptj-6b.gin")
    topology = parse_topology(flags.topology)
    stay_on_cpu()
    from train.planning import Choice, Planner, open_experiment

    names = (field.name for field in dataclasses.fields(Choice) if field.name != "layout")
    for name in ("microbatches", "virtual_stages", "accumulate"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: it is at least 1")
    choice = Choice(layout=flags.mesh, **{name: getattr(flags, name) for name in names})
    return Planner(open_experiment(flags.gin_file, flags.gin_param, choice), topology)


def _show(found: Any) -> None:
    from parallel.plan_page import show

    if isinstance(found, dict):
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        show(found)


if __name__ == "__main__":
    main()
