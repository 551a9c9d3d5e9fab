"""How small the loss gap of a rank-d head can be: bounds from above and from below.

Throughout, the target logits Z* (N contexts × V tokens) define p_i = softmax(z*_i), and

    gap(d) = min over Z of rank ≤ d of (1/N) Σ_i KL(p_i ‖ softmax(z_i)),   in nats per context.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy.optimize import minimize

Logits = Float[np.ndarray, "contexts vocab"]
PerRank = Float64[np.ndarray, " ranks"]
EPS = float(np.finfo(np.float64).eps)


def loss_gap(logits: Logits, approximation: Logits) -> float:
    """Mean KL(softmax(logits) ‖ softmax(approximation)) in nats per context, rounded upwards.

    **Arguments:** two matrices of logits of one shape. **Returns:** a float ≥ 0 (float64 rounding included).
    **Raises:** `ValueError` for logits that are not finite (a probability of zero has no logarithm).
    """
    target, other = _log_softmax(logits), _log_softmax(approximation)
    margin = 8 * EPS * float(target.abs().max() + other.abs().max())
    return float((target.exp() * (target - other)).sum(1).mean().clamp(min=0)) + margin


def second_order(logits: Logits, change: Logits) -> float:
    """The local expansion of the gap at logits Z* + δ: (1/2N) Σ_i Var_{p_i}(δ_i), nats per context."""
    p, delta = _log_softmax(logits).exp(), torch.as_tensor(change, dtype=torch.float64)
    centred = delta - (p * delta).sum(1, keepdim=True)
    return float((p * centred**2).sum(1).mean() / 2)


def textbook_upper(logits: Logits, ranks: Sequence[int]) -> PerRank:
    """The plain upper bound (1/4N) Σ_{j>d} σ_j² of the row-centred logits, in nats per context."""
    values = torch.linalg.svdvals(
        _centred(_log_softmax(logits), torch.ones(logits.shape[1]).double())
    )
    return np.array([float((values[d:] ** 2).sum()) for d in _checked(ranks, logits)]) / (
        4 * len(logits)
    )


def textbook_lower(logits: Logits, ranks: Sequence[int]) -> PerRank:
    """The plain lower bound (p_min c(M)/N) Σ_{j>d} σ_j², c(M) = (e^{−M} − 1 + M)/M², M = 1 + N u/p_min.

    u is the plain upper bound: no log-probability of the optimum lies more than M below the target's.
    """
    upper_bound = textbook_upper(logits, ranks)
    smallest = float(_log_softmax(logits).min().exp())
    if smallest < 1e-100:
        return np.zeros(len(ranks))
    m = 1 + len(logits) * upper_bound / smallest
    return 4 * smallest * upper_bound * (np.expm1(-m) + m) / m**2


def reach(
    logits: Logits,
    rank: int,
    steps: int = 200,
    powers: Sequence[float] = (0.0, 0.5, 1.0),
    seeds: Sequence[int] = (),
) -> Logits:
    """Rank-d logits with a small gap: L-BFGS on both factors from weighted truncations, the best kept.

    **Arguments:**

    - `logits`: the target. `rank`: 1 to min(N, V).
    - `steps`: L-BFGS steps from each start; 0 keeps the truncation itself.
    - `powers`: a start each: Eckart–Young with tokens weighted by mean probability to that power.
    - `seeds`: further random starts, one a seed: for a solver that looks for the optimum.

    **Returns:** logits H Wᵀ (contexts, vocab) of rank ≤ d.
    """
    target = _log_softmax(logits)
    _checked([rank], logits)
    starts = [_start(target, rank, power) for power in powers]
    for seed in seeds:
        drawn = (
            torch.randn(
                sum(target.shape), rank, generator=torch.Generator().manual_seed(seed)
            ).double()
            / 3
        )
        starts.append((drawn[: len(target)], drawn[len(target) :]))
    results = [_descend(target, left, right, steps) for left, right in starts]
    return min(results, key=lambda z: loss_gap(logits, z))


def upper(
    logits: Logits,
    ranks: Sequence[int],
    steps: int = 200,
    powers: Sequence[float] = (0.0, 0.5, 1.0),
) -> PerRank:
    """Upper bound on gap(d): the exact loss gap of explicit rank-d logits (`reach`), for each rank.

    gap(d) ≤ (1/N) Σ_i KL(p_i ‖ softmax(z_i)) for *any* Z of rank ≤ d; the logits come from a weighted
    Eckart–Young truncation and `steps` of descent, so the bound holds however far the descent got.

    **Arguments:** `logits` (contexts, vocab), contexts weighted equally; `ranks`, each 1 to min(N, V).
    **Returns:** nats per context. **Raises:** `ValueError` for ranks out of range, logits not finite.
    """
    gaps = {
        d: loss_gap(logits, reach(logits, d, steps, powers))
        for d in sorted(_checked(ranks, logits))
    }
    return np.array([min(gaps[c] for c in gaps if c <= d) for d in ranks])


def lower(
    logits: Logits, ranks: Sequence[int], steps: int = 100, tokens: int = 256, anchors: int = 6
) -> PerRank:
    """Lower bound on gap(d) without further assumptions, for each rank.

    For κ > 0 and weights α_i, β_v ≥ 0 with max(r, r²) ≤ p_iv / κ at r = α_i β_v:
    gap(d) ≥ (κ/N) Σ_{j>d} φ(−σ_j(A)), φ(t) = eᵗ − 1 − t, A = diag(α) (log P* − β²-weighted row mean) diag(β).
    Ascent on β and κ looks for good weights; whatever it finds is a bound, at every rank.

    **Arguments:**

    - `logits` (contexts, vocab), contexts weighted equally; `ranks`, each 1 to min(N, V).
    - `steps` of ascent; `tokens`: how many of the likeliest may have β > 0 (at least 2 max(ranks)).
    - `anchors`: at how many of the ranks weights are sought.

    **Returns:** nats per context. **Raises:** as `upper`.
    """
    target, chosen = _log_softmax(logits), sorted(set(_checked(ranks, logits)))
    likely = target.exp().mean(0).argsort(descending=True)[: max(tokens, 2 * chosen[-1])]
    target, margin = target[:, likely], EPS * float(target.abs().max())
    sought = {chosen[i] for i in np.linspace(0, len(chosen) - 1, anchors).round().astype(int)}
    found = [_ascend(target, d, steps, margin) for d in sought if d < min(target.shape)]
    return np.array([max([float(s[d:].sum()) for s in found], default=0.0) for d in ranks]) / len(
        target
    )


def _ascend(target: torch.Tensor, rank: int, steps: int, margin: float) -> torch.Tensor:
    """The summands κ φ(−σ_j(A)) for the best weights that ascent on log β and log κ found; always valid."""
    log_kappa = target.median().clamp(min=-30).requires_grad_()
    log_beta = (target.quantile(0.3, dim=0) / 2).clamp(min=-30).requires_grad_()
    optimiser = torch.optim.Adam([log_beta, log_kappa], lr=0.1)
    best = torch.zeros(min(target.shape), dtype=torch.float64)
    for step in range(steps):
        sharpness = 4 * 16 ** (step / steps)
        y = target - log_kappa
        room = (
            torch.where(y < 0, y, y / 2) - log_beta
        )  # max(r, r²) ≤ y exactly if log r is at most this
        log_alpha = -torch.logsumexp(-sharpness * room, 1) / sharpness
        a = log_alpha.exp()[:, None] * _centred(target, log_beta.exp())
        gram = a @ a.T if len(a) <= a.shape[1] else a.T @ a
        values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=1e-20).sqrt()
        objective = torch.logsumexp((_phi(values[rank:]) + 1e-300).log(), 0) + log_kappa
        if step % 5 == 4 or step == steps - 1:
            with torch.no_grad():  # the hard minimum is feasible; the margins cover the rounding
                alpha = room.min(1).values.exp() * (1 - 1e-9)
                a = alpha[:, None] * _centred(target, log_beta.exp())
                exact = torch.linalg.svdvals(a)
                error = 8 * (
                    EPS * max(a.shape) * exact[0]
                    + margin * a.numel() ** 0.5 * log_beta.exp().max() * alpha.max()
                )
                found = log_kappa.exp() * _phi((exact - error).clamp(min=0)) * (1 - 1e-12)
                best = found if found[rank:].sum() > best[rank:].sum() else best
        optimiser.zero_grad()
        (-objective).backward()
        optimiser.step()
    return best


def _phi(sigma: torch.Tensor) -> torch.Tensor:
    """φ(−σ) = e^{−σ} − 1 + σ, by its series (rounded down) where the sum would cancel."""
    return torch.where(sigma < 1e-3, sigma**2 / 2 - sigma**3 / 6, torch.expm1(-sigma) + sigma)


def _start(target: torch.Tensor, rank: int, power: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the rank-d truncation with tokens weighted by mean probability ** power."""
    root = (target.exp().mean(0) + 1e-30) ** (power / 2)
    a = _centred(target, root)
    if len(a) <= a.shape[1]:
        left = torch.linalg.eigh(a @ a.T)[1].flip(1)[:, :rank]
        return left, (left.T @ a / root).T
    right = torch.linalg.eigh(a.T @ a)[1].flip(1)[:, :rank]
    return a @ right, right / root[:, None]


