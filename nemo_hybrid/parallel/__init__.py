"""Processes: the only package that imports torch.distributed or deepspeed."""

import os

import torch

# DeepSpeed chooses its device when it is imported, and warns when it has to guess.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
