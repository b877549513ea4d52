"""The documents' commands: all are valid, and all are run here but those that a document marks as needing a GPU, the hub, a storage or a cluster."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import reference

import run as command_line

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = r"a GPU|the hub|a storage|a cluster|data of your own"


class Said(NamedTuple):
    """A command line of run.py in a document, and what it needs, as the document says: at its line, or for its page."""

    document: str
    words: list[str]
    needs: str


def said() -> list[Said]:
    commands = []
    for path in DOCUMENTS:
        text = path.read_text()
        of_page = re.search(rf"^\*Commands on this page need ({NEEDS})\b.*\*$", text, re.MULTILINE)
        for line in text.splitlines():
            if line.startswith("    ") and (match := re.match(r"    (?:uv run |python3? )?run\.py (.*?)(?:\s+#(.*))?$", line)):
                lines, comment = [match[1]], match[2] or ""
            elif line.startswith("|"):
                lines, comment = re.findall(r"`(?:uv run )?run\.py ([^`]*)`", line), line.rsplit("|", 2)[1]
            else:
                continue
            need = re.search(rf"\(({NEEDS})\)|^ *({NEEDS}) *$", comment) or of_page
            commands += [Said(path.name, shlex.split(each.partition(" >")[0]), need[0] if need else "") for each in lines]
    return [each for each in commands if "…" not in " ".join(each.words)]


def test_the_reference_is_what_the_code_says() -> None:
    assert reference.PATH.read_text(encoding="utf-8") == reference.reference(), "stale: run `python -m tests.reference`"


@pytest.mark.parametrize("document", [path.name for path in DOCUMENTS])
def test_every_command_of_a_document_is_valid(document: str) -> None:
    for each in said():
        if each.document == document:
            command = command_line.cli.commands[each.words[0]]
            command.make_context(each.words[0], list(each.words[1:]), parent=click.Context(command_line.cli))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_its_heading(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text()):
        path = document.parent / target if target else document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "reference.md"], ids=lambda path: path.name)
def test_prose_is_wrapped_at_120(path: Path) -> None:
    """Tables, commands and the generated reference aside."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "    "))]


def test_commands_are_found_in_the_documents() -> None:
    of = {name: [each for each in said() if each.document == name] for name in ("README.md", "first-study.md", "hub.md")}
    assert len(of["README.md"]) > 25 and len(of["first-study.md"]) > 8
    assert all(each.needs for each in of["hub.md"]) and sum(bool(each.needs) for each in of["README.md"]) > 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_documents_run(cli) -> None:
    """In their order, with one epoch and 16 test images; studies that would take minutes even so are listed and not trained."""
    shutil.copytree(ROOT / "docs/examples", "docs/examples")
    Path("FILE.yaml").write_text("datasets: [digits]\nsizes: [small]\nmodels: [vit_differential]")
    done = set()
    for document, words, needs in said():
        if needs or document == "reference.md" or tuple(words) in done:
            continue
        done.add(tuple(words))
        given = [word for word in words if word != "--dry_run"]
        if "--epochs" in given:
            given[given.index("--epochs") + 1] = "1"
        elif any("--epochs" in param.opts for param in command_line.cli.commands[words[0]].params) and words[0] != "list":
            given += ["--epochs", "1"]
        if words[0] == "evaluate":
            given += ["--limit", "16"]
        if words[0] == "study" and ("--dry_run" in words or {"noise", "lr", "controls", "choices"} & set(words)):
            given = [*given, "--dry_run"]
        outcome = cli(*given, *(["--yes"] if words[0] == "study" else []))
        assert outcome.code == 0, f"{document}: {' '.join(given)}: {outcome.err}"
    assert len(done) > 25 and Path("checkpoints/report_epochs-1/report.html").is_file()
