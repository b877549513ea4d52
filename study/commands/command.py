"""Commands: strict about their options, with a help that lists options and commands under headings and ends in examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from diffvit.errors import UserError, shown

# The headings of options and of commands, in the order of the help.
OPTION_HEADINGS = ("What", "Protocol", "Where", "How", "Saving", "Tracking", "Output", "Options")
COMMAND_HEADINGS = ("A study", "A model", "Results", "This machine")


class Option(click.Option):
    """An option that the help lists under a heading, and that says what it takes where it is given something else."""

    heading = OPTION_HEADINGS[-1]

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            converted = super().type_cast_value(ctx, value)
            if isinstance(converted, float) and not math.isfinite(converted):
                raise click.BadParameter("", ctx, self)
            return converted
        except click.BadParameter as error:
            if (takes := _what_it_takes(self.type)) is None or isinstance(error, click.MissingParameter) or ctx.resilient_parsing:
                raise
            raise UserError(f"{self.opts[0]} is {shown(value)}.", f"give {takes}.") from None


def _what_it_takes(kind: click.ParamType) -> str | None:
    """The values of a type, in words; None where click's own message says more."""
    if isinstance(kind, click.Choice):
        return f"one of {', '.join(map(str, kind.choices))}"
    if kind.name == "boolean":
        return "true or false"
    number = {"integer": "a whole number", "float": "a number"}.get(kind.name.removesuffix(" range"))
    least = getattr(kind, "min", None)
    if number is None or least is None:
        return number
    return f"{number} above {least:g}" if getattr(kind, "min_open", False) else f"{number} of at least {least:g}"


def option(*names: str, **settings: Any) -> Callable:
    """click.option, for a heading."""
    return click.option(*names, cls=Option, **settings)


def options(*decorators: Callable) -> Callable:
    """Several options as one decorator, in the order given."""

    def apply(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def under(heading: str, *decorators: Callable) -> Callable:
    """Several options as one decorator, which the help lists under a heading."""

    def apply(function: Any) -> Any:
        before = len(getattr(function, "__click_params__", ()))
        function = options(*decorators)(function)
        for param in function.__click_params__[before:]:
            param.heading = heading
        return function

    return apply


class StrictCommand(click.Command):
    """A command that refuses options given twice, of which click keeps the last, and those with an empty value.

    Args:
        heading: what the list of commands has it under.
        examples: command lines without `run.py`, each with what it does.
    """

    def __init__(self, *given: Any, heading: str = COMMAND_HEADINGS[-1], examples: Sequence[tuple[str, str]] = (), **settings: Any):
        super().__init__(*given, **settings)
        self.heading, self.examples = heading, examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            given, _, order = self.make_parser(ctx).parse_args(list(args))
        except click.NoSuchOption as error:
            owners = [] if error.possibilities else _commands_with(error.option_name, ctx)
            if owners:
                raise UserError(f"{self.name} has no option {error.option_name}.", f"it is one of {', '.join(owners)}.") from None
            # The nearest one; of the others none is meant.
            raise click.NoSuchOption(error.option_name, possibilities=(error.possibilities or [])[:1], ctx=ctx) from None
        if not ctx.resilient_parsing:  # a shell that completes a half command line
            if not set(ctx.help_option_names) & set(args):
                self._check_required(ctx, given)
            self._check_given(ctx, given, order)
        return super().parse_args(ctx, args)

    def _check_required(self, ctx: click.Context, given: dict[str, Any]) -> None:
        """Name all options that are missing, of which click names one."""
        required = [param for param in self.params if isinstance(param, click.Option) and param.required]
        missing = [param.opts[0] for param in required if param.name not in given]
        if len(missing) > 1:
            raise click.UsageError(f"no {', '.join(missing[:-1])} and {missing[-1]} given.", ctx)

    def _check_given(self, ctx: click.Context, given: dict[str, Any], order: Sequence[click.Parameter]) -> None:
        """Refuse what is empty, given twice, or has another option for its value."""
        names = {name for param in self.get_params(ctx) for name in _names_of(param)}
        for param in self.params:
            is_option, value = isinstance(param, click.Option), given.get(str(param.name))
            name = param.opts[0] if is_option else f"argument {param.human_readable_name}"
            if value == "":
                raise click.UsageError(f"{name} is empty.", ctx)
            if is_option and (other := next((each for each in _texts(value) if option_name(each) in names), None)):
                raise click.UsageError(f"{name} has no value: {other} follows it.", ctx)
            once = isinstance(param, click.Option) and not param.multiple and (not param.is_flag or bool(param.secondary_opts))
            if once and order.count(param) > 1:
                raise click.UsageError(f"{name} is given more than once.", ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        listed = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]  # the usage line has the arguments
        records = ((getattr(param, "heading", OPTION_HEADINGS[-1]), param.get_help_record(ctx)) for param in listed)
        _write_sections(formatter, OPTION_HEADINGS, records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                formatter.write_dl([(f"uv run {ctx.find_root().info_name} {line}", what) for line, what in self.examples], col_max=0)


def _commands_with(given: str, ctx: click.Context) -> list[str]:
    """The other commands that have an option."""
    group = ctx.parent.command if ctx.parent else None
    commands = group.commands if isinstance(group, click.Group) else {}
    return [
        f"`{ctx.find_root().info_name} {name}`"
        for name, command in commands.items()
        if any(option_name(given) in _names_of(param) for param in command.params)
    ]


def _names_of(param: click.Parameter) -> set[str | None]:
    """An option's names, as option_name has them."""
    return {option_name(name) for name in (*param.opts, *param.secondary_opts)} - {None}


def option_name(text: str) -> str | None:
    """The name of the option that a word of a command line is; None for another word."""
    return f"--{text[2:].partition('=')[0].replace('-', '_')}" if text.startswith("--") else None


def _texts(value: Any) -> list[str]:
    """The values of an option as they were given."""
    return [each for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, str)]


class StrictGroup(click.Group):
    """A group of strict commands, which its help lists under their headings."""

    command_class = StrictCommand

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        commands = self.commands.items()
        summaries = ((getattr(command, "heading", ""), (name, command.get_short_help_str(width))) for name, command in commands)
        _write_sections(formatter, COMMAND_HEADINGS, summaries)


def _write_sections(formatter: click.HelpFormatter, headings: Sequence[str], headed: Iterable[tuple[str, tuple[str, str] | None]]) -> None:
    """Write the rows of each heading that has any."""
    rows = list(headed)
    for heading in headings:
        if of_heading := [row for its_heading, row in rows if row and its_heading == heading]:
            with formatter.section(heading):
                formatter.write_dl(of_heading)
