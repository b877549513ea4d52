"""Differential and classic Vision Transformers, and the loop that trains both alike."""

__version__ = "0.1.0"
