"""Processes: the only package that imports torch.distributed or deepspeed."""
