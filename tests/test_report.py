"""What a compiled program is reported to do, and training's collectives held to the theory.

XLA's CPU backend has no reduce-scatter of its own making: where a TPU scatters the sum of a gradient over `fsdp`, a CPU
reduces all of it on every device and each keeps its part. So FSDP's gradients count as all-reduces here.
"""

import dataclasses
import functools
import io
import json
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import modelzoo
import parallel
import train
from parallel.collectives import bytes_of
from parallel.hlo import Program
from parallel.report import (
    Collective,
    ProgramReport,
    axes_of,
    format_bytes,
    inspect_program,
    kept_by_loops,
    scope_of,
)
from tests.hlo import compile_anew
from tests.zoo import leaves_by_name, quick_jit, tiny_gptj
from train.state import abstract_state

V, L, B, T, D, F = 211, 3, 16, 12, 32, 64
MODEL: Any = modelzoo.GPTJForCausalLM(
    tiny_gptj(vocab_size=V, n_layer=L, n_embd=D, n_head=8, rotary_dim=4, n_inner=F)
)
IDS = jax.ShapeDtypeStruct((B, T), jnp.int32)


def make_rules(**sizes):
    return parallel.make_rules(
        parallel.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    )


@functools.cache
def step_report(**sizes):
    """A train step's."""
    rules, optimizer = make_rules(**sizes), optax.adamw(1e-3)
    step = train.make_train_step(MODEL, optimizer, rules=rules)
    lowered = step.lower(abstract_state(MODEL, optimizer, rules=rules), {"input_ids": IDS, "labels": IDS})
    return inspect_program(compile_anew(lowered)[0], rules.mesh)


def forward_report(rules, model=MODEL, change=lambda logits: logits):
    """That of a forward pass, something done to its logits."""
    abstract = parallel.abstract_sharded_params(model, rules)
    ids = jax.ShapeDtypeStruct(IDS.shape, IDS.dtype, sharding=parallel.batch_sharding(rules))
    with parallel.use(rules):
        function = jax.jit(lambda p, i: change(model.apply({"params": p}, i).logits))
        return inspect_program(compile_anew(function.lower(abstract, ids))[0], rules.mesh)


def counted(report, *attributes):
    """How often each runs, of those that move more than a scalar."""
    runs = Counter()
    for one in report.collectives:
        assert one.bound == ""
        if one.size > 1:
            runs[tuple(getattr(one, name) for name in attributes)] += one.count
    return runs


def shapes_of(rules):
    """Each parameter's (shape where it is used, whether it rests in shards); one layer's for those of the layers."""
    found = []
    for name, leaf in leaves_by_name(parallel.abstract_sharded_params(MODEL, rules)).items():
        layers = "layers" in name
        found += [(leaf.shape[layers:], not leaf.sharding.is_fully_replicated)] * (L if layers else 1)
    return found


def squeezed(shapes):
    """Without the dimensions of size one that XLA keeps or drops, and whatever the order of the others."""
    return Counter(tuple(sorted(d for d in shape if d > 1)) for shape in shapes)


def shapes_moved(collectives):
    return squeezed(one.shape for one in collectives for _ in range(one.count) if one.size > 1)


# --- theory


def check_tensor_parallel(report, block):
    """Two all-reduces a block, one of the embedding, whose table is cut by vocabulary; the logits stay in place."""
    found = counted(report, "kind", "axes", "shape", "module")
    assert {key[:3] for key in found} == {("all-reduce", ("tensor",), (B, T, D))}
    blocks = {key: count for key, count in found.items() if block in key[-1]}
    assert list(blocks.values()) == [L, L]
    assert {key[-1].rpartition("/")[2] for key in blocks} == {"out", "fc_out"}
    assert sum(found.values()) == 2 * L + 1


def test_tensor_parallel_forward_is_two_all_reduces_a_block():
    check_tensor_parallel(forward_report(make_rules(tensor=4)), "GPTJBlock")


