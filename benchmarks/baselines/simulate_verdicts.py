# ruff: noqa: INP001, PLR2004 - a script is no package, and a simulation is made of numbers
"""How often verdicts and intervals are right, on noise of known kinds.

`python benchmarks/baselines/simulate_verdicts.py` judges everything through the shipped functions and writes
simulate_verdicts.json beside this file: coverage of every interval that a report prints, verdicts of `rankship
compare`, alarms of step detection. Two standard errors of a share of 0.95 are 0.022 at 400 draws. Some minutes on one
core.
"""

import json
import platform
import sys
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from time import process_time

import numpy as np
from numpy.typing import NDArray

from rankship_benchmarks.judge.compare import Rule, choose_verdict, count_rounds_needed
from rankship_benchmarks.stats.disorder import find_disorder
from rankship_benchmarks.stats.estimates import estimate_median, estimate_ratio, percentile_bound
from rankship_benchmarks.stats.shift import Shift, correct_holm, find_shift
from rankship_benchmarks.stats.steps import AlarmRule, Night, find_steps
from rankship_pipeline.foundation.files import write_atomic

HERE = Path(__file__).parent
Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Array]  # log times of one run's rounds about 0, which is their median


def draw_normal(spread: float) -> Draw:
    """Draw independent rounds."""
    return lambda random, rounds: random.normal(0, spread, rounds)


def draw_correlated(rho: float, spread: float = 0.02) -> Draw:
    """Draw rounds that keep the share `rho` of the one before (an autoregression)."""

    def draw(random: np.random.Generator, rounds: int) -> Array:
        values = random.normal(0, spread, rounds)
        for place in range(1, rounds):
            values[place] = rho * values[place - 1] + np.sqrt(1 - rho**2) * values[place]
        return values

    return draw


def draw_two_speeds(random: np.random.Generator, rounds: int) -> Array:
    """Draw rounds of which four in ten take 8 % longer."""
    return random.normal(0, 0.01, rounds) + 0.08 * (random.random(rounds) < 0.4) - TWO_SPEEDS_MEDIAN


def draw_throttled(random: np.random.Generator, rounds: int) -> Array:
    """Draw rounds of which a stretch of 30 %, anywhere, takes 25 % longer, unreported by the device."""
    values, length = random.normal(0, 0.01, rounds), round(0.3 * rounds)
    start = random.integers(0, rounds - length + 1)
    values[start : start + length] += log(1.25)
    return values - THROTTLED_MEDIAN


def draw_drifting(random: np.random.Generator, rounds: int) -> Array:
    """Draw rounds that slow down evenly by 4 % from first to last: the true median is the middle's."""
    return random.normal(0, 0.01, rounds) + np.linspace(-0.02, 0.02, rounds)


def draw_heavy(random: np.random.Generator, rounds: int) -> Array:
    """Draw rounds from Student's t with 2 degrees of freedom: rare outliers far away."""
    return 0.01 * random.standard_t(2, rounds)


# The true median, found once from a million draws.
_MANY = np.random.default_rng(0)
TWO_SPEEDS_MEDIAN = float(np.median(_MANY.normal(0, 0.01, 1_000_000) + 0.08 * (_MANY.random(1_000_000) < 0.4)))
THROTTLED_MEDIAN = float(np.median(_MANY.normal(0, 0.01, 1_000_000) + log(1.25) * (_MANY.random(1_000_000) < 0.3)))


def read_recorded() -> dict[str, Draw]:
    """Read measured rounds, relative to their median; a run is a stretch of them from a random start."""
    found: dict[str, Draw] = {}
    path = HERE / "recorded_rounds.json"
    for name, times in json.loads(path.read_text())["rounds_ns"].items() if path.exists() else ():
        logs = np.log(np.array(times))
        logs -= np.median(logs)

        def draw(random: np.random.Generator, rounds: int, logs: Array = logs) -> Array:
            start = random.integers(0, len(logs))
            return np.roll(logs, -start)[:rounds]

        found[f"recorded: {name}"] = draw
    return found


