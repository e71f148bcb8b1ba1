"""The parity lab: are two implementations the same function, and if not, where do they part?

    from minisd.lab.parity.compare import compare
    verdict = compare("diffusers:weights/emoji", "minisd:weights/emoji")
    print(verdict.word, verdict.sentence)

The walk: `sides.py` opens whatever is compared, `cases.py` says on which input, `promote.py` takes rounding away,
`pairing.py` finds each module's twin, `shadow.py` feeds twins the same input, `ladder.py` does the same for what stands
between the networks, `compare.py` puts it together, and `verdict.py` is the result that everything else reads.
"""
