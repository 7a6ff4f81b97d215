"""The collectives of programs in which every one is known, and of text as TPUs write it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import parallel
from parallel.collectives import bytes_of, common_scope, replica_groups, split_names, transfers
from parallel.hlo import Program
from tests.zoo import quick_jit

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))
ACROSS = ((0, 2, 4, 6), (1, 3, 5, 7))


@functools.cache
def text_of(function, *shape):
    """The compiled text of a function of one device's part of an array, on data=4, tensor=2."""
    mesh = parallel.make_mesh(data=4, tensor=2)
    manual = jax.shard_map(
        function, mesh=mesh, in_specs=P("data", "tensor"), out_specs=P("data", "tensor"), check_vma=False
    )
    whole = jax.ShapeDtypeStruct((4 * shape[0], 2 * shape[1], *shape[2:]), jnp.float32)
    return quick_jit(manual).lower(whole).compile().as_text()


def found_in(text):
    return [(one.kind, one.shape, one.groups, one.count) for one in transfers(Program(text))]


def psum_in_loops(x):
    def inner(x, _):
        return jnp.sin(lax.psum(x, "tensor")), None

    def outer(x, _):
        return lax.psum(lax.scan(inner, x, length=7)[0], "data"), None

    return lax.scan(outer, x, length=3)[0]


def each_kind(x):
    with jax.named_scope("gathering"):
        y = lax.all_gather(x, "tensor", axis=0, tiled=True)
    with jax.named_scope("scattering"):
        x = lax.psum_scatter(jnp.cos(y), "tensor", scatter_dimension=0, tiled=True)
    x = lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)])
    x = lax.all_to_all(jnp.sin(x), "data", split_axis=0, concat_axis=0, tiled=True)
    return x


def in_branch(x):
    return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, "tensor"), lambda x: jnp.sin(x), x)


def until(x):
    return lax.while_loop(lambda x: x.sum() < 100.0, lambda x: lax.psum(jnp.exp(x), "tensor"), x)


def test_loops_multiply():
    text = text_of(psum_in_loops, 5, 3)
    expected = [("all-reduce", (5, 3), PAIRS, 21), ("all-reduce", (5, 3), ACROSS, 3)]
    assert found_in(text) == expected
    assert "known_trip_count" in text
    assert found_in(text.replace("known_trip_count", "forgotten")) == expected


def test_every_kind():
    """Shapes are those of the whole array, whichever side of the collective it is on."""
    ring = tuple((2 * i + j, (2 * i + 2) % 8 + j) for i in range(4) for j in range(2))
    gathering, scattering, permuting, *exchanging = transfers(Program(text_of(each_kind, 4, 3)))
    assert (gathering.kind, gathering.shape, gathering.groups) == ("all-gather", (8, 3), PAIRS)
    assert (scattering.kind, scattering.shape, scattering.groups) == ("reduce-scatter", (8, 3), PAIRS)
    assert (permuting.kind, permuting.shape) == ("collective-permute", (4, 3))
    assert sorted(permuting.groups) == sorted(ring)
    assert {one.kind for one in exchanging} == {"all-to-all"}
    assert sum(bytes_of(one.dtype, one.shape) for one in exchanging) == 4 * 3 * 4
    assert {one.groups for one in exchanging} == {ACROSS}
    assert "gathering" in gathering.op_name
    assert "scattering" in scattering.op_name


def test_a_branch_may_not_be_taken():
    (one,) = transfers(Program(text_of(in_branch, 5, 3)))
    assert (one.kind, one.count, one.conditional, one.unbounded) == ("all-reduce", 1, True, False)


def test_a_loop_of_unknown_length_counts_once_and_is_marked():
    (one,) = transfers(Program(text_of(until, 5, 3)))
    assert (one.kind, one.count, one.conditional, one.unbounded) == ("all-reduce", 1, False, True)


# Shortened from what the TPU compiler writes: a gathering in the background of two products is a chain of fusions that
# each hold it, a reduce-scatter is a fusion around an all-reduce.
ON_TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%start (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %p = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4] {'a'}, dimensions={0}, \
metadata={op_name="jit(step)/block/cast"}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %t = (bf16[2,8]{1,0}, bf16[8,8]{1,0:S(1)}) tuple(%p, %g)
}

