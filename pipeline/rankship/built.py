"""A compressed model as files that devices run, each proven to compute what torch computes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rankship.choices import choose_export
from rankship.compressed import Compressed
from rankship.origin import Origin, open_store
from rankship.recipe import Recipe
from rankship.report import render
from rankship.wrapped import refuse_changed
from rankship_benchmarks.measure.copies import name_copies, write_copies
from rankship_benchmarks.measure.host_gate import verify_on_host
from rankship_pipeline.factors.saved_model import refuse_shards, save_model
from rankship_pipeline.flow.build import build_recipe
from rankship_pipeline.foundation.artifact_key import Precision, Variant
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import ensure_writable
from rankship_pipeline.foundation.flags import RESULTS
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.records import Artifact, Build, RankPlan, Verified
from rankship_pipeline.recipe.export_choices import AxisChoice, ParityChoice


@dataclass(frozen=True, repr=False)
class Built:
    """Exported files and their proofs: the records of a recipe's build.

    `build` says what was made and how: the plan, every file with its size and hash, accuracies. `verified` are the
    proofs, one per file. `folder` holds copies of the files, None where they lie in the store alone.
    """

    build: Build
    verified: tuple[Verified, ...]
    folder: Path | None
    origin: Origin

    @property
    def plan(self) -> RankPlan:
        """How each layer is stored."""
        return self.build.plan

    @property
    def recipe(self) -> Recipe:
        """The recipe that was built."""
        return self.origin.recipe

    def to_recipe(self, folder: str | os.PathLike[str] | None = None, *, factory: object = None) -> Recipe:
        """The recipe with these formats, or one whose files are written to `folder`; see `Compressed.to_recipe`."""
        return self.origin.write_recipe(folder, factory)

    def find(
        self,
        format: Format,  # noqa: A002 - the field's word
        variant: Variant = "compressed",
        precision: Precision | None = None,
    ) -> Path:
        """The file of one variant in one format; of models with heads, the backbone's.

        Of several precisions the first that the recipe lists is taken, unless one is named.
        """
        for artifact in self.build.artifacts:
            key = artifact.key
            if (key.format, key.variant) == (format, variant) and precision in {None, key.precision}:
                return self.locate(artifact)
        made = ", ".join(artifact.key.title for artifact in self.build.artifacts)
        named = variant if precision is None else f"{variant} {precision}"
        raise InputError(f"no {named} {format} was exported", hint=f"there are {made}")

    def locate(self, artifact: Artifact) -> Path:
        """Where a file lies: its copy, else the store's own."""
        kept = self.origin.store.root / artifact.file
        return kept if self.folder is None else self.folder / name_copies(self.build)[artifact.file]

    def report(self) -> str:
        """Every file with its size and the lengths it takes, and how far its outputs are from torch's, as text."""
        from rankship_benchmarks.report.words import print_parity
        from rankship_pipeline.flow.show import describe_lengths, tabulate_files

        return render([tabulate_files(self.build), *describe_lengths(self.build), partial(print_parity, self.verified)])

    __repr__ = report


