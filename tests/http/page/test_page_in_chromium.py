"""The page at `/` in a real browser, for a server that asks for keys and has a model with hostile names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.browsers import SCREENS, check_page, chromium, new_page
from tests.conftest import Serve
from tests.http.access.keys import KeyFile
from tests.server import Server

# `tests.browsers` skips this module if there is no browser.
from playwright.sync_api import Browser, Page, Request, Route, expect  # isort: skip

HOSTILE = '<img src=x onerror="alert(1)">'
STEP_S = 5
"""Seconds by which the clock of the page is wound at once."""

FOCUSED = "(each => each.id || each.textContent || each.value)(document.activeElement)"
HIDE = """hidden => {
  Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
  document.dispatchEvent(new Event('visibilitychange'));
}"""
"""What runs in the page: the name of what has the focus, and the tab shown or hidden."""

Open: TypeAlias = Callable[..., Page]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    """A key that may read and predict, and one that may do everything."""
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.toml")
    file.add("user", "read", "predict")
    file.add("all", "read", "predict", "metrics", "admin")
    return file


@pytest.fixture(scope="module")
def server(
    models: Path, keys: KeyFile, tmp_path_factory: pytest.TempPathFactory, module_serve: Serve
) -> Server:
    """Two versions of the digits, the same with markup as names and faults, and a model of sentences."""
    repository = tmp_path_factory.mktemp("page")
    digits = repository / "digits"
    for name in ("1", "2"):
        shutil.copytree(models / "digits" / "1", digits / name)
    for name in ("samples", "labels.txt", "model.toml"):
        source = models / "digits" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, digits / name)
    with (digits / "model.toml").open("a") as file:
        file.write("\n[cache]\nenabled = true\n")
    shutil.copytree(models / "next-word", repository / "next-word")
    hostile = repository / HOSTILE.replace("/", "")
    shutil.copytree(digits, hostile)
    (hostile / "labels.txt").write_text("\n".join(f"{HOSTILE}{number}" for number in range(10)) + "\n")
    (hostile / "2" / "model.onnx").write_bytes(b"no model")
    settings = (hostile / "model.toml").read_text()
    (hostile / "model.toml").write_text(settings.replace('description = "', f"description = '{HOSTILE}' # "))
    return module_serve(repository, "--keys-file", str(keys.path))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser, server: Server, keys: KeyFile) -> Iterator[Open]:
    """Open the page: `open_page("#/digits", key="all")`; nothing may go wrong in it until the test ends."""
    faults: list[str] = []
    contexts = []

    def start(address: str = "", key: str | None = None, **options: Any) -> Page:
        context = browser.new_context(**{"reduced_motion": "reduce", **options})
        contexts.append(context)
        page = new_page(context, faults)
        page.goto(f"{server.url}/{address}")
        if key is not None:
            page.locator("#key").click()
            page.get_by_label("Key or token").fill(keys.keys[key])
            page.keyboard.press("Enter")
            expect(page.locator("#nav a[href='#/digits']")).to_be_attached()
        return page

    yield start
    for context in contexts:
        context.close()
    assert faults == []


def fill_in(page: Page, name: str, samples: int = 1) -> None:
    """Choose the JSON of a model's golden sample."""
    page.get_by_label("JSON").check()
    expect(page.get_by_label("Start with").locator("option")).to_have_count(samples + 1)
    page.get_by_label("Start with").select_option(label=name)


def test_the_page_asks_for_a_key_and_keeps_it_in_memory_alone(
    open_page: Open, keys: KeyFile, server: Server
) -> None:
    page = open_page()
    asked: list[Request] = []
    page.on("request", lambda request: asked.append(request))
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    page.get_by_role("main").get_by_role("button", name="Enter a key").click()
    field = page.get_by_label("Key or token")
    field.fill("inferpool_wrong")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("alert")).to_contain_text("does not know this key")
    field.fill(keys.keys["user"])
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("table", name="Models").get_by_role("link", name="digits")).to_be_visible()
    expect(page.get_by_text("The jobs are shown to a key with the scope")).to_be_visible()
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    expect(field).to_have_value("")
    assert page.evaluate("indexedDB.databases()") == []
    secret = keys.keys["user"]
    assert not any(secret in request.url for request in asked)
    assert any(request.headers.get("x-api-key") == secret for request in asked)
    page.reload()
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    assert not any(secret in json.dumps(line) for line in server.log)


