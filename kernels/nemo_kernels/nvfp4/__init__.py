"""A name that is kept: what it was is in :mod:`nemo_kernels.lowp`."""
