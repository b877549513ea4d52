"""Architectures in files of the user's own: what is named, what travels, what is executed, and what is refused."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffvit import user_models
from diffvit.errors import UserError
from diffvit.ledger.disk import file_sha256
from diffvit.ledger.results import read_results
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.verify import verify_run
from diffvit.ledger.weights import load_weights
from diffvit.train import train
from diffvit.user_models import ModelSource, UntrustedError, read_source
from diffvit.vit import build_model
from study.grid import Grid, find_grid

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs/examples/sigmoid_attention.py"

MINE = """
from diffvit.vit_classic import Attention
import parts, parts.inner
from parts.inner import FACTOR as factor


class Mine(Attention):
    def heads_output(self, x_BND, queries=None):
        from helper import double
        return parts.one() * factor * double(super().heads_output(x_BND, queries))
"""


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing was named yet."""
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(user_models, "_known", {})


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """An architecture of several files: a module, and a package whose modules import each other and the module."""
    folder = tmp_path / "ideas"
    (folder / "parts").mkdir(parents=True)
    (folder / "mine.py").write_text(MINE)
    (folder / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    (folder / "parts/__init__.py").write_text("from .inner import one\n")
    (folder / "parts/inner.py").write_text("import helper as h\nFACTOR = h.double(0.25)\ndef one():\n    return 1.0\n")
    (folder / "unrelated.py").write_text("raise ValueError\n")
    return folder / "mine.py"


def _spec(path: Path, name: str = "Mine", **more) -> RunSpec:
    return RunSpec.of(f"{path}:{name}", "0.1M", "digits", **more)


def _logits(spec: RunSpec) -> torch.Tensor:
    model = build_model(spec.model, spec.size, spec.protocol).eval()
    model.initialise(spec.seed)
    return model(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_what_an_architecture_is_made_of(mine: Path) -> None:
    spec = _spec(mine)
    assert spec.source and list(spec.source.files) == ["mine.py", "helper.py", "parts/__init__.py", "parts/inner.py"]
    assert spec.model == spec.source.name == f"Mine-{spec.source.sha256[:8]}"
    # 1 x 0.5 x 2: it computes what the classic layer does, from the same initial values.
    assert torch.equal(_logits(spec), _logits(RunSpec.of("vit_classic", "0.1M", "digits")))
    assert not {"helper", "parts"} & set(sys.modules)


@pytest.mark.parametrize("changed", ["mine.py", "helper.py", "parts/inner.py", "parts/__init__.py"])
def test_every_file_is_in_the_identity(mine: Path, changed: str) -> None:
    before = _spec(mine)
    moved = mine.rename(mine.with_name("renamed.py")) if changed == "parts/inner.py" else mine
    assert _spec(moved).run_id("f") == before.run_id("f")
    file = moved.parent / changed if changed != mine.name else moved
    file.write_text(file.read_text() + "\n")
    after = _spec(moved)
    assert after.model != before.model and after.run_id("f") != before.run_id("f")
    assert _spec(moved).identity("f") == after.identity("f") and "source" not in RunSpec.of("classic", "0.1M", "digits").identity("f")


def test_two_versions_live_in_one_process(mine: Path) -> None:
    first = _spec(mine)
    (mine.parent / "helper.py").write_text("def double(x):\n    return 3 * x\n")
    second = _spec(mine)
    assert not torch.equal(_logits(first), _logits(second))
    assert torch.equal(_logits(first), _logits(RunSpec.of("vit_classic", "0.1M", "digits")))


def test_it_travels_without_its_file(mine: Path, tmp_path: Path) -> None:
    spec = _spec(mine, seed=3)
    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    expected = _logits(spec).flatten().tolist()
    for path in sorted(mine.parent.rglob("*.py")):
        path.unlink()
    code = (
        "import json, pickle, sys, torch; from pathlib import Path; from diffvit.vit import build_model\n"
        "spec = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "model = build_model(spec.model, spec.size, spec.protocol).eval(); model.initialise(spec.seed); torch.set_num_threads(1)\n"
        "images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "print(json.dumps(model(images).flatten().tolist()))"
    )
    there = subprocess.run([sys.executable, "-c", code, str(tmp_path / "spec")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout) == expected


@pytest.mark.slow
def test_its_blocks_can_be_compiled(mine: Path) -> None:
    spec = _spec(mine)
    model = build_model(spec.model, spec.size, spec.protocol).eval()
    images = torch.randn(2, 1, 8, 8)
    plain = model(images)
    for block in model.blocks:
        block.compile()
    assert (model(images) - plain).abs().max() < 1e-5


def test_a_checkpoint_brings_its_code_and_needs_trust(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _spec(mine, overrides={"max_steps": 2})
    result = train(spec, tmp_path / "checkpoints", device="cpu")
    assert result and result.identity["source"] == spec.source.sha256 and result.model == spec.model
    files = result.files(tmp_path / "checkpoints")
    assert load_weights(files.weights)[1]["source"] == spec.source.content

    mine.write_text("nothing of it is left")
    monkeypatch.setattr(user_models, "_known", {})  # another process of the same machine: it was named here
    assert load_weights(files.weights)[0].count_parameters() == result.parameters

    monkeypatch.setattr(user_models, "_known", {})
    monkeypatch.setenv("DIFFVIT_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(UntrustedError, match=r"code that comes with it, Mine in mine\.py, "):
        load_weights(files.weights)
    assert user_models._known == {} and verify_run(files.result) == []
    assert load_weights(files.weights, trust=True)[0].count_parameters() == result.parameters


def test_code_that_is_not_the_names_is_refused_even_with_trust(mine: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    spec = _spec(mine, overrides={"max_steps": 1})
    files = train(spec, tmp_path, device="cpu").files(tmp_path)
    facts = load_weights(files.weights)[1]
    other = {**facts["source"], "files": {**facts["source"]["files"], "helper.py": "raise SystemExit('executed')"}}
    header = {**facts, "protocol": vars(facts["protocol"]) | {"depths": dict(facts["protocol"].depths)}, "source": other}
    save_file(load_file(files.weights), files.weights, {"diffvit": json.dumps(header)})
    with pytest.raises(UserError, match="has other code than that of its model"):
        load_weights(files.weights, trust=True)


def test_what_was_trained_is_found_by_file_by_name_and_after_a_change(cli, mine: Path) -> None:
    arguments = ("--size", "0.1M", "--dataset", "digits", "--max_steps", "2")
    trained = cli("train", "--model", f"{mine}:Mine", *arguments)
    assert trained.code == 0, trained.err
    assert "done already" in cli("train", "--model", f"{mine}:Mine", *arguments).err
    name = read_results(Path("checkpoints"))[0].model
    before = {path: file_sha256(path) for path in Path("checkpoints").rglob("model_*")}
    by_file, by_name = (cli("evaluate", "--model", model, *arguments) for model in (f"{mine}:Mine", name))
    assert by_file.code == by_name.code == 0 and by_file.out == by_name.out

    mine.write_text(mine.read_text() + "# changed")
    gone = cli("evaluate", "--model", f"{mine}:Mine", *arguments)
    assert gone.code == 2 and f"its file has changed since {name} was trained" in gone.err
    kept = cli("evaluate", "--model", name, *arguments)
    assert kept.code == 0 and kept.out == by_file.out
    assert name.split("-")[0] in cli("list").out and cli("list", "--verify").code == 0
    assert {path: file_sha256(path) for path in Path("checkpoints").rglob("model_*")} == before


BAD = {
    "none.py:Mine": ("", "there is no file"),
    "no_class.py:Mine": ("x = 1\n", "no_class.py has no class 'Mine'"),
    "not_said.py": ("class A: ...\n", "is named without its class"),
    "syntax.py:Mine": ("x = 1\nclass Mine(:\n", "line 2 of"),
    "base.py:Mine": ("class Mine: ...\n", "Mine in base.py is no torch.nn.Module"),
    "flops.py:Mine": ("from torch import nn\nclass Mine(nn.Module): ...\n", "has no static method map_flops"),
    "raises.py:Mine": ("import torch\n\nx = 1 / 0\nclass Mine: ...\n", "line 3 of raises.py raised ZeroDivisionError: division by zero"),
    "exits.py:Mine": ("raise SystemExit(0)\nclass Mine: ...\n", "line 1 of exits.py raised SystemExit: 0"),
    "missing.py:Mine": ("import no_such_module\nclass Mine: ...\n", "line 1 of missing.py raised ModuleNotFoundError"),
    "outside.py:Mine": ("import elsewhere\nclass Mine: ...\n", "line 1 of"),
    f"{'a' * 300}.py:Mine": ("", "File name too long"),
    "init.py:Mine": (
        "from diffvit.vit_classic import Attention\nclass Mine(Attention):\n    def __init__(self, *given):\n        raise ValueError('odd')\n",
        "line 4 of init.py raised ValueError: odd",
    ),
    "latin.py:Mine": ("# \udce4\nclass Mine: ...\n", "line 1 is not in UTF-8"),
}


@pytest.mark.parametrize("reference", BAD)
def test_a_bad_file_is_a_sentence_and_leaves_nothing(
    cli, reference: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    library = tmp_path_factory.mktemp("library")  # as PYTHONPATH or an editable installation adds one
    (library / "elsewhere.py").touch()
    monkeypatch.syspath_prepend(str(library))
    content, sentence = BAD[reference]
    if content:
        Path(reference.partition(":")[0]).write_bytes(content.encode("utf-8", "surrogateescape"))
    outcome = cli("train", "--model", reference, "--size", "0.1M", "--dataset", "digits", "--max_steps", "2")
    assert outcome.code == 2 and sentence in outcome.err and "\nhint: " in outcome.err and "Traceback" not in outcome.err
    assert not list(Path("checkpoints").rglob("model_*"))


def test_the_example_trains(tmp_path: Path) -> None:
    spec = _spec(EXAMPLE, "SigmoidAttention", overrides={"max_steps": 10})
    result = train(spec, tmp_path, device="cpu")
    assert result and result.status == "done" and result.attention == "plain" and result.parameters == 102_218
    assert len(EXAMPLE.read_text().splitlines()) <= 30


def test_named_sources_are_read_and_not_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Mine: ...\n")
    assert isinstance(read_source(f"{trap}:Mine"), ModelSource) and not (tmp_path / "executed").exists()


BARE = """
import torch
from torch import nn


class Mean(nn.Module):
    def __init__(self, d_model, heads, layer, dropout):
        super().__init__()
        self.qkv, self.proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    @staticmethod
    def map_flops(d_model, tokens, queries=None):
        return 0

    def forward(self, x, queries=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj((q + k + v).mean(1, keepdim=True) + v)[:, :queries]
"""


def test_a_class_needs_no_more_than_the_contract(cli) -> None:
    Path("mean.py").write_text(BARE)
    arguments = ("--model", "mean.py:Mean", "--size", "0.1M", "--dataset", "digits", "--max_steps", "2")
    trained, evaluated, inside = cli("train", *arguments), cli("evaluate", *arguments), cli("evaluate", *arguments, "--attention")
    assert trained.code == evaluated.code == 0, trained.err + evaluated.err
    assert inside.code == 2 and "has no logits, maps, apply_maps, lambdas" in inside.err
    corrupted = cli("evaluate", *arguments, "--corruptions", "--limit", "64")
    assert corrupted.code == 0 and "gaussian" in corrupted.out


def _train_grid(checkpoints: Path, grid: Grid, steps: int) -> list[RunSpec]:
    specs = grid.runs(overrides={"max_steps": steps})
    for spec in specs:
        train(spec, checkpoints, device="cpu")
    return specs


def test_a_grid_file_names_it_beside_itself_and_the_report_compares_it(cli, mine: Path) -> None:
    (mine.parent / "grid.yaml").write_text(
        "models: [vit_classic, mine.py:Mine]\ndatasets: [digits]\nsizes: [small, medium]\nseeds: 2\noverrides: {max_steps: 3}\n"
    )
    grid = find_grid(str(mine.parent / "grid.yaml"))
    assert grid.arms == ("vit_classic", _spec(mine).model) and len(grid.runs()) == 8
    _train_grid(Path("checkpoints"), grid, 3)
    reported = cli("report", "--grid", str(mine.parent / "grid.yaml"))
    assert reported.code == 0, reported.err
    text = Path("checkpoints/grid_report/report.md").read_text()
    assert text.startswith(f"# Does {grid.arms[1]} scale better than Classic ViT") and f"Negative numbers favour {grid.arms[1]}." in text
    assert "On digits" in text and "Differential ViT" not in text.partition("## What this does not show")[0]
    drawn = {path.name for path in Path("checkpoints/grid_report/figures").glob("*.png")}
    assert {f"digits_max_steps-3_{grid.arms[1]}_scaling.png", "digits_max_steps-3_scaling_overlay.png"} <= drawn, drawn


def test_models_on_the_command_line_take_the_place_of_a_grids(mine: Path) -> None:
    name = _spec(mine).model
    grid = find_grid("digits", models=["classic", f"{mine}:Mine"])
    assert grid.name == f"digits-classic-{name}" and grid.prefix == f"{grid.name}_" and grid.arms == ("vit_classic", name)
    assert {spec.model for spec in grid.runs()} == {"vit_classic", name} and len(grid.runs()) == 12
    assert find_grid("digits", models=["vit_classic", "differential"]) is find_grid("digits")
    with pytest.raises(UserError, match="twice"):
        find_grid("digits", models=["classic", "vit_classic"]).runs()


def test_unequal_parameters_and_changed_code_are_said(cli, mine: Path) -> None:
    arguments = ("--dataset", "digits", "--size", "0.1M", "--max_steps", "1")
    assert cli("train", "--model", f"{mine}:Mine", *arguments).code == 0
    mine.write_text(
        MINE
        + "    def __init__(self, d_model, heads, layer, dropout):\n        super().__init__(d_model, heads, layer, dropout)\n"
        "        self.gate = torch.nn.Linear(d_model, d_model)\n".replace("torch.", "__import__('torch').")
    )
    planned = cli("study", "--dry_run", "--model", "classic", "--model", f"{mine}:Mine")
    assert planned.code == 0, planned.err
    assert re.search(r"note: checkpoints has runs of Mine-\w{8}: the code has changed since, and Mine-\w{8} is trained anew", planned.out)
    assert re.search(r"note: at digits 0.4M Mine-\w{8} has \+8.3 % parameters against the classic model", planned.out), planned.out
    again = cli("train", "--model", f"{mine}:Mine", *arguments)
    assert again.code == 0 and "the code has changed since" in again.err


@pytest.mark.slow
def test_from_file_to_verdict_in_one_command(cli, tmp_path: Path) -> None:
    models = ("--model", "vit_classic", "--model", f"{EXAMPLE}:SigmoidAttention")
    studied = cli(
        "study", "--grid", "digits", "--seeds", "2", "--epochs", "1", *models, "--address", "local", "--dashboard", "false", "--yes"
    )
    assert studied.code == 0, studied.err
    name = _spec(EXAMPLE, "SigmoidAttention").model
    assert f"{name} against Classic ViT: negative numbers favour {name}\n" in studied.err and "\ndigits (epochs=1):\n" in studied.err
    command = re.search(r"next +for the page: (?:python|uv run) run.py (report .*)", studied.err)[1]
    reported = cli(*command.split())
    assert reported.code == 0 and f"digits-classic-{name}_report" in reported.out, reported.err


def test_choices_and_power_are_of_the_arms_that_the_grid_has(cli, mine: Path) -> None:
    (mine.parent / "tried.yaml").write_text(
        "models: [vit_classic, mine.py:Mine]\ndatasets: [digits]\nsizes: [small, medium]\nseeds: 2\noverrides: {max_steps: 2}\n"
        "conditions: [{}, {lr: 0.001}, {lr: 0.01}, {heads: 8}]\n"
    )
    file, name = str(mine.parent / "tried.yaml"), _spec(mine).model
    _train_grid(Path("checkpoints"), find_grid(file), 2)
    assert cli("report", "--grid", file).code == 0
    text = Path("checkpoints/tried_report/report.md").read_text()
    assert f"combinations of choices, {name} has the lower error in" in text and "Differential ViT" not in text
    told = cli("power", "--grid", file)
    assert told.code == 0 and "measured on 4 pairs" in told.out, told.out + told.err


def test_a_grid_is_evaluated_with_the_architectures_that_its_study_had(cli) -> None:
    both = ("--model", "vit_classic", "--model", "vit_differential")
    alone = cli("evaluate", *both, "--size", "small", "--dataset", "digits")
    assert alone.code == 2 and "--model is given more than once" in alone.err and "--grid only" in alone.err
    Path("checkpoints").mkdir()
    grid = cli("evaluate", *both, "--grid", "digits", "--corruptions")  # as a report's last section has it
    assert grid.code == 2 and "has no finished run of the grid digits" in grid.err


@pytest.mark.parametrize("command", ["report", "plot", "power", "check"])
def test_commands_that_read_a_grid_take_the_folder_of_its_data(cli, command: str) -> None:
    Path("own.yaml").write_text("datasets: [{name: mine, hub: somebody/mine, image: image, label: label, image_size: 28, patch_size: 4, "
                                "d_model: 64, heads: 4, parameters: [0.1M]}]\nmodels: [vit_classic]\n")  # fmt: skip
    Path("data").mkdir()
    model = [f"{EXAMPLE}:SigmoidAttention"] if command == "check" else []
    outcome = cli(command, *model, "--grid", "own.yaml", "--data_root", "data")
    assert outcome.code == 2 and "data/somebody/mine" in outcome.err, outcome.err
