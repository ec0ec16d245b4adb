"""A recipe's stages up to the compressed model, each kept in the store under the hash of all that went into it."""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankship_pipeline.align.make_alike import Mend, mend_model
from rankship_pipeline.evaluate.accuracy import measure_accuracy, measure_divergence, predict
from rankship_pipeline.evaluate.calibrate import Grams, collect_curvatures, collect_grams
from rankship_pipeline.evaluate.quality_gate import compare_with_source
from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.factors.rebuild import rebuild
from rankship_pipeline.flow.preflight import Prepared, hash_tensors
from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.records import Accuracy, Factors, Fidelity, RankPlan, Refinement
from rankship_pipeline.foundation.store import Entry, Store
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.merge import Sources, merge_states
from rankship_pipeline.merge.fisher import measure_fisher
from rankship_pipeline.merge.grams import measure_interference
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.heads import HEADS, Headed, separate, specialise
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.models.source import make_model, train_or_load
from rankship_pipeline.models.weights import State, copy_state, load_into
from rankship_pipeline.ranks.plan import make_plan
from rankship_pipeline.recipe.choices import Comparison, RefineChoice, Source, find_base, rank_choice
from rankship_pipeline.recipe.merge_methods import METHODS, RANDOM, MergeMethod, fill_settings
from rankship_pipeline.recover.batchnorm import settle_batchnorm
from rankship_pipeline.recover.reconstruct import reconstruct
from rankship_pipeline.recover.refine import Saving, refine
from rankship_pipeline.recover.solve_in_order import refit

_STATE = "state.safetensors"
_NORMS = "batchnorm_reestimated.json"


@dataclass(frozen=True)
class Model:
    """A torch module in evaluation mode, the store entry that holds its tensors, and the hash of its own files."""

    module: nn.Module
    entry: Entry
    files_sha256: str

    @property
    def content(self) -> str:
        """What later stages are made from: its tensors, and the code that says what is computed with them."""
        return digest([self.entry.content, self.files_sha256])

    @property
    def batchnorm_reestimated(self) -> bool:
        """Whether batch-norm statistics were taken afresh when this model was made."""
        return bool(json.loads(self.entry.read(_NORMS).read_text(encoding="utf-8")))


