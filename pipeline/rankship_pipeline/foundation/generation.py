"""How a file that generates text is called, and the texts that it is proven on."""

from rankship_pipeline.foundation.frozen import record

# What lies beside a file that generates, for the programs that run it: where a format wants it.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
COMPANIONS = (*TOKENIZER, "genai_config.json", "model.litertlm")
_STEPS = 32  # tokens after the prompt of a proof
_BEGINNING = 8  # tokens of the proof that begins with a single one


@record
class ProofText:
    """A text of a proof: of its `tokens`, the first `prompt_tokens` are given at once, the others one at a time."""

    title: str
    tokens: int
    prompt_tokens: int


@record
class Generation:
    """How a file that holds a decoder with a cache of keys and values is called: one sequence, its tokens in order.

    `context` is the most tokens of a sequence, prompt included; `vocabulary` the number of logits. `begin` is the token
    that starts a text (None: the model has none), `ends` are those that end one. `prompt_tokens` are those that a proof
    gives at once.
    """

    context: int
    vocabulary: int
    begin: int | None
    ends: tuple[int, ...]
    prompt_tokens: int

    @property
    def proofs(self) -> tuple[ProofText, ...]:
        """The texts of its proof: a prompt and some tokens; from a single token on; and to the cache's last place."""
        prompt = self.prompt_tokens
        return (
            ProofText(title="", tokens=min(prompt + _STEPS, self.context), prompt_tokens=prompt),
            ProofText(title="a prompt of 1", tokens=min(_BEGINNING, self.context), prompt_tokens=1),
            ProofText(title=f"a context of {self.context}", tokens=self.context, prompt_tokens=self.context - 1),
        )
