#!/usr/bin/env python
"""diffvit's command line. Each command parses its options and calls one function; data go to stdout, all else to stderr.

Heavy imports are inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

try:
    import click
except ModuleNotFoundError:
    print(f"error: {sys.executable} has not the packages that diffvit needs.", file=sys.stderr)
    print(f"hint: pip install uv && uv run run.py {shlex.join(sys.argv[1:])}", file=sys.stderr)
    sys.exit(2)

from diffvit import LENT_HOME, __version__, utils
from diffvit.checks import usable_path
from diffvit.errors import DiffvitError, UserError, redacted
from diffvit.hub.account import check_env_file
from diffvit.keeping.saving import DEFAULT_SAVING, HUB_LEASE_SECONDS
from diffvit.ledger.disk import disk_faults, write_atomically
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.weights import trust_source
from diffvit.machine.host import outlive_readers
from diffvit.protocol import resolve_model
from diffvit.tracking import TRACKERS, check_tracker
from study.commands.parsing import FOLDER, ShellPath, StrictGroup, auto_option, full_names, options, parse_resource, parse_saving, taken
from study.commands.terminal import fail, own_command, terminal_width, transfer, warn
from study.cost.devices import find_sheet
from study.grid import find_dataset, find_grid
from study.placement import Placement


@click.group(
    cls=StrictGroup,
    context_settings={
        "token_normalize_func": lambda token: token.replace("-", "_"),  # --batch-size and --batch_size are the same option
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
)
@click.version_option(__version__, prog_name="diffvit")
def cli() -> None:
    """Does a Differential Vision Transformer scale better than a classic ViT?

    `run.py study` trains a grid of both, `run.py plot` draws it. The same command carries on after an interruption.
    Options may be written with - or with _.
    """
    check_env_file(warn)
    if cache := os.environ.get("DIFFVIT_CACHE"):
        os.environ["DIFFVIT_CACHE"] = str(usable_path(cache).absolute())  # workers have folders of their own


# -------------------------------------------------------------------------------------------------------- options

_SIZES = "10B, 25B or 50B (about 10, 25, 50 million parameters); small, medium, large."
_DATASETS = "CIFAR-100, BACH, digits, digits-noisy, or FILE:NAME of a grid file that defines it"
_MODEL = "NAME|FILE.py:CLASS"
_GRIDS = "digits|pilot|full|full-plus|noise|lr|controls|choices|FILE"
_BY_DEFAULT = "[default: the built-in grids that have finished runs]"

_checkpoints = click.option(
    "--checkpoints", type=FOLDER, default=Path("checkpoints"), show_default=True, help="The ledger: where runs are kept."
)
_data = click.option("--data_root", type=ShellPath(file_okay=False), metavar="DIR", envvar="DIFFVIT_DATA",
                     help="Folder with hub data sets as user/name. [env: DIFFVIT_DATA; default: the hub]")  # fmt: skip
_data_and_ledger = options(_data, _checkpoints)
_device = click.option("--device", help="cpu, cuda or cuda:N. [default: the first GPU, or the CPU]")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_compute_options = options(
    click.option("--precision", default="auto", show_default=True, help="fp32, bf16, fp16, or auto: what the device is fast in."),
    click.option("--micro_batch", type=click.IntRange(min=1), metavar="N", help="Images per accumulated pass. [default: what fits]"),
    auto_option("--fused", "Compute the blocks in fused kernels; auto: on a GPU, where measured to be faster."),
    auto_option("--graphs", "Replay CUDA graphs; auto: on a GPU, with fused blocks."),
    auto_option("--compile", "torch.compile the blocks; auto: on a GPU without fused kernels, where measured to be faster."),
    click.option("--recompute/--no-recompute", default=None,
                 help="Activation checkpointing: slower, and in much less memory. [default: on a GPU whose memory is very short]"),
    click.option("--deterministic", is_flag=True, help="On a GPU too, a run repeats to the bit."),
)  # fmt: skip
_saving_options = options(
    click.option("--save_every", default=str(DEFAULT_SAVING.every), show_default=True, metavar="INTERVAL",
                 help="How often the resume state is saved, such as 60s or 500steps: what a kill costs at most."),
    click.option("--upload", type=bool, default=False, metavar="BOOL",
                 help="The hub as storage: finished runs, states of unfinished ones and a model card go to HF_REPOSITORY."),
    click.option("--storage", envvar="DIFFVIT_STORAGE", metavar="URL",
                 help="Path or fsspec URL (s3://…) off this machine: runs are copied there and can be taken over from there. "
                      "[env: DIFFVIT_STORAGE]"),
    click.option("--sync_every", metavar="TIME",
                 help="How often the state is copied to the storage: what the loss of this machine costs at most. "
                      f"[default: {DEFAULT_SAVING.sync_every:g}s]"),
    click.option("--lease", metavar="TIME",
                 help="How long after this machine's last sign of life another one may take its runs over. "
                      f"[default: {DEFAULT_SAVING.lease_seconds:g}s; on the hub {HUB_LEASE_SECONDS:g}s]"),
    click.option("--track", "tracker", type=click.Choice(list(TRACKERS)), help="Send the curves of runs to an experiment tracker."),
)  # fmt: skip
_place_options = options(
    click.option("--address", help="Ray cluster to use, or local. [default: RAY_ADDRESS, one that runs on this host, else local]"),
    click.option("--gpus_per_run", type=click.FloatRange(min=0), metavar="X",
                 help="GPUs of a run; 0.5 lets two share one. [default: 1 where there are GPUs]"),
    click.option("--cpus_per_run", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
                 help="CPUs, and on a CPU threads, of a run."),
)  # fmt: skip
# Protocol values, as a run is trained with them and as a trained one is found by them.
_OVERRIDES: dict[str, tuple[type, str, str]] = {
    "--epochs": (int, "N", "Override the protocol's epochs."),
    "--batch_size": (int, "N", "Override the protocol's batch size."),
    "--lr": (float, "X", "Override the protocol's peak learning rate."),
    "--warmup_steps": (int, "N", "Override the protocol's warm-up."),
    "--clip_norm": (float, "X", "Clip the gradient's norm. [default: no clipping]"),
    "--heads": (int, "N", "Heads of a classic layer; differential attention pairs them. [default: the protocol's]"),
    "--patch_size": (int, "N", "Side of a patch in pixels; it divides the image's. [default: the protocol's]"),
    "--image_size": (int, "N", "Side in pixels that images are resized to. [default: the protocol's]"),
    "--residual_scale": (bool, "BOOL", "Start branches at 1 / sqrt(2 depth) of Xavier's values. [default: true]"),
    "--max_steps": (int, "N", "Stop after N steps: a trial. Its test uses as many images as its training, at least 64."),
    "--label_noise": (float, "X", "Share of training labels that are false. [default: 0]"),
    "--input_noise": (float, "X", "Gaussian noise on training images, pixels in 0-1. [default: 0]"),
}
_override_options = {name: click.option(name, type=kind, metavar=unit, help=text) for name, (kind, unit, text) in _OVERRIDES.items()}
_trained_with_options = options(
    *(click.option(name, type=kind, metavar=unit, help=f"Evaluate what was trained with this {name}.")
      for name, (kind, unit, _) in _OVERRIDES.items() if name != "--batch_size")
)  # fmt: skip
_grid_dataset = click.option("--dataset", metavar="NAME", help="The data set of --grid noise, lr, controls or choices. [default: digits]")
_of_grid_options = options(_grid_dataset, _override_options["--epochs"])
_seeds = click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="Seeds 0 to N-1 for every cell. [default: 1]")
_which_runs = click.option(
    "--grid", default="digits", show_default=True, metavar=_GRIDS, help="Which runs: a name, or a YAML or TOML file."
)
_runs_options = options(_which_runs, _of_grid_options, _seeds)


def _price(text: str) -> Any:
    return click.option("--price", type=click.FloatRange(min=0, min_open=True), metavar="P", help=f"Dollars an hour of one {text}")


def _compute(given: dict[str, Any]) -> Any:
    """The Compute of a command's options, which are taken out of them."""
    from diffvit.compute import Compute

    return Compute(**taken(given, "micro_batch", "deterministic", "fused", "graphs", "compile", "recompute"))


