"""Command lines that follow from one: what to do next with the same runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence

from study.commands.command import option_name

# What names the ledger and its runs, for every command that takes a grid.
_OF_LEDGER = ("--checkpoints", "--data_root")
_OF_RUNS = ("--grid", "--dataset", "--model", "--epochs", *_OF_LEDGER)
# What own_command ends in where it hides one.
WITH_SECRET = " (with the secret"
_COMMANDS = ("study", "evaluate")


def of_same_runs(given: str, name: str) -> str:
    """The command of this name, such as `report`, for the runs that a command line as own_command gives it names."""
    before, kept = _kept(given, _OF_RUNS)
    named = {option_name(word) for word in kept}
    if "--model" in named and "--grid" not in named:  # of which `study` alone has a default
        kept = ["--grid", "digits", *kept]
    return shlex.join([*before, name, *kept])


def of_one_run(given: str, kinds: Sequence[str]) -> str:
    """The `evaluate` of one run, whose run_id is to be filled in, in the ledger that a command line names."""
    before, kept = _kept(given, _OF_LEDGER)
    return shlex.join([*before, "evaluate", *(f"--{kind}" for kind in kinds), *kept, "--run_id", "ID"])


def with_seeds(given: str, seeds: int) -> str:
    """A `study` command line that trains this many seeds."""
    command, *secret = given.partition(WITH_SECRET)
    return f"{re.sub(r' --(seeds[ =][0-9]+|collect)', '', command)} --seeds {seeds}{''.join(secret)}"


def _kept(given: str, names: Collection[str]) -> tuple[list[str], list[str]]:
    """The words before the command's name, and of those after it the options of these names with their values."""
    words = shlex.split(given.partition(WITH_SECRET)[0])
    start = next((number for number, word in enumerate(words) if word in _COMMANDS), len(words))
    kept = [word for before, word in zip(words[start:], words[start + 1 :], strict=False)
            if option_name(word) in names or (option_name(before) in names and "=" not in before)]  # fmt: skip
    return words[:start], kept
