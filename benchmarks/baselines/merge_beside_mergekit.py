# ruff: noqa: INP001 - a script, no package
"""Time and memory of the same merges by rankship and by mergekit, in turns, and the error of each.

    python -m venv /somewhere && /somewhere/bin/pip install mergekit
    nice -n 5 python benchmarks/baselines/merge_beside_mergekit.py --mergekit /somewhere/bin/mergekit-yaml

Checkpoints are random, LLaMA-shaped, bfloat16: a base and two models near it. Every merge runs in a fresh process, from
start to exit, imports included, on one thread. Memory is the process's peak as the kernel counts it (mapped files
included) and, sampled, its anonymous part alone.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from rankship_pipeline.foundation.console import Steps
from rankship_pipeline.foundation.toolchain import list_versions
from rankship_pipeline.models.decoder import make_empty
from rankship_pipeline.models.sharded import INDEX
from rankship_pipeline.stream.merge import open_model

OURS = (sys.executable, "-c", "import sys; from rankship_pipeline.cli import main; sys.exit(main())")
SHARD_LAYERS = 4
DENSITY = 0.2
SAMPLE_S = 0.05
COMPARED = 5_000_000  # the attention's matrices and the norms; an exact merge of the embeddings takes minutes


def describe_shape(layers: int, width: int, vocabulary: int) -> dict[str, Any]:
    """Return the tensors' shapes, in LLaMA's proportions."""
    return {
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
    }


def make_checkpoints(folder: Path, shape: dict[str, Any]) -> None:
    """Write base, a and b: random, a and b a tenth of the base's spread away; one shard in memory at a time."""
    for name in ("base", "a", "b"):
        place = folder / name
        transformers.LlamaConfig(**shape).save_pretrained(place)
        shapes = {key: tuple(tensor.shape) for key, tensor in make_empty(place).state_dict().items()}
        files = {key: _find_file(key) for key in shapes}
        for file in sorted(set(files.values())):
            tensors = {}
            for key in (one for one, where in files.items() if where == file):
                value = _draw("base", key, shapes[key]).mul_(0.02)
                if name != "base":
                    value += _draw(name, key, shapes[key]).mul_(0.002)
                tensors[key] = value.to(torch.bfloat16)
            save_file(tensors, place / file, metadata={"format": "pt"})
        (place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _find_file(key: str) -> str:
    parts = key.split(".")
    return f"layers-{int(parts[2]) // SHARD_LAYERS}.safetensors" if ".layers." in key else "rest.safetensors"


def _draw(model: str, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(f"{model} {key}".encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(command: list[str]) -> dict[str, float]:
    """Run a command to its end; returns its time and memory."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begun = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    anonymous, finished = [0], threading.Event()

    def sample() -> None:
        while not finished.wait(SAMPLE_S):
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            anonymous[0] = max(anonymous[0], *(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon")), 0)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    if process.stdout is None:
        raise AssertionError
    said = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - begun
    finished.set()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed:\n{said}")
    return {
        "wall_seconds": wall,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "peak_anonymous_bytes": anonymous[0],
    }


def write_requests(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Write the same merges as files for both tools: method → (ours, mergekit's)."""
    found = {}
    for method in ("average", "ties"):
        ours, theirs = folder / f"{method}.toml", folder / f"{method}.yml"
        is_ties = method == "ties"
        extra = f"density = {DENSITY}\n" if is_ties else ""
        base = 'base = "base"\n' if is_ties else ""
        ours.write_text(f'models = ["a", "b"]\n{base}[merge]\nmethod = "{method}"\n{extra}')
        parameters = {"weight": 1.0, **({"density": DENSITY} if is_ties else {})}
        asked: dict[str, Any] = {
            "merge_method": "ties" if is_ties else "linear",
            "models": [{"model": str(folder / name), "parameters": parameters} for name in ("a", "b")],
            "dtype": "bfloat16",
        }
        if is_ties:
            asked |= {"base_model": str(folder / "base"), "parameters": {"normalize": True}}
        theirs.write_text(json.dumps(asked))
        found[method] = (ours, theirs)
    return found


def compare(folder: Path, method: str) -> dict[str, Any]:
    """Compare the two results with each other and with the merge in float64; tensors of up to COMPARED elements."""
    names = ("base", "a", "b", "ours", "theirs")
    models = {name: open_model(folder / name, None, Steps(quiet=True)).tensors for name in names}
    differing = elements = 0
    largest = {"between": 0.0, "ours": 0.0, "theirs": 0.0}
    for key in (key for key, one in models["ours"].items() if prod(one.shape) <= COMPARED):
        ours, theirs = models["ours"][key].read(), models["theirs"][key].read()
        differing += int((ours != theirs).sum())
        elements += ours.numel()
        exact = _merge_exactly(method, *(models[name][key].read().double() for name in ("base", "a", "b")))
        for name, (left, right) in {
            "between": (ours, theirs.double()),
            "ours": (ours, exact),
            "theirs": (theirs, exact),
        }.items():
            largest[name] = max(largest[name], float((left.double() - right).abs().max()))
    return {
        "elements": elements,
        "differing_share": differing / elements,
        "largest_difference": largest["between"],
        "ours_from_float64": largest["ours"],
        "mergekit_from_float64": largest["theirs"],
    }


def _merge_exactly(method: str, base: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Merge by average and TIES in a plain float64 reference; equal magnitudes at the threshold are all kept."""
    if method == "average":
        return (a + b) / 2
    changes = []
    for model in (a, b):
        change = model - base
        kept = max(1, int(DENSITY * change.numel()))
        edge = change.abs().flatten().kthvalue(change.numel() - kept + 1).values
        changes.append(torch.where(change.abs() >= edge, change, 0))
    sign = (changes[0] + changes[1]).sign()
    agreeing = [(change * sign > 0).double() for change in changes]
    total = changes[0] * agreeing[0] + changes[1] * agreeing[1]
    return base + total / (agreeing[0] + agreeing[1]).clamp_min(1)


def hash_folder(folder: Path) -> str:
    """Return a hash of every tensor's bits."""
    state = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                state.update(key.encode() + file.get_tensor(key).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return median, minimum and maximum of every figure, by method and tool."""
    found: dict[str, Any] = {}
    for method, tool in sorted({(row["method"], row["tool"]) for row in rows}):
        mine = [row for row in rows if (row["method"], row["tool"]) == (method, tool)]
        found[f"{method} {tool}"] = {
            key: {
                "median": statistics.median(row[key] for row in mine),
                "least": min(row[key] for row in mine),
                "most": max(row[key] for row in mine),
            }
            for key in ("wall_seconds", "cpu_seconds", "peak_bytes", "peak_anonymous_bytes")
        }
    return found


def main() -> None:
    """Make the checkpoints, merge in turns, compare, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", type=Path, required=True, help="the mergekit-yaml of an environment of its own")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where some 7 GB may lie for a while; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path("merge_beside_mergekit.json"))
    given = parser.parse_args()
    shape = describe_shape(given.layers, given.width, given.vocabulary)
    version = subprocess.run(
        [given.mergekit.with_name("pip"), "list", "--format=json"], capture_output=True, text=True, check=True
    )
    theirs = {row["name"]: row["version"] for row in json.loads(version.stdout)}
    load_before, rows, comparisons, hashes = os.getloadavg(), list[dict[str, Any]](), dict[str, Any](), set[str]()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        make_checkpoints(folder, shape)
        size_bytes = sum(path.stat().st_size for path in (folder / "a").glob("*.safetensors"))
        for method, (ours, asked) in write_requests(folder).items():
            for repeat in range(given.repeats):
                commands = {
                    "rankship": [*OURS, "merge", str(ours), "--to", f"{folder}/ours"],
                    "mergekit": [
                        *(str(given.mergekit), str(asked), f"{folder}/theirs", "--no-copy-tokenizer"),
                        *("--no-write-model-card", "--num-threads=1"),
                    ],
                }
                for tool in sorted(commands, reverse=repeat % 2 == 0):
                    shutil.rmtree(folder / ("ours" if tool == "rankship" else "theirs"), ignore_errors=True)
                    row = {"method": method, "tool": tool, "repeat": repeat, **run(commands[tool])}
                    rows.append(row)
                    sys.stdout.write(json.dumps(row) + "\n")
                    sys.stdout.flush()
                hashes.add(f"{method} {hash_folder(folder / 'ours')}")
            comparisons[method] = compare(folder, method)
    report = {
        "shape": {**shape, "models": 2},
        "checkpoint_bytes": size_bytes,
        "conditions": {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": 1,
            "load_average_before": load_before,
            "load_average_after": os.getloadavg(),
            "python": platform.python_version(),
            "rankship": list_versions(),
            "mergekit": {key: theirs.get(key) for key in ("mergekit", "torch", "safetensors", "transformers")},
            "files": "in the page cache; shared machine, so compare CPU seconds and memory before wall seconds",
        },
        "runs": rows,
        "summary": summarise(rows),
        "results": comparisons,
        "ours_bit_identical": len(hashes) == len(comparisons),
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    given.out.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
