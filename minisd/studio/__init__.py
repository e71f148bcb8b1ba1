"""The studio: minisd in a browser, on this machine only. `bench.py` does the work, `app.py` is the page.

In: the models to offer. Out: a page on the loopback address. Gradio is an extra: pip install "minisd[studio]".
"""
