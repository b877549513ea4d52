"""Upload to and download from the Hugging Face hub, and trained models from there.

    hub = Hub(find_account())                   credentials from the environment or from .env
    upload(Path("checkpoints"), "", hub)        what the hub does not have yet
    download("vit_classic", Path("here"), hub)  what is not here yet
    from_pretrained("user/repo", model="vit_classic", size="10B", dataset="CIFAR-100")

Nothing different is overwritten unasked.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffvit.checks import parse_json
from diffvit.errors import StorageError, UserError, shown
from diffvit.hub.account import Account, find_token, parse_repository
from diffvit.hub.client import MOST_FILES, Hub, HubFile, is_safe_name
from diffvit.hub.http import is_missing, quiet_client
from diffvit.ledger.disk import listed, readable
from diffvit.ledger.results import LONGEST_RESULT
from diffvit.ledger.weights import load_weights
from diffvit.protocol import known_dataset, ledger_model, resolve_size

if TYPE_CHECKING:
    from diffvit.vit import VisionTransformer

# The most files and bytes of a commit, so that an interrupted upload keeps what was sent.
_COMMIT_FILES = 50
_COMMIT_BYTES = 2 * 1024**3
_HIDDEN = "."


@dataclass(frozen=True)
class Transfer:
    """The outcome of an upload or download: names on the hub, in order.

    Attributes:
        left: what was left out, and why: ".state (hidden)".
    """

    moved: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes: int
    left: tuple[str, ...] = ()


# Called with the bytes done, the bytes in all, and the file under way.
OnProgress = Callable[[int, int, str], None]


def upload(local: Path, hub_folder: str, hub: Hub, force: bool = False, on_progress: OnProgress | None = None) -> Transfer:
    """Upload a file, or a folder's content without hidden files, into a folder of the repository, which is created if missing.

    Links are followed: what they lead to is sent under the link's name.

    Args:
        hub_folder: "" or "." for the repository's top.
        force: replace files that are different there.

    Raises:
        UserError: there is nothing to send, something cannot be sent, or something different is there already; then nothing is sent.
        StorageError: the hub failed; what it has is not sent again.
    """
    folder = _hub_path(hub_folder)
    sources, left = _files_to_send(local, folder)
    hub.ensure()
    before = hub.files(folder)
    same = {name for name, path in sources.items() if name in before and before[name].is_like(path)}
    different = [name for name in sources if name in before and name not in same]
    if different and not force:
        raise UserError(f"{_some(different)} on {hub.repository} is different.", "--force replaces it; or choose another folder.")
    sizes = {name: path.stat().st_size for name, path in sources.items() if name not in same}
    done, total = 0, sum(sizes.values())
    for batch in _batches(sizes):
        if on_progress:
            on_progress(done, total, batch[0])
        hub.commit({name: sources[name] for name in batch}, (), f"upload {_some(batch)}")
        done += sum(sizes[name] for name in batch)
    if sizes:
        after = hub.files(folder)
        wrong = [name for name in sizes if name not in after or not after[name].is_like(sources[name])]
        if wrong:
            raise StorageError(f"{_some(wrong)} did not arrive as sent.", "send it again; if it changed meanwhile, wait until it does not.")
        if on_progress:
            on_progress(total, total, "")
    return Transfer(tuple(sizes), tuple(sorted(same)), total, tuple(left))


def download(hub_path: str, local: Path, hub: Hub, force: bool = False, on_progress: OnProgress | None = None) -> Transfer:
    """Download a file, or a folder's content, to a local folder.

    Args:
        hub_path: "" or "." for the whole repository.
        force: replace files that are different here.

    Raises:
        UserError: there is no such file, or something different is here already; then nothing is brought.
        StorageError: the hub failed; the same call continues where it stopped.
    """
    wanted = _hub_path(hub_path)
    try:
        commit = hub.head()
    except Exception as error:
        if is_missing(error):
            raise UserError(f"there is no repository {hub.repository} that this token can see.", "check HF_REPOSITORY.") from None
        raise
    files = hub.files(wanted, commit)
    inside = wanted
    if not files and wanted:  # a file, perhaps
        inside = wanted.rpartition("/")[0]
        files = {name: file for name, file in hub.files(inside, commit, recursive=False).items() if name == wanted}
    if not files:
        raise UserError(f"{hub.repository} has no {wanted or 'files'}.", _top_of(hub, commit))
    targets = {name: local / name.removeprefix(inside).lstrip("/") for name in files}
    same = {name for name, path in targets.items() if files[name].is_like(path)}
    in_the_way = [path for target in targets.values() for path in _in_the_way(target, local)]
    if in_the_way:
        raise UserError(f"{in_the_way[0]} is in the way.", "remove it, or choose another folder.")
    different = [str(path) for name, path in targets.items() if name not in same and (path.exists() or path.is_symlink())]
    if different and not force:
        raise UserError(f"{_some(different)} is different here.", "--force replaces it; or choose another folder.")
    missing = [name for name in files if name not in same]
    done, total = 0, sum(files[name].size for name in missing)
    local.mkdir(parents=True, exist_ok=True)
    _check_room({targets[name]: files[name].size for name in missing})
    for name in missing:
        if on_progress:
            on_progress(done, total, name)
        targets[name].parent.mkdir(parents=True, exist_ok=True)
        path = hub.bring(files[name], targets[name].parent / _STAGE, commit)
        os.replace(path, targets[name])
        done += files[name].size
    for folder in {target.parent for target in targets.values()}:
        shutil.rmtree(folder / _STAGE, ignore_errors=True)
    if on_progress and missing:
        on_progress(total, total, "")
    return Transfer(tuple(missing), tuple(sorted(same)), total)


# Downloads are staged beside their targets, since a folder may be a link to another disk.
_STAGE = ".diffvit-download"


def _check_room(sizes: Mapping[Path, int]) -> None:
    """Raise UserError where a disk has less room than the files that go there take."""
    disks: dict[int, tuple[Path, int]] = {}
    for path, size in sizes.items():
        folder = next(each for each in path.parents if each.is_dir())
        first, before = disks.get(folder.stat().st_dev, (folder, 0))
        disks[folder.stat().st_dev] = first, before + size
    for folder, size in disks.values():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise UserError(f"the download takes {size:,} bytes, and {folder} has {free:,} left.", "make room.")


def _in_the_way(target: Path, local: Path) -> list[Path]:
    """Folders in place of files that would be written, and files in place of folders."""
    folders = [folder for folder in target.parents if folder == local or local in folder.parents]
    return [*([target] if target.is_dir() else []), *(each for each in folders if os.path.lexists(each) and not each.is_dir())]


def _hub_path(text: str) -> str:
    path = text.strip().strip("/")
    if path in ("", "."):
        return ""
    path = path.removeprefix("./")
    if not is_safe_name(path):
        raise UserError(f"{shown(text)} is not a path in a repository.", "give a path such as vit_classic, or . for the top.")
    return path


def _files_to_send(local: Path, folder: str) -> tuple[dict[str, Path], list[str]]:
    """Name on the hub -> file, and what is left out with the reason. Raises UserError for what cannot be sent, by name."""
    if not os.path.lexists(local):
        raise UserError(f"there is no file or folder {local}.", "give one that is there.")
    if local.name.startswith(_HIDDEN) and not local.is_dir():
        raise UserError(f"{local} is hidden.", "what is hidden is not sent: it may hold secrets; copy it under another name.")
    left: list[str] = []
    inside = f"{folder}/" if folder else ""
    facts = _facts(local)
    sources = {}
    for name, path in _files_below(local, inside, facts, (), left) if stat.S_ISDIR(facts.st_mode) else [(inside + local.name, local)]:
        sources[_sendable(name, path)] = path
        if len(sources) > MOST_FILES:
            raise UserError(f"{local} has more than {MOST_FILES} files.", "send a folder with fewer.")
    if not sources:
        raise UserError(f"{local} has no files.", f"this is not sent: {', '.join(left)}." if left else "what is hidden is not sent.")
    return sources, left


def _files_below(folder: Path, inside: str, facts: os.stat_result, above: tuple[Any, ...], left: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield name on the hub and path of each file in a folder, links followed; what is left out is appended to `left`."""
    if any(os.path.samestat(facts, each) for each in above):
        raise UserError(f"{folder} is a link to a folder that it is in itself.", "remove the link.")
    entries = listed(folder)
    if above and not entries:
        left.append(f"{folder} (empty)")
    for path in entries:
        if path.name.startswith(_HIDDEN):
            left.append(f"{path} (hidden)")
            continue
        facts_below = _facts(path)
        if stat.S_ISDIR(facts_below.st_mode):
            yield from _files_below(path, f"{_sendable(inside + path.name, path)}/", facts_below, (*above, facts), left)
        else:
            yield inside + path.name, path


