"""What one would use instead: timm's models in a plain loop, a loop with a transform for each image, the equation with whole maps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from bench.timing import wait_for
from diffvit.data.batches import Prepare, StepBatches, make_loader
from diffvit.dataset import Dataset, ImageSet
from diffvit.protocol import Protocol
from diffvit.vit import VisionTransformer

DIFFERENTIAL = "vit_differential"


def timm_model(model: str, size: str, protocol: Protocol) -> nn.Module:
    """timm's model of the same shape. Its differential attention counts pairs of heads, of which there are half as many."""
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    differential = model == DIFFERENTIAL
    return TimmVisionTransformer(
        img_size=protocol.image_size, patch_size=protocol.patch_size, in_chans=protocol.channels, num_classes=protocol.classes,
        embed_dim=protocol.d_model, depth=protocol.depths[size], num_heads=protocol.heads // (2 if differential else 1),
        mlp_ratio=protocol.mlp_ratio, attn_layer="diff" if differential else "attn",
        pos_drop_rate=protocol.dropout, proj_drop_rate=protocol.dropout,
    )  # fmt: skip


def give_weights(ours: VisionTransformer, theirs: nn.Module) -> None:
    """The same weights for timm's model. Raises RuntimeError where the shapes differ."""
    theirs.load_state_dict({name.replace("patch_embed.", "patch_embed.proj."): value for name, value in ours.state_dict().items()})


def plain_loop(
    model: nn.Module,
    data: Dataset,
    protocol: Protocol,
    steps: int,
    precision: str,
    device: torch.device,
    micro_batch: int,
    warm_up: int | None = None,
) -> float | None:
    """Steps as in any tutorial, on the batches that ours gets: resized on the device, autocast, AdamW, a validation batch after each.

    Returns:
        Seconds of the steps after `warm_up` others; None without a warm-up, where the whole loop is timed from outside.
    """
    prepare = Prepare(protocol.image_size, data.mean, data.std, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=protocol.lr, weight_decay=protocol.weight_decay)
    train_set, val_set = (split if device.type == "cpu" else split.to(device) for split in (data.train, data.val))
    loaders = [
        make_loader(split, StepBatches(len(split), protocol.batch_size, 0, (1, steps + (warm_up or 0)), salt=name))
        for split, name in ((train_set, "train"), (val_set, "val"))
    ]
    model.train()
    start = None
    for step, (train_batch, val_batch) in enumerate(zip(*loaders, strict=True)):
        if step == warm_up:
            wait_for(device)
            start = time.perf_counter()
        for pixels, labels in _pieces(train_batch, micro_batch):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(model(prepare(pixels)), labels) * (len(labels) / len(train_batch[1]))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            for pixels, labels in _pieces(val_batch, micro_batch):
                F.cross_entropy(model(prepare(pixels)), labels)
        model.train()
    if start is None:
        return None
    wait_for(device)
    return time.perf_counter() - start


def _pieces(batch: tuple[Tensor, Tensor], micro_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(*(part.split(micro_batch) for part in batch), strict=True)


class TransformedImages(TorchDataset):
    """Images as PIL opens them, and torchvision's transforms for each: what most loops do."""

    def __init__(self, images: ImageSet, protocol: Protocol, mean: tuple[float, ...], std: tuple[float, ...]):
        from torchvision import transforms

        pictures = images.pixels.permute(0, 2, 3, 1).numpy()
        self.images = [Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in pictures]
        self.labels = images.labels.tolist()
        size = (protocol.image_size, protocol.image_size)
        self.transform = transforms.Compose([transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(self.images[row]), self.labels[row]


def transform_loader(data: Dataset, protocol: Protocol, workers: int) -> DataLoader:
    """A DataLoader of such images, shuffled."""
    images = TransformedImages(data.train, protocol, data.mean, data.std)
    return DataLoader(
        images, batch_size=protocol.batch_size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )


def endless(loader: DataLoader) -> Iterator[Any]:
    """Epoch after epoch of a loader."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


def users_loop(
    model: nn.Module, loaders: Sequence[Iterator[Any]], protocol: Protocol, steps: int, device: torch.device
) -> Callable[[], None]:
    """Steps of a loop that was written to work: no autocast, and the losses looked at in every step.

    Args:
        loaders: of the training and of the validation batches, endless.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=protocol.lr, weight_decay=protocol.weight_decay)
    batches, validation = loaders

    def run() -> None:
        for _ in range(steps):
            model.train()
            pixels, labels = next(batches)
            loss = F.cross_entropy(model(pixels.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                pixels, labels = next(validation)
                val_loss = F.cross_entropy(model(pixels.to(device)), labels.to(device))
            assert np.isfinite([loss.item(), val_loss.item()]).all()

    return run


def reference_attention(q_BNPsE: Tensor, k_BNPsE: Tensor, v_BPNV: Tensor, lambda_full: Tensor) -> Tensor:
    """The equation as the paper's reference computes it: one softmax in fp32 over the maps of all heads, in memory."""
    q_BHNE, k_BHNE = (x.flatten(2, 3).transpose(1, 2) for x in (q_BNPsE, k_BNPsE))
    scores_BHNN = q_BHNE * q_BHNE.shape[-1] ** -0.5 @ k_BHNE.transpose(-1, -2)
    maps_BPsNN = F.softmax(scores_BHNN, dim=-1, dtype=torch.float32).type_as(scores_BHNN).unflatten(1, (-1, 2))
    return (maps_BPsNN[:, :, 0] - lambda_full * maps_BPsNN[:, :, 1]) @ v_BPNV
