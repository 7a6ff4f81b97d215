"""What a process asks of its own machine."""

import ctypes
import functools
import os
import platform
import re

_THREADS_PER_DEVICE = 8
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed for the next allocation, rather than give it back to the system.

    On a CPU, XLA allocates all temporaries of a program anew at every call. glibc maps blocks of that size and unmaps
    them after, so each training step pays for the page faults of gigabytes: a fifth of the step of a 162M-parameter
    GPT-J on two cores. Once this was called, the process keeps its largest footprint until it ends.

    Returns:
        Whether it took: False where the C library is not glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # One arena, never mmap, never trim.
    return all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


def keep_threads_for_collectives() -> None:
    """Gives XLA's CPU backend threads enough for what simulated devices wait for; before JAX is asked for its devices.

    On a CPU a device holds a thread while it waits for the others in a collective, and may wait in several that do not
    depend on each other. The pool has one thread a core or a device: once all of them wait, the device that the others
    wait for has none to run on, and XLA ends the process after 40 seconds. Seen with a 1F1B step on eight devices and
    two cores, once in some hundred steps. XLA reads the size of the pool from NPROC; one that is set stays.
    """
    given = os.environ.get("JAX_NUM_CPU_DEVICES", "0")
    if forced := re.findall(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")):
        given = forced[-1]
    if given.isdecimal() and int(given) > 1:
        threads = max(_THREADS_PER_DEVICE * int(given), os.cpu_count() or 1)
        os.environ.setdefault("NPROC", str(threads))
