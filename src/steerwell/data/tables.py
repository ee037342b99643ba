"""Rows of a published data file: JSON (one array), JSONL, either of them in gzip, or Parquet.

The kind is known by the first bytes, not by the name. Parquet needs pyarrow, which is an extra:
``pip install 'steerwell[parquet]'``.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.gather import Row

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
MEND = "Write one JSON object a line (JSONL), or one array of objects."


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file, numbered from 1: the line of JSONL, the place in an array or a table.

    Raises :class:`InputError` that names the file (and the row) for a missing, empty or damaged file, for
    what is no JSON object, and for Parquet without pyarrow.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError("this is a folder", file=path, mend="Give one of the files in it.")
    try:
        data = path.read_bytes()
        if data[:2] == GZIP:
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise InputError("no such file", file=path, mend="Check the path.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"a damaged gzip file ({error})", file=path, mend="Fetch it again.") from None
    except OSError as error:
        raise InputError(f"can't be read ({error.strerror or error})", file=path) from None
    found = _parquet(path) if data[:4] == PARQUET else _json(data, path)
    rows = []
    for number, value in found:
        if not isinstance(value, Mapping):
            raise InputError(
                f"expected a JSON object, got {type(value).__name__}", file=path, row=number, mend=MEND
            )
        rows.append(Row(value, path, number))
    if not rows:
        raise InputError("the file is empty", file=path, mend=MEND)
    return rows


def _json(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError("not text in UTF-8", file=path, row=line, mend="Save the file as UTF-8.") from None
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON ({error})", file=path, mend=MEND) from None
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON ({error})", file=path, row=number, mend=MEND) from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            "a Parquet file, and pyarrow is not installed",
            file=path,
            mend="Install it: pip install 'steerwell[parquet]'. Or give the same rows as JSONL.",
        ) from None
    try:
        table = parquet.read_table(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise InputError(f"a damaged Parquet file ({error})", file=path, mend="Fetch it again.") from None
    yield from enumerate(table.to_pylist(), 1)


__all__ = ["read_rows"]
