"""What every test runs under: eight simulated devices, strict dtypes, a compile cache, no network.

JAX reads these when it is first imported, so they are set here; as environment variables rather than through
`jax.config`, so that the programs which tests start get the same.
"""

import gc
import importlib.util
import itertools
import os
import sys
from pathlib import Path

import pytest

assert "jax" not in sys.modules, "a pytest plugin imported jax before tests/conftest.py could set it up"

# Compiling is most of the suite's time. LLVM's optimisation and the emitters of fused loops by way of MLIR take three
# quarters of that, and decide how fast a program runs and how its sums round, not what it computes.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# What `import parallel` sets, for tests that use devices without it: see parallel.host.prepare_collectives.
os.environ["XLA_FLAGS"] += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["NPROC"] = "64"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
# `make clean` drops the cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# No test needs the network, a screen, or more threads than xdist's workers already are.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# tests/parity compares with torch, which `make test` does not install and `make parity` does.
collect_ignore = [] if importlib.util.find_spec("transformers") else ["parity"]


MANY_MAPS = 25_000
_finished = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Lets go of compiled programs before there are too many.

    Each takes some dozen memory maps, of which Linux gives a process 65,530 and no more: past that XLA crashes.
    """
    maps = Path("/proc/self/maps")
    if next(_finished) % 20 or "jax" not in sys.modules or not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > MANY_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


def pytest_collection_finish() -> None:
    """Keeps the search for garbage short: tracing makes objects by the million, imports made many that stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def rng():
    """A PRNG key, the same in every test."""
    import jax

    return jax.random.key(0)


@pytest.fixture(scope="module")
def one_device():
    """Hides all devices but the first, for a module's tests: the smallest programs to compile."""
    import jax

    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        yield
