#!/usr/bin/env python
"""diffvit's command line. Each command parses, calls one function, and prints: data to stdout, all else to stderr.

Heavy imports stand inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from diffvit import LENT_HOME, __version__
from diffvit.checks import usable_path
from diffvit.errors import HIDDEN, DiffvitError, UserError, redacted, shown
from diffvit.findings.kept import find_out
from diffvit.hub.account import check_env_file, find_account, find_token
from diffvit.hub.client import Hub
from diffvit.keeping.saving import DEFAULT_SAVING, HUB_LEASE_SECONDS, HUB_SCHEME, Every, Saving, is_on_hub
from diffvit.ledger.disk import disk_faults, write_atomically
from diffvit.ledger.files import files_of_weights
from diffvit.ledger.spec import RunSpec
from diffvit.machine.host import outlive_readers
from diffvit.protocol import resolve_dataset, resolve_model, resolve_size
from diffvit.signals import StopSignals
from diffvit.utils import download as bring
from diffvit.utils import upload as send
from study.cost.devices import find_sheet
from study.grid import find_grid
from study.listing import ledger_rows, ledger_text, verify_ledger
from study.placement import Placement
from study.results import finished_checkpoints, plot_grid, report_grid

# --batch-size and --batch_size are the same option.
_SETTINGS = {
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
}


class _Command(click.Command):
    """A command that refuses what would vanish: options given twice, of which click keeps the last, and those with an empty value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, order = self.make_parser(ctx).parse_args(list(args))
        for param in self.params:
            name = param.opts[0] if isinstance(param, click.Option) else f"argument {param.human_readable_name}"
            if given.get(str(param.name)) == "":
                raise click.UsageError(f"{name} is empty.", ctx)
            once = isinstance(param, click.Option) and not param.multiple and (not param.is_flag or bool(param.secondary_opts))
            if once and order.count(param) > 1:
                raise click.UsageError(f"{name} is given more than once.", ctx)
        return super().parse_args(ctx, args)


class _Group(click.Group):
    command_class = _Command


