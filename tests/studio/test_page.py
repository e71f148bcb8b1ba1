"""The studio's page, in a real Chromium, as a person uses it; every request to another host is aborted."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

import minisd
from tests.lab.parity.test_report import chromium  # noqa: F401  # a fixture

pytest.importorskip("gradio", reason="Gradio is an extra: pip install 'minisd[studio]'")

WAITING = 6


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address():
    """The studio as a process of its own."""
    port, here = free_port(), str(Path(minisd.__file__).parents[1])
    command = [sys.executable, "-m", "minisd", "studio", "--no-browser", "--port", str(port), "--waiting", str(WAITING)]
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=5)
            break
        except OSError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.5)
    yield address, server.pid
    server.terminate()
    server.wait(20)


@pytest.fixture
def tab(address, chromium):  # noqa: F811
    heard = []
    context = chromium.new_context(viewport={"width": 1200, "height": 1000})

    def allow(route):
        if route.request.url.startswith((address[0], "data:", "blob:")):
            return route.continue_()
        heard.append(route.request.url)
        return route.abort()

    context.route("**/*", allow)
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.on("console", lambda message: heard.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.goto(address[0])
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    yield page
    assert heard == []
    context.close()


def said(page, pattern):
    """Wait until the page says so."""
    seen = "p => [...document.querySelectorAll('p')].some(one => one.offsetParent && RegExp(p).test(one.innerText))"
    page.wait_for_function(seen, arg=pattern)


def opened(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def test_from_a_prompt_to_its_insides(tab):
    """A picture, its steps, guidance moved, the explain page of it."""
    tab.get_by_label("Prompt", exact=True).locator("visible=true").fill("a red heart")
    tab.get_by_label("number input for Steps").locator("visible=true").fill("4")
    press(tab, "Generate")
    said(tab, "step 1 of 4")
    said(tab, r"^seed \d+")
    tab.get_by_label("number input for Guidance").locator("visible=true").fill("8")
    press(tab, "Generate")
    tab.wait_for_function("() => document.querySelectorAll('.thumbnail-item').length >= 2")
    opened(tab, "Look inside")
    press(tab, "Look inside the last picture")
    inside = tab.frame_locator("iframe")
    assert "step 4 of 4" in inside.locator("#now").inner_text()
    assert "guidance scale 8" in inside.locator("main > p").first.inner_text()


def test_an_empty_prompt_is_a_message(tab):
    tab.get_by_label("Prompt", exact=True).locator("visible=true").fill(" ")
    press(tab, "Generate")
    tab.get_by_text("the prompt is empty").wait_for()


def test_edit_an_upload(tab, tmp_path):
    picture = Image.new("RGB", (128, 128), "white")
    picture.paste("red", (32, 32, 96, 96))
    picture.save(tmp_path / "red.png")
    opened(tab, "Edit")
    tab.get_by_label("Prompt", exact=True).locator("visible=true").fill("a green apple")
    tab.get_by_label("number input for Steps").locator("visible=true").fill("4")
    press(tab, "Edit")
    tab.get_by_text("no picture: upload one first").wait_for()
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "red.png")
    tab.get_by_role("button", name="Brush").first.wait_for()
    tab.wait_for_timeout(1000)
    press(tab, "Edit")
    said(tab, r"^seed \d+")
    tab.get_by_label("inpaint what is drawn over").check()
    tab.get_by_role("button", name="Brush").first.click()
    box = tab.locator("canvas").locator("visible=true").first.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] / 2 + 30, box["y"] + box["height"] / 2, steps=5)
    tab.mouse.up()
    tab.wait_for_timeout(500)
    press(tab, "Edit")
    said(tab, "step 4 of 4")  # strength 0.6: the last two of them
    said(tab, r"^seed \d+")


def test_a_picture_is_dropped_and_replayed(tab, tmp_path):
    sd = minisd.StableDiffusion.load()
    sd.text_to_image("a red heart", seed=5, steps=3)[0].save(tmp_path / "x.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    opened(tab, "PNG")
    tab.locator("input[type=file]").last.set_input_files(tmp_path / "x.png")
    tab.get_by_text("made with").wait_for()
    press(tab, "Replay")
    said(tab, "equal to the bit|not equal")
    press(tab, "Load into Generate")
    opened(tab, "Generate")
    tab.wait_for_function("() => [...document.querySelectorAll('input')].some(one => one.value === '5')")
    opened(tab, "PNG")
    tab.get_by_label("Clear").or_(tab.get_by_label("Remove this file")).first.click()
    tab.locator("input[type=file]").last.set_input_files(tmp_path / "plain.png")
    tab.get_by_text("has no settings in it").wait_for()


def resident(pid: int) -> int:
    """kB of memory that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_thirty_at_once_are_answered_or_told_to_wait(address):
    from gradio_client import Client
    from gradio_client.exceptions import AppError
    from gradio_client.utils import QueueError

    client = Client(address[0], verbose=False)
    before = resident(address[1])

    def ask(seed: int) -> str:
        try:
            client.predict("emoji", "sun", None, 1.0, "", 4.0, 1, seed, "ddim", 64, 64, api_name="/generate")
        except (AppError, QueueError) as error:
            return str(error)
        return "made"

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(ask, range(30)))
    assert answers.count("made") >= WAITING and all("queue" in one.lower() for one in answers if one != "made"), answers
    assert resident(address[1]) - before < 400_000


def test_nothing_but_its_own_files(address, tmp_path):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address[0]}/gradio_api/file=/etc/passwd", timeout=10)
    assert refused.value.code in (403, 404)
    client = Client(address[0], verbose=False)
    for model in ("/etc", str(tmp_path)):
        with pytest.raises(AppError, match="not"):
            client.predict(model, api_name="/inspect")
    with socket.socket() as probe:
        probe.settimeout(2)
        outside = socket.gethostbyname(socket.gethostname())
        if not outside.startswith("127."):
            assert probe.connect_ex((outside, int(address[0].rpartition(":")[2]))) != 0


def test_a_port_in_use_and_no_gradio(address, monkeypatch, capsys):
    import minisd.cli
    import minisd.cli.studio

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["minisd", "studio", "--no-browser", *arguments])
        with pytest.raises(SystemExit) as caught:
            minisd.cli.main()
        return caught.value.code, capsys.readouterr().err

    status, error = run("--port", address[0].rpartition(":")[2])
    assert status == 2 and "is in use; choose another with --port" in error and error.count("\n") == 1
    monkeypatch.setattr(minisd.cli.studio, "find_spec", lambda name: None)
    assert run() == (2, "error: the studio needs Gradio, which is not installed; pip install 'minisd[studio]'\n")


def test_the_exercise_of_the_course():
    import gradio_interface

    assert gradio_interface.generate("sun", 4.0, None).size == (128, 128)
    assert gradio_interface.generate("sun", 4.0, Image.new("RGB", (90, 60), "red")).size == (128, 128)
    assert [part.label for part in gradio_interface.page.input_components][:2] == ["Prompt", "Guidance"]
