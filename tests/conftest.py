"""Settings that all tests share."""

import torch

# Tests run side by side; more threads than cores make them wait for each other.
torch.set_num_threads(1)
