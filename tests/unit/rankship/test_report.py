import re

import pytest
import torch
from torch import Tensor, nn

import rankship as rs
from make.sessions import make_net


@pytest.fixture
def small(net: nn.Module, inputs: Tensor) -> rs.Compressed:
    labels = net(inputs).argmax(1)
    return rs.compress(net, inputs, kept_parameters=0.5, test=(inputs, labels), progress=False)


def test_the_report_says_what_every_layer_loses(small: rs.Compressed) -> None:
    text = small.report()
    assert repr(small) == text, "a session shows it"
    assert f"{small.dense_parameters:,} → {small.plan.total_parameters:,} parameters" in text
    for layer in small.plan.layers:
        assert re.search(rf"^ {layer.name} +{layer.rows}×{layer.columns} ", text, re.MULTILINE)
    assert "source:model" in text
    assert "100.0 %" in text, "the model itself is right by its own answers"
    assert "\x1b" not in text


def test_a_merge_reports_what_merging_costs(net: nn.Module, inputs: Tensor) -> None:
    one = rs.merge([net, make_net(2)], {"a": inputs, "b": -inputs}, progress=False)
    text = one.report()
    assert "lost by merging" in text
    assert all(re.search(rf"^ {name} .*%", text, re.MULTILINE) for name in one.interference)


def test_a_plan_is_a_table_in_a_notebook(small: rs.Compressed) -> None:
    html = small.plan._repr_html_()
    assert small._repr_html_() == html
    assert html.startswith("<table><tr><th>layer</th>")
    assert html.count("<tr>") == len(small.plan.layers) + 1
    for layer in small.plan.layers:
        assert f"<td>{layer.name}</td>" in html


def test_names_are_escaped_in_the_table(inputs: Tensor) -> None:
    odd = nn.Sequential()
    odd.add_module("<b>&", nn.Linear(20, 48))
    odd.add_module("out", nn.Linear(48, 6))
    torch.manual_seed(0)
    small = rs.compress(odd, inputs, kept_parameters=0.9, progress=False)
    assert "<td>&lt;b&gt;&amp;</td>" in small.plan._repr_html_()


def test_a_report_is_text_in_a_notebook_too(small: rs.Compressed, monkeypatch: pytest.MonkeyPatch) -> None:
    before = small.report()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert small.report() == before
