"""Which split a conversation is in: a pure function of how it begins, so that none straddles two."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from steerwell.data.messages import Messages, conversation_id

DEFAULT_SPLIT = {"train": 0.9, "test": 0.1}


def split_root(messages: Messages) -> str:
    """What a split goes by: the id of the conversation's beginning, up to its first user message."""
    first = next((i for i, m in enumerate(messages) if m.role == "user"), len(messages) - 1)
    return conversation_id(messages[: first + 1])


def split_of(root: str, fractions: Mapping[str, float], seed: int = 0) -> str:
    """The split of a root: a pure function of its text, the fractions (in their order) and the seed."""
    place = int.from_bytes(hashlib.blake2b(f"{seed}:{root}".encode(), digest_size=8).digest()) / 2.0**64
    total, names = 0.0, list(fractions)
    for name in names:
        total += fractions[name]
        if place < total:
            return name
    return names[-1]


__all__ = ["DEFAULT_SPLIT", "split_of", "split_root"]
