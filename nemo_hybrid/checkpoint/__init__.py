"""Checkpoints: Hugging Face weights in and out, training state, and files that survive a crash."""
