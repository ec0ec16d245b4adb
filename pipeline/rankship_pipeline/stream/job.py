"""Compresses a language model larger than memory, from its folder to a folder: the whole of it, resumable."""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from rankship_pipeline.evaluate.perplexity import Perplexity
from rankship_pipeline.factors.rebuild import rebuild
from rankship_pipeline.factors.saved_model import RECORD, read_saved
from rankship_pipeline.foundation.codec import decode, digest, encode
from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import ensure_writable, hash_file, write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_pipeline.foundation.records import RankPlan
from rankship_pipeline.foundation.toolchain import hash_code, list_versions
from rankship_pipeline.foundation.units import show_bytes
from rankship_pipeline.models.decoder import Decoder, open_decoder
from rankship_pipeline.models.huggingface import find_snapshot
from rankship_pipeline.models.layers import Layer, count_parameters
from rankship_pipeline.models.model_config import load_tokenizer
from rankship_pipeline.models.token_windows import check_tokens, pack_windows, read_tokens
from rankship_pipeline.ranks.budget import check_feasible, resolve_budget
from rankship_pipeline.ranks.losses import list_doubts
from rankship_pipeline.ranks.price import price_parameters
from rankship_pipeline.recipe.budget import Budget
from rankship_pipeline.recipe.choices import RankChoice, Source
from rankship_pipeline.stream.choice import StreamChoice
from rankship_pipeline.stream.compress import allocate_stream, analyse_stream, list_block_layers, refuse_unstreamed
from rankship_pipeline.stream.foresee import foresee_stream, refuse_lack
from rankship_pipeline.stream.perplexity import stream_perplexity
from rankship_pipeline.stream.progress import track_stages
from rankship_pipeline.stream.workers import open_pool
from rankship_pipeline.stream.write import fill_part, locate_part, publish_part, refuse_existing

REPORT = "stream.json"
_FEWEST = 2  # windows: one to calibrate with, one to test


@record
class StreamJob:
    """What to compress, by which text, and to what size.

    The first `samples` windows of `tokens` tokens of the text calibrate; the next `test_samples`, or those of
    `test_text`, test: perplexity in windows of that length, one behind the other. Of a shorter text half calibrates.
    The budget is in parameters of the whole model. The choice's curvature follows from the sensitivity.
    """

    model: str
    text: Path
    test_text: Path | None = None
    tokens: int = 256
    samples: int = 64
    test_samples: int = 64
    budget: Budget = Budget(kept_parameters=0.8)
    ranks: RankChoice = RankChoice()
    how: StreamChoice = StreamChoice()


@record
class StreamReport:
    """What became of a streamed model; perplexities are of the same text."""

    made_from: str
    dense_parameters: int
    parameters: int
    budget_parameters: int
    layers: int
    factored: int
    calibration_tokens: int
    before: Perplexity
    after: Perplexity
    predicted_nats: float | None
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Ready:
    """A job that passed its checks."""

    decoder: Decoder
    layers: tuple[Layer, ...]
    calibration: Tensor
    test: Tensor
    budget: int
    how: StreamChoice


def compress_stream(job: StreamJob, target: Path, steps: Steps, work: Path | None = None) -> StreamReport:
    """Compress a model into the new folder `target`, which appears whole; the report is in it as stream.json.

    Intermediate files are in `work`, where they stay for other budgets, or in a hidden folder beside the target until
    it is done. Stopped anywhere, the same call goes on at the block that it stopped in; once done, it reads the report.
    """
    key = _make_key(job)
    done = _read_report(target, key)
    if done is not None:
        return done
    refuse_existing(target)
    folder = work or target.parent / f".{target.name}.stream"
    ready = prepare_stream(job, target, folder, steps)
    decoder, length = ready.decoder, job.tokens
    with track_stages(steps) as begin:
        before = stream_perplexity(
            decoder, ready.test, folder, length=length, stride=length, begin=begin, stage="perplexity before"
        )
        analysis = analyse_stream(decoder.checkpoint.folder, ready.calibration, folder, ready.how, begin=begin)
        plan = allocate_stream(analysis, ready.budget, job.ranks)
        part = locate_part(analysis, plan, target)
        fill_part(analysis, plan, part, begin)
        after = stream_perplexity(
            open_compressed(part),
            ready.test,
            folder,
            length=length,
            stride=length,
            begin=begin,
            stage="perplexity after",
        )
    report = StreamReport(
        made_from=key,
        dense_parameters=count_parameters(decoder.model),
        parameters=plan.total_parameters,
        budget_parameters=ready.budget,
        layers=len(plan.layers),
        factored=len(plan.factors),
        calibration_tokens=ready.calibration.numel(),
        before=before,
        after=after,
        predicted_nats=_predict_nats(plan, {one.name: analysis.read_nats(one.name) for one in plan.layers}),
        doubts=tuple(list_doubts(plan)),
    )
    write_atomic(part / REPORT, encode(report).encode())
    publish_part(part, target)
    if work is None:
        shutil.rmtree(folder)
    keys = "[0-9a-f]" * 16
    for leftover in target.parent.glob(f".{escape(target.name)}.{keys}.part"):  # of other plans for the same target
        shutil.rmtree(leftover)
    return report


