"""The report in a real browser: it opens from the disk, draws every figure and logs nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.effects import compute_effects
from pipeline.report import write_report
from tests.store_fixture import Shape, write_store

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const broken = images.filter((i) => !i.complete || !i.naturalWidth).length;
  document.title = `probe ${images.length} ${broken} ${performance.getEntriesByType("resource").filter(
    (r) => !r.name.startsWith("data:")).length}`;
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_the_page_shows_every_figure_and_logs_no_error(tmp_path):
    store = tmp_path / "run.zarr"
    write_store(store, Shape())
    compute_effects(store, replicates=50)
    page = Path(write_report(store, tmp_path / "report"))
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--dump-dom",
            probed.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>probe (\d+) (\d+) (\d+)</title>", done.stdout)
    assert title is not None
    images, broken, fetched = map(int, title.groups())
    assert images == page.read_text().count("<img")
    assert images > 5
    assert broken == 0
    assert fetched == 0
