#!/usr/bin/env python
"""diffvit's command line. Each command parses its options and calls one function; data go to stdout, all else to stderr.

Heavy imports are inside the commands, so that --help answers at once.
"""

from __future__ import annotations

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
from diffvit.ledger.disk import disk_faults
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.weights import trust_source
from diffvit.machine.host import outlive_readers
from diffvit.protocol import resolve_model
from diffvit.tracking import check_tracker
from study.commands import options
from study.commands.command import StrictGroup, option, under
from study.commands.completion import SHELLS, completion_script
from study.commands.following import of_one_run, of_same_runs
from study.commands.parsing import FOLDER, ShellPath, full_names, parse_resource, taken
from study.commands.terminal import fail, own_command, transfer
from study.cost.devices import find_sheet
from study.doctor import diagnose, diagnosis_json, diagnosis_text
from study.grid import find_dataset, find_grid
from study.text import put, say, show, warn


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

    `run.py study` trains a grid of both, `run.py report` writes the verdict. After an interruption, the same command resumes.
    Options may be written with - or with _.
    """
    check_env_file(warn)
    if cache := os.environ.get("DIFFVIT_CACHE"):
        os.environ["DIFFVIT_CACHE"] = str(usable_path(cache).absolute())  # workers have folders of their own


def _study_options(given: dict[str, Any]) -> Any:
    """The StudyOptions of a command's options."""
    from study.options import StudyOptions

    placement, compute = options.placement_of(given), options.compute_of(given)
    return StudyOptions(compute=compute, placement=placement, command=own_command(), **given)


# -------------------------------------------------------------------------------------------------------- commands


