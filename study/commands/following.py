"""Command lines that follow from one: what to do next with the same runs."""

from __future__ import annotations

import re
import shlex

# What names a ledger's runs, for every command that takes a grid.
_NAMES_RUNS = ("--grid", "--dataset", "--model", "--epochs", "--checkpoints", "--data_root")
_WITH_SECRET = " (with the secret"
_COMMANDS = ("study", "evaluate")


def of_same_runs(given: str, name: str) -> str:
    """The command of this name, such as `report`, for the runs that a command line as own_command gives it names."""
    words = shlex.split(given.partition(_WITH_SECRET)[0])
    start = next((number for number, word in enumerate(words) if word in _COMMANDS), len(words))
    kept = [word for before, word in zip(words[start:], words[start + 1 :], strict=False)
            if word.partition("=")[0] in _NAMES_RUNS or before in _NAMES_RUNS]  # fmt: skip
    named = {word.partition("=")[0] for word in kept}
    if "--model" in named and "--grid" not in named:  # of which `study` alone has a default
        kept = ["--grid", "digits", *kept]
    return shlex.join([*words[:start], name, *kept])


def with_seeds(given: str, seeds: int) -> str:
    """A `study` command line with this many seeds."""
    command, *secret = given.partition(_WITH_SECRET)
    return f"{re.sub(r' --seeds[ =][0-9]+', '', command)} --seeds {seeds}{''.join(secret)}"
