"""The commit of the user's own repository that a night was built from, and the commits between two nights."""

import shutil
import subprocess
from pathlib import Path

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.frozen import record

_TIMEOUT_S = 60
_MOST_COMMITS = 20


@record
class Commit:
    """A commit by its hash; `clean` is whether the tree held nothing that the commit does not have."""

    commit: str
    clean: bool

    def __str__(self) -> str:
        """Return the hash's beginning, and whether the tree was clean."""
        return self.commit[:12] if self.clean else f"{self.commit[:12]} with changes that were not committed"


def read_commit(folder: Path) -> Commit:
    """Read the commit that is checked out in `folder`; files that git does not track do not make a tree unclean.

    InputError if git is missing or reads no commit there.
    """
    if shutil.which("git") is None:
        raise InputError("--git needs the program git, which was not found", hint="install git, or leave out --git")
    head = _ask(folder, "rev-parse", "--verify", "HEAD")
    changed = _ask(folder, "status", "--porcelain", "--untracked-files=no")
    if head.returncode or changed.returncode:
        why = (head.stderr or changed.stderr).strip().splitlines()[-1:]
        message = f"--git {folder}: git reads no commit there: {''.join(why)}"
        raise InputError(message, hint="name the folder of your repository, as a user who may read it")
    return Commit(commit=head.stdout.strip(), clean=not changed.stdout)


def list_commits(folder: Path | None, before: Commit | None, after: Commit | None) -> tuple[str, ...]:
    """List the commits after `before` up to `after`, newest first, each by hash and subject; at most twenty.

    Where a tree held changes, or the commits cannot be listed (`folder` is None, the history was rewritten), a line
    says so. Empty if a commit is not known, or nothing differs.
    """
    if before is None or after is None:
        return ()
    lines = []
    if before.commit != after.commit:
        between = f"{before.commit}..{after.commit}"
        if folder is not None:
            found = _ask(folder, "log", f"--max-count={_MOST_COMMITS + 1}", "--format=%h %s", between)
            lines = found.stdout.splitlines()
        if len(lines) > _MOST_COMMITS:
            lines = [*lines[:_MOST_COMMITS], "and earlier ones"]
        lines = lines or [f"{after.commit[:12]}, was {before.commit[:12]}"]
    dirty = [name for name, one in (("earlier", before), ("later", after)) if not one.clean]
    if dirty:
        lines.append(f"the tree of the {' and the '.join(dirty)} night held changes that were not committed")
    return tuple(lines)


def _ask(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
