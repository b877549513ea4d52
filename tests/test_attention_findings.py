"""What a model attends to: measures whose value is known beforehand, equal clutter for all models, and the figures."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from diffvit.data.batches import Prepare
from diffvit.dataset import Dataset, load
from diffvit.errors import UserError
from diffvit.findings import attention
from diffvit.findings.attention import (
    box_overlap,
    cluttered,
    evaluate_attention,
    explicit_layers,
    negative_mass,
    patch_shares,
    picture_pixels,
    positive_shares,
    share_entropy,
    summary_lines,
)
from diffvit.findings.kept import add_evaluation, read_evaluations
from diffvit.ledger.files import RunFiles
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.weights import save_weights, weight_facts
from diffvit.protocol import MODEL_TITLES, MODELS, PROTOCOLS
from diffvit.vit import VisionTransformer, build_model
from study.report.attention_figures import attention_curves, attention_pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("digits")


def _model(name: str, size: str = "0.2M", seed: int = 0) -> VisionTransformer:
    """A model whose attention is far from uniform."""
    model = build_model(name, size, PROTOCOLS["digits"]).eval()
    model.initialise(seed)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(3.0)
    return model


def _save(folder: Path, name: str, model: VisionTransformer, data: Dataset, size: str = "0.2M") -> Path:
    spec = RunSpec.of(name, size, "digits")
    files = RunFiles.of(folder, spec, spec.run_id(data.fingerprint))
    save_weights(files.weights, model, weight_facts(spec, files.run_id, data))
    return files.weights


def _findings(folder: Path, name: str, model: VisionTransformer, data: Dataset, **options: Any) -> dict[str, Any]:
    return evaluate_attention(_save(folder, name, model, data), device=CPU, **{"limit": 24, **options})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> dict[str, dict[str, Any]]:
    """The findings about an untrained model of each architecture."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: _findings(folder, name, _model(name), data) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_the_table_fits_a_terminal_and_its_columns_line_up(found, name: str) -> None:
    layers = [{**layer, "hidden_states": {"top1": 12345.6, "median": 0.00012}, "negative_mass": 1.0} for layer in found[name]["layers"]]
    header, *rows = summary_lines({**found[name], "layers": layers})[: 1 + len(layers)]
    assert {len(line) for line in (header, *rows)} == {len(header)} and len(header) <= 80
    ends = [match.end() for match in re.finditer(r"[a-z.]+", header)]
    assert all(row[end - 1] != " " for row in rows for end in ends if header[:end].split()[-1] != "lambda")


# ---------------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("name", MODELS)
def test_the_explicit_pass_ends_where_the_fused_one_does(name: str) -> None:
    model = _model(name).double()
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        *_, (_, _, _, last) = explicit_layers(model, images)
        torch.testing.assert_close(model.classify(last), model(images), rtol=1e-9, atol=1e-9)


