"""Worker processes that turn batches into results, in the order of the batches.

Processes and not threads, because cleaning text and parsing wiki markup, most of the work on a
dump, hold the interpreter's lock (tokenizers alone would not). They are spawned: a fork copies
the thread pool of tokenizers in a state of its own choice, which it then has to switch off.
"""

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

Tagged = Iterable[tuple[int, Any]]  # (anything to know a batch by, the batch)
InOrder = Callable[[Callable[[Any], Any], Tagged], Iterator[tuple[int, Any]]]


@contextmanager
def workers(count: int) -> Iterator[InOrder]:
    """A function that maps batches to results, on `count` processes; on none but this one for 1.

    It reads 2 * count + 1 batches ahead and no more. Raises ValueError if a process dies.
    """
    if count == 1:
        yield lambda function, batches: ((tag, function(batch)) for tag, batch in batches)
        return
    pool = ProcessPoolExecutor(count, get_context("spawn"), _leave_interrupts)

    def in_order(function: Callable[[Any], Any], batches: Tagged) -> Iterator[tuple[int, Any]]:
        waiting: deque[tuple[int, Future[Any]]] = deque()
        for tag, batch in batches:
            waiting.append((tag, pool.submit(function, batch)))
            if len(waiting) > 2 * count:
                tag, future = waiting.popleft()
                yield tag, future.result()
        for tag, future in waiting:
            yield tag, future.result()

    try:
        yield in_order
    except BrokenProcessPool as error:
        cure = "most likely for want of memory; use fewer --workers"
        raise ValueError(f"a worker process died, {cure}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts() -> None:
    """Ctrl-C reaches the whole group of processes; the first one ends the others in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
