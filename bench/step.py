"""A training step, against timm's models of the same shape in a plain loop, in one run.

    python -m bench.step                           the first GPU, or the CPU
    python -m bench.step --device cpu --json docs/results/step.json

A step is one AdamW update on a batch, on images as CIFAR-100 has them, resized on the device. Ours go through `fit`, the loop that every
run uses, and the plain loop gets the same batches and the same resizing. Both also look at a validation batch after each step: of as many
images as are trained on in the rows that say so, of one in the others. The bars on a GPU are about the former, those on a CPU about the
latter. On a GPU a few steps of each loop go before the clock starts. The user's loop transforms each image with torchvision in DataLoader
workers and has no autocast. Before anything is timed, the models are given the same weights and must give the same logits and gradients.
What the bars are about is timed first; other rows follow in fewer rounds, beside timm's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import DIFFERENTIAL, endless, give_weights, plain_loop, timm_model, transform_loader, users_loop
from bench.roofline import measure_ceilings
from bench.timing import Bar, Journal, fit_and_time, json_option, line, medians, ratio, rounds_of, spread
from diffvit.compute import DEFAULT_COMPUTE, choose
from diffvit.data.batches import Prepare, StepBatches, make_loader
from diffvit.dataset import Dataset, ImageSet
from diffvit.loop.fit import fit
from diffvit.machine.device import autocast, autocast_dtype, default_precision, resolve_device, set_matmul_precision
from diffvit.protocol import PROTOCOLS, Protocol
from diffvit.vit import VisionTransformer, build_model, set_form

CLASSIC = "vit_classic"
SIZE = "10B"

# The bars on a CPU, as ratios of seconds: upper ends of the intervals, then medians.
CLASSIC_TO_TIMM = 1.03
DIFFERENTIAL_TO_TIMM = 0.70
DIFFERENTIAL_TO_CLASSIC = 1.35
# On a GPU, with validation: how many times as fast as timm's, and a ratio of seconds.
GPU_AGAINST_TIMM = 1.6
GPU_AGAINST_TIMM_COMPILED = 1.3
GPU_DIFFERENTIAL_TO_CLASSIC = 1.05
# Everywhere.
VALIDATION_TO_TRAINING = 1 / 3
DATA_TO_STEP = 0.02

_VALIDATED = ", with validation"
_USER = f"the user's loop, timm ViT{_VALIDATED}"

# Steps on a GPU before the clock starts.
_WARM_UP = 2

_WIDTHS = (50, 30, 10, 24, 13)


def images_of(protocol: Protocol, count: int) -> Dataset:
    """Random images as CIFAR-100's: uint8, 3 x 32 x 32."""
    generator = torch.Generator().manual_seed(0)

    def split(images: int) -> ImageSet:
        pixels = torch.randint(0, 256, (images, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return ImageSet(pixels, torch.randint(0, protocol.classes, (images,), generator=generator))

    classes = tuple(str(number) for number in range(protocol.classes))
    return Dataset("random", split(count), split(count), split(count), classes, (0.5,) * 3, (0.25,) * 3, "none")


def check_same(ours: nn.Module, theirs: nn.Module, images: Tensor, name: str) -> float:
    """The largest relative difference of logits and of the first layer's gradient, in fp32, without dropout. Exits where they differ."""
    found = []
    for model in (ours, theirs):
        model.eval()
        model.zero_grad()
        logits = model(images)
        F.cross_entropy(logits, torch.arange(len(images), device=images.device) % logits.shape[1]).backward()
        gradient = model.pos_embed.grad
        assert isinstance(gradient, Tensor)
        found.append((logits.detach(), gradient.clone()))
        model.zero_grad()
        model.train()
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))
    if difference > 1e-3:
        raise click.ClickException(f"{name}: ours and timm's differ by {difference:.1e}")
    return difference


