"""Reconstruction around what is carried past layers: where sums are, that they are made up for, and in one pass."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from make.decoders import make_decoder
from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import collect_halves, predict
from rankship_pipeline.evaluate.curvature import collect_curvatures
from rankship_pipeline.evaluate.grams import collect_grams
from rankship_pipeline.factors.analysis import Analysis, analyse, fill
from rankship_pipeline.factors.decompose import fit_metric
from rankship_pipeline.foundation.records import Factors
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.layers import as_matrix, find_layers, get_layer
from rankship_pipeline.recover import side_by_side
from rankship_pipeline.recover.reconstruct import reconstruct
from rankship_pipeline.recover.side_by_side import find_sums

RANK = 10


def make_model(name: str) -> tuple[nn.Module, Inputs, Inputs]:
    """A decoder, tokens to calibrate on, and others."""
    net = ByPosition(make_decoder(name), ("input_ids",)).eval()
    tokens = torch.randint(0, 50, (96, 16), generator=torch.Generator().manual_seed(0))
    return net, (tokens[:64],), (tokens[64:],)


def take_apart(net: nn.Module, inputs: Inputs) -> Analysis:
    layers = find_layers(net, ("*embed*", "*lm_head*"))
    grams, curvatures = (collect_halves(one, net, inputs, layers) for one in (collect_grams, collect_curvatures))
    metrics = {
        one.name: fit_metric(as_matrix(get_layer(net, one.name)), grams[one.name], curvatures[one.name], len(inputs[0]))
        for one in layers
    }
    return analyse(net, layers, metrics, "swift")


def plan_some(analysis: Analysis) -> dict[str, Factors]:
    """Ranks in the first two blocks' queries, gates and outputs."""
    wanted = ("q_proj", "gate_proj", "down_proj")
    names = [name for name in analysis.layers if "layers.2" not in name and name.endswith(wanted)]
    return {name: Factors(rank=RANK) for name in names}


def test_the_sums_of_a_decoder_are_found() -> None:
    net, inputs, _ = make_model("llama")
    names = [layer.name for layer in find_layers(net)]
    block = "model.model.layers"
    assert find_sums(net, names, (inputs[0][:1],)) == {
        f"{block}.0.self_attn.o_proj": f"{block}.0.post_attention_layernorm",
        f"{block}.0.mlp.down_proj": f"{block}.1.input_layernorm",
        f"{block}.1.self_attn.o_proj": f"{block}.1.post_attention_layernorm",
        f"{block}.1.mlp.down_proj": f"{block}.2.input_layernorm",
        f"{block}.2.self_attn.o_proj": f"{block}.2.post_attention_layernorm",
        f"{block}.2.mlp.down_proj": "model.model.norm",
    }


class Net(nn.Module):
    """Layers whose outputs are added to what is carried, scaled before that, or passed on alone; one runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.added, self.scaled, self.alone = (nn.Linear(8, 8) for _ in range(4))
        self.twice, self.norm, self.drop, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        x = self.norm(x + self.drop(self.added(functional.relu(x))))
        x = self.alone(x + 2 * self.scaled(x))
        x = functional.relu(x)
        x = x + self.twice(x)
        logits: Tensor = self.head(x + self.twice(x))
        return logits


def test_only_sums_that_are_that_and_nothing_else_are_found() -> None:
    torch.manual_seed(0)
    net = Net().eval()
    found = find_sums(net, [layer.name for layer in find_layers(net)], (torch.randn(4, 8),))
    assert found == {"added": "norm"}


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_making_up_for_what_is_carried_helps_on_other_inputs_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen, unseen = make_model(name)
    analysis = take_apart(net, seen)
    plan = plan_some(analysis)
    plain, carried = fill(analysis, plan), reconstruct(analysis, plan, seen)
    monkeypatch.setattr("rankship_pipeline.recover.reconstruct.find_sums", lambda *_: {})
    alone = reconstruct(analysis, plan, seen)
    for inputs in (seen, unseen):
        teacher = predict(net, inputs)
        lost = [measure_divergence(one, inputs, teacher) for one in (plain, alone, carried)]
        assert lost[1] < lost[0]
        assert lost[2] < 0.95 * lost[1]


def test_dense_layers_before_the_first_factored_one_keep_every_number() -> None:
    net, seen, _ = make_model("llama")
    analysis = take_apart(net, seen)
    changed = reconstruct(analysis, {"model.model.layers.1.mlp.up_proj": Factors(rank=4)}, seen)
    after = changed.state_dict()
    moved = {name for name, one in net.named_parameters() if name not in after or not torch.equal(one, after[name])}
    later = ("1.mlp.up_proj", "1.mlp.down_proj", "2.self_attn.o_proj", "2.mlp.down_proj")
    assert moved == {f"model.model.layers.{one}.weight" for one in later}


def test_running_on_gives_what_passes_from_the_beginning_give(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen, _ = make_model("llama")
    analysis = take_apart(net, seen)
    plan, calls = plan_some(analysis), Counter[str]()
    attention = net.get_submodule("model.model.layers.0.self_attn.k_proj")
    forward = type(attention).forward

    def count(module: nn.Module, x: Tensor) -> Tensor:
        calls["dense"] += module is attention
        found: Tensor = forward(module, x)
        return found

    monkeypatch.setattr(nn.Linear, "forward", count)
    running = reconstruct(analysis, plan, seen)
    on_the_way = calls["dense"]
    monkeypatch.setattr(side_by_side, "_BYTES", 0)
    again = reconstruct(analysis, plan, seen)
    assert on_the_way < 8  # two halves, the look for sums and the trials
    assert calls["dense"] - on_the_way > 2 * len(plan)
    for name, value in running.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=1e-5)
