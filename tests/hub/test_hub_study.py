"""A study on several boxes that share a repository and nothing else."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest
from faults.processes import assert_same_ledgers, ending, finish, kill_all, run_py, states, study, wait_until, weights
from hub.server import HubServer

from diffvit.keeping.hub import STATE_BRANCH

NAME = "user/study"
# Two models in two sizes, which do not cost the same.
GRID = "datasets: [digits]\nsizes: [small, medium]\noverrides: {epochs: 1}\n"
ON_HUB = ("--upload", "true")


@pytest.fixture
def account(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    monkeypatch.setenv("HF_REPOSITORY", NAME)
    return hub


def box(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder


def table(folder: Path) -> pd.DataFrame:
    columns = [
        "run_id", "status", "model", "size", "dataset", "seed", "overrides", "parameters", "steps", "train_loss", "val_loss", "test_loss", "test_accuracy",
    ]  # fmt: skip
    return pd.read_csv(folder / "checkpoints/grid_runs.csv")[columns]


def under_way(hub: HubServer) -> list[str]:
    """The files of runs under way; none while the repository or its branch has not been made."""
    if NAME not in hub.names() or STATE_BRANCH not in hub.repo(NAME).branches:
        return []
    return [name for name in hub.repo(NAME).files(STATE_BRANCH) if name.startswith(".state")]


@pytest.mark.slow
def test_three_boxes_give_the_table_of_one(tmp_path: Path, account: HubServer) -> None:
    alone = box(tmp_path, "alone")
    finish(study(alone, grid=GRID))
    boxes = [box(tmp_path, f"box{number}") for number in (1, 2, 3)]
    # The hub has its faults meanwhile.
    account.faults.add("POST", "commit", status=503, every=5)
    account.faults.add("GET", "resolve", status=500, every=7)
    account.faults.add("POST", "commit/main", lose=True, every=4)
    account.faults.add("GET", "resolve", cut=50, every=9)
    done = []
    for number, folder in enumerate(boxes, start=1):
        said = finish(study(folder, "--shard", f"{number}/3", *ON_HUB, grid=GRID))
        assert "hf_write" not in said
        done += re.findall(rf"shard {number}/3: (\d) of 4 runs of the grid are done here", said)
    assert len(done) == 3 and sum(map(int, done)) == 4 and "0" not in done
    ran = [{path.name for path in folder.glob("checkpoints/*/*_result.json")} for folder in boxes]
    assert not ran[0] & ran[1] and not ran[1] & ran[2] and not ran[0] & ran[2]
    assert not under_way(account)
    account.faults.clear()
    # A fourth, which trained nothing, collects.
    fourth = box(tmp_path, "fourth")
    (fourth / "grid.yaml").write_text(GRID)
    assert "fetched 4 runs" in finish(run_py(fourth, "study", "--grid", "grid.yaml", "--collect", *ON_HUB))
    assert_same_ledgers(fourth, alone)
    pd.testing.assert_frame_equal(table(fourth), table(alone), check_exact=True)
    assert finish(run_py(fourth, "list", "--verify")).strip().startswith("4 of 4 ended runs are whole")
    assert {path.name for path in (fourth / "checkpoints/figures").iterdir()} == {
        path.name for path in (alone / "checkpoints/figures").iterdir()
    }
    card = account.repo(NAME).files()["README.md"].decode()
    assert all(run_id in card for run_id in table(alone)["run_id"]) and "figures/grid_digits_epochs-1_scaling_overlay.png" in card
    assert "figures/grid_digits_epochs-1_scaling_overlay.png" in account.repo(NAME).files()


@pytest.mark.slow
def test_a_box_that_dies_strands_nothing(tmp_path: Path, account: HubServer) -> None:
    grid = "datasets: [digits]\nsizes: [small]\noverrides: {epochs: 12}\nseeds: 2\n"
    alone, first, second = (box(tmp_path, name) for name in ("alone", "first", "second"))
    finish(study(alone, grid=grid))
    quick = ("--save_every", "0.3s", "--sync_every", "0.5s", "--lease", "6s", *ON_HUB)
    dying = study(first, "--shard", "1/2", *quick, grid=grid)
    with ending(dying):
        wait_until(lambda: [name for name in under_way(account) if name.endswith(".state")], dying)
        kill_all(dying)
    said = finish(study(second, "--shard", "2/2", *quick, grid=grid))
    assert "2 runs were left undone by other boxes; taking them over" in said and "4 of 4 runs of the grid are done here" in said
    assert_same_ledgers(second, alone)
    logs = "".join(path.read_text() for path in second.glob("checkpoints/*/*.log"))
    assert logs.count("# resumed after step") >= 1
    assert not [name for name in under_way(account) if "/shard-" not in name]


@pytest.mark.slow
def test_a_hub_that_goes_down_costs_no_run(tmp_path: Path, account: HubServer) -> None:
    grid = "datasets: [digits]\nsizes: [small]\noverrides: {epochs: 4}\n"
    only, other = box(tmp_path, "only"), box(tmp_path, "other")
    one_at_a_time = ("--cpus_per_run", str(os.cpu_count() or 1), "--save_every", "0.2s", "--lease", "6s", *ON_HUB)
    process = study(only, *one_at_a_time, grid=grid)
    with ending(process):
        wait_until(lambda: states(only), process)
        account.stop()
        first = {path.parent for path in states(only)}
        wait_until(lambda: {path.parent for path in states(only)} - first, process)  # the second run has begun without the hub
        assert len(weights(only)) == 1
        account.start()
        said = finish(process)
    assert len(weights(only)) == 2 and "not on the hub yet" not in said and "hf_write" not in said
    (other / "grid.yaml").write_text(grid)
    assert "fetched 2 runs" in finish(run_py(other, "study", "--grid", "grid.yaml", "--collect", *ON_HUB))
    assert_same_ledgers(other, only)
    assert not under_way(account)


@pytest.mark.slow
def test_collecting_names_what_is_not_there_and_writes_nothing_of_a_hostile_result(tmp_path: Path, account: HubServer) -> None:
    grid = "datasets: [digits]\nsizes: [small]\noverrides: {epochs: 1}\n"
    first, last, victim = (box(tmp_path, name) for name in ("first", "last", "victim"))
    finish(study(first, "--shard", "1/2", *ON_HUB, grid=grid))

    def collect(folder: Path) -> tuple[str, str]:
        (folder / "grid.yaml").write_text(grid)
        process = run_py(folder, "study", "--grid", "grid.yaml", "--collect", *ON_HUB)
        with ending(process):
            out, errors = process.communicate(timeout=200)
        assert process.returncode == 1 and "Traceback" not in errors
        return out, errors

    out, errors = collect(last)
    assert "1 of 2 runs are still missing" in errors and "hint: " in errors and len(out.splitlines()) >= 2
    assert len(list(last.glob("checkpoints/*/*_result.json"))) == 1 and not states(last)

    repo = account.repo(NAME)
    name = next(name for name in repo.files() if name.endswith("_result.json"))
    result = json.loads(repo.files()[name])
    repo.commit({name: json.dumps({**result, "sha256": {"../../evil": "0" * 64}}).encode()})
    before = {path for path in tmp_path.rglob("*")}
    assert "is not a result of diffvit" in collect(victim)[1]
    assert [path.name for path in set(tmp_path.rglob("*")) - before if path.is_file()] == ["grid.yaml"]
