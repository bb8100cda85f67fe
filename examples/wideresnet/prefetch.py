"""Augmented batches, made ahead by processes of their own where the network is quicker than one core that augments."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType

import augmix
import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import EdgeAdaptError

AHEAD = 2  # batches waiting for each process: about 5 MB each


class Prefetch:
    """Batches of augmented images, in order and the same whatever `workers` is; a context manager, on whose leaving the processes end.

    Args:
        images: the training set, uint8 [N,H,W,3]; held, not copied.
        seed: of all that is random.
        workers: processes that augment; with 0 the caller's own does, when a batch is asked for.
    """

    def __init__(self, images: NDArray[np.uint8], seed: int, workers: int) -> None:
        self._images, self._seed, self._workers = images, seed, workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Prefetch:
        if self._workers:  # spawned, as a copy of a process with threads or with a GPU in use may hang
            self._pool = ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"), _begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, epoch: int, batches: Sequence[NDArray[np.intp]]) -> Iterator[NDArray[np.float32]]:
        """For each batch of indices its views of this epoch, float32 [VIEWS,n,H,W,3] (`augmix.views`).

        Raises:
            EdgeAdaptError: a process was ended from outside.
        """
        if self._pool is None:
            for batch in batches:
                yield augmix.views(self._images[batch], batch, self._seed, epoch)
            return
        waiting: deque[Future[NDArray[np.float32]]] = deque()
        rest = iter(batches)
        try:
            for batch in rest:
                waiting.append(self._pool.submit(augmix.views, self._images[batch], batch, self._seed, epoch))
                if len(waiting) >= AHEAD * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise EdgeAdaptError(
                "a process that augments images has ended before its time", "run the same command again, where memory is short with fewer --workers"
            ) from error


def _begin() -> None:
    """In each process: Ctrl-C is the trainer's to handle, and if the trainer is killed the process ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    threading.Thread(target=_end_with, args=(trainer.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
