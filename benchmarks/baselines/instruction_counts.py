# ruff: noqa: INP001 - a script, no package
"""Instructions per inference on a virtual Cortex-A72, dense and compressed; these are not times of any board.

    python benchmarks/baselines/instruction_counts.py pipeline/recipes/digits.toml --out instruction_counts.json

Builds and verifies the recipe (using the store), boots a virtual machine whose clock advances one nanosecond per
instruction, installs a kit with ExecuTorch's runner on it, and counts every artifact several times, each in a fresh
process there, dense and compressed in turn. Needs root, qemu-system-arm and Debian's arm64 packages.
"""

import argparse
import json
import platform
import statistics
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rankship_benchmarks.measure.host_gate import find_inputs, verify_on_host
from rankship_pipeline.flow.build import build_recipe
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.records import Artifact, Verified
from rankship_pipeline.foundation.store import Store, default_root
from rankship_pipeline.verbs import prepare_recipe
from rankship_targets.client.connect import open_transport
from rankship_targets.kit.build import build_kit
from rankship_targets.kit.install import install_kit
from rankship_targets.kit.system import ask_system
from rankship_targets.session.instructions import SAMPLES, Instructions, count_instructions
from rankship_targets.session.session import open_session
from rankship_targets.twin.machine import Machine, boot
from rankship_targets.twin.machine_files import QEMU, describe_machine

LABEL = "instructions of one inference (batch of 1, one thread) on a virtual Cortex-A72 without caches; no time of a Pi"
Counts = dict[str, list[Instructions]]


def main() -> None:
    """Count and write the figures with their conditions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--store", type=Path, default=default_root())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    steps, store = Steps(), Store(chosen.store)
    prepared = prepare_recipe(chosen.recipe, steps)
    build, _ = build_recipe(prepared, store, steps)
    proofs = verify_on_host(build, store, prepared.recipe.parity, steps)
    proven = list(zip(build.artifacts, proofs, strict=True))
    report = {
        "label": LABEL,
        "recipe": build.recipe,
        "recipe_sha256": build.recipe_sha256,
        "counted_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "repeats": chosen.repeats,
        "least_inferences_per_repeat": SAMPLES,
        **count_all(proven, find_inputs(build.artifacts, store), store, chosen.repeats, steps),
    }
    write_atomic(chosen.out, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


def count_all(
    proven: list[tuple[Artifact, Verified]], inputs: list[Path], store: Store, repeats: int, steps: Steps
) -> dict[str, object]:
    """Boot one machine and count every artifact in turn; returns the counts and the conditions."""
    with steps.step("boot the machine that counts"):
        machine = boot(icount=True, name="counting-pi")
    with machine:
        with steps.step("build and install its kit"):
            machine = install_runner(machine)
        with open_session(machine.device) as session:
            probe = session.probe()
        able = [(artifact, proof) for artifact, proof in proven if probe.runtimes.get(artifact.key.format) is not None]
        counts: Counts = {}
        with steps.track("count", repeats * len(able)) as advance:
            for number in range(repeats):
                for artifact, proof in able:
                    name = artifact.key.heading
                    advance(f"repeat {number + 1}/{repeats}: {name}")
                    counted = count_instructions(machine, store.root / artifact.file, proof, inputs)
                    counts.setdefault(name, []).append(counted)
    formats = dict.fromkeys(artifact.key.format for artifact, _ in able)
    return {
        "conditions": {
            "machine": [QEMU, *describe_machine(1), "-accel", "tcg", "-icount", "shift=0"],
            "qemu": subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[
                0
            ],
            "guest_kernel": probe.kernel,
            "guest_python": probe.python,
            "host": f"{platform.system()} {platform.machine()}",
        },
        "artifacts": {name: describe(found) for name, found in counts.items()},
        "compressed_over_dense": {
            kind: ratio(counts[f"{kind} compressed"], counts[f"{kind} dense"]) for kind in formats
        },
        "not_counted": sorted({artifact.key.format for artifact, _ in proven} - set(formats)),
    }


def install_runner(machine: Machine) -> Machine:
    """Install the missing runtimes on the machine as a kit; the returned device uses the kit's Python."""
    with open_transport(machine.device) as transport:
        system = ask_system(transport, machine.device)
        lock, folder = build_kit(system, machine.device.name, ["executorch"], lambda _: None)
        installed = install_kit(transport, machine.device, lock, folder, lambda _: None)
    return replace(machine, device=replace(machine.device, python=installed.python))


def describe(found: list[Instructions]) -> dict[str, object]:
    """Return each repeat's count, and their spread."""
    counts = [one.per_inference for one in found]
    samples = [sample for one in found for sample in one.samples]
    return {
        "runtime": f"{found[0].runtime} {found[0].runtime_version}",
        "artifact_sha256": found[0].artifact_sha256,
        "per_inference": round(statistics.median(counts)),
        "per_inference_by_repeat": counts,
        "spread_of_repeats": (max(counts) - min(counts)) / min(counts),
        "spread_of_single_inferences": (max(samples) - min(samples)) / min(samples),
        "first_inference_by_repeat": [one.first_inference for one in found],
        "loading_by_repeat": [one.loading for one in found],
    }


def ratio(compressed: list[Instructions], dense: list[Instructions]) -> dict[str, float]:
    """Return the ratio of counts, paired by repeat."""
    ratios = [one.per_inference / other.per_inference for one, other in zip(compressed, dense, strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


if __name__ == "__main__":
    main()
