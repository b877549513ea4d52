"""Encoded images of whatever kind as 8-bit RGB. What cannot be converted without losing the picture is refused by name.

Integers are scaled by their type, numbers with a point where they are within 0 to 1; EXIF orientations are applied; an opaque alpha
channel is dropped. Refused is what must be guessed: what lies behind transparent parts, which of several frames is meant, how bright
other numbers are, and colours for which there is no rule.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from diffvit.errors import UserError

# What Pillow converts to RGB by a rule. CMYK without a profile is what screens show of it.
_CONVERTED = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_LFS_POINTER = b"version https://git-lfs"
# Of 255. An image of more than 8 bits that is no brighter holds numbers of 12 bits or fewer in a larger type: it would be black.
_DARK = 16

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT, _SUBFILE_TYPE = 258, 262, 339, 254  # TIFF tags


def decode_rgb(content: bytes, file: str) -> Image.Image:
    """An encoded image as an RGB image of Pillow.

    Args:
        file: what messages call it.

    Raises:
        UserError: it is damaged, or no rule says what it looks like in 8-bit RGB.
    """
    if is_lfs_pointer(content):
        raise lfs_pointer(file)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            return _rgb(image, content)
    except _RefusedError as refused:
        raise UserError(f"{file} cannot be used: {refused}.", "convert the data set's images to 8-bit RGB.") from None
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        why = "it is no image, or of an unknown format" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
        raise UserError(f"{file} cannot be decoded: {why[:200].rstrip('.')}.", "download the data again.") from error


def squeezed(image: Image.Image, side: int) -> np.ndarray:
    """An RGB image as uint8 [3, side, side]: the whole of it, since its label holds for all of it, so nothing is cropped away."""
    square = image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(square).transpose(2, 0, 1)


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file's content is a Git LFS pointer, in place of a large file that was not fetched."""
    return content.startswith(_LFS_POINTER)


def lfs_pointer(file: str) -> UserError:
    """The error for such a file."""
    return UserError(f"{file} is a Git LFS pointer instead of the file itself.", "bring the files with `git lfs pull` in their repository.")


class _RefusedError(Exception):
    """Why an image is not used."""


def _rgb(image: Image.Image, content: bytes) -> Image.Image:
    _seek_only_frame(image)
    bits = _bits(image, content)
    tags = getattr(image, "tag_v2", {})
    inverted, signed = tags.get(_PHOTOMETRIC) == 0, tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
    ImageOps.exif_transpose(image, in_place=True)
    numbers = image.mode == "F" or image.mode.startswith("I")
    if numbers:
        share = _float_share(np.asarray(image)) if image.mode == "F" else _integer_share(np.asarray(image), bits, signed)
        image = Image.fromarray(np.rint(255 * share).astype(np.uint8))
    elif image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            raise _RefusedError("parts of it are transparent, and nothing says what lies behind them")
    elif image.mode not in _CONVERTED:
        raise _RefusedError(f"there is no rule for its colours, {image.mode}")
    elif image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:  # Pillow takes it for one of Adobe's
        raise _RefusedError("nothing says whether its CMYK colours are inverted")
    image = image.convert("RGB")
    if bits > 8 and np.asarray(image).max() <= _DARK:
        raise _RefusedError(f"its values use no more than a sixteenth of their {bits} bits, so that it would be black")
    return ImageOps.invert(image) if numbers and inverted else image  # Pillow inverts what has 8 bits by itself


def _seek_only_frame(image: Image.Image) -> None:
    """Seek the frame that is the picture: the only one that is not a thumbnail of another."""
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or image.format == "MPO":  # a camera's JPEG: its first frame is the picture, by its standard
        return
    whole = []
    for frame in range(frames):
        image.seek(frame)
        if not getattr(image, "tag_v2", {}).get(_SUBFILE_TYPE, 0) & 1:
            whole.append(frame)
    if len(whole) != 1:
        raise _RefusedError(f"it has {frames} frames, and nothing says which is the picture")
    image.seek(whole[0])


def _bits(image: Image.Image, content: bytes) -> int:
    """Bits of a sample in the file, 8 where the format says nothing."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,)))  # type: ignore[attr-defined]
    if image.format == "PNG":
        return content[24]  # of its header
    return 16 if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM") else 8


def _integer_share(values: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Integers of a grey image as parts of the largest of their type."""
    if signed:
        raise _RefusedError("it holds signed integers, and nothing says which is black")
    if bits <= 8:
        raise _RefusedError("the range of its integers is unknown")
    if values.dtype == np.int32 and bits == 32:
        values = values.view(np.uint32)  # Pillow has no unsigned type of 32 bits
    return values / (2**bits - 1)


def _float_share(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise _RefusedError(f"it holds numbers from {low:g} to {high:g}, and only those from 0 to 1 have a brightness by themselves")
    return values
