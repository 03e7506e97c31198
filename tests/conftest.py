"""Settings that all tests share."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whichever test does it

# Tests run side by side; more threads than cores make them wait for each other.
torch.set_num_threads(1)
