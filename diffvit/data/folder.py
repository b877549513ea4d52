"""Image folders: one folder a class, as torchvision's ImageFolder has them, perhaps below one folder a split.

Hidden files and folders, and files beside the class folders, are not looked at. All else in a class folder is an image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from diffvit.errors import UserError

_HIDDEN = "."
# In lower case, where the names themselves are not those of splits.
_LIKE_SPLITS = ("train", "training", "test", "testing", "validation", "val", "valid", "eval")


def split_folders(root: Path, known: Sequence[str], named: bool) -> list[str]:
    """The folders that are splits, or none where `root` has class folders itself.

    Args:
        known: what splits may be called.
        named: the user has named them, so all folders may be splits.

    Raises:
        UserError: there is no such folder, or it has splits and other folders.
    """
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}.",
            "check folder: in the grid file, which is read from where that file lies; with classes: and images: in it, as each run's log "
            "notes them, plans and reports need no data.",
        )
    names = _subfolders(root)
    if named:
        return names
    if not {"train", "test"} & set(names):
        if len(alike := [name for name in names if name.lower() in _LIKE_SPLITS]) > 1:
            raise UserError(
                f"{root} has the folders {', '.join(alike)}, which look like splits and would be classes.",
                "name the splits with splits: {train: …, test: …}.",
            )
        return []
    if strange := [name for name in names if name not in known]:
        raise UserError(
            f"{root} has the folders of splits and also {', '.join(strange[:5])}.",
            "move what is no split elsewhere, name the splits with splits: {train: …, test: …}, or rename a class that is called like one.",
        )
    return names


def class_folders(root: Path) -> tuple[list[str], list[int], list[Path], str]:
    """Class names in order, each image's label and file, and a key that changes with names, sizes and times of the files.

    Raises:
        UserError: no class folders, a class without images, or a folder that cannot be read.
    """
    names = _subfolders(root)
    if not names:
        raise UserError(f"{root} has no folders.", "an image folder has one folder a class, with its images.")
    labels: list[int] = []
    files: list[Path] = []
    digest = hashlib.sha256()
    for label, name in enumerate(names):
        images = _files_below(root / name)
        if not images:
            raise UserError(f"the class folder {_shown(root / name)} has no images.", "remove it, or put its images there.")
        for file in images:
            facts = file.stat()
            digest.update(os.fsencode(file.relative_to(root)) + f"\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
        labels += [label] * len(images)
        files += images
    return names, labels, files, digest.hexdigest()


def read_file(path: Path) -> tuple[bytes, str]:
    """A file's content, and what messages call it. Raises UserError."""
    try:
        return path.read_bytes(), _shown(path)
    except OSError as error:
        raise UserError(f"{_shown(path)} cannot be read: {error.strerror}.", "mend it, or remove it.") from error


def _subfolders(root: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(_HIDDEN))
    except OSError as error:
        raise _unreadable(error) from error


def _files_below(root: Path) -> list[Path]:
    """All files below a folder, in order of path; links to files are followed."""

    def stop(error: OSError) -> None:
        raise _unreadable(error) from error

    files = []
    for folder, below, names in os.walk(root, onerror=stop):
        below[:] = sorted(name for name in below if not name.startswith(_HIDDEN))
        for name in below:
            if (path := Path(folder, name)).is_symlink():
                raise UserError(
                    f"{_shown(path)} is a link to a folder.", "put the images themselves, or links to them, in the class folder."
                )
        paths = (Path(folder, name) for name in sorted(names) if not name.startswith(_HIDDEN))
        for path in paths:
            if not path.is_file():
                raise UserError(f"{_shown(path)} is no file, or a link to nothing.", "remove it.")
            files.append(path)
    return sorted(files)


def _unreadable(error: OSError) -> UserError:
    return UserError(f"{_shown(error.filename)} cannot be read: {error.strerror}.", "check its permissions.")


def _shown(path: Path | str) -> str:
    return os.fsencode(path).decode("utf-8", "replace")
