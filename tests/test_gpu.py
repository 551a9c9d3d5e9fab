"""On a CUDA device the measurements give what the CPU gives; skipped with the reason where there is none."""

import hub
import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from headbound import anisotropy, hidden, spectrum

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
    found = torch.cat([s.float().cpu() for s in hidden.stream(model.to("cuda", dtype), rows, [-1])], dim=1)
    assert (found - expected).norm() < tolerance * expected.norm()
