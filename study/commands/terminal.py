"""Messages of a command: errors, transfers, and the command to repeat."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from diffvit.errors import HIDDEN, redacted
from diffvit.hub.account import find_account
from diffvit.hub.client import Hub
from study.commands.following import WITH_SECRET
from study.text import for_terminal, runner, say, show, warn


def fail(message: str, hint: str, code: int = 2) -> NoReturn:
    """Print an error and what helps to stderr, without secrets, and exit."""
    text = redacted(f"error: {message[:1].lower()}{message[1:]}\nhint: {hint}")
    lines = for_terminal(text, sys.stderr).removeprefix("error:")
    click.echo(click.style("error:", fg="red", bold=True) + lines.replace("\nhint:", f"\n{click.style('hint:', bold=True)}", 1), err=True)
    sys.exit(code)


def own_command() -> str:
    """The command line as it was given but for secrets, for "to resume, run: …"."""
    given = [redacted(argument) for argument in sys.argv[1:]]
    command = shlex.join([*runner().split(), "run.py", *given])
    return command if given == sys.argv[1:] else f"{command}{WITH_SECRET} in place of {HIDDEN})"


def transfer(move: Callable, source: Any, target: Any, force: bool, sentence: str) -> None:
    """Upload or download between a folder and HF_REPOSITORY, and say what was moved.

    Args:
        move: diffvit.utils.upload or download.
        sentence: with places for {moved}, {hub} and {skipped}.
    """
    hub = Hub(find_account(), on_retry=warn, bars=sys.stderr.isatty())
    done = move(source, target, hub, force=force, on_progress=_say_file)
    if done.left:
        say(f"not sent: {', '.join(done.left)}")
    moved = f"{len(done.moved)} files, {done.bytes:,} bytes,"
    show(sentence.format(moved=moved, hub=hub.repository, skipped=len(done.skipped)))


def _say_file(done: int, total: int, name: str) -> None:
    """A line a file, away from a terminal: there the client's bars show it."""
    if name and not sys.stderr.isatty():
        say(f"{name}  {done:,} of {total:,} bytes")
