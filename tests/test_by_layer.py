"""One pass over all layers gives what each layer gives alone."""

import pytest
import torch

from headbound.measure import anisotropy


def test_by_layer_is_mean_cosine_of_each_layer():
    torch.manual_seed(0)
    states = torch.randn(3, 7, 12, 8) + 0.5
    states[1, :, 0] *= 500  # a sink at the start of each text
    both = anisotropy.by_layer(states.split(3, dim=1), sink_ratios=(None, 10.0), resamples=50)
    for ratio, layers in zip((None, 10.0), both, strict=True):
        for layer, estimate in enumerate(layers):
            alone = anisotropy.mean_cosine(states[layer].unbind(0), ratio, resamples=50)
            assert estimate == pytest.approx(alone)
    assert both[0][0] == both[1][0]
    assert both[0][1] != both[1][1]


def test_by_layer_of_nothing():
    with pytest.raises(ValueError, match="stream is empty"):
        anisotropy.by_layer([])


def test_texts_of_different_lengths():
    blocks = [torch.randn(n, 8) + 1 for n in (3, 9, 5)]
    assert anisotropy.mean_cosine(blocks).value == pytest.approx(
        anisotropy.mean_cosine(torch.cat(blocks)).value
    )
