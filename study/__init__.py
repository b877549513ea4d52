"""The study: a grid of runs, scheduled over Ray, tabulated and drawn."""
