"""The live page of a server: what it shows while requests are answered."""

import threading
import urllib.request

import browser
import pytest
import served

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


def visit(window, address):
    window.complaints()
    window.do("POST", "/url", {"url": f"{address}/"})


def count(window, selector):
    return window.run("return document.querySelectorAll(arguments[0]).length", selector)


def colours(window):
    """How many colours the pool's squares have."""
    return window.run(
        """const canvas = document.getElementById("pool"), {width, height} = canvas;
        const {data} = canvas.getContext("2d").getImageData(0, 0, width, height), found = {};
        for (let at = 0; at < data.length; at += 4)
            if (data[at + 3] === 255) {
                const name = data.slice(at, at + 3).join();
                found[name] = (found[name] || 0) + 1;
            }
        return Object.values(found).filter((size) => size > 40).length"""
    )


def test_the_pool_is_seen_under_load(window, tmp_path):
    with served.engine() as engine, served.listening(served.app(engine)) as address:
        context = engine.add_context("w10 w20 w30", method="full")
        ended = threading.Event()

        def load() -> None:
            prompts = [f"w{number} w30 w31" for number in range(20, 30)]
            while not ended.is_set():
                engine.generate(prompts, max_new_tokens=64)

        loading = threading.Thread(target=load)
        loading.start()
        try:
            visit(window, address)
            served.until(lambda: count(window, "#rows tbody tr") > 1)
            served.until(lambda: colours(window) > 2)
            served.until(lambda: not window.text("#speed-words").endswith("at most 1.0."))
        finally:
            ended.set()
            loading.join()
        assert window.text("h1") == served.NAME
        assert window.text("#contexts tbody td") == context
        for name, (width, height) in {"wide": (1280, 900), "narrow": (390, 800)}.items():
            window.resize(width, height)
            assert window.run("return document.documentElement.scrollWidth") == width
            assert window.screenshot(tmp_path / f"live-{name}.png").stat().st_size > 10_000
        # All rows are over: nothing but free pages is left, and those of the context.
        served.until(lambda: window.text("#rows-words") == "No row is in use.")
        assert window.complaints() == []


def test_a_key_is_asked_for(window):
    with (
        served.engine() as engine,
        served.listening(served.app(engine, api_key="secret")) as address,
    ):
        visit(window, address)
        served.until(lambda: "API key" in window.text("#trouble"))
        window.press("#key input", "secret\ue007")  # Enter
        served.until(lambda: window.text("h1") == served.NAME)
        served.until(lambda: window.text("#trouble") == "")
        assert window.run("return document.getElementById('key').hidden")
        assert urllib.request.urlopen(f"{address}/health").read() == b'{"status":"ok"}'
