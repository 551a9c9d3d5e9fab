"""Where to compute and in what precision: the one place that decides."""

import torch


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
        raise ValueError(f"device = {name!r}: this machine has {', '.join(available)}; use one of them or 'auto'")
    return torch.device(name)


def precise(device: torch.device) -> torch.device:
    """The device for float64 work: mps has no float64, so its precise work goes to the cpu."""
    return torch.device("cpu") if device.type == "mps" else device


def describe() -> str:
    """The device in words, for provenance."""
    device = pick()
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
