"""`minisd studio`: the page in the browser. Only click is imported here until the command runs."""

from importlib.util import find_spec

import click


@click.command()
@click.option("-m", "--model", "models", multiple=True, help="A model to offer; again for more. [default: emoji]")
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True)
@click.option("--waiting", type=click.IntRange(1, 1000), default=20, show_default=True, help="Most requests that wait.")
@click.option("--allow-paths", is_flag=True, help="Let visitors name folders, files and hub ids as models.")
@click.option("--browser/--no-browser", default=True, help="Open the page.  [default: open]")
def studio(models: tuple[str, ...], port: int, waiting: int, allow_paths: bool, browser: bool) -> None:
    """Generate, edit, look inside and replay in a page on this machine. Nothing leaves it."""
    if find_spec("gradio") is None:
        raise ValueError("the studio needs Gradio, which is not installed; pip install 'minisd[studio]'")
    from minisd.studio.app import HOST, check_port, serve

    check_port(port)
    click.echo(f"http://{HOST}:{port}")
    serve(list(models) or ["emoji"], port, allow_paths=allow_paths, waiting=waiting, browser=browser)


COMMANDS = (studio,)
