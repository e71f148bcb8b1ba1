"""Parity with diffusers and transformers, live. Without them these tests are skipped on a laptop, and fail in CI."""

import os

import pytest

if not os.environ.get("CI"):
    pytest.importorskip("diffusers", reason="the reference is not installed: pip install minisd[parity]")
    pytest.importorskip("transformers", reason="the reference is not installed: pip install minisd[parity]")
