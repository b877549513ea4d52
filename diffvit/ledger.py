"""The ledger: what a run is, what it is called, and the files that say it is done.

A run is a RunSpec. Its run_id is a hash over everything that decides its result and over nothing else, so the same work
has the same id on every machine. Its files lie in checkpoints/{model}/:

    model_{run_id}_{size}_{dataset}.safetensors       the final weights; the header rebuilds the model
    model_{run_id}_{size}_{dataset}_training.log      one line a step
    model_{run_id}_{size}_{dataset}_predictions.csv   one row a test image
    model_{run_id}_{size}_{dataset}_result.json       written last, and atomically: where it is, the run has ended
    model_{run_id}_{size}_{dataset}_evaluations.json  what `run.py evaluate` found out later, by kind

A run ends "done", or "diverged" where a loss or gradient was not a number: then there are only a log and a result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from glob import escape as glob_escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from diffvit.checks import (
    HEX,
    NAME,
    any_of,
    dict_of,
    fault,
    list_of,
    maybe,
    one_of,
    parse_json,
    read_json,
    real,
    record,
    text,
    whole,
)
from diffvit.errors import StorageError, UserError, shown, unknown_name
from diffvit.protocol import MODELS, Protocol, protocol_of, resolve_dataset, resolve_model, resolve_size

if TYPE_CHECKING:
    from diffvit.vit import VisionTransformer

# Raise it when a change in the code changes what a run computes: old results then count as other work.
SEMANTICS_VERSION = 3

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class RunSpec:
    """One training run. Build it with RunSpec.of, which checks and resolves names.

    Attributes:
        precision: "fp32", or "bf16" for autocast to bfloat16.
        overrides: protocol values that replace the data set's own.
    """

    model: str
    size: str
    dataset: str
    seed: int = 0
    precision: str = "fp32"
    overrides: Mapping[str, Any] = field(default_factory=dict)

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
        protocol_of(dataset).with_overrides(given)
        return RunSpec(resolve_model(model), resolve_size(size, dataset), dataset, seed, precision, given)

    @property
    def protocol(self) -> Protocol:
        """The data set's protocol with this run's overrides."""
        return protocol_of(self.dataset).with_overrides(self.overrides)

    @property
    def title(self) -> str:
        """For a person: model, size, data set, seed, overrides."""
        return f"{self.model} {self.size} {self.dataset} seed {self.seed} {overrides_text(self.overrides)}".rstrip()

    def names(self, run_id: str) -> dict[str, Any]:
        """What the run is called, as files say it."""
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
        }

    def run_id(self, fingerprint: str) -> str:
        """Ten hexadecimal digits."""
        return _run_id(self.identity(fingerprint))


def overrides_text(overrides: Mapping[str, Any]) -> str:
    """Overrides as tables and titles write them: "epochs=5 lr=0.001"."""
    return " ".join(f"{name}={value}" for name, value in overrides.items())


def _run_id(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class RunFiles:
    """Where a run's files lie."""

    checkpoints: Path
    model: str
    run_id: str
    size: str
    dataset: str

    @property
    def stem(self) -> str:
        return f"model_{self.run_id}_{self.size}_{self.dataset}"

    def _path(self, suffix: str) -> Path:
        return self.folder / (self.stem + suffix)

    @property
    def folder(self) -> Path:
        return self.checkpoints / self.model

    @property
    def weights(self) -> Path:
        return self._path(".safetensors")

    @property
    def log(self) -> Path:
        return self._path("_training.log")

    @property
    def predictions(self) -> Path:
        return self._path("_predictions.csv")

    @property
    def evaluations(self) -> Path:
        return self._path("_evaluations.json")

    @property
    def result(self) -> Path:
        return self._path("_result.json")

    @staticmethod
    def of(checkpoints: Path, spec: RunSpec, run_id: str) -> RunFiles:
        return RunFiles(Path(checkpoints), spec.model, run_id, spec.size, spec.dataset)


