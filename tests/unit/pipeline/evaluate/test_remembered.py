"""A remembered model gives its outputs back for slices of its inputs, and runs for anything else."""

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import predict, split
from rankship_pipeline.evaluate.masks import find_masks
from rankship_pipeline.evaluate.remembered import Remembered
from rankship_pipeline.models.outputs import call


class Net(nn.Module):
    """Two outputs of two inputs; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"logits": self.head(x), "mask": attention_mask * 1.0}


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 4, 3, generator=generator), torch.randint(0, 2, (20, 4), generator=generator)


def test_slices_of_the_known_inputs_are_not_computed_again(inputs: tuple[Tensor, Tensor]) -> None:
    net = Net()
    wanted = predict(net, inputs)
    known, before = Remembered(net, inputs, wanted), net.calls
    for size in (1, 3, 20):
        for place, batch in enumerate(split(inputs, size)):
            found = call(known, batch)
            assert list(found) == ["logits", "mask"]
            assert torch.equal(found["mask"], batch[1] * 1.0)
            assert len(found["logits"]) == len(batch[0]), place
    assert net.calls == before
    assert torch.equal(predict(known, inputs)["logits"], wanted["logits"])
    floats = (inputs[0], inputs[1] + 0.5)
    for some in (inputs, floats, (inputs[1].long(), inputs[1])):  # of unnamed inputs not all are masks
        assert len(find_masks(known, some)) == len(find_masks(net, some))
    assert [one.shape for one in find_masks(known, (inputs[1].long() + 7, inputs[1]))] == [(20, 4)]


def test_anything_else_is_computed(inputs: tuple[Tensor, Tensor]) -> None:
    net = Net()
    known = Remembered(net, inputs, {name: one * 0 for name, one in predict(net, inputs).items()})
    x, mask = inputs
    others = {
        "other samples": (x + 1, mask),
        "a copy": (x.clone(), mask.clone()),
        "parts of two places": (x[:4], mask[4:8]),
        "every other sample": (x[::2], mask[::2]),
        "fewer positions": (x[:, :2], mask[:, :2]),
    }
    for name, batch in others.items():
        before = net.calls
        assert call(known, batch)["logits"].abs().sum() > 0, name
        assert net.calls == before + 1, name