SCENARIOS: dict[str, Draw] = {
    "lognormal 1 %": draw_normal(0.01),
    "lognormal 2 %": draw_normal(0.02),
    "lognormal 5 %": draw_normal(0.05),
    "heavy tails (t, 2 degrees)": draw_heavy,
    "autocorrelated 0.3, 2 %": draw_correlated(0.3),
    "autocorrelated 0.6, 2 %": draw_correlated(0.6),
    "drift 4 % in the run": draw_drifting,
    "bimodal, 8 % apart": draw_two_speeds,
    "throttled for 30 %, untold": draw_throttled,
}


def cover_intervals(draws: int, rounds: int, scenarios: dict[str, Draw]) -> list[dict[str, object]]:
    """Return the share of draws with an interval, and of intervals that hold the true value, 0 for all three."""
    rows: list[dict[str, object]] = []
    for name, draw in scenarios.items():
        random = np.random.default_rng(11)
        kept: dict[str, list[bool]] = {"median": [], "ratio in a run": [], "ratio between runs": []}
        for _ in range(draws):
            first, second = np.exp(draw(random, rounds)), np.exp(draw(random, rounds))
            paired = estimate_ratio(dict(enumerate(first)), dict(enumerate(second)))
            shift = find_shift(first.tolist(), second.tolist())
            for what, one in (
                ("median", estimate_median(first.tolist())),
                ("ratio in a run", paired),
                ("ratio between runs", shift.ratio),
            ):
                disordered = what == "ratio between runs" and any(
                    find_disorder(run.tolist(), 0.03) for run in (first, second)
                )
                if one is not None and one.low is not None and one.high is not None and not disordered:
                    kept[what].append(one.low <= 1 <= one.high)
        row: dict[str, object] = {"noise": name, "rounds": rounds}
        for what, held in kept.items():
            row[what] = {
                "given": round(len(held) / draws, 3),
                "covers": round(float(np.mean(held)), 3) if held else None,
            }
        rows.append(row)
    return rows


def find_change(before: Array, after: Array) -> Shift | None:
    """Compare one case of two runs as compare_bundles does, without trials; None if the rounds are in disorder."""
    runs = np.exp(before).tolist(), np.exp(after).tolist()
    return None if any(find_disorder(run, Rule().effect) for run in runs) else find_shift(*runs)


def judge(found: list[Shift | None], rule: Rule) -> list[str]:
    """Return the verdicts on several cases that are judged together."""
    adjusted = iter(correct_holm([shift.p_value for shift in found if shift]))
    return [choose_verdict(shift.ratio, next(adjusted), rule)[0] if shift else "unknown" for shift in found]


def count_words(draws: int, scenarios: dict[str, Draw], cases: int = 6) -> list[dict[str, object]]:
    """Count the verdicts on six cases of which one is 3 % slower, and on runs without a difference."""
    rows: list[dict[str, object]] = []
    rule = Rule()
    for name, draw in scenarios.items():
        random, rounds = np.random.default_rng(13), ROUNDS_BY_NOISE.get(name, 16)
        slower: list[str] = []
        alike: list[str] = []
        runs_with_alarm = 0
        for _ in range(draws):
            found = [find_change(draw(random, rounds), draw(random, rounds)) for _ in range(cases)]
            words = judge(found, rule)
            alike += words
            runs_with_alarm += any(word in {"worse", "better"} for word in words)
            changed = find_change(draw(random, rounds), draw(random, rounds) + log(1.03))
            slower.append(judge([changed, *found[1:]], rule)[0])
        rows.append(
            {
                "noise": name,
                "rounds": rounds,
                "3 % slower": count(slower),
                "nothing changed": count(alike),
                "comparisons with a false word": round(runs_with_alarm / draws, 4),
            }
        )
    return rows


# Rounds per run for 95 % power over six cases, found by this simulation; kinds of noise that are not listed get 16.
ROUNDS_BY_NOISE = {"lognormal 1 %": 16, "lognormal 2 %": 30, "lognormal 5 %": 160}


