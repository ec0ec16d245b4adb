"""Passes that begin at a layer: the same outputs as full passes give, and nothing before the layer runs again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.models.layers import find_layers, get_layer
from rankship_pipeline.models.restart import DivergedError, Restart, order_calls

X = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)


class Block(nn.Module):
    """A residual block that changes tensors in place, in modules and between them; its shortcut is called last."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(6, 6, 1)
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.second(self.act(self.norm(self.first(x))))
        y += self.shortcut(x)
        return self.act(y), {"seen": y}


class Net(nn.Module):
    """A stem, two blocks, one of them called twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        for block in (*self.blocks, self.blocks[0]):
            x, _ = block(x)
        return {"logits": self.head(x.mean((2, 3)))}


class Wrapped:
    """A value that no record can hold."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Opaque(nn.Module):
    """Returns something that is no tensor from a module with layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Wrapped:
        return Wrapped(self.body(x))


class Unwrapping(nn.Module):
    """Two opaque modules in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque = nn.ModuleList([Opaque(), Opaque()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for one in self.opaque:
            x = one(x).tensor
        return torch.as_tensor(self.head(x.mean((1, 2))))


@pytest.fixture(params=[Net, Unwrapping])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = request.param().eval()
    return made


def list_order(model: nn.Module) -> list[str]:
    return order_calls(model, [layer.name for layer in find_layers(model)], X)


@torch.inference_mode()
def test_from_every_layer_a_changed_weight_gives_what_a_full_pass_gives(model: nn.Module) -> None:
    restart = Restart(model, X)
    for name in list_order(model):
        layer = get_layer(model, name)
        restart.advance([layer])
        saved = layer.weight.clone()
        for factor in (0.5, -1.0):
            layer.weight.copy_(factor * saved)
            (full,), (found,) = Restart(model, X).run().values(), restart.run().values()
            assert torch.equal(found, full)
        layer.weight.copy_(saved)
    (full,), (found,) = Restart(model, X).run().values(), restart.run().values()
    assert torch.equal(found, full)


def test_layers_come_in_the_order_of_their_calls() -> None:
    order = list_order(Net().eval())
    assert order[:4] == ["stem.0", "blocks.0.first", "blocks.0.second", "blocks.0.shortcut"]
    assert order[-1] == "head"
    assert "unused" not in order


def test_what_returned_before_the_stop_does_not_run_again() -> None:
    model = Net().eval()
    restart = Restart(model, X)
    restart.advance([get_layer(model, "blocks.1.second")])
    calls = {name: 0 for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}

    def count(name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            calls[name] += 1
            return forward(x)

        return run

    for name in calls:
        layer = get_layer(model, name)
        vars(layer)["forward"] = count(name, layer.forward)
    restart.run()
    assert calls == {
        "stem.0": 0,
        "blocks.0.first": 1,  # in the second call of its block
        "blocks.0.second": 1,
        "blocks.0.shortcut": 1,
        "blocks.1.first": 0,
        "blocks.1.second": 1,
        "blocks.1.shortcut": 1,
    }


def test_the_model_keeps_its_forwards() -> None:
    model = Net().eval()
    own = vars(model.head)["forward"] = model.head.forward
    restart = Restart(model, X)
    restart.advance([model.head])
    restart.run()
    assert [name for name, one in model.named_modules() if "forward" in vars(one)] == ["head"]
    assert vars(model.head)["forward"] is own


def test_a_stop_that_is_never_called_is_refused() -> None:
    model = Net().eval()
    with pytest.raises(DivergedError):
        Restart(model, X).advance([model.unused])


class Turning(nn.Module):
    """Takes another way through its layers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.turned = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head((self.right if self.turned else self.left)(x)))


def test_a_pass_on_another_way_than_the_recorded_one_is_refused() -> None:
    model = Turning().eval()
    restart = Restart(model, X)
    restart.advance([model.head])
    model.turned = True
    with pytest.raises(DivergedError):
        restart.run()


def test_the_record_holds_the_outputs_of_what_returned_alone() -> None:
    inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model, x = nn.Sequential(inner, nn.Linear(2, 16), nn.Linear(16, 1)).eval(), torch.randn(3, 4)
    restart = Restart(model, (x,))
    sizes = []
    for stop in (inner[0], inner[2], model[1], model[2]):
        restart.advance([stop])
        sizes.append(restart.held_bytes)
    assert sizes == [0, 3 * 16 * 4, 3 * 2 * 4, 3 * 18 * 4]
