"""Parsing a compiled program's text, and counting the turns of its loops."""

import jax
import jax.numpy as jnp
import pytest

from parallel.hlo import Program, matching_parenthesis
from tests.zoo import quick_jit

TEXT = """\
HloModule jit_f, is_scheduled=true, replica_count=2, num_partitions=4

%body (p: (s32[], f32[3])) -> (s32[], f32[3]) {
  %p = (s32[]{:T(128)}, f32[3]{0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[3]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %out = (s32[], /*index=1*/f32[3]{0}) tuple(%next, /*index=1*/%x)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}

%condition (q: (s32[], f32[3])) -> pred[] {
  %q = (s32[], f32[3]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[] constant(9)
  ROOT %go = pred[] fusion(%j, %bound), kind=kLoop, calls=%less
}

ENTRY %main (x: f32[3], n: s32[]) -> f32[3] {
  %x.1 = f32[3]{0} parameter(0), metadata={op_name="state[\\'x\\']"}
  %start = s32[] START
  %init = (s32[], f32[3]{0}) tuple(%start, %x.1)
  %loop = (s32[], f32[3]{0}) while(%init), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %y = f32[3]{0} get-tuple-element(%loop), index=1
}
"""


def loop_of(text):
    """(the program, its one loop, the computation that it stands in)."""
    program = Program(text)
    for around in program.computations.values():
        for at in around.instructions.values():
            if at.opcode == "while":
                return program, at, around
    raise AssertionError("no loop")


def test_parsing():
    program, loop, around = loop_of(TEXT.replace("START", "constant(-3)"))
    assert (program.entry, program.num_devices) == ("main", 8)
    assert set(program.computations) == {"body", "less", "condition", "main"}
    assert around.root.name == "y"
    assert around.instructions["x.1"].op_name == "state['x']"
    assert (loop.operands, loop.op_name, loop.attribute("body")) == (["init"], "jit(f)/while", "body")
    assert loop.arrays == [("s32", ()), ("f32", (3,))]
    assert program.computations["condition"].root.called == ["less"]
    assert program.computations["body"].root.operands == ["next", "x"]


def test_the_counter_is_followed():
    """From -3 by 2 while below 9: six turns; nothing known of the start, nothing known of the turns."""
    assert Program.num_turns(*loop_of(TEXT.replace("START", "constant(-3)"))) == 6
    assert Program.num_turns(*loop_of(TEXT.replace("START", "constant(9)"))) == 0
    assert Program.num_turns(*loop_of(TEXT.replace("START", "parameter(1)"))) is None
    endless = TEXT.replace("START", "constant(0)").replace("constant(2)", "constant(0)")
    assert Program.num_turns(*loop_of(endless)) is None


def test_the_compiler_s_own_count_is_believed():
    known = TEXT.replace("START", "parameter(1)").replace(
        "body=%body,", 'body=%body, backend_config={"known_trip_count":{"n":"31"}},'
    )
    assert Program.num_turns(*loop_of(known)) == 31


def test_a_real_loop():
    def f(x):
        return jax.lax.fori_loop(3, 14, lambda i, x: jnp.sin(x) * jnp.float32(i), x)

    assert Program.num_turns(*loop_of(quick_jit(f).lower(jnp.ones(3)).compile().as_text())) == 11


def test_matching_parenthesis():
    assert matching_parenthesis("a(b(c)d)e", 1) == 7
    assert matching_parenthesis("(open", 0) == 5


def test_text_without_a_program():
    with pytest.raises(ValueError, match="no program"):
        Program("module @jit_f {\n}\n")
