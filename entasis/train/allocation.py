"""How this process gets its memory on a CPU.

The C library hands large blocks back to the system as soon as they are freed and asks for them anew a moment later; the
system fills every page with zeros each time. A training step frees and allocates the same hundreds of megabytes over
and over: on a CPU with AMX that was a third of its time in bf16 (docs/speed.md).
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""`mallopt`'s names for numbers (man mallopt)."""


def keep_freed_memory() -> bool:
    """From now on freed memory stays with the process and is used again; what lay free before is handed back.

    Returns whether that is so: other C libraries than glibc are left as they are.
    """
    try:
        library = ctypes.CDLL(None)
        set_option, trim = library.mallopt, library.malloc_trim
    except (AttributeError, OSError, TypeError):
        return False
    trim(0)
    # Nothing is mapped by itself, and the end of the heap is not given up.
    return bool(set_option(_MMAP_MAX, 0) and set_option(_TRIM_THRESHOLD, 2**31 - 1))
