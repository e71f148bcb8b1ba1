"""Many pictures, on many machines: `minisd sample`, and what they are worth: `minisd score`.

`prompts.py` reads what to make, `plan.py` says which picture is made of what, in which shard and batch; `shards.py`
writes shards, `work.py` makes them: in one process, in one of several, or on Ray. `score.py` measures them.
"""