def test_shares_are_of_absolute_attention_to_patches_alone() -> None:
    maps = torch.zeros(1, 2, 5, 5)
    maps[0, 0, 0] = torch.tensor([9.0, 3.0, -1.0, 0.0, 0.0])
    maps[0, 1, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])  # all on the class token itself
    maps[:, :, 1:] = 7.0  # other tokens' attention does not count
    torch.testing.assert_close(patch_shares(maps), torch.tensor([[[0.75, 0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]))


def test_the_parts_of_a_map_with_a_negative_side_by_hand() -> None:
    maps = torch.zeros(1, 1, 5, 5)
    maps[0, 0, 0] = torch.tensor([9.0, 3.0, -2.0, 3.0, -2.0])
    torch.testing.assert_close(positive_shares(maps), torch.tensor([[[0.5, 0.0, 0.5, 0.0]]]))
    torch.testing.assert_close(negative_mass(maps), torch.tensor([[0.4]]))


def test_entropy_before_training_is_that_of_the_runs_own_start(found, tmp_path: Path, data: Dataset) -> None:
    fresh = build_model("vit_differential", "0.2M", PROTOCOLS["digits"]).eval()
    fresh.initialise(0)
    start = _findings(tmp_path, "vit_differential", fresh, data)["layers"]
    for layer, trained in zip(start, found["vit_differential"]["layers"], strict=True):
        assert layer["entropy_untrained"] == pytest.approx(layer["entropy"], rel=1e-5)
        assert trained["entropy_untrained"] == pytest.approx(layer["entropy"], rel=1e-5) and trained["entropy"] < layer["entropy"] - 0.01
        assert 0 < layer["negative_mass"] < 1 and layer["entropy_positive"] < layer["entropy"]
    for layer in found["vit_classic"]["layers"]:
        assert layer["negative_mass"] == 0 and layer["entropy_positive"] == pytest.approx(layer["entropy"], rel=1e-6)


def test_entropy_of_known_shares() -> None:
    shares = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(share_entropy(shares), torch.tensor([math.log(4), math.log(2), 0.0]))


@pytest.mark.parametrize(("canvas", "grid"), [((12, 12), 4), ((48, 48), 28), ((10, 15), 5)])
def test_overlap_is_what_counting_fine_pixels_gives(canvas: tuple[int, int], grid: int) -> None:
    boxes = torch.tensor([[2, 3, 9, 10], [0, 0, *canvas], [1, 4, 2, 5]])
    overlap = box_overlap(boxes, canvas, grid).view(3, grid, grid)
    for (top, left, bottom, right), of_box in zip(boxes.tolist(), overlap, strict=True):
        fine = np.zeros((canvas[0] * grid, canvas[1] * grid))  # each pixel cut into grid x grid, so that patches fall on whole ones
        fine[top * grid : bottom * grid, left * grid : right * grid] = 1
        counted = fine.reshape(grid, canvas[0], grid, canvas[1]).mean(axis=(1, 3))
        np.testing.assert_allclose(of_box.numpy(), counted, atol=1e-12)


def test_uniform_attention_has_the_entropy_of_all_patches_and_the_areas_share(tmp_path: Path, data: Dataset) -> None:
    model = _model("vit_classic")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:64] = 0.0  # queries of 0: all scores are 0
            block.attn.qkv.bias[:64] = 0.0
    findings = _findings(tmp_path, "vit_classic", model, data)
    assert findings["uniform_entropy"] == pytest.approx(math.log(16))
    assert findings["signal_area"] == pytest.approx((8 / 12) ** 2)
    for layer in findings["layers"]:
        assert layer["entropy"] == pytest.approx(math.log(16), abs=1e-5)
        assert layer["signal_share"] == pytest.approx({"noise": 4 / 9, "images": 4 / 9}, abs=1e-5)
        assert layer["attention_logits"] == {"top1": 0.0, "median": 0.0}


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_share_is_one_where_all_attention_is_on_the_object_and_zero_where_none_is(where: str, data: Dataset, monkeypatch) -> None:
    model = _model("vit_classic", "0.1M")
    patches = box_overlap(cluttered(data, "noise", range(32))[1], (12, 12), 4) == (1 if where == "inside" else 0)
    rows = patches.any(dim=1).nonzero().flatten().tolist()  # an object in the middle touches all patches
    patches = patches[rows]
    assert len(rows) > 16

    def pretended(model, images):
        maps = torch.zeros(len(images), 4, 17, 17)
        maps[:, :, 0, 1:] = -patches[:, None].float()  # negative attention counts as positive does
        for block in model.blocks:
            yield block.attn, images, maps, images

    monkeypatch.setattr(attention, "explicit_layers", pretended)
    shares, _ = attention._signal_shares(model, Prepare(8, data.mean, data.std), data, "noise", [rows])
    assert shares == pytest.approx([1.0, 1.0] if where == "inside" else [0.0, 0.0])


def test_lambda_is_the_layers_own(tmp_path: Path, data: Dataset) -> None:
    model = _model("vit_differential")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.lambda_q1.normal_(0.0, 0.5)
    findings = _findings(tmp_path, "vit_differential", model, data)
    assert [layer["lambda"] for layer in findings["layers"]] == pytest.approx([block.attn.lambda_full().item() for block in model.blocks])


def test_lambda_is_none_where_nothing_is_subtracted_and_a_mean_where_each_token_has_its_own(found) -> None:
    assert all(layer["lambda"] is None for name in ("vit_classic", "vit_classic_wide_heads") for layer in found[name]["layers"])
    assert all(0.3 < layer["lambda"] < 0.7 for layer in found["vit_differential_v2"]["layers"])  # sigmoid of about 0


def test_activations_are_those_of_the_fused_pass(found, data: Dataset) -> None:
    model = _model("vit_differential")
    hidden: list[torch.Tensor] = []
    for block in model.blocks:
        # Of the last block the model wants the class token only; a finding is about all.
        block.register_forward_hook(lambda module, inputs, output: hidden.append(module.forward(inputs[0]).abs()))
    with torch.no_grad():
        model(Prepare(8, data.mean, data.std)(data.test.pixels[:24]))
    for layer, values in zip(found["vit_differential"]["layers"], hidden, strict=True):
        assert layer["hidden_states"]["top1"] == pytest.approx(values.max().item(), rel=1e-4)
        medians = sorted(image.median().item() for image in values)
        assert layer["hidden_states"]["median"] == pytest.approx(medians[11], rel=1e-4)


# ----------------------------------------------------------------------------------------------------- images and files


def test_clutter_depends_on_the_row_alone(data: Dataset) -> None:
    for background in ("noise", "images"):
        together, boxes = cluttered(data, background, range(5, 9))
        alone, box = cluttered(data, background, [7])
        assert torch.equal(together[2:3], alone) and torch.equal(boxes[2:3], box)
        top, left, bottom, right = box[0].tolist()
        assert torch.equal(alone[0, :, top:bottom, left:right], data.test.pixels[7])
        assert not torch.equal(together[0], together[1])


def test_every_model_sees_the_same_pictures(found) -> None:
    seen = {json.dumps([[picture[key] for key in ("row", "png", "box", "true")] for picture in of["pictures"]]) for of in found.values()}
    assert len(seen) == 1
    assert len({of["signal_area"] for of in found.values()}) == 1


@pytest.mark.parametrize("name", ["vit_classic", "vit_differential_v2"])
def test_the_batch_size_changes_nothing(name: str, found, tmp_path: Path, data: Dataset) -> None:
    other = _findings(tmp_path, name, _model(name), data, batch_size=7)
    for ours, theirs in zip(found[name]["layers"], other["layers"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"lambda"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
        assert ours["lambda"] is theirs["lambda"] is None or ours["lambda"] == pytest.approx(theirs["lambda"], rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_findings_survive_the_ledger(name: str, found, tmp_path: Path) -> None:
    files = RunFiles(tmp_path, name, "0123456789", "0.2M", "digits")
    add_evaluation(files, "attention", found[name])
    assert read_evaluations(files) == {"attention": found[name]}
    assert [layer["layer"] for layer in found[name]["layers"]] == [0, 1, 2, 3]
    assert found[name]["images"] == 24 and found[name]["warnings"] == []


def test_pictures_are_of_the_first_images_of_six_classes(found, data: Dataset) -> None:
    pictures = found["vit_differential"]["pictures"]
    labels = data.test.labels[:24].tolist()
    firsts = [row for row, label in enumerate(labels) if label not in labels[:row]][:6]
    assert [picture["row"] for picture in pictures] == firsts
    assert [picture["true"] for picture in pictures] == [data.classes[labels[row]] for row in firsts]
    canvases, boxes = cluttered(data, "images", firsts)
    model = _model("vit_differential")
    with torch.no_grad():
        images = Prepare(8, data.mean, data.std)(canvases)
        maps = [maps[:, :, 0, 1:].mean(1).view(-1, 4, 4).numpy() for _, _, maps, _ in explicit_layers(model, images)]
        predicted = model(images).argmax(1).tolist()
    for i, picture in enumerate(pictures):
        np.testing.assert_array_equal(picture_pixels(picture), canvases[i, 0].numpy())
        assert [12 * side for side in picture["box"]] == pytest.approx(boxes[i].tolist())
        assert picture["predicted"] == data.classes[predicted[i]]
        np.testing.assert_allclose(picture["last_map"], maps[3][i], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(picture["middle_map"], maps[found["vit_differential"]["middle_layer"]][i], rtol=1e-3, atol=1e-6)
    assert min(np.min(picture["last_map"]) for picture in pictures) < 0  # signed


def test_large_colour_pictures_are_made_smaller() -> None:
    picture = {"png": attention._png(torch.randint(0, 256, (3, 200, 100), dtype=torch.uint8))}
    assert picture_pixels(picture).shape == (64, 32, 3)


def test_progress_and_bad_input(tmp_path: Path, data: Dataset) -> None:
    path = _save(tmp_path, "vit_classic", _model("vit_classic"), data)
    lines: list[str] = []
    evaluate_attention(path, limit=2, device=CPU, on_progress=lines.append)
    assert [line.split(":")[0] for line in lines] == ["1/3  clean", "2/3  clutter-noise", "3/3  clutter-images"]
    with pytest.raises(UserError, match="limit is 0"):
        evaluate_attention(path, limit=0, device=CPU)
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate_attention(tmp_path / "nothing.safetensors", device=CPU)


# ------------------------------------------------------------------------------------------------------------- figures


def test_pictures_name_models_classes_and_right_or_wrong(found) -> None:
    shown = {name: json.loads(json.dumps(found[name])) for name in ("vit_differential", "vit_classic")}
    for picture in shown["vit_classic"]["pictures"]:
        picture["predicted"] = picture["true"]
    for picture in shown["vit_differential"]["pictures"]:
        picture["predicted"] = "an endlessly long name of a class"
    figure = attention_pictures(shown, "Digits")
    figure.draw_without_rendering()
    *axes, bar = figure.axes
    assert figure.get_suptitle() == "Digits"
    assert [cell.get_title() for cell in axes[:3]] == ["test image", MODEL_TITLES["vit_classic"], MODEL_TITLES["vit_differential"]]
    assert "attention" in bar.get_ylabel()
    assert len(axes) == 18
    for i, picture in enumerate(shown["vit_classic"]["pictures"]):
        image, classic, differential = axes[3 * i : 3 * i + 3]
        assert image.get_xlabel() == f"true: {picture['true']}"
        assert classic.get_xlabel() == f"✓ {picture['true']}"
        assert differential.get_xlabel() == "✗ an endlessly lo…"
        assert image.images[0].get_array().shape == (12, 12)
        assert classic.images[0].get_array().shape == (4, 4)
        for cell in (image, classic, differential):
            frame = cell.patches[0]
            top, left, bottom, right = picture["box"]
            assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == pytest.approx((left, top, right - left, bottom - top))


def test_maps_share_one_scale_in_multiples_of_uniform_attention(found) -> None:
    figure = attention_pictures({name: found[name] for name in ("vit_classic", "vit_differential")}, "Digits")
    maps = [axes.images[0] for i, axes in enumerate(figure.axes[:-1]) if i % 3]
    assert len({id(image.norm) for image in maps}) == 1
    assert maps[0].norm.vmin == -maps[0].norm.vmax < 0  # signed, and so symmetric
    assert all(np.abs(image.get_array()).mean() == pytest.approx(1.0) for image in maps)
    alone = attention_pictures({"vit_classic": found["vit_classic"]}, "Digits")
    assert alone.axes[1].images[0].norm.vmin == 0  # nothing is negative, and so sequential


def test_pictures_of_other_images_are_refused(found) -> None:
    other = json.loads(json.dumps(found["vit_differential"]))
    other["pictures"][0]["png"] = other["pictures"][1]["png"]
    with pytest.raises(ValueError, match="same pictures"):
        attention_pictures({"vit_classic": found["vit_classic"], "vit_differential": other}, "Digits")


def _curves(runs: list[tuple[str, str, dict]]) -> Figure:
    """The figure of runs: model, size, what was found."""
    table = pd.DataFrame([{"run_id": str(i), "model": model, "size": size, "parameters": 1e6 * float(size.rstrip("M"))}
                          for i, (model, size, _) in enumerate(runs)])  # fmt: skip
    return attention_curves(table, {str(i): each for i, (*_, each) in enumerate(runs)}, "digits")


def test_curves_have_all_layers_seeds_and_the_uniform_level(found) -> None:
    short = json.loads(json.dumps(found["vit_classic"]))
    short["layers"] = short["layers"][:2]
    second = json.loads(json.dumps(found["vit_differential"]))
    for layer in second["layers"]:
        layer["entropy"] += 0.5
    runs = [("vit_classic", "0.1M", short), *((name, "0.2M", found[name]) for name in MODELS), ("vit_differential", "0.2M", second)]
    figure = _curves(runs)
    figure.draw_without_rendering()
    cells = np.array(figure.axes).reshape(3, 2)
    assert [axes.get_title() for axes in cells[0]] == ["0.1 M, 2 layers", "0.2 M, 4 layers"]  # of the runs
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "uniform attention",
        "Classic ViT",
        *list(MODEL_TITLES.values())[1:],
    ]
    assert "digits" in figure.legends[0].get_title().get_text()
    labels = [row[0].get_ylabel() for row in cells]
    assert "entropy" in labels[0] and "noise" in labels[1] and "other images" in labels[2]

    drawn = {line.get_label(): line for line in cells[0, 1].lines}
    assert drawn["uniform attention"].get_ydata()[0] == pytest.approx(math.log(16))
    np.testing.assert_allclose(drawn["Classic ViT"].get_xdata(), [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(drawn["Classic ViT"].get_ydata(), [layer["entropy"] for layer in found["vit_classic"]["layers"]])
    mean = [layer["entropy"] + 0.25 for layer in found["vit_differential"]["layers"]]
    np.testing.assert_allclose(drawn["Differential ViT"].get_ydata(), mean)
    assert len(cells[0, 1].lines) == 1 + len(MODELS) + 2  # the level, a line each, and two thin ones of the two seeds
    assert "2 seeds" in figure.get_supxlabel()
    share = {line.get_label(): line for line in cells[2, 1].lines}["Classic ViT"].get_ydata()
    np.testing.assert_allclose(share, [100 * layer["signal_share"]["images"] for layer in found["vit_classic"]["layers"]])


def test_nothing_of_the_curves_overlaps(found) -> None:
    figure = _curves([(name, "0.2M", found[name]) for name in MODELS])
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 >= figure.axes[0].title.get_window_extent().y1
    assert legend.x1 <= figure.bbox.x1 and legend.y1 <= figure.bbox.y1