def test_a_golden_sample_is_answered_with_its_label(open_page: Open) -> None:
    page = open_page("#/digits", key="user")
    fill_in(page, "held_out.json")
    page.get_by_role("button", name="Predict").click()
    predictions = page.get_by_role("table", name="Predictions")
    expect(predictions.locator("tr.best th")).to_have_text(["7", "6", "3"])
    page.get_by_text("The whole answer").click()
    expect(page.get_by_role("region", name="The whole answer")).to_contain_text('"logits"')
    page.get_by_label("Body", exact=True).fill('{"inputs": [1]}')
    page.get_by_role("button", name="Predict").click()
    expect(page.get_by_role("alert").filter(has_text="422")).to_be_visible()


def test_a_version_tells_what_it_is_how_it_is_batched_and_how_long_it_takes(
    open_page: Open, server: Server, keys: KeyFile, models: Path
) -> None:
    page = open_page("#/digits/1", key="user")
    picture = (models / "digits" / "samples" / "7.png").read_bytes()
    headers = keys.bearer("user") | {"content-type": "image/png"}
    assert server.post("/predict/digits/1", content=picture, headers=headers).status_code == 200
    told = server.get("/models/digits/1", headers=keys.bearer("user")).json()
    about, batching = page.locator("#about"), page.locator("#batching")
    expect(about).to_contain_text(told["digest"])
    expect(about).to_contain_text("FP32 [any, 1, 8, 8]")
    expect(about).to_contain_text(f"{len(told['instances'])} on cpu, ready")
    assert told["batching"]["enabled"]
    assert told["batching"]["reason"]
    expect(batching).to_contain_text(f"up to {told['batching']['max_rows']} rows together")
    expect(batching).to_contain_text("shown by reading the graph")
    expect(batching).to_contain_text(told["batching"]["reason"])
    sizes = page.get_by_role("table", name="Batches that ran, by their rows")
    expect(sizes.get_by_role("rowheader").first).to_have_text("1")
    status = server.get("/status", headers=keys.bearer("user")).json()
    [model] = [model for model in status["models"] if model["name"] == "digits"]
    reasons = page.get_by_role("table", name="Batches by the reason of their dispatch")
    assert model["versions"][0]["figures"]["reasons"]
    for reason in model["versions"][0]["figures"]["reasons"]:
        expect(reasons.get_by_role("rowheader").filter(has_text=reason).first).to_be_visible()
    expect(reasons.get_by_role("rowheader").filter(has_text="drained")).to_have_text(
        "drained nothing else waited"
    )
    times = page.get_by_role("table", name="Time of a batch in the model").get_by_role("rowheader")
    expect(times).to_have_count(len({line["rows"] for line in told["latency"]}))
    expect(page.locator("#stats")).to_contain_text("0 rows")
    # This key may change nothing, and the page offers nothing.
    manage = page.locator("#manage")
    expect(manage).to_contain_text("need a key with the scope admin")
    expect(manage.get_by_role("button")).to_have_text(["Enter a key"])


def test_a_sentence_is_continued_with_the_words_that_the_server_answers(
    open_page: Open, server: Server, keys: KeyFile
) -> None:
    page = open_page("#/next-word", key="user")
    text = "the value of the"
    page.get_by_role("radio", name="Sentence").check()
    page.get_by_label("Sentence", exact=True).and_(page.locator("textarea")).fill(text)
    page.get_by_role("button", name="Predict").click()
    body = {"inputs": {"text": [text]}}
    answer = server.post("/predict/next-word", json=body, headers=keys.bearer("user")).json()
    [row] = answer["predictions"]
    labels = page.get_by_role("table", name="Predictions").get_by_role("rowheader")
    expect(labels).to_have_text([each["label"] for each in row])


def test_cards_are_shown_with_their_load_and_memory(open_page: Open) -> None:
    page = open_page(key="user")
    card = {
        "device": "cuda:0", "utilization": 0.5, "memory_used_bytes": 2**30, "memory_total_bytes": 2**34,
        "temperature_celsius": 61.0, "power_watts": None,
    }  # fmt: skip

    def add_card(route: Route) -> None:
        answer = route.fetch(headers={**route.request.headers, "if-none-match": ""})
        status = answer.json()
        status["server"]["cards"] = [card]
        route.fulfill(response=answer, json=status)

    expect(page.get_by_text("There is no graphics card.")).to_be_visible()
    page.route("**/status", add_card)
    row = page.get_by_role("table", name="Graphics cards").get_by_role("row").filter(has_text="cuda:0")
    expect(row.get_by_role("cell")).to_have_text([re.compile("50 %"), re.compile("1.* of 1"), "–"])
    check_page(page, "a card")


