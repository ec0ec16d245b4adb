"""A trained model, or several merged, compressed to a budget."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankship.choices import choose_budget, choose_factors, choose_precision, choose_quality, choose_ranks
from rankship.merged import Merged
from rankship.origin import Origin, open_origin
from rankship.recipe import Recipe
from rankship.report import describe_result
from rankship.wrapped import hash_state, refuse_changed, unwrap, unwrap_plan
from rankship_pipeline.factors.saved_model import load_model, save_model
from rankship_pipeline.flow.landed_budget import settle_budget
from rankship_pipeline.flow.rounded import list_rounded, round_model
from rankship_pipeline.flow.scores import Scores
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.quality import Fidelity, Score
from rankship_pipeline.foundation.records import RankPlan, Refinement
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import (
    FactoriseChoice,
    MergeChoice,
    QualityChoice,
    RankChoice,
    RefineChoice,
    Whitening,
    choose,
)
from rankship_pipeline.recipe.precision import PrecisionChoice
from rankship_pipeline.recipe.rank_methods import RankMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankship.calibration import Calibration, Tests
    from rankship_pipeline.foundation.artifact_key import Precision


@dataclass(frozen=True, repr=False)
class Compressed:
    """A compressed model, how each layer is stored, and what that costs.

    `module` is an ordinary torch module in evaluation mode, float32 on the CPU, whose planned layers are a Sequential
    of smaller ones; of a transformers model, that model. `plan` says how each layer is stored and what it loses.
    `dense_parameters` are the model's before it was compressed. `fidelities` say how near it is to each model
    that it is made of; `accuracies` are those on tests, before and after, empty where none were given. `origin` is what
    it was made from, None where it was loaded from a folder: then nothing but the module and the plan is known.
    """

    module: "nn.Module"
    plan: RankPlan
    dense_parameters: int | None = None
    fidelities: tuple[Fidelity, ...] = ()
    accuracies: tuple[Score, ...] = ()
    refinement: Refinement | None = None
    origin: Origin | None = None
    made_sha256: str | None = None  # of the module's tensors as they were made

    @property
    def recipe(self) -> Recipe:
        """The recipe that was followed; what it holds of this session is marked `held`."""
        return self.find_origin().recipe

    def report(self) -> str:
        """Parameters before and after, how well the model agrees, and what every layer loses, as text."""
        return describe_result(
            self.plan, self.dense_parameters, self.fidelities, self.accuracies, {}, refinement=self.refinement
        )

    __repr__ = report

    def state_dict(self) -> "dict[str, Tensor]":
        """The module's tensors by their names: `<layer>.0.weight`, `<layer>.1.weight`, … for planned layers."""
        return dict(self.module.state_dict())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write safetensors, the plan, and a transformers model's configuration, for `load`; returns the folder.

        Each file is replaced in one step. No code is written, and no pickle.

        Example:
            >>> import torch
            >>> import rankship as rs
            >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
            >>> small = rs.compress(model, torch.randn(100, 32), kept_parameters=0.6, progress=False)
            >>> sorted(path.name for path in small.save("out").iterdir())
            ['model.safetensors', 'rankship.json']

        """
        origin = self.origin
        save_model(Path(folder), self.module, self.plan, None if origin is None else origin.recipe_sha256)
        return Path(folder)

    save_pretrained = save

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], into: "nn.Module | None" = None) -> "Compressed":
        """A saved compressed model with its plan; see `load`."""
        module, saved = load_model(Path(folder), into)
        if saved.plan is None:
            raise InputError(f"{folder} holds a merged model, nothing in it is factored", hint="use rankship.load")
        return cls(module=module, plan=saved.plan)

    def to_recipe(self, folder: str | os.PathLike[str] | None = None, *, factory: object = None) -> Recipe:
        r"""The recipe that was followed; with a folder, one that builds the same there, without this session.

        Args:
            folder: Where to write recipe.toml, the weights and the data as safetensors, a loader, and what makes the
                model: a transformers model's own folder, or a class or function without arguments. None: only give the
                recipe, whose models and data are marked `held`.
            factory: What makes the untrained architecture, where that cannot be seen from the model's class:
                "file.py:function" (the file is copied beside the recipe) or an importable function or class.

        Raises:
            InputError: Nothing importable makes the architecture, as for classes typed into a notebook.

        Example:
            >>> import torch
            >>> from pathlib import Path
            >>> import rankship as rs
            >>> net = "from torch import nn\ndef make(): return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 10))"
            >>> _ = Path("net.py").write_text(net)
            >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 10))
            >>> small = rs.compress(model, torch.randn(100, 32), kept_parameters=0.6, progress=False)
            >>> recipe = small.to_recipe("nightly", factory="net.py:make")
            >>> recipe.models[0].factory, rs.Recipe.read("nightly/recipe.toml") == recipe
            ('net.py:make', True)

        """
        return self.find_origin().write_recipe(folder, factory)

    def find_origin(self) -> Origin:
        """What it was made from; InputError for a model that was loaded from a folder."""
        if self.origin is None:
            raise InputError(
                "this model was loaded from a folder: its recipe and data are not known",
                hint="compress it in this session, or build its recipe",
            )
        return self.origin

    def _repr_html_(self) -> str:
        return self.plan._repr_html_()


def compress(  # noqa: PLR0913 - its keywords are a recipe's keys
    model: "nn.Module | Merged",
    calibration: "Calibration | None" = None,
    *,
    kept_parameters: float | None = None,
    size_bytes: int | None = None,
    budget: Budget | None = None,
    weights: "Precision | Sequence[Precision] | PrecisionChoice" = "float32",
    ranks: RankMethod | RankChoice = "knapsack",
    factorise: Whitening | FactoriseChoice = "swift",
    refine: RefineChoice | None = None,
    quality: "str | QualityChoice | Callable[..., float] | None" = None,
    test: "Tests | None" = None,
    seed: int | None = None,
    name: str | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Compressed:
    """Compress a trained model to a budget by low-rank factorisation, without labels and without training.

    These are the stages of recipes: what the store knows of the same model, data and choices is read, not made again.

    Args:
        model: A trained torch module that takes tensors with samples first and gives a tensor, or several in tuples,
            mappings or dataclasses; a model of transformers; or what `merge` gave. It stays as it is.
        calibration: Unlabelled inputs as the model sees them, some hundred: a tensor (samples, ...), a tuple of tensors
            where `forward` takes several, a mapping of names to tensors, or a DataLoader or list of such batches, of
            which the first 1,024 samples are taken and labels left out; batches for a transformers model name their
            tensors. Left out for a `Merged`, which has its own.
        kept_parameters: The share of all parameters to keep, 0 to 1; never exceeded.
        size_bytes: The bytes of all weights as they are stored; never exceeded.
        budget: Any other budget: `Budget(parameters=)`, `flops=`, `kept_flops=` (of one sample), or `latency_ms=` or
            `energy_uj=` with `costs=`, a table that `rankship costs` measured.
        weights: The types that weights may have: "float32", "int8", "int4", or several, or a `PrecisionChoice`. With
            `size_bytes` ranks and types are chosen together; else `export` writes files of each type.
        ranks: How ranks are allocated: a method's name or a `RankChoice`. "knapsack" minimises the predicted loss
            exactly under the budget.
        factorise: How factors are found: a whitening's name or a `FactoriseChoice`. "swift" and "eigen" weigh errors by
            what the layer's inputs are (SVD-LLM, Wang et al. 2025, https://arxiv.org/abs/2403.07378, §3.1), "swift" by
            the smaller side alone: the same factors, in a fraction of the time for large layers.
        refine: Label-free refinement after compressing, by steps or by processor time; None: none.
        quality: How answers are judged, where their kind is not to be seen from outputs and labels: "classification",
            "token-classification", "question-answering", "regression", "dense-map", "embedding", "language-model",
            "fidelity"; "file.py:function" for a score of your own, function(outputs, labels); or a `QualityChoice`.
        test: Inputs, as calibration is given, and labels: classes of samples, positions or pixels, or numbers of an
            output's shape; or a DataLoader of both. None: scores are distances from the model's own outputs.
        seed: What chance comes from; None: 0. Left out for a `Merged`, as are `name` and `store`: it has its own.
        name: What the store and reports call it; None: "model".
        store: The folder where every stage keeps its result; None: $RANKSHIP_STORE, else the user's cache.
        progress: Show each step on standard error, or in the notebook.

    Raises:
        InputError: Model, data or a choice do not fit; the message names which.
        BudgetInfeasible: The budget is below the smallest model that the choices allow, which the message names.

    Example:
        >>> import torch
        >>> import rankship as rs
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> small = rs.compress(model, torch.randn(100, 32), kept_parameters=0.6, progress=False)
        >>> small.dense_parameters, small.plan.total_parameters
        (2762, 1482)
        >>> print(small.plan.factors["0"])
        svd 8

    """
    tables: dict[str, Any] = {
        "budget": choose_budget(kept_parameters, size_bytes, budget),
        "precision": choose_precision(weights),
        "ranks": choose_ranks(ranks),
        "factorise": choose_factors(factorise),
        "refine": refine,
    }
    if quality is not None:
        tables["quality"] = choose_quality(quality)
    if isinstance(model, Merged):
        if calibration is not None or test is not None:
            raise InputError("a merged model has its data already", hint="give calibration and test to `merge`")
        given = {"seed": seed, "name": name, "store": store}
        if own := [key for key, value in given.items() if value is not None]:
            raise InputError(
                f"a merged model has its {', '.join(own)} already", hint=f"give {', '.join(own)} to `merge`"
            )
        refuse_changed(
            model.module, model.made_sha256, "compress the changed module: compress(merged.module, inputs, …)"
        )
        return make_compressed(model.origin.change(progress=progress, **tables))
    name = "model" if name is None else name
    models = {name: model}
    origin = open_origin(
        models,
        None if calibration is None else {name: calibration},
        test=test,
        seed=seed or 0,
        name=name,
        store=store,
        progress=progress,
        merge=MergeChoice(),
        **tables,
    )
    return make_compressed(origin)


def make_compressed(origin: Origin) -> Compressed:
    """The compressed, and where the recipe says so refined, model of a recipe."""
    stages, recipe = origin.open_stages(), origin.recipe
    scores = Scores(stages)
    sources = scores.evaluate_sources()
    final, plan = stages.compress(settle_budget(origin.prepared, origin.store), choose(recipe))
    refinement, stage = None, "compressed"
    if recipe.refine is not None:
        final, refinement = stages.refine(final, plan, recipe.refine)
        stage = "refined"
    rounded = [(one, round_model(stages, final, plan, one).scored) for one in list_rounded(recipe, plan)]
    fidelities = (*scores.judge(final, stage), *(some for name, one in rounded for some in scores.judge(one, name)))
    if len(recipe.models) == 1:
        scores.judge_at_hand(stages.merge(recipe.merge.method)[0], "merged")  # an export asks for it
    module = unwrap(final.module)
    return Compressed(
        module=module,
        plan=unwrap_plan(plan, final.module),
        dense_parameters=origin.prepared.dense_parameters,
        fidelities=fidelities,
        accuracies=(
            *sources,
            *scores.evaluate(final, stage),
            *(some for name, one in rounded for some in scores.evaluate(one, name)),
        ),
        refinement=refinement,
        origin=origin,
        made_sha256=hash_state(module),
    )
