"""Token ids and log-probabilities as compact bytes, exact in both directions.

The first byte names the item type, the rest is little-endian: token ids take 1, 2, 4 or 8 bytes each,
whichever holds the largest; log-probabilities take 4 bytes each when every value is a float32, else 8.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from steerwell.data.errors import InputError

_INTEGERS = (("B", 1 << 8), ("H", 1 << 16), ("I", 1 << 32))  # item type, first value too large for it


def _to_bytes(items: array) -> bytes:
    if sys.byteorder == "big":
        items.byteswap()
    return items.typecode.encode() + items.tobytes()


def pack_ints(values: Sequence[int]) -> bytes:
    """Token ids as bytes. Raises :class:`InputError` for a negative or non-integer id."""
    try:
        largest, smallest = max(values, default=0), min(values, default=0)
        code = next((code for code, bound in _INTEGERS if largest < bound), "Q")
        if smallest >= 0:
            return _to_bytes(array(code, values))
    except (TypeError, OverflowError):
        pass
    raise InputError(
        f"token ids must be whole numbers from 0 on, got {list(values)[:8]!r}", mend="Mend them."
    )


def pack_floats(values: Sequence[float]) -> bytes:
    """Log-probabilities as bytes, exact."""
    exact = array("d", values)
    try:
        short = array("f", values)
    except OverflowError:
        short = array("f")
    return _to_bytes(short if array("d", short) == exact else exact)


def unpack(data: bytes) -> tuple:
    """What :func:`pack_ints` or :func:`pack_floats` packed."""
    items = array(chr(data[0]))
    items.frombytes(data[1:])
    if sys.byteorder == "big":
        items.byteswap()
    return tuple(items)


__all__ = ["pack_floats", "pack_ints", "unpack"]
