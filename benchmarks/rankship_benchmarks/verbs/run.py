"""The verbs that join the stages: `run`, `verify`, `bench` and `report`."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_pipeline.foundation.files import ensure_writable
from rankship_pipeline.foundation.flags import parse, start_parser

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rankship_benchmarks.bundle.suite import Suite
    from rankship_pipeline.flow.prompt import Prompt
    from rankship_pipeline.foundation.console import Steps

_MEASURING = ("--on", "--inventory", "--scheduler", "--keys", "--results", "--store")


def run(argv: list[str]) -> int:
    """`rankship run RECIPE [--suite SUITE] --on DEVICE[,DEVICE]`: from trained models to a measured report."""
    parser = start_parser(
        "run", "Build, verify, push, measure and report. An interrupted run resumes.", "--profile", *_MEASURING
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--suite", type=Path, default=None, help="the suite to measure with; it must name this recipe")
    parser.add_argument(
        "--prompt", default=None, help="a text that every file of a language model continues, after it is measured"
    )
    arguments = parse(parser, argv)

    from rankship_benchmarks.bundle.suite import read_suite_of
    from rankship_pipeline.foundation.profile_file import profile_to

    suite = None if arguments.suite is None else read_suite_of(arguments.recipe, arguments.suite)
    with profile_to(arguments.profile, "run"):
        _measure(arguments, arguments.recipe, suite, arguments.prompt, make_missing=True)
    return 0


def verify(argv: list[str]) -> int:
    """`rankship verify RECIPE`: run every artifact again in its own runtime and compare it with torch."""
    parser = start_parser(
        "verify", "Prove that every artifact computes what torch computes. Exit status 3 if not.", "--store"
    )
    parser.add_argument("recipe", type=Path)
    arguments = parse(parser, argv)

    from rich.console import Console

    from rankship_benchmarks.measure.host_gate import verify_on_host
    from rankship_benchmarks.report.words import print_parity
    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.store import Store
    from rankship_pipeline.verbs import find_built_recipe

    steps, store = Steps(), Store(arguments.store)
    recipe, build, _ = find_built_recipe(arguments.recipe, store, steps)
    verified = verify_on_host(build, store, recipe.parity, steps, fresh=True)
    print_parity(verified, Console(highlight=False))
    return 0


def bench(argv: list[str]) -> int:
    """`rankship bench SUITE --on DEVICE[,DEVICE]`: measure a finished build as a suite says."""
    parser = start_parser("bench", "Measure a built recipe on devices. An interrupted run resumes.", *_MEASURING)
    parser.add_argument("suite", type=Path)
    arguments = parse(parser, argv)

    from rankship_benchmarks.bundle.suite import read_suite

    suite, recipe = read_suite(arguments.suite)
    _measure(arguments, recipe, suite, None, make_missing=False)
    return 0


def report(argv: list[str]) -> int:
    """`rankship report RUN`: print the table and draw the page of one run, finished or not."""
    parser = start_parser("report", "Draw a run's table and page.")
    parser.add_argument("run", type=Path, help="a run's folder, as `rankship run` printed it")
    parser.add_argument("--to", type=Path, default=None, help="where to write the page (default: in the run's folder)")
    arguments = parse(parser, argv)

    from rankship_pipeline.foundation.console import Steps

    _report(arguments.run, arguments.to, Steps(), verbose=arguments.verbose)
    return 0


def _measure(
    arguments: argparse.Namespace, recipe: Path, suite: "Suite | None", text: str | None, *, make_missing: bool
) -> None:
    """Check flags, recipe, folders and devices first, so that mistakes show early; then build, verify and measure."""
    from rankship_benchmarks.bundle.suite import default_suite
    from rankship_benchmarks.fleet.measure import measure_devices, plan_measuring, raise_first
    from rankship_benchmarks.fleet.schedule import list_devices, read_jobs
    from rankship_benchmarks.measure.cases import list_wanted
    from rankship_benchmarks.verbs.where import open_lab, refuse_exam
    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.store import Store
    from rankship_pipeline.verbs import prepare_recipe
    from rankship_targets.devices.device import find_device

    jobs, steps, store = read_jobs(arguments.on), Steps(), Store(arguments.store)
    if suite is not None:
        refuse_exam(suite, arguments.scheduler)
    with open_lab(jobs, arguments) as lab:
        prepared = prepare_recipe(recipe, steps, store)
        suite = suite or default_suite(prepared.recipe.name, prepared.recipe.budget)

        from rankship_pipeline.flow.build import build_recipe, find_build  # now: this imports torch
        from rankship_pipeline.flow.prompt import continue_dense, read_prompt

        prompt = None if text is None else read_prompt(prepared, text)
        ensure_writable(arguments.store, "--store")
        ensure_writable(arguments.results, "--results")
        store.sweep()
        build = None if make_missing else find_build(prepared, store)[0]
        wanted = list_wanted(suite, prepared.recipe.export.formats)
        for device in list_devices(jobs):
            lab.check(device, wanted, steps, with_energy=suite.energy is not None)
        if make_missing and prepared.recipe.budget.on is not None:
            from rankship_benchmarks.costs.landing import land_missing

            land_missing(
                prepared, store, find_device(prepared.recipe.budget.on, arguments.inventory), arguments.results, steps
            )
        build = build or build_recipe(prepared, store, steps)[0]
        plan = plan_measuring(build, prepared, suite, store, arguments.results, steps, profile=True)
        plan = replace(plan, prompt=prompt.tokens if prompt else ())
        ended = measure_devices(jobs, partial(lab.measure, plan), steps, pauses_s=())
        runs = [one.result for one in ended.values() if one.result is not None]
        for folder in runs:
            _report(folder, None, steps, verbose=arguments.verbose)
        if prompt is not None and runs:
            _show_texts(runs, prompt, continue_dense(prepared, store, steps, prompt))
        raise_first(ended, steps)


def _show_texts(folders: "Sequence[Path]", prompt: "Prompt", dense: tuple[int, ...]) -> None:
    """Print what each run's files said after the prompt, beside dense torch."""
    from rich.console import Console

    from rankship_benchmarks.bundle.bundle import open_bundle
    from rankship_benchmarks.measure.continuations import read_continuations
    from rankship_benchmarks.report.continuation_words import print_continuations

    found = {open_bundle(folder).header.device: read_continuations(folder) for folder in folders}
    said = [(device, one) for device, known in found.items() for one in (known.said if known else ())]
    print_continuations(prompt, dense, said, Console(highlight=False))


