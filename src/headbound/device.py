"""Where to compute and in what precision, and how data gets there: the one place that decides."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pick(name: str = "auto") -> torch.device:
    """The device to compute on: `auto` prefers cuda, then mps, then cpu.

    **Raises:** `ValueError` for a device that this machine lacks.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    if name.split(":")[0] not in available:
        raise ValueError(
            f"device = {name!r}: this machine has {', '.join(available)}; use one of them or 'auto'"
        )
    return torch.device(name)


def precise(device: torch.device) -> torch.device:
    """The device for float64 work: mps has no float64, so its precise work goes to the cpu."""
    return torch.device("cpu") if device.type == "mps" else device


def feed(
    arrays: Sequence[np.ndarray], places: Iterable[Any], where: torch.device
) -> Iterator[list[Tensor]]:
    """The same parts of several arrays (in memory or memory-mapped) on a device, each read while the last is in use.

    On CUDA through pinned memory and a stream of its own, so that copying and computing overlap. Two parts are held.

    **Arguments:** `places`: what to index the arrays with, one part after the other: slices or arrays of rows.
    """
    stream = torch.cuda.Stream(where) if where.type == "cuda" else None

    def load(place: Any) -> tuple[list[Tensor], torch.cuda.Event | None]:
        parts = [torch.from_numpy(np.array(array[place])) for array in arrays]
        if stream is None:
            return [part.to(where) for part in parts], None
        with torch.cuda.stream(stream):
            return [
                part.pin_memory().to(where, non_blocking=True) for part in parts
            ], stream.record_event()

    def ready(waiting: Future) -> list[Tensor]:
        parts, copied = waiting.result()
        if copied is not None:
            here = torch.cuda.current_stream(where)
            here.wait_event(copied)
            for part in parts:
                part.record_stream(
                    here
                )  # else its memory could be given away while it is still read
        return parts

    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for place in places:
            last, waiting = waiting, pool.submit(load, place)
            if last is not None:
                yield ready(last)
        if waiting is not None:
            yield ready(waiting)


def describe() -> str:
    """The device in words, for provenance."""
    device = pick()
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
