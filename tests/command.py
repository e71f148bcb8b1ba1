"""What a command of minisd, run inside a test, came to."""

from pathlib import Path


class Result:
    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status, self.stdout, self.stderr = status, stdout, stderr

    @property
    def written(self) -> Path:
        """The path in the last line of standard output."""
        assert self.status == 0, self.stderr
        return Path(self.stdout.splitlines()[-1])