def _descend(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, steps: int) -> Logits:
    """Logits after L-BFGS on both factors, brought to one scale first."""
    scale = (right.norm() / left.norm()).sqrt() if left.norm() * right.norm() > 0 else 1.0
    p, cut = target.exp(), left.numel()

    def unpack(x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.from_numpy(x)
        return t[:cut].view_as(left), t[cut:].view_as(right)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        h, w = unpack(x)
        log_q = torch.log_softmax(h @ w.T, 1)
        error = (log_q.exp() - p) / len(p)
        gradient = torch.cat([(error @ w).ravel(), (error.T @ h).ravel()])
        return float((p * (target - log_q)).sum() / len(p)), gradient.numpy()

    start = torch.cat([(left * scale).ravel(), (right / scale).ravel()]).numpy()
    options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": 10, "ftol": 1e-14, "gtol": 1e-12}
    h, w = unpack(
        minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x if steps else start
    )
    return (h @ w.T).numpy()


def _centred(target: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """(target − its root²-weighted row mean) · diag(root): what no row constant can change."""
    weight = root**2 / (root**2).sum()
    return (target - (target @ weight)[:, None]) * root


def _log_softmax(logits: Logits) -> torch.Tensor:
    if not np.isfinite(logits).all():
        i, v = np.argwhere(~np.isfinite(logits))[0]
        raise ValueError(
            f"logits[{i}, {v}] = {logits[i, v]}: a probability of zero has no logarithm; "
            "give finite logits (drop that token or smooth the target)"
        )
    return torch.log_softmax(torch.as_tensor(logits, dtype=torch.float64), 1)


def _checked(ranks: Sequence[int], logits: Logits) -> Sequence[int]:
    for rank in ranks:
        if not 1 <= rank <= min(logits.shape):
            side = f"{min(logits.shape)}, the smaller side of the logits"
            raise ValueError(f"rank = {rank}: must be between 1 and {side}; choose ranks there")
    return ranks
