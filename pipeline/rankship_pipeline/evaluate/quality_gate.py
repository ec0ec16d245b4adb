"""Measures what each specialist lost by merging or compressing, and refuses more than the recipe allows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.likelihood import Likelihood, assume_logits
from rankship_pipeline.evaluate.likeness import measure_likeness
from rankship_pipeline.foundation.errors import QualityLost
from rankship_pipeline.foundation.quality import Fidelity, Score
from rankship_pipeline.foundation.units import show_count, show_percent
from rankship_pipeline.models.data import Data, Inputs
from rankship_pipeline.recipe.choices import QualityChoice

_SHOWN_LAYERS = 5

Rate = Callable[[nn.Module, Inputs, Tensor, str], Score]  # a model's score on inputs and labels, at a stage

Gate = Literal["max_merge_loss_points", "max_loss_points"]
# gate → cause of its layers' losses, hint
_GATES: dict[Gate, tuple[str, str]] = {
    "max_merge_loss_points": (
        "merging",
        "try another merge.method or more calibration data, leave a specialist out, or allow more",
    ),
    "max_loss_points": (
        "merging and rank",
        "allow a larger budget, keep the named layers dense (ranks.exclude), add [refine], or allow more",
    ),
}


def compare_with_source(
    model: nn.Module,
    source: nn.Module,
    name: str,
    data: Data,
    stage: str,
    rate: Rate,
    likelihood: Likelihood | None = None,
) -> Fidelity:
    """Compare a stage's model with the specialist `name` on that specialist's own data; `rate` scores its own tests.

    The `likelihood` says how the outputs are distributed (None: all hold logits).
    """
    inputs = data.calibration[name]
    if likelihood is None:
        likelihood = assume_logits(predict(source, tuple(tensor[:1] for tensor in inputs)))
    alike = measure_likeness(model, inputs, source, likelihood)
    tests = data.tests.get(name)
    before, after = (
        (rate(one, *tests, stage) for one, stage in ((source, f"source:{name}"), (model, stage)))
        if tests is not None
        else (None, None)
    )
    return Fidelity(
        stage=stage,
        source=name,
        answers=alike.answers or len(inputs[0]),
        agreement=alike.agreed / alike.answers if alike.answers else None,
        before=before,
        after=after,
        relative_error=alike.error,
    )


def refuse_lost(fidelities: Sequence[Fidelity], choice: QualityChoice, gate: Gate, costs: Mapping[str, float]) -> None:
    """Raise QualityLost naming every specialist that lost more than the recipe's quality.`gate` allows.

    `costs` are shares of output energy lost per layer; the message lists the highest.
    """
    allowed_points: float | None = getattr(choice, gate)
    lost = [one for one in fidelities if allowed_points is not None and one.lost_points > allowed_points]
    if not lost:
        return
    by, hint = _GATES[gate]
    lines = [f"stage {lost[0].stage} lost more than quality.{gate} = {allowed_points:g} points allows:"]
    lines += [f"  {describe_loss(one)}" for one in lost]
    worst = sorted(costs.items(), key=lambda pair: -pair[1])[:_SHOWN_LAYERS]
    if worst:
        layers = ", ".join(f"{name} {show_percent(cost)}" for name, cost in worst)
        lines.append(f"  layers that lose most output energy by {by}: {layers}")
    raise QualityLost("\n".join(lines), hint=hint)


def describe_loss(one: Fidelity) -> str:
    """One specialist's loss in words, e.g. "mnist: 7.3 points of test accuracy (97.0 % → 89.7 % of 1,000), …"."""
    answers = f"{show_count(one.answers)} calibration answers"
    if one.agreement is None:
        what, likeness = "of error", f"relative error {show_percent(one.relative_error or 0.0)} on {answers}"
    else:
        what, likeness = "of agreement", f"agrees on {show_percent(one.agreement)} of {answers}"
    if one.before is None or one.after is None:
        return f"{one.source}: {one.lost_points:.1f} points {what} ({likeness})"
    change = f"{one.before.show()} → {one.after.show()} of {show_count(one.after.samples)}"
    measure = one.before.measure.name
    return f"{one.source}: {one.lost_points:.1f} points of test {measure} ({change}), {likeness}"
