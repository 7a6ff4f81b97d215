"""What a process asks of its own machine."""

import ctypes
import functools
import platform

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