def export(
    model: Compressed,
    to: str | os.PathLike[str],
    formats: Format | Sequence[Format] | None = None,
    *,
    batch: tuple[int, int] | None = None,
    axes: Sequence[AxisChoice] = (),
    parity: ParityChoice | None = None,
    progress: bool = True,
) -> Built:
    """Export a compressed model, and the dense one beside it, and prove every file in its own runtime.

    These are the stages of recipes, with the same records: `measure` and `rankship bench` take them alike. The folder
    also holds what `save` writes, so that `load` reads the model again.

    Args:
        model: What `compress` gave.
        to: The folder for the files: `compressed.onnx`, `dense.onnx`, …, each with its signed manifest, and the records
            build.json, plan.json and parity.json beside them.
        formats: "onnx", "tflite", "executorch", or several; None: all whose toolchain is installed.
        batch: The smallest and the largest number of samples at once, such as (1, 8); None: always one. Files of ONNX
            and ExecuTorch take the whole range; of TFLite there is one file for each end.
        axes: Further axes that may vary, such as `AxisChoice(name="sequence", axis=1, range=(1, 128))`.
        parity: What every file must reach against torch, on how many samples; None: a recipe's defaults.
        progress: Show each step on standard error, or in the notebook.

    Raises:
        InputError: A format's toolchain is not installed; the hint says what to install. Or the model does not run over
            a whole range.
        UnsupportedOp: An exporter cannot lower an operator of the model.
        ParityFailed: A file does not compute what torch computes.

    Example:
        >>> import torch
        >>> import rankship as rs
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> small = rs.compress(model, torch.randn(100, 32), kept_parameters=0.6, progress=False)
        >>> built = rs.export(small, "out", formats="onnx", progress=False)
        >>> built.find("onnx").name, built.verified[0].min_cosine > 0.9999
        ('compressed.onnx', True)

    """
    if not isinstance(model, Compressed):
        raise InputError(
            f"a {type(model).__name__} cannot be exported as it is",
            hint="export what compress gives; compress(model, data, kept_parameters=1.0) leaves every layer whole",
        )
    refuse_changed(
        model.module,
        model.made_sha256,
        "compress the changed module: compress(small.module, inputs, …); or `save` it as it is",
    )
    folder = Path(to)
    ensure_writable(folder, "to")
    refuse_shards(folder)
    tables = {"export": choose_export(formats, batch, axes), "parity": parity or ParityChoice()}
    built = build(model.find_origin().change(progress=progress, **tables), folder)
    save_model(folder, model.module, model.plan, built.build.recipe_sha256)
    return built


def run(
    recipe: Recipe | str | os.PathLike[str],
    *,
    to: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    inventory: str | os.PathLike[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Built:
    r"""Build a recipe and prove every file, as `rankship build` and `rankship verify` do; `measure` takes the result.

    Args:
        recipe: A `Recipe`, or the path of its file.
        to: A folder for copies of the files; None: they lie in the store.
        folder: What the recipe's paths are relative to; None: its file's folder, or the current one.
        inventory: The file of devices, for a budget that is met by measuring on one; None: $RANKSHIP_DEVICES, else
            the user's own.
        store: The folder where every stage keeps its result; None: $RANKSHIP_STORE, else the user's cache.
        progress: Show each step on standard error, or in the notebook.

    Raises:
        InputError: The recipe, its models or its data are wrong; the message names the key.
        BuildError: A file could not be made, or does not compute what torch computes.

    Example:
        >>> import torch
        >>> from pathlib import Path
        >>> import rankship as rs
        >>> net = "from torch import nn\ndef make(): return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 10))"
        >>> _ = Path("net.py").write_text(net)
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 10))
        >>> small = rs.compress(model, torch.randn(100, 32), kept_parameters=0.6, progress=False)
        >>> built = rs.export(small, "out", formats="onnx", progress=False)
        >>> recipe = built.to_recipe("nightly", factory="net.py:make")
        >>> again = rs.run("nightly/recipe.toml", progress=False)
        >>> again.plan == small.plan
        True

    """
    if to is not None:
        ensure_writable(Path(to), "to")
    beside = Path.cwd()
    if not isinstance(recipe, Recipe):
        beside = Path(recipe).resolve().parent
        recipe = Recipe.read(recipe)
    origin = Origin(recipe.check(), open_store(store), Steps(quiet=not progress), Path(folder) if folder else beside)
    if recipe.budget.on is not None:
        _land(origin, recipe.budget.on, inventory)
    return build(origin, None if to is None else Path(to))


def build(origin: Origin, folder: Path | None) -> Built:
    """Build and prove a recipe's files, and copy them to a folder."""
    made, _ = build_recipe(origin.prepared, origin.store, origin.steps)
    verified = verify_on_host(made, origin.store, origin.recipe.parity, origin.steps)
    built = Built(build=made, verified=verified, folder=folder, origin=origin)
    if folder is not None:
        write_copies(made, verified, origin.store, folder)
    return built


def _land(origin: Origin, device: str, inventory: str | os.PathLike[str] | None) -> None:
    from rankship_benchmarks.costs.landing import land_missing
    from rankship_targets.devices.device import find_device

    found = find_device(device, None if inventory is None else Path(inventory))
    land_missing(origin.prepared, origin.store, found, RESULTS, origin.steps)
