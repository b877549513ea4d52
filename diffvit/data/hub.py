"""Data sets of the Hugging Face hub, from a folder or through its client, and why one cannot be loaded.

The only file that uses internals of `datasets`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffvit.errors import UserError
from diffvit.hub.http import offline_client
from diffvit.ledger.disk import write_fault


def load_hub(
    name: str, data_root: Path | None, image: str, label: str,
    splits: Callable[[Sequence[str]], Sequence[str]] = lambda _: ("train", "test"), config: str | None = None, mend: str | None = None,
) -> Any:  # fmt: skip
    """Load splits of a hub data set, from the data root if one is given, with their images still encoded. Raises UserError.

    Args:
        image, label: the columns that must be there.
        splits: which are wanted of those that there are.
        config: which of several configurations of the data set.
        mend: what the user can do about a column that is missing or another one; by default, bring it into the schema of `name`.
    """
    import datasets

    path = name
    if data_root is not None:
        path = str(data_root / name)
        if not Path(path).is_dir():
            raise UserError(f"there is no data set folder {path}.", f"put {name} there, or leave out --data_root to load it from the hub.")
    datasets.disable_progress_bars()
    unreachable = None if data_root else _why_unreachable(name)
    try:
        with _client_kept_quiet(offline=unreachable is not None):
            parts = datasets.load_dataset(path, config)
    except Exception as error:  # the client's errors are of many kinds: network, Parquet, schema
        raise _loading_failed(name, path, error, unreachable) from error
    wanted, mend = splits(list(parts)), mend or f"it must be in the schema of {name}."
    for split in wanted:
        if split not in parts or not {image, label} <= set(parts[split].column_names):
            contents = f"columns {', '.join(sorted(parts[split].column_names))}" if split in parts else f"splits {', '.join(sorted(parts))}"
            columns = ", ".join(sorted((image, label)))
            raise UserError(f"{path} has no split {split!r} with columns {columns}: it has {contents}.", mend)
    try:
        return {split: parts[split].cast_column(image, datasets.Image(decode=False)) for split in wanted}
    except Exception as error:  # Arrow's, of several kinds
        kind = str(parts[wanted[0]].features[image])[:100]
        raise UserError(f"the column {image} of {path} holds no encoded images but {kind}.", mend) from error


def is_cached(name: str) -> bool:
    """Whether the hub's client has unpacked a data set here, so that it loads without the hub."""
    import datasets

    return any((Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).glob("*"))


_PATIENCE = 5.0  # seconds for the hub's first answer


def _why_unreachable(name: str) -> str | None:
    """Ask the hub for a data set, once. Returns why it does not answer, or None if it does, be it with an error."""
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=_PATIENCE)
        except Exception as error:  # of the client, and of the library below it, which changes with its version
            answer.append(None if getattr(error, "response", None) is not None else first_sentence(error))
        else:
            answer.append(None)

    # In a thread: the client bounds neither the DNS lookup nor the number of addresses that it tries.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return answer[0] if answer else f"no answer within {_PATIENCE:g} s"


