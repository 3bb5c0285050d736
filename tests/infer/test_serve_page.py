"""The chat page in a real browser (headless Chromium), over a stand-in that says known texts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("playwright", reason="the extra dev is not installed")

from playwright.sync_api import Browser, Page, expect, sync_playwright
from scripted import scripted_session
from serving import Served, served, until

from minitune.infer.chat import Message
from minitune.infer.request import Request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no browser here: apt-get install chromium")
TUNED = "家父是大理寺少卿甄远道。**逆风**如解意,\n\n1. 容易\n2. 莫摧残\n\n```python\nprint('<b>甄嬛</b>')\n```"
BASE = "你好! abc"
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


Open = Callable[..., tuple[Page, Served]]


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens the page on a server of its own. Afterwards: it asked nothing of anyone else, and nothing broke."""
    with ExitStack() as stack:
        hosts: set[str] = set()
        faults: list[str] = []

        def opened(
            script: Callable[[Request], str] | None = None,
            size: dict[str, int] = WIDE,
            locale: str = "en-US",
            scheme: Any = "light",
            pace: float = 0.0,
            slots: int = 4,
            **settings: Any,
        ) -> tuple[Page, Served]:
            said = script or (lambda request: TUNED if request.adapter else BASE)
            session = scripted_session(tmp_path, said, ("甄嬛",), pace, slots)
            server = stack.enter_context(served(session, "tiny", ("甄嬛",), **settings))
            context = browser.new_context(
                viewport=size,  # type: ignore[arg-type]
                locale=locale,
                color_scheme=scheme,
                has_touch=size is PHONE,
                is_mobile=size is PHONE,
            )
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(10_000)
            page.on("request", lambda request: hosts.add(re.sub(r"^(\w+://[^/]+).*", r"\1", request.url)))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda line: faults.append(line.text) if "Content Security" in line.text else None)
            page.goto(server.url)
            hosts.discard(server.url)
            opened.own = server.url  # type: ignore[attr-defined]
            return page, server

        yield opened
        assert faults == []
        assert hosts - {opened.own} == set()  # type: ignore[attr-defined]


def ask(page: Page, text: str) -> None:
    """Types, sends, and waits for the whole answer."""
    turns = page.locator(".turn").count()
    page.fill("#message", text)
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(turns + 1)
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".answer.running")).to_have_count(0)


def seen(server: Served) -> list[Request]:
    return server.service.session.engine.seen  # type: ignore[union-attr]


def test_both_side_by_side(open_page: Open) -> None:
    """Adapter and base get the question at once and stand side by side; each one's next prompt has its own answers."""
    page, server = open_page()
    expect(page.locator("#first")).to_have_value("甄嬛")
    expect(page.locator("#second")).to_have_value("tiny")
    ask(page, "你是谁?")
    names = page.locator(".answer .name").all_text_contents()
    boxes = [page.locator(".answer").nth(i).bounding_box() for i in range(2)]
    assert names == ["甄嬛", "tiny"]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]  # type: ignore[index]
    expect(page.locator(".answer").nth(0)).to_contain_text("家父是大理寺少卿甄远道。")
    expect(page.locator(".answer").nth(1)).to_contain_text(BASE)
    ask(page, "再说一次")
    template = server.service.session.templates[""]  # type: ignore[union-attr]
    for request in seen(server)[-2:]:
        said = TUNED if request.adapter else BASE
        turns = [("user", "你是谁?"), ("assistant", said), ("user", "再说一次")]
        assert list(request.prompt_ids) == template.prompt_ids([Message(*turn) for turn in turns])
    page.select_option("#second", "")
    ask(page, "一个")
    assert page.locator(".turn").nth(2).locator(".answer").count() == 1


def test_markdown_is_drawn_and_html_is_not(open_page: Open) -> None:
    evil = (
        "<img src=x onerror=\"document.title='x'\"> <script>document.title='x'</script>\n\n"
        "[a](javascript:alert(1)) [b](https://b.example/) **bold** *it* `co<i>de`\n\n# Head\n\n- one\n  - two\n\n"
        "> said\n\n```html\n<b>not bold</b>\n```"
    )
    page, _ = open_page(lambda _: evil)
    page.select_option("#second", "")
    ask(page, "<b>me</b>")
    text = page.locator(".answer .text")
    assert text.locator("img, script, b, i").count() == 0 and page.title() == "minitune"
    assert page.locator(".question").inner_text().strip().endswith("<b>me</b>")
    assert text.locator("a").evaluate_all("all => all.map(a => a.href)") == ["https://b.example/"]
    assert text.locator("a").get_attribute("rel") == "noopener noreferrer nofollow"
    shown = {name: text.locator(name).first.inner_text() for name in ("strong", "em", "p code", "h3", "pre", "li li")}
    assert shown == {
        "strong": "bold",
        "em": "it",
        "p code": "co<i>de",
        "h3": "Head",
        "pre": "<b>not bold</b>",
        "li li": "two",
    }
    page.click(".copy-code")
    assert page.evaluate("navigator.clipboard.readText()") == "<b>not bold</b>"
    page.click("[data-action=copy]")
    assert page.evaluate("navigator.clipboard.readText()") == evil


