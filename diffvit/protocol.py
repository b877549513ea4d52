"""The training protocol as data: data set -> hyper-parameters, size -> depth.

Everything a run's result depends on, apart from code, seed and precision, stands in the table PROTOCOLS below.
Both architectures train under the same row. Nothing here imports torch, so that the command line starts at once.

Sizes carry the user's labels: "10B", "25B" and "50B" are about 10, 25 and 50 *million* parameters. Width (d_model) is
fixed for each data set, so a size is a depth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffvit.errors import UserError, shown, unknown_name
from diffvit.user_models import is_reference, is_user_model, known_source, read_source

# Architecture -> "module:class" of its attention. Only attention differs between architectures, and where it takes more parameters the
# width of the MLP that pays for them.
MODELS: dict[str, str] = {
    "vit_classic": "diffvit.vit_classic:Attention",
    "vit_differential": "diffvit.vit_differential:DifferentialAttention",
    "vit_classic_wide_heads": "diffvit.vit_classic_wide_heads:WideHeadsAttention",
    "vit_classic_sub_norm": "diffvit.vit_classic_sub_norm:SubNormAttention",
    "vit_differential_v2": "diffvit.vit_differential_v2:DifferentialAttentionV2",
}

# The two that a study compares; others are controls, which a grid file can name.
ARMS = ("vit_classic", "vit_differential")

# Parameters count as equal within this share of the classic arm's.
LIKE_CLASSIC = 0.01

# How each architecture is called in figures and tables.
MODEL_TITLES: dict[str, str] = {
    "vit_classic": "Classic ViT",
    "vit_differential": "Differential ViT",
    "vit_classic_wide_heads": "Classic ViT, wide heads",
    "vit_classic_sub_norm": "Classic ViT, wide heads, sub-norm",
    "vit_differential_v2": "Differential ViT V2",
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All hyper-parameters of a data set. Lengths in pixels, `images` in rows of (train, validation, test).

    A field added later gets a default that leaves training as it was: fields at their default do not enter a run's
    identity, so that finished runs keep their run_id.
    """

    # The data
    classes: int
    channels: int
    image_size: int
    images: tuple[int, int, int]
    # The model
    patch_size: int
    d_model: int
    heads: int
    depths: Mapping[str, int]
    mlp_ratio: int = 4
    dropout: float = 0.0
    # Start attn.proj and mlp.fc2 at 1 / sqrt(2 depth) of their Xavier values, so that the residual stream grows alike at every depth
    residual_scale: bool = True
    # The optimiser: AdamW; weight decay on matrices only
    lr: float
    warmup_steps: int
    batch_size: int
    epochs: int
    weight_decay: float = 0.01
    clip_norm: float | None = None
    max_steps: int | None = None
    # Noise in the training split, drawn once a run; validation and test stay clean. The share of false labels, and the
    # standard deviation of Gaussian noise on pixels in 0-1
    label_noise: float = 0.0
    input_noise: float = 0.0

    @property
    def sizes(self) -> tuple[str, ...]:
        """Size labels, smallest first."""
        return tuple(self.depths)

    def steps_per_epoch(self, train_images: int | None = None) -> int:
        """Optimiser steps in one epoch; the last partial batch is kept."""
        return math.ceil((train_images or self.images[0]) / self.batch_size)

    def total_steps(self, train_images: int | None = None) -> int:
        """Optimiser steps of the whole run."""
        steps = self.epochs * self.steps_per_epoch(train_images)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def false_labels(self, train_images: int | None = None) -> int:
        """Training images whose label is not the true one."""
        return round(self.label_noise * (train_images or self.images[0]))

    def learning_rate(self, step: int, total_steps: int) -> float:
        """Learning rate of `step` (1 … total_steps).

        Linear warm-up to `lr`, then a cosine to 0 at the last step. Where warm-up is not shorter than the run, the ramp is all
        there is, and it stops below `lr`.
        """
        if step <= self.warmup_steps or self.warmup_steps >= total_steps:
            return self.lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (total_steps - self.warmup_steps)
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * progress))

    def warmup_warning(self, total_steps: int) -> str | None:
        """The sentence for a warm-up that never ends, or None."""
        if self.warmup_steps < total_steps:
            return None
        reached = 100 * total_steps / self.warmup_steps
        return (
            f"warm-up ({self.warmup_steps} steps) is not shorter than the run ({total_steps} steps): the learning rate only ramps, "
            f"reaches {reached:.0f} % of {self.lr:g} and never decays; `train --warmup_steps`, or overrides in a grid file, change that"
        )

    def identity(self, size: str) -> dict[str, Any]:
        """The values that decide a run's result: required fields, and others where they differ from their default."""
        values: dict[str, Any] = {"depth": self.depths[size]}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # The depth stands for the size, and the data set's fingerprint for its images.
            if field.name in ("depths", "images") or (field.default is not dataclasses.MISSING and value == field.default):
                continue
            values[field.name] = value
        return values

    def with_overrides(self, overrides: Mapping[str, Any]) -> Protocol:
        """This protocol with some values replaced, each checked.

        Raises:
            UserError: an unknown name, a value of the wrong kind or out of range.
        """
        checked = {name: check_override(name, value) for name, value in overrides.items()}
        protocol = dataclasses.replace(self, **checked)
        if protocol.batch_size > self.images[0]:
            raise UserError(
                f"batch_size {protocol.batch_size} is larger than the training set of {self.images[0]} images.",
                f"give a batch size of at most {self.images[0]}.",
            )
        fitting = [heads for heads in range(2, self.d_model, 2) if self.d_model % heads == 0 and 8 <= self.d_model // heads <= 128]
        if "heads" in checked and protocol.heads not in fitting:  # pairs are formed of them; fused attention takes 8 to 256 values a head
            listed = ", ".join(map(str, fitting))
            raise UserError(f"{protocol.heads} heads do not fit a width of {self.d_model}.", f"give one of {listed}.")
        if protocol.image_size % protocol.patch_size:
            raise UserError(
                f"patch_size {protocol.patch_size} does not divide image_size {protocol.image_size}.", "give a patch_size that does."
            )
        return protocol


# The user's protocol, to the letter, and two small data sets to try everything on.
# `images`: CIFAR-100's 50,000 training images less 5,000 for validation; BACH's 400 labelled images split as dataset.py explains.
# `digits` was tuned on its validation split only, with the same effort for both arms (docs/design.md has the figures).
_DIGITS = Protocol(
    classes=10, channels=1, image_size=8, images=(1258, 180, 359),
    patch_size=2, d_model=64, heads=4, depths={"0.1M": 2, "0.2M": 4, "0.4M": 8},
    lr=3e-3, warmup_steps=50, batch_size=32, epochs=15,
)  # fmt: skip

PROTOCOLS: dict[str, Protocol] = {
    "CIFAR-100": Protocol(
        classes=100, channels=3, image_size=224, images=(45_000, 5_000, 10_000),
        patch_size=8, d_model=256, heads=8, depths={"10B": 12, "25B": 31, "50B": 63},
        lr=1e-4, warmup_steps=500, batch_size=512, epochs=50, dropout=0.2,
    ),
    "BACH": Protocol(
        classes=4, channels=3, image_size=512, images=(228, 40, 132),
        patch_size=16, d_model=384, heads=6, depths={"10B": 5, "25B": 14, "50B": 28},
        lr=3e-4, warmup_steps=500, batch_size=64, epochs=100, dropout=0.2,
    ),
    "digits": _DIGITS,
    "digits-noisy": _DIGITS,
}  # fmt: skip

# The study on CIFAR-100 at a fraction of its price, `--grid pilot`. A patch of 28 is 4 pixels of an image before it was enlarged, so 65
# tokens do where the protocol has 785: the same models, batches, epochs and schedule.
PILOT = ("CIFAR-100", {"patch_size": 28})

# What may be overridden: name -> (type, smallest value, largest value or None, smallest is allowed itself); bool has no bounds
OVERRIDES: dict[str, tuple[type, float, float | None, bool]] = {
    "epochs": (int, 1, None, True),
    "batch_size": (int, 1, None, True),
    "max_steps": (int, 1, None, True),
    "warmup_steps": (int, 0, None, True),
    "lr": (float, 0, None, False),
    "weight_decay": (float, 0, None, True),
    "clip_norm": (float, 0, None, False),
    "dropout": (float, 0, 0.99, True),
    "residual_scale": (bool, 0, 1, True),
    "heads": (int, 2, None, True),
    "patch_size": (int, 1, None, True),
    "image_size": (int, 1, 2048, True),
    "label_noise": (float, 0, 0.99, True),
    "input_noise": (float, 0, 1, True),
}


def check_override(name: str, value: Any) -> Any:
    """`value` as the type that `name` takes, or a UserError."""
    if name not in OVERRIDES:
        raise unknown_name("override", name, OVERRIDES)
    kind, low, high, closed = OVERRIDES[name]
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise UserError(f"{name} is {shown(value)}.", "give true or false.")
        return str(value).lower() == "true"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
    in_range = is_number and (value >= low if closed else value > low) and (high is None or value <= high)
    if not in_range or (kind is int and value != int(value)):
        bound = f"{'at least' if closed else 'above'} {low:g}" + (f" and at most {high:g}" if high is not None else "")
        noun = "a whole number" if kind is int else "a number"
        if value is None:
            raise UserError(f"{name} has no value.", f"give {noun} {bound}, or leave it out.")
        written = (", in plain digits such as 10" if kind is int else ", such as 0.2 or 3e-4") if isinstance(value, str) else ""
        raise UserError(f"{name} is {shown(value)}.", f"give {noun} {bound}{written}.")
    return kind(value)


def protocol_of(dataset: str) -> Protocol:
    """The data set's protocol, or a UserError that lists the known ones."""
    if dataset not in PROTOCOLS:
        raise _no_dataset(dataset)
    return PROTOCOLS[dataset]


def resolve_model(name: str) -> str:
    """The architecture's name, checked; "differential" is vit_differential, and FILE.py:CLASS is read. Raises UserError."""
    for known in (name, f"vit_{name}"):
        if known in MODELS:
            return known
    if is_reference(name):
        return read_source(name).name
    if known_source(name):
        return name
    error = unknown_name("model", name, [*MODELS, "FILE.py:CLASS"])
    raise UserError(error.message, f"{error.hint} vit_ may be left out.")


def ledger_model(name: str) -> str:
    """As resolve_model, for what a ledger may have: code of one's own is not needed to name its runs."""
    return name if is_user_model(name) else resolve_model(name)


def model_title(name: str) -> str:
    """What an architecture is called in figures and sentences."""
    return MODEL_TITLES.get(name, name)


def in_order(models: Iterable[str]) -> list[str]:
    """Architectures as figures and tables list them: the built-in ones first."""
    given = dict.fromkeys(models)
    return [*(model for model in MODELS if model in given), *(model for model in given if model not in MODELS)]


def resolve_dataset(name: str) -> str:
    """The data set's canonical name; case, hyphens and underscores do not matter: "cifar100" is CIFAR-100. Raises UserError."""
    if (known := known_dataset(name)) is None:
        raise _no_dataset(name)
    return known


def known_dataset(name: str) -> str | None:
    """The canonical name of a data set that there is, or None."""
    by_letters = {re.sub(r"[-_ ]", "", known.lower()): known for known in PROTOCOLS}
    return by_letters.get(re.sub(r"[-_ ]", "", name.lower()) if isinstance(name, str) else "")


def _no_dataset(name: str) -> UserError:
    error = unknown_name("data set", name, PROTOCOLS)
    return UserError(error.message, f"{error.hint} One that a grid file defines is --dataset FILE:NAME.")


def resolve_size(size: str, dataset: str) -> str:
    """The size label that the data set has for `size`.

    Accepts the label itself ("10B"), the count in millions ("10M", "10") and, of three sizes, small, medium, large.
    """
    sizes = protocol_of(dataset).sizes
    aliases = {re.sub(r"[BM]$", "", label).lower(): label for label in sizes}
    if len(sizes) == 3:
        aliases |= dict(zip(("small", "medium", "large"), sizes, strict=True))
    key = re.sub(r"(?<=\d)[bm]$", "", str(size).strip().lower())
    if key not in aliases:
        words = " (or small, medium, large)" if "small" in aliases else ""
        raise UserError(f"{dataset} has no size {shown(size)}.", f"its sizes are {', '.join(sizes)}{words}.")
    return aliases[key]


def images_in_steps(rows: int, batch_size: int, steps: int) -> int:
    """Images seen in so many steps over a set of `rows`, whose last batch in each round is what is left."""
    rounds, rest = divmod(steps, math.ceil(rows / batch_size))
    return rounds * rows + min(rest * batch_size, rows)


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts: the same on every machine and in every Python process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