def files_of_weights(path: Path) -> RunFiles:
    """The files of the run whose checkpoint this is. Raises UserError for a file that is not named as one."""
    parts = path.name.removesuffix(".safetensors").split("_", 3)
    if path.suffix != ".safetensors" or len(parts) != 4 or parts[0] != "model":
        raise UserError(f"{path} is not named as a checkpoint is.", "its name is model_{run_id}_{size}_{dataset}.safetensors.")
    return RunFiles(path.parent.parent, path.parent.name, *parts[1:])


def check_writable(folder: Path) -> None:
    """Raises UserError where files cannot be made in `folder`, which is created if missing."""
    if error := write_fault(folder):
        raise UserError(
            f"the folder {folder} cannot be written: {error.strerror}.", "choose another one, or change its permissions."
        ) from error


def write_fault(folder: Path) -> OSError | None:
    """Why files cannot be made in `folder`, which is created if missing; None where they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what cannot be read, and a link that leads nowhere, into a UserError by name. What is only missing is for the caller.

    Args:
        path: what is read inside the block; links may also stand in place of the folders that it is in.
    """
    try:
        yield
    except OSError as error:
        if wrong := broken_link(path):
            raise UserError(wrong, MEND_LINK) from None
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise
        raise UserError(f"{path} cannot be read: {error.strerror}.", "change its permissions, or move it elsewhere.") from error


MEND_LINK = "mend or remove the link; if a disk is not mounted, mount it."


def broken_link(path: Path) -> str | None:
    """A sentence where a path, or a folder that it is in, is a link that leads nowhere; None where there is none."""
    for link in (path, *path.parents):
        if os.path.islink(link):
            try:
                os.stat(link)
            except FileNotFoundError:
                return f"{link} is a link to {os.readlink(link)}, which is not there."
            except OSError as error:
                if error.errno == errno.ELOOP:
                    return f"{link} is a link that leads in a circle."
    return None