@contextlib.contextmanager
def _client_kept_quiet(offline: bool) -> Iterator[None]:
    """Keep the log lines of the hub's clients off stderr inside the block; offline, let them use their caches only."""
    import datasets

    loggers = [logging.getLogger(library) for library in ("datasets", "huggingface_hub")]
    levels, before = [logger.level for logger in loggers], datasets.config.HF_HUB_OFFLINE
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # what fails is raised too
    try:
        with offline_client() if offline else contextlib.nullcontext():
            datasets.config.HF_HUB_OFFLINE = offline or before
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _loading_failed(name: str, path: str, error: BaseException, unreachable: str | None) -> UserError:
    """The error for a data set that cannot be loaded, with what the user can do about it."""
    import datasets

    from diffvit.data.images import is_lfs_pointer, lfs_pointer

    kept = Path(datasets.config.HF_DATASETS_CACHE)
    if fault := write_fault(kept):
        return UserError(
            f"the Hugging Face cache {kept}, which {name} is unpacked into, cannot be written: {fault.strerror}.",
            "set HF_HOME to a folder that can be written and has room.",
        )
    cause: BaseException | None = error
    while cause is not None:  # a full disk, or another user's files, which are locked for reading too
        if isinstance(cause, OSError) and (cause.errno == errno.ENOSPC or str(cause.filename).startswith(f"{kept}{os.sep}")):
            return UserError(
                f"{name} cannot be unpacked into the Hugging Face cache {kept}: {cause.strerror}.",
                "set HF_HOME to a folder of your own with room.",
            )
        cause = cause.__cause__ or cause.__context__
    if unreachable is not None:
        return UserError(
            f"{name} is not on this machine, and the Hugging Face hub cannot be reached: {unreachable}.",
            "check the connection, the proxy and HF_HUB_OFFLINE, or give a local copy with --data_root.",
        )
    for file in sorted(Path(path).rglob("*")) if Path(path).is_dir() else ():
        with contextlib.suppress(OSError), open(file, "rb") as opened:
            if is_lfs_pointer(opened.read(100)):
                return lfs_pointer(str(file))
    if configs := re.search(r"(?:configs|Available): \[(.*?)\]", str(error)):
        return UserError(f"{name} has the configurations {configs[1]}.", "name one of them with config: in its entry of the grid file.")
    return UserError(f"{name} cannot be loaded from {path}: {first_sentence(error)}.", "download it again.")


MOST_CLASSES = 2**20


def labels_of(
    part: Any, column: str, classes: int = 0, mend: str = "download the data set again."
) -> tuple[np.ndarray, list[str] | None]:  # fmt: skip
    """A column of labels as int64, and the classes' names; None for numbers without names. Raises UserError.

    Args:
        classes: the number of classes, MOST_CLASSES where it is unknown; 0: the labels must have names.
        mend: what the user can do about labels that are none.
    """
    values, names = part.with_format("arrow")[:][column], getattr(part.features[column], "names", None)
    if values.null_count:
        raise UserError(f"{values.null_count} of {len(values)} labels in the column {column} are missing.", mend)
    numbers = values.to_numpy()
    if numbers.dtype.kind == "O" and all(isinstance(value, str) for value in numbers):
        texts, numbers = np.unique(numbers.astype(str), return_inverse=True)
        names = texts.tolist()
    if names is None and not classes:
        raise UserError(
            f"the labels in the column {column} have no names, and nothing says which is which class.",
            "give the names as text, or write the Parquet with the `datasets` library, which keeps them.",
        )
    classes = classes if names is None else len(names)
    if numbers.dtype.kind not in "iuf" or not ((numbers >= 0) & (numbers < classes) & (numbers == np.floor(numbers))).all():
        bounds = f"from 0 to {classes - 1}" if classes < MOST_CLASSES else "of at least 0"
        raise UserError(f"the labels in the column {column} are not whole numbers {bounds} or names of classes.", mend)
    return numbers.astype(np.int64), names


def fingerprint(part: Any) -> str:
    """The hash by which `datasets` knows a split's contents."""
    return part._fingerprint


def image_fields(part: Any, column: str, field: str) -> Any:
    """The field "bytes" or "path" of all images, as a chunked Arrow column: one array might not hold them all."""
    import pyarrow.compute

    return pyarrow.compute.struct_field(part.with_format("arrow")[:][column], field)


def decoded(part: Any, column: str, rows: np.ndarray) -> Iterator[Any]:
    """The images of these rows as RGB images of Pillow. Raises UserError, which names the file."""
    from diffvit.data.images import decode_rgb

    return (decode_rgb(content, file) for content, file in encoded(part, column, rows))


def encoded(part: Any, column: str, rows: np.ndarray) -> Iterator[tuple[bytes, str]]:
    """The images of these rows as they are stored, and what messages call each. Raises UserError, which names the file."""
    contents, paths = (image_fields(part, column, field) for field in ("bytes", "path"))
    for row in map(int, rows):
        content, path = contents[row].as_py(), paths[row].as_py()
        file = path or f"the image in row {row} of the {part.split} split"
        if content is None:
            try:
                content = Path(path or "").read_bytes()
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror}.", "download the data again.") from error
        yield content, file


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error or of its cause."""
    root = error.__cause__ or error
    text = " ".join(str(root).split()) or type(root).__name__
    return text.split(". ")[0].rstrip(".")[:200]
