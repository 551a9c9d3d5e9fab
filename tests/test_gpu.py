"""On a CUDA device the measurements give what the CPU gives; skipped with the reason where there is none."""

import hub
import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from headbound import device, hidden
from headbound.measure import anisotropy, gradients, lowrank, spectrum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_mean_cosine_of_a_million_states():
    states = torch.randn(10**6, 256, generator=torch.Generator().manual_seed(0)) + 0.3
    on_gpu, on_cpu = (anisotropy.mean_cosine(states.to(where)).value for where in ("cuda", "cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-6)


def test_singular_values_of_a_pythia_head():
    head = torch.randn(50_304, 1024, generator=torch.Generator().manual_seed(0))
    on_gpu, on_cpu = (spectrum.singular_values(head.to(where)) for where in ("cuda", "cpu"))
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_hidden_states(dtype, tolerance):
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**hub.shape(64, 512, 2))).eval()
    rows = torch.randint(512, (8, 64), generator=torch.Generator().manual_seed(0))
    expected = torch.cat(list(hidden.stream(model, rows, [-1])), dim=1)
    found = torch.cat(
        [s.float().cpu() for s in hidden.stream(model.to("cuda", dtype), rows, [-1])], dim=1
    )
    assert (found - expected).norm() < tolerance * expected.norm()


def test_fed_parts_are_whole_when_they_are_used():
    rows = np.arange(4_000_000, dtype=np.float32).reshape(-1, 1000)
    places = [slice(i, i + 500) for i in range(0, 4000, 500)]
    sums = [float(x.double().sum()) for (x,) in device.feed([rows], places, torch.device("cuda"))]
    assert sums == [float(rows[place].sum(dtype=np.float64)) for place in places]


def test_heads_and_gradients():
    rng = np.random.default_rng(0)
    data = lowrank.Examples(
        rng.normal(size=(512, 16)).astype(np.float32), rng.integers(300, size=512), np.arange(512)
    )
    weight = torch.from_numpy(rng.normal(size=(300, 16)).astype(np.float32))
    losses, kept = [], []
    for where in ("cpu", "cuda"):
        start = lowrank.Head.random(weight.to(where), 4)
        trained = lowrank.train(data, [start], 1)
        losses.append(lowrank.token_losses(data, trained))
        kept.append(gradients.share_kept(data, weight.to(where)).kept)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    np.testing.assert_allclose(kept[1], kept[0], rtol=1e-6)
