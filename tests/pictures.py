"""Pictures, and tables of them as the hub has data sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(number: int, size: int = 32) -> bytes:
    """An image whose top left pixel says which it is."""
    pixels = np.random.RandomState(number).randint(0, 256, (size, size, 3)).astype(np.uint8)
    pixels[0, 0] = number
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def structs(images: list[bytes]) -> list[dict[str, Any]]:
    """Encoded images as the hub's tables have them."""
    return [{"bytes": image, "path": None} for image in images]


def write_split(folder: Path, split: str, **columns: Any) -> None:
    """A split's table, in a folder that may have to be made."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}.parquet")
