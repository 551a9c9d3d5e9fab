"""Head-Bound: what the executable companion to Godey et al. 2024 (arXiv 2404.07647) measures.

Chapter → module: what it holds.

- Saturation → `measure.saturation`: is a late drop real; `measure.scaling`: the law, the shortfall
- A wind tunnel → `train.tunnel`: small models that differ in width alone, trained alike;
  `train.archive`: the long runs, and what is measured in them
- Anisotropy → `measure.anisotropy`: the mean cosine of all pairs of hidden states
- Head spectrum → `measure.spectrum`: singular values, entropies, effective ranks
- Target rank → `measure.ngrams`: how many dimensions next-token distributions ask for
- Rank-constrained heads → `measure.lowrank`: the best head of a rank, by closed form or trained
- Head bound → `measure.bounds`: upper and lower bounds on the loss that a rank costs
- Pythia's checkpoints → `pythia`: cited curves; `measure.checkpoint`: one checkpoint's numbers
- The gradient bottleneck → `measure.gradients`: what passes; `train.repeats`: a trivial text
- Cause or company → `train.changes`: one change of the training at a time, and its effects
- Diagnose → `measure.bottleneck`: is the head of this model too narrow for this text?
- every verdict → `measure.rules`: what the paper says, as functions of curves
- every chapter → `models` (load, readout), `hidden` (states), `corpus` (texts), `stats`
  (`Estimate`)
- below them → `harness` (lm-eval), `cache` (files and keys), `device`, `progress` (bars, workers);
  `train.step`, `train.fast` (one training step), `train.callback` (watch a training of your own)
"""

import warnings
from pathlib import Path

__version__ = "0.1.0"
BOOK = Path(__file__).parents[2] / "book"

# tqdm.auto, imported by transformers, asks for ipywidgets: its pages load scripts from elsewhere.
warnings.filterwarnings("ignore", message="IProgress not found")
