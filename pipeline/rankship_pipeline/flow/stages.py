"""A recipe's stages up to the compressed model, each stored by the hash of everything that it depends on."""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from torch import nn

from rankship_pipeline.align.make_alike import Mend, mend_model
from rankship_pipeline.align.match_neurons import align_neurons
from rankship_pipeline.align.padding import fill_rows
from rankship_pipeline.evaluate.calibrate import Grams, collect_halves, find_scales, thin
from rankship_pipeline.evaluate.curvature import SAMPLES, collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.evaluate.lead import measure_lead
from rankship_pipeline.evaluate.remembered import Remembered
from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.rebuild import rebuild
from rankship_pipeline.flow.cached_stage import (
    Form,
    Keep,
    Kept,
    Trained,
    as_matrices,
    as_model,
    as_record,
    as_tensors,
    cached_stage,
    stamp,
)
from rankship_pipeline.flow.metrics import Measured, Metrics, pool_inputs
from rankship_pipeline.flow.prepared import Budgeted, Prepared
from rankship_pipeline.flow.recalled import Recalled, Runnable
from rankship_pipeline.flow.stage_model import Model
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.records import Factors, RankPlan, Refinement
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.merge import Sources, merge_states
from rankship_pipeline.merge.fisher import measure_fisher
from rankship_pipeline.merge.grams import measure_interference
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.heads import HEADS, Headed, separate, specialise
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.models.outputs import Outputs
from rankship_pipeline.models.weights import State, copy_state, load_into
from rankship_pipeline.quantise.in_order import find_grids, round_layers
from rankship_pipeline.ranks.effort import Say
from rankship_pipeline.ranks.losses import measure_losses
from rankship_pipeline.ranks.plan import make_plan
from rankship_pipeline.recipe.choices import Comparison, RefineChoice, find_base, rank_choice
from rankship_pipeline.recipe.merge_methods import METHODS, RANDOM, MergeMethod, fill_settings
from rankship_pipeline.recover.batchnorm import settle_batchnorm
from rankship_pipeline.recover.reconstruct import reconstruct
from rankship_pipeline.recover.refine import Saving, refine
from rankship_pipeline.recover.solve_in_order import refit

T = TypeVar("T")

_UNFINISHED = "state.safetensors"  # of a refinement to resume after a kill
_TENSORS = as_tensors("tensors.safetensors")
_MATRICES = as_matrices("tensors.safetensors")
_MERGED: Form[Trained[dict[str, float]]] = as_model(as_record(dict[str, float], "interference.json"))
_COMPRESSED: Form[Trained[RankPlan]] = as_model(as_record(RankPlan, "plan.json"))
_REFINED: Form[Trained[Refinement]] = as_model(as_record(Refinement, "refinement.json"))


