"""How many threads a process uses: one number for FFTs, finufft, BLAS and TensorFlow alike.

It is the number of CPUs that the process may run on, or the environment variable
``CRYOEM_THREADS``, read when this module is first imported. BLAS finds the CPUs by itself; where
the variable is set, importing this module holds BLAS to it. glibc's allocator is held to as many
arenas: by default it opens up to eight a core, and what was freed in one is not there for another.
"""

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from .errors import InputError

__all__ = ["VARIABLE", "count", "each"]

Item = TypeVar("Item")
Result = TypeVar("Result")

#: The environment variable that overrides what the system says.
VARIABLE = "CRYOEM_THREADS"
#: Items for each thread that wait or are in work.
AHEAD = 4
#: glibc's option for how many arenas there may be, and the environment variable of the same.
M_ARENA_MAX, ARENAS = -8, "MALLOC_ARENA_MAX"


@cache
def count() -> int:
    """Threads of every FFT, NUFFT, matrix product and network of this process.

    CPUs that SLURM, ``taskset`` or a container's CPU set keep from the process do not count, nor do
    the other workers of one machine: give each of those its share in ``CRYOEM_THREADS``. So too
    under a quota of CPU time (``docker --cpus``), which is not seen here.
    """
    asked = os.environ.get(VARIABLE, "").strip()
    if asked:
        if not (asked.isascii() and asked.isdigit() and int(asked) > 0):
            raise InputError(
                f"the environment variable {VARIABLE} must be a positive integer, got {asked!r}"
            )
        return int(asked)
    if hasattr(os, "sched_getaffinity"):  # not on macOS or Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def each(
    function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int = AHEAD
) -> Iterator[Result]:
    """What a function makes of every item, in their order, as many at a time as there are threads.

    Meant for functions that spend their time where Python's lock is not held. BLAS uses one thread
    in each. Items are taken as they are needed, ``ahead`` for each thread, and what was made of
    more is not kept; where one fails, or the caller stops, those that have not begun are given up.
    """
    import threadpoolctl

    if count() == 1:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    with (
        threadpoolctl.threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(count()) as pool,
    ):
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead * count():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _limit_blas(threads: int) -> None:
    import scipy.linalg  # noqa: F401  (its BLAS and NumPy's: only what is loaded can be told)
    import threadpoolctl

    threadpoolctl.threadpool_limits(threads, user_api="blas")


def _limit_arenas(arenas: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, arenas)


if os.environ.get(VARIABLE, "").strip():
    _limit_blas(count())
if ARENAS not in os.environ:
    _limit_arenas(count())
