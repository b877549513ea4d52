"""The machine: its devices and what this process may have of it."""