class _Path(click.Path):
    """A path as a shell reads it, ~ included, which quotes or a = before it keep from the shell. A str, or what `path_type` says."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            path = usable_path(value)
        except UserError as error:
            names = (*param.opts[:1], param.envvar) if isinstance(param, click.Option) else ("the argument",)
            raise UserError(error.message, f"give another path for {' or '.join(str(name) for name in names if name)}.") from None
        return super().convert(str(path), param, ctx)


_FOLDER = _Path(file_okay=False, path_type=Path)


@click.group(context_settings=_SETTINGS, cls=_Group)
@click.version_option(__version__, prog_name="diffvit")
def cli() -> None:
    """Does a Differential Vision Transformer scale better than a classic ViT?

    `run.py study` trains a grid of both, `run.py plot` draws it. The same command carries on after an interruption.
    Options may be written with - or with _.
    """
    check_env_file()
    if cache := os.environ.get("DIFFVIT_CACHE"):
        os.environ["DIFFVIT_CACHE"] = str(usable_path(cache).absolute())  # workers have folders of their own


def _options(*options: Callable) -> Callable:
    """Several click options as one decorator, in the order given."""

    def apply(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


_checkpoints_option = click.option(
    "--checkpoints",
    type=_FOLDER,
    default=Path("checkpoints"),
    show_default=True,
    help="The ledger: where runs are kept.",
)
_data_option = click.option(
    "--data_root",
    type=_Path(file_okay=False),
    metavar="DIR",
    envvar="DIFFVIT_DATA",
    help="Folder with hub data sets as user/name. [env: DIFFVIT_DATA; default: the hub]",
)
_AUTO = {"auto": None, "true": True, "false": False}


def _choice(name: str, text: str) -> Callable[[Callable], Callable]:
    """An option that is true, false, or None where the program shall choose."""
    return click.option(
        name, type=click.Choice(list(_AUTO)), default="auto", show_default=True, help=text, callback=lambda *given: _AUTO[given[-1]]
    )


_run_options = _options(
    click.option("--model", required=True, help="vit_classic or vit_differential."),
    click.option("--size", required=True, help="10B, 25B or 50B (about 10, 25, 50 million parameters); small, medium, large."),
    click.option("--dataset", required=True, help="CIFAR-100, BACH, digits or digits-noisy."),
)
_compute_options = _options(
    click.option("--precision", default="auto", show_default=True, help="fp32, bf16, or auto: bf16 where the GPU has it."),
    click.option("--micro_batch", type=click.IntRange(min=1), metavar="N", help="Images computed at once. [default: what fits]"),
    _choice("--fused", "Compute the blocks in kernels of our own; auto: on a GPU, where it is found to be faster."),
    _choice("--graphs", "Replay CUDA graphs; auto: on a GPU, with fused blocks."),
    _choice("--compile", "torch.compile the blocks; auto: on a GPU without such kernels, where it is found to be faster."),
    click.option("--recompute/--no-recompute", default=None,
                 help="Compute activations again instead of keeping them: slower, and in much less memory. "
                      "[default: on a GPU whose memory is very short]"),
    click.option("--deterministic", is_flag=True, help="On a GPU too, give the same bits every time."),
)  # fmt: skip
_saving_options = _options(
    click.option("--save_every", default=str(DEFAULT_SAVING.every), show_default=True, metavar="INTERVAL",
                 help="How often the state of training is saved, such as 60s or 500steps: what a kill costs at most."),
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
)  # fmt: skip
_place_options = _options(
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
    "--max_steps": (int, "N", "Stop after N steps: a trial. Its test uses as many images as its training, at least 64."),
    "--label_noise": (float, "X", "Share of training labels that are false. [default: 0]"),
    "--input_noise": (float, "X", "Gaussian noise on training images, pixels in 0-1. [default: 0]"),
}
_override_options = _options(
    *(click.option(name, type=kind, metavar=metavar, help=text) for name, (kind, metavar, text) in _OVERRIDES.items())
)
_EPOCHS = click.option("--epochs", type=int, metavar="N", help=_OVERRIDES["--epochs"][-1])
_trained_with_options = _options(
    *(click.option(name, type=kind, metavar=metavar, help=f"Evaluate what was trained with this {name}.")
      for name, (kind, metavar, _) in _OVERRIDES.items() if name != "--batch_size")
)  # fmt: skip
_DATASET_OF_GRID = click.option("--dataset", metavar="NAME", help="The data set of --grid noise or lr. [default: digits]")
_GRIDS = "digits|full|full-plus|noise|lr|FILE"
_SEEDS = click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="Seeds 0 to N-1 for every cell. [default: 1]")


@cli.command()
@_run_options
@_override_options
@click.option("--seed", type=int, default=0, show_default=True, help="Decides initial weights, order and dropout.")
@_data_option
@_checkpoints_option
@_compute_options
@_saving_options
@click.option("--device", help="cpu, cuda or cuda:N. [default: the first GPU, or the CPU]")
def train(model: str, size: str, dataset: str, seed: int, upload: bool, data_root: str | None, checkpoints: Path, precision: str,
          save_every: str, storage: str | None, sync_every: str | None, lease: str | None, device: str | None,
          **options: Any) -> None:  # fmt: skip
    """Train one model and measure its test accuracy.

    A run that is done already is not done again; one that was interrupted goes on where its state was last saved.
    """

    overrides = {name: value for name, value in options.items() if name not in _COMPUTE}
    RunSpec.of(model, size, dataset, seed, overrides=overrides)  # names first: torch takes seconds to import
    saving = _saving(save_every, storage, sync_every, lease, upload)
    from diffvit.loop.fit import Stopped
    from diffvit.machine.device import default_precision, resolve_device
    from diffvit.train import train as train_run

    place, compute = resolve_device(device), _compute(options)
    if precision == "auto":
        precision = default_precision(place)
    spec = RunSpec.of(model, size, dataset, seed, precision, overrides)
    with _StepProgress(spec.title) as progress, StopSignals() as signals:
        try:
            result = train_run(
                spec, checkpoints, data_root=data_root, device=place,
                compute=compute,
                on_steps=progress, on_warning=_warn, saving=saving, should_stop=signals.seen,
            )  # fmt: skip
        except Stopped as stopped:
            click.echo(f"{stopped}; its state is saved\nhint: carry on with {_own_command()}", err=True)
            sys.exit(signals.exit_code)
    assert result is not None  # only a group has processes without one
    if not progress.steps:
        click.echo(f"this run is done already: {result.finished}", err=True)
    if result.diverged:
        _fail(f"the run {result.diverged['message']}.", "try a lower --lr, a longer --warmup_steps or --clip_norm 1; its log is kept.", 1)
    click.echo("\n".join(result.lines()))
    files = result.files(checkpoints)
    weights = files.weights
    if weights.is_file():
        click.echo(f"weights        {weights}")
    else:
        _warn(f"{weights} is gone; delete the run's _result.json, and the same command trains it again")
    if saving.storage:
        from study.hub import send_run

        send_run(saving.storage, files, _warn, _own_command())


@cli.command()
@click.argument("local", metavar="LOCAL", type=_Path(path_type=Path))
@click.argument("hf_dir", metavar="HF_DIR")
@click.option("--force", is_flag=True, help="Replace what is different there.")
def upload(local: Path, hf_dir: str, force: bool) -> None:
    """Send a file, or a folder's content, into a folder of HF_REPOSITORY; . is its top.

    Links are followed. What is hidden (.state, .env) is not sent, which is said. What is there already with the same content is not sent
    again, and what is different is not replaced.
    """

    hub = _hub()
    done = send(local, hf_dir, hub, force=force, on_progress=_say_transfer)
    if done.left:
        click.echo(f"not sent: {', '.join(done.left)}", err=True)
    click.echo(f"sent {len(done.moved)} files, {done.bytes:,} bytes, to {hub.repository}; {len(done.skipped)} were there")


@cli.command()
@click.argument("hf_path", metavar="HF_PATH")
@click.argument("local", metavar="LOCAL_DIR", type=_FOLDER)
@click.option("--force", is_flag=True, help="Replace what is different here.")
def download(hf_path: str, local: Path, force: bool) -> None:
    """Bring a file, or a folder's content, of HF_REPOSITORY to a local folder; . is all of it.

    What is here already with the same content is not brought again, and what is different is not replaced.
    """

    hub = _hub()
    done = bring(hf_path, local, hub, force=force, on_progress=_say_transfer)
    click.echo(f"brought {len(done.moved)} files, {done.bytes:,} bytes, from {hub.repository}; {len(done.skipped)} were here")


@cli.command()
@click.option("--model", help="vit_classic, vit_differential or a control.")
@click.option("--size", help="10B, 25B or 50B (about 10, 25, 50 million parameters); small, medium, large.")
@click.option("--dataset", help="CIFAR-100, BACH, digits or digits-noisy; with --grid, the data set of noise or lr.")
@click.option("--run_id", metavar="ID", help="Which run; it may stand alone.")
@click.option("--seed", type=int, metavar="N", help="Which run, where several match. [default: 0, if it is there]")
@_trained_with_options
@click.option("--grid", metavar="NAME|FILE", help="All finished runs of a grid instead; with --corruptions or --attention.")
@click.option("--corruptions", is_flag=True, help="Under noise, blur and clutter. Kept in the ledger, for the report.")
@click.option("--attention", is_flag=True, help="Where attention goes, from the exact maps. Kept in the ledger, for the report.")
@click.option("--again", is_flag=True, help="Find out even what the ledger knows.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N test images only: a trial, which is not kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--batch_size", type=click.IntRange(min=1), metavar="N", default=64, show_default=True, help="Images at once.")
@_data_option
@_checkpoints_option
@click.option("--device", help="cpu, cuda or cuda:N. [default: the first GPU, or the CPU]")
def evaluate(model: str | None, size: str | None, dataset: str | None, run_id: str | None, seed: int | None, grid: str | None,
             corruptions: bool, attention: bool, again: bool, limit: int | None, as_json: bool, batch_size: int, data_root: str | None,
             checkpoints: Path, device: str | None, **overrides: Any) -> None:  # fmt: skip
    """Measure trained models on the test set: accuracy and loss, in all and per class; under noise; where attention goes.

    Of several runs of a model, size and data set it takes the one without overrides and with seed 0, and says so; others are
    named by --seed and by the values that they were trained with.
    """
    kinds = [kind for kind, wanted in (("corruptions", corruptions), ("attention", attention)) if wanted]
    how: dict[str, Any] = {"data_root": data_root, "batch_size": batch_size}
    if again and not kinds:
        raise UserError("--again has nothing to find out again.", "it goes with --corruptions or --attention; all else is always measured.")
    if grid:
        epochs = overrides.pop("epochs")
        of_one_run = {"model": model, "size": size, "run_id": run_id, "seed": seed, **overrides}
        if wrong := [name for name, value in of_one_run.items() if value is not None]:
            raise UserError(f"--grid and --{wrong[0]} exclude each other.", "give one of both.")
        if not kinds:
            raise UserError("--grid evaluates nothing by itself.", "add --corruptions, --attention or both.")

        paths = finished_checkpoints(checkpoints, grid, epochs, dataset)
    else:
        paths = [_one_checkpoint(checkpoints, model, size, dataset, run_id, seed, overrides)]
    from diffvit.machine.device import resolve_device

    place = resolve_device(device)
    if kinds:
        _find_out(paths, kinds, as_json, again=again, limit=limit, device=place, **how)
        return
    from diffvit.evaluation import evaluate_checkpoint

    report = evaluate_checkpoint(paths[0], limit=limit, device=place, **how)
    for warning in report["warnings"]:
        _warn(warning)
    click.echo(json.dumps(report, indent=1) if as_json else "\n".join([str(paths[0]), *_evaluation_lines(report)]))


@cli.command()
@click.option("--grid", default="digits", show_default=True, metavar=_GRIDS, help="Which runs: a name, or a YAML or TOML file.")
@_DATASET_OF_GRID
@_SEEDS
@_EPOCHS
@click.option("--dry_run", is_flag=True, help="List the runs with their costs and stop.")
@click.option(
    "--rehearse", is_flag=True, help="Two real steps of every cell, from data to storage, to find what would fail later; leaves nothing."
)
@click.option(
    "--shard", metavar="I/N", help="Train the I-th of N parts of equal cost: for boxes that share nothing but a storage or the hub."
)
@click.option(
    "--collect", is_flag=True, help="Bring what all boxes have finished from the storage or the hub, tabulate and draw it; train nothing."
)
@_place_options
@click.option("--dashboard", type=bool, default=True, show_default=True, metavar="BOOL", help="Ray's dashboard, where Ray is started here.")
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Processes that train one run together."
)
@click.option(
    "--resource", multiple=True, metavar="NAME=X", help="A custom Ray resource that each run takes X of; limits it to nodes that have it."
)
@click.option("--price", type=click.FloatRange(min=0, min_open=True), metavar="P",
              help="Dollars an hour of one GPU (on CPUs, of a machine): runs report their cost.")  # fmt: skip
@_data_option
@_checkpoints_option
@_compute_options
@_saving_options
def study(grid: str, dataset: str | None, seeds: int | None, epochs: int | None, dry_run: bool, rehearse: bool, upload: bool,
          checkpoints: Path, save_every: str, storage: str | None, sync_every: str | None, lease: str | None, shard: str | None,
          collect: bool, resource: tuple[str, ...], **options: Any) -> None:  # fmt: skip
    """Train a grid of runs in parallel, then tabulate and draw it.

    Finished runs are skipped, so the same command carries on. Without arguments: both architectures in three sizes on two
    small data sets, in a few minutes on two CPU cores.
    """

    alone = [name for name, wanted in (("--rehearse", rehearse), ("--dry_run", dry_run), ("--collect", collect)) if wanted]
    if len(alone) > 1:
        raise UserError(f"{alone[0]} and {alone[1]} exclude each other.", "give one of both.")
    if collect and shard:
        raise UserError("--collect and --shard exclude each other.", "--collect brings the runs of all boxes.")
    if dry_run and options["price"]:
        raise UserError("--dry_run trains nothing that --price could be for.", "`run.py plan --price P` says what a study will cost.")
    chosen = find_grid(grid, dataset)
    chosen.runs(seeds=seeds, overrides={"epochs": epochs}, on_same=_warn)  # names and values first
    saving = _saving(save_every, storage, sync_every, lease, upload)
    resources = dict(_resource(text) for text in resource)
    if collect and not saving.storage:
        raise UserError("--collect has no place to collect from.", "give --upload true, or the --storage that the boxes had.")
    from study.cost.planning import dry_run_table
    from study.shard import Shard

    part = Shard.parse(shard) if shard else None
    if part and not saving.storage:
        raise UserError("--shard has no place where the parts come together.", "give --upload true, or a --storage that all boxes reach.")
    settings = _study_options(
        grid=chosen, seeds=seeds, epochs=epochs, checkpoints=checkpoints, saving=saving, resources=resources, shard=part, **options
    )
    from study.main import collect_study, rehearse_study, run_study

    if dry_run:
        click.echo(dry_run_table(settings))
        return
    sys.exit(collect_study(settings) if collect else rehearse_study(settings) if rehearse else run_study(settings))


@cli.command()
@click.option("--grid", default="digits", show_default=True, metavar=_GRIDS, help="Which runs: a name, or a YAML or TOML file.")
@_DATASET_OF_GRID
@_SEEDS
@_EPOCHS
@click.option("--gpu", metavar="NAME", help="A GPU by its data sheet: h100, a100, 4090, … [default: the machine at hand]")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="How many of them; on a CPU, machines.")
@click.option("--price", type=click.FloatRange(min=0, min_open=True), metavar="P", help="Dollars an hour of one of them.")
@click.option("--probe", is_flag=True, help="Measure the machine at hand first, and keep what was measured.")
@click.option("--probe_seconds", type=click.FloatRange(min=0, min_open=True), metavar="S",
              help="How long --probe measures each cell, about. [default: 5]")  # fmt: skip
@click.option("--json", "json_path", type=_Path(path_type=Path, dir_okay=False), metavar="PATH", help="Write it as JSON too.")
@_place_options
@_data_option
@_checkpoints_option
@_compute_options
def plan(grid: str, dataset: str | None, seeds: int | None, epochs: int | None, gpu: str | None, gpus: int, price: float | None,
         probe: bool, probe_seconds: float | None, json_path: Path | None, **options: Any) -> None:  # fmt: skip
    """Say what a study will take before it starts: parameters, FLOPs, memory, time and money of each run, and when the last ends.

    Numbers are measured on the machine at hand (--probe), were measured there earlier, or are estimated from a data sheet (--gpu);
    the table says which. Finished runs cost nothing, half-done ones only the rest.
    """

    chosen = find_grid(grid, dataset)
    chosen.runs(seeds=seeds, overrides={"epochs": epochs}, on_same=_warn)  # names and values first
    if gpu:
        find_sheet(gpu)
    for name, value in (("--probe_seconds", probe_seconds), ("--gpus_per_run", options["gpus_per_run"])):
        if not probe and (value or (gpu and value == 0)):  # without --gpu, 0 GPUs choose what was measured on the CPU
            raise UserError(f"{name} says how --probe measures, and without it changes nothing.", f"give --probe, or leave {name} out.")
    if json_path and not os.access(json_path.resolve().parent, os.W_OK):
        raise UserError(f"{json_path} cannot be written.", "give --json a file in a folder that is there.")
    from study.cost.planning import plan_study

    settings = _study_options(grid=chosen, seeds=seeds, epochs=epochs, price=price, **options)
    forecast = plan_study(settings, gpu, gpus, (probe_seconds or 5.0) if probe else None)
    from study.cost.forecast import forecast_json, forecast_text

    if json_path:
        write_atomically(json_path, (json.dumps(forecast_json(forecast), indent=1) + "\n").encode())
    click.echo(forecast_text(forecast, _terminal_width()))


@cli.command()
@click.option("--grid", metavar=_GRIDS, help="Which runs to draw. [default: the built-in grids that have finished runs]")
@_DATASET_OF_GRID
@_EPOCHS
@click.option("--out", type=_FOLDER, metavar="DIR", help="[default: figures in the checkpoints folder]")
@_checkpoints_option
def plot(grid: str | None, dataset: str | None, epochs: int | None, out: Path | None, checkpoints: Path) -> None:
    """Draw the losses and the scaling of finished runs: seven figures for each data set and condition, as PNG and SVG."""
    for path in plot_grid(checkpoints, grid, out, epochs=epochs, dataset=dataset):
        click.echo(path)


@cli.command()
@click.option("--grid", metavar="NAME|FILE", help="Which runs to report. [default: the built-in grids that have finished runs]")
@_DATASET_OF_GRID
@_EPOCHS
@click.option("--out", type=_FOLDER, metavar="DIR", help="[default: report in the checkpoints folder]")
@_checkpoints_option
def report(grid: str | None, dataset: str | None, epochs: int | None, out: Path | None, checkpoints: Path) -> None:
    """Write the verdict, with its intervals and all that it rests on, as one HTML page and as Markdown."""
    for path in report_grid(checkpoints, grid, out, epochs=epochs, dataset=dataset):
        click.echo(path)


@cli.command()
@click.option("--grid", default="digits", show_default=True, metavar="NAME|FILE", help="Whose data sets and sizes.")
@_DATASET_OF_GRID
@_EPOCHS
@click.option("--difference", type=float, default=2.0, show_default=True, metavar="PERCENT", help="Relative difference in error.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_checkpoints_option
def power(grid: str, dataset: str | None, epochs: int | None, difference: float, as_json: bool, checkpoints: Path) -> None:
    """Say how many seeds it takes to see a difference, from the spread between the seeds that are done."""
    from study.report.power import power_rows, power_text

    rows = power_rows(checkpoints, find_grid(grid, dataset).runs(overrides={"epochs": epochs}), difference / 100)
    click.echo(json.dumps(rows, indent=1) if as_json else power_text(rows, difference / 100))


@cli.command("list")
@click.option("--grid", metavar=_GRIDS, help="Also list this grid's runs that are not done. [default: what is there]")
@_DATASET_OF_GRID
@_SEEDS
@_EPOCHS
@click.option("--verify", is_flag=True, help="Re-read every file of every run and name what is damaged; exit code 1 if anything is.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_data_option
@_checkpoints_option
def list_runs(grid: str | None, dataset: str | None, seeds: int | None, epochs: int | None, verify: bool, as_json: bool,
              data_root: str | None, checkpoints: Path) -> None:  # fmt: skip
    """Show the ledger: each run, done or not, its accuracy and its files."""
    of_a_grid = {"seeds": seeds, "epochs": epochs}
    if wrong := [name for name, value in of_a_grid.items() if value is not None and not grid]:
        raise UserError(f"--{wrong[0]} is given without --grid.", "it says which runs of a grid to look for.")
    if verify and (grid or dataset):
        raise UserError(f"--verify and --{'grid' if grid else 'dataset'} exclude each other.", "--verify reads all runs that there are.")

    if verify:
        report = verify_ledger(checkpoints)
        click.echo(json.dumps(report, indent=1) if as_json else "\n".join([*report["damaged"], report["summary"]]))
        sys.exit(1 if report["damaged"] else 0)

    rows = ledger_rows(checkpoints, grid, seeds=seeds, epochs=epochs, data_root=data_root, dataset=dataset)
    click.echo(json.dumps(rows, indent=1) if as_json else ledger_text(rows))


# -------------------------------------------------------------------------------------------------------- helpers


def _one_checkpoint(checkpoints: Path, model: str | None, size: str | None, dataset: str | None, run_id: str | None, seed: int | None,
                    overrides: dict[str, Any]) -> Path:  # fmt: skip
    """The weights of the run that is named so far. Raises UserError."""
    if not (run_id or (model and size and dataset)) or (size and not dataset):
        raise UserError("which model is not said.", "give --model, --size and --dataset, or --grid, or --run_id.")

    dataset = resolve_dataset(dataset) if dataset else None
    model, size = resolve_model(model) if model else None, resolve_size(size, dataset) if size and dataset else None
    from diffvit.evaluation import find_checkpoint

    say = functools.partial(click.echo, err=True)
    return find_checkpoint(checkpoints, model, size, dataset, run_id=run_id, seed=seed, overrides=overrides, on_choice=say)


def _find_out(paths: list[Path], kinds: list[str], as_json: bool, **how: Any) -> None:
    """Findings about checkpoints, each as lines or all as JSON."""

    all_findings = {}
    for number, path in enumerate(paths, start=1):
        click.echo(f"{number} of {len(paths)}: {path}", err=True)
        findings = all_findings[str(path)] = find_out(files_of_weights(path), kinds, **how)
        for found in findings.values():
            for warning in found["warnings"]:
                _warn(warning)
        if not as_json:
            click.echo("\n".join([str(path), *_finding_lines(findings)]))
    if as_json:
        click.echo(json.dumps(all_findings, indent=1))


def _evaluation_lines(report: dict[str, Any]) -> list[str]:
    """The accuracy and loss of a model, in all and per class."""
    width = max(len(row["class"]) for row in report["classes"])
    return [
        f"test accuracy  {100 * report['accuracy']:.2f} % of {report['images']} images",
        f"test loss      {report['loss']:.4f}",
        *(f"  {row['class']:<{width}}  {100 * row['accuracy']:6.2f} % of {row['images']:4d}  loss {row['loss']:.4f}"
          for row in report["classes"] if row["images"]),
    ]  # fmt: skip


def _finding_lines(findings: dict[str, Any]) -> list[str]:
    lines = []
    if "corruptions" in findings:
        from diffvit.findings.robustness import summary_lines as corruption_lines

        lines += corruption_lines(findings["corruptions"])
    if "attention" in findings:
        from diffvit.findings.attention import summary_lines as attention_lines

        lines += attention_lines(findings["attention"])
    return lines


_COMPUTE = ("micro_batch", "deterministic", "fused", "graphs", "compile", "recompute")
_PLACEMENT = ("gpus_per_run", "cpus_per_run", "workers", "resources", "price")


def _compute(options: dict[str, Any]) -> Any:
    """The Compute of a command's options, which are taken out of them."""
    from diffvit.compute import Compute

    return Compute(**{name: options.pop(name) for name in _COMPUTE})


