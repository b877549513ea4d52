"""Tokens, passwords and keys: shown by nothing, whichever way they come in."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import run as command_line
from diffvit.errors import StorageError, UserError, redacted, shown, unknown_name
from diffvit.keeping.storage import open_storage
from study.commands import terminal

SECRET = "s3cr/et+Value"
HOLDING = [
    f"https://user:{SECRET}@huggingface.co/user/repo",
    f"s3://AKIAABCDEFGHIJKLMNOP:{SECRET}@bucket/folder",
    f"https://:{SECRET}@host",
    "https://user:p@s3cret@host/folder",
    "user:s3cret@huggingface.co/user/repo",
    "https://hf_s3cret@huggingface.co/user/repo",
    "hf_s3cretABCDEFGH",
    "runs_hf_s3cretABCDEFGH",
    f"https://bucket.s3.amazonaws.com/x?a=1&X-Amz-Signature={SECRET}&b=2",
    "az://container/blob?sv=1&sig=s3cret%2Bb&se=2",
    "https://host/x?token=s3cret",
    "AccountName=a;AccountKey=s3cret==;b=c",
    "AWS_SECRET_ACCESS_KEY=s3cret",
    "--token=s3cret",
    "Authorization: Bearer s3cret.abc",
]


@pytest.mark.parametrize("text", HOLDING)
def test_no_message_shows_a_secret(text: str) -> None:
    error = StorageError(f"the storage {text} failed.", f"look at {text}.")
    again = pickle.loads(pickle.dumps(error))
    for said in (*error.args, str(error), repr(error), error.message, error.hint, str(again), shown(text), shown({"a": [text]})):
        assert "s3cr" not in said and "***" in said
    assert "s3cr" not in str(unknown_name("grid", text, ["digits"]))
    assert redacted(redacted(text)) == redacted(text)


def test_a_secret_is_gone_before_a_long_value_is_cut() -> None:
    assert shown("hf_" + "a" * 300) == "'***'"
    assert "s" * 10 not in shown("x" * 60 + "https://u:" + "s" * 100 + "@h")


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/folder", "git@hf.co:user/repo", "ssh://git@hf.co/user/repo.git", "hf://user/repo", "/data/hf_cache/datasets",
        "the hub needs HF_TOKEN and HF_REPOSITORY", "HF_TOKEN is not a token: it has a space", "dashboard http://127.0.0.1:8265",
        "lr=0.1 epochs=3", "big_gpu=1", "model_0123456789_10B_CIFAR-100.safetensors", "0123456789abcdef0123456789abcdef01234567",
    ],
)  # fmt: skip
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("text", HOLDING)
def test_no_command_shows_a_secret_that_it_was_given(cli, text: str) -> None:
    for arguments in (
        ("study", text), ("list", "--grid", text), ("train", "--model", text, "--size", "small", "--dataset", "digits"), (text,),
        ("upload", text, "."), ("study", "--save_every", text), ("plan", "--gpus", text), ("study", f"--{text}"), ("plan", "--gpu", text),
    ):  # fmt: skip
        outcome = cli(*arguments)
        assert outcome.code == 2 and "s3cr" not in outcome.out + outcome.err, arguments


def test_a_storage_that_is_not_known_is_told_without_its_secret(cli) -> None:
    for command in (
        ("train", "--model", "vit_classic", "--size", "small", "--dataset", "digits", "--max_steps", "1"),
        ("study", "--collect"),
    ):
        outcome = cli(*command, "--storage", f"nowhere://key:{SECRET}@bucket/folder")
        assert outcome.code == 2 and "nowhere://***@bucket/folder" in outcome.err and "s3cr" not in outcome.out + outcome.err


@pytest.mark.parametrize("url", [f"s3://key:{SECRET}@bucket/x", f"gs://key:{SECRET}@bucket", f"hf://user:{SECRET}@hf.co/user/repo"])
def test_a_key_in_a_storages_address_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(UserError) as refused:
        open_storage(url)
    assert "s3cr" not in str(refused.value) and refused.value.hint


def test_a_recommended_command_says_that_a_secret_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "study", "--storage", f"s3://key:{SECRET}@bucket/x"])
    assert terminal.own_command().endswith("run.py study --storage 's3://***@bucket/x' (with the secret in place of ***)")
    monkeypatch.setattr(sys, "argv", ["run.py", "study", "--storage", "s3://bucket/x"])
    assert terminal.own_command().endswith("run.py study --storage s3://bucket/x")


def test_warnings_and_what_a_study_says_show_no_secret(capsys: pytest.CaptureFixture) -> None:
    from study.text import say

    terminal.warn(f"s3://k:{SECRET}@b")
    say(f"s3://k:{SECRET}@b")
    said = capsys.readouterr().err
    assert "s3cr" not in said and said.count("s3://***@b") == 2


def test_a_traceback_shows_no_secret(tmp_path: Path) -> None:
    root = Path(command_line.__file__).parent
    fails = f"import run\nrun.cli.main = lambda **_: 1 / len('s3://k:{SECRET}@b'[:0])\nrun.main()"
    raised = f"import run\ndef fail(**_):\n    raise ValueError('s3://k:' + '{SECRET[::-1]}'[::-1] + '@b')\nrun.cli.main = fail\nrun.main()"
    for code in (fails, raised):
        outcome = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
        assert outcome.returncode == 1 and "Traceback" in outcome.stderr and "s3cr" not in outcome.stderr


def test_errors_keep_their_kind_and_text() -> None:
    error = UserError("there is no grid named 'x'.", "known: digits.")
    assert str(error) == "there is no grid named 'x'. (hint: known: digits.)" and error.args == ("there is no grid named 'x'.",)
