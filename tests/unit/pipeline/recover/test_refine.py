"""Refinement moves a student towards its teachers; by steps it is the same to the bit, killed or not."""

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from make.nets import is_same
from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.foundation.artifact_key import Precision
from rankship_pipeline.foundation.errors import BuildError
from rankship_pipeline.models.data import Inputs
from rankship_pipeline.models.layers import get_layer
from rankship_pipeline.quantise.grid import Grid, is_on_grid, read_rows
from rankship_pipeline.quantise.in_order import find_grids, round_layers
from rankship_pipeline.quantise.sizes import SIMULATED
from rankship_pipeline.recipe.choices import RefineChoice
from rankship_pipeline.recover.refine import Saving, refine
from rankship_pipeline.recover.refine.draw import BATCH, draw_batches, flip_and_shift
from rankship_pipeline.recover.refine.schedule import find_step_size, measure_share
from rankship_pipeline.recover.refine.teach import measure_loss, measure_teacher


def make_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    net[1].running_var.fill_(0.5)  # type: ignore[operator]
    return net.eval()


def make_teachers() -> list[tuple[nn.Module, Inputs]]:
    generator = torch.Generator().manual_seed(0)
    return [(make_net(seed), (torch.randn(40, 1, 4, 4, generator=generator),)) for seed in (1, 2)]


def test_steps_give_the_same_bytes_every_time_and_touch_no_one_elses() -> None:
    student, teachers = make_net(3), make_teachers()
    before = copy.deepcopy([student, *(teacher for teacher, _ in teachers)])
    first, taken = refine(student, teachers, RefineChoice(steps=7), 5)
    torch.rand(3)
    again, _ = refine(student, teachers, RefineChoice(steps=7), 5)
    assert is_same(first, again)
    assert not is_same(first, refine(student, teachers, RefineChoice(steps=7), 6)[0])
    assert (taken.steps, taken.augment) == (7, "none")
    assert not any(module.training for module in first.modules())
    for now, then in zip([student, *(teacher for teacher, _ in teachers)], before, strict=True):
        assert is_same(now, then)


def test_a_student_comes_nearer_to_all_its_teachers() -> None:
    student, teachers = make_net(3), make_teachers()
    refined, _ = refine(student, teachers, RefineChoice(steps=120), 0)

    def measure(model: nn.Module) -> float:
        return sum(measure_divergence(model, inputs, predict(teacher, inputs)) for teacher, inputs in teachers)

    assert measure(refined) < 0.7 * measure(student)


TYPES: dict[str, Precision] = {"0": "int4", "4": "int4"}


def round_net(model: nn.Module) -> tuple[nn.Module, Mapping[str, Grid]]:
    rounded = round_layers(model, TYPES, make_teachers()[0][1], SIMULATED)
    return rounded, find_grids(rounded, TYPES, SIMULATED)


def test_what_learns_through_the_rounding_stays_on_its_grid_and_comes_nearer() -> None:
    teachers, choice = make_teachers()[:1], RefineChoice(steps=150)
    (teacher, inputs), (start, grids) = teachers[0], round_net(make_net(3))

    def measure(model: nn.Module) -> float:
        return measure_divergence(model, inputs, predict(teacher, inputs))

    through, _ = refine(start, teachers, choice, 0, grids=grids)
    for name, grid in grids.items():
        assert is_on_grid(read_rows(get_layer(through, name)), grid.precision, grid.block)
    assert not any("parametrizations" in name for name, _ in through.named_parameters())
    assert is_same(round_net(through)[0], through), "what is on its grid is not rounded again"
    assert measure(through) < 0.5 * measure(start)


def test_a_weight_that_two_operators_share_stays_as_it_was_rounded() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    student = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.Linear(16, 3)).eval()
    types: dict[str, Precision] = {"1": "int8", "3": "int8"}
    rounded = round_layers(student, types, make_teachers()[0][1])
    refined, _ = refine(rounded, make_teachers(), RefineChoice(steps=3), 0, grids=find_grids(rounded, types))
    before, after = rounded.state_dict(), refined.state_dict()
    assert torch.equal(after["1.weight"], before["1.weight"])
    assert not torch.equal(after["4.weight"], before["4.weight"])


