"""A language model of seconds whose head has its embedding's weight."""

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH = 96, 24


class Speaker(nn.Module):
    """Tokens (samples, positions) to the next one's scores; the head has a bias, which the model holds too."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, vocabulary)
        self.words = nn.Embedding(vocabulary, WIDTH)
        self.words.weight = self.head.weight
        self.bias = self.head.bias
        self.body = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to scores (samples, positions, vocabulary)."""
        x = self.words(tokens)
        scores: Tensor = self.head(x + self.body(x))
        return scores


def make_speaker(vocabulary: int = VOCABULARY) -> Speaker:
    """An untrained one with small random weights."""
    torch.manual_seed(0)
    speaker = Speaker(vocabulary).eval()
    nn.init.normal_(speaker.words.weight, std=0.5)
    return speaker


def speak(samples: int, length: int = 12, seed: int = 0) -> Tensor:
    """Sentences (samples, length) in which a token's number modulo 8 says which twelve tokens may follow."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (samples, length), generator=generator)
    for place in range(1, length):
        follows = 3 * (tokens[:, place - 1] % 8) % 8
        tokens[:, place] = follows + 8 * torch.randint(VOCABULARY // 8, (samples,), generator=generator)
    return tokens


def train(model: nn.Module, seed: int) -> None:
    """Learn the sentences, in a second."""
    torch.manual_seed(seed)
    tokens, optimiser = speak(256), torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimiser.zero_grad()
        scores = model(tokens[:, :-1])
        functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        optimiser.step()


def load() -> dict[str, object]:
    """A loader's data for a recipe of one model, `a`."""
    unseen = speak(64, seed=2)
    return {"calibration": {"a": speak(64, seed=1)}, "test_inputs": unseen[:, :-1], "test_labels": unseen[:, 1:]}
