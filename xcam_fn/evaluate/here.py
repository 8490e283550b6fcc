"""Batches computed in this process, on one device or several, and read ahead of the network."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

from xcam_fn.evaluate.batch import Plan, Row, Task, read, rows_of
from xcam_fn.evaluate.dataset import Photograph
from xcam_fn.evaluate.seen import Seen

_AHEAD = 2  # batches that are read for each device while it computes
_READERS = 2  # threads that decode for each device

T = TypeVar("T")


def computed_here(plans: Sequence[Plan], tasks: Iterator[Task]) -> Generator[tuple[Task, Iterable[Row]]]:
    """What is found of each batch, in order.

    Args:
        plans: the same one for each device.
        tasks: the batches.
    """
    free: SimpleQueue[Plan] = SimpleQueue()
    for plan in plans:
        free.put(plan)

    def work(task: Task, seen: Future[list[Seen]]) -> list[Row]:
        plan = free.get()
        try:
            return list(rows_of(plan, task, seen.result()))
        finally:
            free.put(plan)

    with ThreadPoolExecutor(_READERS * len(plans)) as readers, ThreadPoolExecutor(len(plans)) as devices:
        reading = ahead(((task, readers.submit(read, plans[0], task)) for task in tasks), _AHEAD * len(plans))
        if len(plans) == 1:  # in this thread, so that each row is written as soon as it is there
            yield from ((task, rows_of(plans[0], task, seen.result())) for task, seen in reading)
            return
        computing = ((task, devices.submit(work, task, seen)) for task, seen in reading)
        yield from ((task, rows.result()) for task, rows in ahead(computing, len(plans)))


def in_order(images: Iterator[Photograph], step: int) -> Iterator[tuple[int, list[Photograph]]]:
    """The batches of what can only be read in order, read ahead: the first one's number, and the images."""
    with ThreadPoolExecutor(1) as pool:
        take = lambda: list(itertools.islice(images, step))  # noqa: E731
        reading = ahead((pool.submit(take) for _ in itertools.count()), _AHEAD)
        for start, batch in zip(itertools.count(0, step), reading, strict=False):
            if not (found := batch.result()):
                return
            yield start, found


def ahead(asked: Iterable[T], count: int) -> Iterator[T]:
    """What is asked for, in order, with so many more asked for already."""
    waiting: deque[T] = deque()
    for each in asked:
        waiting.append(each)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
