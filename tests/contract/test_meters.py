"""One suite for every meter: a device that draws constant power, read through each of them, on a clock of our own.

The agent runs in this process over the fake transport; its files and its time come from `World`, so that every run
reads the same values at the same instants.
"""

import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from rankship_pipeline.foundation.errors import InputError, Lacks, TraceGap
from rankship_targets.agent import channels, gauges, main, meter, system
from rankship_targets.agent.protocol import PROTOCOL
from rankship_targets.devices.device import Device
from rankship_targets.devices.meter_choice import MeterChoice, MeterName, TableColumns
from rankship_targets.meters.device_meter import DeviceMeter
from rankship_targets.meters.file_meter import replay_trace, write_trace
from rankship_targets.meters.integrate import integrate
from rankship_targets.meters.meter import METERS, Meter, Reach, open_meter
from rankship_targets.transport.fake import FakeTransport
from rankship_targets.transport.protocol import Completed
from rankship_targets.trials.trace import PowerTrace, Rail

POWER_UW = 3_001_000  # not a multiple of any gauge's step
MODEL_POWER_UW = 2_286_000 + 4_534_000 // 2
PERIOD_NS, SECONDS, NS = 200_000_000, 20, 1_000_000_000
BOOT_NS, AWAY_NS = 1_000 * NS, 7 * NS  # when the recording starts; what the boot clock is ahead by
HOLE, STALL = (4 * NS, 8 * NS), (12 * NS, 16 * NS)
SHUNT_STEP_UW, WRAP_UJ = 6_250, 30_000_000
PROVENANCE = {"hwmon": "measured", "bench": "measured", "replay": "measured", "model": "modelled"}
DEVICE = Device(name="board", transport="local", python="python3")
COLUMNS = TableColumns(time="Time (s)", time_unit="s", power="Power (W)")


@dataclass
class World:
    """A device's files as they are at `now_ns`; inside the hole nothing is readable, inside the stall nothing moves."""

    root: Path
    hole: bool = False
    stall: bool = False
    now_ns: int = BOOT_NS
    away_ns: int = AWAY_NS
    refresh: Callable[["World"], None] = lambda _: None

    CLOCK_BOOTTIME = 7

    def monotonic_ns(self) -> int:
        return self.now_ns

    def clock_gettime_ns(self, _: int) -> int:
        return self.now_ns + self.away_ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * NS)
        self.refresh(self)

    @property
    def readable(self) -> bool:
        return not (self.hole and HOLE[0] <= self.now_ns - BOOT_NS < HOLE[1])

    @property
    def shown_ns(self) -> int:
        """The instant whose values the gauges show."""
        stalled = self.stall and STALL[0] <= self.now_ns - BOOT_NS < STALL[1]
        return BOOT_NS + STALL[0] if stalled else self.now_ns

    def energy_uj(self, at_ns: int) -> int:
        return POWER_UW * at_ns // NS

    def write(self, path: str, text: object) -> None:
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if self.readable:
            place.write_text(f"{text}\n")
        else:
            place.unlink(missing_ok=True)


