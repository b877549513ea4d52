"""What a user gives: a grid file, the command line, .env, paths. All of it is used, or refused by name."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import click
import pytest

import run as command_line
from diffvit.checks import read_text, usable_path
from diffvit.errors import UserError
from diffvit.hub.account import find_account, find_token
from study.grid import read_grid

ROOT = Path(__file__).resolve().parents[1]
HEAD = "datasets: [digits]\nsizes: [small]\n"


def refusal(text: str | bytes, name: str = "grid.yaml") -> str:
    path = Path(name)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refused:
        read_grid(path).runs()
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    return str(refused.value)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------- grid files

VANISHING = {
    "overrides: {epochs: 1}\noverrides: {lr: 0.1}": "'overrides' a second time",
    "overrides: {epochs: 5, epochs: 5}": "line 3 gives 'epochs' a second time",
    "conditions: [{label_noise: 0.2, label_noise: 0.4}]": "'label_noise' a second time",
    "overrides: {digits: {epochs: 1, epochs: 2}}": "'epochs' a second time",
    "seeds: {digits: 2, DIGITS: 3}": "names digits twice",
    "overrides: {digits: {epochs: 1}, Digits: {lr: 1e-3}}": "names digits twice",
    "conditions: {digits: [{}], DIGITS: [{}]}": "names digits twice",
    "conditions: [{}, {label_noise: 0,2}, {label_noise: 0,4}]": "a point and no comma",
    "overrides: {lr: 3,0e-4}": "'0e-4'",
    "overrides:\n  lr: 0,5": "lr is '0,5'. (hint: give a number above 0, such as 0.2",
    "overrides: {epochs: }": "epochs has no value",
    "overrides: {epoch: }": "did you mean epochs",
    "overrides: {clip_norm: ~}": "clip_norm has no value",
    "overrides: {digits: }": "no override named 'digits'",
    "overrides: {digits: {epochs: }}": "epochs has no value",
    "conditions: [{}, {lr: }]": "lr has no value",
    **{f"{key}:": f"{key} in grid.yaml has no value" for key in ("seeds", "overrides", "conditions", "models")},
    "seeds: {digits: }": "seeds in grid.yaml",
    "conditions:\n-\n- {lr: 0.1}": "conditions in grid.yaml",
    "seeds: [0, 1, 0]": "seed 0 twice",
    "models: [vit_classic, vit_classic]": "vit_classic 0.1M digits seed 0 twice",
    "conditions: [{lr: 1e-3}, {lr: 1e-3}]": "lr=0.001 twice",
    "<<: {seeds: 2}": "no key in grid.yaml named '<<'",
    "seeds: [0, 1": "grid.yaml is not valid: line 3: expected ',' or ']'",
    "seeds: 2: 3": "grid.yaml is not valid: line 3: mapping values are not allowed here",
    "seeds: 'two": "grid.yaml is not valid: line 3: found unexpected end of stream",
    "models: 'vit_classic\nseeds: 2\n": "grid.yaml is not valid: line 5: found unexpected end of stream, begun in line 3",
}


@pytest.mark.parametrize("line", VANISHING)
def test_what_would_vanish_from_a_grid_file_is_refused_by_name(line: str) -> None:
    assert VANISHING[line] in refusal(HEAD + line)


def test_a_data_set_or_a_size_under_two_names_is_refused() -> None:
    assert "twice" in refusal("datasets: [digits, DIGITS]")
    assert "twice" in refusal("datasets: [digits]\nsizes: [small, 0.1M]")


def test_toml_refuses_the_same() -> None:
    assert "not valid" in refusal('datasets = ["digits"]\n[overrides]\nlr = 0.1\nlr = 0.2', "grid.toml")
    assert "names digits twice" in refusal('datasets = ["digits"]\nseeds = {digits = 1, Digits = 2}', "grid.toml")
    assert "seed 0 twice" in refusal('datasets = ["digits"]\nseeds = [0, 0]', "grid.toml")


def test_an_option_that_makes_two_conditions_one_is_refused(cli) -> None:
    Path("grid.yaml").write_text(HEAD + "conditions: [{epochs: 5}, {epochs: 10}]")
    outcome = cli("study", "--grid", "grid.yaml", "--epochs", "2", "--dry_run")
    assert outcome.code == 2 and "epochs=2 twice" in outcome.err
    assert cli("study", "--grid", "grid.yaml", "--dry_run").code == 0


def test_a_condition_that_makes_no_runs_of_its_own_is_said(cli) -> None:
    Path("grid.yaml").write_text(HEAD + "conditions: [{}, {lr: 3e-3}]")
    for command in (("study", "--dry_run"), ("plan", "--gpu", "h100")):
        outcome = cli(*command, "--grid", "grid.yaml")
        assert outcome.code == 0 and outcome.err.count("warning: digits: lr=0.003 is the same as the protocol") == 1


def test_what_is_on_or_off_is_true_or_false() -> None:
    Path("grid.yaml").write_text(HEAD + "conditions: [{}, {residual_scale: false}]")
    Path("grid.toml").write_text('datasets = ["digits"]\nsizes = ["small"]\nconditions = [{}, {residual_scale = false}]')
    for name in ("grid.yaml", "grid.toml"):
        assert [run.protocol.residual_scale for run in read_grid(Path(name)).runs()] == [True, True, False, False]
    for written in ("no", "0", "off"):
        assert "give true or false" in refusal(f"{HEAD}overrides: {{residual_scale: {written}}}")


# What YAML 1.1 reads otherwise than a person does: as another number, as a truth, a date or a text.
ODD = [
    "010", "08", "0o10", "0x10", "0b11", "1:30", "1_000", "yes", "no", "on", "off", "true", "2024-01-01", "3,5", "1e", ".inf", ".nan", "'1_0'", "'nan'",
]  # fmt: skip


@pytest.mark.parametrize("written", ODD)
def test_a_number_that_yaml_reads_otherwise_than_a_person_is_refused_as_written(written: str) -> None:
    assert f"epochs is '{written.strip(chr(39))}'" in refusal(f"{HEAD}overrides:\n  epochs: {written}")
    assert f"'{written.strip(chr(39))}'" in refusal(f"{HEAD}seeds:\n- {written}")
    assert f"'{written.strip(chr(39))}'" in refusal(f"datasets:\n- {written}")


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("2e+1", 20), (".5", 0.5), ("5.", 5), ("+5", 5), ("3.0e-4", 3e-4), ("'0.25'", 0.25), ("0.10", 0.1)],
)
def test_a_number_as_everybody_reads_it_is_taken(written: str, value: float) -> None:
    Path("grid.yaml").write_text(f"{HEAD}overrides: {{lr: {written}}}")
    assert {run.overrides["lr"] for run in read_grid(Path("grid.yaml")).runs()} == {value}


# ---------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("suffix", [".yaml", ".toml"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_grid_file_of_any_editor_is_read(suffix: str, encoding: str, end: str) -> None:
    lines = ["# é", "datasets: [digits]", "seeds: 2"] if suffix == ".yaml" else ["# é", 'datasets = ["digits"]', "seeds = 2"]
    path = Path(f"grid{suffix}")
    path.write_bytes(end.join([*lines, ""]).encode(encoding))
    assert len(read_grid(path).runs()) == 12


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-16", "in UTF-16"), ("utf-32", "in UTF-32"), ("utf-16-le", "null bytes, as UTF-16"), ("latin-1", "line 2 is not in UTF-8")],
)
def test_another_encoding_is_named(encoding: str, said: str) -> None:
    assert said in refusal("datasets: [digits]\n# é\n".encode(encoding))
    assert said in refusal('datasets = ["digits"]\n# é\n'.encode(encoding), "grid.toml")
    Path(".env").write_bytes("HF_TOKEN=hf_x\n# é\n".encode(encoding))
    with pytest.raises(UserError, match=said):
        find_token()


# ---------------------------------------------------------------------------------------------------------------- .env

ENV = "HF_REPOSITORY=user/study\nHF_TOKEN=hf_secret\n"
UNUSED = {
    "HF_TOKN=hf_secret\nHF_REPOSITORY=u/n": "'HF_TOKN' in line 1",
    "hf_token=hf_secret\nHF_REPOSITORY=u/n": "'hf_token' in line 1",
    ENV + "\n\nHF_REPOSITRY=u/n": "'HF_REPOSITRY' in line 5",
    "HF_REPO=u/n\nHF_TOKEN=hf_secret": "did you mean HF_REPOSITORY",
    "HUGGINGFACE_TOKEN=hf_secret\nHF_REPOSITORY=u/n": "did you mean HF_TOKEN",
    ENV + "HF_TOKEN=hf_other": "HF_TOKEN a second time in line 3",
    ENV + "HF_REPOSITORY=u/other": "HF_REPOSITORY a second time in line 3",
    "HF_TOKEN: hf_secret\nHF_REPOSITORY=u/n": "line 1 of .env, which is for HF_TOKEN",
    "HF_TOKEN:hf_secret\nHF_REPOSITORY=u/n": "line 1 of .env, which is for HF_TOKEN",
    "\nHF_TOKEN hf_secret\nHF_REPOSITORY=u/n": "line 2 of .env, which is for HF_TOKEN",
    'HF_TOKEN="hf_secret\nHF_REPOSITORY=u/n': "line 1 of .env, which is for HF_TOKEN",
    "HF_TOKEN=hf_secret b\nHF_REPOSITORY=u/n": "HF_TOKEN is not a token",
}


@pytest.mark.parametrize("content", UNUSED)
def test_what_is_meant_for_us_in_env_and_would_not_be_used_is_refused_by_name(content: str) -> None:
    Path(".env").write_text(content)
    with pytest.raises(UserError) as refused:
        find_account()
    assert UNUSED[content] in str(refused.value) and "hf_secret" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + ENV, ENV.replace("\n", "\r\n"), "HF_TOKEN=\n" + ENV, ENV + "HF_TOKEN=\n", ENV + ENV,
        "export HF_TOKEN='hf_secret'  # mine\nHF_REPOSITORY = \"user/study\"\n",
        ENV + "GH_TOKEN=1\nHF_HOME=/x\nHF_TOKEN_OLD=hf_old\nHUGGING_FACE_HUB_TOKEN=hf_z\nHF_REPO=a/b\nsome: text\nWANDB_API_KEY='x\n",
    ],
    ids=range(7),
)  # fmt: skip
def test_env_as_people_write_it_is_read_and_other_tools_names_may_stay(content: str) -> None:
    Path(".env").write_text(content, encoding="utf-8", newline="")
    account = find_account()
    assert (account.repository, account.token) == ("user/study", "hf_secret")


def test_a_setting_that_env_cannot_make_is_refused(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("DIFFVIT_STORAGE=/somewhere\n")
    outcome = cli("study", "--dry_run")
    assert outcome.code == 2 and "DIFFVIT_STORAGE" in outcome.err and "export" in outcome.err
    monkeypatch.setenv("DIFFVIT_STORAGE", str(Path("somewhere").absolute()))  # as by uv run --env-file .env
    assert cli("study", "--dry_run").code == 0
    for misspelt, meant in (
        ("DIFVIT_STORAGE=s3://x", "DIFFVIT_STORAGE"),
        ("HF_TOKN=hf_x", "HF_TOKEN"),
        ("hf_repository=a/b", "HF_REPOSITORY"),
    ):
        Path(".env").write_text(misspelt)
        outcome = cli("list")
        assert outcome.code == 2 and misspelt.split("=")[0] in outcome.err and f"did you mean {meant}?" in outcome.err
    Path(".env").write_text("AWS_SECRET_ACCESS_KEY=s3cr\nRAY_ADDRESS=a:1\nHF_HOME=/x\nEDITOR=vi\nHF_TOKEN=hf_x\n")
    outcome = cli("list")
    assert outcome.code == 0 and outcome.err.count("from the environment only") == 3 and "s3cr" not in outcome.err
    Path(".env").write_bytes("X=1".encode("utf-16"))  # of another tool, and not needed
    assert cli("study", "--dry_run").code == 0


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("study", "--dry_run", "--epochs", "3", "--epochs", "5"), "--epochs is given more than once"),
        (("study", "--dry_run", "--data-root", "a", "--data_root", "b"), "--data_root is given more than once"),
        (("plan", "--recompute", "--no-recompute"), "--recompute is given more than once"),
        (("study", "--storage", ""), "--storage is empty"),
        (("study", "--checkpoints="), "--checkpoints is empty"),
        (("upload", "", "."), "argument LOCAL is empty"),
        (("study", "--dry_run", "--price", "2"), "run.py plan --price P"),
        (("study", "--dry_run", "--sync_every", "5m"), "--sync_every is given without a storage"),
        (("study", "--dry_run", "--lease", "5m"), "--lease is given without a storage"),
        (("study", "--shard", "1/4"), "--shard needs a storage"),
        (("plan", "--gpu", "h100", "--gpus_per_run", "0.5"), "--gpus_per_run says how --probe measures"),
        (("plan", "--gpu", "h100", "--probe_seconds", "9"), "--probe_seconds says how --probe measures"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused_by_name(cli, arguments: tuple[str, ...], said: str) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2 and outcome.out == "" and said in outcome.err
    assert not list(Path().iterdir())


def test_what_is_the_same_twice_or_takes_several_is_taken(cli) -> None:
    assert cli("study", "--dry_run", "--dry_run", "--resource", "a=1", "--resource", "b=2").code == 0


def test_a_dry_run_of_a_share_shows_the_share(cli) -> None:
    outcome = cli("study", "--dry_run", "--shard", "1/4", "--storage", "s")
    assert outcome.code == 0 and "3 runs, 0 already finished" in outcome.out


OPTION = re.compile(r"(?<![\w-])--([a-z][a-z_-]*)")


def options_of(command: click.Command) -> set[str]:
    return {name.lstrip("-").replace("-", "_") for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"help"}


def texts() -> list[str]:
    """All that the sources say which names an option; parts of a sentence are joined."""
    found = []
    for path in [
        ROOT / "run.py",
        *(ROOT / "diffvit").glob("*.py"),
        *(ROOT / "study").glob("*.py"),
        *(ROOT / "study/commands").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [text for text in found if OPTION.search(text) and "<style>" not in text and "{--" not in text]


# Git's, uv's and fish's, in calls of them; upload's and download's own.
FOREIGN = {"always", "dirty", "abbrev", "exclude", "extra", "force", "no_files", "command", "condition", "arguments"}


def test_every_option_and_command_that_a_text_names_exists() -> None:
    commands = command_line.cli.commands
    known = set().union(*map(options_of, commands.values())) | FOREIGN | {"version"}
    said = texts()
    assert len(said) > 50
    for text in said:
        if "var(--" in text:
            continue  # CSS
        names = {name.replace("-", "_") for name in OPTION.findall(text)}
        assert names <= known, text
        for command, rest in re.findall(r"`(?:uv run )?(?:run\.py )?([a-z]+) ([^`]*)`", text):
            if command in commands:
                assert {name.replace("-", "_") for name in OPTION.findall(rest)} <= options_of(commands[command]), text
        for command in re.findall(r"run\.py ([a-z]+)", text):
            assert command in commands, text


def test_the_warning_of_a_warm_up_names_what_each_command_has(cli) -> None:
    Path("grid.yaml").write_text(HEAD + "overrides: {max_steps: 2}")
    said = cli("study", "--grid", "grid.yaml", "--dry_run").out
    assert "warm-up (50 steps)" in said and "overrides in a grid file" in said and " --warmup_steps overrides" not in said
    Path("grid.yaml").write_text(HEAD + "overrides: {max_steps: 2, warmup_steps: 1}")  # what it advises helps
    assert "warm-up" not in cli("study", "--grid", "grid.yaml", "--dry_run").out


# --------------------------------------------------------------------------------------------------------------- paths


def path_params() -> list[tuple[str, click.Parameter]]:
    return [
        (name, param) for name, command in command_line.cli.commands.items() for param in command.params if isinstance(param.type, click.Path)
    ]  # fmt: skip


def test_every_path_of_the_command_line_is_of_one_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = path_params()
    assert {param.name for _, param in found} >= {"checkpoints", "data_root", "out", "json_to", "local"}
    (tmp_path / "data [x]#%").mkdir()
    for command, param in found:
        name = "data [x]#%" if param.name == "data_root" else "a b [x]#%"  # one must be there
        assert str(param.type.convert(f"~/{name}", param, None)) == str(tmp_path / name), (command, param.name)


def test_home_and_odd_names_work_in_a_real_command(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a b [x]#%.yaml").write_text(HEAD + "models: [vit_classic]\noverrides: {max_steps: 2}")
    ledger = ("--checkpoints", "~/ck [x] #%")
    trained = cli("train", "--model", "vit_classic", "--size", "small", "--dataset", "digits", "--max_steps", "2", *ledger, "--device", "cpu",
                  "--storage", "~/st [x] #%")  # fmt: skip
    assert trained.code == 0, trained.err
    assert "1 of 1 runs done" in cli("list", *ledger).out
    drawn = cli("plot", "--grid", "~/a b [x]#%.yaml", *ledger, "--out", "~/fig [x]")
    assert drawn.code == 0 and list((tmp_path / "fig [x]").glob("*.png"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in (".cache", ".config")) == [
        "a b [x]#%.yaml",
        "ck [x] #%",
        "fig [x]",
        "st [x] #%",
    ]
    assert list((tmp_path / "st [x] #%").rglob("*_result.json"))
    os.symlink(tmp_path / "ck [x] #%", tmp_path / "link")
    assert "1 of 1 runs done" in cli("list", "--checkpoints", "link").out


def test_a_path_that_cannot_be_is_one_sentence(cli) -> None:
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    Path("file").write_text("")
    bad = ["dangling", "loop", "file/inside", "a\nb", "a\x00b", "\udcff", "x" * 5000, "~nobody_of_this_name/x"]
    for given in bad:
        for command in (("list", "--checkpoints"), ("study", "--dry_run", "--data_root"), ("plot", "--out"), ("plan", "--json"), ("study", "--storage"), ("study", "--grid"),
                        ("upload", "--force", "."), ("download", ".")):  # fmt: skip
            if command == ("study", "--grid") and given == "file/inside":
                continue  # the name of a grid that there is not
            outcome = cli(*command, given)
            if command[0] == "upload":
                outcome = cli("upload", given, ".")
            assert outcome.code == 2, (command, given)
            assert len(outcome.err.strip().splitlines()) == 2 and "hint: " in outcome.err, outcome.err
            assert outcome.out == ""
    assert "--checkpoints" in cli("list", "--checkpoints", "loop").err and "DIFFVIT_DATA" in cli("list", "--data_root", "loop").err
    for command in (("list", "--checkpoints"), ("report", "--out"), ("download", "."), ("study", "--dry_run", "--data_root")):
        outcome = cli(*command, "file")
        assert outcome.code == 2 and "file" in outcome.err and len(outcome.err.strip().splitlines()) == 2
    assert {path.name for path in Path().iterdir()} == {"dangling", "loop", "file"}


def test_a_folder_of_another_user_is_named(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("theirs").mkdir()
    monkeypatch.setattr(os, "access", lambda path, *rest, **more: "theirs" not in str(path))  # root may read anything
    for command in (("list", "--checkpoints"), ("study", "--dry_run", "--data_root")):
        outcome = cli(*command, "theirs")
        assert outcome.code == 2 and "theirs" in outcome.err and "hint: " in outcome.err

    def refused(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(UserError, match="Permission denied"):
        usable_path("theirs")


def test_a_cache_folder_is_the_same_for_workers_with_other_folders(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, found in (("cache", tmp_path / "cache"), ("~/cache", tmp_path / "home" / "cache")):
        monkeypatch.setenv("DIFFVIT_CACHE", given)
        assert cli("list").code == 0
        assert os.environ["DIFFVIT_CACHE"] == str(found)


def test_text_is_read_within_bounds() -> None:
    Path("long").write_text("x" * 11)
    with pytest.raises(ValueError, match="longer than 10 bytes"):
        read_text(Path("long"), 10)