def compare_sessions(draws: int) -> list[dict[str, object]]:
    """Count the verdicts on runs between which the whole device changed, with and without the canary."""
    rows: list[dict[str, object]] = []
    for apart in (0.005, 0.01, 0.02):
        for noise, rounds in ((0.01, 16), (0.02, 50)):
            random = np.random.default_rng(17)
            words: dict[str, list[str]] = {"without a canary": [], "with a canary": []}
            caught: list[str] = []
            for _ in range(draws):
                level = random.normal(0, apart, 2)
                runs = [level[n] + random.normal(0, noise, (2, rounds)) for n in range(2)]
                words["without a canary"] += judge([find_change(runs[0][0], runs[1][0])], Rule())
                related = [run[0] - run[1] for run in runs]
                moved = abs(np.log(find_shift(*[np.exp(run[1]).tolist() for run in runs]).ratio.value))
                changed = moved > log(1 + Rule().effect)
                words["with a canary"] += ["unknown"] if changed else judge([find_change(*related)], Rule())
                caught += ["unknown"] if changed else judge([find_change(related[0], related[1] + log(1.03))], Rule())
            row: dict[str, object] = {"runs apart by": apart, "rounds apart by": noise, "rounds": rounds}
            row |= {f"nothing changed, {what}": count(said) for what, said in words.items()}
            rows.append(row | {"3 % slower, with a canary": count(caught)})
    return rows


def count(words: list[str]) -> dict[str, float]:
    """Return the share of each verdict."""
    return {word: round(words.count(word) / len(words), 4) for word in ("better", "worse", "same", "unknown")}


NightDraw = Callable[[np.random.Generator, int], Array]


def draw_nights(spread: float, kind: str) -> NightDraw:
    """Draw log levels of nights with this spread."""

    def draw(random: np.random.Generator, nights: int) -> Array:
        values = random.normal(0, spread, nights)
        if kind == "autocorrelated 0.5":
            for place in range(1, nights):
                values[place] = 0.5 * values[place - 1] + np.sqrt(0.75) * values[place]
        if kind == "one night in 20 odd by 6 spreads":
            values += (random.random(nights) < 0.05) * random.choice([-6, 6], nights) * spread
        if kind == "slow drift of 1 % a month":
            values += np.linspace(0, 0.01 * nights / 30, nights)
        if kind == "weekends faster by a spread":
            values -= spread * (np.arange(nights) % 7 >= 5)
        return values

    return draw


def make_nights(levels: Array) -> list[Night]:
    """Make nights at these log levels."""
    return [Night(run_id=str(n), started_utc=str(n), rounds_ns=(exp(level),)) for n, level in enumerate(levels)]


