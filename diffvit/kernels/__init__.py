"""Attention, blocks and dropout, each in the forms that are fastest on some device. All are exact to rounding."""

LEVELS = 2**16  # of the rate of dropout, which is rounded to 1/65536
