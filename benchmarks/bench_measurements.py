"""Mean cosine and head singular values: seconds, extra memory and error, contenders side by side in
one run.

Each contender runs alone in a fresh process with two threads and at most 8 GB; best of several
repeats.
"""

import json
import logging
import sys

import contest
import numpy as np
import pandas as pd
import torch

GIGABYTES = 8
TOKENS, D, VOCAB = 50_000, 576, 49_152
ROUNDS = 2  # of the fast contenders, in turn, so that a busy moment does not hit one alone


def hidden_states():
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(0)) + 0.3


def head():
    """A head with a condition number of a million, as hard as those of late checkpoints."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(VOCAB, D, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    return (left * torch.logspace(2, -4, D)) @ right.T


def ours_cosine(x):
    from headbound.measure import anisotropy

    return anisotropy.mean_cosine(x).value


def scikit_pairwise(x):
    from sklearn.metrics.pairwise import cosine_similarity

    rows, total = x.numpy(), 0.0  # in blocks: whole, its result alone is 10 GB
    for first in range(0, len(rows), 5000):
        total += cosine_similarity(rows[first : first + 5000], rows).sum(dtype=np.float64)
    return (total - TOKENS) / (TOKENS * (TOKENS - 1))


def torch_pairwise(x):
    units = torch.nn.functional.normalize(x, dim=1)
    total = sum(float((block @ units.T).sum(dtype=torch.float64)) for block in units.split(2000))
    return (total - TOKENS) / (TOKENS * (TOKENS - 1))


def ours_spectrum(w):
    from headbound.measure import spectrum

    return spectrum.singular_values(w)


def scipy_float64(w):
    import scipy.linalg

    return scipy.linalg.svdvals(w.numpy().astype(np.float64))


def weightwatcher(w):
    logging.disable(logging.CRITICAL)
    from weightwatcher import RMT_Util

    # As its analyze() does, which passes over heads of more than 50,000 rows.
    return RMT_Util.svd_vals(w.numpy().astype(float))


COSINES = {
    "ours": ours_cosine,
    "a read pass: x.sum()": lambda x: float(x.sum()),
    "scikit-learn cosine_similarity (pairwise)": scikit_pairwise,
    "torch blocks (pairwise)": torch_pairwise,
}
SPECTRA = {
    "ours": ours_spectrum,
    "torch svdvals float32": lambda w: torch.linalg.svdvals(w).numpy(),
    "torch svdvals float64": lambda w: torch.linalg.svdvals(w.double()).numpy(),
    "scipy svdvals float64": scipy_float64,
    "WeightWatcher": weightwatcher,
}


def child(group, name, repeats):
    """One contender: best seconds, extra memory at the peak, and its result."""
    torch.set_num_threads(contest.THREADS)
    run, data = (COSINES[name], hidden_states()) if group == "cosine" else (SPECTRA[name], head())
    run(data[:2000])  # imports and one-time set-up, before anything is measured
    got = contest.measured(lambda: run(data), int(repeats))
    got["result"] = np.asarray(got["result"]).tolist()
    print(json.dumps(got))


def race(group, names, repeats):
    """Every contender's best round; the slow ones have one."""
    results = {name: [] for name in names}
    for number in range(ROUNDS):
        for name in names:
            slow = "pairwise)" in name
            if not (slow and number):
                results[name].append(
                    contest.contend(group, name, 1 if slow else repeats, gigabytes=GIGABYTES)
                )
    return {
        name: min(got, key=lambda r: np.inf if isinstance(r, str) else r["s"])
        for name, got in results.items()
    }


def cosine_rows():
    x = hidden_states().double()
    units = x / x.norm(dim=1, keepdim=True)
    reference = (float(units.sum(0).square().sum()) - TOKENS) / (TOKENS * (TOKENS - 1))
    results = race("cosine", COSINES, 20)
    read = results["a read pass: x.sum()"]["s"]
    for name, got in results.items():
        if isinstance(got, str):
            yield name, got, "", "", ""
        else:
            error = "" if "read pass" in name else f"{abs(got['result'] - reference):.1e}"
            yield name, f"{got['s']:.4f}", f"{got['s'] / read:.1f}", f"{got['MB']:.0f}", error


def spectrum_rows():
    from headbound.measure.spectrum import singular_entropy

    reference = np.linalg.svd(head().double().numpy(), compute_uv=False)
    results = race("spectrum", SPECTRA, 3)
    float32 = results["torch svdvals float32"]["s"]
    for name, got in results.items():
        if isinstance(got, str):
            yield name, got, *[""] * 4
        else:
            values = np.array(got["result"])
            entropy = abs(singular_entropy(values) - singular_entropy(reference))
            last = abs(values[-1] / reference[-1] - 1)
            row = (
                f"{got['s']:.2f}",
                f"{got['s'] / float32:.2f}",
                f"{got['MB']:.0f}",
                f"{entropy:.0e}",
                f"{last:.0e}",
            )
            yield name, *row


def main():
    print(
        f"{contest.THREADS} threads, a fresh process for each contender, best of several repeats in {ROUNDS} rounds.\n"
    )
    print(f"Mean cosine of {TOKENS:,} x {D} float32; error against float64:")
    columns = ["contender", "seconds", "/ read pass", "extra MB", "error"]
    print(pd.DataFrame(cosine_rows(), columns=columns).to_string(index=False), "\n")
    print(
        f"All singular values of a {VOCAB:,} x {D} float32 head, condition 1e6; errors against a float64 SVD:"
    )
    columns = [
        "contender",
        "seconds",
        "/ torch float32",
        "extra MB",
        "error of entropy",
        "relative, smallest value",
    ]
    print(pd.DataFrame(spectrum_rows(), columns=columns).to_string(index=False))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
