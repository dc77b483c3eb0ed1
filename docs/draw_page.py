"""Draw the picture of `page.md`: `python -m docs.draw_page`, beside a server with the bundled models, which
`make serve` starts. Needs Chromium.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent / "images" / "page.jpg"


def main(url: str = "http://127.0.0.1:8000") -> None:
    """Open an example, point at one of its objects, and write what the screen shows."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 760}, device_scale_factor=1.5)
        page.goto(f"{url}/#example=nuclei-dense.png")
        page.locator("body.answered").wait_for()
        page.locator("#progress").wait_for(state="hidden")
        page.locator("#body tr").nth(2).hover()
        page.screenshot(path=PICTURE, type="jpeg", quality=80)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
