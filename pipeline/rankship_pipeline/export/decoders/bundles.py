"""Writes what the runners of others want beside a file that generates: genai_config.json, and .litertlm bundles.

ExecuTorch's runner needs nothing but the tokenizer: what it asks is in the file.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from rankship_pipeline.export.decoders.cached import find_model, read_shape
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.formats import Format
from rankship_pipeline.foundation.generation import Generation

GENAI_CONFIG = "genai_config.json"
# transformers' name of a kind of model, and LiteRT-LM's, which runs any other as a generic one.
_LITERT_KINDS = {"qwen3": "qwen3", "qwen2": "qwen2p5", "gemma3_text": "gemma3"}


def write_bundle(
    module: nn.Module, format_: Format, path: Path, generation: Generation, tokenizer: Path | None = None
) -> Path | None:
    """Write what other runners want of a model in the file at `path` beside it; None where they want nothing.

    For ONNX that is onnxruntime-genai's configuration. For TFLite it is a bundle of the file and the tokenizer.json of
    the folder `tokenizer`, which LiteRT-LM runs; without such a file there is none.
    """
    if format_ == "onnx":
        return _write_genai_config(find_model(module), path, generation)
    source = None if tokenizer is None else tokenizer / "tokenizer.json"
    if format_ == "tflite" and source is not None and source.is_file():
        return _write_litertlm(find_model(module), path, generation, source)
    return None


def _write_genai_config(model: nn.Module, path: Path, generation: Generation) -> Path:
    config: Any = model.config
    shape = read_shape(model, generation)
    cache = {
        name: f"{start}.%d.{kind}"
        for start, side in (("past_key_values", "past"), ("present", "present"))
        for kind in ("key", "value")
        for name in (f"{side}_{kind}_names",)
    }
    pad = generation.ends[0] if config.pad_token_id is None and generation.ends else config.pad_token_id or 0
    content = {
        "model": {
            "type": "decoder",
            "bos_token_id": next(iter(generation.ends), 0) if generation.begin is None else generation.begin,
            "eos_token_id": list(generation.ends),
            "pad_token_id": pad,
            "context_length": generation.context,
            "vocab_size": generation.vocabulary,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": path.name,
                "head_size": shape.size,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": shape.layers,
                "num_key_value_heads": shape.heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    **{name: form for name, form in cache.items() if name.startswith("past")},
                },
                "outputs": {
                    "logits": "logits",
                    **{name: form for name, form in cache.items() if name.startswith("present")},
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": generation.context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
        },
    }
    target = path.with_name(GENAI_CONFIG)
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return target


def _write_litertlm(model: nn.Module, path: Path, generation: Generation, tokenizer: Path) -> Path:
    try:
        from litert_lm_builder import litertlm_builder
        from litert_lm_builder.runtime.proto import llm_metadata_pb2
    except ImportError as failure:
        raise InputError(
            f"cannot write a .litertlm bundle: {failure}", hint="pip install litert-lm-builder, or leave it out"
        ) from failure
    config: Any = model.config
    told: Any = llm_metadata_pb2.LlmMetadata()
    if generation.begin is not None:
        told.start_token.token_ids.ids.append(generation.begin)
    for end in generation.ends:
        told.stop_tokens.add().token_ids.ids.append(end)
    told.max_num_tokens = generation.context
    told.supports_thinking = told.supports_function_calling = False
    getattr(told.llm_model_type, _LITERT_KINDS.get(config.model_type, "generic_model")).SetInParent()
    target = path.with_suffix(".litertlm")
    builder: Any = litertlm_builder.LitertLmFileBuilder()
    made = litertlm_builder.Metadata(key="Authors", value="Rankship", dtype=litertlm_builder.DType.STRING)
    with tempfile.TemporaryDirectory() as folder:
        metadata = Path(folder) / "llm_metadata.pb"
        metadata.write_bytes(told.SerializeToString())
        builder.add_system_metadata(made)
        builder.add_llm_metadata(str(metadata))
        builder.add_hf_tokenizer(str(tokenizer))
        builder.add_tflite_model(str(path), litertlm_builder.TfLiteModelType.PREFILL_DECODE)
        with target.open("wb") as stream:
            builder.build(stream)
    return target