@dataclass
class Stages:
    """The stages of one prepared recipe; each method makes its result or reads it from the store."""

    prepared: Prepared
    store: Store
    steps: Steps
    _analyses: dict[tuple[str, str], Analysis] = field(default_factory=dict)
    _answers: dict[str, Tensor] = field(default_factory=dict)

    def load_source(self, source: Source) -> Model:
        """A trained model as the recipe names it, mended to be like the others."""
        folder, seed = self.prepared.folder, self.prepared.recipe.seed
        mend = self.prepared.mends[source.name]
        made_from = {
            "source": digest(source),
            "files": self.prepared.source_sha256[source.name],
            "seed": seed,
            "mend": digest(mend),
        }

        def make(target: Path) -> None:
            state = train_or_load(source, folder, seed)
            if mend != Mend():
                module = load_into(make_model(source, folder, seed), state, where=source.name)
                data = self.prepared.data
                mend_model(module, mend, data.strip(data.test_inputs), name=source.name)
                state = copy_state(module)
            save_file(state, target / _STATE)

        entry = self._produce("source", made_from, make, f"{'train' if source.train else 'load'} {source.name}")
        module = self._specialise(self._fill(make_model(source, folder, seed), entry), source)
        return Model(module, entry, self.prepared.source_sha256[source.name])

    def _specialise(self, module: nn.Module, source: Source) -> nn.Module:
        """A source in the form of the merged model: with heads, its backbone and its own head; the base has none."""
        joined, data = self.prepared.model, self.prepared.data
        if not isinstance(joined, Headed):
            return module
        task = data.tasks.index(source.name) if source.name in data.tasks else None
        head = str(self.prepared.recipe.merge.head)
        return specialise(module, head, joined, task, data.strip(data.test_inputs), name=source.name)

    def calibrate(self, model: Model, name: str | None) -> tuple[Grams, str]:
        """Gram matrices of a model on one source's calibration data, or on all of it (None), and their content hash."""
        data = self.prepared.data
        inputs = data.pool_calibration() if name is None else data.calibration[name]
        hashes = self.prepared.calibration_sha256
        made_from = {
            "model": model.content,
            "data": hashes if name is None else hashes[name],
            "layers": [layer.name for layer in self.prepared.layers],
        }

        def make(target: Path) -> None:
            save_file(collect_grams(model.module, inputs, self.prepared.layers), target / "grams.safetensors")

        entry = self._produce("grams", made_from, make, f"calibrate {name or 'the merged model'}")
        return load_file(entry.read("grams.safetensors")), entry.content

    def weigh_outputs(self, model: Model) -> tuple[Grams, str]:
        """Curvature at every layer's output, from a model's own predictions on all calibration data, and its hash."""
        made_from = {
            "model": model.content,
            "data": self.prepared.calibration_sha256,
            "layers": [layer.name for layer in self.prepared.layers],
            "seed": self.prepared.recipe.seed,
        }

        def make(target: Path) -> None:
            inputs = self.prepared.data.pool_calibration()
            found = collect_curvatures(model.module, inputs, self.prepared.layers, self.prepared.recipe.seed)
            save_file(found, target / "curvatures.safetensors")

        entry = self._produce("curvatures", made_from, make, "weigh outputs by what they move")
        return load_file(entry.read("curvatures.safetensors")), entry.content

    def weigh_parameters(self, model: Model, name: str, samples: int) -> tuple[State, str]:
        """The diagonal Fisher information of one source on its own calibration data, and its content hash."""
        made_from = {
            "model": model.content,
            "data": self.prepared.calibration_sha256[name],
            "samples": samples,
            "seed": self.prepared.recipe.seed,
        }

        def make(target: Path) -> None:
            inputs = self.prepared.data.calibration[name]
            found = measure_fisher(model.module, inputs, samples, self.prepared.recipe.seed)
            save_file(found, target / "fisher.safetensors")

        entry = self._produce("fisher", made_from, make, f"weigh the parameters of {name} by what they move")
        return load_file(entry.read("fisher.safetensors")), entry.content

    def merge(self, method: MergeMethod) -> tuple[Model, dict[str, float]]:
        """The merged model, batch-norm re-estimated where the recipe says so, and each layer's interference."""
        recipe, needs = self.prepared.recipe, METHODS[method]
        settings = fill_settings(method, recipe.merge.given)
        sources = self._load_sources()
        grams, keys = self._calibrate_sources(sources)
        base_source = find_base(recipe) if needs.base else None
        base = None if base_source is None else self.load_source(base_source)
        fishers = [
            self.weigh_parameters(source, one.name, int(settings["samples"]))
            for source, one in zip(sources, recipe.models, strict=True)
            if needs.data == "fisher"
        ]
        made_from = {
            "method": method,
            "settings": settings,
            "seed": recipe.seed if method in RANDOM else None,
            "batchnorm": recipe.merge.batchnorm,
            "models": [source.content for source in sources],
            "base": None if base is None else base.content,
            "grams": keys,
            "fishers": [key for _, key in fishers],
            "layers": [layer.name for layer in self.prepared.layers],
        }

        def make(target: Path) -> None:
            states, heads = separate([source.module.state_dict() for source in sources])
            known = Sources(
                states=states,
                layers=self.prepared.layers,
                base=None if base is None else base.module.state_dict(),
                grams=grams,
                fishers=[fisher for fisher, _ in fishers],
            )
            state = merge_states(method, known, settings, recipe.seed)
            costs = {layer.name: measure_interference(state, states, grams, layer) for layer in self.prepared.layers}
            module = load_into(copy.deepcopy(self.prepared.model), {**state, **heads}, where=f"{method} merge")
            if method == "sequential":
                module = self._solve_in_order(module, {}, {})
            self._save(*self.settle(module), target)
            (target / "interference.json").write_text(json.dumps(costs), encoding="utf-8")

        entry = self._produce("merged", made_from, make, f"merge by {method}")
        interference: dict[str, float] = json.loads(entry.read("interference.json").read_text(encoding="utf-8"))
        return self._make(self.prepared.model, entry), interference if len(sources) > 1 else {}

    def compress(self, way: Comparison) -> tuple[Model, RankPlan]:
        """The merged model compressed to the budget by one way of merging, whitening and allocating."""
        recipe = self.prepared.recipe
        choice = rank_choice(recipe, way)
        merged, interference = self.merge(way.merge)
        metrics, key = self.choose_metrics(merged, way)
        made_from = {
            "merged": merged.content,
            "metrics": key,
            "ranks": digest(choice),
            "whitening": way.whitening,
            "reconstruct": way.reconstruct,
            "budget": [self.prepared.budget, self.prepared.price.unit],
            "batchnorm": recipe.merge.batchnorm,
            "sources": self.prepared.source_sha256,  # a table of costs among them
            "data": self.prepared.calibration_sha256,
        }

        def make(target: Path) -> None:
            analysis = self._analyse(merged, metrics, key, way.whitening)
            module, plan = self.make_compressed(analysis, way, interference)
            self._save(*self.settle(module), target)
            (target / "plan.json").write_text(encode(plan), encoding="utf-8")

        entry = self._produce("compressed", made_from, make, f"compress: {way.name}")
        plan = decode(RankPlan, entry.read("plan.json").read_bytes(), where=str(entry.folder))
        return self._make(rebuild(self.prepared.model, plan.factors), entry), plan

    def make_compressed(
        self, analysis: Analysis, way: Comparison, interference: dict[str, float]
    ) -> tuple[nn.Module, RankPlan]:
        """Allocate and fill, without the store; batch-norm statistics stay the merged model's."""
        prepared, inputs = self.prepared, self.prepared.data.pool_calibration()
        choice = rank_choice(prepared.recipe, way)
        plan = make_plan(
            analysis, choice, prepared.fixed_parameters, prepared.budget, inputs, interference, prepared.price
        )
        if way.reconstruct and way.merge == "sequential":
            return self._solve_in_order(analysis.model, plan.factors, analysis.layers), plan
        if way.reconstruct:
            return reconstruct(analysis, plan.factors, inputs), plan
        return fill(analysis, plan.factors), plan

    def _analyse(self, merged: Model, metrics: dict[str, Metric], key: str, whitening: str) -> Analysis:
        place = (merged.content + key, whitening)
        if place not in self._analyses:
            self._analyses[place] = analyse(merged.module, self.prepared.layers, metrics, whitening)
        return self._analyses[place]

    def evaluate_source(self, source: Source) -> Accuracy:
        """A specialist's accuracy on the whole test set; one with a head of its own knows its own tests alone."""
        model, stage, data = self.load_source(source), f"source:{source.name}", self.prepared.data
        return self.evaluate(model, stage, data.tests[source.name] if data.tasks else None)

    def evaluate(self, model: Model, stage: str, tests: tuple[Inputs, Tensor] | None = None) -> Accuracy:
        """Accuracy on the whole test set, or on `tests`."""
        data = self.prepared.data
        inputs, labels = tests or (data.test_inputs, data.test_labels)
        sha256 = self.prepared.test_sha256 if tests is None else hash_tensors((*inputs, labels))
        made_from = {"model": model.content, "test": sha256, "stage": stage}

        def make(target: Path) -> None:
            accuracy = measure_accuracy(model.module, inputs, labels, stage=stage)
            (target / "accuracy.json").write_text(encode(accuracy), encoding="utf-8")

        entry = self.store.produce("accuracy", self._stamp(made_from), make)
        return decode(Accuracy, entry.read("accuracy.json").read_bytes(), where=str(entry.folder))

    def refine(self, compressed: Model, plan: RankPlan, choice: RefineChoice) -> tuple[Model, Refinement]:
        """The compressed model after label-free refinement; one that was killed goes on from its last minute."""
        prepared, sources = self.prepared, self._load_sources()
        made_from = {
            "compressed": compressed.content,
            "sources": [source.content for source in sources],
            "data": prepared.unlabelled_sha256,
            "choice": digest(choice),
            "seed": prepared.recipe.seed,
        }
        unfinished = self.store.keep_unfinished("refined", self._stamp(made_from))

        def make(target: Path) -> None:
            saving = Saving(unfinished / _STATE)
            with self.steps.follow("refine without labels") as on_progress:
                module, taken = refine(
                    compressed.module,
                    self.list_teachers(),
                    choice,
                    prepared.recipe.seed,
                    saving=saving,
                    on_progress=on_progress,
                )
            self._save(module, compressed.batchnorm_reestimated, target)
            (target / "refinement.json").write_text(encode(taken), encoding="utf-8")

        entry = self.store.produce("refined", self._stamp(made_from), make)
        shutil.rmtree(unfinished, ignore_errors=True)
        taken = decode(Refinement, entry.read("refinement.json").read_bytes(), where=str(entry.folder))
        return self._make(rebuild(prepared.model, plan.factors), entry), taken

    def judge(self, model: Model, stage: str) -> tuple[Fidelity, ...]:
        """How well a stage's model does each specialist's own task."""
        return tuple(self._compare(model, stage, source) for source in self.prepared.recipe.models)

    def _compare(self, model: Model, stage: str, source: Source) -> Fidelity:
        specialist, prepared = self.load_source(source), self.prepared
        made_from = {
            "model": model.content,
            "source": specialist.content,
            "name": source.name,
            "stage": stage,
            "data": [prepared.calibration_sha256[source.name], prepared.tests_sha256.get(source.name)],
        }

        def make(target: Path) -> None:
            found = compare_with_source(model.module, specialist.module, source.name, prepared.data, stage)
            (target / "fidelity.json").write_text(encode(found), encoding="utf-8")

        entry = self.store.produce("fidelity", self._stamp(made_from), make)
        return decode(Fidelity, entry.read("fidelity.json").read_bytes(), where=str(entry.folder))

    def list_teachers(self) -> list[tuple[nn.Module, Inputs]]:
        """Every source with what refinement may see of its task."""
        data, models = self.prepared.data, self.prepared.recipe.models
        return [(self.load_source(one).module, data.list_unlabelled(one.name)) for one in models]

    def _solve_in_order(
        self, merged: nn.Module, plan: Mapping[str, Factors], taken: Mapping[str, Decomposition]
    ) -> nn.Module:
        """A merged model solved layer by layer, planned layers as factors, for what the sources say (see refit.py)."""
        samples = int(fill_settings("sequential", self.prepared.recipe.merge.given)["samples"])
        pairs = zip(self._load_sources(), self.prepared.data.calibration.values(), strict=True)
        teachers = [(source.module, tuple(tensor[:samples] for tensor in inputs)) for source, inputs in pairs]
        return refit(merged, find_layers(merged, (HEADS,) if self.prepared.data.tasks else ()), teachers, plan, taken)

    def _load_sources(self) -> list[Model]:
        return [self.load_source(source) for source in self.prepared.recipe.models]

    def settle(self, module: nn.Module) -> tuple[nn.Module, bool]:
        """Settle batch-norm against what each source itself says on its own calibration data."""
        data, recipe = self.prepared.data, self.prepared.recipe

        def distance(candidate: nn.Module) -> float:
            return sum(
                measure_divergence(candidate, data.calibration[source.name], self._answer(source))
                for source in recipe.models
            )

        return settle_batchnorm(module, data.pool_calibration(), recipe.merge.batchnorm, distance)

    def _answer(self, source: Source) -> Tensor:
        """What a source says on its own calibration data, asked once."""
        if source.name not in self._answers:
            inputs = self.prepared.data.calibration[source.name]
            self._answers[source.name] = predict(self.load_source(source).module, inputs)
        return self._answers[source.name]

    @staticmethod
    def _save(module: nn.Module, reestimated: bool, target: Path) -> None:  # noqa: FBT001 - as settle gives it
        save_file(copy_state(module), target / _STATE)
        (target / _NORMS).write_text(json.dumps(reestimated), encoding="utf-8")

    def _calibrate_sources(self, sources: list[Model]) -> tuple[list[Grams], list[str]]:
        names = [source.name for source in self.prepared.recipe.models]
        pairs = [self.calibrate(model, name) for model, name in zip(sources, names, strict=True)]
        return [grams for grams, _ in pairs], [key for _, key in pairs]

    def choose_metrics(self, merged: Model, way: Comparison) -> tuple[dict[str, Metric], str]:
        """What whitens each layer: none for plain; the sum of the sources' own Grams, or the merged model's."""
        if way.whitening == "plain":
            return {}, "none"
        if self.prepared.recipe.factorise.grams == "merged":
            grams, key = self.calibrate(merged, None)
        else:
            each, keys = self._calibrate_sources(self._load_sources())
            grams = {name: torch.stack([one[name] for one in each]).sum(0) for name in each[0]}
            key = "+".join(keys)
        if not way.curvature:
            return {name: Metric(gram=gram) for name, gram in grams.items()}, key
        curvatures, curved = self.weigh_outputs(merged)
        return {name: Metric(gram=gram, curvature=curvatures[name]) for name, gram in grams.items()}, key + curved

    def _produce(self, kind: str, made_from: Mapping[str, object], make: Callable[[Path], None], title: str) -> Entry:
        ingredients = self._stamp(made_from)
        found = self.store.find(kind, ingredients)
        if found is not None:
            return found
        with self.steps.step(title):
            return self.store.produce(kind, ingredients, make)

    def _stamp(self, made_from: Mapping[str, object]) -> dict[str, object]:
        return {**made_from, "code": hash_code(), "versions": list_versions()}

    def _make(self, structure: nn.Module, entry: Entry) -> Model:
        """A model of the recipe's own, which runs its sources' code."""
        files = {one.name: self.prepared.source_sha256[one.name] for one in self.prepared.recipe.models}
        return Model(self._fill(structure, entry), entry, digest(files))

    def _fill(self, structure: nn.Module, entry: Entry) -> nn.Module:
        return load_into(copy.deepcopy(structure), load_file(entry.read(_STATE)), where=str(entry.folder))