def test_markdown_of_a_model_that_repeats_itself(open_page: Open) -> None:
    """A small model may say one sign for ever: drawing it costs no more than its length."""
    page, _ = open_page()
    milliseconds = page.evaluate(
        """async () => {
            const { markdown } = await import("/page/markdown.js");
            const signs = ["`", "**", "* a", "[", "[a](", "``` ", "> ", "- ", "https://", "`` ` ", "# #", "1. ", "**a", "_ "];
            const start = performance.now();
            for (const sign of signs) {
                for (const text of [sign.repeat(4000), (sign + "\\n").repeat(1000)]) {
                    const drawn = markdown(text);
                    if (!drawn.childNodes.length && text.trim()) throw new Error(sign);
                }
            }
            markdown(Array.from({ length: 2000 }, (_, i) => " ".repeat(2 * i) + "- a").join("\\n"));
            return performance.now() - start;
        }"""
    )
    assert milliseconds < 4000


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_streaming_and_stopping(open_page: Open, way: str) -> None:
    """The text grows while it comes; stopping frees the server's slots, keeps what came, and says so."""
    page, server = open_page(lambda _: "今天" * 800, pace=0.01)
    page.fill("#message", "说")
    page.keyboard.press("Enter")
    text = page.locator(".answer .text").first
    expect(text).to_contain_text("今天今天")
    early = len(text.inner_text())
    page.wait_for_function("n => document.querySelector('.answer .text').innerText.length > n", arg=early)
    expect(page.locator("#send")).to_be_hidden()
    page.click("#stop") if way == "button" else page.keyboard.press("Escape")
    until(lambda: server.service.session.engine.stats.cancelled == 2)  # type: ignore[union-attr]
    expect(page.locator(".facts").first).to_contain_text("stopped")
    assert "今天" in text.inner_text()
    expect(page.locator("#message")).to_be_focused()
    server.service.session.engine.script = lambda _: BASE  # type: ignore[union-attr]
    page.click(".answer >> nth=0 >> [data-action=again]")
    expect(text).to_have_text(BASE)


def test_an_input_method_s_enter_does_not_send(open_page: Open) -> None:
    """While a candidate is being picked Enter belongs to the input method; afterwards it sends."""
    page, server = open_page()
    page.focus("#message")
    devtools = page.context.new_cdp_session(page)
    devtools.send("Input.imeSetComposition", {"selectionStart": 2, "selectionEnd": 2, "text": "ni"})
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}  # what Chromium gives while composing
    devtools.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
    page.evaluate(  # other browsers: the key is Enter, the flag says it
        "document.getElementById('message').dispatchEvent(new KeyboardEvent('keydown',"
        " {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    devtools.send("Input.insertText", {"text": "你好"})
    expect(page.locator("#message")).to_have_value("你好")
    page.wait_for_timeout(50)
    page.evaluate(  # Safari ends the composition first, and says by the key code that the Enter was part of it
        "document.getElementById('message').dispatchEvent(new KeyboardEvent('keydown',"
        " {key: 'Enter', keyCode: 229, bubbles: true, cancelable: true}))"
    )
    assert seen(server) == [] and page.locator(".turn").count() == 0
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a")
    assert page.input_value("#message") == "你好\na" and seen(server) == []
    page.keyboard.press("Enter")
    expect(page.locator(".question p")).to_have_text("你好\na")
    until(lambda: len(seen(server)) == 2)


def test_it_remembers(open_page: Open) -> None:
    """Conversation, draft and settings after a reload; a new conversation can be taken back."""
    page, server = open_page()
    ask(page, "你好")
    page.click("#open")
    page.fill("#system", "abc")
    page.fill("#temperature", "0.25")
    page.fill("#seed", "7")
    page.fill("#max_tokens", "33")
    page.select_option("#theme", "dark")
    page.keyboard.press("Escape")
    page.fill("#message", "a draft")
    page.reload()
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator(".answer").first).to_contain_text("甄远道")
    assert page.input_value("#message") == "a draft" and page.input_value("#temperature") == "0.25"
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ask(page, "又")
    request = seen(server)[-1]
    assert (request.sampling.temperature, request.sampling.seed, request.sampling.max_new_tokens) == (0.25, 7, 33)
    prompt = server.service.session.tokenizer.decode(list(request.prompt_ids))  # type: ignore[union-attr]
    assert "abc" in prompt and "你好" in prompt and "又" in prompt
    page.click("#new")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#greeting")).to_be_visible()
    page.click("#undo")
    expect(page.locator(".turn")).to_have_count(2)
    page.click("#new")
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)


