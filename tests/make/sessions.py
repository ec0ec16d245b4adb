"""A Python session's small model, and what a folder made of one builds."""

from pathlib import Path

import torch
from torch import nn

from rankship_pipeline.flow.landed_budget import settle_budget
from rankship_pipeline.flow.preflight import prepare
from rankship_pipeline.flow.stage_model import Model
from rankship_pipeline.flow.stages import Stages
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.store import Store
from rankship_pipeline.recipe.choices import choose
from rankship_pipeline.recipe.rules import read_recipe

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 6)

    def forward(self, x):
        return self.head(self.body(x))
"""


def make_net(seed: int = 0) -> nn.Module:
    """A small classifier of 20 numbers into 6 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6))


def compress_recipe(path: Path) -> tuple[Model, RankPlan]:
    """What a recipe file's own stages give, in a store of their own beside it."""
    recipe, store = read_recipe(path), Store(path.parent / "store of its own")
    prepared = prepare(recipe, path.resolve().parent)
    return Stages(prepared, store, Steps(quiet=True)).compress(settle_budget(prepared, store), choose(recipe))
