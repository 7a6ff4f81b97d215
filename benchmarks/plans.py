"""`python -m benchmarks.plans`: compiles every shipped plan for its TPUs, and holds arithmetic to the compiler.

    make plans                                  all of them, with their pages in docs/plans/
    python -m benchmarks.plans gptj-6b-v5e      some of them
    python -m benchmarks.plans --table          what was recorded, against today's arithmetic; compiles nothing
    python -m benchmarks.plans --rows           the table of docs/planning.md; compiles nothing

What the compiler said is kept in tests/planned.json, so that the tests can hold arithmetic to it without a compiler.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from parallel.chips import GIB, parse_topology
from parallel.plan_page import Compiled, Plan, show
from parallel.terminal import model_of, user_errors
from parallel.topology import stay_on_cpu

ROOT = Path(__file__).resolve().parent.parent
LIMITED = {"compute": "matrix units", "HBM": "memory", "network": "links"}
RECORD = ROOT / "tests" / "planned.json"
PAGES = ROOT / "docs" / "plans"


@dataclasses.dataclass(frozen=True)
class Training:
    """A training step to compile.

    Attributes:
        gin_file: below configs/.
        topology: as --topology takes it.
        layout: the mesh, or None for that of the file.
        params: further settings.
        shipped: it must fit, and has a page in docs/plans/.
    """

    gin_file: str
    topology: str
    layout: str | None = None
    params: tuple[str, ...] = ()
    shipped: bool = True


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A decode step to compile: the arguments of `python -m inference.plan`."""

    preset: str
    topology: str
    options: tuple[tuple[str, Any], ...] = ()
    layout: str | None = None
    shipped: bool = True


def _extra(gin_file: str, topology: str, layout: str | None, *params: str) -> Training:
    return Training(gin_file, topology, layout, params, shipped=False)


def _bloom(preset: str, rows: int, remat: str, length: int = 1024) -> tuple[str, ...]:
    return (
        f"train.preset='{preset}'",
        f"train.global_batch_size={rows}",
        f"train.sequence_length={length}",
        f"train.remat='{remat}'",
    )


