"""A trained run on the hub: sent as it ends or later, shown by a card, loaded by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hub.server import HubServer

from diffvit import from_pretrained
from diffvit.errors import UserError
from diffvit.keeping.hub import STATE_BRANCH

NAME = "user/study"
SIZE = ("--size", "0.1M", "--dataset", "digits")
TRAIN = ("train", "--model", "vit_differential", *SIZE, "--epochs", "1", "--device", "cpu")


@pytest.fixture
def account(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    monkeypatch.setenv("HF_REPOSITORY", NAME)
    monkeypatch.setattr("diffvit.keeping.hub._PAUSES", (0.01,))
    monkeypatch.setattr("diffvit.keeping.keeper.PATIENT", (0.01, 0.01))
    return hub


def ledger() -> dict[str, bytes]:
    folder = Path("checkpoints")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/model_*")}


def on_hub(hub: HubServer) -> dict[str, bytes]:
    return {name: content for name, content in hub.repo(NAME).files().items() if "/model_" in name}


def test_a_run_goes_up_as_it_ends_and_is_loaded_by_name(account: HubServer, cli) -> None:
    outcome = cli(*TRAIN, "--upload", "true")
    assert outcome.code == 0, outcome.err
    assert on_hub(account) == ledger() and len(ledger()) == 4
    assert not [name for name in account.repo(NAME).files(STATE_BRANCH) if name.startswith(".state")]
    assert all("hf_write" not in content.decode(errors="ignore") for content in account.repo(NAME).files().values())
    assert "hf_write" not in outcome.err + outcome.out
    model = from_pretrained(NAME, model="vit_differential", size="0.1M", dataset="digits")
    assert not model.training and model.facts["dataset"] == "digits" and len(model.facts["classes"]) == 10
    from safetensors.torch import load

    weights = load(next(content for name, content in ledger().items() if name.endswith(".safetensors")))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    card = account.repo(NAME).files()["README.md"].decode()
    header = yaml.safe_load(card.split("---\n")[1])
    result = json.loads(next(content for name, content in ledger().items() if name.endswith("_result.json")))
    (entry,) = header["model-index"]
    assert result["run_id"] in entry["name"] and entry["results"][0]["dataset"]["name"] == "digits"
    assert entry["results"][0]["metrics"][0]["value"] == result["test_accuracy"]
    assert header["pipeline_tag"] == "image-classification"
    assert "from_pretrained" in card and f"{100 * result['test_accuracy']:.2f} %" in card and "Differential ViT" in card


@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"lose": True}, {"cut_request": 50}, {"hang": 0.05}, {"status": 429, "headers": {"Retry-After": "0"}}],
    ids=str,
)
def test_a_fault_at_the_end_of_a_run_is_tried_again(account: HubServer, cli, fault: dict) -> None:
    account.faults.add("POST", "commit/main", times=1, **fault)
    outcome = cli(*TRAIN, "--upload", "true")
    assert outcome.code == 0 and "not in" not in outcome.err
    assert on_hub(account) == ledger()


@pytest.mark.parametrize("times", [3, None])
def test_a_card_that_the_hub_does_not_take_is_tried_again(
    account: HubServer, cli, monkeypatch: pytest.MonkeyPatch, times: int | None
) -> None:
    monkeypatch.setattr("study.hub.PATIENT", (0.01, 0.01, 0.01))
    account.faults.add("POST", "commit/main", after=1, times=times, status=500)  # after the run itself
    outcome = cli(*TRAIN, "--upload", "true")
    assert outcome.code == 0 and on_hub(account) == ledger()
    assert ("README.md" in account.repo(NAME).files()) == (times is not None)
    assert ("the model card was not written" in outcome.err) == (times is None)


def test_a_hub_that_fails_never_fails_a_finished_run(account: HubServer, cli) -> None:
    account.faults.add("POST", "commit/main", status=503)
    outcome = cli(*TRAIN, "--upload", "true")
    assert outcome.code == 0 and "test loss" in outcome.out
    assert "is finished here, and not in hf://user/study" in outcome.err and "run.py train" in outcome.err
    assert len(ledger()) == 4 and not on_hub(account)
    account.faults.clear()
    assert cli("upload", "checkpoints", ".").code == 0
    assert on_hub(account) == ledger()


def test_the_same_command_sends_what_could_not_be_sent(account: HubServer, cli) -> None:
    account.faults.add("POST", "commit/main", status=500)
    cli(*TRAIN, "--upload", "true")
    account.faults.clear()
    again = cli(*TRAIN, "--upload", "true")
    assert again.code == 0 and "done already" in again.err
    assert on_hub(account) == ledger() and "README.md" in account.repo(NAME).files()


def test_a_token_that_expires_meanwhile_costs_no_work(account: HubServer, cli) -> None:
    account.faults.add("POST", "commit/main", status=401)
    outcome = cli(*TRAIN, "--upload", "true")
    assert outcome.code == 0 and len(ledger()) == 4 and "run.py train" in outcome.err


def test_a_wrong_token_is_found_out_before_training(account: HubServer, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    outcome = cli(*TRAIN, "--upload", "true")
    assert outcome.code == 2 and "error: the hub does not let us in" in outcome.err and "hint: check HF_TOKEN" in outcome.err
    assert "hf_unknown" not in outcome.err and not ledger()


def test_which_of_several_runs_is_loaded(account: HubServer, cli) -> None:
    for more in (("--seed", "1"), (), ("--max_steps", "30")):
        assert cli(*TRAIN, *more, "--upload", "true").code == 0
    names = {"model": "vit_differential", "size": "0.1M", "dataset": "digits"}
    seeds = {
        run_id: facts["seed"]
        for run_id, facts in (
            (path.name.split("_")[1], json.loads(path.read_text())) for path in Path("checkpoints").glob("*/*_result.json")
        )
    }
    assert from_pretrained(NAME, **names, seed=1).facts["seed"] == 1
    # Both runs of seed 0 have overrides, and none is the plain one.
    with pytest.raises(UserError, match="not one of them alone has seed 0") as several:
        from_pretrained(NAME, **names)
    assert all(run_id in several.value.hint for run_id in seeds)
    for run_id in seeds:
        assert from_pretrained(f"https://huggingface.co/{NAME}", **names, run_id=run_id).facts["run_id"] == run_id
    with pytest.raises(UserError, match="no run 0123456789"):
        from_pretrained(NAME, **names, run_id="0123456789")
    with pytest.raises(UserError, match="has no vit_classic"):
        from_pretrained(NAME, **{**names, "model": "vit_classic"})
    with pytest.raises(UserError, match="did you mean"):
        from_pretrained(NAME, **{**names, "model": "vit_diferential"})
    with pytest.raises(UserError, match="no repository user/nothing"):
        from_pretrained("user/nothing", **names)


def test_loading_executes_nothing(account: HubServer, cli) -> None:
    cli(*TRAIN, "--upload", "true")
    repo = account.repo(NAME)
    name = next(name for name in on_hub(account) if name.endswith(".safetensors"))
    evil = b"import os\nos.system('touch executed')\n"
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, ("touch executed",)

    for content in (pickle.dumps(Evil()), evil, b"", b"\xff" * 100, (2**62).to_bytes(8, "little") + b"{}"):
        repo.commit({name: content})
        with pytest.raises(UserError, match="damaged"):
            from_pretrained(NAME, model="vit_differential", size="0.1M", dataset="digits")
    assert not Path("executed").exists()


def test_a_damaged_cache_is_brought_again(account: HubServer, cli) -> None:
    cli(*TRAIN, "--upload", "true")
    names = {"model": "vit_differential", "size": "0.1M", "dataset": "digits"}
    first = from_pretrained(NAME, **names)
    from huggingface_hub import constants

    cached = next(path for path in Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    content = bytearray(cached.read_bytes())
    content[-1] ^= 1
    cached.resolve().write_bytes(content)
    again = from_pretrained(NAME, **names)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.slow
def test_a_rehearsal_tries_the_hub_too_and_leaves_nothing(account: HubServer, cli) -> None:
    Path("grid.yaml").write_text("datasets: [digits]\nsizes: [small]\nmodels: [vit_classic]\n")
    outcome = cli("study", "--grid", "grid.yaml", "--rehearse", "--upload", "true", "--address", "local")
    assert outcome.code == 0, outcome.err
    assert "stored and brought back" in outcome.out
    for branch in ("main", STATE_BRANCH):
        assert set(account.repo(NAME).files(branch)) <= {".gitattributes"}


def test_a_card_that_somebody_wrote_is_left_alone(account: HubServer, cli) -> None:
    account.create(NAME).commit({"README.md": b"# Mine\n"})
    assert cli(*TRAIN, "--upload", "true").code == 0
    assert account.repo(NAME).files()["README.md"] == b"# Mine\n" and on_hub(account) == ledger()


def test_a_finished_run_without_its_weights_is_told_of(account: HubServer, cli) -> None:
    account.create(NAME)
    cli(*TRAIN)
    next(Path("checkpoints").glob("*/*.safetensors")).unlink()
    outcome = cli(*TRAIN, "--upload", "true")
    assert outcome.code == 0 and "is missing" in outcome.err and not on_hub(account)


def test_a_rate_limit_at_the_end_does_not_hold_the_run_up(account: HubServer, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("diffvit.repeat.time", SimpleNamespace(sleep=slept.append))
    account.faults.add("POST", "commit/main", status=429, headers={"Retry-After": "3600"})
    outcome = cli(*TRAIN, "--upload", "true")
    assert outcome.code == 0 and "is finished here" in outcome.err
    assert slept and sum(slept) < 120
