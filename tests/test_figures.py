"""Figures: the ones the user asked for, with the data in them."""

from __future__ import annotations

import colorsys
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import rc_context, rcParams
from tables import study_table

from diffvit.data.corruptions import CORRUPTIONS
from diffvit.protocol import MODELS, PROTOCOLS
from study.report.attention_figures import attention_curves
from study.report.drawing import our_style, save
from study.report.figures import (
    _MODEL_STYLES,
    batch_lengths,
    draw_figures,
    loss_figure,
    model_style,
    running_mean,
    scaling_figure,
    shade,
    size_colour,
    smoothing_window,
    wilson,
)
from study.report.noise_figures import noise_figure
from study.table import COLUMNS


def _tables(datasets: tuple[str, ...] = ("digits", "CIFAR-100"), seeds: int = 1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Made-up results in the shape of the real tables."""
    random = np.random.RandomState(0)
    runs: list[dict[str, Any]] = []
    steps = []
    for dataset in datasets:
        for i, size in enumerate(PROTOCOLS[dataset].sizes):
            for model in MODELS:
                for seed in range(seeds):
                    run_id = f"{dataset}{size}{model}{seed}"
                    row: dict[str, Any] = dict.fromkeys(COLUMNS)
                    row |= {
                        "run_id": run_id,
                        "status": "done",
                        "model": model,
                        "size": size,
                        "dataset": dataset,
                        "seed": seed,
                        "test_images": 359,
                    }
                    row |= {
                        "parameters": (i + 1) * 100_000 + (model != "vit_classic") * 200,
                        "test_accuracy": 0.9 + i / 50 + random.rand() / 50,
                    }
                    runs.append(row)
                    step = np.arange(1, 201)
                    loss = 2.3 * np.exp(-step / 60) + 0.05 * random.rand(200) + 0.02
                    steps.append(pd.DataFrame({"run_id": run_id, "step": step, "train_loss": loss, "val_loss": loss + 0.1}))
    return pd.DataFrame(runs), pd.concat(steps)


def test_three_figures_an_architecture_and_one_of_all_each_as_png_and_svg(tmp_path: Path) -> None:
    paths = draw_figures(*_tables(), tmp_path)
    names = {path.name for path in paths}
    expected = {
        f"{dataset}_{what}.{kind}"
        for dataset in ("digits", "CIFAR-100")
        for what in ("scaling_overlay", *(f"{model}_{part}" for model in MODELS for part in ("train_loss", "val_loss", "scaling")))
        for kind in ("png", "svg")
    }
    assert names == expected
    assert len(expected) == 2 * (3 * len(MODELS) + 1) * 2
    for path in paths:
        assert path.read_bytes()[:5] == (b"\x89PNG\r" if path.suffix == ".png" else b"<?xml")


def test_names_and_titles_say_all_overrides(tmp_path: Path) -> None:
    runs, steps = _tables(("digits",), seeds=2)
    runs["overrides"] = np.where(runs["seed"] == 1, "epochs=2 lr=0.009", "lr=0.003")  # the second is the protocol's own
    paths = draw_figures(runs, steps, tmp_path)
    plain = {path for path in paths if path.name.startswith(("digits_vit", "digits_scaling"))}
    assert len(paths) == 4 * (3 * len(MODELS) + 1) and len(plain) == len(paths) // 2
    assert all(path.name.startswith("digits_epochs-2_lr-0.009_") for path in set(paths) - plain)
    titles = {path.name: path.read_text().count("epochs=2, lr=0.009") for path in paths if path.suffix == ".svg"}
    assert all(count == ("lr-0.009" in name) for name, count in titles.items())
    # Also where all runs share them: a trial by itself does not take the place of the plain runs.
    alone = draw_figures(runs[runs["seed"] == 1], steps, tmp_path, "trial_")
    assert {path.name for path in alone} == {f"trial_{path.name}" for path in set(paths) - plain}


def test_the_raw_curve_is_in_the_figure() -> None:
    runs, steps = _tables(("digits",))
    of_model = runs[runs["model"] == "vit_classic"]
    axes = loss_figure(of_model, steps, "val_loss").axes[0]
    drawn = [line.get_ydata() for line in axes.lines]
    for run_id in of_model["run_id"]:
        raw = steps[steps["run_id"] == run_id]["val_loss"].to_numpy()
        assert any(len(line) == len(raw) and np.allclose(line, raw) for line in drawn)
    assert axes.get_yscale() == "log"
    assert len(axes.get_yticks()) >= 3
    assert {text.get_text() for text in axes.texts} == {"0.1 M", "0.2 M", "0.3 M"}


def test_names_at_line_ends_do_not_overlap() -> None:
    runs, steps = _tables(("digits",))
    steps["val_loss"] = 1.0  # all lines end at one point
    figure = loss_figure(runs[runs["model"] == "vit_classic"], steps, "val_loss")
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert all(upper.y0 >= lower.y1 - 2 for lower, upper in itertools.pairwise(boxes))


@pytest.mark.parametrize("seeds", [1, 3])
def test_scaling_shows_percent_over_millions(seeds: int) -> None:
    runs, _ = _tables(("digits",), seeds)
    axes = scaling_figure(runs).axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert len(lines) == len(MODELS)
    for line, (_, of_model) in zip(lines, runs.groupby("model", sort=False), strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.array([0.1, 0.2, 0.3]), rtol=0.06)
        np.testing.assert_allclose(line.get_ydata(), 100 * of_model.groupby("parameters")["test_accuracy"].mean())
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize(
    ("number", "title"), [(1, "Classic ViT on"), (2, "Both architectures on"), (3, "3 architectures on"), (4, "4 architectures on")]
)
def test_any_number_of_architectures_side_by_side(number: int, title: str) -> None:
    runs, _ = _tables(("digits",))
    runs["parameters"] = 1e5 * (1 + runs["size"].map(list(PROTOCOLS["digits"].sizes).index))
    axes = scaling_figure(runs[runs["model"].isin(list(MODELS)[:number])]).axes[0]
    assert axes.get_title().startswith(title)
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    firsts = [line.get_xdata()[0] for line in lines]
    assert len(lines) == number
    assert np.mean(firsts) == pytest.approx(0.1)  # spread evenly around the true size
    assert np.diff(firsts) == pytest.approx(0.0024)
    low, high = axes.get_xlim()
    assert all(low < x < high for line in lines for x in line.get_xdata())


def test_architectures_can_be_told_apart_in_grey() -> None:
    from matplotlib.colors import to_rgb

    greys = sorted(float(np.dot(to_rgb(style["color"]), (0.299, 0.587, 0.114))) for style in _MODEL_STYLES.values())
    assert list(_MODEL_STYLES) == list(MODELS)
    assert min(np.diff(greys)) > 0.1
    assert len({style["marker"] for style in _MODEL_STYLES.values()}) == len(MODELS)


def test_sizes_have_a_hue_that_no_architecture_has_and_are_told_apart_in_grey() -> None:
    from matplotlib.colors import to_rgb

    sizes = [to_rgb(size_colour("CIFAR-100", size)) for size in PROTOCOLS["CIFAR-100"].sizes]
    for model in MODELS:
        light, middle, dark = (sum(to_rgb(shade(model, "CIFAR-100", size))) for size in PROTOCOLS["CIFAR-100"].sizes)
        assert light > middle > dark == pytest.approx(sum(to_rgb(model_style(model)["color"])), abs=0.01)
    greys = [float(np.dot(colour, (0.299, 0.587, 0.114))) for colour in sizes]
    assert min(-np.diff(greys)) > 0.2  # darker with size
    hues = [360 * colorsys.rgb_to_hls(*colour)[0] for colour in sizes]
    assert max(hues) - min(hues) < 15
    models = [360 * colorsys.rgb_to_hls(*to_rgb(style["color"]))[0] for style in _MODEL_STYLES.values()]
    assert min(abs((a - b + 180) % 360 - 180) for a in hues for b in models) > 45


def test_both_architectures_share_their_axes() -> None:
    runs, steps = _tables(("digits",))
    steps.loc[steps["run_id"].str.contains("differential"), ["train_loss", "val_loss"]] *= 3
    steps.loc[steps["step"] == 50, "val_loss"] = np.inf
    by_model = [of_model for _, of_model in runs.groupby("model")]
    assert len({scaling_figure(of_model, scale_like=runs).axes[0].get_ylim() for of_model in by_model}) == 1
    losses = [loss_figure(of_model, steps, "val_loss", scale_like=runs).axes[0] for of_model in by_model]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in losses}) == 1


def test_a_running_mean_weighs_batches_by_their_images() -> None:
    # Digits: 39 batches of 32 and one of 10 are its 1,258 training images; 5 of 32 and one of 20 the 180 for validation.
    steps = pd.RangeIndex(1, 81)
    train, val = (batch_lengths("digits", "", loss, steps) for loss in ("train_loss", "val_loss"))
    assert [*train[[0, 38, 39, 40, 79]]] == [32, 32, 10, 32, 10] and [*val[4:7]] == [32, 20, 32]
    assert [*batch_lengths("digits", "batch_size=629", "train_loss", steps[10:13])] == [629, 629, 629]
    curve = pd.Series(np.where(train == 10, 0.0, 1.0), steps)
    smooth = running_mean(curve, 3, train)
    assert smooth[39] == pytest.approx(64 / 74) and smooth[20] == pytest.approx(1) and running_mean(curve, 1, train).equals(curve)
    assert running_mean(curve.where(train > 10), 3, train)[40] == pytest.approx(1)
    assert [smoothing_window(count) for count in (1, 600, 4400)] == [1, 15, 111]
    runs, of_runs = _tables(("digits",), seeds=3)
    caption = loss_figure(runs[runs["model"] == "vit_classic"], of_runs, "train_loss").get_supxlabel()
    assert "running mean over 5 steps and all seeds, batches weighted by their images" in caption


def test_noise_has_bars_over_seeds_axes_on_every_panel_and_says_how_many_seeds() -> None:
    for seeds, said in ((1, "mean over 3 sizes; 1 seed, so no bars"), (3, "bars: ± 1 standard deviation over 3 seeds")):
        runs, _ = _tables(("digits",), seeds)
        accuracies = {run.run_id: [run.test_accuracy - level / 10 for level in range(6)] for run in runs.itertuples()}
        found = {
            run_id: {"conditions": [{"corruption": name if level else "clean", "severity": level, "accuracy": accuracy}
                                    for name in CORRUPTIONS for level, accuracy in enumerate(values) if level or name == next(iter(CORRUPTIONS))]}
            for run_id, values in accuracies.items()
        }  # fmt: skip
        figure = noise_figure(runs, found, "digits")
        figure.draw_without_rendering()
        assert said in figure.get_supxlabel()
        panels = figure.axes[: len(CORRUPTIONS)]
        for axes in panels:
            assert axes.get_xlabel() and axes.get_ylabel()
            assert all(
                any(label.get_visible() and label.get_text() for label in axis.get_ticklabels()) for axis in (axes.xaxis, axes.yaxis)
            )
        bars = [bar for bar in panels[0].collections if len(bar.get_segments())]
        assert len(bars) == (0 if seeds == 1 else len(MODELS))
        if seeds > 1:
            of_model = runs[runs["model"] == "vit_classic"].groupby("seed")["test_accuracy"].mean()
            (_, low), (_, high) = bars[0].get_segments()[0]
            assert high - low == pytest.approx(200 * of_model.std())


def test_wilson_interval() -> None:
    # 81 of 263: a worked example of Newcombe, Statistics in Medicine 17 (1998), method 3.
    assert wilson(100 * 81 / 263, 263) == pytest.approx((25.53, 36.62), abs=0.01)


def test_a_diverged_run_is_named_and_has_no_point(tmp_path: Path) -> None:
    runs, steps = _tables(("digits",))
    lost = (runs["model"] == "vit_classic") & (runs["size"] == PROTOCOLS["digits"].sizes[-1])
    runs.loc[lost, "status"] = "diverged"
    runs.loc[lost, "test_accuracy"] = np.nan
    of_model = runs[runs["model"] == "vit_classic"]
    figure = scaling_figure(of_model, scale_like=runs)
    assert len(figure.axes[0].lines[0].get_xdata()) == 2
    assert "diverged, and so without an accuracy: Classic ViT 0.3 M seed 0" in figure.get_supxlabel()
    names = [text.get_text() for text in loss_figure(of_model, steps, "val_loss").axes[0].texts]
    assert sum("diverged" in name for name in names) == 1
    assert len(draw_figures(runs, steps, tmp_path / "some")) == 2 * (3 * len(MODELS) + 1)
    runs["status"] = "diverged"
    assert len(draw_figures(runs, steps, tmp_path / "none")) == 2 * 2 * len(MODELS)  # the losses only


def test_the_same_tables_give_the_same_files(tmp_path: Path) -> None:
    tables = _tables(("digits",))
    first, second = (draw_figures(*tables, tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_cell_that_was_trained_in_two_precisions_is_still_drawn(tmp_path: Path) -> None:
    runs = study_table()
    again = runs.assign(precision="fp32", run_id=runs["run_id"] + "again")
    assert "diverged" not in scaling_figure(pd.concat([runs, again.iloc[:6]], ignore_index=True)).get_supxlabel()


# A user's settings, as far from ours as they go.
_ODD = {
    "text.usetex": True, "font.family": "serif", "font.size": 22, "figure.dpi": 37, "figure.constrained_layout.use": False, "lines.linewidth": 9,
    "savefig.bbox": "tight", "savefig.transparent": True, "savefig.dpi": 20, "svg.hashsalt": "mine", "svg.fonttype": "path",
    "path.simplify": False, "axes.unicode_minus": False, "xtick.direction": "in", "image.cmap": "jet", "patch.linewidth": 5,
}  # fmt: skip


def _every_kind(out: Path) -> list[bytes]:
    """A figure of each module that draws, as `study` and `report` make them."""
    runs, steps = _tables(("digits",))
    severities = [{"corruption": "clean", "severity": 0, "accuracy": 0.9}]
    severities += [{"corruption": name, "severity": level, "accuracy": 0.9 - level / 10} for name in CORRUPTIONS for level in range(1, 6)]
    layers = [{"entropy": 1.0 / (i + 1), "signal_share": {"noise": 0.2 * i}} for i in range(4)]
    attention = {"layers": layers, "uniform_entropy": 1.4, "signal_area": 0.3, "images": 64}
    with our_style():
        noise = noise_figure(runs, {run_id: {"conditions": severities} for run_id in runs["run_id"]}, "digits")
        curves = attention_curves(runs[:1], {runs["run_id"][0]: attention}, "digits")
        paths = [*save(noise, out / "noise"), *save(curves, out / "attention")]
    paths += draw_figures(runs[runs["model"] == "vit_classic"], steps, out)
    return [path.read_bytes() for path in paths]


def test_the_users_settings_change_nothing(tmp_path: Path) -> None:
    usual = _every_kind(tmp_path / "usual")
    with rc_context(_ODD):
        assert _every_kind(tmp_path / "odd") == usual
        assert rcParams["font.size"] == 22  # and are as they were


@pytest.mark.parametrize("damaged", [True, False])
def test_matplotlib_is_imported_whatever_the_users_settings(damaged: bool, tmp_path: Path) -> None:
    if damaged:  # a settings file of theirs
        (tmp_path / "damaged").write_bytes(b"text.usetex: \xff\xfe")
        changed = {"MATPLOTLIBRC": str(tmp_path / "damaged"), "MPLBACKEND": "abacus"}
    else:  # odd ones in this folder, a backend that is not installed, and no folder of their own
        odd = "\n".join(f"{key}: {value}" for key, value in _ODD.items()) + "\nno.such.key: 1\nno colon\nbackend: abacus\n"
        (tmp_path / "matplotlibrc").write_text(odd)
        (tmp_path / "file").touch()
        backend = "module://no_such_module.backend_inline"
        changed = {"MPLBACKEND": backend, "MPLCONFIGDIR": str(tmp_path / "file" / "below")}
    tests = Path(__file__).parent
    code = "import sys; from pathlib import Path; from test_figures import _every_kind; _every_kind(Path('drawn'))"
    # Tests import pytest, whose plugins may import matplotlib: the module that draws comes first, as in a command.
    done = subprocess.run([sys.executable, "-c", f"import study.report.figures; {code}"], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, **changed, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    _every_kind(tmp_path / "usual")
    drawn, usual = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("drawn", "usual"))
    assert drawn == usual


def test_figures_that_fail_do_not_lose_a_study(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.yaml").write_text("datasets: [digits]\nsizes: [small]\nmodels: [vit_classic]\noverrides: {max_steps: 2}\n")
    assert cli("train", "--model", "vit_classic", "--size", "small", "--dataset", "digits", "--max_steps", "2", "--device", "cpu").code == 0
    study = ("study", "--grid", "one.yaml", "--address", "local", "--gpus_per_run", "0", "--precision", "fp32")

    def fails(*_: Any) -> None:
        raise RuntimeError("no ink")

    with monkeypatch.context() as broken:
        broken.setattr("study.report.figures.draw_figures", fails)
        outcome = cli(*study)
    assert outcome.code == 1 and "\nclassic " in outcome.out and (tmp_path / "checkpoints/one_runs.csv").is_file()
    assert "could not be drawn: RuntimeError: no ink" in outcome.err and "run.py study --grid one.yaml" in outcome.err
    assert "figures  " not in outcome.err
    assert cli(*study).code == 0 and len(list((tmp_path / "checkpoints/figures").iterdir())) == 6
