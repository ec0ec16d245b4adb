"""Packs the agent into the one file that is copied to devices; the same sources give the same bytes."""

import io
import zipfile
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from rankship_pipeline.foundation.files import write_atomic
from rankship_targets.devices.device import user_folder

_ENTRY = "from agent.main import main\n\nmain()\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest time a zip archive can hold


def pack_agent() -> bytes:
    """Return the archive's bytes: every module uncompressed, with fixed names, times and order (zipapp's layout)."""
    modules = {
        f"agent/{module.name}": module.read_bytes()
        for module in files("rankship_targets").joinpath("agent").iterdir()
        if module.name.endswith(".py")
    }
    modules["__main__.py"] = _ENTRY.encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # a bare interpreter may lack zlib
        for name in sorted(modules):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), modules[name])
    return packed.getvalue()


@cache
def find_agent() -> Path:
    """Return the path of the packed agent on this host; it is written if it is missing or damaged."""
    packed = pack_agent()
    path = user_folder("XDG_CACHE_HOME", ".cache") / "rankship" / "agents" / f"{sha256(packed).hexdigest()}.pyz"
    if not path.is_file() or path.read_bytes() != packed:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, packed)
    return path