%piece (p.1: bf16[2,8]) -> bf16[8,8] {
  %p.1 = bf16[2,8]{1,0} parameter(0)
  ROOT %g.1 = bf16[8,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=4] {'a'}, dimensions={0}, \
metadata={op_name="jit(step)/block/cast"}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%all-reduce-scatter.1 (p.2: f32[8,8], p.3: f32[12]) -> (f32[2,8], f32[3]) {
  %p.2 = f32[8,8]{1,0:T(8,128)} parameter(0)
  %p.3 = f32[12]{0:T(128)} parameter(1)
  %all = (f32[8,8]{1,0}, f32[12]{0}) all-reduce(%p.2, %p.3), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
  %first = f32[8,8]{1,0} get-tuple-element(%all), index=0
  %second = f32[12]{0} get-tuple-element(%all), index=1
  %part = f32[2,8]{1,0} dynamic-slice(%first), dynamic_slice_sizes={2,8}
  %part.1 = f32[3]{0} dynamic-slice(%second), dynamic_slice_sizes={3}
  ROOT %own = (f32[2,8]{1,0}, f32[3]{0}) tuple(%part, %part.1)
}

ENTRY %main (x: bf16[2,8], y: f32[8,8]) -> (f32[2,8], f32[3]) {
  %x = bf16[2,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %s = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %d = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%piece
  %f = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%piece
  %send = (f32[8,8]{1,0:S(1)}, f32[8,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y), channel_id=5, \
source_target_pairs={{0,1},{1,2},{3,3}}, metadata={op_name="jit(step)/ppermute"}
  %sent = f32[8,8]{1,0} collective-permute-done(%send)
  %named = f32[16,8]{1,0} copy(%y), metadata={op_name="jit(step)/loss/sum"}
  %zeros = f32[64,8]{1,0} broadcast(%x), metadata={op_name="jit(step)/zeros"}
  %laid = f32[64,8]{1,0} dynamic-update-slice(%zeros, %named)
  %r = f32[64,8]{1,0} all-reduce(%laid), replica_groups=[1,4]<=[4], to_apply=%add
  %alone = f32[16,8]{1,0} all-reduce(%named), replica_groups=[4,1]<=[4], to_apply=%add
  %bias = f32[12]{0} copy(%y), metadata={op_name="jit(step)/transpose(jvp(head))/sum"}
  %moved = f32[12]{0:T(128)} copy(%bias)
  ROOT %z = (f32[2,8]{1,0}, f32[3]{0}) fusion(%y, %moved), kind=kCustom, calls=%all-reduce-scatter.1, \
metadata={op_name="jit(step)/transpose(jvp(head))/dot"}
}
"""


def test_as_tpus_write_it():
    """Most of these have no name of their own: what they move has, or was made by what has."""
    everyone, head = ((0, 1, 2, 3),), "jit(step)/transpose(jvp(head))"
    found = [dataclasses.astuple(one)[:8] for one in transfers(Program(ON_TPU))]
    assert found == [
        ("all-gather", "bf16", (8, 8), everyone, 1, False, False, "jit(step)/block/cast"),
        ("collective-permute", "f32", (8, 8), ((0, 1), (1, 2)), 1, False, False, "jit(step)/ppermute"),
        ("all-reduce", "f32", (64, 8), everyone, 1, False, False, "jit(step)/loss/sum"),
        ("reduce-scatter", "f32", (8, 8), everyone, 1, False, False, f"{head}/dot"),
        ("reduce-scatter", "f32", (12,), everyone, 1, False, False, f"{head}/sum"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true", PAIRS),
        ("{}, to_apply=%add", (tuple(range(8)),)),
        ("[4,2]<=[8], dimensions={1}", PAIRS),
        ("[2,4]<=[4,2]T(1,0)", ACROSS),
        ("mesh['a'=4,'b'=2] {'b'}, to_apply=%add", PAIRS),
        ("mesh['a'=4,'b'=1,'c'=2] {'a'}", ACROSS),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", ((3, 2), (1, 0))),
    ],
)
def test_replica_groups(text, expected):
    assert sorted(replica_groups(text, 8)) == sorted(expected)


def test_unknown_replica_groups():
    with pytest.raises(ValueError, match="unknown form of replica groups: <4"):
        replica_groups("<4>", 8)


def test_names_of_merged_operations():
    assert split_names("jit(f)/a/(b/c:d)") == ["jit(f)/a/b/c", "jit(f)/a/d"]
    assert split_names("p/(q(x)/jvp(y)/z:jvp(u)/v)") == ["p/q(x)/jvp(y)/z", "p/jvp(u)/v"]
    assert split_names("(a:b)") == ["a", "b"]
    assert split_names("jit(f)/jvp(a)/dot") == ["jit(f)/jvp(a)/dot"]
    assert split_names("") == [""]
    assert common_scope(["a/b/c", "a/b/d"]) == "a/b"


def test_bytes():
    assert [bytes_of(dtype, (3, 5)) for dtype in ("f32", "bf16", "pred", "s4", "f8e4m3fn")] == [
        60,
        30,
        15,
        8,
        15,
    ]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of one of two slices, numbered as libtpu numbers them."""

    id: int
    slice_index: int
    platform: str = "tpu"


@dataclasses.dataclass(frozen=True)
class OfOneSlice:
    """What a compiler gives for one of two slices, as libtpu writes it."""

    text: str

    def as_text(self):
        return self.text

    def memory_analysis(self):
        return None


def test_what_goes_between_slices():
    """The program is one slice's; what it sends to the other goes through the host, by slices or by device ids."""
    host = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"'
    )
    shape = "bf16[64,8]{1,0}"
    text = f"""HloModule two, num_partitions=4

ENTRY %main (x: bf16[64,8]) -> bf16[64,8] {{
  %x = {shape} parameter(0)
  %t = token[] after-all()
  %in = {shape} all-reduce(%x), replica_groups={{{{0,2}},{{1,3}}}}, to_apply=%add, \
metadata={{op_name="jit(step)/transpose(jvp(forward))/Model/mlp/dot"}}
  %out = ({shape}, u32[], token[]) send(%in, %t), channel_id=1, {host},\
_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="ALL_REDUCE"}}
  %got = ({shape}, u32[], token[]) recv(%t), channel_id=2, {host},\
_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="ALL_REDUCE"}}
  %whole = ({shape}, u32[], token[]) send(%x, %t), channel_id=3, {host},\
_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="ALL_GATHER"}}
  %next = ({shape}, u32[], token[]) send(%x, %t), channel_id=4, {host},\
_xla_megascale_target={{{{100003->200000}},{{100002->200001}}}},_xla_megascale_transfer_type="ONE_TO_ONE"}}
  %all = ({shape}, u32[], token[]) send(%x, %t), channel_id=5, {host},\
_xla_megascale_target={{{{100000,100003,200000,200003}},{{100001,100002,200001,200002}}}},\
_xla_megascale_transfer_type="ALL_TO_ALL"}}
  ROOT %y = {shape} copy(%in)
}}
"""
    chips = [Chip(100_000 * (1 + i // 4) + (0, 1, 3, 2)[i % 4], i // 4) for i in range(8)]
    mesh = Mesh(np.array(chips, dtype=object).reshape(4, 2), ("data", "tensor"))
    found = parallel.inspect_program(OfOneSlice(text), mesh).collectives
    assert [(one.kind, one.axes, one.group, one.bytes_sent, one.crosses) for one in found] == [
        ("all-reduce", ("data",), 2, 1024, False),
        ("all-reduce", ("data",), 2, 1024, True),
        ("all-gather", ("data",), 2, 1024, True),
        ("collective-permute", ("data",), 2, 1024, True),
        ("all-to-all", ("data",), 4, 768, True),
    ]
    assert (found[1].module, found[1].phase) == ("forward/Model/mlp", "backward")
    with pytest.raises(ValueError, match="has 8 devices, but the program was compiled for 2"):
        parallel.inspect_program(OfOneSlice(text.replace("partitions=4", "partitions=2")), mesh)
