"""What JAX reaches on this machine at best: the speed of reading memory, and of multiplying matrices."""

import jax
import jax.numpy as jnp

from benchmarks.sides import Shape


class Machine:
    """Two programs whose speed nothing in a model can pass. Each method runs one once.

    Attributes:
        num_bytes: what `read` reads.
        num_flops: of `multiply`, by name of the product.
    """

    def __init__(self, shape: Shape, num_tokens: int):
        width = shape.n_embd
        self.num_bytes = 4 * width * max(shape.vocab_size * 4, 1)
        self._array = jnp.ones((self.num_bytes // 4,))
        self._sum = jax.jit(jnp.sum)
        sizes = {
            "attention": (num_tokens, width, width),
            "fc_in": (num_tokens, width, 4 * width),
            "fc_out": (num_tokens, 4 * width, width),
            "lm_head": (num_tokens, width, shape.vocab_size),
        }
        self._matrices = {name: (jnp.ones((m, k)), jnp.ones((k, n))) for name, (m, k, n) in sizes.items()}
        self._product = jax.jit(jnp.matmul)
        self.num_flops = {name: 2 * m * k * n for name, (m, k, n) in sizes.items()}
        self._repeats = {
            name: max(1, round(self.num_flops["lm_head"] / flops)) for name, flops in self.num_flops.items()
        }
        self.read()
        for name in sizes:
            self.multiply(name)

    def read(self) -> int:
        """Sums a large array once; returns the bytes read."""
        self._sum(self._array).block_until_ready()
        return self.num_bytes

    def multiply(self, name: str) -> int:
        """Multiplies two matrices, small ones several times; returns the floating-point operations."""
        for _ in range(self._repeats[name]):
            self._product(*self._matrices[name]).block_until_ready()
        return self._repeats[name] * self.num_flops[name]
