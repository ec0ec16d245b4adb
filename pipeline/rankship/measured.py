"""Exported files measured on a device."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rankship.built import Built
from rankship.report import render
from rankship_benchmarks.bundle.bundle import open_bundle
from rankship_benchmarks.bundle.suite import Suite, check_suite, default_suite
from rankship_benchmarks.fleet.measure import Here, measure_devices, plan_measuring, raise_first
from rankship_benchmarks.fleet.schedule import Job
from rankship_benchmarks.judge.summary import Result, Summary, summarise
from rankship_benchmarks.measure.cases import list_wanted
from rankship_benchmarks.report.page import write_report
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import ensure_writable
from rankship_pipeline.foundation.flags import RESULTS
from rankship_targets.devices.device import find_device


@dataclass(frozen=True, repr=False)
class Measured:
    """A run on one device.

    `folder` holds every raw sample (trials.jsonl), `page` is its report. `summary` judges the run: times with their
    intervals, memory, energy where it was asked for, and every reason to distrust them.
    """

    folder: Path
    page: Path
    summary: Summary

    @property
    def results(self) -> tuple[Result, ...]:
        """One result per artifact; times are in nanoseconds."""
        return self.summary.results

    def report(self) -> str:
        """The tables that `rankship bench` prints, as text."""
        from rankship_benchmarks.report.words import print_summary

        return render([partial(print_summary, self.summary)])

    __repr__ = report


def measure(
    built: Built,
    on: str,
    suite: Suite | None = None,
    *,
    inventory: str | os.PathLike[str] | None = None,
    results: str | os.PathLike[str] = RESULTS,
    progress: bool = True,
) -> Measured:
    """Push the files to a device, prove them there again, and time them in interleaved rounds of fresh processes.

    Makes the same bundle and page as `rankship bench`; an interrupted run goes on.

    Args:
        built: What `export` or `run` gave.
        on: A device of the inventory: `rankship devices` lists them; "this-machine" is the host itself.
        suite: How often and how long, and whether energy is metered; None: six rounds, no energy.
        inventory: The file of devices; None: $RANKSHIP_DEVICES, else the user's own.
        results: The folder in which the run's folder is made.
        progress: Show each step on standard error, or in the notebook.

    Raises:
        InputError: No device has this name; the hint names the nearest.
        TargetError: The device, or the way to it, failed.
        MeasurementError: There are samples that must not be used.

    Example:
        >>> import torch
        >>> import rankship as rs
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> small = rs.compress(model, torch.randn(100, 32), kept_parameters=0.6, progress=False)
        >>> built = rs.export(small, "out", formats="onnx", progress=False)
        >>> suite = rs.Suite(recipe="mine", rounds=1, min_samples=5, min_duration_ms=1, max_warmup_ms=5, canary=False)
        >>> measured = rs.measure(built, on="this-machine", suite=suite, progress=False)
        >>> [result.key.variant for result in measured.results]
        ['dense', 'compressed']

    """
    chosen = suite or default_suite(built.build.recipe, built.recipe.budget)
    steps, to = Steps(quiet=not progress), Path(results)
    check_suite(chosen, "the suite")
    device = find_device(on, None if inventory is None else Path(inventory))
    ensure_writable(to, "results")
    lab, origin = Here({on: device}), built.origin
    lab.check(on, list_wanted(chosen, built.recipe.export.formats), steps, with_energy=chosen.energy is not None)
    plan = plan_measuring(built.build, origin.prepared, chosen, origin.store, to, steps, profile=True)
    ended = measure_devices([Job(name=on, devices=(on,))], partial(lab.measure, plan), steps, pauses_s=())
    raise_first(ended, steps)
    (folder,) = [one.result for one in ended.values() if one.result is not None]
    with steps.step("draw the report"):
        page = write_report(folder)
    return Measured(folder=folder, page=page, summary=summarise(open_bundle(folder)))
