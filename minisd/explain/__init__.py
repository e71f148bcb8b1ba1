"""One real generation, looked at from inside: `sd.explain("red heart")` and `minisd explain`.

In: a model, a prompt and settings. Out: an `Explanation`: numbers (`data`) and one HTML page that needs no network.
`generation.py` taps the run, `causes.py` makes the pictures that answer "what if", `page.py` shows both.
"""

from minisd.explain.page import Explanation, explain

__all__ = ["Explanation", "explain"]
