"""Reconstruction on nets small enough to train here: nearer to the dense model, and nothing else changed."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from make.nets import count_hooks
from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import count_parameters, find_layers
from rankship_pipeline.models.plain_modules import make_plain
from rankship_pipeline.recover.reconstruct import reconstruct

PLAN = {
    "0": Factors(form="spatial", rank=6),
    "3": Factors(form="tucker", rank=8, input_rank=5),
    "6": Factors(rank=10),
    "8": Factors(rank=6),
}
RANKS = {"3": Factors(rank=7), "6": Factors(rank=8), "8": Factors(rank=5)}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32)[:, None], torch.tensor(found.target)


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    images, labels = digits
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(80):
        batch = slice(step % 10 * 100, step % 10 * 100 + 100)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]  # torch types no backward
        optimiser.step()
    return net.eval()


def take_apart(model: nn.Module, inputs: Inputs, *, curved: bool = True, whitening: str = "eigen") -> Analysis:
    layers = find_layers(model)
    grams, curvatures = collect_grams(model, inputs, layers), collect_curvatures(model, inputs, layers)
    metrics = {name: Metric(gram=gram, curvature=curvatures[name] if curved else None) for name, gram in grams.items()}
    return analyse(model, layers, metrics, whitening)


@pytest.mark.parametrize("plan", [PLAN, RANKS], ids=["all forms", "svd"])
@pytest.mark.parametrize(
    ("curved", "whitening"), [(True, "eigen"), (False, "eigen"), (True, "swift"), (False, "cholesky")]
)
def test_a_reconstructed_model_is_nearer_to_the_dense_one_than_a_filled_one(
    trained: nn.Module, digits: tuple[Tensor, Tensor], plan: dict[str, Factors], whitening: str, *, curved: bool
) -> None:
    """On the samples that it was fitted to, and on others."""
    seen, unseen = (digits[0][:1000],), (digits[0][1000:],)
    analysis = take_apart(trained, seen, curved=curved, whitening=whitening)
    plain, refitted = fill(analysis, plan), reconstruct(analysis, plan, seen)
    assert count_parameters(plain) == count_parameters(refitted)
    for inputs in (seen, unseen):
        teacher = predict(trained, inputs)
        apart = measure_divergence(plain, inputs, teacher)
        assert apart > 0.01
        assert measure_divergence(refitted, inputs, teacher) < 0.9 * apart


def test_the_dense_model_is_untouched_and_no_hook_stays(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    before = copy.deepcopy(trained.state_dict())
    inputs = (digits[0][:200],)
    refitted = reconstruct(take_apart(trained, inputs), PLAN, inputs)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert count_hooks(trained, refitted) == 0
    assert not refitted.training


def test_layers_that_stay_dense_keep_every_number(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    inputs = (digits[0][:200],)
    refitted = reconstruct(take_apart(trained, inputs), {"3": Factors(rank=4)}, inputs)
    for name in ("0", "1", "6", "8"):
        states = (net.get_submodule(name).state_dict() for net in (trained, refitted))
        for left, right in zip(*(state.values() for state in states), strict=True):
            assert torch.equal(left, right)


def test_the_first_layer_has_nothing_to_make_up_for(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """Only its bias takes up what its own factors lose in the mean."""
    inputs = (digits[0][:300],)
    analysis, plan = take_apart(trained, inputs), {"0": Factors(rank=4)}
    plain, refitted = fill(analysis, plan), reconstruct(analysis, plan, inputs)
    dense, left, right = (
        predict(net.get_submodule("0"), inputs)["output"].mean((0, 2, 3)) for net in (trained, plain, refitted)
    )
    torch.testing.assert_close(right, dense, rtol=0, atol=1e-4)
    assert float((left - dense).abs().max()) > 1e-3
    states = [net.get_submodule("0").state_dict() for net in (plain, refitted)]
    joined = [state["1.weight"].flatten(1) @ state["0.weight"].flatten(1) for state in states]
    torch.testing.assert_close(joined[0], joined[1], rtol=1e-3, atol=1e-4)


def test_a_plan_of_full_ranks_gives_the_dense_model_back(trained: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    plan = {
        "0": Factors(form="spatial", rank=12),
        "3": Factors(form="tucker", rank=16, input_rank=12),
        "6": Factors(rank=32),
        "8": Factors(rank=10),
    }
    inputs = (digits[0][:400],)
    refitted = reconstruct(take_apart(trained, inputs), plan, inputs)
    assert measure_divergence(refitted, inputs, predict(trained, inputs)) < 1e-6


class Reader(nn.Module):
    """An embedding, a layer with and one without bias, one that never runs; positions may be hidden."""

    inputs = ("input_ids", "attention_mask")

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 12, padding_idx=0)
        self.mix = nn.Linear(12, 16, bias=False)
        self.idle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 6)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        y = torch.relu(self.mix(self.words(ids)))
        y = (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits: Tensor = self.head(y)
        return logits


def make_reader() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    net = Reader().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    ids = torch.randint(1, 30, (300, 9))
    mask = (torch.arange(9) < torch.randint(2, 10, (300, 1))).long()
    return net, (ids * mask, mask)


def test_embeddings_keep_their_factors_and_what_follows_makes_up_for_them() -> None:
    net, inputs = make_reader()
    analysis = take_apart(net, inputs)
    plan = {"words": Factors(rank=5), "mix": Factors(rank=8), "head": Factors(rank=5)}
    plain, refitted = fill(analysis, plan), reconstruct(analysis, plan, inputs)
    states = plain.state_dict(), refitted.state_dict()
    for name in ("words.0.weight", "words.1.weight"):
        assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0]["mix.0.weight"], states[1]["mix.0.weight"])
    assert refitted.get_submodule("mix.1").bias is None
    teacher = predict(net, inputs)
    assert measure_divergence(refitted, inputs, teacher) < 0.9 * measure_divergence(plain, inputs, teacher)


def test_what_padding_holds_does_not_matter() -> None:
    net, (ids, mask) = make_reader()
    plan = {"words": Factors(rank=5), "mix": Factors(rank=8), "head": Factors(rank=5)}
    analysis = take_apart(net, (ids, mask))
    noisy = torch.where(mask.bool(), ids, torch.randint(0, 30, ids.shape))
    states = [reconstruct(analysis, plan, (one, mask)).state_dict() for one in (ids, noisy)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_a_dense_layer_that_never_runs_is_unchanged() -> None:
    net, inputs = make_reader()
    refitted = reconstruct(take_apart(net, inputs), {"mix": Factors(rank=8)}, inputs)
    assert torch.equal(refitted.get_submodule("idle").weight, net.get_submodule("idle").weight)  # type: ignore[arg-type]


def test_a_planned_layer_that_never_runs_has_the_factors_of_its_weight() -> None:
    net, inputs = make_reader()
    analysis, plan = take_apart(net, inputs), {"idle": Factors(rank=6)}
    states = [model.state_dict() for model in (fill(analysis, plan), reconstruct(analysis, plan, inputs))]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_a_layer_that_runs_several_times_gets_its_factors_uncorrected() -> None:
    torch.manual_seed(0)
    net = make_plain(nn.Sequential(nn.LSTM(4, 6, batch_first=True), Last(), nn.Linear(6, 3))).eval()
    inputs = (torch.randn(40, 5, 4),)
    layers = find_layers(net)
    metrics = {name: Metric(gram=gram) for name, gram in collect_grams(net, inputs, layers).items()}
    analysis = analyse(net, layers, metrics, "eigen")
    plan = {"0.cells.0.hh": Factors(rank=2), "2": Factors(rank=2)}
    found, plain = reconstruct(analysis, plan, inputs), fill(analysis, plan)
    for key in ("0.cells.0.hh.0.weight", "0.cells.0.hh.1.weight", "0.cells.0.hh.1.bias"):
        torch.testing.assert_close(found.state_dict()[key], plain.state_dict()[key], rtol=0, atol=0)
    assert not torch.equal(found.state_dict()["2.1.bias"], plain.state_dict()["2.1.bias"])


class Last(nn.Module):
    """The outputs of a recurrent network at its last step."""

    def forward(self, found: tuple[Tensor, Tensor]) -> Tensor:
        return found[0][:, -1]
