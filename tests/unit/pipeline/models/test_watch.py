"""A model is watched without changing it, unless asked to, and no hook stays behind."""

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.models.watch import run_until, watch


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def count_hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_every_call_of_every_named_module_is_seen_in_order() -> None:
    net, x = make_net(), torch.randn(5, 3)
    seen: list[tuple[str, Tensor, Tensor]] = []
    with watch(net, ["2", "0"], lambda *call: seen.append(call)):
        y = net(net(x)[:, :1].expand(5, 3))
    assert [name for name, _, _ in seen] == ["0", "2", "0", "2"]
    assert seen[0][1] is x
    assert seen[-1][2] is y
    assert count_hooks(net) == 0


def test_an_input_that_is_given_by_name_is_seen() -> None:
    net, x, seen = make_net(), torch.randn(5, 3), list[Tensor]()
    with watch(net, ["0"], lambda _name, given, _y: seen.append(given)):
        net[0](input=x)
    assert seen[0] is x


def test_a_tensor_that_is_returned_takes_the_outputs_place() -> None:
    net = make_net()
    with watch(net, ["2"], lambda _name, _x, y: y * 0):
        assert not net(torch.randn(5, 3)).any()
    assert net(torch.randn(5, 3)).any()


def test_no_hook_stays_where_a_name_is_wrong_or_the_model_fails() -> None:
    net = make_net()
    with pytest.raises(AttributeError), watch(net, ["0", "9"], lambda *_: None):
        pass
    with pytest.raises(RuntimeError), watch(net, ["0"], lambda *_: None):
        net(torch.randn(5, 7))
    assert count_hooks(net) == 0


def test_a_model_runs_no_further_than_it_is_asked_to() -> None:
    net, x, seen = make_net(), torch.randn(5, 3), list[str]()
    with watch(net, ["0", "1", "2"], lambda name, _x, _y: seen.append(name)):
        given, output = run_until(net, "1", (x,))
    assert seen == ["0", "1"]
    assert torch.equal(given, net[0](x))
    assert torch.equal(output, net[0](x).relu())
    assert count_hooks(net) == 0
