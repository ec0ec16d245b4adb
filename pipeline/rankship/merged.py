"""Several trained models become one."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankship.calibration import name_models
from rankship.choices import choose_merge, choose_quality
from rankship.origin import Origin, open_origin
from rankship.recipe import Recipe
from rankship.report import describe_result
from rankship.wrapped import hash_state, unwrap, unwrap_name
from rankship_pipeline.factors.saved_model import save_model
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.foundation.quality import Fidelity, Score
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import MergeChoice, QualityChoice
from rankship_pipeline.recipe.merge_methods import MergeMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankship.calibration import Calibration, Tests


@dataclass(frozen=True, repr=False)
class Merged:
    """One model made of several, and what merging cost.

    `module` is an ordinary torch module in evaluation mode. `interference` is the share of each layer's output energy
    that merging costs, by its name; empty for one model. `fidelities` say how near it is to each model on that
    model's calibration inputs, and how it does that model's own tests; `accuracies` are those on all tests, first the
    models' own, empty where no tests were given.
    """

    module: "nn.Module"
    interference: Mapping[str, float]
    fidelities: tuple[Fidelity, ...]
    accuracies: tuple[Score, ...]
    origin: Origin
    made_sha256: str | None = None  # of the module's tensors as they were made

    @property
    def recipe(self) -> Recipe:
        """The recipe that was followed; what it holds of this session is marked `held`."""
        return self.origin.recipe

    def report(self) -> str:
        """What merging cost, as text."""
        return describe_result(
            None, self.origin.prepared.dense_parameters, self.fidelities, self.accuracies, self.interference
        )

    __repr__ = report

    def state_dict(self) -> "dict[str, Tensor]":
        """The module's tensors by their names."""
        return dict(self.module.state_dict())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the tensors, and a transformers model's configuration, for `load`; returns the folder."""
        save_model(Path(folder), self.module, None, self.origin.recipe_sha256)
        return Path(folder)

    save_pretrained = save

    def to_recipe(self, folder: str | os.PathLike[str] | None = None, *, factory: object = None) -> Recipe:
        """The recipe, or one whose files are written to `folder`; see `Compressed.to_recipe`."""
        return self.origin.write_recipe(folder, factory)


def merge(  # noqa: PLR0913 - its keywords are a recipe's keys
    models: "Mapping[str, nn.Module] | Sequence[nn.Module]",
    calibration: "Mapping[str, Calibration] | Sequence[Calibration] | None" = None,
    *,
    method: MergeMethod | MergeChoice = "joint",
    base: "nn.Module | None" = None,
    test: "Tests | Mapping[str, Tests] | None" = None,
    unlabelled: "Mapping[str, Calibration] | None" = None,
    quality: "str | QualityChoice | Callable[..., float] | None" = None,
    seed: int = 0,
    name: str = "merged",
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Merged:
    """Merge trained models of one architecture into one model; the stage of recipes, read from the store if known.

    Args:
        models: The trained modules, by name or in the order of `calibration`. Each takes tensors with samples first and
            gives a tensor, or several in tuples, mappings or dataclasses. They stay as they are.
        calibration: Unlabelled inputs of every model's own task, by the models' names or in their order: a tensor
            (samples, ...), a tuple of tensors where `forward` takes several, a mapping of names to tensors, or a
            DataLoader or list of such batches, of which the first 1,024 samples are taken and labels left out.
        method: The method's name, or a `MergeChoice` with its keys. "joint" is RegMean's closed form without its
            shrinkage (Jin et al. 2023, https://arxiv.org/abs/2212.09849, eq. 1): (Σ W·G)(Σ G)⁻¹ over every model's
            weights W and its inputs' Gram matrices G. docs/merging.md lists all sixteen.
        base: The module that all were trained from, for methods of task arithmetic.
        test: Inputs, as calibration is given, and labels: classes of samples, positions or pixels, or numbers of an
            output's shape; or a DataLoader of both. By a model's name: tests of its own task. None: no scores.
        unlabelled: More inputs for refinement, by the names of all models or some; all of a DataLoader are taken.
        quality: How answers are judged, where their kind is not to be seen from outputs and labels: "classification",
            "token-classification", "question-answering", "regression", "dense-map", "embedding", "language-model",
            "fidelity"; "file.py:function" for a score of your own, function(outputs, labels); or a `QualityChoice`.
        seed: What chance comes from, for the methods that use it.
        name: What the store and reports call it.
        store: The folder where every stage keeps its result; None: $RANKSHIP_STORE, else the user's cache.
        progress: Show each step on standard error, or in the notebook.

    Raises:
        InputError: Models, data or method do not fit; the message names which.
        MergeMismatch: The models differ in more than their values; every difference is listed.

    Example:
        >>> import torch
        >>> import rankship as rs
        >>> _ = torch.manual_seed(0)
        >>> a, b = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> inputs = {"a": torch.randn(20, 4), "b": torch.randn(20, 4)}
        >>> one = rs.merge([a, b], calibration=inputs, method="joint", progress=False)
        >>> one.module(inputs["a"]).shape
        torch.Size([20, 3])
        >>> sorted(one.interference)
        ['0']

    """
    origin = open_origin(
        name_models(models, calibration),
        calibration,
        base=base,
        test=test,
        unlabelled=unlabelled,
        merge=choose_merge(method),
        budget=Budget(kept_parameters=1.0),
        quality=choose_quality(quality),
        seed=seed,
        name=name,
        store=store,
        progress=progress,
    )
    return make_merged(origin)


def make_merged(origin: Origin) -> Merged:
    """The merged model of a recipe."""
    scores, recipe = Scores(origin.open_stages()), origin.recipe
    sources = scores.evaluate_sources()
    merged, interference = scores.stages.merge(recipe.merge.method)
    module = unwrap(merged.module)
    return Merged(
        module=module,
        interference={unwrap_name(layer, merged.module): cost for layer, cost in interference.items()},
        fidelities=scores.judge(merged, "merged"),
        accuracies=(*sources, *scores.evaluate(merged, "merged")),
        origin=origin,
        made_sha256=hash_state(module),
    )
