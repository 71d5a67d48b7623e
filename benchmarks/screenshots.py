"""Takes the pictures of docs/images from real runs: `make screenshots`.

    python benchmarks/screenshots.py                  24 short runs on the digits, about five minutes on one core
    python benchmarks/screenshots.py --runs DIR       keeps the runs in DIR; the next call finds them there

It needs Chromium (on Debian: apt-get install chromium). Run it after a change of the page or of the terminal's lines.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMNS = 100  # of the terminal in the picture
GRID = ("-m", "experiment=quickstart", "loss=equal,uncertainty,dwa,pcgrad,cagrad", "seed=0,1,2",
        "data.batch_size=128", "study.baselines=auto")  # fmt: skip
QUIETLY = ("logger=none", "trainer.device=cpu")  # not in the picture, like the folder of the runs
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #fff }}
figure {{ margin: 14px; border-radius: 8px; background: #1e2227; box-shadow: 0 2px 10px #0005; width: max-content }}
figure::before {{ content: "● ● ●"; color: #566; display: block; padding: 8px 14px 0; letter-spacing: 2px }}
pre {{ margin: 0; padding: 8px 18px 16px; color: #d5d9de; font: 13px/1.45 "DejaVu Sans Mono", monospace }}
b {{ color: #8fd18f; font-weight: normal }} i {{ color: #7d8590; font-style: normal }}
</style><figure><pre>{text}</pre></figure>"""


def train(runs: Path) -> tuple[str, str]:
    """Train the grid, or find it finished.

    Returns:
        what the first call in this folder has printed, and what this call has.
    """
    told = runs / "terminal.txt"
    words = [sys.executable, "train.py", *GRID, *QUIETLY, f"output_root={runs}"]
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"error: the runs have failed; see {runs}\n{done.stdout[-2000:]}")
    if not told.exists():
        told.write_text(done.stdout)
    return told.read_text(), done.stdout


def excerpt(told: str, closing: str) -> str:
    """The command, the start of the first run, and the closing table, as HTML.

    Args:
        told: what the call has printed that trained the runs.
        closing: what a call has printed that ends with the table.
    """
    start = told[: told.index("\nepoch  2/")].splitlines()
    lines = [line for line in closing.splitlines() if not line.startswith(("figure:", "first:"))]
    table = next(i for i, line in enumerate(lines) if line.endswith(": test metrics"))
    kept = [*start, "…", *lines[table:]]
    while not kept[-1].strip() or kept[-1].startswith("next:"):
        kept.pop()
    # The folder of these runs is a temporary one; a user's is outputs/.
    text = re.sub(r"\S+(?=/digits/|   \(Δm)", "outputs", "\n".join(kept))
    said = html.escape(text).replace("\n…\n", "\n<i>…</i>\n")
    command = " \\\n    ".join([shown(GRID[:3]), " ".join(GRID[3:])])
    return f"<b>$</b> {html.escape(command)}\n{said}"


def shown(words: tuple[str, ...]) -> str:
    """A command as a user types it."""
    return " ".join(["python", "train.py", *words])


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    """Save the upper part of a page as a PNG, without the empty margin below and at the right."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("error: no Chromium; on Debian: apt-get install chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={picture}",
               f"--window-size={width},{height}", "--virtual-time-budget=60000",
               f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    image = Image.open(picture).convert("RGB")
    box = Image.eval(image.convert("L"), lambda grey: 255 * (grey < 250)).getbbox() or (0, 0, width, height)
    image = image.crop((0, 0, min(width, box[2] + 14), min(height, box[3] + 14)))
    image.quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of the runs; without it a temporary one")
    parser.add_argument("--height", type=int, default=1330, help="pixels of the report that are shown")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        runs = (options.runs or work / "outputs").absolute()
        runs.mkdir(parents=True, exist_ok=True)
        told, closing = train(runs)
        report = [sys.executable, "-m", "mtl.report", str(runs), "--out", str(work / "report"), "--format", "html"]
        subprocess.run(report, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (work / "terminal.html").write_text(TERMINAL.format(text=excerpt(told, closing)))
        IMAGES.mkdir(exist_ok=True)
        photograph(work / "report" / "report.html", IMAGES / "report.png", 1000, options.height)
        photograph(work / "terminal.html", IMAGES / "terminal.png", 1100, 1600)
    print(f"report.png and terminal.png in {IMAGES}")


if __name__ == "__main__":
    main()