def _study_options(**options: Any) -> Any:
    """The StudyOptions of a command's options."""
    from study.options import StudyOptions

    placement = Placement(**{name: options.pop(name) for name in _PLACEMENT if name in options})
    return StudyOptions(compute=_compute(options), placement=placement, command=_own_command(), **options)


def _saving(save_every: str, storage: str | None, sync_every: str | None, lease: str | None, upload: bool) -> Saving:
    if upload:
        if storage:
            raise UserError(
                "--upload and --storage exclude each other.",
                "with --upload true the hub is the storage; leave --storage and DIFFVIT_STORAGE out.",
            )

        storage = f"{HUB_SCHEME}{find_account().repository}"
    on_hub = is_on_hub(storage)
    if on_hub:
        os.environ["HF_TOKEN"] = find_token() or ""  # workers have other working directories, without .env
    if storage and "://" not in storage:
        storage = str(usable_path(storage).resolve())  # workers have folders of their own
    saving = Saving(
        Every.parse(save_every), storage or None, _seconds(sync_every) if sync_every else DEFAULT_SAVING.sync_every,
        _seconds(lease) if lease else HUB_LEASE_SECONDS if on_hub else DEFAULT_SAVING.lease_seconds,
    )  # fmt: skip
    if not storage and (sync_every or lease):
        name = "--sync_every" if sync_every else "--lease"
        raise UserError(f"{name} is given without a storage.", "give --storage URL or --upload true too.")
    return saving