@cli.command(
    heading="A study",
    examples=[
        ("study --seeds 3", "Both architectures in three sizes on two small data sets, three seeds each; the same command resumes it."),
        ("study --grid full --storage s3://bucket/study", "The full grid, copied off this machine; another one can take it over."),
    ],
)
@options.runs
@options.models
@under(
    "What",
    option("--dry_run", is_flag=True, help="List the runs with their costs and stop."),
    option("--rehearse", is_flag=True, help="Two real steps of every cell, from data to storage, to find what would fail later."),
    option("--shard", metavar="I/N", help="Train the I-th of N parts of equal cost: for boxes that share only a storage or the hub."),
    option("--collect", is_flag=True, help="Fetch what all boxes have finished from the storage or the hub, tabulate and draw it."),
    option("--yes", is_flag=True, help="On a terminal, start more than ten minutes of work without a question."),
)
@options.place
@under(
    "Where",
    options.switch("--dashboard", default=True, show_default=True, help="Ray's dashboard, where Ray is started here."),
    option("--workers", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Data-parallel processes of a run."),
    option("--resource", multiple=True, metavar="NAME=X", help="Custom Ray resource that a run takes X of: limits it to nodes with it."),
)
@options.data_and_ledger
@options.compute
@options.saving
@options.price("GPU (on CPUs, of a machine): runs report their cost.")
@options.json_to
def study(grid: str, dataset: str | None, models: tuple[str, ...], dry_run: bool, rehearse: bool, shard: str | None, collect: bool,
          resource: tuple[str, ...], yes: bool, **given: Any) -> None:  # fmt: skip
    """Train a grid of runs in parallel, tabulate and draw it.

    Finished runs are skipped and unfinished ones resume, so the same command continues an interrupted study. Without arguments: both
    architectures in three sizes on two small data sets, in a few minutes on two CPU cores.
    """
    alone = [name for name, wanted in (("--rehearse", rehearse), ("--dry_run", dry_run), ("--collect", collect)) if wanted]
    if len(alone) > 1:
        raise UserError(f"{alone[0]} and {alone[1]} exclude each other.", "use one or the other.")
    if collect and shard:
        raise UserError("--collect and --shard exclude each other.", "--collect fetches the runs of all boxes.")
    if given["json_to"] and (rehearse or dry_run):
        raise UserError(f"{alone[0]} has no JSON.", "leave --json out; `run.py plan --json` lists the runs with their costs.")
    if dry_run and given["price"]:
        raise UserError("--dry_run trains nothing that --price could be for.", "`run.py plan --price P` says what a study will cost.")
    chosen = find_grid(grid, dataset, given["data_root"], models)
    chosen.runs(seeds=given["seeds"], overrides={"epochs": given["epochs"]}, on_same=warn)  # names and values first
    saving = options.saving_of(given)
    check_tracker(given["tracker"])
    resources = dict(map(parse_resource, resource))
    if collect and not saving.storage:
        raise UserError("--collect has no storage to collect from.", "give --upload true, or the --storage that the boxes had.")
    from study.shard import Shard

    part = Shard.parse(shard) if shard else None
    if part and not saving.storage:
        raise UserError("--shard needs a storage that all boxes reach.", "give --upload true, or a --storage.")
    from study.cost.planning import dry_run_table
    from study.main import collect_study, rehearse_study, run_study

    ask = not yes and sys.stdin.isatty() and sys.stderr.isatty()
    settings = _study_options({**given, "grid": chosen, "saving": saving, "resources": resources, "shard": part, "ask": ask})
    if dry_run:
        show(dry_run_table(settings))
        return
    sys.exit(collect_study(settings) if collect else rehearse_study(settings) if rehearse else run_study(settings))


@cli.command(
    heading="A study",
    examples=[
        ("check docs/examples/sigmoid_attention.py:SigmoidAttention", "At the sizes of all built-in grids."),
        ("check ideas/my_attention.py:MyAttention --grid digits", "At those of one grid."),
    ],
)
@click.argument("model", metavar="FILE.py:CLASS")
@options.which_grid("The sizes and data sets of this grid only. [default: all]")
@options.grid_dataset
@options.data
def check(model: str, grid: str | None, dataset: str | None, data_root: str | None) -> None:
    """Check an architecture of your own before it costs money.

    In seconds, on a CPU: shapes, parameters and FLOPs at every size, gradients, determinism, and that images do not see each other. Exit
    code 1 if something does not hold.
    """
    name = resolve_model(model)
    specs = find_grid(grid, dataset, data_root).runs(seeds=1) if grid else None
    from diffvit.soundness import cells_of, check_architecture

    sound = True
    for each in check_architecture(cells_of(name, specs)):
        show(each.line())
        sound = sound and each.holds is not False
    sys.exit(0 if sound else 1)


@cli.command(
    heading="A study",
    examples=[
        ("plan --grid full --gpu h100 --gpus 4 --price 2", "Hours and dollars from a data sheet, before anything is rented."),
        ("plan --grid full --probe --json plan.json", "Measured on this machine, and written as JSON too."),
    ],
)
@options.runs
@options.models
@under(
    "What",
    option("--gpu", metavar="NAME", help="A GPU by its data sheet, such as h100, 4090 or L4. [default: the machine at hand]"),
    option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="How many of them; on a CPU, machines."),
    options.price("of them."),
    option(
        "--session",
        type=click.FloatRange(min=0, min_open=True),
        metavar="HOURS",
        help="How long a lent machine lasts, such as 12: say whether one session suffices.",
    ),
    option("--probe", is_flag=True, help="Measure the machine at hand first, and keep what was measured."),
    option(
        "--probe_seconds",
        type=click.FloatRange(min=0, min_open=True),
        metavar="S",
        help="How long --probe measures each cell, about. [default: 5]",
    ),
)
@options.place
@options.data_and_ledger
@options.compute
@options.json_to
def plan(grid: str, dataset: str | None, models: tuple[str, ...], gpu: str | None, gpus: int, session: float | None, probe: bool,
         probe_seconds: float | None, json_to: Path | None, **given: Any) -> None:  # fmt: skip
    """Forecast a study's memory, time and money before it starts.

    A row a run, and when the last one ends. Numbers are measured on the machine at hand (--probe), were measured there earlier, or are
    estimated from a data sheet (--gpu); the table says which. Finished runs cost nothing, unfinished ones only the rest.
    """
    chosen = find_grid(grid, dataset, given["data_root"], models)
    chosen.runs(seeds=given["seeds"], overrides={"epochs": given["epochs"]}, on_same=warn)  # names and values first
    if gpu:
        find_sheet(gpu)
    for name, value in (("--probe_seconds", probe_seconds), ("--gpus_per_run", given["gpus_per_run"])):
        if not probe and (value or (gpu and value == 0)):  # without --gpu, 0 GPUs choose what was measured on the CPU
            raise UserError(f"{name} says how --probe measures, and without it changes nothing.", f"give --probe, or leave {name} out.")
    from study.cost.forecast import forecast_json, forecast_text
    from study.cost.planning import plan_study

    forecast = plan_study(_study_options({**given, "grid": chosen}), gpu, gpus, (probe_seconds or 5.0) if probe else None, session)
    put(lambda: forecast_text(forecast), lambda: forecast_json(forecast), json_to)


