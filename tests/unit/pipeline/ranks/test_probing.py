"""Layers changed alone, measured with passes that begin at them: what full passes measure, whatever the model does."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import Analysis, analyse
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.foundation.records import Factors, Stored
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.ranks.probing import prepare_prober, restoring, write

CHANGES = [Stored(), *(Stored(factors=Factors(rank=rank)) for rank in (1, 3))]
SAMPLES = 40  # more than one batch
TOKENS = torch.randint(13, (SAMPLES, 7), generator=torch.Generator().manual_seed(2))
SHOWN = torch.arange(7) < torch.randint(2, 8, (SAMPLES, 1), generator=torch.Generator().manual_seed(3))


class Reader(nn.Module):
    """Reads tokens with padding hidden; its head is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.table(ids) * attention_mask[..., None]
        x = x + self.mix(self.body(x))
        return {"logits": self.head(x), "pooled": x.mean(1)}


class Taking(nn.Module):
    """Leaves its output in a list, too."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        y = torch.as_tensor(self.layer(x))
        self.kept.append(y)
        return y


class Stateful(nn.Module):
    """A network whose second module reads what the first left beside its output: it cannot begin in its middle."""

    def __init__(self) -> None:
        super().__init__()
        kept: list[Tensor] = []
        self.table = nn.Embedding(13, 16)
        self.taking, self.kept = Taking(kept), kept
        self.head = nn.Linear(16, 13)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.taking(self.table(ids))
        return torch.as_tensor(self.head(x + self.kept.pop() * attention_mask[..., None]))


def take_apart(net: nn.Module) -> Analysis:
    inputs = (TOKENS, SHOWN.long())
    grams = collect_grams(net, inputs, find_layers(net))
    return analyse(net, find_layers(net), {name: Metric(gram=gram) for name, gram in grams.items()}, "eigen")


@pytest.mark.parametrize(
    ("make", "restarting"),
    [(Reader, ["table", "body.0", "mix"]), (Stateful, ["table", "taking.layer"])],
)
def test_every_change_measures_as_in_full_passes(make: Callable[[], nn.Module], restarting: list[str]) -> None:
    torch.manual_seed(0)
    analysis, inputs = take_apart(make().eval()), (TOKENS, SHOWN.long())
    model = copy.deepcopy(analysis.model)
    names = list(analysis.layers)
    prober = prepare_prober(model, analysis, names, inputs, None)
    ratings = prober.rate(dict.fromkeys(names, CHANGES), slice(None))
    assert list(prober.restarts) == restarting
    teacher = predict(analysis.model, inputs)
    for name in names:
        for change, found in zip(CHANGES, ratings.average(name).tolist(), strict=True):
            with restoring(model, name):
                write(model, analysis, name, change)
                assert found == pytest.approx(measure_divergence(model, inputs, teacher), rel=1e-4, abs=1e-7)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in analysis.model.state_dict().items())


def test_parts_of_the_samples_and_of_the_changes_add_up() -> None:
    torch.manual_seed(0)
    analysis, inputs = take_apart(Reader().eval()), (TOKENS, SHOWN.long())
    prober = prepare_prober(copy.deepcopy(analysis.model), analysis, ["mix"], inputs, None)
    whole = prober.rate({"mix": CHANGES}, slice(None))
    parts = prober.rate({"mix": CHANGES[:1]}, slice(10)).add_changes(prober.rate({"mix": CHANGES[1:]}, slice(10)))
    joined = parts.add_samples(prober.rate({"mix": CHANGES}, slice(10, None)))
    assert torch.allclose(joined.nats["mix"], whole.nats["mix"], atol=1e-6)
    assert torch.equal(joined.answers, whole.answers)
    assert joined.answers.shape == (2, SAMPLES)
    assert joined.answers[0].tolist() == SHOWN.sum(1).tolist()
