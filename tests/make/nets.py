"""Questions that tests ask of any net."""

import torch
from torch import nn


def is_same(left: nn.Module, right: nn.Module) -> bool:
    """Whether two nets hold the same values."""
    states = left.state_dict(), right.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def count_hooks(*nets: nn.Module) -> int:
    """How many hooks hang on these nets' modules."""
    modules = [module for net in nets for module in net.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
