"""The machine: its devices, and how much of them this process may use."""
