"""Batches of crops, in order, prepared ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from sparserefine.data.crops import Crop, CropDataset, EpochSampler

_AHEAD = 2
"""Batches that wait for each thread."""


class CropLoader:
    """The batches of one epoch. Threads, unlike processes, share one cache of decoded images and start at once.

    Cutting a crop out is a copy of memory, and decoders run outside of Python's lock.

    Args:
        crops: the crops.
        batch: crops per batch.
        length: batches of an epoch.
        threads: how many prepare crops ahead; 0: crops are made when they are asked for.
    """

    def __init__(self, crops: CropDataset, batch: int, length: int, threads: int) -> None:
        self._crops, self._batch, self._length, self._threads = crops, batch, length, threads
        self.sampler = EpochSampler(length * batch)  # the trainer sets its epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Crop]]:
        indices = iter(self.sampler)
        if not self._threads:
            while batch := [self._crops[index] for index in islice(indices, self._batch)]:
                yield batch
            return
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="crops")
        try:
            waiting: deque[Future[Crop]] = deque()
            ahead = self._batch * _AHEAD * self._threads
            waiting.extend(pool.submit(self._crops.__getitem__, index) for index in islice(indices, ahead))
            while waiting:
                yield [waiting.popleft().result() for _ in range(self._batch)]
                waiting.extend(pool.submit(self._crops.__getitem__, index) for index in islice(indices, self._batch))
        finally:  # also where the epoch is not read to its end
            pool.shutdown(cancel_futures=True)
