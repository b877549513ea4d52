"""Attention, blocks and dropout, each in the forms that are fastest on some device. All are exact to rounding."""
