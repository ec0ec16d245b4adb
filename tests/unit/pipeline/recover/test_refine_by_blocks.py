"""Refinement block by block: each block comes nearer to the dense one's outputs, and what is outside stays."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from make.nets import is_same
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.recipe.choices import RefineChoice
from rankship_pipeline.recover.refine import Saving, by_blocks, refine
from rankship_pipeline.recover.refine.by_blocks import find_blocks

CHOICE = RefineChoice(steps=90, by="blocks", step_size=3e-3)


class Block(nn.Module):
    """A residual block with its norm, whose second argument every call needs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden: Tensor, shift: Tensor) -> Tensor:
        output: Tensor = hidden + self.down(torch.tanh(self.up(self.norm(hidden) + shift)))
        return output


class Network(nn.Module):
    """An embedding, three blocks and a head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inputs = ("input_ids", "attention_mask")
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 5)
        self.eval()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden, mask[:, :, None] * 0.1)
        logits: Tensor = self.head(hidden)
        return logits


def make_inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (40, 6), generator=generator)
    return ids, (torch.arange(6) < torch.randint(2, 7, (40, 1), generator=generator)).long()


def blur(teacher: nn.Module) -> nn.Module:
    """The teacher with noise on the weights of its blocks."""
    student, generator = copy.deepcopy(teacher), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "blocks" in name and parameter.ndim == 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


@torch.no_grad()
def measure(student: nn.Module, teacher: nn.Module) -> float:
    """The squared error of the outputs, at positions that count."""
    inputs = make_inputs()
    errors = (student(*inputs) - teacher(*inputs)).square().sum(-1)
    return float(errors[inputs[1].bool()].mean())


def test_blocks_come_nearer_and_what_is_outside_stays() -> None:
    teacher = Network(0)
    student = blur(teacher)
    before = copy.deepcopy(student)
    refined, taken = refine(student, [(teacher, make_inputs())], CHOICE, 5)
    assert is_same(student, before)
    assert measure(refined, teacher) < 0.3 * measure(student, teacher)
    assert (taken.steps, taken.by) == (90, "blocks")
    same, left = dict(refined.named_parameters()), dict(student.named_parameters())
    assert {name for name in same if torch.equal(same[name], left[name])} == {
        "embedding.weight",
        "head.weight",
        "head.bias",
    }, "norms and every other weight of the blocks learn"


def test_masked_positions_do_not_count() -> None:
    teacher, inputs = Network(0), make_inputs()
    student = blur(teacher)
    refined, _ = refine(student, [(teacher, inputs)], CHOICE, 5)
    other = inputs[0].where(inputs[1].bool(), 0)  # other tokens where none count
    again, _ = refine(student, [(teacher, (other, inputs[1]))], CHOICE, 5)
    assert is_same(refined, again)


def test_every_teachers_data_are_seen() -> None:
    teachers = [Network(0), Network(0)]
    with torch.no_grad():
        teachers[1].blocks[0].down.bias += 1  # type: ignore[union-attr,operator]
    student = blur(teachers[0])
    inputs = make_inputs()
    first, _ = refine(student, [(teachers[0], inputs)], CHOICE, 5)
    both, _ = refine(student, [(one, inputs) for one in teachers], CHOICE, 5)
    assert measure(both, teachers[1]) < 0.8 * measure(first, teachers[1])


class Killed(Exception):
    """What ends a process in the middle."""


@pytest.mark.parametrize("kills", [(1,), (29, 31, 20), (45, 40)])
def test_a_killed_refinement_goes_on_to_the_same_bytes(tmp_path: Path, kills: tuple[int, ...]) -> None:
    teacher = Network(0)
    student, teachers = blur(teacher), [(teacher, make_inputs())]
    whole, _ = refine(student, teachers, CHOICE, 5)
    saving = Saving(tmp_path / "unfinished.safetensors", every_s=0)
    steps = 0
    for kill in kills:

        def tell(_share: float, kill: int = kill) -> None:
            nonlocal steps
            steps += 1
            if steps > kill:
                raise Killed

        steps = 0
        with pytest.raises(Killed):
            refine(student, teachers, CHOICE, 5, saving=saving, on_progress=tell)
        steps = 0
    again, taken = refine(student, teachers, CHOICE, 5, saving=saving)
    assert is_same(whole, again)
    assert taken.steps == 90


def test_blocks_are_the_longest_chain_of_one_class() -> None:
    inputs = make_inputs()
    assert find_blocks(Network(0), inputs) == ["blocks.0", "blocks.1", "blocks.2"]
    short = Network(0)
    short.blocks = nn.ModuleList([*short.blocks][:1])
    assert find_blocks(short, inputs) == [], "one block is no chain"
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert find_blocks(plain, (torch.zeros(2, 4),)) == [], "modules of several classes"
    narrowing = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    assert find_blocks(narrowing, (torch.zeros(2, 4),)) == [], "shapes differ"


def test_of_more_samples_than_there_is_memory_for_some_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, _ = inputs = make_inputs()
    dense = Network(0)
    names = find_blocks(dense, inputs)

    def count() -> int:
        return sum(len(one.hidden) for one in by_blocks._start(blur(dense), names, [(dense, inputs)]))

    assert count() == len(ids)
    monkeypatch.setattr(by_blocks, "HIDDEN_BYTES", 2 * 10 * 6 * 8 * 4)  # of ten samples of both models
    assert count() == 10
