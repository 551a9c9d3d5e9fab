"""Head-Bound: the measurements behind an executable companion to Godey et al. 2024 (arXiv 2404.07647)."""

import warnings

__version__ = "0.1.0"

# tqdm.auto, imported by transformers, asks for ipywidgets, whose pages would load scripts from other hosts.
warnings.filterwarnings("ignore", message="IProgress not found")
