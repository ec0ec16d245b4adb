"""What meters say, parsed: formats as the devices write them, and anything else without a crash or a wrong number."""

import json
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankship_pipeline.foundation.codec import encode
from rankship_pipeline.foundation.errors import InputError
from rankship_targets.agent import battery, gauges, hwmon, system
from rankship_targets.client.agent_file import find_agent
from rankship_targets.devices.device import describe_this_machine
from rankship_targets.devices.meter_choice import MeterChoice, TableColumns
from rankship_targets.meters.bench import parse_table
from rankship_targets.meters.device_meter import DeviceMeter
from rankship_targets.meters.file_meter import replay_trace
from rankship_targets.meters.meter import Reach
from rankship_targets.meters.perfetto import parse_perfetto, read_fields
from rankship_targets.meters.readings import build_rail
from rankship_targets.transport.local import LocalTransport
from rankship_targets.trials.trace import Channel, PowerTrace

# The ODPM driver's file on a Pixel 6, as oboe's notes on measuring power show it.
ENERGY_VALUE = """\
t=349894
CH0(T=349894)[S10M_VDD_TPU], 5578756
CH3(T=349894)[S2M_VDD_CPUCL2], 30203502
CH4(T=349894)[S3M_VDD_CPUCL1], 23377533
CH5(T=349894)[S4M_VDD_CPUCL0], 46356942
"""
# The layout is that of the Pixel power HAL's dumpEnergyMeter and its neighbours.
POWERSTATS = """\

============= PowerStats HAL 2.0 energy consumers ==============
CPUCL0       :       46356.94 mWs
========== End of PowerStats HAL 2.0 energy consumers ==========

============= PowerStats HAL 2.0 energy meter ==============
                           Channel    Cumulative Energy
                [S10M_VDD_TPU]:TPU          5578.76 mWs
              [S4M_VDD_CPUCL0]:CPU         46356.94 mWs
========== End of PowerStats HAL 2.0 energy meter ==========
"""
COLUMNS = TableColumns(time="t", time_unit="s", power="p", power_unit="mW")
CHANNEL = Channel(name="rail", unit="uJ", resolution_uj=1)


def test_the_drivers_lines_are_rails_with_their_own_time() -> None:
    rows, strange = gauges.parse_energy_value(ENERGY_VALUE)
    assert rows[2] == ("S3M_VDD_CPUCL1", 349894, 23377533)
    assert (len(rows), strange) == (4, 0)


@pytest.mark.parametrize(
    "line",
    [
        "CH4(T=349894)[S3M_VDD_CPUCL1], -5",
        "CH4(T=349894)[S3M_VDD_CPUCL1], 5.5",
        "CH4(T=)[S3M_VDD_CPUCL1], 5",
        "CH4(T=349894)[], 5",
        "CH4(T=349894)[S3M_VDD_CPUCL1], 5 CH5",
        "CH4(T=٣)[S3M_VDD_CPUCL1], 5",
        "[S3M_VDD_CPUCL1], 5",
    ],
)
def test_a_line_that_is_no_rail_is_counted(line: str) -> None:
    assert gauges.parse_energy_value(ENERGY_VALUE + line)[1] == 1


@given(st.text(alphabet="CH4(T=199)[S_V], 0\n-.x²", max_size=200))
def test_any_text_as_energy_value_gives_whole_numbers(text: str) -> None:
    for name, at_ms, energy_uj in gauges.parse_energy_value(text)[0]:
        assert re.search(rf"\(T=0*{at_ms}\)\[{re.escape(name)}\], 0*{energy_uj}\b", text)


def test_the_hals_dump_gives_the_meters_channels_only() -> None:
    assert gauges.parse_powerstats(POWERSTATS) == {"S10M_VDD_TPU": 5_578_760, "S4M_VDD_CPUCL0": 46_356_940}
    delta = POWERSTATS.replace("46356.94 mWs\n=", "46356.94 mWs (         12.34)\n=")
    assert gauges.parse_powerstats(delta) == gauges.parse_powerstats(POWERSTATS)
    assert gauges.parse_powerstats("Can't find service: android.hardware.power.stats.IPowerStats/default") == {}


@given(st.integers(0, 2**40))
def test_the_hals_float_is_within_the_step_that_is_told(energy_uj: int) -> None:
    (as_float,) = struct.unpack("f", struct.pack("f", energy_uj))
    text = POWERSTATS.replace("         5578.76 mWs", f"{as_float / 1000:16.2f} mWs")
    shown = gauges.parse_powerstats(text)["S10M_VDD_TPU"]
    assert abs(shown - energy_uj) <= gauges.find_float_step(shown)


