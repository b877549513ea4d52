"""The command line's help: headings, examples that are valid commands, summaries that fit 80 columns; and --json, the same everywhere."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import click
import pytest

import run as command_line
from diffvit.ledger.results import read_result
from study.commands.command import COMMAND_HEADINGS, OPTION_HEADINGS
from study.report import analysis

COMMANDS = command_line.cli.commands


def test_the_list_of_commands_is_not_cut_at_80_columns(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli("--help").out.splitlines()
    for name, command in COMMANDS.items():
        summary = command.help.split("\n\n")[0]
        assert f"  {name} " in "\n".join(lines) and any(line.endswith(f" {summary}") and len(line) <= 80 for line in lines), name
    assert [line[:-1] for line in lines if line[:-1] in COMMAND_HEADINGS] == list(COMMAND_HEADINGS)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_stand_under_headings_and_examples_are_valid(name: str, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command, text = COMMANDS[name], cli(name, "--help").out
    headings = [line[:-1] for line in text.splitlines() if line[:-1] in OPTION_HEADINGS]
    assert headings == [heading for heading in OPTION_HEADINGS if heading in headings]  # each once, in their order
    assert all(
        line.startswith("-")
        for line in re.findall(r"^  (\S.*)$", text.partition("\n\nExamples:")[0].partition("Options:")[2], re.MULTILINE)
    )
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.heading != "Options" or option.name == "force", option.name
            assert f"  {option.opts[0]}" in text, option.name  # a heading that is not in the list would drop it
    assert len(command.examples) == 2 and text.count("\n  uv run run.py ") == 2
    for line, what in command.examples:
        words = shlex.split(line.partition(" >")[0])
        assert words[0] == name and what.endswith(".")
        command.make_context(name, words[1:], parent=click.Context(command_line.cli))


def test_json_goes_to_stdout_or_beside_the_text_into_a_file(cli) -> None:
    train = ("train", "--model", "classic", "--size", "small", "--dataset", "digits", "--max_steps", "2", "--device", "cpu")
    text, printed = cli(*train, "--json", "run.json").out, json.loads(cli(*train, "--json").out)
    written = json.loads(Path("run.json").read_text())
    assert written == printed and "accuracy" in text and "weights" in text
    slow = dataclasses.replace(read_result(Path(printed["files"]["result"])), images_per_second=0.14)
    assert " s, 0.14 images/s, " in slow.lines()[2]
    assert printed["overrides"] == {"max_steps": 2} and Path(printed["files"]["weights"]).is_file()

    Path("one.yaml").write_text("datasets: [digits]\nmodels: [vit_classic]\nsizes: [small]\noverrides: {max_steps: 2, label_noise: 0.2}")
    assert cli("study", "--grid", "one.yaml", "--dry_run", "--json").code == 2
    [listed, to_do] = json.loads(cli("list", "--json").out) + json.loads(cli("list", "--grid", "one.yaml", "--json", "-").out)
    assert listed["overrides"] == {"max_steps": 2} and to_do["overrides"] == {"max_steps": 2, "label_noise": 0.2}
    assert "0 of 1 runs done" in cli("list", "--grid", "one.yaml", "--json", "list.json").out
    assert json.loads(Path("list.json").read_text()) == [to_do]
    refused = cli("list", "--json", "nowhere/list.json")
    assert refused.code == 2 and "a folder that is there" in refused.err


def test_study_and_report_say_their_verdict_in_json(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, count_looks = [], analysis.count_looks
    monkeypatch.setattr(analysis, "count_looks", lambda answers, *rest: looks.append(answers) or count_looks(answers, *rest))
    for model in ("classic", "differential"):
        cli("train", "--model", model, "--size", "small", "--dataset", "digits", "--max_steps", "2", "--device", "cpu")
    Path("two.yaml").write_text("datasets: [digits]\nsizes: [small]\noverrides: {max_steps: 2}")
    study = json.loads(cli("study", "--grid", "two.yaml", "--address", "local", "--json").out)  # nothing to train, so no Ray
    assert [(run["model"], run["overrides"]) for run in study["runs"]] == [
        (f"vit_{arm}", {"max_steps": 2}) for arm in ("classic", "differential")
    ]
    assert study["grid"] == "two" and not study["missing"]
    report = json.loads(cli("report", "--grid", "two.yaml", "--json").out)
    assert report["files"][0] == "checkpoints/two_report/report.html" and report["verdict"] == study["verdict"]
    assert len(looks) == 2  # each analyses once
    [level] = [answer for answer in report["verdict"] if answer["question"] == "level"]
    assert level["verdict"] == "no interval" and level["interval"] is None and level["sentence"].startswith("On digits")
    errors = {run["model"]: 1 - run["test_accuracy"] for run in study["runs"]}
    assert level["change"] == pytest.approx(errors["vit_differential"] / errors["vit_classic"] - 1, abs=0.02)


def test_an_interrupted_command_says_how_to_run_it_again(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("study.cluster.connect.find_cluster", interrupted)
    outcome = cli("study", "--rehearse")
    assert outcome.code == 130 and outcome.err.splitlines()[-2].startswith("interrupted")
    assert outcome.err.splitlines()[-1].startswith("hint: to run it again: ") and outcome.err.endswith("run.py study --rehearse\n")


def test_a_list_is_sorted_by_size_whatever_is_done(cli) -> None:
    cli("train", "--model", "classic", "--size", "large", "--dataset", "digits", "--max_steps", "2", "--device", "cpu")
    Path("all.yaml").write_text("datasets: [digits]\nmodels: [vit_classic]\noverrides: {max_steps: 2}")
    listed = cli("list", "--grid", "all.yaml").out.splitlines()
    assert listed[2].split()[:2] == ["to", "do"] and "1 of 3 runs done, 2 to do" in listed[-1]
    assert [row["size"] for row in json.loads(cli("list", "--grid", "all.yaml", "--json").out)] == ["0.1M", "0.2M", "0.4M"]
