"""Images of every kind become 8-bit RGB that looks alike, or are refused by name."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffvit.data.images import decode_rgb
from diffvit.errors import UserError

_ROW, _COLUMN = np.mgrid[0:48, 0:64]
GREY = (2 * _ROW + 2 * _COLUMN).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)


def _encoded(pixels: np.ndarray | Image.Image, form: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, form, **how)
    return buffer.getvalue()


def _tiff(values: np.ndarray, order: str = "<", white_is_zero: bool = False, orientation: int = 1) -> bytes:
    """An uncompressed TIFF of one band or three, of any type, which Pillow cannot write."""
    bands, bits = values.shape[2] if values.ndim == 3 else 1, 8 * values.dtype.itemsize
    data, kind = values.astype(values.dtype.newbyteorder(order)).tobytes(), {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    lists = struct.pack(f"{order}{2 * bands}H", *[bits] * bands, *[kind] * bands)
    tags = {
        256: (4, 1, values.shape[1]), 257: (4, 1, values.shape[0]), 258: (3, bands, 8 if bands > 1 else bits), 259: (3, 1, 1),
        262: (3, 1, 2 if bands > 1 else int(not white_is_zero)), 273: (4, 1, 8 + len(lists)), 274: (3, 1, orientation),
        277: (3, 1, bands), 278: (4, 1, values.shape[0]), 279: (4, 1, len(data)), 339: (3, bands, 8 + 2 * bands if bands > 1 else kind),
    }  # fmt: skip
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(lists) + len(data))
    entries = [
        struct.pack(f"{order}HHIHH", tag, form, count, value, 0) if (form, count) == (3, 1) else struct.pack(f"{order}HHII", tag, form, count, value)
        for tag, (form, count, value) in sorted(tags.items())
    ]  # fmt: skip
    return start + lists + data + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + struct.pack(f"{order}I", 0)


def _with_alpha(pixels: np.ndarray, alpha: int) -> Image.Image:
    image = Image.fromarray(pixels)
    image.putalpha(Image.new("L", image.size, alpha))
    return image


def _frames(form: str, *pages: np.ndarray, **how: Any) -> bytes:
    first, *others = map(Image.fromarray, pages)
    return _encoded(first, form, save_all=True, append_images=others, **how)


def _with_thumbnail() -> bytes:
    from PIL import TiffImagePlugin

    directory, buffer = TiffImagePlugin.ImageFileDirectory_v2(), io.BytesIO()
    directory[254] = 1  # a smaller copy of another page
    with TiffImagePlugin.AppendingTiffWriter(buffer, True) as writer:
        Image.fromarray(RGB).save(writer, "TIFF")
        writer.newFrame()
        Image.fromarray(RGB[::4, ::4]).save(writer, "TIFF", tiffinfo=directory)
    return buffer.getvalue()


DEEP = GREY.astype(np.uint16) * 257
SHARE = (GREY / 255).astype(np.float32)
ALIKE = {
    "16-bit grey PNG": (_encoded(DEEP), GREY),
    "16-bit grey PGM": (_encoded(DEEP, "PPM"), GREY),
    "16-bit grey TIFF": (_tiff(DEEP), GREY),
    "16-bit grey TIFF, big endian": (_tiff(DEEP, ">"), GREY),
    "16-bit grey TIFF, white is zero": (_tiff(65535 - DEEP, white_is_zero=True), GREY),
    "16-bit grey TIFF, lying": (_tiff(np.rot90(DEEP), orientation=6), GREY),
    "32-bit grey TIFF": (_tiff(GREY.astype(np.uint32) * 0x01010101), GREY),
    "float TIFF": (_tiff(SHARE), GREY),
    "float TIFF, big endian": (_tiff(SHARE, ">"), GREY),
    "float TIFF, white is zero": (_tiff(1 - SHARE, white_is_zero=True), GREY),
    "16-bit RGB TIFF": (_tiff(RGB.astype(np.uint16) * 257), RGB),
    "grey PNG": (_encoded(GREY), GREY),
    "grey TIFF, white is zero": (_tiff(255 - GREY, white_is_zero=True), GREY),
    "RGB TIFF": (_encoded(RGB, "TIFF"), RGB),
    "opaque RGBA": (_encoded(_with_alpha(RGB, 255)), RGB),
    "opaque grey with alpha": (_encoded(_with_alpha(GREY, 255)), GREY),
    "transparent grey level that no pixel has": (_encoded(GREY, transparency=255), GREY),
    "palette": (_encoded(Image.fromarray(GREY).quantize(256)), GREY),
    "one bit": (_encoded(Image.fromarray(GREY > 99)), np.where(GREY > 99, 255, 0)),
    "CMYK JPEG": (_encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=100, subsampling=0), RGB),
    "CMYK TIFF": (_encoded(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB),
    "YCbCr TIFF": (_encoded(Image.fromarray(RGB).convert("YCbCr"), "TIFF"), RGB),
    "camera's JPEG of two frames": (_frames("MPO", RGB, GREY, quality=100, subsampling=0), RGB),
    "TIFF with a thumbnail": (_with_thumbnail(), RGB),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_the_picture_is_the_same(kind: str) -> None:
    content, expected = ALIKE[kind]
    image = decode_rgb(content, "a.tif")
    expected = expected if expected.ndim == 3 else np.stack([expected] * 3, axis=-1)
    assert image.mode == "RGB" and image.size == (64, 48)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= (4 if "JPEG" in kind or "YCbCr" in kind else 0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_camera_that_was_held_upright_is_believed(form: str) -> None:
    exif = Image.Exif()
    exif[274] = 6
    upright = np.asarray(decode_rgb(_encoded(RGB, form, exif=exif), "a")).astype(int)
    assert upright.shape == (64, 48, 3) and np.abs(upright - np.rot90(RGB, -1)).mean() < 3


REFUSED = {
    "float TIFF of 0 to 255": (_tiff(GREY.astype(np.float32)), "numbers from 0 to 220"),
    "float TIFF below 0": (_tiff(SHARE - 0.5), "numbers from -0.5"),
    "float TIFF without a number": (_tiff(np.where(GREY == 2, np.nan, SHARE).astype(np.float32)), "nan"),
    "float TIFF that is nearly black": (_tiff(SHARE / 100), "would be black"),
    "signed TIFF": (_tiff(DEEP.view(np.int16)), "signed"),
    "signed TIFF, big endian": (_tiff(GREY.astype(np.int16), ">"), "signed"),
    "8 bits in 16": (_tiff(GREY.astype(np.uint16)), "would be black"),
    "12 bits in 16": (_tiff(np.minimum(GREY.astype(np.uint16) * 19, 4095)), "would be black"),
    "12 bits in 16, inverted": (_tiff(np.minimum(GREY.astype(np.uint16) * 19, 4095), white_is_zero=True), "would be black"),
    "12 bits in 16, RGB": (_tiff(RGB.astype(np.uint16) * 16), "would be black"),
    "8 bits in 16, RGB": (_tiff(RGB.astype(np.uint16)), "would be black"),
    "transparent": (_encoded(_with_alpha(RGB, 0)), "transparent"),
    "half transparent": (_encoded(_with_alpha(GREY, 128)), "transparent"),
    "transparent colour": (_encoded(RGB, transparency=tuple(map(int, RGB[3, 3]))), "transparent"),
    "transparent colour of a palette": (_encoded(Image.fromarray(GREY).quantize(256), transparency=7), "transparent"),
    "Lab": (_encoded(Image.frombytes("LAB", (64, 48), RGB.tobytes()), "TIFF"), "LAB"),
    "two pages": (_frames("TIFF", RGB, GREY), "2 frames"),
    "film": (_frames("GIF", GREY, GREY[::-1].copy()), "2 frames"),
    "CMYK of nobody knows which kind": (
        _encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG").replace(b"\xff\xee\x00\x0eAdobe", b"\xff\xe9\x00\x0eNobod"), "inverted",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_must_be_guessed_is_refused_by_name(kind: str) -> None:
    content, why = REFUSED[kind]
    with pytest.raises(UserError, match=why) as refused:
        decode_rgb(content, "iv007.tif")
    assert refused.value.message.startswith("iv007.tif cannot be used: ") and "8-bit RGB" in refused.value.hint


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
@pytest.mark.filterwarnings("error")
def test_a_truncated_file_is_refused_by_name(form: str, share: float) -> None:
    content = _encoded(RGB, form)
    with pytest.raises(UserError, match=r"^iv007\.tif cannot be decoded: "):
        decode_rgb(content[: int(share * len(content))], "iv007.tif")


def test_a_pointer_instead_of_an_image_says_what_to_do() -> None:
    with pytest.raises(UserError, match="LFS pointer") as refused:
        decode_rgb(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "iv007.tif")
    assert "git lfs pull" in refused.value.hint
