"""Scores the stages' models: on tests, and by fidelity to each specialist; stored like every stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.quality_gate import compare_with_source
from rankship_pipeline.flow.cached_stage import Form, as_record, cached_stage
from rankship_pipeline.flow.stages import Model, Stages
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.quality import Fidelity, Score
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.outputs import Outputs
from rankship_pipeline.models.weights import hash_tensors
from rankship_pipeline.recipe.choices import Source

_SCORE: Form[Score] = as_record(Score, "score.json")
_KEPT_BYTES = 2**28  # of the dense model's outputs that stay in memory from one score to the next
_FIDELITY: Form[Fidelity] = as_record(Fidelity, "fidelity.json")


@dataclass(frozen=True)
class Scores:
    """The scores of one recipe's models."""

    stages: Stages
    _references: dict[str, Outputs] = field(default_factory=dict, repr=False, compare=False)

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
            if reference:
                target = self._predict_reference(reference)
            return prepared.court.score(model.module, inputs, target, stage)

        return [cached_stage(self.stages.store, "score", made_from, _SCORE, rate).value]

    def _predict_reference(self, content: str) -> Outputs:
        """The dense model's outputs on the test inputs, computed once where they are small enough to stay."""
        if content in self._references:
            return self._references[content]
        prepared = self.stages.prepared
        dense = self.stages.load_source(prepared.recipe.models[0].name).module
        outputs = predict(dense, prepared.data.test_inputs)
        if sum(one.nbytes for one in outputs.values()) <= _KEPT_BYTES:
            self._references[content] = outputs
        return outputs

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
            "judged": self._judged_sha256(),
        }
        return cached_stage(
            self.stages.store,
            "fidelity",
            made_from,
            _FIDELITY,
            lambda: compare_with_source(
                model.module,
                specialist.module,
                source.name,
                prepared.data,
                stage,
                prepared.court.score,
                prepared.likelihood,
            ),
        ).value

    def _judged_sha256(self) -> str:
        court = self.stages.prepared.court
        return digest([digest(court.judging), "" if court.own is None else court.own.sha256])