def _saving(given: dict[str, Any]) -> Any:
    """The Saving of a command's options, which are taken out of them."""
    return parse_saving(**taken(given, "save_every", "storage", "sync_every", "lease", "upload"))


def _study_options(given: dict[str, Any]) -> Any:
    """The StudyOptions of a command's options."""
    from study.options import StudyOptions

    placement = Placement(**taken(given, "gpus_per_run", "cpus_per_run", "workers", "resources", "price"))
    return StudyOptions(compute=_compute(given), placement=placement, command=own_command(), **given)


# -------------------------------------------------------------------------------------------------------- commands


@cli.command()
@click.option("--model", required=True, metavar=_MODEL, help="An architecture's name, or a file and class of your own.")
@click.option("--size", required=True, help=_SIZES)
@click.option("--dataset", required=True, help=f"{_DATASETS}.")
@options(*_override_options.values())
@click.option("--seed", type=int, default=0, show_default=True, help="Decides initial weights, order and dropout.")
@_data_and_ledger
@_compute_options
@_saving_options
@_device
def train(model: str, size: str, dataset: str, seed: int, data_root: str | None, checkpoints: Path, precision: str, device: str | None,
          tracker: str | None, **given: Any) -> None:  # fmt: skip
    """Train one model and measure its test accuracy.

    A run that is done already is not done again; one that was interrupted goes on where its state was last saved.
    """
    overrides, dataset = taken(given, *(name.removeprefix("--") for name in _OVERRIDES)), find_dataset(dataset, data_root)
    RunSpec.of(model, size, dataset, seed, overrides=overrides)  # names first: torch takes seconds to import
    saving = _saving(given)
    from diffvit.machine.device import default_precision, resolve_device
    from study.commands.training import train_and_print

    place = resolve_device(device)
    spec = RunSpec.of(model, size, dataset, seed, default_precision(place) if precision == "auto" else precision, overrides)
    check_tracker(tracker)
    train_and_print(spec, checkpoints, data_root=data_root, device=place, compute=_compute(given), saving=saving, tracker=tracker)


