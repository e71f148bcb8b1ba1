"""What the library warns of, on the command line: one line each on standard error, once."""

import sys
import warnings
from typing import Any

from minisd.files import shown
from minisd.warn import NonFiniteWarning


class Notes:
    """A context in which warnings become notes. `status` is 1 once a number was not finite: see `minisd.warn`."""

    def __init__(self) -> None:
        self.status = 0
        self._said: set[str] = set()
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> "Notes":
        self._caught.__enter__()
        self._plain = warnings.showwarning
        warnings.showwarning = self.show
        for category in (UserWarning, NonFiniteWarning):
            warnings.simplefilter("always", category)
        return self

    def __exit__(self, *error: Any) -> None:
        self._caught.__exit__(*error)

    def show(self, message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        """In the place of `warnings.showwarning`."""
        if issubclass(category, NonFiniteWarning):
            if not self.status:  # what follows from it needs no line of its own
                print(f"warning: {message}", file=sys.stderr)
            self.status = 1
        elif not issubclass(category, UserWarning):
            self._plain(message, category, *where, **more)
        elif str(message) not in self._said:
            self._said.add(str(message))
            print(f"note: {shown(' '.join(str(message).split()), 400)}", file=sys.stderr)
