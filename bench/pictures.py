"""Draws the documents' pictures anew, from a study of three seeds on digits: the README's figure and the first screen of its report.

    python -m bench.pictures                        trains what the folder has not: 36 runs, five to six minutes on two CPU cores
    python -m bench.pictures --checkpoints DIR      the same from another checkpoints folder

The report's picture needs Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
FIGURE, PAGE = "digits_scaling_overlay.png", "digits_report.png"
# Of the page that a picture shows, in pixels.
WIDTH, HEIGHT = 1100, 1000


def command(*arguments: str) -> None:
    """Run one of run.py's commands on the built-in study."""
    subprocess.run([sys.executable, "run.py", arguments[0], "--grid", "digits", *arguments[1:]], cwd=ROOT, check=True)


@click.command(help=__doc__)
@click.option("--checkpoints", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "checkpoints", show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "docs", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
def main(checkpoints: Path, out: Path, seeds: int) -> None:
    """Train, draw, report, and copy the pictures."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise click.ClickException("there is no Chromium. hint: apt-get install chromium")
    ledger, out = ("--checkpoints", str(checkpoints.resolve())), out.resolve()
    command("study", *ledger, "--seeds", str(seeds), "--yes", "--dashboard", "false")
    with tempfile.TemporaryDirectory() as folder:
        command("plot", *ledger, "--out", folder)
        shutil.copy(Path(folder) / FIGURE, out / FIGURE)
        command("report", *ledger, "--out", folder)
        page = (Path(folder) / "report.html").as_uri()
        shot = [f"--screenshot={out / PAGE}", f"--window-size={WIDTH},{HEIGHT}", "--hide-scrollbars"]
        subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", *shot, page], check=True, capture_output=True)
    click.echo(f"{out / FIGURE}\n{out / PAGE}")


if __name__ == "__main__":
    main()
