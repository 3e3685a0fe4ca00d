"""The chat page in headless Chromium, against an API that answers as the test says."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chat_page import MILLISECONDS, Answer, Chat, FakeApi, serving_fake
from served_models import wait_until_idle

pytestmark = pytest.mark.browser

# Without the network options Chromium asks its maker's servers at every start.
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with serving_fake(FakeApi()) as one:
        yield one


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.fail(
            "The chat page is tested in Chromium: `apt-get install chromium`, or CHROMIUM=PATH.",
            pytrace=False,
        )
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail(
            'The tests of the chat page need Playwright: pip install -e ".[browser]"', pytrace=False
        )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def tab(browser):
    """A page for many tests; each has a port, and so storage, of its own."""
    with browser.new_context(viewport={"width": 1200, "height": 800}) as context:
        yield context.new_page()


@pytest.fixture
def visit(browser, tab) -> Iterator[Callable[..., Chat]]:
    """visit(address, **options of a browser context); fails on errors of the page."""
    contexts, errors = [], []

    def note(error: object) -> None:
        errors.append(str(error))

    def go(address: str, **options: Any) -> Chat:
        page = tab
        if options:
            contexts.append(browser.new_context(**options))
            page = contexts[-1].new_page()
        page.on("pageerror", note)
        page.set_default_timeout(MILLISECONDS)
        page.goto(address)
        return Chat(page)

    yield go
    for context in contexts:
        context.close()
    tab.remove_listener("pageerror", note)
    assert errors == []


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# ---- Conversation


def test_a_conversation_of_two_turns_sends_what_was_said(api, visit):
    chat = visit(api.address)
    chat.ask("How are you?")
    api.answers.append(Answer(pieces=("Good", "bye.")))
    chat.ask("Good, bye.", "Goodbye.")
    first, second = api.bodies
    assert first["messages"] == [user("How are you?")]
    assert second["messages"] == [
        user("How are you?"),
        assistant("Fine, thanks."),
        user("Good, bye."),
    ]
    assert first["model"] == "small" and first["stream"] is True
    assert first["stream_options"] == {"include_usage": True}
    assert chat.questions.count() == chat.answers.count() == 2
    # 40 tokens by the server's own count, not by the number of pieces.
    chat.expect(chat.answers.first.locator(".stats")).to_contain_text("40 tokens")
    chat.expect(chat.answers.first.locator(".stats")).to_contain_text("first token in 0.")


def test_an_answer_appears_as_it_is_written(api, visit):
    api.answers.append(Answer(pieces=("One", " two", " three"), stepwise=True))
    chat = visit(api.address)
    chat.send("Count.")
    stats = chat.answers.last.locator(".stats")
    for text in ("One", "One two"):
        api.release()
        chat.reads(text)
        chat.expect(chat.button("Stop")).to_be_visible()
        chat.page.wait_for_timeout(50)  # between the tokens, for their rate
    # Shown before the end: one token in at least 50 ms after the first.
    chat.expect(stats).to_contain_text("tokens/s")
    assert 0 < float(re.search(r"([\d.]+) tokens/s", stats.inner_text())[1]) <= 20
    api.release()
    chat.finishes("One two three")


def test_stop_keeps_what_was_written_and_the_next_message_sends_it(api, visit):
    api.answers.append(Answer(pieces=("One", " two", " three"), stepwise=True))
    chat = visit(api.address)
    chat.send("Count.")
    api.release(2)
    chat.reads("One two")
    chat.button("Stop").click()
    assert api.disconnected.wait(5), "The page did not close the connection."
    chat.finishes("One two")
    chat.expect(chat.answers.last.locator(".stats")).to_contain_text("Stopped")
    chat.ask("Go on.")
    assert api.bodies[1]["messages"] == [user("Count."), assistant("One two"), user("Go on.")]


def test_roles_alternate_after_a_stop_before_the_first_token(api, visit):
    api.answers.append(Answer(stepwise=True))
    chat = visit(api.address)
    chat.send("First.")
    chat.button("Stop").click()
    chat.finishes("")
    chat.ask("Second.")
    assert api.bodies[1]["messages"] == [user("First.\n\nSecond.")]


def test_regenerate_replaces_the_answer(api, visit):
    chat = visit(api.address)
    chat.ask("How are you?")
    api.answers.append(Answer(pieces=("Better.",)))
    chat.button("Regenerate").click()
    chat.finishes("Better.")
    assert chat.answers.count() == 1
    assert api.bodies[1]["messages"] == api.bodies[0]["messages"]


def test_an_edited_message_is_sent_again_without_what_followed(api, visit):
    chat = visit(api.address)
    chat.ask("First.")
    chat.ask("Second.")
    chat.questions.first.hover()
    chat.questions.first.get_by_role("button", name="Edit").click()
    editor = chat.page.get_by_role("textbox", name="Edit message")
    editor.fill("Changed.")
    editor.press("Escape")
    chat.expect(chat.questions.first).to_contain_text("First.")
    chat.questions.first.get_by_role("button", name="Edit").click()
    editor.fill("Changed.")
    editor.press("Enter")
    chat.expect(chat.questions).to_have_count(1)
    chat.finishes("Fine, thanks.")
    assert api.bodies[-1]["messages"] == [user("Changed.")]


def test_a_conversation_outlives_a_reload_and_a_new_one_is_empty(api, visit):
    chat = visit(api.address)
    chat.ask("First.")
    chat.page.reload()
    chat.reads("Fine, thanks.")
    chat.button("New conversation").click()
    chat.expect(chat.page.get_by_role("heading", name="Start a conversation")).to_be_visible()
    chat.ask("Second.")
    assert api.bodies[-1]["messages"] == [user("Second.")]


def test_copy_takes_the_text_as_the_model_wrote_it(api, visit):
    api.answers.append(Answer(pieces=("**Bold** and `code`",)))
    chat = visit(api.address, permissions=["clipboard-read", "clipboard-write"])
    chat.ask("Write.", "Bold and code")
    chat.answers.last.get_by_role("button", name="Copy").click()
    chat.expect(chat.answers.last.get_by_role("button", name="Copied")).to_be_visible()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "**Bold** and `code`"


# ---- Settings


def test_settings_are_sent_and_kept(api, visit):
    chat = visit(api.address)
    values = {
        "Temperature": ("temperature", 0.7),
        "Max tokens": ("max_tokens", 64),
        "Top-p": ("top_p", 0.9),
        "Top-k": ("top_k", 20),
        "Min-p": ("min_p", 0.05),
        "Seed": ("seed", 7),
        "Repetition penalty": ("repetition_penalty", 1.1),
    }
    chat.ask("Plain.")
    assert not {name for name, _ in values.values()} & set(api.bodies[0])
    chat.button("Settings").click()
    chat.page.get_by_label("System prompt").fill("Be brief.")
    for label, (_, value) in values.items():
        chat.page.get_by_label(label).fill(str(value))
    chat.page.get_by_label("Model").select_option("large")
    chat.page.reload()
    chat.button("New conversation").click()
    chat.ask("Now.")
    body = api.bodies[1]
    assert {name: body[name] for name, _ in values.values()} == dict(values.values())
    assert body["model"] == "large"
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, user("Now.")]
    chat.button("Settings").click()
    chat.button("Reset to the server's choice").click()
    chat.ask("Plain again.")
    assert not {name for name, _ in values.values()} & set(api.bodies[2])


def test_a_setting_out_of_range_is_not_sent(api, visit):
    chat = visit(api.address)
    chat.button("Settings").click()
    chat.page.get_by_label("Temperature").fill("9")
    assert chat.color("[name=temperature]", "borderColor") != chat.color(
        "[name=seed]", "borderColor"
    )
    chat.button("Done").click()
    chat.send("Hello.")
    chat.expect(chat.page.get_by_label("Temperature")).to_be_focused()
    assert api.bodies == []
    assert chat.message.input_value() == "Hello."  # nothing is lost


# ---- Keyboard, themes, narrow windows


def test_everything_works_by_keyboard(api, visit):
    chat = visit(api.address)
    press = chat.page.keyboard.press
    chat.expect(chat.message).to_be_focused()
    chat.page.keyboard.type("One")
    press("Shift+Enter")
    chat.page.keyboard.type("two")
    press("Enter")
    chat.finishes("Fine, thanks.")
    assert api.bodies[0]["messages"] == [user("One\ntwo")]

    api.answers.append(Answer(stepwise=True))
    press("Shift+Tab")
    chat.expect(chat.button("Regenerate")).to_be_focused()
    # A ring of two pixels, which is not there without focus.
    assert chat.page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "2px"
    press("Enter")
    api.release()
    chat.reads("Fine")
    press("Escape")
    chat.finishes("Fine")
    chat.expect(chat.message).to_be_focused()

    chat.page.locator("#open-settings").focus()
    press("Space")
    chat.expect(chat.page.get_by_label("System prompt")).to_be_focused()
    press("Escape")
    chat.expect(chat.page.locator("#panel")).to_be_hidden()
    chat.expect(chat.button("Settings")).to_be_focused()


def test_everything_that_can_be_focused_has_a_name_and_answers_are_announced(api, visit):
    chat = visit(api.address)
    chat.ask("How are you?")
    chat.button("Settings").click()
    controls = chat.page.locator("button, input, select, textarea")
    for name in ("Send", "Settings", "New conversation", "Use the dark theme"):
        chat.expect(chat.button(name)).to_be_visible()
    for control in controls.all():
        if control.is_visible():
            chat.expect(control).to_have_accessible_name(re.compile(r"\S"))
    chat.expect(chat.page.get_by_role("status")).to_have_text("Answer: Fine, thanks.")


def luminance(color: tuple[float, ...]) -> float:
    """Relative luminance (WCAG 2.2) of sRGB values 0..255."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (x / 255 for x in color)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("system", ["light", "dark"])
