"""An errand: what a host needs to measure a build on one of its devices, as text; its files travel by their hashes."""

from pathlib import Path

from rankship_benchmarks.bundle.suite import Suite
from rankship_benchmarks.measure.run_plan import RunPlan
from rankship_pipeline import __version__
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import Artifact, Build, Verified
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.export_choices import ParityChoice
from rankship_targets.client.agent_file import find_agent


@record
class Maker:
    """The code that makes trials: both ends of an errand must have the same."""

    version: str
    agent_sha256: str


@record
class Errand:
    """A RunPlan that travels; `files` are the paths in the store, with the SHA-256 of each, that it needs."""

    maker: Maker
    build: Build
    verified: tuple[Verified, ...]
    suite: Suite
    limits: ParityChoice
    canary: Artifact | None
    profile: bool
    prompt: tuple[int, ...]
    files: dict[str, str]


def describe_maker() -> Maker:
    """Describe this process's own code."""
    return Maker(version=__version__, agent_sha256=hash_file(find_agent()))


def refuse_other(maker: Maker, host: str) -> None:
    """Raise InputError if the sender's code is not this process's own."""
    own = describe_maker()
    if maker != own:
        shown = f"{maker.version} (agent {maker.agent_sha256[:8]})"
        message = f"{host} has rankship {own.version} (agent {own.agent_sha256[:8]}), this machine has {shown}"
        raise InputError(message, hint="install the same release on every host of the rack")


def write_errand(plan: RunPlan) -> Errand:
    """Describe a plan, with the content of every file of its artifacts' entries in the store.

    Its exam does not travel: `rankship_benchmarks.verbs.where` refuses one.
    """
    artifacts = plan.build.files if plan.canary is None else (*plan.build.files, plan.canary)
    folders = dict.fromkeys((plan.store.root / one.file).parent for one in artifacts)
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return Errand(
        maker=describe_maker(),
        build=plan.build,
        verified=tuple(plan.verified),
        suite=plan.suite,
        limits=plan.limits,
        canary=plan.canary,
        profile=plan.profile,
        prompt=plan.prompt,
        files={path.relative_to(plan.store.root).as_posix(): hash_file(path) for path in paths},
    )


def read_plan(errand: Errand, store: Store, results: Path, signers: tuple[str, ...]) -> RunPlan:
    """Return the plan again, with the host's own store and results."""
    return RunPlan(
        build=errand.build,
        verified=errand.verified,
        store=store,
        suite=errand.suite,
        results=results,
        limits=errand.limits,
        canary=errand.canary,
        profile=errand.profile,
        prompt=errand.prompt,
        signers=signers,
    )
