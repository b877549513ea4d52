"""What a study does with the Hugging Face hub beyond storing runs there: collect them, and write the repository's model card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffvit.checks import NAME
from diffvit.errors import DiffvitError, StorageError
from diffvit.hub.client import HubRefusesError
from diffvit.hub.http import status_of
from diffvit.keeping.hub import HubStorage
from diffvit.keeping.runs import fetch_run, remote_result, settle_run
from diffvit.keeping.saving import is_on_hub
from diffvit.keeping.storage import Storage, open_storage
from diffvit.ledger.files import RunFiles, result_paths
from diffvit.ledger.results import read_result, read_results
from diffvit.ledger.spec import RunSpec
from diffvit.repeat import PATIENT, retry
from study.table import all_overrides, cell_key, file_stem, run_table

if TYPE_CHECKING:
    from diffvit.hub.client import Hub, HubFile

_FIGURE = "_scaling_overlay.png"
_LONGEST_CARD = 4 * 1024**2


def send_run(url: str, files: RunFiles, warn: Callable[[str], None], command: str) -> None:
    """Send a finished run to its storage if it is not there, and write the card on the hub. A failure is a warning, no error.

    Args:
        command: how the user would train the run again, which sends it.
    """
    try:
        storage = open_storage(url)
        settle_run(storage, files)
    except StorageError as error:
        warn(f"the run {files.run_id} is finished here, and not in {url}: {error.message}\nhint: send it later with {command}")
        return
    if is_on_hub(url):
        publish(storage, files.checkpoints, warn)


def collect(storage: Storage, specs: Iterable[RunSpec], checkpoints: Path) -> list[str]:
    """Fetch all ended runs of the specs' cells, whoever trained them. Returns the run_ids of those that were not here.

    Raises:
        StorageError: the storage does not answer, or has something that is not a result.
    """
    specs = list(specs)
    cells = {cell_key(spec.identity("")) for spec in specs}
    brought = []
    for model in sorted({spec.model for spec in specs}):
        for name in storage.names(model, "_result.json"):
            files = _files_by_result_name(checkpoints, name)
            if files is None or read_result(files.result) is not None:
                continue
            found = remote_result(storage, files)
            if found is None:
                raise StorageError(f"{name} in {storage.url} is not a result of diffvit.", "remove it there.")
            if cell_key(found[0].identity) in cells and fetch_run(storage, files, found):
                brought.append(files.run_id)
    return brought


def _files_by_result_name(checkpoints: Path, name: str) -> RunFiles | None:
    """The files of a run whose result has this name in a storage."""
    model, _, file = name.partition("/")
    parts = file.removesuffix("_result.json").split("_", 3)
    wrong = len(parts) != 4 or parts[0] != "model" or not all(re.fullmatch(NAME, part) for part in (model, *parts[1:]))
    return None if wrong else RunFiles(checkpoints, model, *parts[1:])


# ------------------------------------------------------------------------------------------------------------ card


def publish(storage: Storage, checkpoints: Path, warn: Callable[[str], None]) -> None:
    """Write the model card of a hub repository from the results that it has, with the figures drawn here if they show all of these.

    A failure is a warning, no error: the next run that ends writes the card.
    """

    def write() -> None:
        assert isinstance(storage, HubStorage)
        _write_card(storage, storage.hub.head(), checkpoints)
        storage.tidy()

    try:
        retry(write, PATIENT[:-1], _may_pass)
    except Exception as error:
        reason = error.message if isinstance(error, DiffvitError) else f"{type(error).__name__}."
        warn(f"the model card was not written: {reason} The next command with this storage writes it.")


def _may_pass(error: Exception) -> bool:
    """Whether a retry may help: the hub failed transiently, or another commit came between."""
    return status_of(error) in (409, 412) or (isinstance(error, StorageError) and not isinstance(error, HubRefusesError))


def _is_ours(hub: Hub, readme: HubFile, folder: Path, head: str) -> bool:
    """Whether diffvit wrote the repository's card."""
    from study.report.card import MARK

    return readme.size <= _LONGEST_CARD and MARK in hub.bring(readme, folder, head).read_text(encoding="utf-8", errors="replace")


def _write_card(storage: Any, head: str, checkpoints: Path) -> None:
    from study.report.card import card_text

    with tempfile.TemporaryDirectory() as folder:
        results = []
        for name in sorted(storage.hub.files("", head)):
            files = _files_by_result_name(Path(folder), name) if name.endswith("_result.json") else None
            if files and storage.get(name, files.result):
                results.append(files.result)
        if not results:
            return
        readme = storage.hub.files("", head, recursive=False).get("README.md")
        if readme and not _is_ours(storage.hub, readme, Path(folder) / ".readme", head):
            return  # the user's own
        table = run_table(Path(folder))
        contents = read_results(Path(folder))
    ours = {path.name for path in result_paths(checkpoints)}
    # Only figures of runs on the hub, not of trials that were never sent. A grid file's begin with its name.
    stems = {file_stem(run.dataset, overrides) for run, overrides in zip(table.itertuples(), all_overrides(table), strict=True)}
    drawn = sorted((checkpoints / "figures").glob(f"*{_FIGURE}")) if {path.name for path in results} <= ours else []
    figures = [path for path in drawn if any(f"_{path.name}".endswith(f"_{stem}{_FIGURE}") for stem in stems)]
    puts: dict[str, Any] = {f"figures/{path.name}": path for path in figures}
    pictures = {name for name in (*puts, *storage.hub.files("figures", head)) if name.endswith(_FIGURE)}
    text = card_text(storage.hub.repository, table, contents, sorted(Path(name).name for name in pictures))
    storage.hub.commit({**puts, "README.md": text.encode()}, (), "write the model card", parent=head)
