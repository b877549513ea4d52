"""Corruptions do what their names say, the same for the same generator, and stay uint8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffvit.data.corruptions import BACKGROUNDS, CORRUPTIONS, clutter, corrupt
from diffvit.dataset import load
from diffvit.errors import UserError


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _grey(value: int, batch: int = 40) -> Tensor:
    return torch.full((batch, 3, 32, 32), value, dtype=torch.uint8)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(6, 3, 32, 20), (6, 1, 8, 8), (1, 1, 4, 4), (0, 3, 8, 8)])
def test_the_same_generator_gives_the_same_images(corruption: str, shape: tuple[int, ...]) -> None:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=_generator(1))
    before = pixels.clone()
    first, second = (corrupt(pixels, corruption, 5, _generator()) for _ in range(2))
    assert first.dtype == torch.uint8 and first.shape == pixels.shape
    assert torch.equal(first, second)
    assert torch.equal(pixels, before)  # what came in is left alone
    if corruption != "blur" and pixels.shape[-1] >= 8 and len(pixels):
        assert not torch.equal(first, corrupt(pixels, corruption, 5, _generator(2)))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_higher_severity_changes_more(corruption: str) -> None:
    pixels = load("digits").test.pixels
    changes = [(corrupt(pixels, corruption, severity, _generator()).float() - pixels.float()).abs().mean() for severity in range(1, 6)]
    assert changes[0] > 0
    assert changes == sorted(changes) and len(set(changes)) == 5


@pytest.mark.parametrize(("corruption", "value", "deviation"), [
    ("gaussian", 128, 0.10 * 255),
    ("speckle", 100, 0.20 * 100),
    ("shot", 102, (0.4 / 50) ** 0.5 * 255),  # the variance of Poisson(x c) / c is x / c
])  # fmt: skip
def test_noise_has_its_mean_and_deviation(corruption: str, value: int, deviation: float) -> None:
    noisy = corrupt(_grey(value), corruption, 5, _generator()).float()
    assert noisy.mean().item() == pytest.approx(value, abs=0.4)
    assert noisy.std().item() == pytest.approx(deviation, rel=0.02)


def test_impulses_are_half_salt_half_pepper_on_each_channel_alone() -> None:
    noisy = corrupt(_grey(128), "impulse", 5, _generator())
    assert (noisy == 255).float().mean().item() == pytest.approx(0.035, abs=0.003)
    assert (noisy == 0).float().mean().item() == pytest.approx(0.035, abs=0.003)
    assert set(noisy.unique().tolist()) == {0, 128, 255}
    struck = (noisy != 128).float()
    assert (struck[:, 0] * struck[:, 1]).mean().item() == pytest.approx(0.07**2, abs=0.002)


def test_blur_keeps_flat_images_and_spreads_a_point() -> None:
    assert torch.equal(corrupt(_grey(77, 1), "blur", 5, _generator()), _grey(77, 1))
    point = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    point[0, 0, 4, 4] = 255
    spread = corrupt(point, "blur", 5, _generator())[0, 0]
    # A Gaussian of one pixel gives 1 / (2 pi) to its middle, and exp(-1/2) of that to each neighbour.
    assert spread[4, 4].item() == pytest.approx(255 * 0.1592, abs=1)
    assert spread[4, 3] == spread[3, 4] == spread[5, 4]
    assert spread[4, 3].item() == pytest.approx(255 * 0.0965, abs=1)


def test_at_32_pixels_noise_is_a_pixels_and_at_512_pixels_a_thirty_second_of_the_side() -> None:
    pixels = _grey(128, 2)
    expected = (128 / 255 + 0.10 * torch.randn(pixels.shape, generator=_generator())).clamp(0, 1)
    assert torch.equal(corrupt(pixels, "gaussian", 5, _generator()), (255 * expected).round().to(torch.uint8))
    large = corrupt(pixels.repeat_interleave(16, 2).repeat_interleave(16, 3), "gaussian", 5, _generator()).float()
    assert large.diff(dim=-1).abs().mean() < 5  # smooth within a grain
    grains = torch.nn.functional.avg_pool2d(large, 16)
    assert 0.6 * 25.5 < grains.std() < 25.5  # noise of single pixels would leave a sixteenth


def test_blur_grows_with_the_square_root_of_the_side() -> None:
    point = torch.zeros(1, 1, 129, 128, dtype=torch.uint8)
    point[0, 0, 64, 64] = 255
    spread = corrupt(point, "blur", 5, _generator())[0, 0]
    assert spread[64, 64].item() == pytest.approx(255 / (2 * torch.pi * 4), abs=1)  # two pixels at 128


@pytest.mark.parametrize("corruption", [name for name in CORRUPTIONS if name != "blur"])
def test_a_severity_costs_the_same_whatever_size_the_scene_is_stored_in(corruption: str) -> None:
    from bench.corruptions import measure

    scene = torch.nn.functional.interpolate(load("digits").test.pixels[:16].float(), (32, 32), mode="bilinear")
    stored = [torch.nn.functional.interpolate(scene, (side, side), mode="bilinear").to(torch.uint8) for side in (32, 512)]
    small, large = (measure(pixels, 224)[corruption] for pixels in stored)
    for (decibel, _), (of_large, _) in zip(small, large, strict=True):
        assert decibel == pytest.approx(of_large, abs=0.7)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("height_width", [(8, 8), (32, 20), (7, 7)])
def test_clutter_holds_the_image_where_the_box_says(background: str, height_width: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (5, 3, *height_width), dtype=torch.uint8, generator=_generator(1))
    canvas, boxes = clutter(pixels, background, _generator())
    assert canvas.dtype == torch.uint8 and boxes.dtype == torch.int64
    assert canvas.shape == (5, 3, *(round(1.5 * side) for side in height_width))
    for image, whole, (top, left, bottom, right) in zip(pixels, canvas, boxes.tolist(), strict=True):
        assert torch.equal(whole[:, top:bottom, left:right], image)
    again = clutter(pixels, background, _generator())
    assert torch.equal(canvas, again[0]) and torch.equal(boxes, again[1])


def test_places_reach_every_edge() -> None:
    boxes = clutter(_grey(0, 400), "noise", _generator())[1]
    assert boxes.min(0).values.tolist() == [0, 0, 32, 32]
    assert boxes.max(0).values.tolist() == [16, 16, 48, 48]


def test_noise_behind_an_object_is_uniform() -> None:
    canvas, _ = clutter(_grey(0, 100), "noise", _generator())
    behind = canvas[canvas > 0].float()
    assert behind.mean().item() == pytest.approx(128, abs=0.5)
    assert behind.std().item() == pytest.approx(255 / 12**0.5, rel=0.01)


def test_an_image_is_never_its_own_background() -> None:
    pixels = torch.arange(1, 7, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    backgrounds: list[set[int]] = [set() for _ in pixels]
    for seed in range(60):
        canvas, boxes = clutter(pixels, "images", _generator(seed))
        for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
            canvas[i, :, top:bottom, left:right] = 0
            backgrounds[i] |= set(canvas[i].unique().tolist()) - {0}
    assert backgrounds == [set(range(1, 7)) - {own} for own in range(1, 7)]


def test_backgrounds_from_other_images() -> None:
    canvas, boxes = clutter(_grey(0, 3), "images", _generator(), others=torch.stack([_grey(value, 1)[0] for value in (9, 10)]))
    assert set(canvas.unique().tolist()) == {0, 9, 10}
    assert ((canvas == 0).sum((1, 2, 3)) == 3 * 32 * 32).all() and len(boxes) == 3


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="no corruption named 'gausian'") as caught:
        corrupt(_grey(0, 1), "gausian", 1, _generator())
    assert "did you mean gaussian" in caught.value.hint
    for severity in (0, 6, True, 2.0):
        with pytest.raises(UserError, match="severity is"):
            corrupt(_grey(0, 1), "blur", severity, _generator())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no background named"):
        clutter(_grey(0, 1), "image", _generator())
    with pytest.raises(UserError, match="no other images"):
        clutter(_grey(0, 1), "images", _generator())