def _report(folder: Path, page: Path | None, steps: "Steps", *, verbose: bool = False) -> None:
    from rich.console import Console

    from rankship_benchmarks.bundle.bundle import open_bundle
    from rankship_benchmarks.judge.summary import summarise
    from rankship_benchmarks.measure.device_accuracy import read_device_scores
    from rankship_benchmarks.report.accuracy_words import print_device_scores
    from rankship_benchmarks.report.delegate_words import print_delegates
    from rankship_benchmarks.report.energy_words import print_energy
    from rankship_benchmarks.report.page import write_report
    from rankship_benchmarks.report.words import print_summary

    summary = summarise(open_bundle(folder))
    with steps.step("draw the report"):
        written = write_report(folder, page)
    console = Console(highlight=False)
    print_summary(summary, console, verbose=verbose)
    print_energy(summary, console)
    print_delegates(summary, console)
    print_device_scores(read_device_scores(folder), summary.header.device, console)
    console.print(f"report: {written}", soft_wrap=True, markup=False)


def study(argv: list[str]) -> int:
    """`rankship study STUDY`: compute the missing cells of a study's table and draw its page."""
    parser = start_parser(
        "study",
        "Compare compression methods at several budgets on several models. An interrupted study resumes.",
        "--results",
        "--store",
    )
    parser.add_argument("study", type=Path)
    arguments = parse(parser, argv)

    from rich.console import Console

    from rankship_benchmarks.study.choices import read_study
    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.store import Store

    wanted = read_study(arguments.study)
    ensure_writable(arguments.results, "--results")
    ensure_writable(arguments.store, "--store")
    folder, at = arguments.results / f"study-{wanted.name}", arguments.study.resolve().parent
    console, steps, store = Console(highlight=False), Steps(), Store(arguments.store)
    page: Path | None = None
    if wanted.files:
        from rankship_benchmarks.study.file_lines import summarise_files
        from rankship_benchmarks.study.file_page import print_files, write_files
        from rankship_benchmarks.study.files import run_files
        from rankship_benchmarks.study.times import time_files
        from rankship_targets.session.runner import HostRunner

        files = run_files(wanted, at, folder, store, steps, HostRunner(wanted.threads))
        latency = time_files(files, folder, steps, rounds=wanted.rounds, threads=wanted.threads)
        lines = summarise_files(files, latency)
        print_files(lines, console)
        page = write_files(wanted.name, lines, folder) if lines else None
    else:
        from rankship_benchmarks.study.page import print_cells, write_page, write_summary
        from rankship_benchmarks.study.study import run_study

        cells = run_study(wanted, at, folder, store, steps)
        print_cells(cells, console)
        if cells:
            write_summary(wanted.name, cells, folder)
            page = write_page(wanted.name, cells, folder)
    if page is not None:
        Console(stderr=True).print(f"page: {page}", soft_wrap=True, markup=False)
    return 0