def watch_histories(months: int, histories: int) -> list[dict[str, object]]:
    """Count the false alarms of six cases per device-month, and how soon a 3 % step after 30 nights is found."""
    rows: list[dict[str, object]] = []
    kinds = ["independent", "autocorrelated 0.5", "one night in 20 odd by 6 spreads"]
    kinds += ["slow drift of 1 % a month", "weekends faster by a spread"]
    plans = [(spread, kind) for spread in (0.005, 0.01, 0.02) for kind in kinds[: 5 if spread == 0.01 else 1]]
    rule = AlarmRule()
    for spread, kind in plans:
        random, draw = np.random.default_rng(19), draw_nights(spread, kind)
        false = sum(len(find_steps(make_nights(draw(random, 90)), rule)) for _ in range(months // 3))
        waits, covered = [], []
        for _ in range(histories):
            levels = draw(random, 44)
            levels[30:] += log(1.03)
            found = [one for one in find_steps(make_nights(levels), rule) if int(one.found_run_id) >= 30]
            hit = next((one for one in found if one.verdict == "worse"), None)
            waits.append(int(hit.found_run_id) - 29 if hit else 99)
            if hit and hit.ratio.low and hit.ratio.high:
                covered.append(hit.ratio.low <= 1.03 <= hit.ratio.high)
        rows.append(
            {
                "nights apart by": spread,
                "kind": kind,
                "false alarms a device-month (6 cases)": round(false / (months // 3 * 3) * rule.cases, 2),
                **{f"told within {n} nights": round(float(np.mean([w <= n for w in waits])), 3) for n in (3, 5, 7, 14)},
                "the step's interval covers, 14 nights on": round(float(np.mean(covered)), 3) if covered else None,
            }
        )
    return rows


def count_bic_steps(histories: int) -> list[dict[str, object]]:
    """Count the false steps of the usual alternative: a piecewise-constant least-squares fit with BIC's penalty."""
    rows: list[dict[str, object]] = []
    for nights in (30, 90):
        random = np.random.default_rng(29)
        false = sum(len(segment(random.normal(0, 0.01, nights))) for _ in range(histories))
        rows.append(
            {"nights": nights, "false steps a device-month (6 cases)": round(6 * false / histories * 30 / nights, 2)}
        )
    return rows


def segment(values: Array) -> list[int]:
    """Find steps by optimal partitioning (Jackson et al. 2005): two parameters a step, spread from differences."""
    spread = np.median(np.abs(np.diff(values))) * 1.4826 / np.sqrt(2)
    penalty = 2 * np.log(values.size) * spread**2
    sums, squares = (np.concatenate([[0.0], np.cumsum(part)]) for part in (values, values**2))
    best, back = np.full(values.size + 1, np.inf), np.zeros(values.size + 1, dtype=int)
    best[0] = -penalty
    for end in range(1, values.size + 1):
        starts = np.arange(end)
        inside = squares[end] - squares[starts] - (sums[end] - sums[starts]) ** 2 / (end - starts)
        back[end] = int(np.argmin(best[starts] + inside + penalty))
        best[end] = (best[starts] + inside + penalty)[back[end]]
    steps, place = [], int(back[values.size])
    while place:
        steps.append(place)
        place = int(back[place])
    return steps[::-1]


def bound_percentiles(draws: int) -> list[dict[str, object]]:
    """Count how often a percentile's bound lies above it, for independent inferences and for clustered ones."""
    from scipy.stats import norm

    rows: list[dict[str, object]] = []
    for share, samples in ((0.9, 200), (0.99, 1000)):
        for rho in (0.0, 0.3, 0.6):
            random = np.random.default_rng(23)
            truth, held = exp(0.05 * float(norm.ppf(share))) * 1e6, []
            for _ in range(draws):
                times = 1e6 * np.exp(draw_correlated(rho, 0.05)(random, samples))
                bound = percentile_bound([int(time) for time in times], share)
                held += [] if bound is None else [bound >= truth - 1]
            row: dict[str, object] = {"percentile": 100 * share, "samples": samples, "autocorrelation": rho}
            rows.append(row | {"given": len(held) / draws, "covers": round(float(np.mean(held)), 3)})
    return rows


def main() -> None:
    """Run the named parts, or all; with `--quick` a twentieth of each, only printed."""
    share = 20 if "--quick" in sys.argv else 1
    recorded, made = read_recorded(), SCENARIOS
    parts: dict[str, Callable[[], object]] = {
        "words": lambda: count_words(200 // share, made),
        "histories": lambda: watch_histories(1800 // share, 600 // share),
        "BIC instead": lambda: count_bic_steps(1000 // share),
        "sessions": lambda: compare_sessions(200 // share),
        "intervals": lambda: [row for rounds in (6, 12, 20) for row in cover_intervals(400 // share, rounds, made)],
        "percentiles": lambda: bound_percentiles(200 // share),
    }
    if recorded:
        parts["recorded intervals"] = lambda: cover_intervals(400 // share, 12, recorded)
        parts["recorded words"] = lambda: count_words(200 // share, recorded)
    wanted = [word for word in sys.argv[1:] if word in parts] or list(parts)
    path = HERE / "simulate_verdicts.json"
    for name in wanted:
        begun = process_time()
        rows = parts[name]()
        result: dict[str, object] = json.loads(path.read_text()) if path.exists() and share == 1 else {}
        result |= {
            "what": "simulated; every word and interval comes from the shipped functions",
            "rule": {
                "effect": Rule().effect,
                "significance": Rule().significance,
                "least rounds": count_rounds_needed(6),
            },
            "alarms": {"effect": AlarmRule().effect, "aim a month": AlarmRule().false_alarms_a_month},
            "machine": f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
            name: rows,
            f"{name}: CPU seconds": round(process_time() - begun),
        }
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        if share == 1:
            write_atomic(path, text.encode())
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
