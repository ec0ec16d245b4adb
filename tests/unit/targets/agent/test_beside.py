"""Memory that is read between inferences, as the rest of a model would be."""

from pathlib import Path

import pytest

from make.agents import ask_measure, call_agent, find_event
from make.onnx_files import save_product
from rankship_targets.agent import beside, system
from rankship_targets.agent.runtimes import Loaded


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    return tmp_path / "sys/devices/system/cpu"


def tell(caches: Path, *sizes: str) -> None:
    for place, size in enumerate(sizes):
        folder = caches / f"cpu{place % 2}/cache/index{place}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")


def test_the_largest_cache_counts_and_may_be_unknown(caches: Path) -> None:
    assert beside.find_cache_bytes() is None
    tell(caches, "32K", "1024K", "odd", "512K")
    assert beside.find_cache_bytes() == 1 << 20


@pytest.mark.parametrize(
    ("sizes", "count", "read"), [(("8K",), 9_000, 9_000), (("8K",), 1 << 30, 16 << 10), ((), 1 << 30, 1 << 26)]
)
def test_before_each_inference_no_more_is_read_than_the_caches_hold(
    caches: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[str, ...], count: int, read: int
) -> None:
    tell(caches, *sizes)
    done: list[object] = []

    class Memory(bytearray):
        def __mul__(self, count: int) -> "Memory":  # type: ignore[override]
            done.append(count)
            return self

        def find(self, sought: bytes) -> int:  # type: ignore[override]
            done.append("read")
            return bytearray.find(self, sought)

    monkeypatch.setattr(beside, "bytearray", Memory, raising=False)
    plain = Loaded(lambda arrays: arrays, lambda feed: feed, lambda out: out, done.append)
    cold = beside.read_beside(plain, count)
    cold.make_ready("ready")
    cold.make_ready("again")
    assert done == [read, "read", "ready", "read", "again"]
    assert beside.read_beside(plain, 0) is plain


def test_a_measurement_with_memory_beside_it_is_like_any_other(tmp_path: Path) -> None:
    events, done = call_agent(ask_measure(save_product(tmp_path / "model"), beside_bytes=100_000))
    assert done.returncode == 0, events
    assert len(find_event(events, "samples")["ns"]) >= 20
