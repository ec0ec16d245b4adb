"""Scores the stages' models: accuracy on tests, and fidelity to each specialist; stored like every stage."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rankship_pipeline.evaluate.accuracy import measure_accuracy
from rankship_pipeline.evaluate.quality_gate import compare_with_source
from rankship_pipeline.flow.cached_stage import Form, as_record, cached_stage
from rankship_pipeline.flow.stages import Model, Stages
from rankship_pipeline.foundation.records import Accuracy, Fidelity
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.weights import hash_tensors
from rankship_pipeline.recipe.choices import Source

_ACCURACY: Form[Accuracy] = as_record(Accuracy, "accuracy.json")
_FIDELITY: Form[Fidelity] = as_record(Fidelity, "fidelity.json")


@dataclass(frozen=True)
class Scores:
    """The scores of one recipe's models."""

    stages: Stages

    def evaluate_sources(self) -> list[Accuracy]:
        """Every specialist's accuracy on the whole test set, or on its own tests if it has its own head."""
        return [one for source in self.stages.prepared.recipe.models for one in self.evaluate_source(source)]

    def evaluate_source(self, source: Source) -> list[Accuracy]:
        """One specialist's accuracy; empty without labels."""
        model, data = self.stages.load_source(source.name), self.stages.prepared.data
        return self.evaluate(model, f"source:{source.name}", data.tests[source.name] if data.tasks else None)

    def evaluate(self, model: Model, stage: str, tests: tuple[Inputs, Tensor] | None = None) -> list[Accuracy]:
        """Accuracy on the whole test set, or on `tests`; empty if a Python session gives no labels."""
        prepared = self.stages.prepared
        data, sha256 = prepared.data, prepared.test_sha256
        if tests is not None:
            inputs, labels = tests
            sha256 = hash_tensors((*inputs, labels))
        elif data.test_labels is not None:
            inputs, labels = data.test_inputs, data.test_labels
        else:
            return []
        made_from = {"model": model.content, "test": sha256, "stage": stage}
        kept = cached_stage(
            self.stages.store,
            "accuracy",
            made_from,
            _ACCURACY,
            lambda: measure_accuracy(model.module, inputs, labels, stage=stage),
        )
        return [kept.value]

    def judge(self, model: Model, stage: str) -> tuple[Fidelity, ...]:
        """How well a stage's model does each specialist's own task."""
        return tuple(self._compare(model, stage, source) for source in self.stages.prepared.recipe.models)

    def _compare(self, model: Model, stage: str, source: Source) -> Fidelity:
        specialist, prepared = self.stages.load_source(source.name), self.stages.prepared
        made_from: Mapping[str, object] = {
            "model": model.content,
            "source": specialist.content,
            "name": source.name,
            "stage": stage,
            "data": [prepared.calibration_sha256[source.name], prepared.tests_sha256.get(source.name)],
        }
        return cached_stage(
            self.stages.store,
            "fidelity",
            made_from,
            _FIDELITY,
            lambda: compare_with_source(model.module, specialist.module, source.name, prepared.data, stage),
        ).value