def _make_key(job: StreamJob) -> str:
    """The hash of everything that affects the result: the job, the contents behind its paths, and the code."""
    snapshot = find_snapshot(Source(name=job.model, huggingface=job.model), Path())
    looks = {path.name: path.stat() for path in sorted(snapshot.iterdir()) if path.is_file()}
    texts = [hash_file(one) for one in (job.text, job.test_text) if one is not None and one.is_file()]
    ingredients = [
        encode(replace(job, how=replace(job.how, workers=None, scheduler=None))),
        {name: [look.st_size, look.st_mtime_ns] for name, look in looks.items()},
        texts,
        hash_code(),
        list_versions(),
    ]
    return digest(ingredients)


def _read_report(target: Path, key: str) -> StreamReport | None:
    """The report of this very job, done before."""
    if not (target / REPORT).is_file():
        return None
    with suppress(InputError):  # of another version
        report = decode(StreamReport, (target / REPORT).read_bytes(), where=str(target / REPORT))
        return report if report.made_from == key else None
    return None


def prepare_stream(job: StreamJob, target: Path, folder: Path, steps: Steps) -> _Ready:
    """Run all checks that come before long work, and say what it will take."""
    refuse_unstreamed(job.ranks)
    for name, count in (("--samples", job.samples), ("--test-samples", job.test_samples)):
        if count < 1:
            raise InputError(f"{name} is {count}", hint="give 1 or more")
    for text in filter(None, (job.text, job.test_text)):
        if not text.is_file():
            raise InputError(f"there is no text {text}", hint="give a UTF-8 text file: .txt or .jsonl")
    ensure_writable(target.absolute().parent, "--to")
    if folder.parent != target.parent:
        ensure_writable(folder, "--work")
    with steps.step("check the model, its text and this machine"):
        source = Source(name=job.model, huggingface=job.model)
        snapshot = find_snapshot(source, Path())
        if (snapshot / RECORD).exists():
            raise InputError(f"{job.model} is a compressed model already", hint="give the dense model it was made from")
        decoder = open_decoder(snapshot)
        tokenizer = load_tokenizer(source, Path())
        calibration, test = _take_windows(job, decoder, tokenizer)
        how = replace(job.how, curvature=job.ranks.sensitivity != "relative")
        layers = list_block_layers(decoder, how.exclude)
        taken = [one for one in layers if not _matches(one, job.ranks)]
        dense = count_parameters(decoder.model)
        budget = resolve_budget(job.budget, dense)
        fixed = dense - sum(one.parameters for one in taken)
        check_feasible(taken, price_parameters(fixed), budget, job.ranks)
        if how.scheduler is not None:
            with open_pool(how):
                pass
        needs = foresee_stream(decoder, layers, how, len(calibration), -(-len(test) // job.tokens), job.tokens)
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        doubt = refuse_lack(needs, folder if folder.exists() else target.absolute().parent, used)
    steps.note(
        f"{decoder.count} blocks, {dense:,} parameters, {calibration.numel():,} tokens to calibrate: about"
        f" {show_bytes(needs.memory_bytes)} of memory and {show_bytes(needs.disk_bytes)} of disk; stopped, the same"
        " command goes on"
    )
    if doubt is not None:
        steps.note(doubt)
    return _Ready(decoder, layers, calibration, test, budget, how)


def open_compressed(folder: Path) -> Decoder:
    """A compressed model's folder as a decoder whose planned layers are pairs."""
    plan = read_saved(folder).plan
    return open_decoder(folder, lambda model: rebuild(model, {} if plan is None else plan.factors))


def _take_windows(job: StreamJob, decoder: Decoder, tokenizer: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Calibration windows (samples, tokens), and the text to test with, (tokens,)."""
    most = getattr(decoder.model.config.get_text_config(), "max_position_embeddings", None) or job.tokens
    if not 1 < job.tokens <= most:
        raise InputError(
            f"windows of {job.tokens} tokens do not fit: the model takes at most {most}", hint="choose --tokens"
        )
    vocabulary = decoder.model.config.get_text_config().vocab_size
    wanted = job.samples if job.test_text is not None else job.samples + job.test_samples
    windows = pack_windows(read_tokens(job.text, tokenizer, wanted * job.tokens), job.tokens)
    if job.test_text is None:
        calibrating = job.samples if len(windows) == wanted else min(job.samples, len(windows) // 2)
        chosen, rest = windows[:calibrating], windows[calibrating : calibrating + job.test_samples]
        test = rest.flatten()
    else:
        chosen, test = windows, read_tokens(job.test_text, tokenizer, job.test_samples * job.tokens)
    if len(chosen) == 0 or len(test) < 2:  # noqa: PLR2004 - the first is not scored
        raise InputError(
            f"{job.text} holds only {len(windows)} windows of {job.tokens} tokens",
            hint=f"give a longer text of at least {_FEWEST} windows, or fewer --tokens",
        )
    for tokens in (windows, test):
        check_tokens(tokens, vocabulary, job.model)
    return chosen, test


def _matches(layer: Layer, ranks: RankChoice) -> bool:
    return any(fnmatchcase(layer.name, pattern) for pattern in ranks.exclude)


def _predict_nats(plan: RankPlan, nats: Mapping[str, float | None]) -> float | None:
    """The divergence a sample that the second order predicts for the plan; None without curvature."""
    known = [(one.relative_error, found) for one in plan.layers if (found := nats[one.name]) is not None]
    return sum(error * found for error, found in known) if known else None