def test_themes_follow_the_system_until_told_otherwise(api, visit, system):
    chat = visit(api.address, color_scheme=system)
    chat.ask("How are you?")
    other = {"light": "dark", "dark": "light"}[system]

    def is_dark() -> bool:
        back = chat.color("body", "backgroundColor")
        for element in ("body", ".stats", "#latest", ".small"):
            assert contrast(chat.color(element, "color"), back) >= 4.5
        return luminance(back) < 0.2

    assert is_dark() == (system == "dark")
    chat.button(f"Use the {other} theme").click()
    assert is_dark() == (other == "dark")
    chat.page.reload()
    assert is_dark() == (other == "dark")
    chat.button(f"Use the {system} theme").click()
    assert is_dark() == (system == "dark")
    chat.page.emulate_media(color_scheme=other)  # no longer told: the system's theme again
    assert is_dark() == (other == "dark")


def test_a_window_of_360_pixels_does_not_scroll_sideways(api, visit):
    code = "```python\n" + "x" * 200 + "\n```\n" + "y" * 200
    api.answers.append(Answer(pieces=(code,)))
    chat = visit(api.address, viewport={"width": 360, "height": 640})
    chat.send("z" * 200)
    chat.expect(chat.button("Send")).to_be_visible()
    wide = (
        "[document.documentElement, document.querySelector('#log'), document.querySelector"
        "('#panel')].map((e) => e.scrollWidth - e.clientWidth)"
    )
    assert chat.page.evaluate(wide) == [0, 0, 0]
    chat.button("Settings").click()
    chat.expect(chat.page.get_by_label("Repetition penalty")).to_be_visible()
    assert chat.page.evaluate(wide) == [0, 0, 0]
    chat.button("Done").click()
    chat.expect(chat.message).to_be_in_viewport()


