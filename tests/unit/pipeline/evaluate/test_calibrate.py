from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate import calibrate
from rankship_pipeline.evaluate.calibrate import fit_outputs, predict, split
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.models.layers import find_layers

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1)},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (2, 3), "padding": "same"},  # an even kernel pads one side more than the other
    {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid"},
]


def assert_close_at_scale(found: Tensor, expected: Tensor) -> None:
    """Equal but for float32 sums, whose error is a share of the largest entry: products are summed in float32."""
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def gather_patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What each output position sees, by convolving with one unit kernel per weight: (positions, in·kh·kw)."""
    columns = conv.weight[0].numel()
    probe = nn.Conv2d(
        conv.in_channels,
        columns,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=False,
    )
    probe.weight.data = torch.eye(columns).reshape(columns, *conv.weight.shape[1:])
    patches: Tensor = probe(x).detach().double()  # (n, in·kh·kw, rows, columns)
    return patches.permute(0, 2, 3, 1).reshape(-1, columns)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolutions_gram_is_that_of_the_patches_it_sees(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, **options))
    x = torch.randn(5, 2, 7, 6)
    X = gather_patches(net[0], x)  # type: ignore[arg-type]
    grams = collect_grams(net, (x,), find_layers(net))
    assert_close_at_scale(grams["0"], X.T @ X / 5)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
def test_a_linear_layers_gram_sums_over_samples_and_tokens(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(shape)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for row in x.reshape(-1, 4).double():
        expected += torch.outer(row, row)
    assert_close_at_scale(collect_grams(net, (x,), find_layers(net))["0"], expected / 5)


def make_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).eval()


def test_the_grams_of_a_deeper_layer_are_those_of_what_reaches_it() -> None:
    net, x = make_net(), torch.randn(5, 2, 4, 4)
    with torch.no_grad():
        X = net[:3](x).double()  # type: ignore[index]
    assert_close_at_scale(collect_grams(net, (x,), find_layers(net))["3"], X.T @ X / 5)


def test_the_batch_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = make_net(), torch.randn(calibrate.BATCH * 2 + 3, 2, 4, 4)
    batched = collect_grams(net, (x,), find_layers(net))
    monkeypatch.setattr(calibrate, "split", lambda inputs: split(inputs, 1000))
    whole = collect_grams(net, (x,), find_layers(net))
    for name, gram in whole.items():
        assert_close_at_scale(batched[name], gram)


def test_repeating_the_data_does_not_change_a_gram() -> None:
    net, x = make_net(), torch.randn(7, 2, 4, 4)
    once, thrice = (collect_grams(net, (data,), find_layers(net)) for data in (x, torch.cat([x, x, x])))
    for name, gram in once.items():
        assert_close_at_scale(thrice[name], gram)


def test_only_the_layers_asked_for_are_collected_and_no_hook_stays() -> None:
    net = make_net()
    assert list(collect_grams(net, (torch.randn(2, 2, 4, 4),), find_layers(net, ("0",)))) == ["3"]
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_hooks_are_removed_when_the_model_fails() -> None:
    net = make_net()
    with pytest.raises(RuntimeError):
        collect_grams(net, (torch.randn(2, 5, 4, 4),), find_layers(net))
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_layer_that_is_never_reached_has_a_zero_gram() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    grams = collect_grams(Idle(), (torch.randn(3, 2),), find_layers(Idle()))
    assert not grams["idle"].any()
    assert grams["used"].any()


def test_splitting_keeps_rows_of_all_tensors_together() -> None:
    a, b = torch.arange(5), torch.arange(5) * 10
    assert [(x.tolist(), y.tolist()) for x, y in split((a, b), 2)] == [
        ([0, 1], [0, 10]),
        ([2, 3], [20, 30]),
        ([4], [40]),
    ]


@pytest.mark.parametrize(("samples", "sizes"), [(1, [1]), (64, [64]), (65, [33, 32]), (130, [44, 43, 43])])
def test_batches_are_as_even_as_can_be(samples: int, sizes: list[int]) -> None:
    assert [len(x) for (x,) in split((torch.zeros(samples),), 64)] == sizes


def test_a_layer_called_by_keyword_is_seen() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(input=x)
            return y

    net, x = Named(), torch.randn(3, 2)
    assert_close_at_scale(collect_grams(net, (x,), find_layers(net))["fc"], (x.double().T @ x.double()) / 3)


def test_batches_are_as_large_as_their_outputs_have_place_for() -> None:
    """As of a language model, whose scores of a whole vocabulary are far larger than all else."""
    outputs = {"logits": torch.zeros(2, 5, 4), "state": torch.zeros(2, 5)}  # 100 bytes a sample
    assert [fit_outputs(outputs, 64, allowed) for allowed in (10_000, 640, 99)] == [64, 6, 1]


def test_a_model_of_large_outputs_sees_few_samples_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankship_pipeline.evaluate.calibrate.OUTPUT_BYTES", 100)
    torch.manual_seed(0)
    net, X = nn.Linear(3, 10).eval(), torch.randn(7, 3)
    sizes: list[int] = []

    def note(_module: nn.Module, x: tuple[Tensor], _y: Tensor) -> None:
        sizes.append(len(x[0]))

    net.register_forward_hook(note)
    found = predict(net, (X,))["output"]
    assert max(sizes) == 2
    torch.testing.assert_close(found, net(X))
