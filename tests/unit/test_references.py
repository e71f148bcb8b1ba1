"""Where a reference is missing, continuous integration must not pass by skipping."""

import os
import subprocess
import sys


def test_a_missing_reference_fails_the_run_where_ci_is_set(tmp_path):
    """Python that cannot find peft: one test is asked for that needs nothing of it."""
    hide = "import importlib.util as u, sys, pytest; f = u.find_spec"
    hide += "; u.find_spec = lambda name, *rest: None if name == 'peft' else f(name, *rest)"
    run = f"{hide}; sys.exit(pytest.main(['-n', '0', '-q', 'tests/unit/test_keymap.py', '-k', 'nothing']))"
    seen = {}
    for name, environment in (("CI", {"CI": "true"}), ("laptop", {"CI": ""})):
        done = subprocess.run(
            [sys.executable, "-c", run], env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        seen[name] = (done.returncode, "not installed: peft" in done.stdout + done.stderr)
    assert seen == {"CI": (4, True), "laptop": (5, False)}
