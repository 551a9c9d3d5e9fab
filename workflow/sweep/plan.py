"""What a sweep costs before anyone starts it: jobs, bytes to fetch, GPU hours, disk at its fullest."""

import argparse
import json
import sys

from headbound import evals
from sweep import measure, remote


def shape(model: str, revision: str) -> tuple[int, int, int, int, str]:
    """Layers, width, head rows, bytes of the whole checkpoint, and where they are known from."""
    try:
        listed = remote.listing(model, revision)
        config = json.loads(remote.small_file(listed, "config.json"))
        sizes = [file.size for file in next(iter(listed.weights().values())).values()]
        return (
            config["num_hidden_layers"],
            config["hidden_size"],
            config["vocab_size"],
            sum(sizes),
            "measured",
        )
    except ConnectionError:
        size = model.split("pythia-")[-1].removesuffix("-deduped")
        if size not in evals.PYTHIA:
            raise
        return *evals.PYTHIA[size], 2 * evals.parameters(model), "computed: hub out of reach"


def flops(
    layers: int, width: int, rows: int, whole: bool, tokens: int, length: int
) -> tuple[float, float]:
    """Operations for one checkpoint: of the forward passes, and in float64 of the head's spectrum.

    Two passes, one for the loss (with the head) and one for the hidden states: 2 for each weight and token, and
    4 · layers · width · length for each token's attention. The spectrum: V d² for the Gram matrix, which is
    symmetric, and about 4/3 d³ for its eigenvalues.
    """
    backbone = 2 * layers * 12 * width**2 + 4 * layers * width * length
    return whole * tokens * (2 * backbone + 2 * rows * width), rows * width**2 + 4 / 3 * width**3


def main() -> int:
    """Print the plan; 1 with one line on standard error where it can't be made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="paper")
    parser.add_argument(
        "--tflops", type=float, default=20, help="sustained, in the sweep's dtype (20)"
    )
    parser.add_argument("--tflops64", type=float, default=5, help="sustained in float64 (5)")
    parser.add_argument(
        "--megabytes",
        type=float,
        default=200,
        help="a second from the Hub, all jobs together (200)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="at once (2)")
    given = parser.parse_args()
    if given.preset != "paper":
        print(f"PRESET={given.preset}: it has no sweep, nothing is fetched; use PRESET=paper")
        return 0
    remote.TRIES = 2
    try:
        table, settings = measure.read("workflow/sweep.yaml")
        shapes = {model: shape(model, names[-1]) for model, names in table.items()}
    except (OSError, ValueError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 1
    done = sum(len(names) for names in table.values()) - len(measure.left(table, settings))
    print(
        f"{'model':<28}{'jobs':>6}{'a checkpoint':>14}{'its head':>12}{'fetched':>12}{'GPU h':>8}  bytes"
    )
    jobs = total = hours = largest = heads = 0.0
    for model, names in table.items():
        layers, width, rows, size, source = shapes[model]
        head = 2 * rows * width
        each = size if settings.whole else head
        forward, precise = flops(
            layers, width, rows, settings.whole, settings.texts * settings.length, settings.length
        )
        gpu = len(names) * (forward / given.tflops + precise / given.tflops64) / 1e12 / 3600
        jobs, total, hours = jobs + len(names), total + len(names) * each, hours + gpu
        largest, heads = max(largest, each), heads + len(names) * head
        sizes = f"{size / 1e9:>11.3f} GB{head / 1e9:>9.3f} GB{len(names) * each / 1e9:>9.1f} GB"
        print(f"{model:<28}{len(names):>6}{sizes}{gpu:>8.2f}  {source}")
    wait = total / given.megabytes / 1e6 / 3600
    print(f"jobs: {jobs:.0f}, {done} of them done")
    print(f"bytes: {total / 1e9:,.1f} GB to fetch, {wait:.1f} h at {given.megabytes:g} MB/s")
    print(f"bytes of the heads alone (whole: false): {heads / 1e9:,.1f} GB")
    print(
        f"GPU hours: {hours:.2f} busy at {given.tflops:g} Tflop/s ({given.tflops64:g} in float64)"
    )
    print(
        f"disk peak: {given.jobs * largest / 1e9:,.1f} GB with {given.jobs} jobs at once; HEADBOUND_KEEP=1 keeps all"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