@given(st.text(max_size=300) | st.text(alphabet="[S]: 0.mWs\n=", max_size=300).map(lambda text: POWERSTATS + text))
def test_any_text_as_a_dump_gives_numbers_or_nothing(text: str) -> None:
    assert all(energy >= 0 for energy in gauges.parse_powerstats(text).values())


def test_processor_use_counts_waiting_for_disks_as_idle() -> None:
    assert gauges.parse_stat("cpu  100 20 30 800 50 0 0 0 7 7\ncpu0 …") == (150, 1000)


@given(st.text(alphabet="cpu 0123456789\n-x", max_size=100))
def test_any_text_as_stat_gives_sound_ticks_or_none(text: str) -> None:
    found = gauges.parse_stat(text)
    assert found is None or 0 <= found[0] <= found[1]


def put(root: Path, path: str, text: object) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{text}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    return tmp_path


def test_a_chip_without_power_is_read_as_current_times_voltage(root: Path) -> None:
    for name, value in {"name": "ina219", "curr1_input": 600, "in1_input": 5032}.items():
        put(root, f"sys/class/hwmon/hwmon0/{name}", value)
    gauge = hwmon.find_hwmon()
    assert gauge.offer["problem"] is None
    assert gauge.read()[0][2] == 600 * 5032
    assert gauge.offer["channels"][0]["resolution_uw"] == 600 + 5032


@pytest.mark.parametrize(
    ("chip", "shunt_uohm", "step_uw"),
    [("ina219", None, 20_000), ("ina226", None, 6_250), ("ina226", 100_000, 625), ("ina260", None, 10_000)],
)
def test_the_step_of_power_follows_chip_and_shunt(root: Path, chip: str, shunt_uohm: int | None, step_uw: int) -> None:
    put(root, "sys/class/hwmon/hwmon0/name", chip)
    put(root, "sys/class/hwmon/hwmon0/power1_input", 3_000_000)
    if shunt_uohm:
        put(root, "sys/class/hwmon/hwmon0/shunt_resistor", shunt_uohm)
    assert hwmon.find_hwmon().offer["channels"][0]["resolution_uw"] == step_uw


def put_battery(root: Path, status: str = "Discharging", online: int = 0) -> None:
    values = {"type": "Battery", "status": status, "current_now": -600_000, "voltage_now": 4_000_000}
    for name, value in {**values, "charge_counter": 3_000_000}.items():
        put(root, f"sys/class/power_supply/battery/{name}", value)
    put(root, "sys/class/power_supply/usb/online", online)


@pytest.mark.parametrize("plug", [{"status": "Charging"}, {"status": "Full"}, {"online": 1}])
def test_a_battery_that_is_plugged_in_is_refused(root: Path, plug: dict[str, object]) -> None:
    put_battery(root)
    gauge = battery.find_battery()
    assert gauge.offer["problem"] is None
    assert [row[2] for row in gauge.read()] == [2_400_000, 0]
    put_battery(root, **plug)  # type: ignore[arg-type]
    assert [row[2] for row in gauge.read()] == [None, None]
    assert "plugged in" in battery.find_battery().offer["problem"]


def test_charge_that_was_put_back_is_not_drawn(root: Path) -> None:
    put_battery(root)
    read = battery.find_battery().read
    read()
    put(root, "sys/class/power_supply/battery/charge_counter", 2_999_000)
    assert read()[1][2] == 1_000 * 3600 * 4
    put_battery(root, status="Charging")
    read()
    put_battery(root)
    assert read()[1][2] == 1_000 * 3600 * 4


def test_a_counter_for_root_only_says_so(root: Path) -> None:
    put(root, "sys/class/powercap/intel-rapl:0/energy_uj", "")  # what root may read, others see as an empty answer
    assert "root only" in gauges.find_rapl().offer["problem"]


