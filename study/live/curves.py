"""Curves of runs on a local page of TensorBoard, drawn from their training logs."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from diffvit.errors import UserError, first_line
from diffvit.ledger.log import LogRows
from diffvit.ledger.spec import RunSpec
from diffvit.tracking import NO_TRACKING, TrackedRun, Tracker, open_tracker


def check_page() -> None:
    """Raises UserError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--web needs the package tensorboard, which is not installed.", "install it with: uv sync --extra tensorboard")


class Curves:
    """Draws what is new in the logs of runs.

    Args:
        folder: where the page's files are.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._drawn: dict[str, tuple[TrackedRun, Tracker, int]] = {}

    def draw(self, spec: RunSpec, run_id: str, rows: LogRows) -> None:
        """Draw the steps of a run's log that are not drawn yet; steps that it has lost since go."""
        last = rows.last
        run, tracker, drawn = self._drawn.get(run_id, (None, None, 0))
        if run is None or tracker is None or last < drawn:
            if tracker:
                tracker.finish({})
            drawn = min(last, drawn)
            run = TrackedRun.of(spec, run_id, self._folder, drawn, NO_TRACKING)
            tracker = open_tracker("tensorboard", run)
        tracker.log([(step.step, run.numbers(step)) for step in rows.after(drawn)])
        self._drawn[run_id] = run, tracker, last


@contextlib.contextmanager
def served(say: Callable[[str], None]) -> Iterator[Curves]:
    """Curves and a page that shows them, on this machine only, while the block runs.

    Args:
        say: called with the page's address.

    Raises:
        UserError: there is no free port.
    """
    from tensorboard import default, program

    with tempfile.TemporaryDirectory(prefix="diffvit-watch-") as folder:
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        server = program.TensorBoard(default.get_plugins())
        logs = str(Path(folder) / "tracking" / "tensorboard")
        server.configure(argv=["", "--logdir", logs, "--host", "127.0.0.1", "--reload_interval", "5", "--load_fast", "false"])
        try:
            say(f"curves   {server.launch()}")
        except program.TensorBoardServerException as error:
            raise UserError(f"the page could not be served: {first_line(error)}", "stop what has the ports 6006 to 6015.") from error
        yield Curves(Path(folder))