def show_hwmon(world: World) -> None:
    folder = "/sys/class/hwmon/hwmon3"
    world.write(f"{folder}/power1_input", POWER_UW // SHUNT_STEP_UW * SHUNT_STEP_UW)
    (world.root / folder.lstrip("/") / "name").write_text("ina226\n")


def show_rails(world: World) -> None:
    stamp_ms = (world.shown_ns + AWAY_NS) // 32_000_000 * 32
    energy = world.energy_uj(stamp_ms * 1_000_000 - AWAY_NS)
    text = f"t={stamp_ms}\nCH4(T={stamp_ms})[S3M_VDD_CPUCL1], {energy}"
    world.write("/sys/bus/iio/devices/iio:device0/energy_value", text)


def show_powerstats(world: World) -> None:
    script = world.root / "system/bin/dumpsys"
    if not script.exists():
        script.parent.mkdir(parents=True)
        script.write_text(f"#!/bin/sh\ncat '{world.root}/dump' 2>&-\n")
        script.chmod(0o755)
    (as_float,) = struct.unpack("f", struct.pack("f", world.energy_uj(world.shown_ns)))
    header = "\n============= PowerStats HAL 2.0 energy meter ==============\n"
    line = f"  {'[S3M_VDD_CPUCL1]:CPU':>32}   {as_float / 1000:14.2f} mWs\n"
    world.write("/dump", f"{header}{line}========== End of PowerStats HAL 2.0 energy meter ==========")


def show_battery(world: World) -> None:
    folder = "/sys/class/power_supply/battery"
    world.write(f"{folder}/type", "Battery")
    world.write(f"{folder}/status", "Discharging")
    world.write(f"{folder}/voltage_now", 5_000_000)
    world.write(f"{folder}/current_now", -POWER_UW // 5)
    world.write(f"{folder}/charge_counter", 3_000_000 - POWER_UW // 5 * (world.shown_ns - BOOT_NS) // (3600 * NS))
    world.write("/sys/class/power_supply/usb/online", 0)


def show_rapl(world: World) -> None:
    folder = "/sys/class/powercap/intel-rapl:0"
    world.write(f"{folder}/name", "package-0")
    world.write(f"{folder}/max_energy_range_uj", WRAP_UJ)
    world.write(f"{folder}/energy_uj", world.energy_uj(world.shown_ns) // 61 * 61 % WRAP_UJ)


def show_model(world: World) -> None:
    world.write("/proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.2")
    ticks = (os.cpu_count() or 1) * 100 * world.shown_ns // NS
    world.write("/proc/stat", f"cpu  {ticks // 2} 0 0 {ticks - ticks // 2} 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0")


ON_DEVICE: dict[MeterName, Callable[[World], None]] = {
    "hwmon": show_hwmon,
    "rails": show_rails,
    "powerstats": show_powerstats,
    "battery": show_battery,
    "rapl": show_rapl,
    "model": show_model,
}


def record_instants(world: World) -> list[int]:
    """When a meter with a file of its own sampled, as the world allows."""
    instants = []
    for at_ns in range(BOOT_NS, BOOT_NS + SECONDS * NS + 1, PERIOD_NS):
        world.now_ns = at_ns
        if world.readable:
            instants.append(world.shown_ns)
    return instants


def encode_varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + encode_varint(rest) if rest else bytes([low])


def encode_field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return encode_varint(number << 3) + encode_varint(value)
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def write_perfetto(world: World, path: Path) -> None:
    descriptor = (
        encode_field(1, 0) + encode_field(2, b"S3M_VDD_CPUCL1") + encode_field(3, b"CPU") + encode_field(4, 1023)
    )
    packets = [encode_field(40, encode_field(1, descriptor))]
    for at_ns in record_instants(world):
        energy = encode_field(1, 0) + encode_field(2, at_ns // 1_000_000) + encode_field(3, world.energy_uj(at_ns))
        packets.append(encode_field(8, at_ns) + encode_field(40, encode_field(2, energy)))
    path.write_bytes(b"".join(encode_field(1, packet) for packet in packets))


def write_bench(world: World, path: Path) -> None:
    lines = [f"{at_ns / NS:.3f},{POWER_UW / 1e6:.3f}" for at_ns in record_instants(world)]
    path.write_text("\n".join(["Time (s),Power (W)", *lines]))


def write_replay(world: World, path: Path) -> None:
    table = path.with_name("table.csv")
    write_bench(world, table)
    trace = open_meter(MeterChoice(name="bench", file=str(table), columns=COLUMNS)).stop()
    write_trace(trace, path)


IN_FILES: dict[MeterName, Callable[[World, Path], None]] = {
    "perfetto": write_perfetto,
    "bench": write_bench,
    "replay": write_replay,
}
# Power that stays the same is no fault; the HAL's dump may show a rail that is off; a battery's counter rests for long.
STALLING: list[MeterName] = ["rails", "rapl", "perfetto"]

SetUp = Callable[..., Meter]


@pytest.fixture
def set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SetUp:
    """Make a meter in a world with the faults asked for."""

    def make(name: MeterName, *, hole: bool = False, stall: bool = False) -> Meter:
        world = World(tmp_path, hole=hole, stall=stall)
        if name in IN_FILES:
            IN_FILES[name](world, tmp_path / "recording")
            return open_meter(MeterChoice(name=name, file=str(tmp_path / "recording"), columns=COLUMNS))
        world.refresh = ON_DEVICE[name]
        world.refresh(world)
        monkeypatch.setattr(system, "ROOT", str(tmp_path))
        for room in (channels, gauges, meter):
            monkeypatch.setattr(room, "time", world)
        choice = MeterChoice(name=name, period_us=PERIOD_NS // 1000)
        reach = Reach(DEVICE, "agent.pyz", lambda _: FakeTransport({"python3": answer_in_process}), SECONDS * 1000)
        return open_meter(choice, reach)

    return make


def answer_in_process(_: FakeTransport, argv: Sequence[str]) -> Completed:
    events = [{"event": "hello", "protocol": PROTOCOL}, *main.answer(argv[2])]
    return Completed(code=0, stdout="".join(json.dumps(event) + "\n" for event in events), stderr="")


def record(source: Meter) -> PowerTrace:
    """Record to the meter's limit: the time of the world passes at once, ours must not cut it short."""
    source.start()
    if isinstance(source, DeviceMeter) and source._recording:
        source._recording.join()
    return source.stop()


def expect_power(name: MeterName) -> int:
    return MODEL_POWER_UW if name == "model" else POWER_UW


EVERY_METER = pytest.mark.parametrize("name", list(METERS))


def test_the_table_and_the_suite_know_every_meter() -> None:
    assert set(METERS) == set(get_args(MeterName)) == {*ON_DEVICE, *IN_FILES}
    assert list(gauges.GAUGES) == list(ON_DEVICE)


@EVERY_METER
def test_a_meter_tells_what_it_offers(name: MeterName, set_up: SetUp) -> None:
    source = set_up(name)
    offer = source.probe()
    assert offer.problem is None
    assert offer.provenance == PROVENANCE.get(name, "counter")
    trace = record(source)
    assert [channel.name for channel in offer.channels] == [rail.name for rail in trace.rails]
    assert [channel.unit for channel in offer.channels] == [rail.unit for rail in trace.rails]
    assert (trace.provenance, trace.meter) == (offer.provenance, offer.name)


@EVERY_METER
def test_samples_are_whole_numbers_in_one_unit_and_time_rises(name: MeterName, set_up: SetUp) -> None:
    trace = record(set_up(name))
    assert trace.rails
    for rail in trace.rails:
        (values,) = [values for values in (rail.power_uw, rail.energy_uj) if values is not None]
        assert len(values) == len(rail.at_ns) >= SECONDS
        assert all(type(value) is int for value in (*values, *rail.at_ns))
        assert list(rail.at_ns) == sorted(set(rail.at_ns))
        assert rail.unit == "uW" or list(values) == sorted(values)
        assert rail.seen_period_ns is not None
        assert 0.7 * PERIOD_NS <= rail.seen_period_ns <= 1.3 * PERIOD_NS
        assert rail.gaps == ()
        assert rail.skipped == 0


@EVERY_METER
def test_the_energy_of_constant_power_lies_within_the_stated_bounds(name: MeterName, set_up: SetUp) -> None:
    for rail in record(set_up(name)).rails:
        for start_ns, end_ns in windows_of(rail):
            found = integrate(rail, start_ns, end_ns)
            true_uj = expect_power(name) * (end_ns - start_ns) / NS
            assert abs(found.energy_uj - true_uj) <= found.uncertainty_uj
            assert found.uncertainty_uj < 0.1 * true_uj, "bounds that hold for every number say nothing"


def windows_of(rail: Rail) -> list[tuple[int, int]]:
    first, last = rail.at_ns[0], rail.at_ns[-1]
    return [(first, last), (first + 123_456_789, last - 34_567_891), (first + 2 * NS, first + 14 * NS + 1)]


@EVERY_METER
def test_a_hole_is_told_and_never_bridged(name: MeterName, set_up: SetUp) -> None:
    trace = record(set_up(name, hole=True))
    for rail in trace.rails:
        (gap,) = [gap for gap in rail.gaps if gap.start_ns < rail.at_ns[0] + HOLE[1] - NS]
        assert gap.why in {"missed", "unreadable", "stalled"}
        with pytest.raises(TraceGap, match=gap.why):
            integrate(rail, rail.at_ns[0], rail.at_ns[-1])
        after = integrate(rail, gap.end_ns + 300_000_000, rail.at_ns[-1])
        true_uj = expect_power(name) * (rail.at_ns[-1] - gap.end_ns - 300_000_000) / NS
        assert abs(after.energy_uj - true_uj) <= after.uncertainty_uj
        if name in ON_DEVICE:
            assert rail.skipped > 0 or name == "rails"


@EVERY_METER
def test_a_window_outside_the_trace_is_refused(name: MeterName, set_up: SetUp) -> None:
    for rail in record(set_up(name)).rails:
        with pytest.raises(TraceGap, match="the window is"):
            integrate(rail, rail.at_ns[0] - 1, rail.at_ns[-1])
        with pytest.raises(TraceGap, match="the window is"):
            integrate(rail, rail.at_ns[0], rail.at_ns[-1] + 1)


@pytest.mark.parametrize("name", STALLING)
def test_a_stalled_counter_is_told(name: MeterName, set_up: SetUp) -> None:
    (rail,) = record(set_up(name, stall=True)).rails
    stalls = [gap for gap in rail.gaps if gap.why == "stalled"]
    assert len(stalls) == 1
    assert stalls[0].end_ns - stalls[0].start_ns >= STALL[1] - STALL[0] - 2 * PERIOD_NS
    with pytest.raises(TraceGap, match="stalled"):
        integrate(rail, rail.at_ns[0], rail.at_ns[-1])


def test_a_counter_that_wraps_goes_on(set_up: SetUp) -> None:
    (rail,) = record(set_up("rapl")).rails
    assert rail.energy_uj is not None
    assert rail.energy_uj[-1] - rail.energy_uj[0] > WRAP_UJ


@pytest.mark.parametrize("name", list(ON_DEVICE))
def test_a_meter_that_is_not_there_is_lacks(name: MeterName, set_up: SetUp, monkeypatch: pytest.MonkeyPatch) -> None:
    source = set_up(name)
    monkeypatch.setattr(system, "ROOT", "/nonexistent")
    assert source.probe().problem
    with pytest.raises(Lacks, match=f"meter {name}"):
        source.start()


@pytest.mark.parametrize("name", list(IN_FILES))
def test_a_recording_that_is_not_there_is_an_input_error(name: MeterName, tmp_path: Path) -> None:
    source = open_meter(MeterChoice(name=name, file=str(tmp_path / "none"), columns=COLUMNS))
    assert "cannot read" in str(source.probe().problem)
    with pytest.raises(InputError, match="cannot read"):
        record(source)


@EVERY_METER
def test_every_trace_can_be_kept_and_replayed(name: MeterName, set_up: SetUp, tmp_path: Path) -> None:
    trace = record(set_up(name))
    write_trace(trace, tmp_path / "kept")
    again = replay_trace(tmp_path / "kept")
    assert again.rails == trace.rails
    assert again.provenance == trace.provenance
    assert again.meter.startswith("replay of ")


def test_meters_without_what_they_need_are_refused() -> None:
    with pytest.raises(InputError, match="read on a device"):
        open_meter(MeterChoice(name="rapl"))
    with pytest.raises(InputError, match="needs the file"):
        open_meter(MeterChoice(name="replay"))
    with pytest.raises(InputError, match="columns"):
        open_meter(MeterChoice(name="bench", file="table.csv"))
