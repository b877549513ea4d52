"""The options of the command line, each defined once, with the heading that the help lists it under."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from diffvit.errors import UserError
from diffvit.keeping.saving import DEFAULT_SAVING, HUB_LEASE_SECONDS
from diffvit.ledger.spec import PRECISIONS
from diffvit.protocol import MODELS, PROTOCOLS
from diffvit.tracking import TRACKERS
from study.commands.command import option, options, under
from study.commands.parsing import FOLDER, ShellPath, parse_saving, taken
from study.grid import GRIDS
from study.placement import Placement
from study.text import warn

# ---------------------------------------------------------------------------------------------------------- types


class Known(click.ParamType):
    """Text, of which a shell completes the known values; what else may be said is checked later."""

    name = "text"

    def __init__(self, *values: str, or_file: bool = False):
        self._values, self._or_file = values, or_file

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        items = [CompletionItem(value) for value in self._values if value.lower().startswith(incomplete.lower())]
        return [CompletionItem(incomplete, type="file")] * self._or_file + items  # bash forgets what comes before a file


class _DataRoot(ShellPath):
    """A folder that must be there where it is typed; one of the environment is looked at by what needs data."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        typed = ctx is None or param is None or ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
        if typed and not Path(path).is_dir():
            hint = "--data_root names one with data sets as user/name."
            raise UserError(f"there is no folder {path} for data sets.", hint)
        return path


