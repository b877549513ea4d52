"""Weights as safetensors, with a header that rebuilds the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffvit.checks import (
    NAME,
    any_of,
    dict_of,
    fault,
    list_of,
    maybe,
    one_of,
    parse_json,
    real,
    record,
    text,
    whole,
)
from diffvit.errors import UserError, first_line
from diffvit.protocol import MODELS, Protocol
from diffvit.user_models import SOURCE, USER_MODEL, kept_source

if TYPE_CHECKING:
    from diffvit.vit import VisionTransformer
from diffvit.ledger.disk import write_atomically
from diffvit.ledger.spec import PRECISIONS, SEMANTICS_VERSION, RunSpec


def save_weights(path: Path, model: VisionTransformer, facts: Mapping[str, Any]) -> None:
    """The model's weights as safetensors, with `facts` as JSON in the header."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # One header key: the format does not keep the order of several, and equal weights shall make equal files.
    write_atomically(path, save(tensors, metadata={"diffvit": json.dumps(dict(facts), sort_keys=True)}))


# What may stand in a header's protocol. The bounds keep what is computed of a model before its weights are looked at small.
_SIDE = whole(1, 2**14)
_PROTOCOL = record(
    {
        "classes": whole(1, 2**20), "channels": whole(1, 64), "image_size": _SIDE, "images": list_of(whole(1), 3, 3),
        "patch_size": _SIDE, "d_model": _SIDE, "heads": _SIDE, "depths": dict_of(text(NAME), whole(1, 1000), 100),
        "lr": real(0, 1e9), "warmup_steps": whole(), "batch_size": whole(1), "epochs": whole(1),
    },
    {
        "mlp_ratio": whole(1, 64), "dropout": real(0, 0.99), "weight_decay": real(0, 1e9), "clip_norm": maybe(real(0, 1e9)),
        "max_steps": maybe(whole(1)), "label_noise": real(0, 0.99), "input_noise": real(0, 1), "residual_scale": one_of(True, False),
    },
)  # fmt: skip
_FACTS = record(
    {
        "run_id": text(NAME), "model": any_of(one_of(*MODELS), text(USER_MODEL)), "size": text(NAME), "dataset": text(NAME),
        "seed": whole(0, 2**63 - 1), "precision": one_of(*PRECISIONS), "protocol": _PROTOCOL, "fingerprint": text(),
        "classes": list_of(text(), 1, 2**20),
        "mean": list_of(real(-1e6, 1e6), 1, 64), "std": list_of(real(1e-12, 1e6), 1, 64),
    },
    {"source": SOURCE},
)  # fmt: skip


def read_header(path: Path) -> dict[str, Any]:
    """The facts in a checkpoint's header. Raises UserError for a file that is missing, damaged or not ours."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}.", "`run.py list` shows the runs there are.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}.", "delete its _result.json and train the run again.") from error
    try:
        facts = parse_json(metadata["diffvit"])
        if wrong := fault(_FACTS, facts):
            raise ValueError(wrong)
        written = {"residual_scale": False, **facts["protocol"]}  # headers that do not say are older than the scaling
        facts["protocol"] = protocol = Protocol(**{**written, "images": tuple(written["images"])})
        lengths = [len(facts[name]) for name in ("classes", "mean", "std")]
        if lengths != [protocol.classes, protocol.channels, protocol.channels]:
            raise ValueError("its classes or channels do not fit its protocol")
        if facts["size"] not in protocol.depths:
            raise KeyError(facts["size"])
        if (facts["model"] in MODELS) == ("source" in facts):
            raise KeyError("source")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} was not written by diffvit, or by a newer version.", "evaluate takes checkpoints that `run.py train` wrote."
        ) from error
    return facts


def load_weights(path: Path, trust: bool = False) -> tuple[VisionTransformer, dict[str, Any]]:
    """The model of a checkpoint, on the CPU in evaluation mode, and its header's facts.

    Nothing of the model's size is allocated before the file is known to have its tensors.

    Args:
        trust: execute an architecture's code that comes with the file, also where the user has not named it on this machine.

    Raises:
        UntrustedError: the file comes with code that may not be executed.
        UserError: it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    from diffvit.vit import build_model

    facts = read_header(path)
    if "source" in facts:
        kept_source(facts["source"], facts["model"], path, trust)
    try:
        with safe_open(path, framework="pt") as file:
            # Each block has tensors of its own: a depth that the file cannot have is not built, not even without memory.
            if facts["protocol"].depths[facts["size"]] > len(file.keys()):
                raise ValueError("it has too few tensors")
            expected = build_model(facts["model"], facts["size"], facts["protocol"], "meta").state_dict()
            if set(file.keys()) != set(expected):
                raise ValueError("its tensors have other names")
            for name, tensor in expected.items():
                part = file.get_slice(name)
                if part.get_shape() != list(tensor.shape) or part.get_dtype() != "F32":
                    raise ValueError(f"{name} is {part.get_dtype()} {part.get_shape()} instead of F32 {list(tensor.shape)}")
        model = build_model(facts["model"], facts["size"], facts["protocol"])
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"{path} does not fit the model its header names: {first_line(error)}.",
            "delete its _result.json and train the run again.",
        ) from error
    model.facts = facts
    return model.eval(), facts


def trust_source(path: Path) -> None:
    """Allow that the code which comes with a checkpoint is executed, if there is any. Raises UserError."""
    facts = read_header(path)
    if "source" in facts:
        kept_source(facts["source"], facts["model"], path, trust=True)


def weight_facts(spec: RunSpec, run_id: str, data: Any) -> dict[str, Any]:
    """The facts in a checkpoint's header: enough to rebuild the model and prepare its input; no time, no machine."""
    return {
        **spec.names(run_id),
        "protocol": dataclasses.asdict(spec.protocol),
        "fingerprint": data.fingerprint,
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "semantics": SEMANTICS_VERSION,
        **({"source": spec.source.content} if spec.source else {}),
    }
