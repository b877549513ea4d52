"""Dynamic loss scaling for fp16, which ends at 65504 and has nothing between 0 and 6e-8 (Micikevicius et al., arXiv 1710.03740).

The loss is multiplied by a scale before the backward pass, and the gradient divided by it afterwards. Where the gradient overflows all
the same, the step's update is skipped and the scale halved; after many steps without that it is doubled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# As torch begins and doubles it.
FIRST_SCALE = 2.0**16
STEPS_TO_DOUBLE = 2000
# Of no use below: a gradient that overflows by itself is not mended by a scale.
SMALLEST_SCALE = 1.0


class LossScale:
    """The scale of a run's loss: 1 at any precision but fp16.

    Scale and counter are tensors on the device and change in place: no step waits for them, CUDA graphs read the scale as it is, and
    workers, whose gradients are the same, skip the same steps.
    """

    def __init__(self, device: torch.device, precision: str):
        self._one = torch.ones((), device=device)
        self._scaler = torch.amp.GradScaler(device.type, FIRST_SCALE, growth_interval=STEPS_TO_DOUBLE, enabled=precision == "fp16")
        self.scaled(self._one)  # makes its tensors, which a graph must not

    @property
    def current(self) -> Tensor:
        """The scale. Scalar"""
        return self.scaled(self._one)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimiser's gradients by the scale, and look whether they are finite."""
        self._scaler.unscale_(optimizer)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimiser's step, unless the gradient was not finite; then adapt the scale."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """What a resume state keeps: the scale and the steps since it last changed, in fp16 only."""
        scaler = self._scaler.state_dict()
        return {"loss_scale": {"scale": scaler["scale"], "steps": scaler["_growth_tracker"]}} if scaler else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the scale from a state."""
        if self._scaler.is_enabled():
            kept = state["loss_scale"]
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": kept["scale"], "_growth_tracker": kept["steps"]})
