import copy

import pytest
import torch
from torch import Tensor, nn

from rankship_pipeline.evaluate.calibrate import BATCH, split
from rankship_pipeline.recipe.choices import BatchNormMode
from rankship_pipeline.recover.batchnorm import reestimate_batchnorm, settle_batchnorm


def make_net(*, momentum: float | None = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(2, momentum=momentum), nn.Dropout(0.5), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten()
    ).eval()
    for name in ("0.running_mean", "3.running_mean"):
        net.get_buffer(name).uniform_()
    return net


def make_images(count: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 2, 4, 4) * 3 + 5


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(net.state_dict()))


def is_same(net: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def choose_net(net: nn.Module, *, prefer_fresh: bool) -> tuple[nn.Module, bool]:
    def lead(first: nn.Module, second: nn.Module) -> float:
        assert first is net
        assert second is not net
        return 1.0 if prefer_fresh else -1.0

    return settle_batchnorm(net, (make_images(8),), "auto", lead)


def refuse(_first: nn.Module, _second: nn.Module) -> float:
    pytest.fail("nothing to compare")


def test_fresh_statistics_are_the_mean_over_the_batches() -> None:
    net, images = make_net(), make_images(BATCH * 2 + 5)
    reestimate_batchnorm(net, (images,))
    batches = [batch for (batch,) in split((images,))]
    assert len(batches) > 1
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    variances = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches]).mean(0)
    torch.testing.assert_close(net[0].running_mean, means)
    torch.testing.assert_close(net[0].running_var, variances)


def test_a_later_norm_sees_what_the_freshened_earlier_one_gives() -> None:
    net, images = make_net(), make_images(8)
    reestimate_batchnorm(net, (images,))
    with torch.no_grad():
        first = nn.BatchNorm2d(2).train()(images)  # as in training: by the batch's own statistics
        reached = net[2](first)
    torch.testing.assert_close(net[3].running_mean, reached.mean((0, 2, 3)))


def test_old_statistics_are_forgotten() -> None:
    states = []
    for offset in (0.0, 100.0):
        net = make_net()
        net.get_buffer("0.running_mean").add_(offset)
        net.get_buffer("0.num_batches_tracked").fill_(1000)
        reestimate_batchnorm(net, (make_images(8),))
        states.append(snapshot(net))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("momentum", [0.3, None])
def test_momentum_and_evaluation_mode_are_restored_and_weights_kept(momentum: float | None) -> None:
    net = make_net(momentum=momentum)
    weights = copy.deepcopy(dict(net.named_parameters()))
    reestimate_batchnorm(net, (make_images(8),))
    assert net[0].momentum == momentum
    assert not any(module.training for module in net.modules())
    assert all(torch.equal(value, weights[name]) for name, value in net.named_parameters())


def test_momentum_is_restored_when_the_model_fails() -> None:
    net = make_net()
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(net, (torch.randn(4, 2, 1, 1),))
    assert net[0].momentum == 0.3
    assert not net[0].training


def test_one_sample_is_too_few_to_forget_the_old_statistics_for() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    net.get_buffer("1.running_mean").fill_(0.7)
    before = snapshot(net)
    reestimate_batchnorm(net, (torch.randn(1, 2),))
    assert is_same(net, before)


def test_every_sample_weighs_the_same_also_where_batches_do_not_fill() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2)).eval()
    x = torch.randn(BATCH + 2, 2) + torch.arange(BATCH + 2)[:, None]
    reestimate_batchnorm(net, (x,))
    torch.testing.assert_close(net[0].running_mean, x.mean(0))


def test_keep_leaves_the_model_as_it_is() -> None:
    net = make_net()
    before = snapshot(net)
    assert settle_batchnorm(net, (make_images(8),), "keep", refuse) == (net, False)
    assert is_same(net, before)


def test_reestimate_gives_a_fresh_copy_without_asking() -> None:
    net = make_net()
    before = snapshot(net)
    fresh, reestimated = settle_batchnorm(net, (make_images(8),), "reestimate", refuse)
    assert reestimated
    assert is_same(net, before)
    assert not is_same(fresh, before)


@pytest.mark.parametrize("prefer_fresh", [True, False])
def test_auto_keeps_the_nearer(*, prefer_fresh: bool) -> None:
    net = make_net()
    before = snapshot(net)
    settled, reestimated = choose_net(net, prefer_fresh=prefer_fresh)
    assert reestimated == prefer_fresh
    assert (settled is net) != prefer_fresh
    assert is_same(net, before)


def test_auto_keeps_what_is_equally_near() -> None:
    net = make_net()
    assert settle_batchnorm(net, (make_images(8),), "auto", lambda _first, _second: 0.0) == (net, False)


@pytest.mark.parametrize("mode", ["auto", "reestimate", "keep"])
@pytest.mark.parametrize(
    "net",
    [nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False))],
    ids=["no norm", "no statistics"],
)
def test_a_model_without_running_statistics_is_left_alone(net: nn.Module, mode: BatchNormMode) -> None:
    assert settle_batchnorm(net, (torch.randn(4, 2),), mode, refuse) == (net, False)