def parts_of_a_step(
    model: VisionTransformer, data: Dataset, protocol: Protocol, precision: str, micro_batch: int, device: torch.device, rounds: int
) -> dict[str, np.ndarray]:
    """Seconds of a step's validation batch, and of fetching its two batches."""
    split = data.val if device.type == "cpu" else data.val.to(device)
    prepare = Prepare(protocol.image_size, data.mean, data.std, device)
    pixels = split.pixels[: protocol.batch_size]
    fetches = 50
    batches = StepBatches(len(split), protocol.batch_size, 0, (1, 2 * fetches * (rounds + 2)))
    fetched = iter(make_loader(split, batches))

    @torch.no_grad()
    def validate() -> None:
        model.eval()
        for some in pixels.split(micro_batch):
            with autocast(device, precision):
                model(prepare(some))
        model.train()

    def fetch() -> None:
        for _ in range(2 * fetches):
            next(fetched)

    seconds = rounds_of({"validation": validate}, rounds, device)
    fetching = []
    for _ in range(rounds):
        fetching += rounds_of({"fetch": fetch}, 1, device, warm_up=0)["fetch"].tolist()
    return {"validation": seconds["validation"], "data": np.asarray(fetching) / fetches}


@click.command()
@click.option("--device", "device_name", help="[default: the first GPU, or the CPU]")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@click.option("--images", type=click.IntRange(min=1), help="In a batch. [default: the protocol's 512 on a GPU, 4 on a CPU]")
@click.option("--micro_batch", type=click.IntRange(min=1), help="[default: 128 on a GPU, all on a CPU]")
@click.option("--depth", type=click.IntRange(min=1), help="Layers, for a trial of this benchmark. [default: those of 10B]")
@click.option("--steps", type=click.IntRange(min=1), help="In a round. [default: 4 on a GPU, 1 on a CPU]")
@click.option("--rounds", type=click.IntRange(min=2), help="[default: 5 on a GPU, 20 on a CPU]")
@click.option("--threads", type=click.IntRange(min=1), help="On a CPU. [default: torch's]")
@click.option("--compiled/--no-compiled", default=None, help="Also time compiled models. [default: on a GPU]")
@click.option("--only_arms", is_flag=True, help="Ours and timm's, eager, then compiled where that is asked for: no other rows.")
@click.option("--only_compiled", is_flag=True, help="The classic model beside timm's ViT, eager and compiled: no other rows.")
@json_option
def main(device_name: str | None, precision: str, images: int | None, micro_batch: int | None, depth: int | None, steps: int | None,
         rounds: int | None, threads: int | None, compiled: bool | None, only_arms: bool, only_compiled: bool,
         json_path: Path | None) -> None:  # fmt: skip
    """Time training steps of both architectures and of what one would use instead."""
    device = resolve_device(device_name)
    gpu = device.type == "cuda"
    if threads:
        torch.set_num_threads(threads)
    precision = default_precision(device) if precision == "auto" else precision
    images, steps, rounds = images or (512 if gpu else 4), steps or (4 if gpu else 1), rounds or (5 if gpu else 20)
    micro_batch = min(images, micro_batch or (128 if gpu else images))
    compiled = gpu if compiled is None else compiled
    protocol = PROTOCOLS["CIFAR-100"].with_overrides({"batch_size": images, "max_steps": steps})
    if depth:
        protocol = dataclasses.replace(protocol, depths={SIZE: depth})
    whole = images_of(protocol, 2 * images)
    data = dataclasses.replace(whole, val=whole.val.head(1))
    set_matmul_precision("fp32")

    ours: dict[str, VisionTransformer] = {}
    theirs: dict[str, nn.Module] = {}
    differences = {}
    sample = Prepare(protocol.image_size, data.mean, data.std, device)(data.train.pixels[:2].to(device))
    for model in (CLASSIC, DIFFERENTIAL):
        ours[model] = build_model(model, SIZE, protocol)
        ours[model].initialise(0)
        theirs[model] = timm_model(model, SIZE, protocol)
        give_weights(ours[model], theirs[model])
        ours[model].to(device), theirs[model].to(device)
        differences[model] = check_same(ours[model], theirs[model], sample, model)
    set_matmul_precision(precision)
    chosen = {model: choose(built, micro_batch, precision, DEFAULT_COMPUTE) for model, built in ours.items()}
    for model, difference in differences.items():
        used = [word for word in ("compiled", "fused", "graphs") if dataclasses.asdict(chosen[model])[word]]
        click.echo("; ".join([f"{model}: attention {chosen[model].attention}", *used, *chosen[model].notes]))
        click.echo(f"{model}: to timm's logits and gradient {difference:.1e}")
    ceilings = measure_ceilings(device, autocast_dtype(precision))
    click.echo(f"{ceilings}; the roofline counts matrix products\n")
    flops = {model: images * built.estimate_flops() for model, built in ours.items()}

    def our_loop(model: VisionTransformer, data: Dataset, graphs: bool = False) -> Callable[[], object]:
        how: dict[str, Any] = {"precision": precision, "micro_batch": micro_batch, "graphs": graphs}
        if gpu:
            return lambda: fit_and_time(model, data, protocol, _WARM_UP, steps, **how)[2]
        return partial(fit, model, data, protocol, seed=0, **how)

    def their_loop(model: nn.Module, data: Dataset) -> Callable[[], object]:
        return partial(plain_loop, model, data, protocol, steps, precision, device, micro_batch, _WARM_UP if gpu else None)

    def loops(data: Dataset) -> dict[str, Callable[[], object]]:
        return {
            "diffvit classic": our_loop(ours[CLASSIC], data, chosen[CLASSIC].graphs),
            "diffvit differential": our_loop(ours[DIFFERENTIAL], data, chosen[DIFFERENTIAL].graphs),
            "timm ViT": their_loop(theirs[CLASSIC], data),
            "timm DiffAttention": their_loop(theirs[DIFFERENTIAL], data),
        }

    one_image, validated = loops(data), {name + _VALIDATED: loop for name, loop in loops(whole).items()}
    arms, others = (validated, one_image) if gpu else (one_image, validated)
    stages = [] if only_compiled else [arms]
    for model in (CLASSIC,) if only_compiled else (CLASSIC, DIFFERENTIAL) if compiled else ():
        copied = timm_model(model, SIZE, protocol).to(device)
        copied.compile()
        beside = {name: loop for name, loop in arms.items() if _arm(name) == model}
        name = next(name for name in beside if name == _peer(name)).replace(_VALIDATED, "")
        beside[f"{name}, compiled{_VALIDATED if gpu else ''}"] = their_loop(copied, whole if gpu else data)
        stages.append(beside)
    small = min(images, 64)  # without autocast or micro-batches more would not fit
    if not (only_arms or only_compiled):
        whole_maps = build_model(DIFFERENTIAL, SIZE, protocol)
        whole_maps.initialise(0)
        set_form(whole_maps, "maps")
        others["diffvit differential, whole maps"] = our_loop(whole_maps.to(device), data)
        loaders = [
            endless(transform_loader(dataclasses.replace(whole, train=images_of(protocol, 4 * images).train), protocol, workers))
            for workers in ((8, 8) if gpu else (1, 1))
        ]
        user = timm_model(CLASSIC, SIZE, protocol).to(device)
        others[_USER] = users_loop(user, [_at_most(loader, small) for loader in loaders], protocol, steps, device)
        stages.append({name: loop for name, loop in arms.items() if name == _peer(name)} | others)

    journal = Journal(
        device, json_path, ceilings=ceilings.__dict__,
        protocol={"images": images, "micro_batch": micro_batch, "layers": protocol.depths[SIZE], "precision": precision},
        chosen={model: dataclasses.asdict(choice) for model, choice in chosen.items()},
    )  # fmt: skip
    click.echo(f"CIFAR-100, {SIZE}, {protocol.depths[SIZE]} layers, {precision}: {images} images, {micro_batch} at once")
    line(("a step", "median (range)", "images/s", "times timm's, 95 %", "of roofline"), _WIDTHS)
    a_step: dict[str, np.ndarray] = {}
    fractions: dict[str, float] = {}
    measured: list[dict[str, np.ndarray]] = []
    parts: dict[str, np.ndarray] = {}
    bars: list[Bar] = []

    def of_a_step(seconds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {name: np.asarray(times) / steps * (images / small if name == _USER else 1) for name, times in seconds.items()}

    def so_far(seconds: Mapping[str, Any]) -> None:
        rows = {**of_a_step(seconds), **a_step}
        journal.note(seconds_a_step=rows, medians=medians(rows))

    for actions in stages:
        found = of_a_step(rounds_of(actions, max(2, rounds // 4) if measured else rounds, device, after_round=so_far))
        measured.append(found)
        for name in [name for name in found if name not in a_step]:
            a_step[name] = times = found[name]
            # Weights, gradients and AdamW's moments, read and written once: 4 bytes each.
            passes = 4 if name.endswith(_VALIDATED) else 3 + 1 / images
            least = ceilings.least_seconds(passes * flops[_arm(name)], 28 * ours[_arm(name)].count_parameters())
            fractions[name] = least / float(np.median(times))
            against, rate = ratio(times, found[_peer(name)]), images / np.median(times)
            line((name, spread(times), f"{rate:,.1f}", str(against), f"{100 * fractions[name]:.0f} %"), _WIDTHS)
        bars = gpu_bars(measured) if gpu else cpu_bars(measured[0])
        if not only_compiled:
            parts = parts or parts_of_a_step(ours[CLASSIC], whole, protocol, precision, micro_batch, device, rounds)
            bars += bars_of_parts(parts, measured[0], images)
        journal.note(of_roofline=fractions, parts=parts, bars=bars)

    if not only_compiled:
        classic, differential, timm, diff_timm = measured[0].values()
        between = ratio(differential, classic)
        click.echo(f"\ndifferential over classic: {between}")
        validation, fetching = (1e3 * float(np.median(parts[name])) for name in ("validation", "data"))
        click.echo(f"a whole validation batch of the classic model takes {validation:.1f} ms, fetching two batches {fetching:.3f} ms")
        ratios = {"classic_to_timm": ratio(classic, timm), "differential_to_timm": ratio(differential, diff_timm)}
        journal.note(ratios={**ratios, "differential_to_classic": between})
    if gpu:
        journal.note(peak_memory=torch.cuda.max_memory_allocated(device))
    journal.finish(bars)


def gpu_bars(stages: Sequence[Mapping[str, np.ndarray]]) -> list[Bar]:
    """The bars on a GPU that the rows measured so far can tell. [stage]: name -> seconds in each round"""
    bars = []
    for stage in stages:
        classic, differential, timm, compiled = (
            stage.get(name + _VALIDATED) for name in ("diffvit classic", "diffvit differential", "timm ViT", "timm ViT, compiled")
        )
        if classic is not None and compiled is not None:
            what, least = "classic, with validation: times as fast as timm's ViT, compiled", GPU_AGAINST_TIMM_COMPILED
            bars.append(Bar(what, ratio(compiled, classic).median, least, at_least=True))
        elif classic is not None and timm is not None and differential is not None:
            what = "classic, with validation: times as fast as timm's ViT"
            bars.append(Bar(what, ratio(timm, classic).median, GPU_AGAINST_TIMM, at_least=True))
            bars.append(Bar("differential over classic, with validation", ratio(differential, classic).median, GPU_DIFFERENTIAL_TO_CLASSIC))
    return bars


def cpu_bars(rows: Mapping[str, np.ndarray]) -> list[Bar]:
    """The bars on a CPU, where ours and timm's were timed. name -> seconds in each round"""
    if "diffvit differential" not in rows:
        return []
    classic, differential, timm, diff_timm = rows.values()
    return [
        Bar("classic over timm's ViT, upper end", ratio(classic, timm).high, CLASSIC_TO_TIMM),
        Bar("differential over timm's DiffAttention, upper end", ratio(differential, diff_timm).high, DIFFERENTIAL_TO_TIMM),
        Bar("differential over classic", ratio(differential, classic).median, DIFFERENTIAL_TO_CLASSIC),
    ]


def bars_of_parts(parts: Mapping[str, np.ndarray], arms: Mapping[str, np.ndarray], images: int) -> list[Bar]:
    """The bars about a step's parts. The classic step's time holds a validation batch of as many images, or of one."""
    name, times = next(iter(arms.items()))
    validation, fetching, whole = (float(np.median(values)) for values in (parts["validation"], parts["data"], times))
    training = whole - (validation if name.endswith(_VALIDATED) else validation / images)
    return [
        Bar("a validation batch over a training step", validation / training, VALIDATION_TO_TRAINING),
        Bar("fetching data, of a step", fetching / whole, DATA_TO_STEP),
    ]


def _arm(name: str) -> str:
    return DIFFERENTIAL if "Diff" in _peer(name) else CLASSIC


def _peer(name: str) -> str:
    """The row of timm's model of the same architecture, doing the same."""
    peer = "timm DiffAttention" if "differential" in name or "Diff" in name else "timm ViT"
    return peer + (_VALIDATED if name.endswith(_VALIDATED) else "")


def _at_most(batches: Any, images: int) -> Any:
    return ((pixels[:images], labels[:images]) for pixels, labels in batches)


if __name__ == "__main__":
    main()
