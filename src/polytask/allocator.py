"""Memory that PyTorch frees on CPU, kept for its next tensor."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _KEEP = -1, -3, 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc reuse freed blocks of up to 1 GB instead of returning them to the system.

    By default every tensor above 32 MB is mapped anew, and touching its fresh pages costs more than most
    elementwise operations on it (see ``benchmarks/mtlora.py``). Affects this process only.

    Returns:
        whether the C library took the setting (it is glibc's).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP) and mallopt(_M_TRIM_THRESHOLD, _KEEP))
