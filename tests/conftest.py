import matplotlib as mpl
import torch
from hypothesis import settings

mpl.use("Agg")
torch.set_num_threads(2)
# A shared machine is slow at times; a deadline on one example would test the machine, not the code.
settings.register_profile("headbound", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("headbound")
