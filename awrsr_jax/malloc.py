"""Has freed memory kept by the process: the first import of the commands that train, before a thread is started.

XLA allocates the temporary arrays of a step on the CPU anew at every step, and glibc gives large ones back to the
system as soon as they are freed, so that every page of them is faulted in and cleared again. The process keeps its peak
instead, which the next step would reach again; docs/performance.md has what that gains. It is for glibc alone.
"""

import ctypes

M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD = -8, -4, -1  # of malloc.h


def keep_freed_memory() -> None:
  """Sets one heap for all threads, that large arrays come from too, and that never shrinks."""
  libc = ctypes.CDLL(None)
  if hasattr(libc, "gnu_get_libc_version"):
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2 ** 31 - 1)):
      libc.mallopt(option, value)


keep_freed_memory()
