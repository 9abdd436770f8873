"""What holds for every test."""

import torch

# Tiny models on many threads are slower, ten times so and more where the cores are shared.
torch.set_num_threads(1)
