"""The parity lab: are two implementations the same function, and if not, where do they part?

    from minisd.lab.parity.compare import compare
    verdict = compare("minisd:weights/emoji", "minisd:weights/emoji@bfloat16")
    print(verdict.word, verdict.sentence)

The walk: `sides.py` and `opening.py` open whatever is compared, `cases.py` says on which input, `promote.py` makes code
compute in float64, `pairing.py` finds the counterpart of each module, `replay.py` gives both the same input,
`ladder.py` does the same for what is computed between the networks, `retrace.py` for a recorded trace; `judge.py`
judges every observation, `conclude.py` puts the findings into words, `compare.py` puts it together. `verdict.py` is the
result.
"""
