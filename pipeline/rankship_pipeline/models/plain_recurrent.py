"""Recurrent networks of linear layers that are called: for each layer and direction one on inputs, one on the state."""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from rankship_pipeline.models.plain_attention import make_linear

State = tuple[Tensor, ...]  # hidden (batch, width), and an LSTM's memory (batch, hidden)
_SAMPLES_FIRST = False
_ONE = 2  # dimensions of a sequence without an axis of samples


class PlainCell(nn.Module):
    """One step of an LSTM, GRU or plain recurrent network; `ih` and `hh` hold the gates of all kinds below each other.

    `hr`, where there is one, projects the hidden state of an LSTM. Called as torch's cells are.
    """

    hr: nn.Linear | None

    def __init__(self, mode: str, ih: nn.Linear, hh: nn.Linear, hr: nn.Linear | None = None) -> None:
        super().__init__()
        self.mode, self.ih, self.hh, self.hr = mode, ih, hh, hr
        self.input_size, self.hidden_size = ih.in_features, ih.out_features // _GATES[mode]

    def forward(self, input: Tensor, hx: Tensor | State | None = None) -> Tensor | State:  # noqa: A002 - as torch's
        """The next hidden state; of an LSTM with its memory."""
        single = input.ndim == 1
        state = self.start(input[None] if single else input) if hx is None else _as_state(hx)
        if single and hx is not None:
            state = tuple(one[None] for one in state)
        state = self.step(self.ih(input[None] if single else input), state)
        state = tuple(one[0] for one in state) if single else state
        return state if self.mode == "LSTM" else state[0]

    def start(self, like: Tensor) -> State:
        """The zero state for inputs (batch, ...)."""
        width = self.hidden_size if self.hr is None else self.hr.out_features
        zero = like.new_zeros(len(like), width)
        return (zero, like.new_zeros(len(like), self.hidden_size)) if self.mode == "LSTM" else (zero,)

    def step(self, x: Tensor, state: State) -> State:
        """The next state after inputs that `ih` has mapped to (batch, gates)."""
        new = _STEPS[self.mode](x, self.hh(state[0]), state)
        return new if self.hr is None else (self.hr(new[0]), *new[1:])

    @property
    def watched(self) -> bool:
        """Whether its layers must be called one by one: factored, or with hooks on them."""
        layers = (self.ih, self.hh, self.hr)
        return any(one is not None and (type(one) is not nn.Linear or one._forward_hooks) for one in layers)  # noqa: SLF001

    @property
    def weights(self) -> list[Tensor]:
        """Its tensors in the order of torch's own operator."""
        layers = [
            self.ih.weight,
            self.hh.weight,
            self.ih.bias,
            self.hh.bias,
            None if self.hr is None else self.hr.weight,
        ]
        return [one for one in layers if one is not None]


class PlainRecurrent(nn.Module):
    """Computes what nn.LSTM, nn.GRU and nn.RNN do, of cells in the order of layers and, within one, of directions.

    While all its layers are plain and nothing watches them it is torch's one operator; else it runs step by step, so
    that an exporter unrolls it for the length of its sample.
    """

    def __init__(self, of: nn.RNNBase, cells: list[PlainCell]) -> None:
        super().__init__()
        self.mode, self.input_size, self.hidden_size, self.proj_size = (
            of.mode,
            of.input_size,
            of.hidden_size,
            of.proj_size,
        )
        self.num_layers, self.bias, self.batch_first = of.num_layers, of.bias, of.batch_first
        self.dropout, self.bidirectional = of.dropout, of.bidirectional
        self.cells = nn.ModuleList(cells)

    def flatten_parameters(self) -> None:
        """Do nothing: torch's own lays its weights out for a GPU."""

    def forward(self, input: Tensor, hx: Tensor | State | None = None) -> tuple[Tensor, Tensor | State]:  # noqa: A002
        """The outputs of the last layer at every step, and the last state of every layer and direction."""
        cells = [cast("PlainCell", one) for one in self.cells]
        x = input.unsqueeze(1) if input.ndim == _ONE else input.transpose(0, 1) if self.batch_first else input
        if hx is None:
            starts = [cell.start(x[0]) for cell in cells]
        else:
            given = _as_state(hx)
            given = tuple(one.unsqueeze(1) for one in given) if input.ndim == _ONE else given
            starts = [tuple(one[index] for one in given) for index in range(len(cells))]
        y, last = (self._run if any(cell.watched for cell in cells) else self._run_whole)(x, starts)
        if input.ndim == _ONE:
            y, last = y.squeeze(1), tuple(one.squeeze(1) for one in last)
        elif self.batch_first:
            y = y.transpose(0, 1)
        return y, last if self.mode == "LSTM" else last[0]

    def _run(self, x: Tensor, starts: list[State]) -> tuple[Tensor, State]:
        """Step by step: x (steps, batch, inputs) to (steps, batch, outputs), and the last states stacked."""
        directions = 2 if self.bidirectional else 1
        last: list[State] = []
        for index in range(self.num_layers):
            if index and self.dropout and self.training:
                x = dropout(x, self.dropout)
            sides = []
            for side in range(directions):
                cell = cast("PlainCell", self.cells[index * directions + side])
                outputs, state = _scan(cell, x.flip(0) if side else x, starts[index * directions + side])
                sides.append(outputs.flip(0) if side else outputs)
                last.append(state)
            x = torch.cat(sides, -1) if directions > 1 else sides[0]
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _run_whole(self, x: Tensor, starts: list[State]) -> tuple[Tensor, State]:
        """By torch's own operator; gives what `_run` gives."""
        state = [torch.stack(parts) for parts in zip(*starts, strict=True)]
        weights = [one for cell in self.cells for one in cast("PlainCell", cell).weights]
        run, start = _OPERATORS[self.mode], state if self.mode == "LSTM" else state[0]
        y, *last = run(
            x,
            start,
            weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            _SAMPLES_FIRST,
        )
        return y, tuple(last)


