"""Images a second: from memory in batches, made ready for a model, and as most loops do it.

    python -m bench.data                                  random images like CIFAR-100's
    python -m bench.data --data_root DIR --json docs/results/data.json     the real ones

The loader gives uint8 batches of the training order; "ready" is resized to the protocol's size with antialiasing and normalised. Before
anything is timed, both ways must make the same of the same images, to 1/255.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.peers import TransformedImages, endless, transform_loader
from bench.step import images_of
from bench.timing import Bar, Journal, json_option, medians, rounds_of, spread, table, wait_for
from diffvit.data.batches import Prepare, StepBatches, make_loader
from diffvit.dataset import Dataset, ImageSet, load
from diffvit.machine.device import resolve_device
from diffvit.protocol import PROTOCOLS

# The bar: images/s of the loader, before resizing.
LOADER_IMAGES = 100_000

# Pixels of which so many at once are resized: whole batches would be gigabytes in fp32.
_AT_ONCE = 64


def check_same(data: Dataset, prepare: Prepare, device: torch.device) -> float:
    """The largest difference between images made ready in both ways, pixels in 0-1. Exits where it is more than 1/255."""
    some = ImageSet(data.train.pixels[:16], data.train.labels[:16])
    theirs = TransformedImages(some, PROTOCOLS["CIFAR-100"], data.mean, data.std)
    ours = prepare(some.pixels.to(device)).cpu()
    std = torch.tensor(data.std).view(-1, 1, 1)
    difference = max(((theirs[i][0] - ours[i]).abs() * std).max().item() for i in range(len(some)))
    if difference > 1 / 255 + 1e-6:
        raise click.ClickException(f"images made ready in the two ways differ by {difference:.2g}")
    return difference


@click.command()
@click.option("--data_root", help="Folder with the real CIFAR-100. [default: random images]")
@click.option("--device", "device_name", help="[default: the first GPU, or the CPU]")
@click.option("--rounds", type=click.IntRange(min=2), default=10, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=2, show_default=True, help="DataLoader workers of the usual way.")
@json_option
def main(data_root: str | None, device_name: str | None, rounds: int, workers: int, json_path: Path | None) -> None:
    """Time the data's way to the model."""
    device = resolve_device(device_name)
    protocol = PROTOCOLS["CIFAR-100"]
    data = load("CIFAR-100", data_root) if data_root else images_of(protocol, 45_000)
    train_set = data.train if device.type == "cpu" else data.train.to(device)
    prepare = Prepare(protocol.image_size, data.mean, data.std, device)
    difference = check_same(data, prepare, device)

    epoch = StepBatches(len(train_set), protocol.batch_size, 0, (1, -(-len(train_set) // protocol.batch_size)), salt="train")
    batch = next(iter(make_loader(train_set, epoch)))[0]
    usual = dataclasses.replace(data, train=ImageSet(data.train.pixels[:4096], data.train.labels[:4096]))
    user_protocol = protocol.with_overrides({"batch_size": _AT_ONCE})
    transformed = endless(transform_loader(usual, user_protocol, workers))

    def loader() -> None:
        for _ in make_loader(train_set, epoch):
            pass
        wait_for(device)

    def ready() -> None:
        for some in batch.split(_AT_ONCE):
            prepare(some)

    def user() -> None:
        for _ in range(4):
            next(transformed)

    actions: dict[str, Callable[[], Any]] = {"loader": loader, "ready": ready, "usual": user}
    images = {"loader": len(train_set), "ready": len(batch), "usual": 4 * _AT_ONCE}
    labels = {
        "loader": "the loader: uint8 batches of 512 in training order",
        "ready": "those made ready on the device",
        "usual": f"usual way: PIL images, torchvision transforms, {workers} DataLoader workers",
    }
    journal = Journal(device, json_path, source="the real CIFAR-100" if data_root else "random images", difference=difference)
    seconds = rounds_of(actions, rounds, device, warm_up=2, after_round=lambda seconds: journal.note(so_far=medians(seconds)))
    rates = {name: images[name] / times for name, times in seconds.items()}
    table(
        f"images/s, {'the real CIFAR-100' if data_root else 'random images'}",
        ("", "median", "range", "an epoch"),
        [
            (labels[name], f"{np.median(rate):,.0f}", f"{rate.min():,.0f} to {rate.max():,.0f}", spread(len(train_set) / rate))
            for name, rate in rates.items()
        ],
    )
    click.echo(f"the two ways of making images ready differ by {255 * difference:.2g}/255 at most")
    bars = [Bar("images/s of the loader, median", float(np.median(rates["loader"])), LOADER_IMAGES, at_least=True)]
    journal.note(images_per_second=rates)
    journal.finish(bars)


if __name__ == "__main__":
    main()
