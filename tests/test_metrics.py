"""What runs say to Ray's metrics: every gauge is drawn in Grafana, and a running study exports them."""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.processes import ending, finish, study, wait_until

from diffvit.ledger.log import Step
from diffvit.ledger.spec import RunSpec
from study.cluster import metrics
from study.cluster.metrics import GAUGES, TAGS, RunGauges
from study.placement import Placement

DASHBOARD = json.loads((Path(__file__).resolve().parents[1] / "docs/grafana.json").read_text())
SPEC = RunSpec.of("vit_classic", "small", "digits", seed=3)


def _expressions(node: Any) -> Iterator[str]:
    """All queries of a dashboard."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from _expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from _expressions(value)


def test_the_dashboard_draws_each_gauge_and_nothing_else() -> None:
    drawn = {name for text in _expressions(DASHBOARD["panels"]) for name in re.findall(r"\bray_\w+", text)}
    assert drawn == {f"ray_{name}" for name in GAUGES}
    asked = {name for text in _expressions(DASHBOARD["templating"]) for name in re.findall(r"\bray_\w+", text)}
    assert asked and asked <= drawn


def test_the_dashboard_knows_runs_by_their_tags() -> None:
    text = json.dumps(DASHBOARD)
    named = {tag.strip() for group in re.findall(r"by \(([^)]*)\)", text) for tag in group.split(",")}
    named |= set(re.findall(r"\{\{(\w+)\}\}", text)) | set(re.findall(r"(\w+)=~", text))
    named |= set(re.findall(r"label_values\([^,]+, (\w+)\)", text))
    assert named == set(TAGS)


def test_the_dashboard_can_be_imported_anywhere() -> None:
    variables = [each["name"] for each in DASHBOARD["templating"]["list"]]
    assert variables[0] == "datasource"  # the others ask it
    sources = [panel["datasource"] for panel in DASHBOARD["panels"]]
    sources += [target["datasource"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    sources += [each["datasource"] for each in DASHBOARD["templating"]["list"][1:]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    for name in re.findall(r'=~"\$(\w+)"', " ".join(_expressions(DASHBOARD["panels"]))):
        assert name in variables
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) and "id" not in DASHBOARD  # Grafana gives one itself


class _Gauge:
    """Keeps what is set."""

    kept: dict[str, tuple[float, dict[str, str]]] = {}  # noqa: RUF012

    def __init__(self, name: str):
        self.name = name

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.kept[self.name] = (value, tags)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, dict[str, str]]]:
    monkeypatch.setattr(_Gauge, "kept", {})
    monkeypatch.setattr(metrics, "_gauge", _Gauge)
    return _Gauge.kept


REPORT = {
    **Step(step=3, epoch=1, learning_rate=0.1, train_loss=1.5, val_loss=2.5, val_accuracy=0.5, grad_norm=1.0, seconds=7.0).columns,
    "total_steps": 12,
    "images_per_second": 100.0,
}


def test_a_report_sets_every_gauge(kept) -> None:
    RunGauges(SPEC, "0123456789", 0.5).set(REPORT)
    assert {name: value for name, (value, _) in kept.items()} == {
        "diffvit_train_loss": 1.5,
        "diffvit_val_loss": 2.5,
        "diffvit_images_per_second": 100.0,
        "diffvit_progress_ratio": 0.25,
        "diffvit_cost_dollars": 3.5,
    }
    assert set(kept) == set(GAUGES)
    tags = {"run_id": "0123456789", "model": "vit_classic", "size": "0.1M", "dataset": "digits", "seed": "3"}
    assert all(given == tags for _, given in kept.values()) and set(tags) == set(TAGS)


def test_without_a_price_there_is_no_cost(kept) -> None:
    RunGauges(SPEC, "0123456789", None).set(REPORT)
    assert set(kept) == set(GAUGES) - {"diffvit_cost_dollars"}


def test_a_run_pays_for_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def hourly(**settings: Any) -> float | None:
        rate = Placement(**settings).dollars_per_second
        return None if rate is None else rate * 3600

    assert hourly() is None
    assert hourly(price=2.0, gpus_per_run=1.0) == pytest.approx(2.0)
    assert hourly(price=2.0, gpus_per_run=0.5) == pytest.approx(1.0)
    assert hourly(price=2.0, gpus_per_run=1.0, workers=4) == pytest.approx(8.0)
    monkeypatch.setattr("study.placement.cpus", lambda: 8)
    assert hourly(price=2.0, cpus_per_run=2) == pytest.approx(0.5)


def _exported(session: Path) -> str:
    """What all nodes and the dashboard of a Ray session export, as Prometheus gets it."""
    with contextlib.suppress(OSError, ValueError):
        targets = json.loads((session / "prom_metrics_service_discovery.json").read_text())[0]["targets"]
        texts = []
        for target in targets:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                texts.append(answer.read().decode())
        return "\n".join(texts)
    return ""


@pytest.mark.slow
def test_a_running_study_exports_its_gauges(tmp_path: Path, sessions: Path) -> None:
    process = study(
        tmp_path, "--price", "3600", grid="datasets: [digits]\nmodels: [vit_classic]\nsizes: [small]\noverrides: {epochs: 400}\n",
        dashboard=True, RAY_TMPDIR=str(sessions), RAY_metrics_report_interval_ms="1000",
    )  # fmt: skip
    text = ""

    def all_there() -> bool:
        nonlocal text
        text = _exported(sessions / "ray")
        time.sleep(0.5)
        return all(f"ray_{name}{{" in text for name in GAUGES)

    with ending(process):
        wait_until(all_there, process)
    for name in GAUGES:
        (line,) = (line for line in text.splitlines() if line.startswith(f"ray_{name}{{"))
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        assert {tag: labels[tag] for tag in TAGS if tag != "run_id"} == {
            "model": "vit_classic", "size": "0.1M", "dataset": "digits", "seed": "0"}  # fmt: skip
        assert re.fullmatch("[0-9a-f]{10}", labels["run_id"])
        assert 0 < float(line.rsplit(" ", 1)[1]) < 1e6


@pytest.mark.slow
def test_a_study_says_what_it_cost(tmp_path: Path) -> None:
    grid = "datasets: [digits]\nmodels: [vit_classic]\nsizes: [small]\noverrides: {max_steps: 4}\n"
    said = finish(study(tmp_path, "--price", "3600", grid=grid))
    runs, everything = (float(number) for number in re.findall(r"\$([\d.]+)", said))
    assert "cost: " in said and 0 < runs < everything
