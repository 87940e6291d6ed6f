"""The page in a real Chromium, on the tiny model with verdicts made to measure."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, Page, expect, sync_playwright

from psa_vlm.inference import PsaVlm
from psa_vlm.policy.files import shipped_names
from psa_vlm.policy.policy import Policy
from psa_vlm.serving.app import create_app
from psa_vlm.serving.audit import Audit
from psa_vlm.serving.keys import Keys, hash_key, new_key
from psa_vlm.serving.limits import Limits
from psa_vlm.serving.service import Service
from psa_vlm.taxonomy import Taxonomy

from .conftest import MakeService, client_of, data_url, encoded, image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
POLICY = """\
name: house
inherits: default
rules:
  privacy:
    high: refuse  # faces and papers
thresholds: {fairness: 0.3}
refusal: "No: <img src=x onerror='hacked=1'> is not <b>bold</b>."
tenants:
  school: {rules: {"*": {low: refuse}}}
"""
PATIENCE = 60_000
"""Milliseconds; a busy machine is no failure."""
PHONE = {"width": 390, "height": 844}
PNG = {"name": "red.png", "mimeType": "image/png", "buffer": encoded()}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here; install it, as with 'apt-get install chromium'")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        expect.set_options(timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture()
def service(make_service: MakeService) -> Service:
    return make_service(Policy.from_text(POLICY, "house.yaml"), limits=Limits(tokens=4))


@pytest.fixture()
def client(service: Service) -> Iterator[TestClient]:
    with client_of(service) as client:
        yield client


@pytest.fixture()
def visit(
    chromium: Browser, service: Service, live: Callable[[Any], str]
) -> Iterator[Callable[..., Page]]:
    """Opens the page; in the end nothing may have failed in it or come from elsewhere."""
    address, wrong, opened = live(create_app(service)), [], []

    def visit(**options: Any) -> Page:
        page = chromium.new_page(**options)
        opened.append(page)
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "CSP" in said.text else None)
        own = (address, "data:")
        page.on("request", lambda r: None if r.url.startswith(own) else wrong.append(r.url))
        page.goto(f"{address}/ui")
        expect(page.get_by_label("Policy")).to_contain_text("house (served)")
        return page

    yield visit
    for page in opened:
        page.close()
    assert wrong == []


def ask(page: Page, *files: Any, text: str = "What is this?") -> Any:
    """Ask, and wait for the end of the answer, which comes back."""
    page.get_by_label("Add images").set_input_files(list(files))
    expect(page.locator("#chosen li")).to_have_count(len(files))
    page.get_by_label("Question").fill(text)
    page.get_by_role("button", name="Ask").click()
    return ended(page)


def ended(page: Page) -> Any:
    reply = page.locator(".reply").last
    expect(reply).to_have_attribute("aria-busy", "false")
    return reply


def override(page: Page, concept: str, level: int) -> Any:
    """Ask again with one concept overridden."""
    page.get_by_text("Override a concept", exact=True).last.click()
    page.get_by_role("slider", name=concept).last.fill(str(level))
    page.get_by_role("button", name="Answer with these").last.click()
    expect(page.locator(".overridden")).to_have_count(1)
    return ended(page)


# --- what it shows -------------------------------------------------------------------------------


def test_verdict_rule_bars_and_heat_map_stand_beside_the_answer(
    visit: Any, see: Any, model: PsaVlm, make_calibration: Any, audit: Audit, monkeypatch: Any
) -> None:
    monkeypatch.setattr(model, "calibration", make_calibration(model.bottleneck))
    see("privacy", "high")
    page = visit()
    reply = ask(page, PNG)
    expect(reply.locator("> .text")).to_have_text(re.compile("^No: "))
    expect(reply.locator(".decision")).to_have_text("refused because of privacy, level high")
    expect(reply.locator(".rule")).to_contain_text("Rule privacy.high house.yaml:5")
    expect(reply.locator(".rule code.text")).to_have_text("high: refuse  # faces and papers")
    found = page.locator(".found")
    expect(found.locator("figcaption")).to_have_text("privacy 100%, level high 100%")
    size = "[...document.querySelectorAll('figure img')].map((one) => one.naturalWidth)"
    assert page.evaluate(size) == [32, 32]  # the picture, and over it where the model looked
    over, under = found.locator(".heat").bounding_box(), found.get_by_alt_text("red.png")
    assert over == under.bounding_box()
    found.get_by_label("show where it looked").uncheck()
    expect(found.locator(".heat")).to_be_hidden()
    bars = found.locator(".concept")
    expect(bars).to_have_count(6)
    privacy = bars.filter(has_text="privacy")
    told = "score 0.999; clean below 0.200, risky above 0.600"
    expect(privacy.get_by_role("img")).to_have_accessible_name(told)
    expect(privacy.locator(".state")).to_have_text("risky, high")
    track, tick = privacy.locator(".track").bounding_box(), privacy.locator(".tick").last
    assert tick.bounding_box()["x"] == pytest.approx(track["x"] + 0.6 * track["width"], abs=1.5)
    width = privacy.locator(".fill").evaluate("(one) => parseFloat(one.style.width)")
    assert width == pytest.approx(99.9, abs=0.1)
    fairness = bars.filter(has_text="fairness").get_by_role("img")
    expect(fairness).to_have_accessible_name(re.compile(r"the policy acts from 0\.300$"))
    (record,) = audit.records()
    assert (record["endpoint"], record["decision"]["rule"]) == ("page", "privacy.high")


def test_an_uncalibrated_run_says_that_it_has_no_thresholds(visit: Any, see: Any) -> None:
    see("misleading", "low")
    page = visit()
    reply = ask(page, PNG)
    expect(reply.locator(".rule")).to_contain_text("psa_vlm/policies/default.yaml:23")
    expect(reply.locator("p.hint")).to_contain_text("Safe Hint: this image may involve misleading")
    expect(page.locator(".legend")).to_contain_text("not calibrated, so there are no thresholds")
    misleading = page.locator(".concept").filter(has_text="misleading")
    expect(misleading.locator(".state")).to_have_text("low")
    expect(page.locator(".tick:not(.policy)")).to_have_count(0)


def test_every_image_is_shown_and_a_conversation_goes_on(
    visit: Any, see: Any, audit: Audit
) -> None:
    see("clean", "safe")
    page = visit()
    moving = {"name": "moving.gif", "mimeType": "image/gif", "buffer": encoded(frames=2)}
    ask(page, PNG, moving)
    expect(page.locator("figure")).to_have_count(3)
    expect(page.locator("figcaption", has_text="this one decides")).to_have_count(1)
    reply = ask(page, text="And now?")
    expect(reply.locator(".decision")).to_contain_text("No risk was found")
    first, second = audit.records()
    assert second["images"] == first["images"]  # the images of earlier turns are assessed again
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    reply = ask(page, text="Hello")
    expect(reply.locator(".decision")).to_contain_text("Without an image")
    expect(page.locator(".found")).to_be_hidden()


def test_a_verdict_that_fails_is_no_safe_one(visit: Any, see: Any, model: PsaVlm) -> None:
    see("clean", "safe")
    with torch.no_grad():
        model.bottleneck.head.to_type.bias.fill_(float("nan"))
    page = visit()
    reply = ask(page, PNG)
    expect(reply.locator(".decision")).to_contain_text("refused The image could not be assessed")
    expect(page.locator("figcaption")).to_have_text("not assessed")
    expect(page.locator(".legend")).to_have_text("the image could not be assessed")
    expect(page.locator(".concept, .heat")).to_have_count(0)
    expect(page.get_by_text("Override a concept", exact=True)).to_be_hidden()


# --- what it lets the operator try ---------------------------------------------------------------


def test_an_override_changes_the_answer_beside_the_first(
    visit: Any, see: Any, audit: Audit
) -> None:
    see("clean", "safe")
    page = visit()
    first = ask(page, PNG).locator("> .text").inner_text()
    second = override(page, "privacy", 3)
    expect(second.locator("h3")).to_have_text("If it were: privacy high")
    expect(second.locator("> .text")).to_have_text(re.compile("^No: "))
    expect(second.locator(".rule")).to_contain_text("Rule privacy.high house.yaml:5")
    replies = page.locator(".reply")
    expect(replies).to_have_count(2)
    expect(replies.first.locator("h3")).to_have_text("As the model saw it")
    assert replies.first.locator("> .text").inner_text() == first
    left, right = (replies.nth(i).bounding_box() for i in range(2))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    predicted, given = audit.records()
    assert predicted["decision"]["action"] == "allow"
    assert predicted["verdict"]["overridden"] == []
    assert given["decision"]["rule"] == "privacy.high"
    assert given["verdict"]["overridden"] == ["privacy"]
    assert given["scores"] == predicted["scores"]
    page.get_by_role("button", name="Back to what was seen").click()
    expect(replies).to_have_count(1)
    expect(page.get_by_role("slider", name="privacy")).to_have_value("0")


def test_a_picked_policy_is_this_page_s_alone(visit: Any, see: Any, audit: Audit) -> None:
    see("misleading", "low")
    page, other = visit(), visit()
    options = page.get_by_label("Policy").locator("option").all_inner_texts()
    assert options == ["house (served)", "house/school", *shipped_names()]
    for name, line in (("kids", "psa_vlm/policies/kids.yaml:9"), ("house/school", "house.yaml:9")):
        page.get_by_label("Policy").select_option(name)
        expect(ask(page, PNG).locator(".rule")).to_contain_text(line)
        expect(page.locator(".found small").last).to_have_text(f"policy {name}")
    expect(ask(other, PNG).locator(".action")).to_have_text("passed on with a hint")
    told = [(one["policy"]["name"], one["decision"]["action"]) for one in audit.records()]
    assert told == [("kids", "refuse"), ("house/school", "refuse"), ("house", "hint")]


# --- for everybody -------------------------------------------------------------------------------


def test_by_keyboard_alone(visit: Any, see: Any, tmp_path: Path) -> None:
    see("clean", "safe")
    page = visit()
    file = tmp_path / "red.png"
    file.write_bytes(encoded())
    page.on("filechooser", lambda chooser: chooser.set_files(file))

    def tab_to(what: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("(what) => document.activeElement.matches(what)", what):
                break
        assert page.evaluate("(what) => document.activeElement.matches(what)", what)
        framed = "document.activeElement.closest('.button') ?? document.activeElement"
        outline = page.evaluate(f"getComputedStyle({framed}).outlineStyle")
        assert outline == "solid", f"the focus on {what} is not seen"

    tab_to("#policy")
    page.keyboard.type("kids")
    expect(page.get_by_label("Policy")).to_have_value("kids")
    tab_to("#files")
    page.keyboard.press("Enter")
    expect(page.locator("#chosen")).to_contain_text("red.png")
    tab_to("#text")
    page.keyboard.type("What is this?")
    page.keyboard.press("Enter")
    ended(page)
    page.evaluate("document.querySelector('#log').focus(); document.activeElement.blur()")
    tab_to(".switch input")
    page.keyboard.press("Space")
    expect(page.locator(".heat")).to_be_hidden()
    tab_to("summary")
    page.keyboard.press("Enter")
    tab_to("[name=privacy]")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(ended(page).locator("h3")).to_have_text("If it were: privacy high")


def test_a_phone_needs_no_scrolling_sideways(visit: Any, see: Any) -> None:
    see("privacy", "high")
    page = visit(viewport=PHONE, has_touch=True)
    long = {**PNG, "name": "a-name-without-an-end-" * 9 + ".png"}

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        out = "[...document.querySelectorAll('body *')].filter((one) => one.checkVisibility() &&"
        out += " one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML)"
        assert page.evaluate(out) == []

    fits()
    page.get_by_label("Add images").set_input_files([long])
    expect(page.locator("#chosen li")).to_have_count(1)
    fits()
    page.get_by_role("button", name="Remove").click()
    ask(page, long, PNG, text="w" * 300 + " What is this?")
    override(page, "politics", 2)
    fits()
    small = "[...document.querySelectorAll('button, select, summary, textarea')].filter((one) =>"
    small += " one.checkVisibility() && one.getBoundingClientRect().height < 40).length"
    assert page.evaluate(small) == 0  # a finger finds each


CONTRAST = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map((one) => one / 255)
      .map((one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (one) => {
    const colour = getComputedStyle(one).backgroundColor;
    return /, 0\\)|transparent/.test(colour) ? ground(one.parentElement) : colour;
  };
  const written = [...document.querySelectorAll("body *")].filter((one) => one.checkVisibility() &&
    [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return written.map((one) => {
    const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), `${one.tagName}.${one.className} ${one.textContent}`];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(visit: Any, see: Any, scheme: str) -> None:
    see("privacy", "high")
    page = visit(color_scheme=scheme, reduced_motion="reduce")
    page.get_by_label("Policy").select_option("default")
    ask(page, PNG)  # with a hint
    override(page, "privacy", 0)
    page.get_by_label("Policy").select_option("kids")
    ask(page, PNG, text="Again?")  # refused
    ask(page, {**PNG, "buffer": b"x"})
    expect(page.locator(".problem")).to_be_visible()
    seen = page.evaluate(CONTRAST)
    assert len(seen) > 50
    assert [one for one in seen if one[0] < 4.5] == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 384) == (scheme == "dark")


# --- what goes wrong, and who may not ------------------------------------------------------------


def test_a_bad_image_is_named_and_the_message_comes_back(
    visit: Any, see: Any, audit: Audit
) -> None:
    see("clean", "safe")
    page = visit()
    bad = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image at all"}
    reply = ask(page, PNG, bad)
    told = re.compile(r"^notes\.txt: not an image \(PNG, JPEG, WEBP, GIF, BMP\)")
    expect(reply.get_by_role("alert")).to_have_text(told)
    (record,) = audit.records()
    assert record["error"]["code"] == "invalid_image" and record["decision"] is None
    expect(page.get_by_label("Question")).to_have_value("What is this?")
    page.get_by_role("button", name="Remove notes.txt").click()
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("figure")).to_have_count(1)
    expect(ended(page).locator(".decision")).to_contain_text("No risk was found")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#note")).to_have_text("Write what you want to know about the image.")


def test_markup_is_shown_as_text(visit: Any, see: Any) -> None:
    see("privacy", "high")
    page = visit()
    markup = "<img src=x onerror='hacked=1'><script>hacked=1</script>"
    reply = ask(page, {**PNG, "name": markup}, text=markup)
    expect(page.locator(".said .text")).to_have_text(markup)
    expect(page.locator(".thumbs img")).to_have_attribute("alt", markup)
    expect(reply.locator("> .text")).to_have_text(Policy.from_text(POLICY).refusal)
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("[src=x], .reply b:not(.action):not(.rule b), main script").count() == 0


def test_the_page_stands_behind_a_strict_policy_of_its_own(client: TestClient) -> None:
    for path in ("/ui", "/ui/page.css", "/ui/page.js"):
        response = client.get(path, params={"text": "<script>", "kind": "text/html"})
        assert response.status_code == 200 and "<script>" not in response.text
        allowed = response.headers["content-security-policy"]
        assert allowed.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in allowed and "frame-ancestors 'none'" in allowed
    assert client.get("/ui", headers={"Host": "evil.example"}).status_code == 403
    assert not any(path.startswith("/ui") for path in client.get("/openapi.json").json()["paths"])


def test_with_keys_there_is_no_page(make_service: MakeService) -> None:
    key = new_key()
    keys = Keys({"school": [hash_key(key)]})
    kept = make_service(Policy.from_text(POLICY), keys=keys)
    with TestClient(create_app(kept), headers={"Authorization": f"Bearer {key}"}) as client:
        told = client.get("/ui")
        assert told.status_code == 403 and "asks for keys" in told.text
        assert client.get("/ui/facts").status_code == 404
        assert client.post("/ui/chat", json={}).status_code == 404


@pytest.mark.parametrize(
    ("more", "pictures", "status", "told"),
    [
        ({"policy": "nobody's"}, 1, 404, "no policy 'nobody's' here any more"),
        ({"concepts": {"privacy": "high"}}, 0, 400, "without an image"),
        ({"concepts": {"weather": "high"}}, 1, 400, "'weather' is not a risk type"),
        ({"concepts": {"privacy": "worst"}}, 1, 400, "'worst'"),
        ({"model": "other"}, 1, 404, "no model 'other'"),
        ({"max_tokens": 9999}, 1, 400, "max_tokens: at most"),
        ({"nonsense": 1}, 1, 400, "nonsense is not supported"),
    ],
)
def test_the_page_s_requests_are_checked_as_any(
    client: TestClient, more: Any, pictures: int, status: int, told: str
) -> None:
    content = [image(data_url(encoded()))] * pictures + [{"type": "text", "text": "Hi"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], **more}
    response = client.post("/ui/chat", json=body)
    assert response.status_code == status
    assert told in response.json()["error"]["message"]


def test_a_client_of_the_api_overrides_nothing(client: TestClient) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    for more in ({"concepts": {"privacy": "safe"}}, {"policy": "research"}):
        response = client.post("/v1/chat/completions", json={**body, **more})
        assert response.status_code == 400
    assert "explained" not in client.post("/v1/chat/completions", json=body).json()["psa"]


def test_policies_of_other_words_are_not_offered(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = Taxonomy(("weather", "clean"), ("safe", "low", "medium", "high"), "clean")
    monkeypatch.setattr(service.engine.model, "taxonomy", words)  # type: ignore[attr-defined]
    with client_of(service) as client:
        offered = client.get("/ui/facts").json()["policies"]
    assert "captcha-allowed" not in offered and "strict" in offered
