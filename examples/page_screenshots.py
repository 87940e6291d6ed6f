"""Draw the pictures of the service's page in docs/serving.md, in a real Chromium.

After `make demo`, with a calibration for the thresholds:
  psa-vlm testbed scenes runs/held-out --count 8000 --seed 1
  psa-vlm calibrate runs/demo/stage2 --data runs/held-out/samples.jsonl
  python examples/page_screenshots.py runs/demo/stage2 docs/images
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Page, sync_playwright

from psa_vlm.serving.server import Settings, build
from psa_vlm.testbed.cases import evaluation_samples

DESKTOP = {"width": 1240, "height": 860}
PHONE = {"width": 390, "height": 1180}


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The service on a port of its own; its address."""
    with tempfile.TemporaryDirectory() as folder:
        app = build(Settings(run, audit=f"{folder}/audit.db"))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
        server.should_exit = True
        thread.join()


def ask(page: Page, sample: Any, policy: str) -> None:
    """Ask a sample's question about its picture, under a policy."""
    stream = io.BytesIO()
    sample.images[0].save(stream, "PNG")
    page.get_by_label("Policy").select_option(label=policy)
    picture = {"name": "scene.png", "mimeType": "image/png", "buffer": stream.getvalue()}
    page.get_by_label("Add images").set_input_files([picture])
    page.locator("#chosen li").wait_for()
    page.get_by_label("Question").fill(sample.question)
    page.keyboard.press("Enter")
    page.locator(".reply[aria-busy=false]").wait_for()


def override(page: Page, concept: str, level: str) -> None:
    """Answer again with one concept at the level that the key leads to, as in "End"."""
    page.get_by_text("Override a concept", exact=True).click()
    page.get_by_role("slider", name=concept).press(level)
    page.get_by_role("button", name="Answer with these").click()
    page.locator(".overridden[aria-busy=false]").wait_for()


def main(run: Path, out: Path) -> None:
    risky, lookalike = (
        next(s for s in evaluation_samples("compositions", cell, 100, 77) if s.type == type_)
        for cell, type_ in (("risky", "privacy"), ("lookalike", "illegal_risk"))
    )
    chromium = shutil.which("chromium") or "chromium"
    with served(run) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def shot(name: str, sample: Any, policy: str, concept: str | None, **look: Any) -> None:
            page = browser.new_page(device_scale_factor=1.5, reduced_motion="reduce", **look)
            page.set_default_timeout(300_000)  # a busy machine is no failure
            page.goto(f"{address}/ui")
            served_policy = page.locator("#policy option").first.inner_text()
            ask(page, sample, policy or served_policy)
            if concept:
                override(page, concept, "End")
            page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            page.screenshot(path=out / f"{name}.png")
            page.close()

        shot("page-light", lookalike, "", "illegal risk", viewport=DESKTOP, color_scheme="light")
        shot("page-dark", risky, "strict", None, viewport=DESKTOP, color_scheme="dark")
        shot("page-phone", risky, "", None, viewport=PHONE, color_scheme="light")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