@cli.command()
@click.argument("local", metavar="LOCAL", type=ShellPath(path_type=Path))
@click.argument("hf_dir", metavar="HF_DIR")
@click.option("--force", is_flag=True, help="Replace what is different there.")
def upload(local: Path, hf_dir: str, force: bool) -> None:
    """Upload a file, or a folder's content, into a folder of HF_REPOSITORY; . is its top.

    Links are followed; hidden files (.state, .env) are left out and named. Files that are there with the same content are skipped, and
    different ones are not replaced.
    """
    transfer(utils.upload, local, hf_dir, force, "sent {moved} to {hub}; {skipped} were there")


@cli.command()
@click.argument("hf_path", metavar="HF_PATH")
@click.argument("local", metavar="LOCAL_DIR", type=FOLDER)
@click.option("--force", is_flag=True, help="Replace what is different here.")
def download(hf_path: str, local: Path, force: bool) -> None:
    """Download a file, or a folder's content, of HF_REPOSITORY to a local folder; . is all of it.

    Files that are here with the same content are skipped, and different ones are not replaced.
    """
    transfer(utils.download, hf_path, local, force, "brought {moved} from {hub}; {skipped} were here")


@cli.command()
@click.option("--model", metavar=_MODEL, help="An architecture's name as `list` has it, or a file and class of your own.")
@click.option("--size", help=_SIZES)
@click.option("--dataset", help=f"{_DATASETS}; with --grid, that of a grid for one data set.")
@click.option("--run_id", metavar="ID", help="Which run; it may stand alone.")
@click.option("--seed", type=int, metavar="N", help="Which run, where several match. [default: 0, if it is there]")
@_trained_with_options
@click.option("--grid", metavar="NAME|FILE", help="All finished runs of a grid instead; with --corruptions or --attention.")
@click.option("--corruptions", is_flag=True, help="Under noise, blur and clutter. Kept in the ledger, for the report.")
@click.option("--attention", is_flag=True, help="Where attention goes, from the exact maps. Kept in the ledger, for the report.")
@click.option("--again", is_flag=True, help="Evaluate again what the ledger already has.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N test images only: a trial, which is not kept.")
@click.option("--trust", is_flag=True, help="Run the code of an architecture that comes with a checkpoint from elsewhere.")
@_json
@click.option("--batch_size", type=click.IntRange(min=1), metavar="N", default=64, show_default=True, help="Images at once.")
@_data_and_ledger
@_device
def evaluate(model: str | None, size: str | None, dataset: str | None, run_id: str | None, seed: int | None, grid: str | None,
             corruptions: bool, attention: bool, again: bool, trust: bool, as_json: bool, checkpoints: Path, device: str | None,
             **given: Any) -> None:  # fmt: skip
    """Measure trained models on the test set: accuracy and loss, in all and per class; under noise; where attention goes.

    Of several runs of a model, size and data set it takes the one without overrides and with seed 0, and says so; others are
    named by --seed and by the values that they were trained with.
    """
    kinds = [kind for kind, wanted in (("corruptions", corruptions), ("attention", attention)) if wanted]
    settings = taken(given, "limit", "batch_size", "data_root")  # what is left are overrides
    if again and not kinds:
        raise UserError("--again has nothing to find out again.", "it goes with --corruptions or --attention; all else is always measured.")
    if grid:
        epochs = given.pop("epochs")
        of_one_run = {"model": model, "size": size, "run_id": run_id, "seed": seed, **given}
        if wrong := [name for name, value in of_one_run.items() if value is not None]:
            raise UserError(f"--grid and --{wrong[0]} exclude each other.", "give one of both.")
        if not kinds:
            raise UserError("--grid evaluates nothing by itself.", "add --corruptions, --attention or both.")
        from study.results import finished_checkpoints

        paths = finished_checkpoints(checkpoints, grid, epochs, dataset, settings["data_root"])
    else:
        if not (run_id or (model and size and dataset)) or (size and not dataset):
            raise UserError("which model is not said.", "give --model, --size and --dataset, or --grid, or --run_id.")
        names = full_names(model, size, dataset, settings["data_root"])
        from diffvit.evaluation import find_checkpoint

        chosen: dict[str, Any] = {"run_id": run_id, "seed": seed, "overrides": given}
        paths = [find_checkpoint(checkpoints, *names, **chosen, on_choice=lambda text: click.echo(text, err=True))]
    for path in paths if trust else []:
        trust_source(path)
    from diffvit.machine.device import resolve_device
    from study.commands.evaluating import print_evaluation, print_findings

    settings["device"] = resolve_device(device)
    if kinds:
        print_findings(paths, kinds, as_json, again=again, **settings)
    else:
        print_evaluation(paths[0], as_json, **settings)


