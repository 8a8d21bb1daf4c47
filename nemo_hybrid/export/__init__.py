"""Checkpoints in the number formats that serving engines load."""
