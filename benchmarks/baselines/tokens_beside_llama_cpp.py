# ruff: noqa: INP001 - a script, no package
"""Tokens a second of files that generate, beside llama.cpp's files of the same model, round by round.

    python benchmarks/baselines/tokens_beside_llama_cpp.py --llama-python llama/bin/python --out tokens.json
        int8=compressed.onnx q8_0=model-q8_0.gguf

Every round runs each file in a fresh process, every other round backwards: one prompt from an empty cache, untimed, the
same again, timed, and then one token after the other, each timed. Ours is driven as on a device, by the agent's
decoder; llama.cpp by llama-cpp-python's `Llama.eval`, in the Python that `--llama-python` names, with memory-mapped
weights as by default. Tokens are drawn, so that texts differ in nothing: speed does not depend on which they are. The
figures are medians over rounds of a round's median, with the least and the largest round; memory is the process's peak.

With `--text` and `--tokenizer`, the folder of the model, every file first says how likely the last `--windows` of that
text are, one token after the other through its cache: perplexity with its 95 % interval over windows.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankship_pipeline import __version__
from rankship_pipeline.evaluate.perplexity import Scores, summarise
from rankship_pipeline.foundation.files import write_atomic
from rankship_pipeline.foundation.formats import FACTS

TIMED = """
import json, random, resource, sys, time
kind, path, threads, prompt, new, context, vocabulary = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:8])
draw = random.Random(0)
tokens = [draw.randrange(3, vocabulary) for _ in range(prompt + new)]
if kind == "gguf":
    from llama_cpp import Llama
    model = Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
    rewind, step = model.reset, model.eval
else:
    import numpy
    from rankship_targets.agent.decoders import open_decoder
    model = open_decoder(kind, path, threads)
    rewind, step = lambda: model.rewind(0), lambda some: model.step(numpy.array(some))
def clock(some):
    begun = time.perf_counter_ns()
    step(some)
    return (time.perf_counter_ns() - begun) / 1e6
for _ in range(2):
    rewind()
    first = clock(tokens[:prompt])
each = [clock([one]) for one in tokens[prompt:]]
print(json.dumps({"first_ms": first, "each_ms": each, "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""

SCORED = """
import json, numpy, sys
kind, path, threads, file = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
windows = numpy.load(file)
if kind == "gguf":
    from llama_cpp import Llama
    model = Llama(path, n_ctx=windows.shape[1], n_threads=threads, logits_all=True, verbose=False)
    def run(window):
        model.reset()
        model.eval([int(one) for one in window])
        return model.scores[: len(window) - 1]
else:
    from rankship_targets.agent.decoders import open_decoder
    model = open_decoder(kind, path, threads)
    def run(window):
        model.rewind(0)
        return numpy.stack([model.step(window[place : place + 1]) for place in range(len(window) - 1)])
nats = []
for window in windows:
    logits = run(window).astype("float64")
    logits -= logits.max(1, keepdims=True)
    picked = logits[numpy.arange(len(logits)), window[1:]]
    nats.append(float((numpy.log(numpy.exp(logits).sum(1)) - picked).sum()))
print(json.dumps(nats))
"""


def cut_windows(options: argparse.Namespace) -> Tensor:
    """The last windows of the text, ids (windows, context)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    ids = torch.tensor(tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"])
    return ids[-options.windows * options.context :].reshape(options.windows, options.context)


def score_file(path: Path, pythons: dict[str, str], options: argparse.Namespace, windows: Tensor) -> list[float | None]:
    """The perplexity of a file, and the ends of its interval."""
    with TemporaryDirectory() as folder:
        np.save(Path(folder, "windows.npy"), windows.numpy())
        nats = run_code(SCORED, path, pythons, options.threads, Path(folder, "windows.npy"))
    counts = torch.full((len(windows),), options.context - 1.0, dtype=torch.float64)
    scores = Scores(torch.tensor(nats, dtype=torch.float64), counts, torch.zeros_like(counts))
    found = summarise(scores, options.context)
    return [found.perplexity, found.low, found.high]


def run_code(code: str, path: Path, pythons: dict[str, str], *given: object) -> Any:  # noqa: ANN401 - what it prints
    """Run code for one file in a process of its own; what it prints last, from JSON."""
    kinds = {facts.suffix: name for name, facts in FACTS.items()} | {"gguf": "gguf"}
    kind = kinds[path.suffix[1:]]
    python = pythons["gguf" if kind == "gguf" else "ours"]
    done = subprocess.run(
        [python, "-c", code, kind, str(path), *map(str, given)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def time_file(path: Path, pythons: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """One round of one file, in a process of its own."""
    sizes = (options.threads, options.prompt, options.new, options.context, options.vocabulary)
    found = run_code(TIMED, path, pythons, *sizes)
    each = median(found["each_ms"])
    return {"first_ms": found["first_ms"], "token_ms": each, "peak_mib": found["peak_kib"] / 1024}


def describe(rounds: Sequence[dict[str, Any]], path: Path) -> dict[str, Any]:
    """The median, least and largest of each figure over the rounds; tokens a second; the file's bytes."""
    rows = {
        name: [median(values), min(values), max(values)]
        for name in rounds[0]
        for values in [[one[name] for one in rounds]]
    }
    return {**rows, "tokens_per_s": 1000 / rows["token_ms"][0], "bytes": path.stat().st_size, "rounds": len(rounds)}


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="NAME=FILE; .gguf for llama.cpp, else one of our formats")
    parser.add_argument("--llama-python", required=True, help="a Python that has llama-cpp-python")
    parser.add_argument("--out", type=Path, required=True)
    for name, default in (("rounds", 6), ("threads", 1), ("prompt", 128), ("new", 32), ("context", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", help="the model's folder, which has its tokenizer")
    parser.add_argument("--windows", type=int, default=24)
    options = parser.parse_args()
    files = {name: Path(path) for name, _, path in (given.partition("=") for given in options.files)}
    pythons = {"ours": sys.executable, "gguf": options.llama_python}
    perplexities = {}
    if options.text is not None:
        windows = cut_windows(options)
        for name, path in files.items():
            perplexities[name] = score_file(path, pythons, options, windows)
            sys.stdout.write(f"{name:24} perplexity {perplexities[name]}\n")
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
    for turn in range(options.rounds):
        for name in list(files)[:: 1 if turn % 2 == 0 else -1]:
            rounds[name].append(time_file(files[name], pythons, options))
    rows = {name: describe(taken, files[name]) for name, taken in rounds.items()}
    for name, row in rows.items():
        first, token = row["first_ms"], row["token_ms"]
        sys.stdout.write(
            f"{name:24} {row['bytes'] / 1e6:8.1f} MB  first {first[0]:7.1f} ms [{first[1]:.1f}, {first[2]:.1f}]"
            f"  token {token[0]:6.2f} ms [{token[1]:.2f}, {token[2]:.2f}]  {row['tokens_per_s']:6.1f} tokens/s"
            f"  peak {row['peak_mib'][0]:.0f} MiB\n"
        )
    asked = {name: getattr(options, name) for name in ("rounds", "threads", "prompt", "new", "context")}
    told = {"rankship": __version__, "machine": platform.machine(), "utc": datetime.now(UTC).isoformat()}
    write_atomic(
        options.out, json.dumps({**told, **asked, "files": rows, "perplexities": perplexities}, indent=1).encode()
    )


if __name__ == "__main__":
    main()
