"""Scores the stages' models: on tests, and by fidelity to each specialist; stored like every stage."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.quality_gate import compare_with_source
from rankship_pipeline.evaluate.remembered import Remembered
from rankship_pipeline.flow.cached_stage import Form, as_record, cached_stage
from rankship_pipeline.flow.stage_model import Model
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.quality import Fidelity, Score
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import Outputs
from rankship_pipeline.models.weights import hash_tensors
from rankship_pipeline.recipe.choices import Source

_SCORE: Form[Score] = as_record(Score, "score.json")
_FIDELITY: Form[Fidelity] = as_record(Fidelity, "fidelity.json")


@dataclass(frozen=True)
class Scores:
    """The scores of one recipe's models."""

    stages: Stages

    def evaluate_sources(self) -> list[Score]:
        """Every specialist's score on the whole test set, or on its own tests if it has its own head."""
        return [one for source in self.stages.prepared.recipe.models for one in self.evaluate_source(source)]

    def evaluate_source(self, source: Source) -> list[Score]:
        """One specialist's score; empty for one of several without labels."""
        model, data = self.stages.load_source(source.name), self.stages.prepared.data
        return self.evaluate(model, f"source:{source.name}", data.tests[source.name] if data.tasks else None)

    def evaluate(self, model: Model, stage: str, tests: tuple[Inputs, Tensor] | None = None) -> list[Score]:
        """The score on the whole test set, or on `tests`; empty for a merge of several models without labels.

        Without labels the outputs of the one dense model stand for them.
        """
        prepared = self.stages.prepared
        data, sha256, reference = prepared.data, prepared.test_sha256, ""
        inputs, labels = data.test_inputs, data.test_labels
        if tests is not None:
            inputs, labels = tests
            sha256 = hash_tensors((*inputs, labels))
        elif not prepared.is_scored:
            return []
        elif prepared.court.needs_reference:
            reference = self.stages.load_source(prepared.recipe.models[0].name).content
        made_from = {
            "model": model.content,
            "test": sha256,
            "stage": stage,
            "reference": reference,
            "judged": self._judged_sha256(),
        }

        def rate() -> Score:
            target: Tensor | Outputs | None = labels
            known = self.stages.recall(model, inputs, sha256)
            if reference:
                target = self._predict_reference()
            return prepared.court.score(known.module, known.inputs, target, stage)

        return [cached_stage(self.stages.store, "score", made_from, _SCORE, rate).value]

    def _predict_reference(self) -> Outputs:
        """The dense model's outputs on the test inputs."""
        prepared = self.stages.prepared
        dense = self.stages.load_source(prepared.recipe.models[0].name)
        known = self.stages.recall(dense, prepared.data.test_inputs, prepared.test_sha256)
        return predict(known.module, known.inputs)

    def judge(self, model: Model, stage: str) -> tuple[Fidelity, ...]:
        """How well a stage's model does each specialist's own task."""
        return tuple(self._compare(model, stage, source) for source in self.stages.prepared.recipe.models)

    def judge_at_hand(self, model: Model, stage: str) -> None:
        """Keep for a later build how well a model does each specialist's task, where no model has to run for it."""
        data, hashes = self.stages.prepared.data.calibration, self.stages.prepared.calibration_sha256
        if all(isinstance(self.stages.recall(model, data[name], hashes[name]).module, Remembered) for name in data):
            self.judge(model, stage)

    def _compare(self, model: Model, stage: str, source: Source) -> Fidelity:
        specialist, prepared = self.stages.load_source(source.name), self.stages.prepared
        made_from: Mapping[str, object] = {
            "model": model.content,
            "source": specialist.content,
            "name": source.name,
            "stage": stage,
            "data": [prepared.calibration_sha256[source.name], prepared.tests_sha256.get(source.name)],
            "judged": self._judged_sha256(),
        }

        def compare() -> Fidelity:
            sha256 = prepared.calibration_sha256[source.name]
            known, dense = (
                self.stages.recall(one, prepared.data.calibration[source.name], sha256) for one in (model, specialist)
            )
            data = replace(prepared.data, calibration={source.name: known.inputs})
            rate, likelihood = prepared.court.score, prepared.likelihood
            return compare_with_source(known.module, dense.module, source.name, data, stage, rate, likelihood)

        return cached_stage(
            self.stages.store,
            "fidelity",
            made_from,
            _FIDELITY,
            compare,
        ).value

    def _judged_sha256(self) -> str:
        court = self.stages.prepared.court
        return digest([digest(court.judging), "" if court.own is None else court.own.sha256])
