import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from rankship_pipeline.evaluate.zero_shot import Reading, Scorer, evaluate_tasks, make_lm
from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.models.huggingface import ByPosition
from rankship_pipeline.models.source import load_function

pytestmark = pytest.mark.filterwarnings("ignore:::(lm_eval|datasets|evaluate|multiprocess|dill|sacrebleu)(\\..*)?")

TASKS = Path(__file__).parents[4] / "benchmarks/studies/tasks"
WORDS = ["the", "cat", "dog", "sat", "ran", "home", "mat", "big", "red", "and", "was", "on", "a", "hat", "sun", "."]
UNKNOWN = "<unk>"
BOS = 1
LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([UNKNOWN, "<s>", *WORDS])}, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.enable_truncation(3)  # files come so; texts must not be cut
    made.enable_padding(length=30)
    return made


@pytest.fixture(scope="module")
def model() -> ByPosition:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    made = transformers.LlamaForCausalLM(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return ByPosition(made, ("input_ids",)).eval()


def make_reading(*, prefixed: bool = True, batch: int = 2, length: int = LENGTH) -> Reading:
    return Reading(length_tokens=length, prefix_token=BOS, always_prefixed=prefixed, batch=batch)


def ask(*texts: str) -> SimpleNamespace:
    return SimpleNamespace(args=texts, task_name="asked")


def to_ids(text: str) -> list[int]:
    return [2 + WORDS.index(word) for word in text.replace(".", " .").split()]


@torch.inference_mode()
def compute(model: nn.Module, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One token after another, each behind all that the model may see."""
    tokens, nats, greedy = (context + continuation)[-(LENGTH + 1) :], 0.0, True
    for place in range(len(tokens) - len(continuation), len(tokens)):
        logits = model(torch.tensor([tokens[:place]]))[0, -1].double()
        nats += float(logits[tokens[place]] - logits.logsumexp(0))
        greedy = greedy and int(logits.argmax()) == tokens[place]
    return nats, greedy


PAIRS = [
    ("the cat", " sat on a mat ."),
    ("the big red dog ran home and", " sat"),
    ("the dog ", "ran"),
    ("", "the sun was red"),
    ("the cat sat on the mat . " * 4, " the dog ran home"),  # longer than the model sees
]


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_log_likelihoods_are_those_of_direct_computation(
    model: ByPosition,
    tokenizer: Tokenizer,
    prefixed: bool,  # noqa: FBT001
    batch: int,
) -> None:
    lm = make_lm(model, tokenizer, make_reading(prefixed=prefixed, batch=batch))
    for (context, continuation), (nats, greedy) in zip(
        PAIRS, lm.loglikelihood([ask(*pair) for pair in PAIRS]), strict=True
    ):
        prefix = [BOS] if prefixed or not context else []
        expected = compute(model, prefix + to_ids(context), to_ids(continuation))
        assert nats == pytest.approx(expected[0], rel=1e-5)
        assert greedy == expected[1]


def test_greedy_is_what_the_model_would_write(model: ByPosition, tokenizer: Tokenizer) -> None:
    with torch.inference_mode():
        best = int(model(torch.tensor([[BOS, *to_ids("the cat")]]))[0, -1].argmax())
    lm = make_lm(model, tokenizer, make_reading())
    answers = lm.loglikelihood([ask("the cat", f" {word}") for word in WORDS])
    assert [greedy for _, greedy in answers] == [2 + i == best for i in range(len(WORDS))]


@pytest.mark.parametrize("words", [0, 1, 23, 24, 25, 60])
def test_rolling_scores_every_token_of_a_text_once(model: ByPosition, tokenizer: Tokenizer, words: int) -> None:
    ids = torch.randint(2, len(WORDS) + 2, (words,), generator=torch.Generator().manual_seed(words)).tolist()
    lm = make_lm(model, tokenizer, make_reading())
    (found,) = lm.loglikelihood_rolling([ask(" ".join(WORDS[i - 2] for i in ids))])
    expected, tokens = 0.0, [BOS, *ids]
    for place in range(1, len(tokens)):
        last = min(-(-place // LENGTH) * LENGTH, len(ids))  # the last token scored in this token's window
        expected += compute(model, tokens[max(0, last - LENGTH) : place], [tokens[place]])[0]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_pair_is_split_as_the_harness_splits_it(tokenizer: Tokenizer) -> None:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped, unused-ignore]

    free = Tokenizer.from_str(tokenizer.to_str())
    free.no_truncation()
    free.no_padding()
    scorer = Scorer(nn.Identity(), free, make_reading(prefixed=False))
    stub = SimpleNamespace(backend="causal", tok_encode=scorer.encode)
    for context, continuation in PAIRS:
        if context:
            assert scorer.split(context, continuation) == TemplateLM._encode_pair(stub, context, continuation)


def test_a_continuation_longer_than_the_model_sees_is_refused(model: ByPosition, tokenizer: Tokenizer) -> None:
    lm = make_lm(model, tokenizer, make_reading(length=4))
    with pytest.raises(InputError, match="5 tokens, the model takes 1 to 4"):
        lm.loglikelihood([ask("the", " cat sat on a mat")])


class Knowing(nn.Module):
    """Gives "mat" much the most probability, whatever came before."""

    def forward(self, ids: Tensor) -> Tensor:
        return 20.0 * nn.functional.one_hot(torch.full_like(ids, 2 + WORDS.index("mat")), len(WORDS) + 2).float()


def write_folder(folder: Path) -> None:
    """Two tasks of four documents: a choice of which Knowing gets three right, and a last word of which it gets two."""
    choices = [
        {"story": "the cat sat on a", "endings": ["mat", "dog", "sun", "hat"], "answer": i // 3} for i in range(4)
    ]
    last = [{"story": "the cat sat on a", "word": word} for word in ("mat", "dog", "mat", "sun")]
    for name, documents in (("story_endings", choices), ("story_words", last)):
        (folder / f"{name}.yaml").write_text((TASKS / f"{name}.yaml").read_text())
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    tried: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        tried.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


def test_local_tasks_run_without_a_network(tmp_path: Path, tokenizer: Tokenizer, no_network: list[object]) -> None:
    write_folder(tmp_path)
    before = dict(os.environ), Path.cwd(), torch.random.get_rng_state()
    found = evaluate_tasks(Knowing(), tokenizer, ["story_endings", "story_words"], tmp_path, reading=make_reading())
    scores = {(one.task, one.metric): one for one in found}
    assert no_network == []
    assert (dict(os.environ), Path.cwd()) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert {path.suffix for path in tmp_path.rglob("*")} == {".yaml", ".jsonl"}
    right = scores["story_endings", "acc"]
    assert (right.value, right.documents, right.version) == (0.75, 4, "1.0")
    assert right.values == (1, 1, 1, 0)
    assert right.stderr == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert scores["story_words", "acc"].values == (1, 0, 1, 0)
    assert scores["story_words", "perplexity"].value == pytest.approx(torch.tensor(10.0).exp().item(), rel=1e-3)
    assert scores["story_words", "perplexity"].stderr is not None


def test_the_limit_takes_the_first_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_folder(tmp_path)
    found = evaluate_tasks(Knowing(), tokenizer, ["story_words"], tmp_path, 3, reading=make_reading())
    assert {one.documents for one in found} == {3}
    with pytest.raises(InputError, match="limit is 0"):
        evaluate_tasks(Knowing(), tokenizer, ["story_words"], tmp_path, 0, reading=make_reading())


def test_a_transformers_tokenizer_gives_the_same(tmp_path: Path, tokenizer: Tokenizer, model: ByPosition) -> None:
    write_folder(tmp_path)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    first, second = (
        evaluate_tasks(model, one, ["story_words"], tmp_path, reading=make_reading()) for one in (tokenizer, wrapped)
    )
    assert first == second


def test_an_unknown_task_is_an_input_error_that_lists_the_known(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_folder(tmp_path)
    for tasks, said in ((["story_endings", "lambada"], "no task lambada in"), ([], "no task is named")):
        with pytest.raises(InputError, match=said) as caught:
            evaluate_tasks(Knowing(), tokenizer, tasks, tmp_path, reading=make_reading())
        assert "story_endings, story_words" in caught.value.hint


@pytest.mark.parametrize("broken", [None, '{"story": '])
def test_data_that_cannot_be_read_is_an_input_error(tmp_path: Path, tokenizer: Tokenizer, broken: str | None) -> None:
    write_folder(tmp_path)
    data = tmp_path / "story_words.jsonl"
    data.unlink() if broken is None else data.write_text(broken)
    with pytest.raises(InputError, match="the data of story_words cannot be read"):
        evaluate_tasks(Knowing(), tokenizer, ["story_words"], tmp_path, reading=make_reading())


def test_a_data_set_of_the_hub_is_refused_without_asking_for_it(
    tmp_path: Path, tokenizer: Tokenizer, no_network: list[object]
) -> None:
    write_folder(tmp_path)
    path = tmp_path / "story_words.yaml"
    path.write_text(path.read_text().replace("dataset_path: json", "dataset_path: nobody/nothing"))
    with pytest.raises(InputError, match="the data of story_words cannot be read"):
        evaluate_tasks(Knowing(), tokenizer, ["story_words"], tmp_path, reading=make_reading())
    assert no_network == []


def test_generation_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_folder(tmp_path)
    path = tmp_path / "story_words.yaml"
    kept = (
        path.read_text()
        .partition("metric_list")[0]
        .replace("output_type: loglikelihood", "output_type: generate_until")
    )
    path.write_text(kept + "metric_list:\n  - metric: exact_match\ngeneration_kwargs: {until: ['.']}\n")
    with pytest.raises(InputError, match="story_words: generation is not supported"):
        evaluate_tasks(Knowing(), tokenizer, ["story_words"], tmp_path, reading=make_reading())


def test_a_missing_harness_is_an_input_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(InputError, match="lm-evaluation-harness") as caught:
        evaluate_tasks(Knowing(), tokenizer, ["story_words"], tmp_path, reading=make_reading())
    assert caught.value.hint == "pip install 'rankship[harness]'"


STORIES = [
    f"The {a} cat sat on a mat.\nIt was a {a} day. Then the cat {b} home to the {a} mat."
    for a, b in zip(("big", "red", "old", "new", "wet"), ("ran", "went", "came", "got", "flew"), strict=True)
]


def test_story_tasks_are_the_same_every_time_and_hold_their_truth(tmp_path: Path) -> None:
    source = tmp_path / "stories.txt"
    source.write_text("\n<|endoftext|>\n".join([*STORIES, "Too short.", ""]))
    write_tasks = load_function("stories.py:write_tasks", TASKS)
    for folder in ("one", "two"):
        write_tasks(source, tmp_path / folder, seed=3)
    read = {path.name: path.read_text() for path in (tmp_path / "one").iterdir()}
    assert read == {path.name: path.read_text() for path in (tmp_path / "two").iterdir()}
    assert read.keys() == {f"story_{kind}.{suffix}" for kind in ("endings", "words") for suffix in ("yaml", "jsonl")}
    last = [json.loads(line) for line in read["story_words.jsonl"].splitlines()]
    assert [f"{one['story']} {one['word']}." for one in last] == STORIES


def test_wrong_endings_are_three_others_and_the_range_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "stories.txt"
    source.write_text("<|endoftext|>".join(STORIES))
    write_tasks = load_function("stories.py:write_tasks", TASKS)
    write_tasks(source, tmp_path, first=1)
    documents = [json.loads(line) for line in (tmp_path / "story_endings.jsonl").read_text().splitlines()]
    assert [one["number"] for one in documents] == [1, 2, 3, 4]
    for one in documents:
        assert len(set(one["endings"])) == 4
        assert f"{one['story']} {one['endings'][one['answer']]}" == STORIES[one["number"]]
    for stop, file in ((2, source), (None, tmp_path / "none.txt")):
        with pytest.raises(InputError):
            write_tasks(file, tmp_path, stop=stop)
