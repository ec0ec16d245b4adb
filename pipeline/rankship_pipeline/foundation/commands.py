"""Shows commands that a user copies into a shell: a name with a blank stays one word."""

import shlex
from collections.abc import Iterable


def show_command(*words: object) -> str:
    """Return a command in backquotes, every word quoted for the shell where it needs to be."""
    return f"`{quote_words(words)}`"


def quote_words(words: Iterable[object]) -> str:
    """Return words as a shell reads them back."""
    return shlex.join(map(str, words))