def test_languages(open_page: Open) -> None:
    """The browser's language first; the switch changes every word, and is remembered."""
    page, _ = open_page(locale="zh-CN")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    expect(page.locator("#message")).to_have_attribute("placeholder", "说点什么")
    expect(page.locator("#new")).to_have_attribute("aria-label", "新对话")
    page.click("#language")
    assert page.evaluate("document.documentElement.lang") == "en"
    expect(page.locator("#keys")).to_contain_text("Enter sends")
    page.reload()
    expect(page.locator("#greeting")).to_have_text("Ask both, see both")
    counts = page.evaluate(
        """async () => {
            const { WORDS } = await import("/page/words.js");
            const holes = (text) => (text.match(/\\{\\w+\\}/g) || []).sort().join();
            const { en, zh } = WORDS;
            const same = Object.keys(en).every((name) => name in zh && zh[name] && holes(en[name]) === holes(zh[name]));
            return [Object.keys(en).length, Object.keys(zh).length, same];
        }"""
    )
    assert counts[0] == counts[1] > 50 and counts[2]


def test_a_key(open_page: Open) -> None:
    """A server with a key: the page asks, a wrong one is said, the right one opens and outlives a reload."""
    page, _ = open_page(api_keys=("the-key",))
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("API key is wrong")
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", "the-key")
    page.keyboard.press("Enter")
    expect(page.locator("#first")).to_have_value("甄嬛")
    ask(page, "你好")
    page.reload()
    expect(page.locator("#first")).to_have_value("甄嬛")
    assert "the-key" not in page.evaluate("JSON.stringify(localStorage)")


def test_faults_are_one_line(open_page: Open) -> None:
    """A full queue, a conversation that is too long, a server that is gone: said where the answer would stand."""
    page, server = open_page(max_queue=0, slots=1)
    page.select_option("#second", "")
    server.service.gate.inside = 1
    ask(page, "a")
    expect(page.locator(".fault").last).to_have_text("The server is busy. Try again in a moment.")
    server.service.gate.inside = 0
    ask(page, "b" * 3000)
    expect(page.locator(".fault").last).to_contain_text("too long")
    server.service.stop()
    page.click("#new")
    ask(page, "c")
    expect(page.locator(".fault").last).to_have_text("The server is stopping.")
    page.route("**/v1/**", lambda route: route.abort())
    ask(page, "d")
    expect(page.locator(".fault").last).to_have_text("The server can't be reached.")


def test_a_phone(open_page: Open) -> None:
    """390 pixels: nothing is wider than the screen, answers stand one under the other, targets are large enough."""
    page, _ = open_page(size=PHONE, locale="zh-CN")
    expect(page.locator("#first")).to_have_value("甄嬛")
    expect(page.locator("#second")).to_have_value("")  # side by side only where it was asked for
    page.select_option("#second", "tiny")
    ask(page, "你是谁?")
    boxes: Any = [page.locator(".answer").nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    page.click("#open")
    page.keyboard.press("Escape")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = "[...document.querySelectorAll('body *')].filter(n => !n.closest('pre') && n.getBoundingClientRect().right > 391)"
    assert page.evaluate(f"{wide}.map(n => n.outerHTML.slice(0, 80))") == []
    sizes = page.locator("header button, #composer button, header select").evaluate_all(
        "all => all.filter(n => n.offsetParent).map(n => Math.min(n.offsetWidth, n.offsetHeight))"
    )
    assert len(sizes) >= 6 and min(sizes) >= 36


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_anyone_can_use_it(open_page: Open, scheme: str, locale: str) -> None:
    """axe-core finds nothing (contrast, names, roles): empty, with answers, a fault, the settings open."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra dev is not installed").Axe()

    def check(page: Page) -> None:
        found = axe.run(page).response["violations"]
        assert [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found] == []

    page, server = open_page(scheme=scheme, locale=locale, max_queue=0, slots=2)
    expect(page.locator("#greeting")).to_be_visible()
    check(page)
    ask(page, "你是谁?")
    server.service.gate.inside = 2
    ask(page, "b")
    expect(page.locator(".fault").last).not_to_be_empty()
    check(page)
    page.click("#open")
    check(page)


def test_by_keyboard_and_by_ear(open_page: Open) -> None:
    """Tab goes through all controls in the order of the page; a whole answer is announced once, politely."""
    page, _ = open_page()
    ask(page, "你好")
    said = page.locator("#said")
    expect(said).to_have_attribute("aria-live", "polite")
    expect(said).to_contain_text("says:")
    assert page.get_attribute(".answer >> nth=0", "aria-busy") == "false"
    page.focus(".skip")
    order = []
    for _ in range(16):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.dataset.action || document.activeElement.className"
            )
        )
    wanted = ["first", "second", "new", "language", "open", "log", "copy", "again", "message", "send"]
    places = [order.index(name) for name in wanted]
    assert places == sorted(places), order
    page.focus("#open")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