# ---- Text of the model is text


INJECTION = """<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>

<a href="javascript:window.hacked=1">x</a> [x](javascript:window.hacked=1) **<b onclick=hack>b</b>**

- <svg onload="window.hacked=1">

```html" onmouseover="window.hacked=1
<iframe srcdoc="<script>parent.hacked=1</script>"></iframe>
```
`<style>*{display:none}</style>`"""


def test_html_in_a_text_is_shown_and_not_run(api, visit):
    api.answers.append(Answer(pieces=tuple(INJECTION)))
    chat = visit(api.address)
    chat.send(INJECTION)
    chat.expect(chat.button("Send")).to_be_visible()
    chat.expect(chat.answers.last).to_contain_text('<img src=x onerror="window.hacked=1">')
    chat.expect(chat.answers.last).to_contain_text("<style>*{display:none}</style>")
    chat.expect(chat.questions.last).to_contain_text("<script>window.hacked=1</script>")
    chat.page.reload()
    chat.expect(chat.answers.last).to_contain_text("<iframe")
    assert chat.page.evaluate("window.hacked") is None
    made = "article :is(img, script, a, svg, iframe, style, [onclick], [onmouseover])"
    assert chat.page.locator(made).count() == 0
    assert chat.answers.last.locator("strong").inner_text() == "<b onclick=hack>b</b>"