@cli.command(
    heading="A study",
    examples=[
        ("watch --grid full", "The study that writes into this checkpoints folder."),
        ("watch --grid full --storage s3://bucket/study --web", "One on other machines, with curves in a browser."),
    ],
)
@options.runs
@options.models
@options.data_and_ledger
@under(
    "Where",
    option(
        "--storage",
        envvar="DIFFVIT_STORAGE",
        metavar="URL",
        help="Look there instead, hf://USER/NAME for the hub; from any machine. [env: DIFFVIT_STORAGE]",
    ),
)
@under("Output", option("--web", is_flag=True, help="Also serve the curves to a browser on this machine, until Ctrl-C."))
def watch(grid: str, dataset: str | None, models: tuple[str, ...], seeds: int | None, epochs: int | None, storage: str | None, web: bool,
          data_root: str | None, checkpoints: Path) -> None:  # fmt: skip
    """Show how far a study is that runs elsewhere.

    It reads the study's checkpoints folder, or with --storage its storage. The data sets must be at hand, since run_ids depend on them.
    Off a terminal it prints the table once.
    """
    chosen = find_grid(grid, dataset, data_root, models)
    asked = chosen.runs(seeds=seeds, overrides={"epochs": epochs}, on_same=warn)  # names and values first
    say(f"looking for the runs in {storage or checkpoints}")
    from study.live.watching import watch_study
    from study.options import StudyOptions
    from study.table import run_table, seeds_of_study

    if not storage:
        options.note_absent(checkpoints)
    here = [] if storage or seeds is not None else seeds_of_study(run_table(checkpoints, asked))
    if (most := max(here, default=0)) > max(spec.seed for spec in asked):
        warn(f"this folder has seeds up to {most} of these runs: --seeds {most + 1} shows them.")

    watch_study(StudyOptions(chosen, checkpoints, seeds, epochs).on(None).runs(), checkpoints, storage, data_root, web)


@cli.command(
    heading="A study",
    examples=[
        ("report", "All finished runs of the built-in grids."),
        ("report --grid noise --dataset CIFAR-100 --out noise", "One grid's runs, into the folder noise."),
    ],
)
@options.which_grid(f"Which runs to report. {options.BY_DEFAULT}")
@options.of_grid
@options.models
@under("Output", option("--out", type=FOLDER, metavar="DIR", help="Folder for the report. [default: report in the checkpoints folder]"))
@options.price("GPU: the page says what training cost.")
@options.json_to
@options.data_and_ledger
def report(json_to: Path | None, price: float | None, out: Path | None, **given: Any) -> None:
    """Write the verdict, and all that it rests on, as one page.

    As HTML and as Markdown. Of a grid file the default folder is NAME_report.
    """
    from study.finished import FinishedRuns
    from study.report.brief import brief
    from study.report.facts import answer_facts

    pages, answers = FinishedRuns(**given).report(out, price)
    files = list(map(str, pages))
    say(f"{brief(answers)}\n" if answers else "nothing to compare: of these runs, no two architectures share a size and a seed")
    put(lambda: "\n".join(files), lambda: {"files": files, "verdict": list(map(answer_facts, answers))}, json_to)


@cli.command(
    heading="A study",
    examples=[
        ("power --difference 2", "Seeds that show a difference of 2 % in error on digits."),
        ("power --grid full --json", "For the full grid, from what its finished runs scatter by; as JSON."),
    ],
)
@options.which_grid("Whose data sets and sizes.", "digits")
@options.of_grid
@options.models
@under("What", option("--difference", type=float, default=2.0, show_default=True, metavar="PERCENT", help="Relative difference in error."))
@options.json_to
@options.data_and_ledger
def power(grid: str, dataset: str | None, epochs: int | None, models: tuple[str, ...], difference: float, json_to: Path | None,
          data_root: str | None, checkpoints: Path) -> None:  # fmt: skip
    """Say how many seeds it takes to see a difference.

    From the spread between the seeds that are finished, or an assumed one.
    """
    from study.report.power import power_rows, power_text

    chosen = find_grid(grid, dataset, data_root, models)
    options.note_absent(checkpoints)
    say("simulating studies with 2 to 50 seeds")
    rows = power_rows(checkpoints, chosen.runs(overrides={"epochs": epochs}), difference / 100, chosen.arms)
    put(lambda: power_text(rows, difference / 100), lambda: rows, json_to)