def test_a_dropped_picture_is_classified(open_page: Open, models: Path) -> None:
    page = open_page("#/digits/2", key="user")
    content = list((models / "digits" / "samples" / "7.png").read_bytes())
    dropped = page.evaluate_handle(
        "content => { const files = new DataTransfer(); files.items.add(new File([Uint8Array.from(content)],"
        " '7.png', {type: 'image/png'})); return files; }",
        content,
    )
    page.locator(".drop").dispatch_event("drop", {"dataTransfer": dropped})
    expect(page.locator("#answer tr.best th")).to_have_text(["7"])
    expect(page.locator(".drop img")).to_be_visible()


def test_an_administrator_unloads_and_loads_a_version(open_page: Open) -> None:
    page = open_page("#/digits/2", key="all")
    top = page.locator("#top")
    for act, state in (("Unload", "unloaded"), ("Load", "ready")):
        page.get_by_role("button", name=act, exact=True).click()
        if act == "Unload":
            expect(page.get_by_role("button", name="Cancel")).to_be_focused()
            page.get_by_role("dialog").get_by_role("button", name="Unload").click()
        expect(page.get_by_role("status")).to_contain_text(f"{act} digits 2: job")
        expect(top.locator(".row .state")).to_have_text(state)
    page.get_by_label("Name").fill("blue")
    page.get_by_role("button", name="Give to version 2").click()
    expect(page.locator("#labels")).to_contain_text("blue → 2")
    page.get_by_role("link", name="All models", exact=True).first.click()
    jobs = page.get_by_role("table", name="The latest first")
    expect(jobs.get_by_role("rowheader")).to_have_text(["load digits 2", "unload digits 2"])


def test_an_administrator_tries_a_version_and_rolls_it_back(
    open_page: Open, server: Server, keys: KeyFile, models: Path
) -> None:
    page = open_page("#/digits/1", key="all", viewport={"width": 360, "height": 740}, color_scheme="dark")
    traffic, told = page.locator("#traffic"), page.get_by_role("status")
    sample = json.loads((models / "digits" / "samples" / "held_out.json").read_text())

    def press(button: str, says: str) -> None:
        page.get_by_role("button", name=button).click()
        if page.get_by_role("dialog").is_visible():
            page.get_by_role("dialog").get_by_role("button", name=button.split(" canary")[0]).click()
        expect(told).to_contain_text(says)
        page.get_by_role("button", name="Dismiss").click()

    def send(times: int) -> None:
        for _ in range(times):
            body = {"inputs": sample["inputs"]}
            assert server.post("/predict/digits", json=body, headers=keys.bearer("user")).status_code == 200

    press("Give to version 1", "Label stable: done.")
    send(4)
    expect(page.locator("#stats")).to_contain_text("2 cached, 0 shared")
    page.get_by_role("link", name="Version 2").click()
    page.get_by_label("Share in %").fill("101")
    press("Start as canary", "Canary 2: ")
    page.get_by_label("Share in %").fill("50")
    press("Start as canary", "Canary 2: done.")
    expect(traffic).to_contain_text("Canary: version 2 answers 50 %")
    send(1)
    expect(traffic.get_by_role("table").get_by_role("rowheader")).to_have_count(2)
    check_page(page, "the figures of a canary")
    press("End canary and shadow", "End the traffic: done.")
    expect(traffic).to_be_hidden()
    page.get_by_label("Share in %").fill("100")
    press("Start as shadow", "Shadow 2: done.")
    expect(traffic).to_contain_text("Shadow: version 2 gets copies of 100 %")
    body = {"inputs": [[[[0.5] * 8] * 8]]}
    assert server.post("/predict/digits", json=body, headers=keys.bearer("user")).status_code == 200
    expect(traffic.get_by_role("table").get_by_role("rowheader")).to_have_text(["logits"])
    expect(traffic).to_contain_text("1, 0 failed")
    check_page(page, "the figures of a shadow")
    press("End canary and shadow", "End the traffic: done.")
    press("Give to version 2", "Label stable: done.")
    expect(page.locator("#labels")).to_contain_text("stable → 2")
    press("Roll back", "Roll back digits: done.")
    expect(page.locator("#labels")).to_contain_text("stable → 1")
    page.get_by_role("link", name="All models", exact=True).first.click()
    expect(page.get_by_role("table", name="Processes that run models")).to_contain_text("digits/2")
    refused = page.get_by_role("table", name="Refused and failed requests")
    server.post("/predict/digits/2", json={"inputs": [1]}, headers=keys.bearer("user"))
    expect(refused.get_by_role("row").filter(has_text="digits/2")).to_contain_text("422 invalid input")


