"""What a process asks of its own machine."""

import ctypes
import functools
import importlib.metadata
import os
import platform
import re

_THREADS_PER_DEVICE = 8
_AT_ONCE = "xla_cpu_enable_concurrency_optimized_scheduler"
_AT_ONCE_UNKNOWN_FROM = (0, 13)
"""XLA ends a process over a flag that it no longer has: raise this after a look at the new jaxlib's."""
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


def prepare_collectives() -> None:
    """Lets simulated devices meet in their collectives; before JAX is asked for its devices.

    A device simulated on a CPU holds a thread while it waits for the others in a collective. Two things go wrong with
    that, and each ends the process:

    * XLA schedules a program so that what is independent may run at once, collectives too. `shard_map` gives all of
      them one channel, and devices meet by channel: two at once take each other's participants ("Id can't be larger
      than the number of participating threads"). Seen in every run of an MVP's 1F1B step under stage, context and
      tensor, and, as a hang, once in some hundred steps of a GPT-J's. The schedule that saves memory instead keeps
      them in one order.
    * The pool has one thread a core or a device. Once all of them wait, the device that the others wait for has none
      to run on. XLA reads the size of the pool from NPROC.

    What is set in XLA_FLAGS or NPROC stays. Devices that are not simulated are left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    given = os.environ.get("JAX_NUM_CPU_DEVICES", "0")
    if forced := re.findall(r"xla_force_host_platform_device_count=(\d+)", flags):
        given = forced[-1]
    if not given.isdecimal() or int(given) < 2:
        return
    threads = max(_THREADS_PER_DEVICE * int(given), os.cpu_count() or 1)
    os.environ.setdefault("NPROC", str(threads))
    if _AT_ONCE not in flags and _version(importlib.metadata.version("jaxlib")) < _AT_ONCE_UNKNOWN_FROM:
        os.environ["XLA_FLAGS"] = f"{flags} --{_AT_ONCE}=false".strip()


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))