def _seconds(text: str) -> float:
    seconds = Every.parse(text).seconds
    if seconds is None:
        raise UserError(f"{shown(text)} is not a time.", "give a time such as 60s, 10m or 1h.")
    return seconds


def _resource(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    try:
        number = float(amount or 1)
    except ValueError:
        number = 0.0
    if not name or not 0 < number < 1e9:
        raise UserError(f"--resource is {shown(text)}.", "give a name and an amount, such as big_gpu=1.")
    return name, number


def _own_command() -> str:
    """The command line as it was given but for secrets, for `the command that carries on`."""

    runner = "uv run" if "UV" in os.environ or "UV_RUN_RECURSION_DEPTH" in os.environ else "python"
    given = [redacted(argument) for argument in sys.argv[1:]]
    command = shlex.join([*runner.split(), "run.py", *given])
    return command if given == sys.argv[1:] else f"{command} (with the secret in place of {HIDDEN})"


def _warn(text: str) -> None:
    click.secho(redacted(f"warning: {text}"), err=True, fg="yellow")


def _terminal_width() -> int | None:
    """Of stdout, up to 100 columns; None where that is a pipe or a file, in which nothing is folded."""
    return min(100, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


class _StepProgress:
    """A progress bar of steps on stderr; away from a terminal, a line every ten seconds."""

    def __init__(self, title: str):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        self.steps = 0
        self._last_line = 0.0
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column()),  # what a narrow terminal wraps
            *([BarColumn()] if self._console.width >= 120 else []), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"), console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=None, losses="")

    def __enter__(self) -> _StepProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, steps: list, total: int) -> None:
        last = steps[-1]
        self.steps = last.step
        losses = f"train {last.train_loss:.4f}  val {last.val_loss:.4f}"
        self._bar.update(self._task, completed=last.step, total=total, losses=losses)
        due = last.seconds - self._last_line >= 10 or last.step == total
        if not self._console.is_terminal and due:
            self._last_line = last.seconds
            click.echo(f"step {last.step}/{total}  {losses}  {last.seconds:.0f} s", err=True)


