"""Headers and bundles of runs, in memory and on disk."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from make.builds import make_build
from rankship_benchmarks.bundle.bundle import (
    Bundle,
    Header,
    append_metered,
    append_trial,
    create_bundle,
    finish_bundle,
    open_bundle,
    writing,
)
from rankship_pipeline.foundation.records import Build
from rankship_targets.trials.trial import Trial


def make_header(build: Build | None = None, **changes: Any) -> Header:  # noqa: ANN401 - any field
    """The header of the run "one" of a build on pi4."""
    build = build or make_build()
    header = Header(
        run_id="one",
        created_utc="2025-01-01T00:00:00+00:00",
        suite_sha256="s",
        recipe=build.recipe,
        recipe_sha256="r",
        build_sha256="b",
        device="pi4",
        build=build,
        verified=(),
        rounds=3,
        conditions={},
        rankship_version="0",
    )
    return replace(header, **changes)


def change_trial(bundle: Bundle, place: int, **changes: Any) -> Bundle:  # noqa: ANN401 - any field
    """The same bundle with one trial changed."""
    trials = list(bundle.trials)
    trials[place] = replace(trials[place], **changes)
    return replace(bundle, trials=tuple(trials))


def change_trials(bundle: Bundle, **changes: Any) -> Bundle:  # noqa: ANN401 - any field
    """The same bundle with every trial changed."""
    return replace(bundle, trials=tuple(replace(trial, **changes) for trial in bundle.trials))


def change_header(bundle: Bundle, **changes: Any) -> Bundle:  # noqa: ANN401 - any field
    """The same bundle under another header."""
    return replace(bundle, header=replace(bundle.header, **changes))


def start_bundle(folder: Path, header: Header, *trials: Trial) -> Path:
    """Write a run that was broken off after these trials."""
    create_bundle(folder, header)
    with writing(folder):
        for trial in trials:
            append_trial(folder, trial)
    return folder


def keep(folder: Path, bundle: Bundle) -> Path:
    """Write a run as measuring does, going on with what is there of it."""
    if not folder.exists():
        create_bundle(folder, bundle.header)
    there = open_bundle(folder)
    with writing(folder):
        for trial in bundle.trials[len(there.trials) :]:
            append_trial(folder, trial)
        for one in bundle.metered[len(there.metered) :]:
            append_metered(folder, one)
        if bundle.finished:
            finish_bundle(folder)
    return folder
