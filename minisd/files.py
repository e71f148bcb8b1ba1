"""Small files: read within limits, written whole or not at all. The ground floor: this imports nothing of minisd.

Files come from the internet. What is opened must be a regular file, of a size that its role explains: a named pipe
would block, and a vocabulary of a terabyte would fill the memory. Text from a file is shown in one line, escaped and
shortened. This file needs the standard library only.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_JSON = 64 << 20  # bytes; CLIP's tokenizer.json, the largest of these files, has 4 MB
MAX_TEXT = 64 << 20


class CheckpointError(ValueError):
    """A file that cannot be used: the message names the file, the cause and the way out."""


def shown(text: object, most: int = 120) -> str:
    """Text from a file as it may be printed: one line, no control characters, at most about `most` characters."""
    text = str(text)
    head = text[:most]
    line = head if head.isprintable() else "".join(c if c.isprintable() else escaped(c) for c in head)
    return line if len(text) <= most else f"{line}... ({len(text):,} characters)"


def escaped(character: str) -> str:
    r"""A character that is not printed, as Python writes it: \n, \x1b, \ud800."""
    return character.encode("unicode_escape").decode("ascii")


def check_regular(path: Path, expected: str = "a file") -> int:
    """The size in bytes of a regular file.

    Raises FileNotFoundError where there is nothing, CheckpointError for a folder, a pipe or a device.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise CheckpointError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise CheckpointError(f"{path}: is {kind}, where {expected} was expected")
    return status.st_size


def read_text(path: Path, most: int = MAX_TEXT) -> str:
    """The text of a regular file of at most `most` bytes. Raises CheckpointError otherwise, and if it is not UTF-8."""
    try:
        if check_regular(path) > most:
            raise CheckpointError(f"{path}: is larger than the {most:,} bytes that such a file may have")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def read_json(path: Path) -> Any:
    """The file's JSON value. Raises CheckpointError where it is not JSON."""
    text = read_text(path, MAX_JSON)
    try:
        return json.loads(text)
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
