"""Two LLaMAs that tell small stories: 260 thousand parameters as published, 2.6 million trained here.

Both read the 512 tokens of stories260k. Stories lie under the folder RANKSHIP_DATA: the first 150 are the test, the
last 58 are held out for choosing the recipe, the 950 between are for training and calibration.
"""

import os
from functools import cache
from typing import TYPE_CHECKING

import torch
from evaluation_data import find_data
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.huggingface import ByPosition

if TYPE_CHECKING:
    import transformers

VOCABULARY = 512
WIDTH = 256  # tokens of one sample
CALIBRATION_STORIES = 128  # unlabelled, chosen by the seed
TEST_STORIES = 150
HELD_OUT_STORIES = 58
NOT_COUNTED = -100
STEPS = 900
BATCH_STORIES = 16
STEP_SIZE = 2e-3
WEIGHT_DECAY = 0.5
WHOLE_SHARE = 0.5  # of the training samples begin with their story
CORRUPTED_SHARE = 0.1  # of the training inputs are random tokens: 950 stories are few


def stories260k() -> nn.Module:
    """The untrained small model: 5 layers of width 64, the head tied to the embedding."""
    import transformers

    config = transformers.LlamaConfig.from_pretrained(
        find_data("stories260k/config.json").parent, attn_implementation="sdpa"
    )
    model = _make(config)
    if model.get_submodule("model.lm_head").weight is not model.get_submodule("model.model.embed_tokens").weight:
        raise InputError("stories260k: its head is not tied to its embedding", hint="restore stories260k/config.json")
    return model


def stories2m() -> nn.Module:
    """The untrained larger model: 6 layers of width 192, 6 heads on 2 pairs of keys and values, its own head."""
    import transformers

    return _make(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )


def train_stories260k(module: nn.Module, _seed: int) -> None:
    """Load the published weights in place; nothing is random."""
    state = load_file(find_data("stories260k/model.safetensors"))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    module.get_submodule("model").load_state_dict(state)


def train_stories2m(module: nn.Module, seed: int) -> None:
    """Train from scratch with AdamW on a cosine, six minutes on two cores: perplexity 6.78 (seed 0).

    Half of the samples begin with their story, as the test does; the others anywhere in it. Products are bfloat16,
    weights float32.
    """
    torch.manual_seed(seed)
    module.load_state_dict(stories2m().state_dict())  # initial weights of this seed
    stories = _read_stories()[TEST_STORIES:-HELD_OUT_STORIES]
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    scales = [parameter for parameter in module.parameters() if parameter.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": scales, "weight_decay": 0.0}],
        lr=STEP_SIZE,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, STEP_SIZE, total_steps=STEPS, pct_start=0.05)
    module.train()
    for _ in range(STEPS):
        chosen = torch.randint(len(stories), (BATCH_STORIES,)).tolist()
        inputs, labels = _window([_crop(stories[position]) for position in chosen])
        corrupted = torch.rand(inputs.shape) < CORRUPTED_SHARE
        inputs = torch.where(corrupted, torch.randint_like(inputs, VOCABULARY), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            logits = module(inputs).flatten(0, 1)
        loss = functional.cross_entropy(logits.float(), labels.flatten(), ignore_index=NOT_COUNTED)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    module.eval()


def load_stories260k(seed: int = 0) -> dict[str, object]:
    """Calibration tokens of stories260k by seed, and the test stories with next-token labels."""
    return _load("stories260k", seed)


def load_stories2m(seed: int = 0) -> dict[str, object]:
    """Calibration tokens of stories2m by seed, and the test stories with next-token labels."""
    return _load("stories2m", seed)


def load_held_out() -> tuple[Tensor, Tensor]:
    """Inputs and labels (58, 256) of the stories that are neither trained on nor tested."""
    return _window(_read_stories()[-HELD_OUT_STORIES:])


def _make(config: "transformers.LlamaConfig") -> nn.Module:
    import transformers

    model = transformers.LlamaForCausalLM(config).to(torch.float32)
    return ByPosition(model, ("input_ids",)).eval()


def _load(name: str, seed: int) -> dict[str, object]:
    stories = _read_stories()
    full = [story for story in stories[TEST_STORIES:-HELD_OUT_STORIES] if len(story) >= WIDTH]
    chosen = torch.randperm(len(full), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_STORIES]
    inputs, labels = _window(stories[:TEST_STORIES])
    return {
        "calibration": {name: torch.tensor([full[position][:WIDTH] for position in chosen.tolist()])},
        "test_inputs": inputs,
        "test_labels": labels,
    }


def _window(stories: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The first tokens as inputs and their successors as labels, each int64 (stories, 256).

    Behind a story's end inputs are 0 and labels are not counted: attention is causal, so nothing counted sees them.
    """
    inputs = torch.zeros(len(stories), WIDTH, dtype=torch.int64)
    labels = torch.full_like(inputs, NOT_COUNTED)
    for row, story in enumerate(stories):
        tokens = torch.tensor(story[: WIDTH + 1])
        inputs[row, : len(tokens[:WIDTH])] = tokens[:WIDTH]
        labels[row, : len(tokens) - 1] = tokens[1:]
    return inputs, labels


def _crop(story: list[int]) -> list[int]:
    last = max(0, len(story) - WIDTH - 1)
    whole, start = torch.rand(2).tolist()
    return story if whole < WHOLE_SHARE else story[int(start * (last + 1)) :]


@cache
def _read_stories() -> tuple[list[int], ...]:
    """Every story's tokens, in the file's order, without a token that marks the beginning."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(os.fspath(find_data("stories260k/tokenizer.json")))
    text = find_data("tinystories/stories.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")]
    return tuple(encoded.ids for encoded in tokenizer.encode_batch([story for story in stories if story]))
