"""Names of parametrised tests that are the same in every process, as pytest-xdist wants them."""

import re


def stable_id(value: object) -> str:
    """str(value) without the addresses of objects in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))