@cli.command(
    heading="A study",
    examples=[
        ("plot", "All finished runs of the built-in grids, into checkpoints/figures."),
        ("plot --grid lr --out figures", "One grid's runs, into the folder figures."),
    ],
)
@options.which_grid(f"Which runs to draw. {options.BY_DEFAULT}")
@options.of_grid
@options.models
@under("Output", option("--out", type=FOLDER, metavar="DIR", help="Folder for figures. [default: figures in the checkpoints folder]"))
@options.data_and_ledger
def plot(out: Path | None, **given: Any) -> None:
    """Draw the losses and the scaling of finished runs.

    Seven figures for each data set and condition, as PNG and SVG.
    """
    from study.finished import FinishedRuns

    for path in FinishedRuns(**given).plot(out):
        click.echo(path)


@cli.command(
    heading="A study",
    examples=[
        ("untrained", "The built-in grid's models, in seconds."),
        ("untrained --grid full --quick", "The largest models, on small images."),
    ],
)
@options.which_grid("Whose models.", "digits")
@options.grid_dataset
@under(
    "What",
    option("--images", type=click.IntRange(min=1), metavar="N", default=4, show_default=True, help="How many images they are shown."),
    option("--quick", is_flag=True, help="Images of at most 8 x 8 patches, and photographs for data on the hub."),
)
@options.json_to
@options.data
def untrained(grid: str, dataset: str | None, images: int, quick: bool, json_to: Path | None, data_root: str | None) -> None:
    """Measure models before their first step: do they start alike?

    How alike an image's tokens are after the last block (cosine), what attention and MLP add in the first, middle and last layer (root
    mean square), and the entropy of the class token's attention. Seconds on a CPU; a minute for the largest models.
    """
    from study.report.start import start_rows, start_text

    chosen = find_grid(grid, dataset, data_root)
    rows = start_rows(chosen.runs(seeds=1), images, data_root, quick)
    put(lambda: start_text(rows, chosen.arms), lambda: rows, json_to)


@cli.command(
    heading="A model",
    examples=[
        ("train --model differential --size small --dataset digits", "One run of the built-in study, in half a minute."),
        ("train --model classic --size 10B --dataset BACH --max_steps 20", "A trial of twenty steps."),
    ],
)
@under(
    "What",
    option("--model", type=options.MODEL, required=True, metavar=options.MODEL_OR_FILE, help=options.MODELS_OR_CLASS),
    option("--size", type=options.SIZE, required=True, help=options.SIZES),
    option("--dataset", type=options.DATASET, required=True, help=f"{options.DATASETS}."),
    option("--seed", type=int, default=0, show_default=True, metavar="N", help="Decides initial weights, order and dropout."),
)
@options.overrides
@options.data_and_ledger
@options.device
@options.compute
@options.saving
@options.json_to
def train(model: str, size: str, dataset: str, seed: int, data_root: str | None, checkpoints: Path, precision: str, device: str | None,
          tracker: str | None, json_to: Path | None, **given: Any) -> None:  # fmt: skip
    """Train one model and measure its test accuracy.

    A finished run is not trained again; an interrupted one resumes from its last checkpoint.
    """
    overrides, dataset = taken(given, *(name.removeprefix("--") for name in options.OVERRIDES)), find_dataset(dataset, data_root)
    RunSpec.of(model, size, dataset, seed, overrides=overrides)  # names first: torch takes seconds to import
    saving = options.saving_of(given)
    from diffvit.machine.device import default_precision, resolve_device
    from study.commands.training import train_and_print

    place = resolve_device(device)
    spec = RunSpec.of(model, size, dataset, seed, default_precision(place) if precision == "auto" else precision, overrides)
    check_tracker(tracker)
    compute = options.compute_of(given)
    train_and_print(spec, checkpoints, data_root=data_root, device=place, compute=compute, saving=saving, tracker=tracker, json_to=json_to)


