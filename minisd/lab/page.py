"""What the pages that minisd writes share: one file each, no request to any network, light and dark, by keyboard too.

In: a template of this package, and what it shows. Out: HTML. `page.html` beside this file is the frame that the parity
report and the explain page fill.
"""

import base64
import io
from importlib import resources

import jinja2
from PIL import Image


def environment() -> jinja2.Environment:
    """How templates are read: everything is escaped, and a name that is not there is an error."""
    loader = jinja2.FunctionLoader(lambda name: resources.files("minisd").joinpath(name).read_text(encoding="utf-8"))
    return jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


def as_data(picture: Image.Image, kind: str = "PNG") -> str:
    """A PIL image as a data URL."""
    file = io.BytesIO()
    picture.save(file, kind, optimize=True, **({"quality": 90} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()
