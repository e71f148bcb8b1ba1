"""Programs written for diffusers, and the tests that they run on minisd when only their import lines change.

Each program is a file of its own with a `main(folder)` that returns what it found, by name. `test_programs.py` runs
each twice; `test_pipelines.py` compares the pipelines' arguments one by one, `test_parts.py` their parts; what is not
covered is in `test_refusals.py`.
"""