def rewrite_recurrent(module: nn.Module) -> nn.Module:
    """A PlainRecurrent with the weights of this nn.LSTM, nn.GRU or nn.RNN."""
    of = cast("nn.RNNBase", module)
    ends = ("", "_reverse") if of.bidirectional else ("",)
    return PlainRecurrent(of, [_make_cell(of, of.mode, f"_l{n}{end}") for n in range(of.num_layers) for end in ends])


def rewrite_cell(module: nn.Module) -> nn.Module:
    """A PlainCell with the weights of this nn.LSTMCell, nn.GRUCell or nn.RNNCell."""
    kinds: dict[type[nn.Module], str] = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}
    mode = kinds.get(type(module)) or f"RNN_{cast('nn.RNNCell', module).nonlinearity.upper()}"
    return _make_cell(module, mode, "")


def _make_cell(of: nn.Module, mode: str, end: str) -> PlainCell:
    def take(name: str) -> Tensor | None:
        found: Tensor | None = getattr(of, name + end, None)
        return found

    ih, hh = (make_linear(cast("Tensor", take(f"weight_{one}")), take(f"bias_{one}")) for one in ("ih", "hh"))
    hr = take("weight_hr")
    return PlainCell(mode, ih, hh, None if hr is None else make_linear(hr, None))


def _scan(cell: PlainCell, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Every step of one layer in one direction: x (steps, batch, inputs) to its outputs and the last state."""
    outputs = []
    for gates in cell.ih(x).unbind(0):
        state = cell.step(gates, state)
        outputs.append(state[0])
    return torch.stack(outputs), state


def _as_state(hx: Tensor | State) -> State:
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _step_lstm(x: Tensor, h: Tensor, state: State) -> State:
    """Gates in torch's order: input, forget, cell, output."""
    i, f, g, o = _cut(x + h, 4)
    memory = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * memory.tanh(), memory


def _step_gru(x: Tensor, h: Tensor, state: State) -> State:
    """Gates in torch's order: reset, update, new."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = _cut(x, 3), _cut(h, 3)
    new = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return (new + (x_z + h_z).sigmoid() * (state[0] - new),)


def _cut(gates: Tensor, count: int) -> list[Tensor]:
    """The gates of each kind: slices, because XNNPACK has no split, which would break every step into delegates."""
    width = gates.shape[-1] // count
    return [gates[..., start : start + width] for start in range(0, gates.shape[-1], width)]


def _step_tanh(x: Tensor, h: Tensor, _state: State) -> State:
    return ((x + h).tanh(),)


def _step_relu(x: Tensor, h: Tensor, _state: State) -> State:
    return ((x + h).relu(),)


_STEPS: Mapping[str, Callable[[Tensor, Tensor, State], State]] = {
    "LSTM": _step_lstm,
    "GRU": _step_gru,
    "RNN_TANH": _step_tanh,
    "RNN_RELU": _step_relu,
}
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
_OPERATORS: Mapping[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch._VF.lstm,  # noqa: SLF001 - as nn.LSTM calls it
    "GRU": torch._VF.gru,  # noqa: SLF001
    "RNN_TANH": torch._VF.rnn_tanh,  # noqa: SLF001
    "RNN_RELU": torch._VF.rnn_relu,  # noqa: SLF001
}