def test_the_policy_of_the_page_forbids_markup_from_strings_and_other_origins(api, visit):
    chat = visit(api.address)
    with pytest.raises(Exception, match="TrustedHTML"):
        chat.page.evaluate("document.body.innerHTML = '<b>x</b>'")
    with pytest.raises(Exception, match="Failed to fetch"):
        chat.page.evaluate("fetch('http://localhost:9/')")


MARKDOWN = """# Title

A *quick* **bold `code`** and 2 * 3 * 4, a `b**2`.
Next line.

- one
  1. inner
  2. inner too
- two

3. three
4. four

```python
if a < b:

    print("**not bold**")
```
Done. `open"""


def test_markdown(api, visit):
    api.answers.append(Answer(pieces=tuple(MARKDOWN)))
    chat = visit(api.address)
    chat.send("Write.")
    chat.expect(chat.button("Send")).to_be_visible()
    prose = chat.answers.last.locator(".prose")
    shape = prose.evaluate("(e) => [...e.children].map((c) => c.tagName).join(' ')")
    assert shape == "H2 P DIV DIV DIV P"
    texts = {name: prose.locator(name).all_inner_texts() for name in ("em", "strong", "pre")}
    assert texts == {
        "em": ["quick"],
        "strong": ["bold code"],
        "pre": ['if a < b:\n\n    print("**not bold**")'],
    }
    paragraphs = prose.locator("p").all_inner_texts()
    assert paragraphs == [
        "A quick bold code and 2 * 3 * 4, a b**2.\nNext line.",
        "Done. `open",
    ]
    assert prose.locator("ul > li > ol > li").all_inner_texts() == ["inner", "inner too"]
    assert prose.locator("> div > ol").get_attribute("start") == "3"


