"""A file that generates, with a cache and without an exporter: its logits are sums over all tokens so far."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from make.artifacts import DENSE, describe_file
from make.onnx_files import OPSET
from rankship_pipeline.foundation.artifact_key import ArtifactKey
from rankship_pipeline.foundation.codec import digest
from rankship_pipeline.foundation.generation import Generation
from rankship_pipeline.foundation.records import Artifact, TensorSpec
from rankship_pipeline.foundation.store import Store

VOCABULARY, WIDTH, CONTEXT, PROMPT = 11, 6, 24, 3
GENERATION = Generation(context=CONTEXT, vocabulary=VOCABULARY, begin=None, ends=(0,), prompt_tokens=PROMPT)
TOKENS: NDArray[np.int64] = np.random.default_rng(0).integers(1, VOCABULARY, (2, 8))
_EMBEDDING: NDArray[np.float32] = np.random.default_rng(1).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)


def compute_logits(tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits at every place (samples, n, vocabulary): each token's embedding counts by its place, from 1 on."""
    places = np.arange(1, tokens.shape[1] + 1, dtype=np.float32)[:, None]
    return np.cumsum(_EMBEDDING[tokens] * places, axis=1) @ _EMBEDDING.T


def continue_greedily(tokens: NDArray[np.int64], count: int) -> list[int]:
    """The likeliest `count` tokens after one sequence (1, n)."""
    found = list[int]()
    for _ in range(count):
        found.append(int(compute_logits(tokens)[0, -1].argmax()))
        tokens = np.concatenate([tokens, [[found[-1]]]], axis=1)
    return found


def save_decoder(path: Path, tokens: NDArray[np.int64] = TOKENS, *, skew: int = 0, name: str = "decoder") -> Path:
    """Write the decoder as ONNX, and in x.npy beside it `tokens`; with `skew` its places are off by that many."""
    floats, integers = TensorProto.FLOAT, TensorProto.INT64
    past: list[Any] = [1, 1, "past", WIDTH]
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["embedded"]),
        helper.make_node("Add", ["position_ids", "first"], ["counted"]),
        helper.make_node("Cast", ["counted"], ["places"], to=floats),
        helper.make_node("Unsqueeze", ["places", "last"], ["columns"]),
        helper.make_node("Mul", ["embedded", "columns"], ["weighted"]),
        helper.make_node("Unsqueeze", ["weighted", "one"], ["heads"]),
        helper.make_node("Concat", ["past_key_values.0.key", "heads"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "heads"], ["present.0.value"], axis=2),
        helper.make_node("Add", ["present.0.key", "present.0.value"], ["both"]),
        helper.make_node("CumSum", ["both", "two"], ["doubled"]),
        helper.make_node("Mul", ["doubled", "half"], ["sums"]),
        helper.make_node("Shape", ["input_ids"], ["given"], start=1, end=2),
        helper.make_node("Neg", ["given"], ["from"]),
        helper.make_node("Slice", ["sums", "from", "end", "axis"], ["new"]),
        helper.make_node("Squeeze", ["new", "one"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    constants: dict[str, Any] = {
        "embedding": _EMBEDDING,
        "head": np.ascontiguousarray(_EMBEDDING.T),
        "first": np.array(1 + skew),
        "last": np.array([-1]),
        "one": np.array([1]),
        "two": np.array(2),
        "half": np.array(0.5, np.float32),
        "end": np.array([np.iinfo(np.int64).max]),
        "axis": np.array([2]),
    }
    graph = helper.make_graph(
        nodes,
        name,
        [
            helper.make_tensor_value_info("input_ids", integers, [1, "n"]),
            helper.make_tensor_value_info("attention_mask", integers, [1, "past + n"]),
            helper.make_tensor_value_info("position_ids", integers, [1, "n"]),
            helper.make_tensor_value_info("past_key_values.0.key", floats, past),
            helper.make_tensor_value_info("past_key_values.0.value", floats, past),
        ],
        [
            helper.make_tensor_value_info("logits", floats, [1, "n", VOCABULARY]),
            helper.make_tensor_value_info("present.0.key", floats, [1, 1, "past + n", WIDTH]),
            helper.make_tensor_value_info("present.0.value", floats, [1, 1, "past + n", WIDTH]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", OPSET)]), path)
    np.save(path.with_name("x.npy"), tokens)
    return path


def describe_decoder(path: Path, key: ArtifactKey = DENSE, **changes: Any) -> Artifact:  # noqa: ANN401 - any field
    """The artifact that such a file is, proven on TOKENS."""
    length = TOKENS.shape[1]
    logits = TensorSpec(name="logits", shape=(1, length - PROMPT + 1, VOCABULARY), dtype="float32", classes_axis=2)
    return describe_file(
        path,
        key,
        inputs=(TensorSpec(name="input_ids", shape=(1, length), dtype="int64"),),
        outputs=(logits,),
        **{"generation": GENERATION, **changes},
    )


def store_decoder(store: Store, key: ArtifactKey = DENSE, generation: Generation = GENERATION) -> Artifact:
    """A decoder in a store, with its proofs."""

    def make(target: Path) -> None:
        save_decoder(target / "model.onnx", name=key.title)  # else all had the same bytes
        for text in generation.proofs:
            folder, tokens = target / text.title.replace(" ", "-"), np.resize(TOKENS, (2, text.tokens))
            folder.mkdir(exist_ok=True)
            np.save(folder / "input.0.npy", tokens)
            np.save(folder / "expected.0.npy", compute_logits(tokens)[:, text.prompt_tokens - 1 :])

    folder = store.produce("artifact", {"key": key.title, "generation": digest(generation)}, make).folder
    path = folder / "model.onnx"
    return describe_decoder(path, key, file=f"{folder.name}/{path.name}", generation=generation)
