"""Neurons change places only where no output depends on it, and two orders of one network are found to be one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from make.recipes import make_stages, state_model, state_rest
from rankship_pipeline.align.axes import Atoms
from rankship_pipeline.align.interchange import Interchange, find_interchange
from rankship_pipeline.align.match_neurons import align_neurons, find_groups, permute
from rankship_pipeline.foundation.errors import InputError, MergeMismatch
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.models.weights import State, copy_state, load_into
from rankship_pipeline.recipe.rules import read_recipe


class Residual(nn.Module):
    """A stem, two blocks around one residual stream (one grouped, one depthwise), and a head over pooled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.wide, self.grouped = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.deep, self.narrow = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norms[0](self.stem(x)))
        x = x + self.norms[1](self.grouped(functional.gelu(self.wide(x))))
        x = x + self.norms[2](self.narrow(torch.sigmoid(self.deep(x))))
        pooled: Tensor = self.head(functional.adaptive_avg_pool2d(x, 2).flatten(1))
        return pooled


class Concatenated(nn.Module):
    """Two paths of which the outputs stand one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))
        self.hidden, self.head = nn.Linear(8, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.hidden(torch.cat([path(x) for path in self.paths], 1))))
        return logits


class Tied(nn.Module):
    """One matrix used in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(6, 4, bias=False)
        self.up = nn.Linear(6, 4, bias=False)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.down(x)) @ self.up.weight


def make_norms() -> nn.Module:
    layers = [nn.Conv1d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 9), nn.LayerNorm(9), nn.SiLU(), nn.Linear(9, 2))


def make_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    return nn.Sequential(
        nn.Linear(5, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)
    )


# model, the shape of a sample, and how many members its free groups have
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[int]]] = {
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)), (3, 4), [9]),
    "residual": (Residual, (1, 8, 8), [2, 3, 4]),
    "norms": (make_norms, (3, 7), [2, 4, 9]),
    "encoder": (make_encoder, (6, 5), [4, 4, 4, 4, 16, 32, 32]),
    "concatenated": (Concatenated, (6,), [7]),
    "tied": (Tied, (6,), [4]),
}


def make(kind: str) -> tuple[nn.Module, tuple[Tensor]]:
    build, shape, _ = NETS[kind]
    torch.manual_seed(0)
    net = build().eval()
    with torch.no_grad():
        for tensor in net.state_dict().values():  # norms must not be all alike
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return net, (torch.randn(2, *shape),)


def shuffle(known: Interchange, state: State, seed: int = 1) -> State:
    random = torch.Generator().manual_seed(seed)
    return permute(state, known, {leaf: torch.randperm(size, generator=random) for leaf, size in known.free.items()})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", NETS)
def test_a_network_computes_the_same_in_any_order_and_is_put_back_in_the_first_models(kind: str) -> None:
    net, sample = make(kind)
    known = find_interchange(net, sample)
    assert sorted(known.free.values()) == NETS[kind][2]
    other = load_into(make(kind)[0], shuffle(known, copy_state(net)), where="b")
    assert any(not torch.equal(one, two) for one, two in zip(net.parameters(), other.parameters(), strict=True))
    torch.testing.assert_close(other(*sample), net(*sample), rtol=1e-5, atol=1e-5)
    align_neurons(other, net, sample, name="b")
    torch.testing.assert_close(other(*sample), net(*sample), rtol=1e-5, atol=1e-5)
    mean = {name: (one + other.state_dict()[name]) / 2 for name, one in net.state_dict().items()}
    torch.testing.assert_close(load_into(make(kind)[0], mean, where="m")(*sample), net(*sample), rtol=1e-4, atol=1e-4)


def test_a_model_of_which_no_operator_is_known_is_refused_by_name() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.b(self.a(x).sort(1).values)
            return logits

    with pytest.raises(MergeMismatch, match=r"no neurons of model 'b' .*without a rule: sort"):
        find_groups(Sorted().eval(), (torch.randn(2, 4),), name="b")


def test_an_axis_is_split_where_a_reshape_or_another_axis_splits_it() -> None:
    atoms = Atoms()
    (whole,), (other,) = atoms.make(12), atoms.make(12)
    heads, width = atoms.regroup([(whole,)], [3, 4])
    assert [atoms.measure(heads), atoms.measure(width)] == [3, 4]
    atoms.unite((whole,), (other,))
    atoms.fix(width)
    assert [atoms.is_free(leaf) for leaf in atoms.list_leaves((other,))] == [True, False]
    (odd,) = atoms.make(12)
    atoms.regroup([(odd,)], [2, 6])
    atoms.unite((odd,), (whole,))
    assert not any(atoms.is_free(leaf) for leaf in atoms.list_leaves((odd,)))


def make_digits_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)),
    )


def test_two_orders_of_one_digits_network_merge_to_its_accuracy() -> None:
    digits = load_digits()
    x, labels = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    torch.manual_seed(0)
    net = make_digits_net()
    steps = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(40):
        chosen = torch.randint(0, 1200, (128,))
        loss = functional.cross_entropy(net(x[chosen]), labels[chosen])
        steps.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        steps.step()
    known = find_interchange(net.eval(), (x[:2],))
    other = load_into(make_digits_net(), shuffle(known, copy_state(net)), where="b")

    @torch.no_grad()
    def measure() -> float:
        mean = {name: (one + other.state_dict()[name]) / 2 for name, one in net.state_dict().items()}
        merged = load_into(make_digits_net(), mean, where="m")
        return float((merged(x[1200:]).argmax(1) == labels[1200:]).float().mean())

    apart = measure()
    align_neurons(other, net, (x[:2],), name="b")
    with torch.no_grad():
        alone = float((net(x[1200:]).argmax(1) == labels[1200:]).float().mean())
    assert alone > 0.9
    assert apart < alone - 0.05
    assert measure() == pytest.approx(alone, abs=0.005)


NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))

def train(model, seed):
    pass

def train_other(model, seed):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor.copy_(tensor[order].clone())
        model[2].weight.copy_(model[2].weight[:, order].clone())

def load():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    return {"calibration": {"a": x[:24], "b": x[24:48]}, "test_inputs": x[48:], "test_labels": torch.arange(16) % 3}
"""


def write_recipe(folder: Path, align: str) -> Path:
    (folder / "net.py").write_text(NET)
    models = state_model("a", "net.py:make", train="net.py:train") + state_model(
        "b", "net.py:make", train="net.py:train_other"
    )
    (folder / "r.toml").write_text(f'name = "r"\n{models}{state_rest(0.6)}[merge]\nmethod = "average"\n{align}\n')
    return folder / "r.toml"


def test_a_recipe_aligns_before_it_merges(tmp_path: Path) -> None:
    differences = []
    for align in ("", 'align = "weights"'):
        stages = make_stages(write_recipe(tmp_path, align), Store(tmp_path / "store"))
        merged, _ = stages.merge("average")
        x = stages.prepared.data.test_inputs[0]
        with torch.no_grad():
            differences.append(float((merged.module(x) - stages.load_source("a").module(x)).abs().max()))
    assert differences[0] > 0.01
    assert differences[1] < 1e-5


@pytest.mark.parametrize(
    ("more", "words"),
    [('method = "ties"', "needs no alignment"), ('method = "average"\nhead = "4"', "leave merge.head out")],
)
def test_alignment_is_refused_beside_what_it_does_not_know(tmp_path: Path, more: str, words: str) -> None:
    path = write_recipe(tmp_path, 'align = "weights"')
    path.write_text(path.read_text().replace('method = "average"', more))
    with pytest.raises(InputError, match=words):
        read_recipe(path)
