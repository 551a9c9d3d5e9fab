"""One visual language: colour-blind-safe, told apart in greyscale by dash and marker, with alt text."""

import matplotlib.pyplot as plt
import seaborn as sns
from cycler import cycler
from IPython.display import display
from matplotlib.figure import Figure

COLORS = sns.color_palette("colorblind", 8)
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))]


def use_style() -> None:
    """Set matplotlib up for the book: seaborn's white grid, a cycle of colour, dash and marker together."""
    sns.set_theme(context="notebook", style="whitegrid", palette=COLORS)
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 4.2),
            "figure.constrained_layout.use": True,
            "savefig.dpi": 144,
            "axes.prop_cycle": cycler(color=COLORS)
            + cycler(linestyle=DASHES)
            + cycler(marker=MARKERS),
            "lines.markersize": 4,
            "axes.titlesize": "medium",
            "legend.fontsize": "small",
        }
    )


def show(fig: Figure, name: str, caption: str, alt: str) -> None:
    """Display a figure with what a reader needs beside it, then close it.

    **Arguments:**

    - `fig`: the figure; one a cell.
    - `name`: its label in the book (`fig-…`), for cross-references.
    - `caption`: what to see in it; may be computed.
    - `alt`: what is seen, in a sentence or two, for those who can't see it; may be computed.

    **Raises:** `ValueError` if a text is missing: the book has no figure without alt text.
    """
    for field, text in {"name": name, "caption": caption, "alt": alt}.items():
        if not text.strip():
            raise ValueError(
                f"{field} = {text!r}: every figure needs a name, a caption and an alt text"
            )
    display(fig, metadata={"headbound": {"name": name, "caption": caption, "alt": alt}})
    plt.close(fig)
