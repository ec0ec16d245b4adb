from dataclasses import replace

import torch
from torch import nn

from rankship_pipeline.factors.analysis import Decompositions, analyse
from rankship_pipeline.factors.decompose import Metric
from rankship_pipeline.factors.decomposition import Decomposition
from rankship_pipeline.models.layers import Layer, find_layers


def make_layers() -> dict[str, Metric]:
    torch.manual_seed(0)
    inputs = torch.randn(40, 12, dtype=torch.float64)
    return {name: Metric(gram=inputs.T @ inputs, curvature=torch.eye(12, dtype=torch.float64)) for name in "012"}


def test_what_has_no_place_is_made_again_the_same() -> None:
    net = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
    analysis = analyse(net, find_layers(net), make_layers(), "swift")
    first = {name: (one, one.spectrum, one.total, one.weighted) for name, one in analysis.layers.items()}
    held = first["0"][0].held_bytes
    assert held == 8 * 7 * 12 * 12  # the weight, U, right, the weighted weight, the Gram, the curvature and its root
    assert all(analysis.layers[name] is one for name, (one, *_) in first.items()), "a small model's stay"

    made = []

    def make(layer: Layer) -> Decomposition:
        made.append(layer.name)
        return replace(first[layer.name][0])

    narrow = Decompositions(find_layers(net), make, most_bytes=held)
    for _ in range(2):
        for name, (_, spectrum, total, weighted) in first.items():
            again = narrow[name]
            assert torch.equal(again.spectrum.U, spectrum.U)
            assert torch.equal(again.spectrum.right, spectrum.right)
            assert torch.equal(again.weighted, weighted)
            assert again.total == total
    assert made == ["0", "1", "2", "1", "2"], "of what is gone through in turn the first stays"
    assert (len(narrow), list(narrow)) == (3, ["0", "1", "2"])