def test_markup_in_names_and_reasons_is_shown_as_text(open_page: Open) -> None:
    page = open_page(key="user")
    expect(page.get_by_role("table", name="Models").get_by_role("link", name=HOSTILE)).to_be_visible()
    expect(page.get_by_text("is not an ONNX model")).to_be_visible()
    page.get_by_role("table", name="Models").get_by_role("link", name=HOSTILE).click()
    expect(page.get_by_role("heading", name=HOSTILE)).to_be_focused()
    expect(page.locator("#top").get_by_text(HOSTILE)).to_have_count(2)
    fill_in(page, "held_out.json")
    page.get_by_role("button", name="Predict").click()
    expect(page.locator("#answer tr.best th")).to_have_text([f"{HOSTILE}{digit}" for digit in (7, 6, 3)])
    page.get_by_text("10 class names").click()
    expect(page.locator(".names .tag").first).to_have_text(f"{HOSTILE}0")
    assert page.locator("main img").count() == 0


def test_everything_can_be_done_with_the_keyboard(open_page: Open, keys: KeyFile) -> None:
    page = open_page()
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()

    def tab_to(name: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(FOCUSED) == name:
                return
        raise AssertionError(f"no number of tabs leads to {name}")

    tab_to("Skip to the content")
    tab_to("key")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Key or token")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.insert_text(keys.keys["user"])
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_be_focused()
    expect(page.get_by_role("heading", name="Models")).to_be_visible()
    tab_to("digits ready")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="digits")).to_be_focused()
    page.locator("input[value=picture]").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("Start with").locator("option")).to_have_count(2)
    tab_to("run")
    page.keyboard.press("Enter")
    expect(page.locator("#answer tr.best th").first).to_have_text("7")
    expect(page.locator("#run")).to_be_focused()


@pytest.mark.parametrize("options", SCREENS)
def test_axe_finds_no_obstacle_and_nothing_is_wider_than_the_screen(
    open_page: Open, options: dict[str, Any]
) -> None:
    page = open_page(key="all", **options)
    expect(page.get_by_role("heading", name="Models", exact=True)).to_be_visible()
    page.get_by_role("button", name="Dismiss").click()
    check_page(page, "all models")
    page.locator("#key").click()
    check_page(page, "the dialog for the key")
    page.keyboard.press("Escape")
    page.get_by_role("table", name="Models").get_by_role("link", name="digits").click()
    fill_in(page, "held_out.json")
    page.get_by_role("button", name="Predict").click()
    expect(page.get_by_role("table", name="Predictions")).to_be_visible()
    check_page(page, "a model")


def test_the_poll_rests_while_nothing_changes_and_stops_while_nobody_looks(open_page: Open) -> None:
    page = open_page(key="user")
    # Answers come from here, so that the clock of the page can be wound without waiting for a server.
    polls: list[Request] = []
    answers = {"status": 304}

    def answer(route: Route) -> None:
        polls.append(route.request)
        route.fulfill(status=answers["status"], body="" if answers["status"] == 304 else "{}")

    page.route("**/status", answer)
    page.route("**/flush", lambda route: route.fulfill(status=204))
    page.clock.install()
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Resume").click()

    def polls_within(seconds: int) -> int:
        before = len(polls)
        for _ in range(0, seconds, STEP_S):
            page.clock.run_for(1000 * STEP_S)
            page.evaluate("fetch('flush').then(() => 0)")  # the answers before have arrived
        return len(polls) - before

    assert 4 <= polls_within(30) <= 9
    assert all(request.headers.get("if-none-match") for request in polls)
    assert polls_within(60) <= 7, "nothing changes"
    page.evaluate(HIDE, True)
    assert polls_within(60) == 0, "nobody looks"
    with page.expect_request("**/status"):
        page.evaluate(HIDE, False)
    answers["status"] = 503
    polls_within(20)
    expect(page.get_by_text("The server does not answer")).to_be_visible()
    assert polls_within(60) <= 2, "the server does not answer"
