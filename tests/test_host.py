"""Memory that was freed stays with the process once it asked for that; simulated devices do not run out of threads."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from parallel.host import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 23, np.int8).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_a_second_allocation_faults_no_pages():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True).stdout)
        for how in ("keep", "plain")
    }
    assert faults["keep"] < 100 < faults["plain"]  # 8 MiB are 2048 pages, or 4 huge ones


@pytest.mark.skipif(platform.system() != "Linux", reason="counts the threads in /proc")
@pytest.mark.parametrize(
    "set_them",
    [{"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, {"JAX_NUM_CPU_DEVICES": "8"}],
    ids=["XLA_FLAGS", "JAX_NUM_CPU_DEVICES"],
)
def test_eight_devices_meet_one_collective_at_a_time_and_may_all_wait(set_them):
    program = (
        "import parallel, jax, os; assert len(jax.devices()) == 8; print(len(os.listdir('/proc/self/task'))); "
        "print(os.environ['XLA_FLAGS'])"
    )
    environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | set_them
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environ)
    threads, flags = found.stdout.splitlines()
    assert int(threads) > 48
    # Of an unknown flag XLA makes an end at once: here it knew this one.
    assert b"--xla_cpu_enable_concurrency_optimized_scheduler=false" in flags
