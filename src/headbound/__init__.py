"""Head-Bound: the measurements behind an executable companion to Godey et al. 2024 (arXiv 2404.07647)."""

__version__ = "0.1.0"
