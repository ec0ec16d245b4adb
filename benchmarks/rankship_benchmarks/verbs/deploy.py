"""The verb `deploy`: copies a finished build's artifacts to devices, and prints how an application loads them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankship_benchmarks.fleet.schedule import list_devices, read_jobs
from rankship_pipeline.foundation.artifact_key import VARIANTS, Variant
from rankship_pipeline.foundation.errors import InputError, Lacks
from rankship_pipeline.foundation.flags import parse, start_parser
from rankship_pipeline.foundation.formats import FACTS, FORMATS, Format
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.verbs import find_by_name
from rankship_targets.devices.device import find_device
from rankship_targets.session.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.store import Store
    from rankship_targets.devices.device import Device


@record
class Deployable:
    """An artifact whose signed manifest was read."""

    path: Path
    manifest: Manifest


def deploy(argv: list[str]) -> int:
    """`rankship deploy RECIPE|HASH|FILE --on DEVICE[,DEVICE]`: copy verified artifacts, print how to load each."""
    parser = start_parser(
        "deploy",
        "Copy verified artifacts to devices and print the code that loads them there.",
        "--on",
        "--inventory",
        "--store",
    )
    parser.add_argument("build", help="a recipe.toml, the first letters of a build's hash, or one verified artifact")
    parser.add_argument(
        "--format", action="append", choices=FORMATS, help="repeat for more (default: all that the device can run)"
    )
    parser.add_argument("--task", action="append", help="whose head to copy; repeat for more (default: every task's)")
    parser.add_argument("--variant", choices=VARIANTS, default="compressed", help="default: %(default)s")
    arguments = parse(parser, argv)

    from rich.console import Console

    from rankship_pipeline.foundation.console import Steps
    from rankship_pipeline.foundation.store import Store

    devices = [find_device(name, arguments.inventory) for name in list_devices(read_jobs(arguments.on))]
    store, tasks = Store(arguments.store), arguments.task
    chosen = find_deployables(arguments.build, arguments.variant, arguments.format, store, tasks)
    steps, console = Steps(), Console(highlight=False)
    for device in devices:
        for one, remote in deploy_to(device, chosen, any_format=arguments.format is not None, steps=steps):
            kind = one.manifest.verified.key.title
            console.print(f"{device.name}: {kind}: {remote}", soft_wrap=True, markup=False)
            if one.manifest.verified.key.task is not None:
                console.print("input: the backbone's output; output: this task's logits", markup=False)
            console.print(write_snippet(one.manifest.format, remote) + "\n", soft_wrap=True, markup=False)
    return 0


def find_deployables(
    name: str,
    variant: Variant,
    formats: Sequence[Format] | None,
    store: "Store",
    tasks: Sequence[str] | None = None,
) -> list[Deployable]:
    """Find the artifacts to deploy; ManifestRefused at the first that this user has not verified.

    Where tasks share a backbone, these are the backbone and the heads of `tasks` (None: of all).
    """
    if not name.endswith(".toml") and Path(name).is_file():
        one = Deployable(path=Path(name), manifest=read_manifest(Path(name)))
        if formats and one.manifest.format not in formats:
            raise InputError(f"{name} is {one.manifest.format}, not {', '.join(formats)}", hint="leave --format out")
        return [one]
    build, _ = find_by_name(name, store)
    artifacts, heads, shapes = (
        [one for one in some if one.key.variant == variant and one.key.format in (formats or FORMATS)]
        for some in (build.artifacts, build.heads, build.shapes)
    )
    missing = [wanted for wanted in formats or () if wanted not in {one.key.format for one in artifacts}]
    if missing or not artifacts:
        built = ", ".join(sorted({one.key.format for one in build.artifacts}))
        message = f"{build.recipe} was not built as {variant} {', '.join(missing)}".rstrip()
        raise InputError(message, hint=f"it was built as {built}")
    known = list(dict.fromkeys(one.key.task for one in heads))
    unknown = [task for task in tasks or () if task not in known]
    if unknown:
        hint = f"its tasks are {', '.join(map(str, known))}" if known else "its models share one head: leave --task out"
        raise InputError(f"{build.recipe} has no head of {', '.join(unknown)}", hint=hint)
    artifacts += [one for one in (*heads, *shapes) if tasks is None or one.key.task in {None, *tasks}]
    paths = [store.root / one.file for one in artifacts]
    return [Deployable(path=path, manifest=read_manifest(path)) for path in paths]


def deploy_to(
    device: "Device", deployables: Sequence[Deployable], *, any_format: bool, steps: "Steps"
) -> list[tuple[Deployable, str]]:
    """Push the artifacts that the device can run, or all if `any_format` (the application brings its own runtime)."""
    from rankship_targets.devices.installing import show_kit_install
    from rankship_targets.devices.quarantine import watching
    from rankship_targets.session.session import open_session

    with watching(device), open_session(device) as session:
        runtimes = session.probe().runtimes
        chosen = [one for one in deployables if any_format or runtimes.get(one.manifest.format) is not None]
        if not chosen:
            offered = ", ".join(one.manifest.format for one in deployables)
            hint = f"{show_kit_install(device.name)}; or name a --format whose runtime your application brings"
            raise Lacks(f"{device.name} has no runtime for {offered}", hint=hint)
        with steps.step(f"deploy to {device.name}"):
            return [(one, session.push(one.path, one.manifest.verified)) for one in chosen]


def write_snippet(artifact_format: Format, remote: str) -> str:
    """Return the code that loads an artifact from its path on the device."""
    json_path = json.dumps(remote, ensure_ascii=False)  # C++ reads strings as JSON writes them
    return FACTS[artifact_format].load_example.format(path=remote, json_path=json_path)
