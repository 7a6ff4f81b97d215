"""`python -m inference.plan`: what generating text takes on chips that are not here, and whether it fits them.

flags -> the arithmetic -> the TPU compiler, if it is installed: prefill and decode step -> one page -> exit code
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from parallel.terminal import model_of, user_errors

EXAMPLES = """\
Plans decoding on TPUs or GPUs that are not here: memory of a chip (parameters, cache,
temporaries), collectives, a roofline of the decode step and the prefill, tokens/s. The
decode step that would run is compiled by the TPU's own compiler (the extra `tpu`; no TPU
is needed), nothing is allocated; without it, and for GPUs, the page is arithmetic alone
and says so. With a chip's name alone, the smallest slice that fits is found.

examples:
  python -m inference.plan gpt-j-6b --topology v5e
  python -m inference.plan gpt-j-6b --topology v5e:2x2 --mesh tensor=4 --rows 8 --quantize int8
  python -m inference.plan bloom-176b --topology v5p:2x2x2 --mesh tensor=8 --picture decode.svg
  python -m inference.plan bloom-176b --topology h100:8 --mesh tensor=8 --quantize int8 --json

exit code: 0 it fits, 1 it does not, 2 bad input."""
SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    0: ("1", "2", "4", "8", "16", "32"),
}
"""Shapes that chips come in, by dimensions of their torus, the smallest first."""


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command line."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A preset, such as gpt-j-6b or bloom-176b."""
    topology: Annotated[str, tyro.conf.arg(metavar="CHIP[:SHAPE]")]
    """Such as v5e:2x2 or h100:8; v5e alone finds the smallest slice that fits."""
    mesh: Annotated[str | None, tyro.conf.arg(metavar="AXIS=N,...")] = None
    """Such as tensor=8 or data=2,tensor=4. By default all chips split the heads, as far as they divide."""
    rows: int = 1
    """Sequences that are generated at once."""
    prompt: int = 1024
    """Tokens of a prompt."""
    new: int = 1024
    """Tokens that are generated."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of parameters, activations and cache."""
    quantize: Literal["none", "int8"] = "none"
    """What kernels are kept in."""
    cache: Literal["full", "int8"] = "full"
    """What keys and values are kept in."""
    model_class: str | None = None
    """Such as BloomForCausalLM. By default the class that the family generates with."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FIELD=VALUE")] = ()
    """A field of the config to change, such as n_layer=4."""
    analytic: bool = False
    """The arithmetic alone: at once, and without the compiler."""
    json: bool = False
    """Print the plan as JSON."""
    picture: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw memory and roofline into this file, .svg or .png."""


def main(args: Sequence[str] | None = None) -> None:
    """Reads the flags (those of the command line if `args` is None), plans and prints."""
    flags = tyro.cli(
        Flags,
        prog="python -m inference.plan",
        args=args,
        description=EXAMPLES,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
    )
    with user_errors():
        fits = make_plan(flags)
    if not fits:
        raise SystemExit(1)


def make_plan(flags: Flags) -> bool:
    """Prints the page.

    Returns:
        Whether it fits.

    Raises:
        ValueError: the flags do not fit the model, the chips or each other.
    """
    from parallel.topology import stay_on_cpu  # here, not above: `--help` should answer at once

    stay_on_cpu()
    from inference.planning import Planner
    from parallel.plan_page import check_picture, show

    for name in ("rows", "prompt", "new"):
        if getattr(flags, name) < 1:
            raise ValueError(f"--{name} {getattr(flags, name)}: it is at least 1")
    check_picture(flags.picture)
    planner = Planner(
        model_of(flags.model, flags.model_class, flags.set),
        dtype=flags.dtype,
        rows=flags.rows,
        prompt=flags.prompt,
        new=flags.new,
        quantize=None if flags.quantize == "none" else flags.quantize,
        int8_cache=flags.cache == "int8",
    )
    found: Any = None
    for topology in topologies_of(flags.topology):
        found = planner.plan(topology, flags.mesh, compile=False)
        if found.fits and not flags.analytic:
            found = planner.plan(topology, flags.mesh)
        if found.fits:
            break
    if (
        ":" in flags.topology
        and not found.fits
        and not flags.analytic
        and found.compiled is None
        and not found.without
    ):
        found = planner.plan(topologies_of(flags.topology)[0], flags.mesh)
    if flags.picture is not None:
        found.save_picture(flags.picture)
    if flags.json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=1) + "\n")
    else:
        show(found)
    return found.fits


def topologies_of(text: str) -> list[Any]:
    """The topology, or of a chip's name all that it comes in.

    Raises:
        ValueError: no such chip or topology.
    """
    from parallel.chips import CHIPS, parse_topology

    if ":" in text:
        return [parse_topology(text)]
    if text.lower() not in CHIPS:
        raise ValueError(f"--topology {text!r}: no such chip is known: choose from {', '.join(CHIPS)}")
    return list(_slices(text.lower()))


def _slices(name: str) -> Iterator[Any]:
    from parallel.chips import CHIPS, parse_topology

    for shape in SLICES[CHIPS[name].num_dims]:
        yield parse_topology(f"{name}:{shape}")


if __name__ == "__main__":
    main()