@dataclass
class Stages:
    """The stages of one prepared recipe; each method makes its result or reads it from the store, as `keep` does."""

    prepared: Prepared
    store: Store
    steps: Steps
    keep: Keep = cached_stage
    _analyses: dict[tuple[str, str], Analysis] = field(default_factory=dict)
    _recalled: Recalled = field(default_factory=Recalled)

    def load_source(self, name: str) -> Model:
        """A trained model of the recipe, made like the others."""
        prepared, opened = self.prepared, self.prepared.sources[name]
        mend = prepared.mends[name]
        made_from = {
            "source": digest(opened.source),
            "files": prepared.source_sha256[name],
            "seed": prepared.recipe.seed,
            "mend": digest(mend),
        }
        reference = self._find_reference(name)
        if reference is not None:
            made_from["aligned to"] = reference.content
        first = opened
        if mend.padded:
            first = prepared.sources[prepared.recipe.models[0].name]
            made_from["padding"] = prepared.source_sha256[first.name]

        def load() -> State:
            state = opened.load_state()
            if mend == Mend() and reference is None:
                return state
            if mend.padded:
                state = fill_rows(state, first.load_state())
            module, sample = load_into(first.make(), state, where=name), prepared.data.strip(prepared.data.test_inputs)
            module = mend_model(module, mend, sample, name=name)
            return copy_state(
                module if reference is None else align_neurons(module, reference.module, sample, name=name)
            )

        kept = self._keep("source", made_from, _TENSORS, load, f"{'train' if opened.source.train else 'load'} {name}")
        module = self._specialise(load_into(first.make(), kept.value, where=str(kept.entry.folder)), name)
        return Model(module, kept.entry, prepared.source_sha256[name])

    def _find_reference(self, name: str) -> Model | None:
        """The first model, whose order of neurons another takes; None where the recipe asks for no alignment."""
        models = self.prepared.recipe.models
        if self.prepared.recipe.merge.align is None or name not in [one.name for one in models[1:]]:
            return None
        return self.load_source(models[0].name)

    def _specialise(self, module: nn.Module, name: str) -> nn.Module:
        """A source in the form of the merged model: with heads, its backbone and its own head (none for the base)."""
        joined, data = self.prepared.model, self.prepared.data
        if not isinstance(joined, Headed):
            return module
        task = data.tasks.index(name) if name in data.tasks else None
        return specialise(
            module, str(self.prepared.recipe.merge.head), joined, task, data.strip(data.test_inputs), name=name
        )

    def calibrate(self, model: Model, name: str | None) -> Kept[Grams]:
        """Gram matrices of a model on two halves of one source's calibration data, or of all of it (None)."""
        data, hashes = self.prepared.data, self.prepared.calibration_sha256
        inputs = data.pool_calibration() if name is None else data.calibration[name]
        made_from = {
            "model": model.content,
            "data": hashes if name is None else hashes[name],
            "layers": [[layer.name, layer.is_wide] for layer in self.prepared.layers],
        }
        title = f"calibrate {name or 'the merged model'}"

        def collect() -> Grams:
            return collect_halves(collect_grams, model.module, inputs, self.prepared.layers)

        return self._keep("grams", made_from, _MATRICES, collect, title)

    def weigh_outputs(self, model: Model) -> Kept[Grams]:
        """Curvature at every layer's output, from a model's own predictions on two halves of all calibration data."""
        prepared = self.prepared
        made_from = {
            "model": model.content,
            "data": prepared.calibration_sha256,
            "layers": [[layer.name, layer.is_tall] for layer in prepared.layers],
            "seed": prepared.recipe.seed,
            "likelihood": prepared.likelihood_sha256,
        }

        def collect() -> Grams:
            inputs = thin(prepared.data.pool_calibration(), SAMPLES)
            scales = self._measure_scales(model, inputs)
            draw = partial(collect_curvatures, seed=prepared.recipe.seed, likelihood=prepared.likelihood, scales=scales)
            return collect_halves(draw, model.module, inputs, prepared.layers)

        return self._keep("curvatures", made_from, _MATRICES, collect, "weigh outputs by their effect on predictions")

    def _measure_scales(self, model: Model, few: Inputs) -> Outputs:
        """The spread of the outputs that are no classes' scores, where it can be from a pass that scores need too."""
        prepared, known = self.prepared, Runnable(model.module, few)
        hashes = list(prepared.calibration_sha256.values())
        if len(hashes) == 1 and not all(one.is_choice for one in prepared.likelihood.values()):
            found = self.recall(model, prepared.data.pool_calibration(), hashes[0])
            known = found if isinstance(found.module, Remembered) else known
        return find_scales(known.module, known.inputs, prepared.likelihood)[1]

    def weigh_parameters(self, model: Model, name: str, samples: int) -> Kept[State]:
        """The diagonal Fisher information of one source on its own calibration data."""
        prepared = self.prepared
        made_from = {
            "model": model.content,
            "data": prepared.calibration_sha256[name],
            "samples": samples,
            "seed": prepared.recipe.seed,
            "likelihood": prepared.likelihood_sha256,
        }
        inputs, seed = prepared.data.calibration[name], prepared.recipe.seed
        measure = partial(measure_fisher, model.module, inputs, samples, seed, prepared.likelihood)
        title = f"weigh the parameters of {name} by their effect on predictions"
        return self._keep("fisher", made_from, _TENSORS, measure, title)

    def merge(self, method: MergeMethod) -> tuple[Model, dict[str, float]]:
        """The merged model, with batch-norm re-estimated if the recipe says so, and each layer's interference."""
        prepared, recipe, needs = self.prepared, self.prepared.recipe, METHODS[method]
        settings = fill_settings(method, recipe.merge.given)
        sources = self._load_sources()
        is_alone = len(sources) == 1 and not needs.base  # every such merge of one model is that model
        grams = [] if is_alone else self._calibrate_sources(sources)
        base_source = find_base(recipe) if needs.base else None
        base = None if base_source is None else self.load_source(base_source.name)
        weighed = [] if is_alone or needs.data != "fisher" else zip(sources, recipe.models, strict=True)
        fishers = [self.weigh_parameters(source, one.name, int(settings["samples"])) for source, one in weighed]
        layers, reestimates = prepared.layers, recipe.merge.batchnorm == "reestimate"
        made_from = {
            "method": method,
            "settings": settings,
            "seed": recipe.seed if method in RANDOM else None,
            "batchnorm": recipe.merge.batchnorm,
            "likelihood": prepared.likelihood_sha256,
            "models": [source.content for source in sources],
            "base": None if base is None else base.content,
            "grams": [*(one.content for one in grams), *(one.content for one in fishers)],
            "layers": [layer.name for layer in layers],
        }

        def merge() -> Trained[dict[str, float]]:
            states, heads = separate([source.module.state_dict() for source in sources])
            if is_alone:
                module = load_into(copy.deepcopy(prepared.model), {**states[0], **heads}, where=recipe.models[0].name)
                return self._train(*(self.settle(module) if reestimates else (module, False)), {})
            matrices = [pool_inputs(one.value, layers) for one in grams]
            known = Sources(
                states=states,
                layers=layers,
                base=None if base is None else base.module.state_dict(),
                grams=matrices,
                fishers=[one.value for one in fishers],
            )
            state = merge_states(method, known, settings, recipe.seed)
            costs = {one.name: measure_interference(state, states, matrices, one) for one in layers if not one.is_wide}
            module = load_into(copy.deepcopy(prepared.model), {**state, **heads}, where=f"{method} merge")
            if method == "sequential":
                module = self._solve_in_order(module, {}, {})
            return self._train(*self.settle(module), costs)

        kept = self._keep("merged", made_from, _MERGED, merge, "nothing to merge" if is_alone else f"merge by {method}")
        costs = kept.value.found if len(sources) > 1 else {}
        return self._make(prepared.model, kept), {one.name: costs[one.name] for one in layers if one.name in costs}

    def compress(self, budgeted: Budgeted, way: Comparison) -> tuple[Model, RankPlan]:
        """The merged model compressed to the budget by one way of merging, whitening and allocating."""
        recipe, prepared = self.prepared.recipe, budgeted.prepared
        merged, interference = self.merge(way.merge)
        measured = self._measure(merged, way)
        made_from = {
            "merged": merged.content,
            "metrics": measured.key,
            "ranks": digest(rank_choice(recipe, way)),
            "whitening": way.whitening,
            "reconstruct": way.reconstruct,
            "budget": [budgeted.budget, budgeted.price.unit, *budgeted.price.weights, prepared.offered_sha256],
            "batchnorm": recipe.merge.batchnorm,
            "sources": prepared.source_sha256,  # a table of costs among them
            "data": prepared.calibration_sha256,
        }

        def compress() -> Trained[RankPlan]:
            module, plan = self.make_compressed(budgeted, self._analyse(merged, measured, way), way, interference)
            return self._train(*self.settle(module), plan)

        kept = self._keep("compressed", made_from, _COMPRESSED, compress, f"compress: {way.name}")
        plan = kept.value.found
        return self._make(rebuild(prepared.model, plan.factors), kept), plan

    def plan(self, budgeted: Budgeted, way: Comparison) -> RankPlan:
        """The plan of `compress` without the model that it makes, and without the store."""
        merged, interference = self.merge(way.merge)
        measured = self._measure(merged, way)
        with self.steps.step(f"plan: {way.name}"):
            return self._plan(budgeted, self._analyse(merged, measured, way), way, interference, lambda _line: None)

    def _analyse(self, merged: Model, measured: Measured, way: Comparison) -> Analysis:
        prepared, place = self.prepared, (merged.content + measured.key, way.whitening)
        if (analysis := self._analyses.get(place)) is None:
            metrics = Metrics(prepared, merged.module, measured)
            analysis = analyse(merged.module, prepared.layers, metrics, way.whitening)
        if prepared.recipe.compare or prepared.recipe.budget.on is not None:  # other plans are made from it
            self._analyses[place] = analysis
        return analysis

    def _plan(
        self, budgeted: Budgeted, analysis: Analysis, way: Comparison, interference: dict[str, float], say: Say
    ) -> RankPlan:
        prepared, inputs = self.prepared, self.prepared.data.pool_calibration()
        plan = make_plan(
            *(analysis, rank_choice(prepared.recipe, way), prepared.fixed_parameters, budgeted.budget, inputs),
            *(interference, budgeted.price, prepared.likelihood, say),
        )
        return measure_losses(plan, analysis, len(inputs[0]))

    def make_compressed(
        self, budgeted: Budgeted, analysis: Analysis, way: Comparison, interference: dict[str, float]
    ) -> tuple[nn.Module, RankPlan]:
        """Allocate and fill, without the store; batch-norm statistics are the merged model's."""
        plan = self._plan(budgeted, analysis, way, interference, self.steps.note)
        if way.reconstruct and way.merge == "sequential":
            return self._solve_in_order(analysis.model, plan.factors, analysis.layers), plan
        if way.reconstruct:
            return reconstruct(analysis, plan.factors, self.prepared.data.pool_calibration()), plan
        return fill(analysis, plan.factors), plan

    def refine(self, compressed: Model, plan: RankPlan, choice: RefineChoice) -> tuple[Model, Refinement]:
        """The compressed model after label-free refinement; a killed refinement resumes from its last save."""
        prepared, types = self.prepared, plan.weights if choice.rounding == "through" else {}
        made_from = {
            "compressed": compressed.content,
            "sources": [source.content for source in self._load_sources()],
            "data": prepared.unlabelled_sha256,
            "choice": digest(choice),
            "seed": prepared.recipe.seed,
            "likelihood": prepared.likelihood_sha256,
            "types": [types, prepared.offered_sha256, prepared.calibration_sha256],
        }
        unfinished = self.store.keep_unfinished("refined", stamp(made_from))

        def train() -> Trained[Refinement]:
            saving = Saving(unfinished / _UNFINISHED)
            start = round_layers(compressed.module, types, prepared.data.pool_calibration(), prepared.offered)
            with self.steps.follow("refine without labels") as on_progress:
                module, taken = refine(
                    *(start, self.list_teachers(), choice, prepared.recipe.seed),
                    saving=saving,
                    on_progress=on_progress,
                    likelihood=prepared.likelihood,
                    grids=find_grids(start, types, prepared.offered),
                )
            return self._train(module, compressed.batchnorm_reestimated, taken)

        kept = self.keep(self.store, "refined", made_from, _REFINED, train)
        shutil.rmtree(unfinished, ignore_errors=True)
        return self._make(rebuild(prepared.model, plan.factors), kept), kept.value.found

    def list_teachers(self) -> list[tuple[nn.Module, Inputs]]:
        """Every source with the unlabelled inputs of its task for refinement."""
        data, models = self.prepared.data, self.prepared.recipe.models
        return [(self.load_source(one.name).module, data.list_unlabelled(one.name)) for one in models]

    def settle(self, module: nn.Module) -> tuple[nn.Module, bool]:
        """Keep or re-estimate batch-norm, whichever is closer to each source's outputs on its calibration data."""
        data, recipe = self.prepared.data, self.prepared.recipe

        def lead(first: nn.Module, second: nn.Module) -> float:
            teachers = [(self.load_source(one.name).module, data.calibration[one.name]) for one in recipe.models]
            return measure_lead(first, second, teachers, self.prepared.likelihood)

        return settle_batchnorm(module, data.pool_calibration(), recipe.merge.batchnorm, lead)

    def choose_metrics(self, merged: Model, way: Comparison) -> tuple[Mapping[str, Metric], str]:
        """The metric of each layer, none for "plain", and its hash: the sources' summed Grams or the merged model's."""
        measured = self._measure(merged, way)
        return Metrics(self.prepared, merged.module, measured), measured.key

    def _measure(self, merged: Model, way: Comparison) -> Measured:
        if way.whitening == "plain":
            return Measured((), None, shrunk=False)
        if self.prepared.recipe.factorise.grams == "merged":
            grams = [self.calibrate(merged, None)]
        else:
            grams = self._calibrate_sources(self._load_sources())
        wide = len(grams) > 1 and any(layer.is_wide for layer in self.prepared.layers)
        own = self.calibrate(merged, None) if wide else None
        curved = self.weigh_outputs(merged) if way.curvature else None
        return Measured(tuple(grams), curved, way.shrink, own)

    def _solve_in_order(
        self, merged: nn.Module, plan: Mapping[str, Factors], taken: Mapping[str, Decomposition]
    ) -> nn.Module:
        """The merged model solved layer by layer for the sources' outputs, with planned layers as factors."""
        samples = int(fill_settings("sequential", self.prepared.recipe.merge.given)["samples"])
        pairs = zip(self._load_sources(), self.prepared.data.calibration.values(), strict=True)
        teachers = [(source.module, tuple(tensor[:samples] for tensor in inputs)) for source, inputs in pairs]
        return refit(merged, find_layers(merged, (HEADS,) if self.prepared.data.tasks else ()), teachers, plan, taken)

    def recall(self, model: Model, inputs: Inputs, sha256: str) -> Runnable:
        """A model on inputs of this hash, with outputs that are known or stay known (see recalled.py)."""
        return self._recalled.find(model, inputs, sha256, self._load_sources)

    def _load_sources(self) -> list[Model]:
        return [self.load_source(source.name) for source in self.prepared.recipe.models]

    def _calibrate_sources(self, sources: list[Model]) -> list[Kept[Grams]]:
        models = self.prepared.recipe.models
        return [self.calibrate(model, source.name) for model, source in zip(sources, models, strict=True)]

    def _keep(
        self, kind: str, made_from: Mapping[str, object], form: Form[T], compute: Callable[[], T], title: str
    ) -> Kept[T]:
        return self.keep(self.store, kind, made_from, form, compute, steps=self.steps, title=title)

    @staticmethod
    def _train(module: nn.Module, reestimated: bool, found: T) -> Trained[T]:  # noqa: FBT001 - as settle gives it
        return Trained(copy_state(module), reestimated, found)

    def _make(self, structure: nn.Module, kept: Kept[Trained[T]]) -> Model:
        """A merged or compressed model; its files are the code of the recipe's sources."""
        files = {one.name: self.prepared.source_sha256[one.name] for one in self.prepared.recipe.models}
        module = load_into(copy.deepcopy(structure), kept.value.state, where=str(kept.entry.folder))
        return Model(module, kept.entry, digest(files), kept.value.batchnorm_reestimated)
