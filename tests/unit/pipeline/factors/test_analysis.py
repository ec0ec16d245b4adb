import torch
from torch import nn

from rankship_pipeline.factors.analysis import Decompositions, analyse
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.models.layers import find_layers


def make_layers() -> dict[str, Metric]:
    torch.manual_seed(0)
    inputs = torch.randn(40, 12, dtype=torch.float64)
    return {name: Metric(gram=inputs.T @ inputs, curvature=torch.eye(12, dtype=torch.float64)) for name in "012"}


def test_layers_forget_what_they_were_taken_apart_into_and_compute_the_same_again() -> None:
    net = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
    found = analyse(net, find_layers(net), make_layers(), "swift").layers
    first = {name: (one.spectrum, one.total, one.weighted) for name, one in found.items()}
    held = found["0"].held_bytes
    assert held == 8 * 4 * 12 * 12  # U, right, the weighted weight and the curvature's root
    assert sum(one.held_bytes for one in found.values()) == 3 * held  # a small model's stay

    narrow = Decompositions(found, most_bytes=held)
    for name, (spectrum, total, weighted) in first.items():
        again = narrow[name]
        again.forget()
        assert again.held_bytes == 0
        assert torch.equal(again.spectrum.U, spectrum.U)
        assert torch.equal(again.spectrum.right, spectrum.right)
        assert torch.equal(again.weighted, weighted)
        assert again.total == total
    assert [narrow["2"].held_bytes, found["0"].held_bytes, found["1"].held_bytes] == [held, 0, held]
    assert (len(narrow), list(narrow)) == (3, ["0", "1", "2"])
