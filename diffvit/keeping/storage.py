"""Opens the storage at a path or URL."""

from __future__ import annotations

from diffvit.keeping.base import Storage
from diffvit.keeping.hub import HubStorage
from diffvit.keeping.saving import is_on_hub

__all__ = ["Storage", "open_storage"]


def open_storage(url: str) -> Storage:
    """The storage at a path or URL; hf://user/name is a repository on the Hugging Face hub. Raises UserError."""
    if is_on_hub(url):  # either import takes time
        return HubStorage(url)
    from diffvit.keeping.objects import ObjectStorage

    return ObjectStorage(url)
