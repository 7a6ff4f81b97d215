"""Small models and parameters for tests: what several test files would otherwise each make for themselves."""

import functools
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import modelzoo
from modelzoo import registry

TINY = {
    model_type: next(preset for preset in family.presets if preset.startswith("tiny-"))
    for model_type, family in registry.FAMILIES.items()
}
"""The smallest preset of every family."""
FIXTURES = Path(__file__).parent / "fixtures"
"""What tests/parity/make_fixtures.py wrote: transformers' answers, MODEL_TYPE.npz."""
COUNTS = FIXTURES / "num_params.json"
"""Parameter counts by preset and class."""

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""jit for programs that run once or twice: most of their time is LLVM's optimisation, which changes no contract."""
vector_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
"""jit that adds in vectors, as users' programs do: for sums of so many terms that adding one by one rounds too much."""


def tiny_gptj(**overrides: Any) -> modelzoo.GPTJConfig:
    """A GPT-J with sizes that are all different, and nothing a power of two that need not be."""
    fields: dict[str, Any] = dict(
        vocab_size=37, n_positions=32, n_embd=24, n_layer=2, n_head=3, rotary_dim=4, n_inner=31
    )
    fields |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0) | overrides
    return modelzoo.GPTJConfig(**fields)


def tiny_mvp(**overrides: Any) -> modelzoo.MvpConfig:
    """An MVP with sizes that are all different, two stacks that differ, and prompts; no dropout."""
    fields: dict[str, Any] = dict(vocab_size=37, d_model=24, max_position_embeddings=16, dropout=0.0)
    fields |= dict(encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=31)
    fields |= dict(decoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=29)
    fields |= dict(use_prompt=True, prompt_length=5, prompt_mid_dim=7, decoder_start_token_id=9) | overrides
    return modelzoo.MvpConfig(**fields)


def random_params(model: modelzoo.Model, seed: int = 0, scale: float = 0.2) -> Any:
    """Parameters large enough that attention is not uniform and that no bias is zero.

    Norm scales lie around one, everything else around zero; drawn by numpy, so that they do not depend on JAX.
    """
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        center = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(random.normal(center, scale, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, modelzoo.abstract_params(model))


def drawn(
    name: str, shape: tuple[int, ...], center: float = 0.0, seed: int = 0, scale: float = 0.2
) -> np.ndarray:
    """A checkpoint's tensor, float32, from its name alone: the same in every program and every version of numpy."""
    random = np.random.RandomState([seed, zlib.crc32(name.encode())])
    return random.normal(center, scale, shape).astype(np.float32)


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree under names such as trunk/layers/norm/scale."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def max_difference(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees of arrays, in float64; NaN if either holds one."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in pairs)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Two trees of one structure agree to an absolute tolerance, leaf by leaf."""
    actual, expected = leaves_by_name(actual), leaves_by_name(expected)
    assert actual.keys() == expected.keys()
    for name in actual:
        have, want = np.asarray(actual[name], np.float64), np.asarray(expected[name], np.float64)
        assert have.shape == want.shape, f"{name}: shape {have.shape}, expected {want.shape}"
        difference = np.max(np.abs(have - want), initial=0.0)
        assert difference <= tolerance, f"{name}: differs by {difference:.3g}, more than {tolerance:.3g}"


def assert_close_relative(actual: Any, expected: Any, tolerance: float) -> None:
    """As `assert_close`, each leaf's tolerance being relative to the leaf's largest element."""
    actual, expected = leaves_by_name(actual), leaves_by_name(expected)
    assert actual.keys() == expected.keys()
    for name in actual:
        have, want = np.asarray(actual[name], np.float64), np.asarray(expected[name], np.float64)
        assert have.shape == want.shape, f"{name}: shape {have.shape}, expected {want.shape}"
        ratio = np.max(np.abs(have - want)) / max(np.max(np.abs(want)), 1e-30)
        assert ratio <= tolerance, (
            f"{name}: differs by {ratio:.3g} of its largest element, more than {tolerance:.3g}"
        )


def assert_equal(actual: Any, expected: Any) -> None:
    """Two trees of one structure are equal, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