def _hub() -> Any:
    """The user's repository; on a terminal with the client's progress bars."""
    return Hub(find_account(), on_retry=_warn, bars=sys.stderr.isatty())


def _say_transfer(done: int, total: int, name: str) -> None:
    """Away from a terminal, a line a file."""
    if name and not sys.stderr.isatty():
        click.echo(f"{name}  {done:,} of {total:,} bytes", err=True)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a run, a disk or a storage failed, 2 bad input, 130 interrupted."""
    sys.excepthook = lambda *error: click.echo(redacted("".join(traceback.format_exception(*error))), err=True, nl=False)
    outlive_readers()
    if LENT_HOME:
        _warn(f"this user has no home that can be written: downloads and caches go to {LENT_HOME}; DIFFVIT_CACHE and HF_HOME move them")
    try:
        with disk_faults(Path.cwd()):
            code = cli.main(prog_name="run.py", standalone_mode=False)
    except DiffvitError as error:
        _fail(error.message, error.hint, error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        sys.exit(0)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "run.py"
        _fail(error.format_message(), f"`{command} --help` shows the options.")
    except click.ClickException as error:
        _fail(error.format_message(), "`run.py --help` shows the commands.")
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, hint: str, code: int = 2) -> None:
    message, hint = redacted(message[:1].lower() + message[1:]), redacted(hint)
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}\n{click.style('hint:', bold=True)} {hint}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
