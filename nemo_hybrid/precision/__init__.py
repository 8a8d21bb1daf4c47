"""Which module runs in which number format, and the low-precision linear and expert paths."""
