"""Pictures that remember how they were made: `writing.py` puts settings into PNGs, `reading.py` takes them out again.

A PNG of minisd has two texts: `parameters`, which other programs read too, and `minisd`, JSON with everything that it
takes to make the same picture again (`minisd replay`).
"""