def test_tensor_parallel_forward_of_bloom():
    config = modelzoo.get_config("tiny-bloom", vocab_size=V, n_layer=L, hidden_size=D, n_head=8)
    model = modelzoo.BloomForCausalLM(config)
    check_tensor_parallel(forward_report(make_rules(tensor=4), model), "BloomBlock")


@pytest.mark.parametrize("family", ["gptj", "bloom"])
def test_sequence_parallel_forward_gathers_before_each_column_split(family):
    """Two all-gathers a block (GPT-J's attention and MLP read one norm, so one), one of the head's input.

    Behind each row split a TPU scatters the sum where a CPU reduces all of it, as above.
    """
    model = MODEL
    if family == "bloom":
        model = modelzoo.BloomForCausalLM(
            modelzoo.get_config("tiny-bloom", vocab_size=V, n_layer=L, hidden_size=D, n_head=8)
        )
    rules = parallel.make_rules(parallel.make_mesh(tensor=4, devices=jax.devices()[:4]), sequence=True)
    report = forward_report(rules, model)
    gathers = L * (1 if family == "gptj" else 2) + 1
    assert counted(report, "kind", "axes", "shape") == {
        ("all-gather", ("tensor",), (B, T, D)): gathers,
        ("all-reduce", ("tensor",), (B, T, D)): 2 * L + 1,
    }
    reduced = {one.module.rpartition("/")[2] for one in report.collectives if one.kind == "all-reduce"}
    assert reduced == {"embed", "out", "fc_out"}


