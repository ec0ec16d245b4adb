"""The exact knapsack on as many layers, ranks and bit widths as a large language model has."""

import numpy as np

from rankship_pipeline.ranks.knapsack import Option, Solution, solve
from speed.records import Measured, make_figure
from speed.timing import list_times, spend_in_turn

_BITS = (4, 8, 16)
_SHAPES = ((4096, 4096), (11008, 4096), (4096, 1024))
_KEPT = 0.4  # of the cost of all layers in 16 bits
EXACT = 1e-9  # of the largest error: what the knapsack itself calls solved


def make_menus(layers: int, ranks: int) -> list[list[Option]]:
    """Return each layer's options: every rank in every width, from spectra of random decay, and dense in 16 bits."""
    random = np.random.default_rng(0)
    menus = []
    for number in range(layers):
        rows, columns = _SHAPES[number % len(_SHAPES)]
        most = min(rows, columns)
        energy = np.arange(1, most + 1) ** -random.uniform(0.6, 2.5) * random.lognormal(0, 0.1, most)
        lost = np.append(energy[::-1].cumsum()[::-1], 0) * random.lognormal(0, 2) / energy.sum()
        steps = np.linspace(1, most * 0.75, ranks).round().astype(int)
        menus.append(
            [
                Option(int(rank) * (rows + columns) * bits // 8, float(lost[rank] + lost[0] * 4.0**-bits))
                for bits in _BITS
                for rank in steps
            ]
            + [Option(rows * columns * 2, 0.0)]
        )
    return menus


def measure_allocation(rounds: int, *, layers: int, ranks: int) -> Measured:
    """Time the solver, and say how far its plan may be from the optimum (`gap`, a share of the largest error)."""
    menus = make_menus(layers, ranks)
    limit = int(_KEPT * sum(menu[-1].cost for menu in menus))
    solutions: list[Solution] = []
    times = list_times(spend_in_turn({"ours": lambda: solutions.append(solve(menus, limit))}, rounds), "ours")
    largest = max(option.error for menu in menus for option in menu)
    gaps = [max(0.0, one.error - one.bound) / largest for one in solutions]
    return Measured(
        figures=(*times, make_figure("gap", "share of the largest error", gaps)),
        parameters={"layers": str(layers), "ranks": str(ranks), "bit_widths": str(len(_BITS))},
    )
