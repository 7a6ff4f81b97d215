import jax
import jax.numpy as jnp
import pytest
from jax import lax

from parallel.flops import count_flops
from parallel.hlo import Program

SHAPE = jax.ShapeDtypeStruct((7, 16, 16), jnp.float32)
ROWS = jax.ShapeDtypeStruct((8, 16), jnp.float32)

# As libtpu writes them: a batched product is a convolution whose batch is a window that meets itself alone.
TPU = """HloModule tpu, num_partitions=4

ENTRY %main (a: bf16[32,4,64,16], b: bf16[32,4,64,16]) -> f32[32,4,64,64] {
  %a = bf16[32,4,64,16]{3,2,1,0} parameter(0)
  %b = bf16[32,4,64,16]{3,2,1,0} parameter(1)
  ROOT %scores = f32[32,4,64,64]{3,2,1,0} convolution(%a, %b), WINDOW, dim_labels=01bf_01oi->01bf
}
""".replace("WINDOW", "window={size=32x4 stride=31x3 lhs_dilate=32x4}")
HEADS = """HloModule tpu, num_partitions=4

ENTRY %main (a: bf16[32,64,128], b: bf16[128,4,16]) -> bf16[32,64,4,16] {
  %a = bf16[32,64,128,1]{2,1,0,3} parameter(0)
  %b = bf16[128,4,16,1]{2,1,0,3} parameter(1)
  ROOT %heads = bf16[32,64,4,16]{3,1,2,0} convolution(%a, %b), WINDOW, dim_labels=0bf1_i1o0->0b1f
}
""".replace("WINDOW", "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}")


def test_a_loop_counts_as_often_as_it_turns():
    def run(weights, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    program = Program(jax.jit(run).lower(SHAPE, ROWS).compile().as_text())
    assert count_flops(program) == 7 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    ("text", "expected"), [(TPU, 2 * 32 * 4 * 64 * 64 * 16), (HEADS, 2 * 32 * 64 * 128 * 64)]
)
def test_products_as_a_tpu_writes_them(text, expected):
    assert count_flops(Program(text)) == expected
