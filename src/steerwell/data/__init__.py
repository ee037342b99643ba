"""Ground floor: messages, nouns, the store, formats, resolve, quality. Imports no torch and no other room."""

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, Messages, as_messages
from steerwell.data.types import Annotation, Completion, CompletionGroup, Pair, Prompt, Source

__all__ = [
    "Annotation",
    "Completion",
    "CompletionGroup",
    "InputError",
    "Message",
    "Messages",
    "Pair",
    "Prompt",
    "Source",
    "as_messages",
]
