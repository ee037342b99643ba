"""Chat messages and their identity.

The id of a message list is a hash chain: each link commits to the canonical form of one message and to the
id of everything before it. Two conversations that begin alike share the ids of their common beginning, so a
store keeps each message of a shared history once. Every id starts with the version of the canonical form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerwell.data.errors import InputError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
ID_VERSION = "m1"


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. ``extra`` holds any further keys (tool calls, a name) as canonical JSON."""

    role: str
    content: str
    extra: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The form that chat templates and JSON files take."""
        return {"role": self.role, "content": self.content, **(json.loads(self.extra) if self.extra else {})}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], *, file: Any = None, row: int | None = None) -> Message:
        """Read ``{"role": …, "content": …}``; raises :class:`InputError` for an unknown role or no text."""
        if not isinstance(value, Mapping) or "role" not in value:
            raise InputError(
                f"a message must be an object with 'role' and 'content', got {str(value)[:60]!r}",
                file=file,
                row=row,
                mend='Write {"role": "user", "content": "…"}.',
            )
        role, content = value["role"], value.get("content")
        if role not in ROLES:
            raise InputError(f"unknown role {role!r}", file=file, row=row, mend=nearest(str(role), ROLES))
        rest = {k: v for k, v in value.items() if k not in ("role", "content") and v is not None}
        if content is None and rest.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise InputError(
                f"the content of a {role} message must be text, got {type(content).__name__}",
                file=file,
                row=row,
                mend="Give a string.",
            )
        return cls(role, content, canonical(rest) if rest else "")


Messages = tuple[Message, ...]


def canonical(value: Any) -> str:
    """The one JSON spelling of a value: sorted keys, no spaces, Unicode kept."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest(*parts: Any) -> str:
    """A 24-digit hexadecimal content hash of JSON-like parts."""
    return hashlib.blake2b(canonical(parts).encode(), digest_size=12).hexdigest()


def chain(messages: Iterable[Message], parent: str = "") -> list[str]:
    """The ids along a message list, one per message; the last one names the whole conversation."""
    ids: list[str] = []
    for message in messages:
        parent = f"{ID_VERSION}-" + digest(parent, message.role, message.content, message.extra)
        ids.append(parent)
    return ids


def conversation_id(messages: Sequence[Message], parent: str = "") -> str:
    """The id of a conversation (the last link of its :func:`chain`); ``parent`` itself when it is empty."""
    ids = chain(messages, parent)
    return ids[-1] if ids else parent


def as_messages(value: str | Sequence[Message | Mapping[str, Any]]) -> Messages:
    """A prompt in any form users write it: a string is one user message; dictionaries become messages."""
    if isinstance(value, str):
        return (Message("user", value),)
    return tuple(m if isinstance(m, Message) else Message.from_dict(m) for m in value)


def text(messages: Iterable[Message]) -> str:
    """The words of a message list, for people and for judges that read plain text."""
    return "\n\n".join(m.content for m in messages)


__all__ = [
    "ROLES",
    "Message",
    "Messages",
    "as_messages",
    "canonical",
    "chain",
    "conversation_id",
    "digest",
    "text",
]