@cli.command()
@_runs_options
@click.option("--dry_run", is_flag=True, help="List the runs with their costs and stop.")
@click.option("--rehearse", is_flag=True,
              help="Two real steps of every cell, from data to storage, to find what would fail later; leaves nothing.")  # fmt: skip
@click.option("--shard", metavar="I/N",
              help="Train the I-th of N parts of equal cost: for boxes that share nothing but a storage or the hub.")  # fmt: skip
@click.option("--collect", is_flag=True,
              help="Bring what all boxes have finished from the storage or the hub, tabulate and draw it; train nothing.")  # fmt: skip
@click.option("--yes", is_flag=True, help="On a terminal, start more than ten minutes of work without a question.")
@_place_options
@click.option("--dashboard", type=bool, default=True, show_default=True, metavar="BOOL", help="Ray's dashboard, where Ray is started here.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Data-parallel processes of each run.")  # fmt: skip
@click.option("--resource", multiple=True, metavar="NAME=X",
              help="A custom Ray resource that each run takes X of; limits it to nodes that have it.")  # fmt: skip
@_price("GPU (on CPUs, of a machine): runs report their cost.")
@_data_and_ledger
@_compute_options
@_saving_options
def study(grid: str, dataset: str | None, dry_run: bool, rehearse: bool, shard: str | None, collect: bool, resource: tuple[str, ...],
          yes: bool, **given: Any) -> None:  # fmt: skip
    """Train a grid of runs in parallel, then tabulate and draw it.

    Finished runs are skipped, so the same command carries on. Without arguments: both architectures in three sizes on two
    small data sets, in a few minutes on two CPU cores.
    """
    alone = [name for name, wanted in (("--rehearse", rehearse), ("--dry_run", dry_run), ("--collect", collect)) if wanted]
    if len(alone) > 1:
        raise UserError(f"{alone[0]} and {alone[1]} exclude each other.", "give one of both.")
    if collect and shard:
        raise UserError("--collect and --shard exclude each other.", "--collect brings the runs of all boxes.")
    if dry_run and given["price"]:
        raise UserError("--dry_run trains nothing that --price could be for.", "`run.py plan --price P` says what a study will cost.")
    chosen = find_grid(grid, dataset, given["data_root"])
    chosen.runs(seeds=given["seeds"], overrides={"epochs": given["epochs"]}, on_same=warn)  # names and values first
    saving = _saving(given)
    check_tracker(given["tracker"])
    resources = dict(map(parse_resource, resource))
    if collect and not saving.storage:
        raise UserError("--collect has no place to collect from.", "give --upload true, or the --storage that the boxes had.")
    from study.shard import Shard

    part = Shard.parse(shard) if shard else None
    if part and not saving.storage:
        raise UserError("--shard has no place where the parts come together.", "give --upload true, or a --storage that all boxes reach.")
    from study.cost.planning import dry_run_table
    from study.main import collect_study, rehearse_study, run_study

    ask = not yes and sys.stdin.isatty() and sys.stderr.isatty()
    settings = _study_options({**given, "grid": chosen, "saving": saving, "resources": resources, "shard": part, "ask": ask})
    if dry_run:
        click.echo(dry_run_table(settings))
        return
    sys.exit(collect_study(settings) if collect else rehearse_study(settings) if rehearse else run_study(settings))