@cli.command(
    heading="A model",
    examples=[
        ("evaluate --model differential --size small --dataset digits", "Test accuracy and loss, in all and per class."),
        ("evaluate --grid digits --corruptions --attention", "A grid's finished runs under noise, and where attention goes."),
    ],
)
@under(
    "What",
    option(
        "--model",
        "models",
        type=options.MODEL,
        multiple=True,
        metavar=options.MODEL_OR_FILE,
        help=f"{options.MODELS_OR_CLASS} With --grid, one for each architecture that its study had.",
    ),
    option("--size", type=options.SIZE, help=options.SIZES),
    option("--dataset", type=options.DATASET, help=f"{options.DATASETS}; with --grid, that of a grid for one data set."),
    option("--run_id", metavar="ID", help="Which run, or how its run_id begins; it may stand alone."),
    option("--seed", type=int, metavar="N", help="Which run, where several match. [default: 0, if it is there]"),
    options.which_grid("All finished runs of a grid instead; with --corruptions or --attention."),
    option("--corruptions", is_flag=True, help="Under noise, blur and clutter. Kept in the ledger, for the report."),
    option("--attention", is_flag=True, help="Where attention goes, from the exact maps. Kept in the ledger, for the report."),
    option("--again", is_flag=True, help="Evaluate again what the ledger already has."),
    option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N test images only: a trial, which is not kept."),
    option("--trust", is_flag=True, help="Run the code of an architecture that comes with a checkpoint from elsewhere."),
)
@options.trained_with
@options.data_and_ledger
@options.device
@under("How", option("--batch_size", type=click.IntRange(min=1), metavar="N", default=64, show_default=True, help="Images at once."))
@options.json_to
def evaluate(models: tuple[str, ...], size: str | None, dataset: str | None, run_id: str | None, seed: int | None, grid: str | None,
             corruptions: bool, attention: bool, again: bool, trust: bool, json_to: Path | None, checkpoints: Path, device: str | None,
             **given: Any) -> None:  # fmt: skip
    """Measure trained models on the test set.

    Accuracy and loss, in all and per class; under noise (--corruptions); where attention goes (--attention). Of several runs of a
    model, size and data set it takes the one without overrides and with seed 0, and says so; --seed and the values that they were
    trained with name others.
    """
    kinds = [kind for kind, wanted in (("corruptions", corruptions), ("attention", attention)) if wanted]
    settings = taken(given, "limit", "batch_size", "data_root")  # what is left are overrides
    if again and not kinds:
        raise UserError("--again has nothing to evaluate again.", "use it with --corruptions or --attention; all else is always measured.")
    if grid:
        epochs = given.pop("epochs")
        named = {"size": size, "run_id": run_id, "seed": seed, **given}
        if wrong := [name for name, value in named.items() if value is not None]:
            raise UserError(f"--grid and --{wrong[0]} exclude each other.", "use one or the other.")
        if not kinds:
            raise UserError("--grid evaluates nothing by itself.", "add --corruptions, --attention or both.")
        from study.finished import FinishedRuns

        paths = FinishedRuns(checkpoints, grid, epochs, dataset, models, settings["data_root"]).weights()
    else:
        if len(models) > 1:
            raise UserError("--model is given more than once.", "that goes with --grid only.")
        model = next(iter(models), None)
        if not (run_id or (model and size and dataset)) or (size and not dataset):
            missing = [name for name, value in (("model", model), ("size", size), ("data set", dataset)) if not value]
            raise UserError(f"no {' and no '.join(missing)} given.", "give --model, --size and --dataset, or --grid, or --run_id.")
        names = full_names(model, size, dataset, settings["data_root"])
        from diffvit.evaluation import find_checkpoint

        chosen: dict[str, Any] = {"run_id": run_id, "seed": seed, "overrides": given}
        paths = [find_checkpoint(checkpoints, *names, **chosen, on_choice=say)]
    for path in paths if trust else []:
        trust_source(path)
    from diffvit.machine.device import resolve_device
    from study.commands.evaluating import print_evaluation, print_findings

    settings["device"] = resolve_device(device)
    if kinds:
        print_findings(paths, kinds, json_to, again=again, **settings)
        if grid and settings["limit"] is None:
            say(f"\nnext     for all numbers of a run: {of_one_run(own_command(), kinds)}")
            say(f"next     for the page: {of_same_runs(own_command(), 'report')}")
    else:
        print_evaluation(paths[0], json_to, **settings)


