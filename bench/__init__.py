"""Benchmarks and trials: each is a command, `python -m bench.NAME`, that prints what it measured."""