@cli.command()
@click.argument("model", metavar="FILE.py:CLASS")
@click.option("--grid", metavar=_GRIDS, help="The sizes and data sets of this grid only. [default: all]")
@_grid_dataset
def check(model: str, grid: str | None, dataset: str | None) -> None:
    """Check an architecture of your own, in seconds on a CPU, before it costs money; exit code 1 if something does not hold.

    Shapes, parameters and FLOPs at every size, gradients, determinism, and that images do not see each other.
    """
    name = resolve_model(model)
    specs = find_grid(grid, dataset).runs(seeds=1) if grid else None
    from diffvit.soundness import cells_of, check_architecture

    sound = True
    for each in check_architecture(cells_of(name, specs)):
        click.echo(each.line())
        sound = sound and each.holds is not False
    sys.exit(0 if sound else 1)


@cli.command()
@_runs_options
@click.option("--gpu", metavar="NAME", help="A GPU by its data sheet, such as h100, 4090 or L4. [default: the machine at hand]")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="How many of them; on a CPU, machines.")
@_price("of them.")
@click.option("--session", type=click.FloatRange(min=0, min_open=True), metavar="HOURS",
              help="How long a lent machine lasts, such as 12: say whether one session suffices.")  # fmt: skip
@click.option("--probe", is_flag=True, help="Measure the machine at hand first, and keep what was measured.")
@click.option("--probe_seconds", type=click.FloatRange(min=0, min_open=True), metavar="S",
              help="How long --probe measures each cell, about. [default: 5]")  # fmt: skip