def test_markdown_takes_linear_time(api, visit):
    n = 20_000
    repeated = [
        mark * n
        for mark in ("`", "`a", "**a ", "*a ", "***", "~~~\n", "  ", "1. ", "# ", "- x\nb\n")
    ]
    lines = ["- a\n" * (n // 10), "```" + " " * n + "`", "- " + " " * n + "\u2028", "-" * n + "x"]
    seconds = visit(api.address).page.evaluate(
        """(texts) => texts.map((text) => {
            const began = performance.now();
            blocks(text).map(rendered);
            return (performance.now() - began) / 1000;
        })""",
        repeated + lines,
    )
    assert max(seconds) < 1  # a quadratic algorithm takes over ten


# ---- Errors


@pytest.mark.parametrize(
    "answer, sentence, kept",
    [
        (Answer(status=400, message="The prompt is too long."), "The prompt is too long.", ""),
        (Answer(status=503), "The server is busy. Try again in a moment.", ""),
        (Answer(pieces=("Half",), breaks=True), "was lost before the answer was complete", "Half"),
        (Answer(pieces=("Half",), fails="Out of pages."), "Out of pages.", "Half"),
    ],
)
def test_an_error_is_a_sentence_and_can_be_tried_again(api, visit, answer, sentence, kept):
    api.answers.append(answer)
    chat = visit(api.address)
    chat.send("Hello.")
    chat.expect(chat.page.get_by_role("alert")).to_contain_text(sentence)
    chat.reads(kept)
    chat.button("Try again").click()
    chat.finishes("Fine, thanks.")
    assert chat.answers.count() == 1
    assert api.bodies[0]["messages"] == api.bodies[1]["messages"] == [user("Hello.")]


def test_a_server_that_is_gone_and_comes_back(visit):
    with serving_fake(FakeApi()) as api:
        chat = visit(api.address)
        chat.ask("Hello.")
    chat.send("Are you there?")
    chat.expect(chat.page.get_by_role("alert")).to_contain_text("cannot be reached")
    with serving_fake(api, port=int(api.address.rsplit(":", 1)[1])):
        chat.button("Try again").click()
        chat.finishes("Fine, thanks.")
    expected = [user("Hello."), assistant("Fine, thanks."), user("Are you there?")]
    assert api.bodies[-1]["messages"] == expected


def test_the_token_limit_is_told(api, visit):
    api.answers.append(Answer(finish_reason="length"))
    chat = visit(api.address)
    chat.ask("Hello.")
    chat.expect(chat.answers.last.locator(".stats")).to_contain_text("Reached the token limit")


def test_an_api_key_is_asked_for_and_kept_in_this_tab(api, visit):
    api.key = "secret"
    chat = visit(api.address)
    dialog = chat.page.get_by_role("dialog", name="API key")
    key = dialog.get_by_role("textbox", name="Key")
    chat.expect(key).to_be_focused()
    key.fill("wrong")
    key.press("Enter")
    chat.expect(dialog).to_contain_text("did not accept")
    key.fill("secret")
    key.press("Enter")
    chat.expect(dialog).to_be_hidden()
    chat.ask("Hello.")
    chat.page.reload()
    chat.ask("Again.")
    stored = "[JSON.stringify(sessionStorage), JSON.stringify(localStorage)]"
    in_tab, in_browser = chat.page.evaluate(stored)
    assert "secret" in in_tab and "secret" not in in_browser
    api.key = "changed"
    chat.send("Once more.")
    chat.expect(dialog).to_be_visible()
    key.press("Escape")
    chat.expect(chat.page.get_by_role("alert")).to_contain_text("asks for an API key")


def test_nothing_is_requested_from_elsewhere(api, visit):
    chat = visit(api.address)
    requests = []
    chat.page.on("request", lambda request: requests.append(request.url))
    chat.page.reload()
    api.answers.append(Answer(pieces=("![x](http://localhost:9/x.png) http://localhost:9/",)))
    chat.send("Hello.")
    chat.expect(chat.button("Send")).to_be_visible()
    paths = [u for u in requests if not u.startswith("data:")]
    assert sorted(paths) == sorted(
        api.address + path for path in ("/", "/v1/models", "/v1/chat/completions")
    )


# ---- The real server


def test_with_the_real_server(server, client, visit):
    chat = visit(server.url)
    chat.button("Settings").click()
    chat.page.get_by_label("Temperature").fill("0")
    chat.page.get_by_label("Max tokens").fill("12")
    for text in ("the cat", "猫は座る"):
        chat.send(text)
        chat.expect(chat.button("Send")).to_be_visible()
        *messages, last = chat.page.evaluate("turns.map(({role, content}) => ({role, content}))")
        made = client.chat.completions.create(
            model="one", messages=messages, temperature=0, max_tokens=12
        )
        assert last == assistant(made.choices[0].message.content)
        stats = chat.answers.last.locator(".stats")
        chat.expect(stats).to_contain_text(f"{made.usage.completion_tokens} tokens")
    # Longer than the context: the server's own sentence.
    chat.send("the cat sat on the mat " * 100)
    chat.expect(chat.page.get_by_role("alert")).to_contain_text("The server answered: ")
    chat.button("New conversation").click()
    chat.page.get_by_label("Max tokens").fill("100")
    chat.send("the cat")
    chat.expect(chat.answers.last.locator(".prose > *").first).to_be_visible()
    chat.page.keyboard.press("Escape")
    chat.expect(chat.button("Send")).to_be_visible()
    wait_until_idle(server)