class Reader(nn.Module):
    """A classifier of tokens that notes how many positions it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inputs = ("input_ids", "attention_mask")
        self.embedding = nn.Embedding(9, 4)
        self.classifier = nn.Linear(4, 3)
        self.widths: list[int] = []

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.widths.append(ids.shape[1])
        logits: torch.Tensor = self.classifier((self.embedding(ids) * mask[:, :, None]).sum(1))
        return logits


def test_positions_that_every_sentence_hides_are_not_computed() -> None:
    teacher, student = Reader(), Reader()
    ids = torch.randint(9, (20, 16), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(16) < 5).to(torch.int64).repeat(20, 1)
    refined, _ = refine(student, [(teacher, (ids, mask))], RefineChoice(steps=2), 0)
    assert isinstance(refined, Reader)
    assert refined.widths[-2:] == [5, 5]
    assert teacher.widths[-2:] == [5, 5]


class Killed(Exception):
    """What ends a process in the middle."""


@pytest.mark.parametrize("kills", [(1,), (4, 9), (10,)])
def test_a_killed_refinement_goes_on_to_the_same_bytes(tmp_path: Path, kills: tuple[int, ...]) -> None:
    student, teachers, choice = make_net(3), make_teachers(), RefineChoice(steps=11, augment="flip-and-shift")
    whole, _ = refine(student, teachers, choice, 5)
    saving = Saving(tmp_path / "folder/unfinished.safetensors", every_s=0)
    heard: list[float] = []
    for kill in kills:

        def tell(share: float, kill: int = kill) -> None:
            heard.append(share)
            if share >= kill / 11:
                raise Killed

        with pytest.raises(Killed):
            refine(student, teachers, choice, 5, saving=saving, on_progress=tell)
    again, taken = refine(student, teachers, choice, 5, saving=saving, on_progress=heard.append)
    assert is_same(whole, again)
    assert taken.steps == 11
    done_twice = len(heard) - 11
    assert done_twice == len(kills), "only the step that was killed is done again"


def test_what_is_kept_only_now_and_then_is_done_again(tmp_path: Path) -> None:
    saving = Saving(tmp_path / "unfinished.safetensors", every_s=3600)
    refine(make_net(3), make_teachers(), RefineChoice(steps=3), 5, saving=saving)
    assert not saving.file.exists()


def test_a_processors_seconds_are_counted_over_interruptions(tmp_path: Path) -> None:
    student, teachers, choice = make_net(3), make_teachers(), RefineChoice(cpu_seconds=10)
    saving = Saving(tmp_path / "unfinished.safetensors", every_s=0)
    clock = itertools.count()

    def stop(share: float) -> None:
        if share > 0.5:
            raise Killed

    with pytest.raises(Killed):
        refine(student, teachers, choice, 5, clock=lambda: float(next(clock)), saving=saving, on_progress=stop)
    shares: list[float] = []
    _, taken = refine(
        student, teachers, choice, 5, clock=lambda: float(next(clock)), saving=saving, on_progress=shares.append
    )
    assert shares[0] > 0.3, "what was spent before counts"
    assert 10 <= taken.cpu_seconds < 13
    assert taken.steps < 10


def test_a_refinement_that_diverges_is_told() -> None:
    student = make_net(3)
    with torch.no_grad():
        student[4].weight.fill_(float("inf"))  # type: ignore[operator]
    with pytest.raises(BuildError, match="refinement diverged at step 0"):
        refine(student, make_teachers(), RefineChoice(steps=3), 0)


def test_images_are_mirrored_and_moved_and_keep_their_pixels() -> None:
    images = torch.zeros(64, 1, 9, 9)
    images[:, 0, 4, 4] = 1
    moved = flip_and_shift(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert (moved.sum((1, 2, 3)) == 1).all()
    assert len({tuple(place) for place in moved.nonzero()[:, 2:].tolist()}) > 10


def test_every_pool_gives_as_many_samples_and_gets_its_own_part_back() -> None:
    pools = [(torch.full((40, 1, 4, 4), float(task)),) for task in range(3)]
    joined, parts = draw_batches(pools, "none", make_net(0), torch.Generator().manual_seed(0))
    assert [len(part[0]) for part in parts] == [40, 40, 40], "a pool has no more to give"
    assert [float(part[0].mean()) for part in parts] == [0, 1, 2]
    assert torch.equal(joined[0], torch.cat([part[0] for part in parts]))
    many = [(torch.randn(500, 3),), (torch.randn(500, 3),)]
    assert len(draw_batches(many, "none", make_net(0), torch.Generator())[0][0]) == BATCH


def test_a_students_loss_is_nothing_where_it_says_what_its_teachers_say() -> None:
    (net, inputs), (other, _) = make_teachers()
    teacher, wrong = measure_teacher(net, inputs), measure_teacher(other, inputs)
    assert float(teacher.variances["output"]) == pytest.approx(float(predict(net, inputs)["output"].var()))
    assert measure_loss(net, [teacher], inputs, [inputs]).item() < 1e-3
    apart = measure_loss(net, [wrong], inputs, [inputs])
    assert apart.item() == pytest.approx(
        float((predict(net, inputs)["output"] - predict(other, inputs)["output"]).square().mean())
        / float(wrong.variances["output"]),
        rel=0.05,
    )


def test_steps_grow_to_the_top_of_the_cycle_and_fall_to_nearly_nothing() -> None:
    choice = RefineChoice(steps=100, step_size=2.0)
    sizes = [find_step_size(choice, measure_share(choice, step, 0.0)) for step in range(101)]
    assert sizes[0] == pytest.approx(0.08)
    assert sizes.index(max(sizes)) == 30
    assert max(sizes) == pytest.approx(2.0)
    assert sizes[-1] == pytest.approx(2e-4)
    assert all(a < b for a, b in itertools.pairwise(sizes[:31]))
    assert all(a > b for a, b in itertools.pairwise(sizes[30:]))
    assert measure_share(RefineChoice(cpu_seconds=8), 0, 2.0) == 0.25