def test_the_model_is_for_one_board(root: Path) -> None:
    put(root, "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0")
    assert "Raspberry Pi 4B rev 1.2" in gauges.find_model(10**8).offer["problem"]
    put(root, "proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.4")
    offer = gauges.find_model(10**8).offer
    assert (offer["problem"], offer["provenance"]) == (None, "modelled")
    assert "Rev 1.4" in offer["notes"][0]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\x0a\x05ab", "ends inside a field"),
        (b"\x0b", "wire type 3"),
        (b"\x0a", "ends inside a number"),
        (b"\x12\x00", "field 2"),
        (b"\x0a\x0b" + b"\xff" * 11, "64 bits"),
        (b"\x0a\x03\xc2\x02\x00", "no power rails"),
        (b"\x0a\x03\x92\x03\x00", "compressed"),
        (b"", "no power rails"),
    ],
)
def test_bytes_that_are_no_power_trace_are_one_clear_error(data: bytes, told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_perfetto(data, where="x")


def test_unknown_fields_of_every_wire_type_are_passed_over() -> None:
    fields = b"\x08\x96\x01" + b"\x11" + bytes(8) + b"\x1d" + bytes(4) + b"\x22\x02hi"
    assert list(read_fields(fields)) == [(1, 150), (2, bytes(8)), (3, bytes(4)), (4, b"hi")]


RAIL = bytes([0x12, 6, 0x08, 0, 0x10, 5, 0x18, 9])
WHOLE = bytes([0x0A, len(RAIL) + 3, 0xC2, 0x02, len(RAIL)]) + RAIL


@given(st.binary(max_size=200) | st.integers(0, len(WHOLE) * 8 - 1).map(lambda bit: flip(WHOLE * 2, bit)))
def test_any_bytes_as_a_trace_are_rails_or_one_error(data: bytes) -> None:
    try:
        trace = parse_perfetto(data, where="x")
    except InputError:
        return
    assert all(rail.energy_uj is not None for rail in trace.rails)


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_table_is_read_by_the_names_that_were_given() -> None:
    table = b"\xef\xbb\xbft, p ,other\r\n0.0,3001.5,x\r\n0.1,3001.5,x\r\n0.2,3002,x\r\n"
    (rail,) = parse_table(table, COLUMNS, where="x").rails
    assert rail.at_ns == (0, 100_000_000, 200_000_000)
    assert rail.power_uw == (3_001_500, 3_001_500, 3_002_000)
    assert (rail.resolution_uw, rail.skipped, rail.gaps) == (500, 0, ())


def test_current_and_voltage_are_multiplied_and_energy_is_a_counter() -> None:
    pair = TableColumns(time="t", time_unit="ms", current="i", current_unit="mA", voltage="u")
    (rail,) = parse_table(b"t,i,u\n0,600,5\n1,600,5.1\n", pair, where="x").rails
    assert rail.power_uw == (3_000_000, 3_060_000)
    energy = TableColumns(time="t", time_unit="s", energy="e", energy_unit="mWh")
    (rail,) = parse_table(b"t,e\n0,1\n1,2\n", energy, where="x").rails
    assert rail.energy_uj == (3_600_000, 7_200_000)
    assert rail.resolution_uj == 3_600_000


@pytest.mark.parametrize("cell", ["", "n/a", "nan", "inf", "1e400", "3,1", "0x10", "-"])
def test_a_cell_that_is_no_number_is_skipped_and_counted(cell: str) -> None:
    table = f't,p\n0,3\n0.1,"{cell}"\n"{cell}",3\n0.2,3\n'.encode()
    (rail,) = parse_table(table, COLUMNS, where="x").rails
    assert rail.skipped == 2
    assert rail.power_uw == (3000, 3000)


@pytest.mark.parametrize("table", [b"", b"t\n1\n", b"t,p,p\n1,2,3\n", b"\xff\xfe", b't,p\n"open'])
def test_what_is_no_table_with_the_columns_is_one_clear_error(table: bytes) -> None:
    with pytest.raises(InputError):
        parse_table(table, COLUMNS, where="x")


def test_columns_must_say_one_kind_of_value() -> None:
    for columns in (
        TableColumns(time="t", time_unit="s"),
        TableColumns(time="t", time_unit="s", power="p", energy="e"),
    ):
        with pytest.raises(InputError, match="expected one"):
            parse_table(b"t,p,e\n", columns, where="x")


@given(st.binary(max_size=100) | st.text(alphabet='t,p\n0123.-e"\r', max_size=100).map(lambda x: b"t,p\n" + x.encode()))
def test_any_bytes_as_a_table_are_a_rail_or_one_error(data: bytes) -> None:
    try:
        (rail,) = parse_table(data, COLUMNS, where="x").rails
    except InputError:
        return
    assert list(rail.at_ns) == sorted(set(rail.at_ns))


@given(
    rows=st.lists(st.tuples(st.integers(0, 50), st.none() | st.integers(-5, 200)), max_size=30),
    unit=st.sampled_from(["uJ", "uW"]),
    wrap_uj=st.none() | st.integers(1, 200),
    stamped=st.booleans(),
)
def test_any_readings_make_a_rail_that_is_one(
    *, rows: list[tuple[int, int | None]], unit: str, wrap_uj: int | None, stamped: bool
) -> None:
    channel = Channel(name="r", unit="uW" if unit == "uW" else "uJ", wrap_uj=wrap_uj, stamped=stamped, stall_ns=20)
    rail = build_rail(channel, rows, period_ns=2, start_ns=0, end_ns=60)
    values = rail.power_uw if rail.energy_uj is None else rail.energy_uj
    assert values is not None
    assert len(values) == len(rail.at_ns)
    assert list(rail.at_ns) == sorted(set(rail.at_ns))
    assert unit == "uW" or list(values) == sorted(values)
    assert all(gap.start_ns < gap.end_ns for gap in rail.gaps)
    assert stamped or rail.skipped + len(values) == len(rows)


def test_a_counter_that_starts_anew_leaves_a_gap_and_one_that_wraps_does_not() -> None:
    rows: list[tuple[int, int | None]] = [(0, 90), (1, 95), (2, 5), (3, 10)]
    reset = build_rail(CHANNEL, rows, period_ns=1)
    assert (reset.energy_uj, [gap.why for gap in reset.gaps]) == ((90, 95, 95, 100), ["reset"])
    wrapping = Channel(name="r", unit="uJ", resolution_uj=1, wrap_uj=100)
    wrapped = build_rail(wrapping, rows, period_ns=1)
    assert (wrapped.energy_uj, wrapped.gaps) == ((90, 95, 105, 110), ())
    (gap,) = build_rail(wrapping, [(0, 90), (1, 80)], period_ns=1).gaps  # nearly a whole turn at once is no wrap
    assert gap.why == "reset"


def test_a_counter_of_unknown_step_that_never_moves_says_nothing() -> None:
    rail = build_rail(Channel(name="r", unit="uJ"), [(0, 7), (1, 7), (2, 7)], period_ns=1)
    assert [(gap.start_ns, gap.end_ns, gap.why) for gap in rail.gaps] == [(0, 2, "stalled")]


@pytest.mark.parametrize(
    "change", [{"at_ns": (1, 0)}, {"at_ns": (0,)}, {"energy_uj": (1, 2)}, {"power_uw": None}, {"power_uw": (1.5, 2)}]
)
def test_a_kept_trace_that_was_changed_by_hand_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    rail = build_rail(Channel(name="r", unit="uW"), [(0, 1), (1, 2)], period_ns=1)
    whole = PowerTrace(meter="m", provenance="measured", clock="meter", period_ns=1, rails=(rail,))
    (tmp_path / "whole").write_text(encode(whole))
    assert replay_trace(tmp_path / "whole").rails == (rail,)
    plain = json.loads(encode(whole))
    plain["rails"][0] |= change
    (tmp_path / "kept").write_text(json.dumps(plain))
    with pytest.raises(InputError, match="kept"):
        replay_trace(tmp_path / "kept")


def test_a_real_agent_streams_until_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "sys/class/hwmon/hwmon0/name", "ina226")
    put(tmp_path, "sys/class/hwmon/hwmon0/power1_input", 3_000_000)
    monkeypatch.setenv("RANKSHIP_AGENT_ROOT", str(tmp_path))
    reach = Reach(describe_this_machine(), str(find_agent()), lambda _: LocalTransport(), 3_600_000)
    meter = DeviceMeter(MeterChoice(name="hwmon", period_us=5_000), reach)
    meter.start()
    with pytest.raises(RuntimeError, match="already recording"):
        meter.start()
    trace = meter.stop()
    (rail,) = trace.rails
    assert len(rail.at_ns) >= 2
    assert set(rail.power_uw or ()) == {3_000_000}
    assert rail.resolution_uw == 6_250
    with pytest.raises(RuntimeError, match="not recording"):
        meter.stop()


@pytest.mark.parametrize("request_", [{"period_us": 1}, {"duration_ms": 0}, {"meter": "sundial"}])
def test_the_agent_refuses_what_it_cannot_sample(request_: dict[str, object]) -> None:
    from rankship_targets.agent.main import answer

    request = {"command": "meter", "meter": "hwmon", "period_us": 1000, "duration_ms": 1, **request_}
    (event,) = answer(encode(request))
    assert (event["event"], event["kind"]) == ("error", "bad_request")