def _facts(path: Path) -> os.stat_result:
    """The stat of a folder or a readable file. Raises UserError for all else."""
    with readable(path):
        facts = path.stat()
        if not stat.S_ISDIR(facts.st_mode):
            if not stat.S_ISREG(facts.st_mode):
                raise UserError(f"{path} is a pipe, a socket or a device.", "only files can be sent; move it out of the folder.")
            with open(path, "rb"):
                pass
    return facts


def _sendable(name: str, path: Path) -> str:
    """The name, if every system can keep it. Raises UserError."""
    if not is_safe_name(name):
        raise UserError(f"{shown(path.name)} in {path.parent} has a name that not every system can keep.", "rename it.")
    return name


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    for name in sizes:
        if batch and (len(batch) >= _COMMIT_FILES or sum(sizes[each] for each in batch) + sizes[name] > _COMMIT_BYTES):
            yield batch
            batch = []
        batch.append(name)
    if batch:
        yield batch


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _top_of(hub: Hub, commit: str) -> str:
    names = sorted({name.partition("/")[0] for name in hub.files("", commit)})
    return f"it has {', '.join(names[:10])}{', …' if len(names) > 10 else ''}." if names else "it is empty."


def from_pretrained(
    repository: str, *, model: str, size: str, dataset: str, seed: int = 0, run_id: str | None = None, revision: str = "main",
    trust: bool = False,
) -> VisionTransformer:  # fmt: skip
    """A trained model from the hub, on the CPU in evaluation mode; nothing in its file is executed, unless you say so.

    Args:
        repository: `user/name` or its link. HF_TOKEN is used where it is set.
        model: a built-in architecture's name, or that of one's own: its folder's, or FILE.py:CLASS.
        seed, run_id: which run, where the repository has several of the cell; run_id goes before seed. Of several, one without overrides.
        trust: execute an architecture's code that comes with the weights, also where it was never named on this machine.

    Returns:
        The model. Its attribute `facts` has what its file's header says: "classes", "mean" and "std" of the pixels in 0-1, "protocol", …

    Raises:
        UserError: unknown names, no such model there, or a damaged file.
    """
    model = ledger_model(model)
    if known := known_dataset(dataset):  # else one that a grid file defined, of which the checkpoint knows enough
        dataset, size = known, resolve_size(size, known)
    hub = Hub(Account(parse_repository(repository), find_token()))
    try:
        commit = hub.head(revision)
    except Exception as error:
        if is_missing(error):
            raise UserError(
                f"there is no repository {hub.repository} that we can see.", "check its name; a private one needs HF_TOKEN."
            ) from None
        raise
    listed = hub.files(model, commit)
    pattern = re.compile(rf"{re.escape(model)}/model_([0-9a-f]+)_{re.escape(size)}_{re.escape(dataset)}\.safetensors")
    runs = {match[1]: file for file in listed.values() if (match := pattern.fullmatch(file.name))}
    chosen = _choose_run(hub, commit, runs, listed, seed, run_id, f"{model} {size} {dataset}")
    file = runs[chosen]
    with quiet_client():
        path = Path(hub.call(lambda: hub.api.hf_hub_download(hub.repository, file.name, revision=commit)))
    if file.is_like(path):
        return load_weights(path, trust)[0]
    with tempfile.TemporaryDirectory() as folder:  # the client's cache is damaged
        return load_weights(hub.bring(file, Path(folder), commit), trust)[0]


