import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from parallel.chips import parse_topology
from parallel.plan_page import Compiled, Plan, Sent, check_picture
from parallel.roofline import Forecast, Phase

GIB = 2**30
FORECAST = Forecast(
    parse_topology("v5p:4x4x4"),
    {"fsdp": 16, "tensor": 4},
    [Phase("layers, forward", flops=1e14, hbm=1e9, network={"fsdp": 1e9}), Phase("optimizer", hbm=1e10)],
    model_flops=1e15,
    tokens=2**20,
)
PLAN = Plan(
    title="training step of something",
    layout="fsdp=16,tensor=4",
    forecast=FORECAST,
    memory={
        "parameters": GIB,
        "optimizer state": 2 * GIB,
        "saved activations": 3 * GIB,
        "temporaries": 4 * GIB,
    },
    messages=[Sent("all-gather", ("fsdp",), None, 1e9, "parameters: layers, forward")],
)
COMPILED = Compiled(
    arguments={"parameters": GIB, "optimizer state": 2 * GIB},
    argument_size_in_bytes=3 * GIB + 100,
    temp_size_in_bytes=7 * GIB,
    output_size_in_bytes=3 * GIB,
    alias_size_in_bytes=3 * GIB,
    generated_code_size_in_bytes=0,
    flops=1.1e14,
    sent=[
        Sent("all-gather", ("fsdp",), 28, 2e9, "trunk/mlp"),
        Sent("all-reduce", ("fsdp", "tensor"), 1, 10, "norm"),
    ],
    seconds=12.0,
    compiler="libtpu 0.0.42",
)


def text_of(plan):
    file = io.StringIO()
    Console(file=file, width=140).print(plan)
    return file.getvalue()


def test_arithmetic_alone_says_so():
    text = text_of(dataclasses.replace(PLAN, without="The TPU compiler is not installed."))
    assert "fits: 10.00 GiB of 95.74 GiB a chip, by arithmetic alone" in text
    assert "The TPU compiler is not installed." in text
    assert "predicted, not measured" in text
    assert "collectives of a step, by arithmetic" in text
    assert "Limited by" in text
    assert "Assumed: " in text
    assert "Compiled: nothing. Everything above is a model." in text


def test_the_compiler_is_set_beside_arithmetic():
    text = text_of(dataclasses.replace(PLAN, compiled=COMPILED))
    assert "by the compiler's account (compiled in 12 s, nothing allocated)" in text
    assert "10.0 GiB (-0.0%)" in text
    assert "collectives of a step, by the compiled program" in text
    assert "1 more" in text  # less than 1 MiB
    assert "1.1e+14 FLOPs a chip (+10.0%)" in text
    assert "sends 1.9 GiB a chip, the roofline's network 953.7 MiB (+100.0%)" in text
    assert "Compiled (libtpu 0.0.42): the column of the compiler" in text
    assert "Compiled: nothing." not in text


def test_a_program_without_products_says_so():
    text = text_of(dataclasses.replace(PLAN, compiled=dataclasses.replace(COMPILED, flops=0.0)))
    assert "the compiled program has no products" in text


def test_what_does_not_fit():
    large = dataclasses.replace(COMPILED, temp_size_in_bytes=93 * GIB)
    plan = dataclasses.replace(PLAN, compiled=large)
    assert PLAN.fits
    assert not plan.fits
    assert "DOES NOT FIT: 96.00 GiB" in text_of(plan)


def test_what_never_lives_together_shares_room():
    """libtpu adds up temporaries beyond what its own peak holds; whether it fits, the peak says."""
    compiled = dataclasses.replace(COMPILED, temp_size_in_bytes=93 * GIB, peak_memory_in_bytes=80 * GIB)
    plan = dataclasses.replace(PLAN, compiled=compiled)
    assert plan.fits
    text = text_of(plan)
    assert "\nfits: 80.00 GiB of 95.74 GiB a chip, by the compiler's account" in text
    assert "of these at once" in text
    assert "10.0 GiB (-89.6%)" in text  # arithmetic is held to what is added up
    assert "of these at once" not in text_of(dataclasses.replace(PLAN, compiled=COMPILED))


def test_data_for_machines():
    found = json.loads(json.dumps(dataclasses.replace(PLAN, compiled=COMPILED).to_dict()))
    assert found["argument_size_in_bytes"] == 3 * GIB + 100
    assert found["temp_size_in_bytes"] == 7 * GIB
    assert found["analytic_memory_bytes"]["total"] == 10 * GIB
    assert found["fits"] is True
    assert found["mesh"] == {"fsdp": 16, "tensor": 4}
    assert "temp_size_in_bytes" not in PLAN.to_dict()
    assert PLAN.to_dict()["compiled"] is False


@pytest.mark.parametrize(("ending", "begins"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_the_picture(tmp_path, ending, begins):
    path = tmp_path / f"plan{ending}"
    dataclasses.replace(PLAN, compiled=COMPILED).save_picture(path)
    assert path.read_bytes().startswith(begins)


def test_a_picture_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ends in .svg or .png"):
        PLAN.save_picture(tmp_path / "plan.pdf")


def test_a_picture_of_another_format_is_refused_at_once():
    with pytest.raises(ValueError, match=r"--picture plan.pdf: its name ends in .svg or .png"):
        check_picture(Path("plan.pdf"))
    assert check_picture(Path("plan.svg")) is check_picture(None) is None