class _JsonPath(ShellPath):
    """Where JSON goes: a file, or - for stdout."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "-":
            return Path(value)
        path = super().convert(value, param, ctx)
        if not os.access(path.resolve().parent, os.W_OK):
            raise UserError(f"{path} cannot be written.", "give --json a file in a folder that is there.")
        return path


def switch(name: str, **settings: Any) -> Callable:
    """An option that is true or false; its name alone is true."""
    return option(name, type=bool, is_flag=False, flag_value="true", metavar="[BOOL]", **settings)


_AUTO = {"auto": None, "true": True, "false": False}


def _auto_option(name: str, text: str) -> Callable:
    """An option that is True, False, or None where the program shall choose."""
    return option(
        name, type=click.Choice(list(_AUTO)), default="auto", show_default=True, help=text, callback=lambda *given: _AUTO[given[-1]]
    )


# ----------------------------------------------------------------------------------------------------------- what

MODEL, SIZE, DATASET, GRID = Known(*MODELS), Known("small", "medium", "large"), Known(*PROTOCOLS), Known(*GRIDS, or_file=True)
SIZES = "10B, 25B or 50B (about 10, 25, 50 million parameters); small, medium, large."
DATASETS = "CIFAR-100, BACH, digits, digits-noisy, or FILE:NAME of a grid file that defines it"
MODEL_OR_FILE, MODELS_OR_CLASS = "NAME|FILE.py:CLASS", "An architecture's name, or a file and class of your own."
BY_DEFAULT = "[default: the built-in grids that have finished runs]"
GRIDS_OR_FILE = f"{', '.join(GRIDS)}, or a YAML or TOML file"

# Protocol values, as a run is trained with them and as a trained one is found by them.
OVERRIDES: dict[str, tuple[type, str, str]] = {
    "--epochs": (int, "N", "Override the protocol's epochs."),
    "--batch_size": (int, "N", "Override the protocol's batch size."),
    "--lr": (float, "X", "Override the protocol's peak learning rate."),
    "--warmup_steps": (int, "N", "Override the protocol's warm-up."),
    "--clip_norm": (float, "X", "Clip the gradient's norm. [default: no clipping]"),
    "--heads": (int, "N", "Heads of a classic layer; differential attention pairs them. [default: the protocol's]"),
    "--patch_size": (int, "N", "Side of a patch in pixels; it divides the image's. [default: the protocol's]"),
    "--image_size": (int, "N", "Side in pixels that images are resized to. [default: the protocol's]"),
    "--residual_scale": (bool, "[BOOL]", "Start branches at 1 / sqrt(2 depth) of Xavier's values. [default: true]"),
    "--max_steps": (int, "N", "Stop after N steps: a trial. Its test uses as many images as its training, at least 64."),
    "--label_noise": (float, "X", "Share of training labels that are false. [default: 0]"),
    "--input_noise": (float, "X", "Gaussian noise on training images, pixels in 0-1. [default: 0]"),
}


def _override(name: str, kind: type, unit: str, text: str) -> Callable:
    return switch(name, help=text) if kind is bool else option(name, type=kind, metavar=unit, help=text)


_override_options = {name: _override(name, *values) for name, values in OVERRIDES.items()}
overrides = under("Protocol", *_override_options.values())
trained_with = under(
    "Protocol",
    *(_override(name, kind, unit, f"Evaluate what was trained with this {name}.")
      for name, (kind, unit, _) in OVERRIDES.items() if name != "--batch_size"),
)  # fmt: skip
grid_dataset = under(
    "What",
    option("--dataset", type=DATASET, metavar="NAME", help="The data set of --grid noise, lr, controls or choices. [default: digits]"),
)
of_grid = options(grid_dataset, under("What", _override_options["--epochs"]))
models = under(
    "What",
    option("--model", "models", type=MODEL, multiple=True, metavar=MODEL_OR_FILE,
           help="An architecture in place of the grid's, once for each; every further one is compared with the first."),
)  # fmt: skip
seeds = under("What", option("--seeds", type=click.IntRange(min=1), metavar="N", help="Seeds 0 to N-1 for every cell. [default: 1]"))


def which_grid(text: str, default: str | None = None) -> Callable:
    """--grid, with what it is for."""
    shown = {"default": default, "show_default": True} if default else {}
    return under("What", option("--grid", type=GRID, metavar="GRID|FILE", help=text, **shown))


runs = options(which_grid(f"Which runs: {GRIDS_OR_FILE}.", "digits"), of_grid, seeds)

# ---------------------------------------------------------------------------------------------------------- where

checkpoints = under(
    "Where",
    option(
        "--checkpoints", type=FOLDER, metavar="DIR", default=Path("checkpoints"), show_default=True, help="The ledger: where runs are kept."
    ),
)


def _data_root(kind: click.ParamType) -> Callable:
    return under("Where", option("--data_root", type=kind, metavar="DIR", envvar="DIFFVIT_DATA",
                                 help="Folder with hub data sets as user/name. [env: DIFFVIT_DATA; default: the hub]"))  # fmt: skip


data, data_to_check = _data_root(_DataRoot(file_okay=False)), _data_root(ShellPath(file_okay=False))
data_and_ledger = options(data, checkpoints)
device = under("Where", option("--device", help="cpu, cuda or cuda:N. [default: the first GPU, or the CPU]"))
address = option("--address", help="Ray cluster to use, or local. [default: RAY_ADDRESS, one that runs on this host, else local]")
place = under(
    "Where",
    address,
    option("--gpus_per_run", type=click.FloatRange(min=0), metavar="X",
           help="GPUs of a run; 0.5 lets two share one. [default: 1 where there are GPUs]"),
    option("--cpus_per_run", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
           help="CPUs, and on a CPU threads, of a run."),
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ how

compute = under(
    "How",
    option("--precision", type=click.Choice(["auto", *PRECISIONS]), default="auto", show_default=True, metavar="NAME",
           help="fp32, bf16, fp16, or auto: what the device is fast in."),
    option("--micro_batch", type=click.IntRange(min=1), metavar="N", help="Images per accumulated pass. [default: what fits]"),
    _auto_option("--fused", "Compute the blocks in fused kernels; auto: on a GPU, where measured to be faster."),
    _auto_option("--graphs", "Replay CUDA graphs; auto: on a GPU, with fused blocks."),
    _auto_option("--compile", "torch.compile the blocks; auto: on a GPU without fused kernels, where measured to be faster."),
    option("--recompute/--no-recompute", default=None,
           help="Activation checkpointing: slower, and in much less memory. [default: on a GPU whose memory is very short]"),
    option("--deterministic", is_flag=True, help="On a GPU too, a run repeats to the bit."),
)  # fmt: skip
upload = switch("--upload", default=False,
                help="The hub as storage: finished runs, states of unfinished ones and a model card go to HF_REPOSITORY.")  # fmt: skip
storage = option("--storage", envvar="DIFFVIT_STORAGE", metavar="URL",
                 help="Path or fsspec URL (s3://…) off this machine: runs are copied there, and another machine can take them over. "
                      "[env: DIFFVIT_STORAGE]")  # fmt: skip
saving = options(
    under(
        "Saving",
        option("--save_every", default=str(DEFAULT_SAVING.every), show_default=True, metavar="INTERVAL",
               help="How often the resume state is saved, such as 60s or 500steps: what a kill costs at most."),
        upload,
        storage,
        option("--sync_every", metavar="TIME",
               help="How often the state is copied to the storage: what the loss of this machine costs at most. "
                    f"[default: {DEFAULT_SAVING.sync_every:g}s]"),
        option("--lease", metavar="TIME",
               help="How long after this machine's last sign of life another one may take its runs over. "
                    f"[default: {DEFAULT_SAVING.lease_seconds:g}s; on the hub {HUB_LEASE_SECONDS:g}s]"),
    ),
    under("Tracking",
          option("--track", "tracker", type=click.Choice(list(TRACKERS)), help="Send the curves of runs to an experiment tracker.")),
)  # fmt: skip
json_to = under(
    "Output",
    option("--json", "json_to", type=_JsonPath(path_type=Path, dir_okay=False), is_flag=False, flag_value="-", metavar="[PATH]",
           help="Print JSON in place of text; with PATH, write it there beside the text."),
)  # fmt: skip


def price(text: str) -> Callable:
    """--price, in dollars an hour of what the text says."""
    return under("Tracking", option("--price", type=click.FloatRange(min=0, min_open=True), metavar="P",
                                    help=f"Dollars an hour of one {text}"))  # fmt: skip


# ------------------------------------------------------------------------------------------- values of many options


def note_absent(checkpoints: Path) -> None:
    """Warn of a ledger that is not there, which may be a misspelt one."""
    if not checkpoints.is_dir():
        warn(f"there is no folder {checkpoints} yet.")


def compute_of(given: dict[str, Any]) -> Any:
    """The Compute of a command's options, which are taken out of them."""
    from diffvit.compute import Compute

    return Compute(**taken(given, "micro_batch", "deterministic", "fused", "graphs", "compile", "recompute"))


def saving_of(given: dict[str, Any]) -> Any:
    """The Saving of a command's options, which are taken out of them."""
    return parse_saving(**taken(given, "save_every", "storage", "sync_every", "lease", "upload"))


def placement_of(given: dict[str, Any]) -> Placement:
    """The Placement of a command's options, which are taken out of them."""
    return Placement(**taken(given, "gpus_per_run", "cpus_per_run", "workers", "resources", "price"))
