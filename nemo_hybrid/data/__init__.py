"""Text to tokens to samples to Batch: readers, token stores, sampler and loader."""