def _choose_run(
    hub: Hub, commit: str, runs: Mapping[str, HubFile], listed: Mapping[str, HubFile], seed: int, run_id: str | None, cell: str
) -> str:
    if run_id is not None:
        if run_id not in runs:
            raise UserError(f"{hub.repository} has no run {run_id} of {cell}.", f"it has {', '.join(runs) or 'none'}.")
        return run_id
    if not runs:
        raise UserError(f"{hub.repository} has no {cell}.", "its page lists the models it has.")
    if len(runs) == 1:
        return next(iter(runs))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for each, file in runs.items():
            result = listed.get(file.name.removesuffix(".safetensors") + "_result.json")
            if result and result.size <= LONGEST_RESULT:
                try:
                    content = parse_json(hub.bring(result, Path(folder), commit).read_bytes())
                    results[each] = (content["seed"], bool(content["overrides"]))
                except (ValueError, KeyError, TypeError):
                    continue
    fitting = [each for each, (of, _) in results.items() if of == seed]
    plain = [each for each in fitting if not results[each][1]]
    best = plain if len(plain) == 1 else fitting
    if len(best) != 1:
        raise UserError(
            f"{hub.repository} has {len(runs)} runs of {cell}, and not one of them alone has seed {seed}.",
            f"give run_id: {', '.join(runs)}.",
        )
    return best[0]