@click.option("--json", "json_path", type=ShellPath(path_type=Path, dir_okay=False), metavar="PATH", help="Write it as JSON too.")
@_place_options
@_data_and_ledger
@_compute_options
def plan(grid: str, dataset: str | None, gpu: str | None, gpus: int, session: float | None, probe: bool, probe_seconds: float | None,
         json_path: Path | None, **given: Any) -> None:  # fmt: skip
    """Say what a study will take before it starts: parameters, FLOPs, memory, time and money of each run, and when the last ends.

    Numbers are measured on the machine at hand (--probe), were measured there earlier, or are estimated from a data sheet (--gpu);
    the table says which. Finished runs cost nothing, half-done ones only the rest.
    """
    chosen = find_grid(grid, dataset, given["data_root"])
    chosen.runs(seeds=given["seeds"], overrides={"epochs": given["epochs"]}, on_same=warn)  # names and values first
    if gpu:
        find_sheet(gpu)
    for name, value in (("--probe_seconds", probe_seconds), ("--gpus_per_run", given["gpus_per_run"])):
        if not probe and (value or (gpu and value == 0)):  # without --gpu, 0 GPUs choose what was measured on the CPU
            raise UserError(f"{name} says how --probe measures, and without it changes nothing.", f"give --probe, or leave {name} out.")
    if json_path and not os.access(json_path.resolve().parent, os.W_OK):
        raise UserError(f"{json_path} cannot be written.", "give --json a file in a folder that is there.")
    from study.cost.forecast import forecast_json, forecast_text
    from study.cost.planning import plan_study

    forecast = plan_study(_study_options({**given, "grid": chosen}), gpu, gpus, (probe_seconds or 5.0) if probe else None, session)
    if json_path:
        write_atomically(json_path, (json.dumps(forecast_json(forecast), indent=1) + "\n").encode())
    click.echo(forecast_text(forecast, terminal_width()))


@cli.command()
@_runs_options
@click.option("--storage", envvar="DIFFVIT_STORAGE", metavar="URL",
              help="Look there instead, hf://USER/NAME for the hub; from any machine. [env: DIFFVIT_STORAGE]")  # fmt: skip
@click.option("--web", is_flag=True, help="Also serve the curves to a browser on this machine, until Ctrl-C.")
@_data_and_ledger
def watch(grid: str, dataset: str | None, seeds: int | None, epochs: int | None, storage: str | None, web: bool, data_root: str | None,
          checkpoints: Path) -> None:  # fmt: skip
    """Show how far a study is that runs elsewhere, from its checkpoints folder or its storage alone. Off a terminal, once."""
    chosen = find_grid(grid, dataset)
    chosen.runs(seeds=seeds, overrides={"epochs": epochs}, on_same=warn)  # names and values first
    from study.live.watching import watch_study
    from study.options import StudyOptions

    watch_study(StudyOptions(chosen, checkpoints, seeds, epochs).on(None).runs(), checkpoints, storage, data_root, web)


@cli.command()
@_which_runs
@_grid_dataset
@click.option("--images", type=click.IntRange(min=1), metavar="N", default=4, show_default=True, help="How many images they are shown.")
@click.option("--quick", is_flag=True, help="Images of at most 8 x 8 patches, and photographs for data on the hub.")
@_json
@_data
def untrained(grid: str, dataset: str | None, images: int, quick: bool, as_json: bool, data_root: str | None) -> None:
    """Look at a grid's models before their first step: do the architectures start alike?

    How alike an image's tokens are after the last block (cosine), what attention and MLP add in the first, middle and last layer (root
    mean square), and the entropy of the class token's attention. Seconds on a CPU; a minute for the largest models.
    """
    from study.report.start import start_rows, start_text

    rows = start_rows(find_grid(grid, dataset, data_root).runs(seeds=1), images, data_root, quick)
    click.echo(json.dumps(rows, indent=1) if as_json else start_text(rows))


