"""The specification of a run, and the run_id that follows from it, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffvit.errors import UserError, shown, unknown_name
from diffvit.protocol import (
    OVERRIDES,
    PILOT,
    PROTOCOLS,
    Protocol,
    check_override,
    protocol_of,
    resolve_dataset,
    resolve_model,
    resolve_size,
)
from diffvit.user_models import ModelSource, known_source

# Raise it when a change in the code changes what a run computes: old results then count as other work.
SEMANTICS_VERSION = 4

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class RunSpec:
    """One training run. Build it with RunSpec.of, which checks and resolves names.

    Attributes:
        precision: "fp32"; "bf16" and "fp16" for autocast to these, fp16 with loss scaling.
        overrides: protocol values that replace the data set's own.
        source: the code of an architecture from the user's own file; None for a built-in one.
    """

    model: str
    size: str
    dataset: str
    seed: int = 0
    precision: str = "fp32"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    source: ModelSource | None = field(default=None, repr=False)

    @staticmethod
    def of(
        model: str, size: str, dataset: str, seed: int = 0, precision: str = "fp32", overrides: Mapping[str, Any] | None = None
    ) -> RunSpec:
        """A checked RunSpec; names may be aliases. Raises UserError."""
        if precision not in PRECISIONS:
            raise unknown_name("precision", precision, PRECISIONS)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise UserError(f"seed is {shown(seed)}.", "give a whole number of at least 0 and less than 2**63.")
        dataset = resolve_dataset(dataset)
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        given = {name: check_override(name, value) for name, value in given.items()}
        protocol_of(dataset).with_overrides(given)
        model, size = resolve_model(model), resolve_size(size, dataset)
        return RunSpec(model, size, dataset, seed, precision, given, known_source(model))

    @property
    def protocol(self) -> Protocol:
        """The data set's protocol with this run's overrides."""
        return protocol_of(self.dataset).with_overrides(self.overrides)

    @property
    def title(self) -> str:
        """The run's title: model, size, data set, seed, overrides."""
        return f"{self.model} {self.size} {self.dataset} seed {self.seed} {overrides_text(self.overrides)}".rstrip()

    def names(self, run_id: str) -> dict[str, Any]:
        """The run's names, as its files have them."""
        named = {key: getattr(self, key) for key in ("model", "size", "dataset", "seed", "precision")}
        return {"run_id": run_id, **named}

    def identity(self, fingerprint: str) -> dict[str, Any]:
        """Everything that decides the result, given the data's fingerprint."""
        return {
            "semantics": SEMANTICS_VERSION,
            "model": self.model,
            "size": self.size,
            "dataset": self.dataset,
            "fingerprint": fingerprint,
            "protocol": self.protocol.identity(self.size),
            "seed": self.seed,
            "precision": self.precision,
            **({"source": self.source.sha256} if self.source else {}),
        }

    def run_id(self, fingerprint: str) -> str:
        """Ten hexadecimal digits."""
        return hash_of_identity(self.identity(fingerprint))


def overrides_text(overrides: Mapping[str, Any]) -> str:
    """Overrides as tables and titles write them: "epochs=5 lr=0.001"."""
    return " ".join(f"{name}={value}" for name, value in overrides.items())


def parse_overrides(text: str) -> dict[str, Any]:
    """The overrides that a text of overrides_text says, as the types that they take."""
    pairs = (part.split("=", 1) for part in text.split())
    return {name: _parsed(name, value) for name, value in pairs}


# Overrides that give a model other tokens than the protocol's, as a title says them.
_TOKENS = {"image_size": "images of", "patch_size": "patches of"}


def overrides_title(dataset: str, overrides: str) -> str:
    """Overrides for a title: "patches of 28, not the protocol's 8; epochs=5". The pilot's are called that.

    Args:
        overrides: as overrides_text gives them.
    """
    given = dict(part.split("=", 1) for part in overrides.split())
    tokens = {name: given.pop(name) for name in _TOKENS if name in given}
    protocol = PROTOCOLS.get(dataset)  # of other data than a process knows, the hub may have runs
    phrases = [f"{_TOKENS[name]} {value}" + (f", not the protocol's {getattr(protocol, name)}" if protocol else "")
               for name, value in tokens.items()]  # fmt: skip
    if (dataset, overrides_text(tokens)) == (PILOT[0], overrides_text(PILOT[1])):
        phrases[0] = f"pilot: {phrases[0]}"
    return "; ".join(filter(None, [*phrases, ", ".join(overrides_text(given).split())]))


def _parsed(name: str, value: str) -> Any:
    kind = OVERRIDES[name][0] if name in OVERRIDES else str  # another version may have had more
    if kind is bool:
        return value == "True"
    return int(float(value)) if kind is int else kind(value)


def hash_of_identity(identity: Mapping[str, Any]) -> str:
    """The run_id of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
