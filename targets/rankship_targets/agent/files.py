"""Files of the agent's own that are either whole or absent."""

from __future__ import annotations

import os


def write_durably(path: str, text: str) -> None:
    """Replace a file in one step, on disk when this returns."""
    part, folder = f"{path}.part", os.path.dirname(path)  # noqa: PTH120 - names, not paths
    with open(part, "w", encoding="utf-8") as stream:  # noqa: PTH123 - as above
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)  # noqa: PTH105 - as above
    sync_folder(folder)


def sync_folder(folder: str) -> None:
    """Return when the names in a folder are on disk: a power cut forgets new ones otherwise."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