@cli.command()
@click.option("--grid", metavar=_GRIDS, help=f"Which runs to draw. {_BY_DEFAULT}")
@_of_grid_options
@click.option("--out", type=FOLDER, metavar="DIR", help="[default: figures in the checkpoints folder]")
@_checkpoints
def plot(**given: Any) -> None:
    """Draw the losses and the scaling of finished runs: seven figures for each data set and condition, as PNG and SVG."""
    from study.results import plot_grid

    for path in plot_grid(**given):
        click.echo(path)


@cli.command()
@click.option("--grid", metavar="NAME|FILE", help=f"Which runs to report. {_BY_DEFAULT}")
@_of_grid_options
@click.option("--out", type=FOLDER, metavar="DIR", help="[default: report in the checkpoints folder; of a grid file NAME_report]")
@_checkpoints
def report(**given: Any) -> None:
    """Write the verdict, with its intervals and all that it rests on, as one HTML page and as Markdown."""
    from study.results import report_grid

    for path in report_grid(**given):
        click.echo(path)


@cli.command()
@click.option("--grid", default="digits", show_default=True, metavar="NAME|FILE", help="Whose data sets and sizes.")
@_of_grid_options
@click.option("--difference", type=float, default=2.0, show_default=True, metavar="PERCENT", help="Relative difference in error.")
@_json
@_checkpoints
def power(grid: str, dataset: str | None, epochs: int | None, difference: float, as_json: bool, checkpoints: Path) -> None:
    """Say how many seeds it takes to see a difference, from the spread between the seeds that are done."""
    from study.report.power import power_rows, power_text

    rows = power_rows(checkpoints, find_grid(grid, dataset).runs(overrides={"epochs": epochs}), difference / 100)
    click.echo(json.dumps(rows, indent=1) if as_json else power_text(rows, difference / 100))


@cli.command("list")
@click.option("--grid", metavar=_GRIDS, help="Also list this grid's runs that are not done. [default: what is there]")
@_of_grid_options
@_seeds
@click.option("--verify", is_flag=True, help="Re-read every file of every run and name what is damaged; exit code 1 if anything is.")
@_json
@_data_and_ledger
def list_runs(grid: str | None, verify: bool, as_json: bool, checkpoints: Path, **given: Any) -> None:
    """Show the ledger: each run, done or not, its accuracy and its files."""
    if wrong := [name for name in ("seeds", "epochs") if given[name] is not None and not grid]:
        raise UserError(f"--{wrong[0]} is given without --grid.", "it says which runs of a grid to look for.")
    if verify and (grid or given["dataset"]):
        raise UserError(f"--verify and --{'grid' if grid else 'dataset'} exclude each other.", "--verify reads all runs that there are.")
    from study.listing import ledger_rows, ledger_text, verify_ledger

    if verify:
        report = verify_ledger(checkpoints)
        click.echo(json.dumps(report, indent=1) if as_json else "\n".join([*report["damaged"], report["summary"]]))
        sys.exit(1 if report["damaged"] else 0)
    rows = ledger_rows(checkpoints, grid, **given)
    click.echo(json.dumps(rows, indent=1) if as_json else ledger_text(rows))


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a run, a disk or a storage failed, 2 bad input, 130 interrupted."""
    sys.excepthook = lambda *error: click.echo(redacted("".join(traceback.format_exception(*error))), err=True, nl=False)
    outlive_readers()
    if LENT_HOME:
        warn(f"this user has no home that can be written: downloads and caches go to {LENT_HOME}; DIFFVIT_CACHE and HF_HOME move them")
    try:
        with disk_faults(Path.cwd()):
            code = cli.main(prog_name="run.py", standalone_mode=False)
    except DiffvitError as error:
        fail(error.message, error.hint, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        sys.exit(0)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "run.py"
        fail(error.format_message(), f"`{command} --help` shows the options.")
    except click.ClickException as error:
        fail(error.format_message(), "`run.py --help` shows the commands.")
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
