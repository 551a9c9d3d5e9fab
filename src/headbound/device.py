"""Where to compute, and how data gets there: the one place that decides."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pick(name: str = "auto") -> torch.device:
    """The device to compute on: `auto` prefers cuda, then mps, then cpu.

    **Raises:** `ValueError` for a device that this machine lacks.
    """
    backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [device for device, there in backends.items() if there] + ["cpu"]
    if name == "auto":
        return torch.device(available[0])
    if name.split(":")[0] not in available:
        known = ", ".join(available)
        raise ValueError(f"device = {name!r}: this machine has {known}; use one of them or 'auto'")
    return torch.device(name)


def precise(device: torch.device) -> torch.device:
    """The device for float64 work: mps has no float64, so its precise work goes to the cpu."""
    return torch.device("cpu") if device.type == "mps" else device


def feed(
    arrays: Sequence[np.ndarray], places: Iterable[Any], where: torch.device
) -> Iterator[list[Tensor]]:
    """The same parts of several arrays on a device, each read while the last is in use.

    The arrays lie in memory or on disk; each of the `places`, a slice or an array of rows, indexes
    them. Two parts are held. A CUDA device gets them through pinned memory, so that copying and
    computing overlap.

    >>> parts = feed([np.arange(5)], [slice(0, 3), slice(3, 5)], torch.device("cpu"))
    >>> [part.tolist() for (part,) in parts]
    [[0, 1, 2], [3, 4]]
    """

    def load(place: Any) -> list[Tensor]:
        parts = [torch.from_numpy(np.array(array[place])) for array in arrays]
        return [part.pin_memory() for part in parts] if where.type == "cuda" else parts

    with ThreadPoolExecutor(1) as pool:
        loads = (pool.submit(load, place) for place in places)
        following = next(loads, None)
        while following is not None:
            current = following
            following = next(loads, None)
            yield [part.to(where, non_blocking=True) for part in current.result()]
