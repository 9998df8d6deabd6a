"""Parts of a job, worked on in this process or by the workers of a Dask scheduler."""

from __future__ import annotations

import contextlib
import math
import pickle
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from . import threads
from .errors import InputError, MissingToolError
from .particles import ParticleStack

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Job", "reached", "shared_out", "worked"]

#: Its number, and particles or whatever else a job works on.
Part = tuple[int, Any]


class Job(Protocol):
    """What is done to every part; workers are sent it once."""

    def place(self, number: int, part: Any, /) -> tuple[int, Any]:
        """Work on a part: its number, and what was found."""


def worked(
    job: Job,
    parts: Iterable[Part],
    scheduler: str | Client | None,
    *,
    here: Callable[[Callable[[Part], Any], Iterable[Part]], Iterable[Any]] = map,
) -> Generator[tuple[int, Any]]:
    """Yield (number, what was found) of every part.

    Parameters
    ----------
    job : Job
    parts : iterable of (int, object)
        The number of each, and what is worked on, such as a chunk of particles and where it begins;
        taken as they are needed.
    scheduler : str or distributed.Client, optional
        The address of a Dask scheduler, or a client of one. Its workers are asked, and what they
        found comes as they finish; a part that is lost with a worker is given to another.
    here : callable
        What maps the job over the parts in this process: by default one after the other.

    Raises
    ------
    InputError
        No scheduler answers at the address; or what a worker raised, after what was in work.
    MissingToolError
        A scheduler was named and Dask is missing.
    """
    if scheduler is None:
        yield from here(lambda part: job.place(*part), parts)
        return
    with _client(scheduler) as client:
        yield from _by_workers(job, iter(parts), client)


def reached(scheduler: str | Client | None) -> None:
    """Refuse a scheduler that does not answer, before anything else is computed."""
    if scheduler is not None:
        with _client(scheduler):
            pass


def shared_out(
    items: int, most: int, scheduler: str | Client | None, *, each: int = 1, least: int = 1
) -> int:
    """How many items to a part, so that all workers, or threads, have as much to do.

    Parameters
    ----------
    items : int
        How many there are.
    most, least : int
        To a part; ``least`` goes before.
    scheduler : str or distributed.Client, optional
        By default it is this process that works.
    each : int
        Parts of every thread, or a multiple: more where some may be slower than others.
    """
    working = threads.count()
    if scheduler is not None:
        with _client(scheduler) as client:
            working = max(1, sum(client.nthreads().values()))
    rounds = max(1, math.ceil(items / (most * each * working)))
    return max(least, math.ceil(items / (rounds * each * working)))


@contextlib.contextmanager
def _client(scheduler: str | Client) -> Iterator[Client]:
    """Yield a client of the scheduler, closed at the end if it was made here."""
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingToolError(
            "Dask is not installed: pip install 'cryoem[dask]', or name no scheduler to work in "
            "this process"
        ) from error
    if isinstance(scheduler, Client):
        yield scheduler
        return
    try:
        client = Client(scheduler)
    except (OSError, ValueError) as error:
        raise InputError(f"no Dask scheduler answers at {scheduler} ({error})") from error
    with client:
        yield client


def _by_workers(job: Job, parts: Iterator[Part], client: Client) -> Generator[tuple[int, Any]]:
    """The scheduler knows how to make everything again that is lost with a worker."""
    import dask
    from distributed import as_completed

    # The job (11 MB with the shipped weights) is sent once, and to each worker once.
    running = as_completed(loop=client.loop)
    failed: InputError | None = None
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GiB"}):
        sent = client.submit(bytes, pickle.dumps(job), pure=False)
        try:
            while True:
                # Two a thread: one in work, one waiting. Workers may join at any time.
                ahead = max(4, 2 * sum(client.nthreads().values())) - running.count()
                for number, part in islice(parts, max(ahead, 0)):
                    running.add(client.submit(_work, sent, number, _bare(part), pure=False))
                if running.is_empty():
                    break
                try:
                    done = next(running).result()
                except InputError as error:
                    # What is in work beside it is waited for, and kept; nothing new is begun.
                    failed, parts = failed or error, iter(())
                    continue
                yield done
            if failed is not None:
                raise failed
        finally:
            client.cancel(list(running.futures))


def _bare(part: Any) -> Any:
    """What a worker needs of a chunk."""
    if type(part) is tuple:
        return tuple(map(_bare, part))
    if isinstance(part, ParticleStack):
        return part.replace(columns={}, origin=None, made_from=())
    return part


_opening = threading.Lock()


@lru_cache(maxsize=1)
def _job(sent: bytes) -> Job:
    job: Job = pickle.loads(sent)
    return job


def _work(sent: bytes, number: int, part: Any) -> tuple[int, Any]:
    """A worker's part."""
    with _opening:  # threads of one worker share the job
        job = _job(sent)
    return job.place(number, part)
