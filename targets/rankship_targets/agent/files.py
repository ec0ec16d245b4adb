"""Writes the agent's own files, each of them complete or not at all."""

from __future__ import annotations

import os


def write_durably(path: str, text: str) -> None:
    """Replace a file atomically; it is on disk when this returns."""
    part, folder = f"{path}.part", os.path.dirname(path)  # noqa: PTH120 - names, not paths
    with open(part, "w", encoding="utf-8") as stream:  # noqa: PTH123 - as above
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)  # noqa: PTH105 - as above
    sync_folder(folder)


def sync_folder(folder: str) -> None:
    """Flush a folder's list of names to disk: without this, a power cut may lose new files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
