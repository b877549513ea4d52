"""The notebook for lent GPUs is one, and its commands, like those of its page, are options that there are."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import run as command_line

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOK = json.loads((DOCS / "free_gpus.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
PAGE = (DOCS / "free-gpus.md").read_text()


def test_the_notebook_is_valid() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5) and isinstance(NOTEBOOK["metadata"], dict)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"]) == 4
    for cell in NOTEBOOK["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"]) and isinstance(cell["metadata"], dict)
        assert cell["source"] and all(isinstance(line, str) for line in cell["source"])
        own = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        assert cell["cell_type"] in ("code", "markdown")
        assert {name: value for name, value in cell.items() if name not in ("cell_type", "id", "metadata", "source")} == own
    for source in CODE:  # without what IPython adds to Python
        compile("\n".join(line for line in source.splitlines() if not line.startswith(("!", "%"))), "cell", "exec")


def _commands(text: str) -> list[str]:
    return re.findall(r"run\.py ([^`#\n]+)", text.replace("$(nvidia-smi --list-gpus | wc -l)", "2"))


def test_three_cells_install_train_and_report() -> None:
    install, study, report = map(_commands, CODE)
    assert [words[0].split()[0] for words in (install, study, report)] == ["plan", "study", "study"]
    assert "--upload true" in study[0] and "--collect" in report[0] and report[1].startswith("report ")
    assert "checkpoints/report/report.html" in CODE[-1]


@pytest.mark.parametrize("command", [each for text in (*CODE, PAGE) for each in _commands(text)])
def test_its_commands_are_commands(command: str) -> None:
    name, *arguments = shlex.split(command)
    command_line.cli.commands[name].make_context(name, arguments)
