"""The records of a recipe that passed its checks: without and with its budget and price."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from rankship_pipeline.align.make_alike import Mend
from rankship_pipeline.evaluate.likelihood import Likelihood
from rankship_pipeline.export.capabilities import list_offered
from rankship_pipeline.flow.judging import Court
from rankship_pipeline.flow.pace import Pace
from rankship_pipeline.flow.phases import find_phase_sites
from rankship_pipeline.foundation.artifact_key import WHOLE, ArtifactKey
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.files import hash_file
from rankship_pipeline.foundation.formats import FORMATS, Format
from rankship_pipeline.foundation.generation import TOKENIZER, Generation
from rankship_pipeline.foundation.landing import Landing
from rankship_pipeline.models.causal_lm import describe_generation
from rankship_pipeline.models.data import Data
from rankship_pipeline.models.huggingface import find_snapshot
from rankship_pipeline.models.layers import Layer, count_parameters, find_layers
from rankship_pipeline.models.opened import OpenedSource
from rankship_pipeline.quantise.sizes import Offered, choose_activations
from rankship_pipeline.ranks.call_sites import Site, find_sites, hash_model
from rankship_pipeline.ranks.price import Price
from rankship_pipeline.recipe.choices import Recipe
from rankship_pipeline.recipe.precision import Computed


@dataclass(frozen=True)
class Prepared:
    """A recipe that passed its checks: its models and data, its untrained module and layers, and hashes of all inputs.

    Not `checked` are those that nothing but their making needs: they run and trace the model, and take layers out.
    `sources` are the opened models and their base, by name. `mends` say how each model is made like the first before
    merging, `notes` describe harmless differences. `source_sha256` has the hash of every model or file that affects
    the result. `court` scores models on the test data. `pace`, of a checked one, is how fast the model runs here.
    """

    recipe: Recipe
    recipe_sha256: str
    folder: Path
    sources: Mapping[str, OpenedSource]
    data: Data
    calibration_sha256: dict[str, str]
    test_sha256: str
    tests_sha256: dict[str, str]
    unlabelled_sha256: dict[str, str]
    mends: dict[str, Mend]
    notes: tuple[str, ...]
    model: nn.Module
    layers: tuple[Layer, ...]
    source_sha256: dict[str, str]
    court: Court
    checked: bool
    pace: Pace | None = None

    @property
    def likelihood(self) -> Likelihood:
        """How the model's outputs are distributed."""
        return self.court.judging.likelihood

    @property
    def likelihood_sha256(self) -> str:
        """The hash of the likelihood."""
        return digest(dict(self.likelihood))

    @property
    def is_scored(self) -> bool:
        """Whether models can be scored: there are labels, or one dense model whose outputs stand for them."""
        if self.court.needs_reference:
            tested = not self.recipe.data.held or self.data.test_labels is not None  # else it is calibration data
            return tested and len(self.recipe.models) == 1
        return self.data.test_labels is not None or self.court.own is not None

    @cached_property
    def dense_parameters(self) -> int:
        """Parameters of the whole model before compressing."""
        return count_parameters(self.model)

    @cached_property
    def generation(self) -> Generation | None:
        """How the exported files generate text; None for models that do not."""
        first = self.recipe.models[0]
        if first.task != "causal-lm":
            return None
        return describe_generation(first, self.folder, self.recipe.export.context)

    @cached_property
    def generating_sha256(self) -> dict[str, object]:
        """What else the files of a model that generates are made from: how they are called, and its tokenizer."""
        if self.generation is None:
            return {}
        snapshot = find_snapshot(self.recipe.models[0], self.folder)
        files = [snapshot / name for name in TOKENIZER if (snapshot / name).is_file()]
        return {"generation": [digest(self.generation), *map(hash_file, files)]}

    @property
    def activations(self) -> Computed:
        """How layers with weights of fewer bits compute."""
        return choose_activations(self.recipe.precision.activations, self.layers)

    @property
    def offered(self) -> Offered:
        """The types of weights that all formats of the recipe run; without formats, that every one does."""
        return list_offered(self.recipe.precision.formats or self.recipe.export.formats or FORMATS, self.activations)

    @property
    def offered_sha256(self) -> str:
        """The hash of what types are on offer; empty where float32 alone is."""
        kinds = {one: sorted(found) for one, found in self.offered.kinds.items()}
        return "" if self.recipe.precision.weights == ("float32",) else digest(kinds)

    @property
    def fixed_parameters(self) -> int:
        """Parameters that no choice of ranks changes."""
        return self.dense_parameters - sum(layer.parameters for layer in self.layers)

    def list_sites(self, part: str = WHOLE, format_: Format = "onnx") -> dict[str, tuple[Site, ...]]:
        """The call sites of every factorable layer, also of those that the recipe keeps dense.

        `part` is what is timed, as a key's part; only those of a phase of generating depend on the format.
        """
        layers, generation = find_layers(self.model), self.generation
        if part == WHOLE or generation is None:
            return find_sites(self.model, layers, self.data.test_inputs)
        return find_phase_sites(
            self.model, layers, ArtifactKey(variant="dense", format=format_, part=part), generation.context
        )

    def hash_model(self, part: str = WHOLE, format_: Format = "onnx") -> str:
        """The hash of the model that a cost table is valid for; `part` as for `list_sites`."""
        whole = hash_model(self.model, self.list_sites(part, format_))
        return whole if part == WHOLE else digest({"model": whole, **self.generating_sha256})


@dataclass(frozen=True)
class Budgeted:
    """A prepared recipe with its budget, in the unit of its price.

    With ARP's fixed threshold the budget is the dense model's cost, as the threshold sets the ranks. `landing` records
    how a latency budget was met on its device, None for other budgets.
    """

    prepared: Prepared
    price: Price
    budget: int
    landing: Landing | None = None