def test_a_ring_passes_keys_and_values_on_and_gathers_nothing():
    """Of two devices each sends its keys and values once a block, and a half of q, k, v and y to deal work evenly."""
    report = forward_report(make_rules(context=2))
    heads = MODEL.config.n_head
    half = (B, heads, T // 4, D // heads)
    assert counted(report, "kind", "axes", "shape") == {
        ("collective-permute", ("context",), (2, *half)): 2 * L,
        ("collective-permute", ("context",), half): 4 * L,
    }


def test_a_surprise_is_seen():
    """Logits asked for in one piece: one gathering more, and that alone."""

    def in_one_piece(logits):
        with jax.named_scope("surprise"):
            return lax.with_sharding_constraint(logits, P())

    report = forward_report(make_rules(tensor=4), change=in_one_piece)
    with pytest.raises(AssertionError):
        check_tensor_parallel(report, "GPTJBlock")
    (surprise,) = (one for one in report.collectives if one.kind != "all-reduce")
    assert (surprise.kind, surprise.axes, surprise.count) == ("all-gather", ("tensor",), 1)
    assert surprise.shape == (B, T, V + -V % 4)
    others = tuple(one for one in report.collectives if one != surprise)
    check_tensor_parallel(dataclasses.replace(report, collectives=others), "GPTJBlock")


def test_data_parallel_reduces_each_gradient_once():
    report = step_report(data=8)
    assert set(counted(report, "kind", "axes")) == {("all-reduce", ("data",))}
    assert shapes_moved(report.collectives) == squeezed(shape for shape, _ in shapes_of(make_rules(data=8)))
    assert {one.phase for one in report.collectives if one.size > 1} == {"backward"}


def test_fsdp_gathers_each_parameter_once_a_pass_and_reduces_each_gradient_once():
    report, parameters = step_report(fsdp=8), shapes_of(make_rules(fsdp=8))
    assert set(counted(report, "kind", "axes")) == {
        ("all-gather", ("fsdp",)),
        ("all-reduce", ("fsdp",)),
    }
    gathered = {phase: [] for phase in ("forward", "backward")}
    for one in report.collectives:
        if one.kind == "all-gather":
            gathered[one.phase].append(one)
    cut = squeezed(shape for shape, is_cut in parameters if is_cut)
    assert shapes_moved(gathered["forward"]) == cut
    # Backward has no use for a layer's biases, nor for the table of the embedding.
    assert shapes_moved(gathered["backward"]) <= cut
    kernels = squeezed(shape for shape, _ in parameters if len(shape) > 1 and V not in shape)
    assert kernels <= shapes_moved(gathered["backward"])
    reduced = [one for one in report.collectives if one.kind == "all-reduce"]
    assert shapes_moved(reduced) == squeezed(shape for shape, _ in parameters)
    assert {one.phase for one in reduced if one.size > 1} == {"backward"}


def test_memory_by_class():
    """The arguments are the compiler's own figure to the byte; FSDP's are an eighth of data parallel's."""
    whole, cut = step_report(data=8).memory, step_report(fsdp=8).memory
    size = 4 * modelzoo.num_params(MODEL)
    counters, key = 2 * 4, 8  # Adam's and the step's
    assert whole.arguments == {
        "parameters": size,
        "optimizer state": 2 * size + counters - 4,
        "batch and others": 2 * B // 8 * T * 4 + 4 + key,
    }
    assert whole.padding == cut.padding == 0
    assert cut.arguments["batch and others"] == whole.arguments["batch and others"]
    assert (
        1 / 8 <= cut.arguments["parameters"] / size < 1 / 8 + 0.05
    )  # what is tiny or a bias of F lies whole
    assert whole.outputs > whole.aliased > 3 * size
    assert whole.total == sum(whole.arguments.values()) + whole.outputs - whole.aliased + whole.temporaries


# --- reading


def small_report(devices=None):
    """Of a product over fsdp x tensor, in a loop of 5, on the given order of devices; the arguments have no names."""
    mesh = parallel.make_mesh(data=2, fsdp=2, tensor=2, devices=devices)
    place = functools.partial(NamedSharding, mesh)

    def f(x, unused, rng):
        def body(x, _):
            with jax.named_scope("mixing"):
                x = lax.with_sharding_constraint(x @ x, P("data", None))
            return lax.with_sharding_constraint(jnp.sin(x), P("data", ("fsdp", "tensor"))), None

        return lax.scan(body, x, length=5)[0] + jax.random.normal(rng, ())

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=place(P("data", ("fsdp", "tensor"))))
    with jax.set_mesh(mesh):
        compiled = quick_jit(f).lower(x, x, jax.eval_shape(lambda: jax.random.key(0))).compile()
    return inspect_program(compiled, mesh, lambda path: "x" if path == "0" else "rest")


