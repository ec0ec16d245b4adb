"""The decorator of every record: frozen, keyword-only, and strict in its JSON form (see codec.py)."""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass whose JSON form refuses unknown keys and loose types."""
    cls.__pydantic_config__ = {"extra": "forbid", "strict": True}  # type: ignore[attr-defined]  # read by codec
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)
