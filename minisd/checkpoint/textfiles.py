"""Small files, read with one clear error and written whole or not at all. This file needs the standard library only."""

import json
import os
from pathlib import Path
from typing import Any

from minisd.checkpoint.errors import CheckpointError


def read_text(path: Path) -> str:
    """The file's text. Raises CheckpointError where it is missing, unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def read_json(path: Path) -> Any:
    """The file's JSON value. Raises CheckpointError where it is not JSON."""
    try:
        return json.loads(read_text(path))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise CheckpointError(f"{path}: is not JSON ({error})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The file's JSON object. Raises CheckpointError where it is anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, then rename it: nobody ever finds half of it."""
    temporary = path.with_name(f".{path.stem[:40]}-{os.getpid()}.tmp")  # short: names are limited to 255 bytes
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
