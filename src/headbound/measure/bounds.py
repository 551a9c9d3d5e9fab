"""How small the loss gap of a rank-d head can be: bounds from above and from below.

The target logits Z* (N contexts × V tokens) define p_i = softmax(z*_i), and in nats per context

    gap(d) = min over Z of rank ≤ d of (1/N) Σ_i KL(p_i ‖ softmax(z_i)).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

Logits = Float[np.ndarray, "contexts vocab"]
PerRank = Float64[np.ndarray, " ranks"]
EPS = float(np.finfo(np.float64).eps)
ROUNDINGS = 8  # times EPS: what a sum or a decomposition here may be off, in units of its size
LARGE = 2**20  # logits beyond which the descent, not what it reaches, is in float32
SOFT = 4  # sharpness of the soft minimum when the ascent begins,
SHARPER = 16  # and by how much it has grown at the end
SHRUNK = 1 - 1e-9  # keeps α admissible, and a sum below its value, whatever the rounding
TINY = 1e-20  # added before a root or a logarithm, so that its gradient is finite
LEAST = -30.0  # of a logarithm at the ascent's start


def context_gaps(logits: Logits, approximation: Logits) -> Float64[np.ndarray, " contexts"]:
    """KL(softmax(logits) ‖ softmax(approximation)) of each context, in nats."""
    target = _log_softmax(logits)
    change = target - _log_softmax(approximation)
    return (target.exp() * change).sum(1).clamp(min=0).numpy()


def loss_gap(logits: Logits, approximation: Logits) -> float:
    """The mean of `context_gaps`, rounded upwards.

    >>> round(loss_gap(np.log([[0.25, 0.75]]), np.zeros((1, 2))), 4)
    0.1308
    """
    size = max(float(_log_softmax(z).abs().max()) for z in (logits, approximation))
    return float(context_gaps(logits, approximation).mean()) + 2 * ROUNDINGS * EPS * size


def second_order(logits: Logits, change: Logits) -> float:
    """The local expansion of the gap at logits Z* + δ: (1/2N) Σ_i Var_{p_i}(δ_i), in nats."""
    p = _log_softmax(logits).exp()
    delta = torch.as_tensor(change, dtype=torch.float64)
    delta = delta - (p * delta).sum(1, keepdim=True)
    variances = (p * delta**2).sum(1)
    return float(variances.mean() / 2)


def textbook_upper(logits: Logits, ranks: Sequence[int]) -> PerRank:
    """The plain upper bound (1/4N) Σ_{j>d} σ_j² of the row-centred logits, in nats per context."""
    target = _log_softmax(logits, ranks)
    centred = target - target.mean(1, keepdim=True)
    values = torch.linalg.svdvals(centred)
    squares = values.numpy() ** 2
    tails = [squares[rank:].sum() for rank in ranks]
    return np.array(tails) / (4 * len(logits))


def textbook_lower(logits: Logits, ranks: Sequence[int]) -> PerRank:
    """The plain lower bound (p_min c(M)/N) Σ_{j>d} σ_j², c(M) = (e^{−M} − 1 + M)/M².

    No log-probability of the optimum lies more than M below the target's: M = 1 + N u/p_min, with
    the plain upper bound u.
    """
    u = textbook_upper(logits, ranks)
    target = _log_softmax(logits)
    smallest = float(target.min().exp())
    if smallest < TINY**5:
        return np.zeros(len(ranks))
    m = 1 + len(logits) * u / smallest
    c = (np.expm1(-m) + m) / m**2
    return 4 * smallest * c * u


def reach(
    logits: Logits,
    rank: int,
    steps: int = 200,
    powers: Sequence[float] = (0.0, 0.5, 1.0),
    seeds: Sequence[int] = (),
) -> Logits:
    """Rank-d logits H Wᵀ with a small gap: L-BFGS on both factors from several starts.

    Each of the `powers` is a start: Eckart–Young, tokens weighted by mean probability to that
    power. Each of the `seeds` is a random one. With 0 `steps` a start stays as it is.
    """
    target = _log_softmax(logits, [rank])
    starts = [_start(target, rank, power) for power in powers]
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(sum(target.shape), rank, generator=generator)
        small = drawn.double() / 3
        both = small.split(list(target.shape))
        starts.append(both)
    found = [_descend(target, left, right, steps) for left, right in starts]
    finite = [z for z in found if np.isfinite(z).all()]
    return min(finite, key=lambda z: loss_gap(logits, z))


def upper(logits: Logits, ranks: Sequence[int], steps: int = 200) -> PerRank:
    """Upper bound on gap(d), for each rank: the exact loss gap of the logits that `reach` finds.

    It holds however far the descent got.

    >>> upper(np.eye(3), [1, 2]).round(4).tolist()  # gap(2) = 0
    [0.0552, 0.0]

    **Returns:** nats per context. **Raises:** `ValueError` for ranks not in 1 to min(N, V), or
    logits that are not finite.
    """
    _log_softmax(logits, ranks)  # raises before the work
    ascending = np.unique(ranks)
    gaps = [loss_gap(logits, reach(logits, int(rank), steps)) for rank in ascending]
    least = np.minimum.accumulate(gaps)
    return least[np.searchsorted(ascending, ranks)]


def lower(
    logits: Logits, ranks: Sequence[int], steps: int = 100, tokens: int = 256, anchors: int = 6
) -> PerRank:
    """Lower bound on gap(d), for each rank, without further assumptions.

    For κ > 0 and weights α_i, β_v ≥ 0 with max(r, r²) ≤ p_iv / κ at r = α_i β_v,

        gap(d) ≥ (κ/N) Σ_{j>d} φ(−σ_j(A)),  φ(t) = eᵗ − 1 − t,

    where A = diag(α) (log P* − its β²-weighted row means) diag(β). Ascent on β and κ looks for good
    weights at `anchors` of the ranks; whatever it finds gives a bound. The likeliest `tokens` may
    have β > 0, or 2 max(ranks) if these are more.

    **Returns:** nats per context. **Raises:** as `upper`.
    """
    target = _log_softmax(logits, ranks)
    margin = EPS * float(target.abs().max())
    chosen = np.unique(ranks)
    kept = max(tokens, 2 * chosen[-1])
    likely = target.exp().mean(0).argsort(descending=True)
    target = target[:, likely[:kept]]
    spread = np.linspace(0, len(chosen) - 1, anchors)
    places = spread.round().astype(int)
    found = [torch.zeros(min(target.shape), dtype=torch.float64)]
    for rank in np.unique(chosen[places]).tolist():
        if rank < min(target.shape):
            found.append(_ascend(target, rank, steps, margin))
    terms = torch.stack(found).numpy()
    totals = [terms[:, rank:].sum(1) for rank in ranks]
    best = np.max(totals, 1)
    return best / len(target)


def _ascend(target: Tensor, rank: int, steps: int, margin: float) -> Tensor:
    """The best certified summands κ φ(−σ_j(A)) along an ascent on log β and log κ."""
    log_kappa = target.median().clamp(min=LEAST).requires_grad_()
    log_beta = (target.quantile(0.3, dim=0) / 2).clamp(min=LEAST).requires_grad_()
    optimiser = torch.optim.Adam([log_beta, log_kappa], lr=0.1)
    best = torch.zeros(min(target.shape), dtype=torch.float64)
    for step in range(steps):
        sharpness = SOFT * SHARPER ** (step / steps)
        room = _room(target, log_beta, log_kappa)
        log_alpha = -torch.logsumexp(-sharpness * room, 1) / sharpness
        alpha = log_alpha.exp()
        a = alpha[:, None] * _centred(target, log_beta.exp())
        squares = torch.linalg.eigvalsh(_smaller_gram(a)).flip(0)
        values = squares.clamp(min=TINY).sqrt()
        tail = _phi(values[rank:]).sum()
        objective = torch.log(tail + TINY**2) + log_kappa
        if step % 5 == 4 or step == steps - 1:
            with torch.no_grad():
                found = _certified(target, log_beta, log_kappa, margin)
            if found[rank:].sum() > best[rank:].sum():
                best = found
        optimiser.zero_grad()
        (-objective).backward()
        optimiser.step()
    return best


def _certified(target: Tensor, log_beta: Tensor, log_kappa: Tensor, margin: float) -> Tensor:
    """The summands at the largest admissible α, each lowered by what rounding may have added."""
    beta = log_beta.exp()
    log_alpha = _room(target, log_beta, log_kappa).min(1).values
    alpha = SHRUNK * log_alpha.exp()
    a = alpha[:, None] * _centred(target, beta)
    values = torch.linalg.svdvals(a)
    largest = beta.max() * alpha.max()
    of_entries = margin * a.numel() ** 0.5 * largest
    of_values = EPS * max(a.shape) * values[0]
    error = ROUNDINGS * (of_entries + of_values)
    certain = (values - error).clamp(min=0)
    kappa = log_kappa.exp()
    return SHRUNK * kappa * _phi(certain)


def _room(target: Tensor, log_beta: Tensor, log_kappa: Tensor) -> Tensor:
    """The largest log α_i that each token allows: max(r, r²) ≤ p/κ at log r = log α + log β."""
    y = target - log_kappa
    return torch.where(y < 0, y, y / 2) - log_beta


def _phi(sigma: Tensor) -> Tensor:
    """φ(−σ) = e^{−σ} − 1 + σ, by its series (rounded down) where the sum would cancel."""
    series = sigma**2 / 2 - sigma**3 / 6
    return torch.where(sigma < 1e-3, series, torch.expm1(-sigma) + sigma)


def _start(target: Tensor, rank: int, power: float) -> tuple[Tensor, Tensor]:
    """Factors of the rank-d truncation with tokens weighted by mean probability ** power."""
    root = (target.exp().mean(0) + TINY) ** (power / 2)
    a = _centred(target, root)
    vectors = torch.linalg.eigh(_smaller_gram(a)).eigenvectors
    left = right = vectors.flip(1)[:, :rank]
    if len(left) == len(a):
        right = a.T @ left
    else:
        left = a @ right
    return left, right / root[:, None]


def _descend(target: Tensor, left: Tensor, right: Tensor, steps: int) -> Logits:
    """Logits after L-BFGS on both factors, which are brought to one scale first."""
    precision = torch.float32 if target.numel() > LARGE else torch.float64
    scale = ((right.norm() + TINY) / (left.norm() + TINY)).sqrt()
    h = (left * scale).to(precision)
    w = (right / scale).to(precision)
    p = target.exp().to(precision)
    optimiser = torch.optim.LBFGS(
        [h, w],
        max_iter=steps,
        max_eval=2 * steps,
        history_size=10,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def cross_entropy() -> Tensor:
        # In place, and with the gradient written out: fresh memory would cost more than the sums.
        z = h @ w.T
        z -= z.amax(1, keepdim=True)
        value = -torch.dot(p.flatten(), z.flatten())
        total = z.exp_().sum(1, keepdim=True)
        value += total.log().sum()
        z /= total
        z -= p
        h.grad = z @ w / len(p)
        w.grad = z.T @ h / len(p)
        return value / len(p)

    if steps:
        optimiser.step(cross_entropy)
    return (h.double() @ w.double().T).numpy()


def _centred(target: Tensor, root: Tensor) -> Tensor:
    """(target − its root²-weighted row mean) · diag(root): what no row constant can change."""
    weight = root**2 / (root**2).sum()
    means = target @ weight
    return (target - means[:, None]) * root


def _smaller_gram(a: Tensor) -> Tensor:
    return a @ a.T if len(a) <= a.shape[1] else a.T @ a


def _log_softmax(logits: Logits, ranks: Sequence[int] = ()) -> Float64[Tensor, "contexts vocab"]:
    for rank in ranks:
        if not 1 <= rank <= min(logits.shape):
            raise ValueError(f"rank = {rank}: must be between 1 and {min(logits.shape)}")
    if not np.isfinite(logits).all():
        i, v = np.argwhere(~np.isfinite(logits))[0]
        raise ValueError(
            f"logits[{i}, {v}] = {logits[i, v]}: a probability of zero has no logarithm; "
            "drop that token or smooth the target"
        )
    return torch.log_softmax(torch.as_tensor(logits, dtype=torch.float64), 1)
