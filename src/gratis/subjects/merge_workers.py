"""A merge shared out over ray workers: each reads the inputs itself and writes at its places in the output's files.

Workers on other machines must see inputs and output under the same paths (a shared disk).
"""

from __future__ import annotations

import importlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gratis.contract.errors import GratisError, MissingExtraError, ParameterError
from gratis.subjects.selection import Stretch

BATCH = 4 * 1024 * 1024
"""Elements that a worker is given at a time."""
AHEAD = 2
"""Batches that each worker has waiting or in work."""
OBJECT_STORE = 200_000_000
"""Bytes of memory that ray shares between the processes of a cluster started here."""


class WorkerLostError(GratisError):
    """A worker of a merge died; what was written is kept, and the same merge goes on from there."""


class Workers:
    """Processes of a ray cluster: the one that is connected, the one that RAY_ADDRESS names, or one on this machine."""

    def __init__(self, count: int) -> None:
        """Raises ParameterError for a count below 1, MissingExtraError without ray."""
        if count < 1:
            raise ParameterError(f"workers must be at least 1, not {count}.")
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise MissingExtraError.of("ray", "scale") from error
        self._ray, self._own = ray, not ray.is_initialized()
        if self._own:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            away = os.environ.get("RAY_ADDRESS")
            here = {"num_cpus": count, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **({"address": away} if away else here))
        self._actors: list[Any] = [ray.remote(num_cpus=1)(_Worker).remote() for _ in range(count)]

    def each(
        self, work: Callable[[Stretch], Any], parts: Sequence[Stretch], settle: Callable[[], None] | None = None
    ) -> Iterator[Any]:
        """Results of `work` in the order of `parts`; `settle` is called in the worker after each of its batches.

        What `work` raises is raised here; WorkerLostError where a worker dies.
        """
        waiting: deque[Any] = deque()
        given = self._ray.put((work, settle))
        try:
            self._ray.get([actor.begin.remote(given) for actor in self._actors])
            for number, batch in enumerate(_batches(parts)):
                waiting.append(self._actors[number % len(self._actors)].do.remote(batch))
                if len(waiting) >= AHEAD * len(self._actors):
                    yield from self._ray.get(waiting.popleft())
            while waiting:
                yield from self._ray.get(waiting.popleft())
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.WorkerCrashedError) as error:
            raise WorkerLostError(
                "A worker of the merge died (out of memory, killed, or its machine lost): what was written is kept; the "
                "same merge goes on from there."
            ) from error

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()


class _Worker:
    """In another process: does batches of the work it was given last."""

    def begin(self, given: tuple[Callable[[Stretch], Any], Callable[[], None] | None]) -> None:
        torch.set_num_threads(1)
        self._work, self._settle = given

    def do(self, batch: Sequence[Stretch]) -> list[Any]:
        with torch.no_grad():
            done = [self._work(part) for part in batch]
        if self._settle is not None:
            self._settle()
        return done


def _batches(parts: Sequence[Stretch]) -> Iterator[list[Stretch]]:
    batch: list[Stretch] = []
    held = 0
    for part in parts:
        batch.append(part)
        held += part.count
        if held >= BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