@cli.command(
    "list",
    heading="Results",
    examples=[
        ("list --grid full", "What is finished, unfinished and to do of the full grid."),
        ("list --verify", "Every file of every run, read again."),
    ],
)
@options.which_grid("Also list this grid's runs that are not done. [default: what is there]")
@options.of_grid
@options.models
@options.seeds
@under(
    "What",
    option("--verify", is_flag=True, help="Re-read every file of every run and name what is damaged; exit code 1 if anything is."),
)
@options.data_and_ledger
@options.json_to
def list_runs(grid: str | None, verify: bool, json_to: Path | None, checkpoints: Path, **given: Any) -> None:
    """List the runs of the ledger, done or not, with their accuracy."""
    if verify and (grid or given["dataset"]):
        raise UserError(f"--verify and --{'grid' if grid else 'dataset'} exclude each other.", "--verify reads all runs that there are.")
    from study.finished import check_of_grid

    check_of_grid(grid, dataset=given["dataset"], model=given["models"], seeds=given["seeds"], epochs=given["epochs"])
    from study.listing import ledger_rows, ledger_text, verify_ledger

    if verify:
        outcome = verify_ledger(checkpoints)
        put(lambda: "\n".join([*outcome["damaged"], outcome["summary"]]), lambda: outcome, json_to)
        sys.exit(1 if outcome["damaged"] else 0)
    rows = ledger_rows(checkpoints, grid, **given)
    put(lambda: ledger_text(rows, checkpoints, grid), lambda: rows, json_to)


@cli.command(
    heading="Results",
    examples=[
        ("upload checkpoints/vit_classic vit_classic", "A folder's content, into a folder of the repository."),
        ("upload notes.md .", "A file, to its top."),
    ],
)
@click.argument("local", metavar="LOCAL", type=ShellPath(path_type=Path))
@click.argument("hf_dir", metavar="HF_DIR")
@option("--force", is_flag=True, help="Replace what is different there.")
def upload(local: Path, hf_dir: str, force: bool) -> None:
    """Upload a file or folder to HF_REPOSITORY on the hub.

    Into the folder HF_DIR of the repository; . is its top. Links are followed; hidden files (.state, .env) are left out and named. Files
    that are there with the same content are skipped, and different ones are not replaced.
    """
    transfer(utils.upload, local, hf_dir, force, "sent {moved} to {hub}; {skipped} already there")


@cli.command(
    heading="Results",
    examples=[
        ("download vit_classic here", "A folder's content, into the folder here."),
        ("download . everything --force", "All of the repository, replacing what is different."),
    ],
)
@click.argument("hf_path", metavar="HF_PATH")
@click.argument("local", metavar="LOCAL_DIR", type=FOLDER)
@option("--force", is_flag=True, help="Replace what is different here.")
def download(hf_path: str, local: Path, force: bool) -> None:
    """Download a file or folder of HF_REPOSITORY on the hub.

    HF_PATH . is all of it. Files that are here with the same content are skipped, and different ones are not replaced.
    """
    transfer(utils.download, hf_path, local, force, "fetched {moved} from {hub}; {skipped} already here")


@cli.command(
    heading="This machine",
    examples=[
        ("doctor", "Everything but a storage."),
        ("doctor --storage s3://bucket/study", "With a storage that must answer."),
    ],
)
@options.data_to_check
@options.checkpoints
@under("Where", options.address)
@under("Saving", options.upload, options.storage)
@options.json_to
def doctor(checkpoints: Path, data_root: str | None, address: str | None, json_to: Path | None, **given: Any) -> None:
    """Check this machine, and say what to do about problems.

    Python, torch, GPUs and their memory, Ray, disks, file locks, credentials, data sets at hand, the storage. The exit code is 1 where
    there is a problem.
    """
    checks = diagnose(checkpoints, data_root, address, options.saving_of(given))
    put(lambda: diagnosis_text(checks), lambda: diagnosis_json(checks), json_to)
    sys.exit(not all(check.ok for check in checks))


@cli.command(
    heading="This machine",
    examples=[
        ("completion bash >> ~/.bashrc", "For bash, from the next shell on; after uv's own completion, if that is there."),
        ("completion fish > ~/.config/fish/conf.d/runpy.fish", "For fish."),
    ],
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script that completes commands and options by Tab.

    For `uv run run.py` and for `run.py`, where that is on the PATH; not for `python run.py`.
    """
    click.echo(completion_script(cli, shell))


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
        say(f"interrupted\nhint: to run it again: {own_command()}")
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
