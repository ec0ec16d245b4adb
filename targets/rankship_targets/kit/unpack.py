"""Makes a kit of its files, on the device in the board's own Python (3.9 or newer, standard library only).

`python unpack.py REQUEST` with a JSON object: `kit` (the folder to make), `lock` (text, kept in it), `wheels` and
`programs` (paths of archives), `launcher` (text of bin/python), `check` (Python code that must run in the new kit).
One rename makes the kit visible, after a check that it runs; exit status 3 means that it does not run here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

CHECK_TIMEOUT_S = 300
EXIT_UNFIT = 3


def main() -> int:
    """Unpack beside the final folder, check and rename; an interruption leaves no partial kit."""
    request: dict[str, Any] = json.loads(sys.argv[1])
    final = Path(request["kit"])
    for left in final.parent.glob("*.part"):  # from an installation that was killed; the lease excludes others
        shutil.rmtree(left, ignore_errors=True)
    part = final.with_name(final.name + ".part")
    try:
        unpack(request, part)
        failure = check(request, part)
        if failure:
            sys.stderr.write(failure + "\n")
            return EXIT_UNFIT
        os.sync()
        part.rename(final)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return 0


def unpack(request: dict[str, Any], part: Path) -> None:
    """Write packages, programs, launcher and lock."""
    for path in request["wheels"]:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(part / "site")
    for path in request["programs"]:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(part / "executorch")
        for program in (part / "executorch").iterdir():
            program.chmod(0o755)
    launcher = part / "bin" / "python"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(request["launcher"])
    launcher.chmod(0o755)
    (part / "lock.json").write_text(request["lock"])


def check(request: dict[str, Any], part: Path) -> str | None:
    """Import every runtime and start every program; returns what went wrong, or None."""
    argv = ["/bin/sh", str(part / "bin" / "python"), "-c", request["check"]]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_TIMEOUT_S, check=False)
    if done.returncode == 0:
        return None
    said = done.stderr.decode(errors="replace").strip()[-1500:]
    return said or f"ended with status {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