def test_loops_axes_and_classes_of_ones_own():
    report = small_report()
    assert report.mesh == {"stage": 1, "data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    runs = counted(report, "count", "axes")
    assert {count for count, _ in runs} == {5}
    assert {axes for _, axes in runs} <= {("fsdp", "tensor"), ("data",), ("data", "fsdp", "tensor")}
    assert ("fsdp", "tensor") in {axes for _, axes in runs}
    arguments = {name: size for name, size in report.memory.arguments.items() if size}
    assert arguments == {"x": 8 * 8 * 4 // 8, "rest": 8}  # one is unused: it is not passed


def test_the_order_of_the_devices_does_not_matter():
    devices = [jax.devices()[i] for i in (5, 3, 0, 6, 7, 1, 2, 4)]
    assert small_report(devices).collectives == small_report().collectives


def test_axes():
    mesh = {"data": 2, "fsdp": 3, "tensor": 4}
    assert axes_of(((0, 1, 2, 3),), mesh) == ("tensor",)
    assert axes_of(((0, 4), (12, 16)), mesh) == ("fsdp",)
    assert axes_of(((0, 12, 1, 13),), mesh) == ("data", "tensor")
    assert axes_of(((5, 4), (6, 7)), mesh) == ("tensor",)


def test_scopes():
    name = "jit(step)/jvp(forward)/GPTJForCausalLM/trunk/trunk.run/while/body/closed_call/checkpoint/GPTJBlock/mlp/dot"
    scope = "forward/GPTJForCausalLM/trunk/GPTJBlock/mlp"
    assert scope_of(name) == (scope, "forward")
    assert scope_of(name.replace("jvp(forward)", "transpose(jvp(forward))")) == (scope, "backward")
    again = name.replace("jvp(forward)", "transpose(jvp(forward))").replace(
        "GPTJ", "rematted_computation/GPTJ"
    )
    assert scope_of(again) == (scope, "recompute")
    assert scope_of("jit(f)/transpose(jvp())/while/body/cond/branch_1_fun/a/mul") == ("a", "backward")
    assert scope_of("jit(step)/metrics/reduce_sum") == ("metrics", "")
    assert scope_of("state.params['bias']") == ("state.params['bias']", "")
    assert scope_of("") == ("", "")


def test_bytes_sent_round_a_ring():
    shared = dict(
        axes=("data",), dtype="f32", shape=(10,), bytes=40, count=3, bound="", phase="", operation="a"
    )
    sent = {
        kind: Collective(kind=kind, group=4, module="m", **shared).bytes_sent
        for kind in ("all-reduce", "all-gather", "reduce-scatter", "collective-permute")
    }
    assert list(sent.values()) == [180, 90, 90, 120]


def test_tables_and_plain_data():
    one = Collective("all-reduce", ("data",), 4, "f32", (256,), 1024, 3, "", "block/mlp", "backward", "a")
    other = Collective("all-gather", ("fsdp", "tensor"), 2, "f32", (1,), 4, 1, "<=", "head", "", "b")
    report = ProgramReport({"data": 4, "stage": 1}, (other, one, one), None)
    first, second = report.grouped()
    assert (first.module, first.arrays, first.count, first.bytes) == ("block/mlp", 2, 6, 6144)
    assert (second.kind, second.bound, second.bytes_sent) == ("all-gather", "<=", 2)
    console = Console(width=160, file=io.StringIO())
    console.print(report, step_report(data=8))
    shown = console.file.getvalue()
    for text in (
        "one call on data=4 ",
        "6.0 KiB",
        "9.0 KiB",
        "<=1",
        "fsdp x tensor",
        "optimizer state",
        "temporaries",
    ):
        assert text in shown
    assert json.loads(json.dumps(report.to_dict()))["collectives"][1]["module"] == "block/mlp"


def test_a_mesh_of_another_size():
    mesh = Mesh(jax.devices()[:1], ("data",), axis_types=(AxisType.Auto,))
    compiled = quick_jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
    report = inspect_program(compiled, mesh)
    assert report.collectives == ()
    assert report.memory.arguments["batch and others"] == bytes_of("f32", (3,))
    with pytest.raises(ValueError, match="has 2 devices, but the program was compiled for 1"):
        inspect_program(compiled, parallel.make_mesh(data=2, devices=jax.devices()[:2]))


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 * 2**30, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]


def test_what_loops_keep_on_a_tpu_is_counted():
    text = """HloModule tpu, num_partitions=4

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %kept = bf16[28,8,64]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %other = bf16[8]{0} custom-call(), custom_call_target="Other"
  ROOT %b = f32[2]{0} negate(%a)
}
"""
    assert kept_by_loops(Program(text)) == 28 * 8 * 64 * 2


def test_an_argument_that_is_not_there_has_no_place():
    rules = make_rules(data=2)
    state = {"params": {"a": jax.ShapeDtypeStruct((4,), jnp.float32)}, "average": None}
    compiled = compile_anew(jax.jit(lambda state: state["params"]["a"] + 1).lower(state))[0]
    mesh = jax.sharding.Mesh(rules.mesh.devices.reshape(-1)[:1], "x")
    memory = inspect_program(compiled, mesh).memory
    assert memory is not None
    assert memory.arguments["parameters"] == 16
