"""Losses and speed of a training run between two log lines."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.training.worker import Worker


@dataclass
class Meter:
    """Averages losses over steps and ranks, and measures speed and waiting for data."""

    worker: Worker
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)
    _samples: int = 0
    _waiting: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def watch(self, pairs: Iterator[FramePair]) -> Iterator[FramePair]:
        """Yield frames, and measure the wait for each batch."""
        while True:
            before = time.perf_counter()
            pair = next(pairs, None)
            self._waiting += time.perf_counter() - before
            if pair is None:
                return
            self._samples += len(pair.source) * self.worker.world_size
            yield pair

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add the losses of a step; they stay on the device."""
        known = [name for name in values if name in self._sums]
        if known:
            torch._foreach_add_([self._sums[n] for n in known], [values[n] for n in known])
        self._sums |= {name: values[name].clone() for name in values if name not in self._sums}
        self._counts.update(values.keys())

    def summarise(self) -> dict[str, float]:
        """Return means since the last summary, over all ranks; a collective operation."""
        elapsed = time.perf_counter() - self._since
        names = sorted(self._sums)
        means = torch.stack([self._sums[name] / self._counts[name] for name in names]).float()
        if self.worker.world_size > 1:
            dist.all_reduce(means)
            means /= self.worker.world_size
        summary = dict(zip(names, means.tolist(), strict=True))
        summary["speed/samples_per_second"] = self._samples / elapsed
        summary["speed/share_waiting_for_data"] = self._waiting / elapsed
        self._sums, self._counts, self._samples, self._waiting = {}, Counter(), 0, 0.0
        self._since = time.perf_counter()
        return summary
