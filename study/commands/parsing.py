"""Parsing of options: paths as a shell reads them, and values from their text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from diffvit.checks import usable_path
from diffvit.errors import UserError, shown
from diffvit.hub.account import find_account, find_token
from diffvit.keeping.saving import DEFAULT_SAVING, HUB_LEASE_SECONDS, HUB_SCHEME, Every, Saving, is_on_hub
from diffvit.protocol import ledger_model, resolve_size
from study.grid import find_dataset


class ShellPath(click.Path):
    """A path with ~ expanded, which a shell does not do after quotes or a =. A str, or what `path_type` says."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            path = usable_path(value)
        except UserError as error:
            names = (*param.opts[:1], param.envvar) if isinstance(param, click.Option) else ("the argument",)
            raise UserError(error.message, f"give another path for {' or '.join(str(name) for name in names if name)}.") from None
        return super().convert(str(path), param, ctx)


FOLDER = ShellPath(file_okay=False, path_type=Path)


def taken(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """The options of these names, taken out of those that are given; names that are not there are left out."""
    return {name: given.pop(name) for name in names if name in given}


def parse_saving(
    storage: str | None,
    upload: bool,
    save_every: str = str(DEFAULT_SAVING.every),
    sync_every: str | None = None,
    lease: str | None = None,
) -> Saving:
    """When and where states are kept, from the options of these names. Raises UserError."""
    if upload:
        if storage:
            raise UserError(
                "--upload and --storage exclude each other.",
                "with --upload true the hub is the storage; leave --storage and DIFFVIT_STORAGE out.",
            )
        storage = f"{HUB_SCHEME}{find_account().repository}"
    if is_on_hub(storage):
        os.environ["HF_TOKEN"] = find_token() or ""  # workers have other working directories, without .env
    if storage and "://" not in storage:
        storage = str(usable_path(storage).resolve())  # workers have folders of their own
    saving = Saving(
        Every.parse(save_every), storage or None, parse_seconds(sync_every) if sync_every else DEFAULT_SAVING.sync_every,
        parse_seconds(lease) if lease else HUB_LEASE_SECONDS if is_on_hub(storage) else DEFAULT_SAVING.lease_seconds,
    )  # fmt: skip
    if not storage and (sync_every or lease):
        name = "--sync_every" if sync_every else "--lease"
        raise UserError(f"{name} is given without a storage.", "give --storage URL or --upload true too.")
    return saving


def parse_seconds(text: str) -> float:
    """Seconds from a time such as 10m. Raises UserError."""
    seconds = Every.parse(text).seconds
    if seconds is None:
        raise UserError(f"{shown(text)} is not a time.", "give a time such as 60s, 10m or 1h.")
    return seconds


def parse_resource(text: str) -> tuple[str, float]:
    """Name and amount from NAME=X, or NAME for 1 of it. Raises UserError."""
    name, _, amount = text.partition("=")
    try:
        number = float(amount or 1)
    except ValueError:
        number = 0.0
    if not name or not 0 < number < 1e9:
        raise UserError(f"--resource is {shown(text)}.", "give a name and an amount, such as big_gpu=1.")
    return name, number


def full_names(
    model: str | None, size: str | None, dataset: str | None, data_root: str | None
) -> tuple[str | None, str | None, str | None]:
    """Model, size and data set as the ledger spells them; None stays None. Raises UserError."""
    dataset = find_dataset(dataset, data_root) if dataset else None
    return ledger_model(model) if model else None, resolve_size(size, dataset) if size and dataset else None, dataset