def listed(folder: Path) -> list[Path]:
    """What is in a folder, in order of name; nothing where there is none. Raises UserError as `readable` does."""
    try:
        with readable(folder):
            return sorted(folder / name for name in os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def lock_file(descriptor: int, folder: Path) -> bool:
    """Takes an open file's kernel lock; False where another process has it. Raises UserError where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"the file system of {folder} has no locks that work ({error.strerror}), without which two processes could train one run.",
            "keep --checkpoints on a local disk and give the shared place as --storage; or mount it with locks (Lustre: -o flock).",
        ) from error
    return True


def check_lockable(folder: Path) -> None:
    """Raises UserError where files in `folder` cannot be locked."""
    with tempfile.TemporaryFile(dir=folder) as file:
        lock_file(file.fileno(), folder)


# What a disk or a file system says when it, and not the program, is at fault.
_FAULTS_OF_DISKS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTCONN,
}


@contextlib.contextmanager
def disk_faults(place: Path) -> Iterator[None]:
    """Turns a full, read-only or failing disk into a StorageError that names the place, and a link that leads nowhere into a UserError."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str) and (wrong := broken_link(Path(error.filename))):
            raise UserError(wrong, MEND_LINK) from None
        if error.errno not in _FAULTS_OF_DISKS:
            raise
        raise StorageError(
            f"{error.filename or place} cannot be written: {error.strerror}.",
            "make room or mend the folder; nothing finished is lost, and the same command carries on.",
        ) from error


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write aside, flush to disk, rename: a reader sees the old file or the whole new one.

    Args:
        content: the bytes, or a function that writes them to the open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_ASIDE, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            flush_to_disk(file.fileno())
        with _unless_unsupported():
            os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    with _unless_unsupported():
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            flush_to_disk(folder)
        finally:
            os.close(folder)


def write_exclusively(path: Path, content: bytes) -> bool:
    """Write a small file that must not exist; False where it does. Of several who try at once, one succeeds."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_ASIDE}")
    write_atomically(aside, content)
    try:
        with _unless_unsupported():
            os.link(aside, path)  # with its content in one step, and unlike a rename only where nothing is
            return True
        with open(path, "xb", buffering=0) as file:  # without hard links: a reader may see it empty for a moment
            file.write(content)
            flush_to_disk(file.fileno())
        return True
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)


def flush_to_disk(descriptor: int) -> None:
    """os.fsync, where the file system has it."""
    with _unless_unsupported():
        os.fsync(descriptor)


# What a call says that a file system (exFAT, SMB, FUSE) does not have.
_UNSUPPORTED = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}


@contextlib.contextmanager
def _unless_unsupported() -> Iterator[None]:
    """Leaves out what the file system does not have; where the files' content is at stake, another call fails."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


_ASIDE = ".aside"


def sweep_asides(folder: Path, stem: str) -> None:
    """Removes what writers of files that begin with `stem` left aside when they were killed. Nobody may be writing them."""
    for aside in folder.glob(f".{glob_escape(stem)}*{_ASIDE}"):
        aside.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------------------------------------------------- weights


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
        "max_steps": maybe(whole(1)), "label_noise": real(0, 0.99), "input_noise": real(0, 1),
    },
)  # fmt: skip
_FACTS = record(
    {
        "run_id": text(NAME), "model": one_of(*MODELS), "size": text(NAME), "dataset": text(NAME), "seed": whole(0, 2**63 - 1),
        "precision": one_of(*PRECISIONS), "protocol": _PROTOCOL, "fingerprint": text(), "classes": list_of(text(), 1, 2**20),
        "mean": list_of(real(-1e6, 1e6), 1, 64), "std": list_of(real(1e-12, 1e6), 1, 64),
    }
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
        facts["protocol"] = protocol = Protocol(**{**facts["protocol"], "images": tuple(facts["protocol"]["images"])})
        lengths = [len(facts[name]) for name in ("classes", "mean", "std")]
        if lengths != [protocol.classes, protocol.channels, protocol.channels]:
            raise ValueError("its classes or channels do not fit its protocol")
        if facts["size"] not in protocol.depths:
            raise KeyError(facts["size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} was not written by diffvit, or by a newer version.", "evaluate takes checkpoints that `run.py train` wrote."
        ) from error
    return facts


def load_weights(path: Path) -> tuple[VisionTransformer, dict[str, Any]]:
    """The model of a checkpoint, on the CPU in evaluation mode, and its header's facts. Raises UserError.

    Nothing of the model's size is allocated before the file is known to have its tensors.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    from diffvit.vit import build_model

    facts = read_header(path)
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
            f"{path} does not fit the model its header names: {str(error).splitlines()[0]}.",
            "delete its _result.json and train the run again.",
        ) from error
    model.facts = facts
    return model.eval(), facts


def weight_facts(spec: RunSpec, run_id: str, data: Any) -> dict[str, Any]:
    """What a checkpoint's header says: enough to rebuild the model and to feed it, and nothing of time or machine."""
    return {
        **spec.names(run_id),
        "protocol": dataclasses.asdict(spec.protocol),
        "fingerprint": data.fingerprint,
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "semantics": SEMANTICS_VERSION,
    }


# ---------------------------------------------------------------------------------------------------------- results


def write_result(files: RunFiles, result: Mapping[str, Any]) -> None:
    """Marks a run as ended: everything else is on disk when this is called."""
    write_atomically(files.result, (json.dumps({**result, "checksum": _checksum(result)}, indent=1) + "\n").encode())


def _checksum(result: Mapping[str, Any]) -> str:
    """SHA-256 over a result's content, its own checksum left out."""
    text = json.dumps({key: value for key, value in result.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# A result is a few kilobytes, findings are below a megabyte.
LONGEST_RESULT = 4 * 1024**2
_LONGEST_EVALUATIONS = 64 * 1024**2

_NAMED = {"model": text(NAME), "size": text(NAME), "dataset": text(NAME)}
_VALUE = any_of(one_of(None, True, False), real(), text())
_IDENTITY = record({**_NAMED, "semantics": whole(), "fingerprint": text(), "protocol": dict_of(text(NAME), _VALUE, 100)})
_LOSS = real(infinite=True)  # a model can be lost between its last step and its test
_SHARE = real(0, 1)

# What tables, figures, the report and messages read of a result, which they trust.
_RESULT = record(
    {
        **_NAMED, "run_id": text(NAME), "seed": whole(0, 2**63 - 1), "status": one_of("done", "diverged"), "identity": _IDENTITY,
        "overrides": dict_of(text(NAME), real(0, 1e9), 100), "versions": dict_of(text(NAME), text(), 100),
        "notes": list_of(text(longest=10_000)), "finished": text(), "test_accuracy": maybe(_SHARE), "sha256": dict_of(text(), text(HEX), 3),
        "parameters": whole(1, 2**50), "steps": whole(1, 2**50), "images": whole(1), "seconds": real(0, 1e12),
        "images_per_second": real(0, 1e12),
    },
    {
        "precision": one_of(*PRECISIONS), "depth": whole(1, 1000), "forward_flops": whole(1), "train_loss": maybe(_LOSS),
        "val_loss_last_batch": maybe(_LOSS), "val_loss": maybe(_LOSS), "val_accuracy": maybe(_SHARE), "test_loss": maybe(_LOSS),
        "test_images": maybe(whole(1, 10**8)), "false_labels": maybe(whole()), "memorised": maybe(_SHARE), "recovered": maybe(_SHARE),
        "device": text(), "device_name": text(), "threads": whole(), "workers": whole(), "micro_batch": whole(), "attention": text(),
        **dict.fromkeys(("fused", "graphs", "compiled", "recompute", "deterministic"), one_of(True, False)),
        "git_commit": maybe(text()), "started": text(),
        "diverged": record({"step": whole(), "message": text(longest=10_000)}),
    },
)  # fmt: skip
_MEASURED = ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_images")


def read_result(path: Path) -> dict[str, Any] | None:
    """A result file's content, or None where it is missing. What it has is of the types and within the bounds of _RESULT.

    Its names are plain ones, and those of its files are the run's own: they can be used as paths.

    Raises:
        UserError: it is damaged or cannot be read, or is a link that leads nowhere.
    """
    try:
        with readable(path):
            result = read_json(path, LONGEST_RESULT)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.", "delete it, and the same command trains the run again.") from error
    if isinstance(result, dict):
        result.setdefault("status", "done")  # results of versions that knew no other end
    if wrong := fault(_RESULT, result) or _disagreement(result):
        raise UserError(f"{path} is not a result of diffvit: {wrong}.", "move it out of the checkpoints folder.")
    return result


def _disagreement(result: Mapping[str, Any]) -> str | None:
    """What does not go together in a result whose values are each as they should be."""
    files = files_of_result(Path(), result)
    for name in ("model", "size", "dataset"):
        if result[name] != result["identity"][name]:
            return f"it has another {name} in its identity"
    if not set(result["sha256"]) <= {files.weights.name, files.log.name, files.predictions.name}:
        return "it names files that are not its own"
    if result["status"] == "done" and any(result.get(name) is None for name in _MEASURED):
        return "it is done and was not measured"
    return None


def files_of_result(checkpoints: Path, result: Mapping[str, Any]) -> RunFiles:
    """The files of the run whose result this is."""
    return RunFiles(checkpoints, result["model"], result["run_id"], result["size"], result["dataset"])


def read_evaluations(files: RunFiles) -> dict[str, Any]:
    """What was found out about a finished run later: kind ("corruptions", "attention") -> findings. Empty where there is nothing.

    Raises:
        UserError: the file is damaged.
    """
    try:
        content = read_json(files.evaluations, _LONGEST_EVALUATIONS)
        if content["checksum"] != _checksum(content):
            raise ValueError("it was changed after it was written")
        from diffvit.evaluation import check_findings

        return check_findings(content["findings"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{files.evaluations} is damaged: {error}.", "delete it and evaluate again.") from error


def add_evaluation(files: RunFiles, kind: str, findings: Mapping[str, Any]) -> None:
    """Keep findings about a finished run, in place of older ones of their kind."""
    content = {"run_id": files.run_id, "findings": {**read_evaluations(files), kind: dict(findings)}}
    write_atomically(files.evaluations, (json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n").encode())


def result_paths(checkpoints: Path) -> list[Path]:
    """The result files under a checkpoints folder, in order of path. Raises UserError for a folder that cannot be read."""
    return [path for folder in model_folders(checkpoints) for path in listed(folder) if path.match("model_*_result.json")]


def model_folders(checkpoints: Path) -> list[Path]:
    """What may hold an architecture's runs in a checkpoints folder: no lost+found. Raises UserError for a folder that cannot be read."""
    return [folder for folder in listed(Path(checkpoints)) if re.fullmatch(NAME, folder.name)]


def read_results(checkpoints: Path) -> list[dict[str, Any]]:
    """All ended runs under a checkpoints folder, in order of path. Raises UserError for a damaged one, or one under another's name."""
    results = []
    for path in result_paths(checkpoints):
        if (result := read_result(path)) is not None:
            if files_of_result(Path(checkpoints), result).result != path:
                raise UserError(f"{path} has the result of another run.", "move it out of the checkpoints folder.")
            results.append(result)
    return results


def verify_run(path: Path) -> list[str]:
    """Re-reads all files of an ended run and returns what is wrong with them, a sentence each.

    Checked are the result's own checksum, the SHA-256 of every file, the run_id against what it is a hash of, the weights' header and
    shapes against the result, and the steps in the log.

    Args:
        path: the run's result file.
    """
    try:
        result = read_result(path)
    except UserError as error:
        return [error.message]
    if result is None:
        return [f"{path} is gone."]
    files = files_of_result(path.parent.parent, result)
    wrong = []
    if files.result != path:
        wrong.append(f"{path} has the result of another run, {files.result.name}.")
    if result.get("checksum") != _checksum(result):
        wrong.append(f"{path} was changed after it was written.")
    if result["run_id"] != _run_id(result["identity"]):
        wrong.append(f"{path} has a run_id that does not belong to its identity.")
    for name, expected in result["sha256"].items():
        file = path.parent / name
        if not file.is_file():
            wrong.append(f"{file} is missing.")
        elif file_sha256(file) != expected:
            wrong.append(f"{file} was changed after it was written.")
    try:
        read_evaluations(files)
    except UserError as error:
        wrong.append(error.message)
    if not wrong:
        wrong += [*_verify_log(files, result), *(_verify_weights(files, result) if result["status"] == "done" else [])]
    return wrong


def _verify_log(files: RunFiles, result: Mapping[str, Any]) -> list[str]:
    from diffvit.log import read_rows

    try:
        read_rows(files.log, result["steps"])
    except UserError as error:
        return [error.message]
    return []


def _verify_weights(files: RunFiles, result: Mapping[str, Any]) -> list[str]:
    try:
        model, facts = load_weights(files.weights)
    except UserError as error:
        return [error.message]
    wrong = [key for key in ("run_id", "model", "size", "dataset", "seed", "precision") if facts[key] != result[key]]
    if facts["fingerprint"] != result["identity"]["fingerprint"]:
        wrong.append("fingerprint")
    if model.count_parameters() != result["parameters"]:
        wrong.append("parameters")
    return [f"{files.weights} and the result differ in {', '.join(wrong)}."] if wrong else []
