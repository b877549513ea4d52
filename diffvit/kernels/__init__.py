"""Attention, blocks and dropout, each in the forms that are fastest on some device. All are exact to rounding."""

import os

# Triton 3.10 will not fuse products with sums unless it is told to; the kernels were tried with what was the default before.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

LEVELS = 2**16  # of the rate of dropout, which is rounded to 1/65536
