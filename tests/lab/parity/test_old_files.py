"""Files that minisd 0.1.0 wrote still open: a trace of the embedded model in float64, and a bundle with that trace.

Both were written by 0.1.0 (16x16 pixels, one step); the trace was then reduced to its small tensors.
"""

from pathlib import Path

from minisd.lab.parity import bundle
from minisd.lab.parity.compare import compare
from minisd.lab.parity.opening import open_side
from minisd.lab.parity.verdict import DIFFERENT, SAME

DATA = Path(__file__).parents[2] / "data"
TRACE, BUNDLE = DATA / "trace-0.1.0.safetensors", DATA / "bundle-0.1.0.zip"


def check(verdict, weights_are_the_same: bool) -> None:
    """The embedded model may have been trained anew since: then its VAE decodes to other images."""
    assert verdict.word == SAME or (not weights_are_the_same and verdict.word == DIFFERENT)
    assert [verdict.rung(name).status for name in ("tokens", "timesteps", "alphas", "latents, step 0")] == [SAME] * 4
    assert verdict.pair("vae.post_quant_conv").calls == 1


def test_a_bundle_and_its_trace():
    with bundle.opened(BUNDLE) as found:
        assert (found.word, found.case.steps, found.case.height) == (SAME, 1, 16)
        others = bundle.differences(found)
        check(compare(*found.sides, found.case), weights_are_the_same=not others)


def test_a_trace():
    trace = open_side(f"trace:{TRACE}")
    assert trace.wide and trace.about["versions"]["minisd"] == "0.1.0"
    with bundle.opened(BUNDLE) as found:
        others = bundle.differences(found)
    check(compare(f"trace:{TRACE}", "minisd:emoji"), weights_are_the_same=not others)
