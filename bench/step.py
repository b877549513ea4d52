"""A training step, against timm's models of the same shape in a plain loop, in one run.

    python -m bench.step                           the first GPU, or the CPU
    python -m bench.step --device cpu --json docs/results/step.json

A step is one AdamW update on a batch, on images as CIFAR-100 has them, resized on the device. Ours go through `fit`, the loop that every
run uses, and the plain loop gets the same batches and the same resizing. Both also look at a validation batch after each step: of one
image in the rows that the bars are about, of as many as are trained on in those that say so. The user's loop transforms each image with
torchvision in DataLoader workers and has no autocast. Before anything is timed, the models are given the same weights and must give the
same logits and gradients. Rows without a bar are timed in fewer rounds, beside timm's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
from bench.timing import Bar, finish, json_option, ratio, rounds_of, spread, table
from diffvit.compute import DEFAULT_COMPUTE, autocast_dtype, choose, set_matmul_precision
from diffvit.dataset import Dataset, ImageSet, Prepare, StepBatches, make_loader
from diffvit.evaluation import autocast
from diffvit.protocol import PROTOCOLS, Protocol
from diffvit.train import default_precision, fit, resolve_device
from diffvit.vit import VisionTransformer, build_model
from diffvit.vit_differential import set_form

CLASSIC = "vit_classic"
SIZE = "10B"

# The bars on a CPU, as ratios of seconds: upper ends of the intervals, then medians.
CLASSIC_TO_TIMM = 1.03
DIFFERENTIAL_TO_TIMM = 0.70
DIFFERENTIAL_TO_CLASSIC = 1.35
# On a GPU.
GPU_CLASSIC_TO_TIMM = 1 / 1.3
GPU_CLASSIC_TO_TIMM_COMPILED = 1.0
GPU_DIFFERENTIAL_TO_CLASSIC = 1 / 0.90
GPU_ROOFLINE = 0.50
# Everywhere.
VALIDATION_TO_TRAINING = 1 / 3
DATA_TO_STEP = 0.02

_VALIDATED = ", with validation"


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
@click.option("--steps", type=click.IntRange(min=1), help="In a round. [default: 6 on a GPU, 1 on a CPU]")
@click.option("--rounds", type=click.IntRange(min=2), default=20, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="On a CPU. [default: torch's]")
@click.option("--compiled/--no-compiled", default=None, help="Also time compiled models. [default: on a GPU]")
@click.option("--only_arms", is_flag=True, help="Ours and timm's, eager: the bars alone.")
@json_option
def main(device_name: str | None, precision: str, images: int | None, micro_batch: int | None, depth: int | None, steps: int | None,
         rounds: int, threads: int | None, compiled: bool | None, only_arms: bool, json_path: Path | None) -> None:  # fmt: skip
    """Time training steps of both architectures and of what one would use instead."""
    device = resolve_device(device_name)
    gpu = device.type == "cuda"
    if threads:
        torch.set_num_threads(threads)
    precision = default_precision(device) if precision == "auto" else precision
    images, steps = images or (512 if gpu else 4), steps or (6 if gpu else 1)
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

    def our_loop(model: VisionTransformer, data: Dataset = data) -> Callable[[], object]:
        return partial(fit, model, data, protocol, seed=0, precision=precision, micro_batch=micro_batch)

    def their_loop(model: nn.Module, data: Dataset = data) -> Callable[[], object]:
        return partial(plain_loop, model, data, protocol, steps, precision, device, micro_batch)

    actions: dict[str, Callable[[], object]] = {
        "diffvit classic": our_loop(ours[CLASSIC]),
        "diffvit differential": our_loop(ours[DIFFERENTIAL]),
        "timm ViT": their_loop(theirs[CLASSIC]),
        "timm DiffAttention": their_loop(theirs[DIFFERENTIAL]),
    }
    others: dict[str, Callable[[], object]] = {}
    if compiled:
        for name, model in (("timm ViT, compiled", CLASSIC), ("timm DiffAttention, compiled", DIFFERENTIAL)):
            copied = timm_model(model, SIZE, protocol).to(device)
            copied.compile()
            others[name] = their_loop(copied)
    if not only_arms:
        others |= {
            f"diffvit classic{_VALIDATED}": our_loop(ours[CLASSIC], whole),
            f"diffvit differential{_VALIDATED}": our_loop(ours[DIFFERENTIAL], whole),
            f"timm ViT{_VALIDATED}": their_loop(theirs[CLASSIC], whole),
            f"timm DiffAttention{_VALIDATED}": their_loop(theirs[DIFFERENTIAL], whole),
        }
        whole_maps = build_model(DIFFERENTIAL, SIZE, protocol)
        whole_maps.initialise(0)
        set_form(whole_maps, "maps")
        others["diffvit differential, whole maps"] = our_loop(whole_maps.to(device))
        small = min(images, 64)  # without autocast or micro-batches more would not fit
        loaders = [
            endless(transform_loader(dataclasses.replace(whole, train=images_of(protocol, 4 * images).train), protocol, workers))
            for workers in ((8, 8) if gpu else (1, 1))
        ]
        user = timm_model(CLASSIC, SIZE, protocol).to(device)
        others["the user's loop, timm ViT, with validation"] = users_loop(
            user, [_at_most(loader, small) for loader in loaders], protocol, steps, device
        )

    a_step = {name: times / steps for name, times in rounds_of(actions, rounds, device).items()}
    against = {name: a_step[_peer(name)] for name in a_step}
    if others:
        peers = {name: actions[name] for name in ("timm ViT", "timm DiffAttention")}
        fewer = {name: times / steps for name, times in rounds_of({**peers, **others}, max(2, rounds // 4), device).items()}
        if not only_arms:  # its batch may be smaller
            fewer["the user's loop, timm ViT, with validation"] *= images / small
        against |= {name: fewer[_peer(name)] for name in others}
        a_step |= {name: fewer[name] for name in others}
    parts = parts_of_a_step(ours[CLASSIC], whole, protocol, precision, micro_batch, device, rounds)
    ceilings = measure_ceilings(device, autocast_dtype(precision))
    flops = {model: images * built.estimate_flops() for model, built in ours.items()}
    fractions = {}
    rows = []
    for name, times in a_step.items():
        model = DIFFERENTIAL if "Diff" in _peer(name) else CLASSIC
        # Weights, gradients and AdamW's moments, read and written once: 4 bytes each.
        passes = 4 if name.endswith(_VALIDATED) else 3 + 1 / images
        least = ceilings.least_seconds(passes * flops[model], 28 * ours[model].count_parameters())
        fractions[name] = least / float(np.median(times))
        rows.append(
            (name, spread(times), f"{images / np.median(times):,.1f}", str(ratio(times, against[name])), f"{100 * fractions[name]:.0f} %")
        )
    table(
        f"CIFAR-100, {SIZE}, {protocol.depths[SIZE]} layers, {precision}: {images} images, {micro_batch} at once",
        ("a step", "median (range)", "images/s", "times timm's, 95 %", "of roofline"),
        rows,
    )
    for model, difference in differences.items():
        notes = "".join(f"; {note}" for note in chosen[model].notes)
        click.echo(f"{model}: attention {chosen[model].attention}{notes}; to timm's logits and gradient {difference:.1e}")
    classic, differential = a_step["diffvit classic"], a_step["diffvit differential"]
    between = ratio(differential, classic)
    validation, fetching = float(np.median(parts["validation"])), float(np.median(parts["data"]))
    training = float(np.median(classic)) - validation / images
    click.echo(f"differential over classic: {between}")
    click.echo(
        f"a whole validation batch of the classic model takes {1e3 * validation:.1f} ms, fetching two batches {1e3 * fetching:.3f} ms"
    )
    click.echo(f"{ceilings}; the roofline counts matrix products")

    to_timm, diff_to_timm = ratio(classic, a_step["timm ViT"]), ratio(differential, a_step["timm DiffAttention"])
    if gpu:
        bars = [
            Bar("classic over timm's ViT", to_timm.median, GPU_CLASSIC_TO_TIMM),
            Bar("differential over classic", between.median, GPU_DIFFERENTIAL_TO_CLASSIC),
            Bar("classic, of the roofline", fractions["diffvit classic"], GPU_ROOFLINE, at_least=True),
        ]
        if compiled:
            # Both were timed beside timm's eager model, in rounds of their own.
            to_compiled = to_timm.median / ratio(a_step["timm ViT, compiled"], against["timm ViT, compiled"]).median
            bars.append(Bar("classic over timm's ViT, compiled", to_compiled, GPU_CLASSIC_TO_TIMM_COMPILED))
    else:
        bars = [
            Bar("classic over timm's ViT, upper end", to_timm.high, CLASSIC_TO_TIMM),
            Bar("differential over timm's DiffAttention, upper end", diff_to_timm.high, DIFFERENTIAL_TO_TIMM),
            Bar("differential over classic", between.median, DIFFERENTIAL_TO_CLASSIC),
        ]
    bars += [
        Bar("a validation batch over a training step", validation / training, VALIDATION_TO_TRAINING),
        Bar("fetching data, of a step", fetching / float(np.median(classic)), DATA_TO_STEP),
    ]
    outcome: dict[str, Any] = {
        "protocol": {"images": images, "micro_batch": micro_batch, "layers": protocol.depths[SIZE], "precision": precision},
        "seconds_a_step": a_step,
        "parts": parts,
        "ratios": {"classic_to_timm": to_timm, "differential_to_timm": diff_to_timm, "differential_to_classic": between},
        "of_roofline": fractions,
        "ceilings": ceilings.__dict__,
        "chosen": {model: dataclasses.asdict(choice) for model, choice in chosen.items()},
    }
    if gpu:
        outcome["peak_memory"] = torch.cuda.max_memory_allocated(device)
    finish(outcome, bars, device, json_path)


def _peer(name: str) -> str:
    """The row of timm's model of the same architecture, doing the same."""
    peer = "timm DiffAttention" if "differential" in name or "Diff" in name else "timm ViT"
    return peer + (_VALIDATED if name.endswith(_VALIDATED) else "")


def _at_most(batches: Any, images: int) -> Any:
    return ((pixels[:images], labels[:images]) for pixels, labels in batches)


if __name__ == "__main__":
    main()
