"""diffusers' own published tests for schedulers and pipelines, run on the dialect: how many pass there, and here too.

    python scripts/diffusers_tests.py path/to/diffusers/tests      # of a checkout of diffusers; nothing of it is kept

Each file runs twice in processes of its own: on diffusers as it is installed, and with the classes that
`minisd.diffusers` covers in the place of diffusers'. Tests that need the network fail on both, and do not count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCHEDULERS = "ddim ddim_inverse ddpm pndm lms euler euler_ancestral heun dpm_multi unipc lcm".split()
PIPELINES = ("", "_img2img", "_inpaint")
FILES = (
    *(f"schedulers/test_scheduler_{name}.py" for name in SCHEDULERS),
    *(f"pipelines/stable_diffusion/test_stable_diffusion{name}.py" for name in PIPELINES),
)
RESULTS, ON_MINISD = "DIFFUSERS_TESTS_RESULTS", "DIFFUSERS_TESTS_ON_MINISD"


class Recorder:
    """A pytest plugin that writes each test's outcome, by name, to a file when all have run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, str] = {}
        self.causes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
            if report.failed:
                self.causes[report.nodeid] = report.longreprtext.strip().splitlines()[-1]

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps({"outcomes": self.outcomes, "causes": self.causes}), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """In the processes that run the tests this file is a plugin of pytest."""
    if RESULTS in os.environ:
        config.pluginmanager.register(Recorder(Path(os.environ[RESULTS])))
    if ON_MINISD in os.environ:
        replace_classes()


def replace_classes() -> None:
    """Put minisd's classes where tests import diffusers' and transformers'."""
    import diffusers
    import transformers

    import minisd.diffusers as dialect

    for name in dialect.__all__:
        for library in (diffusers, transformers):
            if hasattr(library, name):
                setattr(library, name, getattr(dialect, name))


def run(folder: Path, file: str, *, on_minisd: bool) -> dict[str, dict[str, str]]:
    """The outcomes of one file's tests by name, and the last line of what those that failed said."""
    with tempfile.TemporaryDirectory() as place:
        results = Path(place, "results.json")
        environment = {**os.environ, RESULTS: str(results), "HF_HUB_OFFLINE": "1"}
        environment |= {ON_MINISD: "1"} if on_minisd else {}
        here = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, here))
        command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
        command += [f"{folder.name}/{file}"]
        subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, check=False)
        empty: dict[str, dict[str, str]] = {"outcomes": {}, "causes": {}}
        return json.loads(results.read_text(encoding="utf-8")) if results.exists() else empty


def main() -> None:
    """Print a line for each file, what fails with its cause, and the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder `tests` of a checkout of diffusers")
    parser.add_argument("--files", nargs="*", default=FILES, help="files in it (default: all that the dialect covers)")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    found = [file for file in arguments.files if (folder / file).is_file()]
    if not found:
        parser.error(f"{folder}: has none of the files, such as {FILES[0]}")
    total, equal = 0, 0
    for file in found:
        theirs, mine = (run(folder, file, on_minisd=on_minisd) for on_minisd in (False, True))
        passing = [name for name, outcome in theirs["outcomes"].items() if outcome == "passed"]
        failing = [name for name in passing if mine["outcomes"].get(name) != "passed"]
        total, equal = total + len(passing), equal + len(passing) - len(failing)
        print(f"{file}: {len(passing) - len(failing)} of {len(passing)}", flush=True)
        for name in failing:
            print(f"    {name.rpartition('::')[2]}: {mine['causes'].get(name, 'did not run')[:160]}")
    print(f"{equal} of {total}")


if __name__ == "__main__":
    main()
