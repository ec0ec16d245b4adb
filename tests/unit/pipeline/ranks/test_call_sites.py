"""Sites: what a layer's time depends on is seen and nothing else is, and copies compute what they say."""

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.factors.forms import count_parameters, list_ladder
from rankship_pipeline.foundation.records import Factors, Form
from rankship_pipeline.models.layers import find_layers
from rankship_pipeline.ranks.call_sites import Site, find_sites, hash_model, make_copies, make_samples


class Net(nn.Module):
    """Two convolutions that run alike, a third on another size, one called twice, and a head."""

    def __init__(self, padding: int | str = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, 1, padding)
        self.second = nn.Conv2d(4, 4, 3, 1, padding)
        self.tall = nn.Conv2d(4, 8, (3, 1), 2, dilation=(2, 1), bias=False)
        self.twice = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tall(self.second(torch.relu(self.first(x)))).mean((2, 3))
        return self.twice(torch.relu(self.twice(y)))  # type: ignore[no-any-return]


def see(model: nn.Module, size: int = 9) -> dict[str, tuple[Site, ...]]:
    return find_sites(model.eval(), find_layers(model), (torch.randn(2, 4, size, size),))


def test_layers_that_run_alike_share_a_site_and_every_call_counts() -> None:
    sites = see(Net())
    assert sites["first"] == sites["second"]
    assert sites["tall"] == (
        Site(
            kind="convolution",
            rows=8,
            columns=12,
            bias=False,
            input_shape=(1, 4, 9, 9),
            kernel=(3, 1),
            stride=(2, 2),
            dilation=(2, 1),
        ),
    )
    assert sites["twice"] == (Site(kind="linear", rows=8, columns=8, bias=True, input_shape=(1, 8)),) * 2
    assert len({site.name for some in sites.values() for site in some}) == 3
    assert str(sites["tall"][0]) == "convolution 4→8 3x1 /2 on 4x9x9"


def test_a_model_of_other_weights_is_the_same_and_one_of_other_sizes_is_not() -> None:
    known = hash_model(Net(), see(Net()))
    assert hash_model(Net(), see(Net())) == known
    assert hash_model(Net(), see(Net(), 11)) != known
    assert hash_model(Net("same"), see(Net("same"))) != known
    wrapped = nn.Sequential(Net(), nn.Hardtanh())  # what is no layer takes time too
    assert hash_model(wrapped, see(Net())) != known


@pytest.mark.parametrize("name", ["first", "tall", "twice", "table"])
@pytest.mark.parametrize("form", ["dense", "svd"])
def test_copies_are_the_layer_so_many_times_summed(name: str, form: str) -> None:
    table = Site(kind="embedding", rows=6, columns=20, bias=False, input_shape=(1, 5))
    site = table if name == "table" else see(Net())[name][0]
    factors = None if form == "dense" else Factors(rank=2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    copies, again = make_copies(site, factors, 3), make_copies(site, factors, 3)
    assert torch.equal(torch.get_rng_state(), before)
    x = make_samples(site, 2)
    assert x.shape == (2, *site.input_shape[1:])
    each = [layer(x) for layer in copies.layers]
    assert torch.allclose(copies(x), torch.stack(each).sum(0), atol=1e-6)
    assert torch.equal(copies(x), again(x))
    assert not torch.allclose(each[0], each[1])  # or a runtime could compute one and use it thrice
    weights = sum(p.numel() for one in copies.modules() for n, p in one.named_parameters(recurse=False) if n != "bias")
    assert weights == 3 * count_parameters(site.layer, factors)


@pytest.mark.parametrize("form", ["svd", "spatial", "tucker"])
@pytest.mark.parametrize("step", [1, 4])
def test_a_ladder_rises_and_stays_below_dense(form: Form, step: int) -> None:
    site = Site(kind="convolution", rows=32, columns=16 * 9, bias=False, input_shape=(1, 16, 8, 8), kernel=(3, 3))
    ladder = list_ladder(site.layer, step, form)
    costs = [count_parameters(site.layer, one) for one in ladder]
    assert costs == sorted(set(costs))
    assert 0 < costs[0] < costs[-1] < site.layer.parameters
    assert all(one.rank % step == 0 and one.form == form for one in ladder)
    assert all((one.input_rank or 0) % step == 0 for one in ladder)
    pointwise = Site(kind="convolution", rows=32, columns=16, bias=False, input_shape=(1, 16, 8, 8)).layer
    assert bool(list_ladder(pointwise, step, form)) == (form == "svd")
