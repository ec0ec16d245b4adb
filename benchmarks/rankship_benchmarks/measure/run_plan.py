"""What a run measures and how, before any device is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_benchmarks.bundle.suite import Suite
from rankship_pipeline.foundation.records import Artifact, Build, Verified
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice

if TYPE_CHECKING:
    from rankship_benchmarks.measure.exam import Exam


@dataclass(frozen=True)
class RunPlan:
    """What to measure, how, and where the results go: the same for every device.

    `verified` are the host's proofs of the build's artifacts, the canary and the heads, in this order. The device's own
    runtime must compute what torch computes within `limits`. `canary` is timed like the build's artifacts; heads are
    verified and not timed. With `profile`, a pass under the runtimes' own profilers follows (see profiles.py), without
    the canary. Files that generate then continue the `prompt`, token ids (see continuations.py; (): none). The run's
    bundle is made below `results`. `signers` are the public keys, besides this user's own, whose
    signed manifests are believed. With an `exam` every case is scored on the device.
    """

    build: Build
    verified: Sequence[Verified]
    store: Store
    suite: Suite
    results: Path
    limits: ParityChoice
    canary: Artifact | None = None
    profile: bool = False
    signers: tuple[str, ...] = ()
    prompt: tuple[int, ...] = ()
    exam: "Exam | None" = None