BLOOM, GPTJ = "pretrain/bloom-176b.gin", "pretrain/gptj-6b.gin"
SMALL = (("rows", 4), ("prompt", 512), ("new", 512))
CASES: dict[str, Training | Decoding] = {
    "bloom-176b": Training(BLOOM, "v5p:8x8x8"),
    "gptj-6b-v5e": Training("pretrain/gptj-6b-v5e.gin", "v5e:16x16"),
    "gptj-6b-v5p": Training("pretrain/gptj-6b-v5p.gin", "v5p:4x4x4"),
    "megatron-bert-3.9b": Training("pretrain/megatron-bert-3.9b.gin", "v5e:8x8"),
    "gpt-8.3b": Training("pretrain/gpt-8.3b.gin", "v5p:4x4x4"),
    "roberta-large": Training("pretrain/roberta-large.gin", "v5e:4x4"),
    "mvp": Training("pretrain/mvp.gin", "v5e:4x4"),
    "bloom-176b-small": Training("pretrain/bloom-176b-small.gin", "v5p:4x4x4"),
    "bloom-176b-smallest": Training("pretrain/bloom-176b-smallest.gin", "v5p:2x4x4"),
    "bloom-176b-large": Training("pretrain/bloom-176b-large.gin", "v5p:8x8x16"),
    "bloom-176b-stages": Training("pretrain/bloom-176b-stages.gin", "v5p:8x8x8"),
    "gptj-6b-decode": Decoding("gpt-j-6b", "v5e:1x1"),
    "bloom-176b-decode": Decoding("bloom-176b", "v5p:2x2x2", (("rows", 8),)),
    "bloom-176b-decode-int8": Decoding("bloom-176b", "v5p:2x2x1", (("rows", 8), ("quantize", "int8"))),
    # Before: what the plans above improve on, or other meshes, models and policies to hold the arithmetic to.
    "mvp-fsdp16": _extra("pretrain/mvp.gin", "v5e:4x4", "fsdp=16", "train.remat='full'"),
    "bloom-176b-smallest-16": _extra(
        "pretrain/bloom-176b-smallest.gin", "v5p:2x4x4", None, "train.global_batch_size=16"
    ),
    "mvp-12-2": _extra("pretrain/mvp.gin", "v5e:4x4", None, "Mvp.decoder_layers=2"),
    "mvp-2-12": _extra("pretrain/mvp.gin", "v5e:4x4", None, "Mvp.encoder_layers=2"),
    "mvp-64-rows": _extra("pretrain/mvp.gin", "v5e:4x4", None, "train.global_batch_size=64"),
    "gptj-6b-two-slices": _extra(
        "pretrain/gptj-6b-v5p.gin", "2*v5p:4x4x4", "data=8,fsdp=16", "train.global_batch_size=1024"
    ),
    "bloom-176b-full": _extra(BLOOM, "v5p:8x8x8", None, "train.remat='full'"),
    "bloom-176b-small-dots": _extra(
        "pretrain/bloom-176b-small.gin", "v5p:4x4x4", None, "train.remat='dots'", "train.accumulate=2"
    ),
    "gptj-6b-fsdp64-full": _extra(GPTJ, "v5p:4x4x4", "fsdp=64"),
    "gptj-6b-fsdp64-dots": _extra(GPTJ, "v5p:4x4x4", "fsdp=64", "train.remat='dots'"),
    "gptj-6b-fsdp16-tensor4": _extra(GPTJ, "v5p:4x4x4", "fsdp=16,tensor=4"),
    "bloom-560m-full": _extra(BLOOM, "v5e:2x2", "fsdp=4", *_bloom("bloom-560m", 16, "full")),
    "bloom-560m-none": _extra(BLOOM, "v5e:2x2", "fsdp=4", *_bloom("bloom-560m", 8, "none")),
    "bloom-560m-dots": _extra(BLOOM, "v5e:2x2", "fsdp=4", *_bloom("bloom-560m", 8, "dots")),
    "bloom-560m-tensor": _extra(BLOOM, "v5e:2x2", "tensor=4,sequence", *_bloom("bloom-560m", 8, "full")),
    "bloom-560m-data": _extra(BLOOM, "v5e:4x4", "data=4,fsdp=4", *_bloom("bloom-560m", 64, "full", 2048)),
    "bloom-3b": _extra(BLOOM, "v5e:4x4", "fsdp=4,tensor=4,sequence", *_bloom("bloom-3b", 32, "full", 2048)),
    "bloom-7b1": _extra(BLOOM, "v5p:2x2x4", "fsdp=16", *_bloom("bloom-7b1", 64, "dots", 2048)),
    "gptj-6b-v6e": _extra(GPTJ, "v6e:8x8", "data=4,fsdp=16", "train.global_batch_size=256"),
    "roberta-large-none": _extra(
        "pretrain/roberta-large.gin",
        "v5e:4x4",
        "data=16",
        "train.remat='none'",
        "train.global_batch_size=128",
    ),
    "megatron-bert-345m": _extra(
        "pretrain/megatron-bert-3.9b.gin",
        "v5e:2x2",
        "fsdp=4",
        "MegatronBert.num_hidden_layers=24",
        "MegatronBert.hidden_size=1024",
        "MegatronBert.num_attention_heads=16",
        "MegatronBert.intermediate_size=4096",
        "train.global_batch_size=64",
    ),
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compiles the shipped plans and others, and prints arithmetic beside the compiler."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Of plans; by default all that are shipped."""
    table: bool = False
    """Compile nothing: print what was recorded."""
    rows: bool = False
    """Compile nothing: print the table of docs/planning.md."""
    all: bool = False
    """Also those that are not shipped."""
    missing: bool = False
    """Only those that were not recorded yet."""


def plan_of(case: Training | Decoding, compile: bool) -> Plan:
    """The plan of a case.

    Args:
        case: one of CASES.
        compile: ask the compiler.
    """
    topology = parse_topology(case.topology)
    if isinstance(case, Decoding):
        from inference.planning import Planner as DecodePlanner

        return DecodePlanner(model_of(case.preset), **dict(case.options)).plan(topology, case.layout, compile)
    from train.planning import Choice, Planner, open_experiment

    experiment = open_experiment([case.gin_file], case.params, Choice(case.layout))
    return Planner(experiment, topology).plan(compile)


def recorded() -> dict[str, Any]:
    """What the compiler said, by name: the fields of `Compiled` that are numbers."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def record(name: str, compiled: Compiled) -> None:
    """Keeps what the compiler said."""
    fields = dataclasses.asdict(compiled)
    kept = {
        key: value for key, value in fields.items() if isinstance(value, (int, float)) and key != "seconds"
    }
    RECORD.write_text(json.dumps(recorded() | {name: kept}, indent=1, sort_keys=True) + "\n")


def errors(kind: Any = (Training, Decoding)) -> Iterator[tuple[str, float, int]]:
    """(name, relative error of arithmetic, the compiler's bytes) of every recorded case of a kind."""
    for name in recorded():
        if isinstance(CASES.get(name), kind):
            size = held(name)
            yield name, plan_of(CASES[name], compile=False).predicted_bytes / size - 1, size


def said(name: str) -> Compiled:
    """What was recorded."""
    return Compiled({}, sent=(), seconds=0.0, **recorded()[name])


def held(name: str) -> int:
    """Bytes of one chip's arguments, temporaries and results, by the compiler."""
    return said(name).total


def shipped_rows() -> list[str]:
    """Lines of docs/planning.md: each shipped plan with what the compiler said and what the roofline predicts."""
    rows = []
    for name, case in CASES.items():
        if case.shipped and name in recorded():
            forecast = plan_of(case, compile=False).forecast
            hbm = forecast.topology.chip.hbm_bytes / GIB
            page = f"[{name}](plans/{name}.txt)"
            bytes_held = f"{said(name).needed / GIB:.1f} of {hbm:.1f} GiB"
            shares = forecast.shares()
            worst = max(shares, key=shares.__getitem__)
            limit = f"{LIMITED[worst]}, {shares[worst] / forecast.seconds:.0%}"
            if isinstance(case, Decoding):
                what = f"{1e3 * forecast.seconds:.1f} ms", f"{forecast.tokens_per_second:,.0f} tokens/s"
            else:
                apart = forecast.utilisation(forecast.seconds_apart)
                what = f"{forecast.seconds:.3g} s", f"{forecast.utilisation():.0%} ({apart:.0%})"
            rows.append(f"| {page} | {case.topology} | {bytes_held} | {what[0]} | {what[1]} | {limit} |")
    return rows


def print_table() -> None:
    """Arithmetic against the recorded figures."""
    found = list(errors())
    table = Table(title="bytes of one chip: arithmetic against the TPU compiler", title_justify="left")
    for name in ("case", "topology", "compiler", "error"):
        table.add_column(name)
    for name, error, held in found:
        table.add_row(name, CASES[name].topology, f"{held / GIB:.2f} GiB", f"{error:+.1%}")
    sizes = sorted(abs(error) for _, error, _ in found)
    show(table)
    if sizes:
        low = min(error for _, error, _ in found)
        print(
            f"{len(sizes)} cases: median {sizes[len(sizes) // 2]:.1%}, worst {sizes[-1]:.1%}, lowest {low:+.1%}"
        )


def main(args: Sequence[str] | None = None) -> None:
    """Compiles, prints, keeps; exit code 1 if a shipped plan does not fit."""
    flags = tyro.cli(Flags, prog="python -m benchmarks.plans", args=args, config=(tyro.conf.OmitArgPrefixes,))
    stay_on_cpu()
    with user_errors():
        if flags.table:
            print_table()
            return
        if flags.rows:
            print("\n".join(shipped_rows()))
            return
        if unknown := [name for name in flags.names if name not in CASES]:
            raise ValueError(f"no plan {unknown[0]!r}: there are {', '.join(CASES)}")
        names = flags.names or [name for name, case in CASES.items() if case.shipped or flags.all]
        bad = [name for name in names if not (flags.missing and name in recorded()) and not _run(name)]
    if bad:
        print(f"do not fit: {', '.join(bad)}")
        raise SystemExit(1)


def _run(name: str) -> bool:
    case, begun = CASES[name], time.perf_counter()
    plan = plan_of(case, compile=True)
    seconds = time.perf_counter() - begun
    if plan.compiled is None:
        print(f"{name}: {plan.without}", flush=True)
        return not case.shipped
    record(name, plan.compiled)
    PAGES.mkdir(exist_ok=True)
    if case.shipped:
        with (PAGES / f"{name}.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=120, highlight=False, markup=False).print(plan)
    held, hbm = plan.held_bytes / GIB, plan.forecast.topology.chip.hbm_bytes / GIB
    error = plan.predicted_bytes / plan.compiled.total - 1
    print(
        f"{name}: {held:.2f} of {hbm:.2f} GiB, arithmetic {error:+.1%}; predicted "
        f"{plan.forecast.utilisation():.1%} MFU, {plan.forecast.seconds:.3g} s; planned in {seconds:.0f} s",
        flush=True,
    )
    return plan.fits or not case.shipped


if __name__ == "__main__":
    main(sys.argv[1:])
