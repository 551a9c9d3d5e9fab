import numpy as np
import pytest
import torch

from headbound import device


def test_feed_gives_the_parts_in_order_from_memory_and_from_disk(tmp_path):
    states, targets = (
        np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32),
        np.arange(50),
    )
    np.save(tmp_path / "states.npy", states)
    mapped = np.load(tmp_path / "states.npy", mmap_mode="r")
    places = [slice(0, 20), slice(20, 40), slice(40, 60), np.array([3, 1, 1])]
    parts = list(device.feed([mapped, targets], iter(places), torch.device("cpu")))
    assert [len(y) for _, y in parts] == [20, 20, 10, 3]
    for place, (x, y) in zip(places, parts, strict=True):
        assert np.array_equal(x, states[place])
        assert np.array_equal(y, targets[place])
    assert list(device.feed([states], [], torch.device("cpu"))) == []


def test_feed_reads_one_part_ahead_and_no_further():
    asked = []

    def places():
        for i in range(5):
            asked.append(i)
            yield slice(i, i + 1)

    parts = device.feed([np.arange(5)], places(), torch.device("cpu"))
    next(parts)
    assert asked == [0, 1]
    parts.close()
    assert asked == [0, 1]


def test_what_goes_wrong_while_reading_ahead_is_raised_where_the_part_is_used():
    parts = device.feed([np.arange(3)], [slice(0, 1), np.array([7])], torch.device("cpu"))
    assert next(parts)[0].tolist() == [0]
    with pytest.raises(IndexError):
        next(parts)


def test_devices(monkeypatch):
    assert device.pick("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.pick() == torch.device("cuda")
    assert device.pick("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.pick() == torch.device("mps")
    assert device.precise(device.pick()) == torch.device("cpu")
    assert device.precise(torch.device("cuda")) == torch.device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.pick() == torch.device("cpu")
    with pytest.raises(
        ValueError, match="device = 'cuda': this machine has cpu; use one of them or 'auto'"
    ):
        device.pick("cuda")
