"""The key-mapping layer: real checkpoint files <-> minisd's models.

`keymap.py` is the table: one weight, three names. `header.py` and `files.py` read what files claim, `layouts.py` finds
out which tensor is which weight, `configs.py` translates configurations, `sources.py` finds files, `reading.py` and
`writing.py` move the values.
"""

from minisd.checkpoint.errors import CheckpointError as CheckpointError
