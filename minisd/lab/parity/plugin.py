"""For pytest: `minisd_parity`, a fixture that asserts that two callables are the same function.

    def test_my_resnet_block(minisd_parity):
        mine, reference = MyBlock(...), ResnetBlock(...)
        minisd_parity(reference, mine, torch.randn(2, 32, 8, 8), torch.randn(2, 128))

No tolerance: both are run in float64, module by module, and what differs there is another function. The test fails with
the culprit, its R64, and the command that runs it again. Importing this loads nothing but pytest.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from minisd.lab.parity.verdict import Verdict

SCALES = (1.0, 0.01)  # of the inputs: an epsilon that is ten times too large shows at the small one


@pytest.fixture
def minisd_parity(request: pytest.FixtureRequest) -> Callable[..., "Verdict"]:
    """`minisd_parity(reference, candidate, *inputs, names=None)` -> the verdict, or the test fails.

    `reference`, `candidate`: modules or functions. `inputs`: what both are called with, once as it is and once with
    its floating-point tensors at a hundredth. `names`: path of a module in the candidate -> path of its counterpart in
    the reference; without it, modules at the same path are paired.
    """

    def same_function(
        reference: Callable[..., Any],
        candidate: Callable[..., Any],
        *inputs: Any,
        names: Mapping[str, str] | None = None,
    ) -> "Verdict":
        __tracebackhide__ = True
        from minisd.lab.parity.compare import compare_modules
        from minisd.lab.parity.pairing import as_module, pair_modules

        titles = "the reference", "the candidate"
        try:
            pair_modules(as_module(reference), as_module(candidate), names, titles)
        except ValueError as error:  # wrong names: a sentence helps more than a traceback
            pytest.fail(f"minisd_parity: {error}", pytrace=False)
        calls = [scaled(inputs, scale) for scale in SCALES]
        verdict = compare_modules(reference, candidate, calls, names=names, titles=titles)
        verdict.command = f"python -m pytest {request.node.nodeid}"
        if not verdict.same:
            pytest.fail(message(verdict), pytrace=False)
        return verdict

    return same_function


def scaled(inputs: tuple[Any, ...], scale: float) -> tuple[Any, ...]:
    """Floating-point tensors times `scale`; the rest, such as ids and timesteps, as it is."""
    return tuple(value * scale if getattr(value, "is_floating_point", bool)() else value for value in inputs)


def message(verdict: "Verdict") -> str:
    """The test's failure: the verdict, and what each culprit does not have in common with its counterpart."""
    lines = [f"{verdict.word}: {verdict.sentence}"]
    for name in verdict.culprits:
        pair = next((pair for pair in verdict.pairs if pair.name == name), None)
        if pair is not None:
            lines.append(f"  {name}: R64 {pair.r64:.3g}, apart in float64 by {pair.relative64:.3g} ({pair.b_source})")
            lines += [f"    {one.what}: {one.a} in the reference, {one.b} in the candidate" for one in pair.attributes]
    return "\n".join([*lines, f"  again: {verdict.command}"])
