"""The report page as a browser sees it: what it shows, how it sorts, and that it asks the network for nothing."""

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from tree import write_run

from mtl.report.__main__ import main
from mtl.report.figures import page
from mtl.report.protocols import benchmarks
from mtl.report.runs import load
from mtl.report.tables import Entry, Table

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian: apt-get install chromium")

ATTACK = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
TABLE = Table(
    "Accuracy",
    "Mean over seeds.",
    ["strategy", "accuracy"],
    [
        [Entry("dwa"), Entry("9.5 ± 0.1", 9.5)],
        [Entry("equal"), Entry("–")],
        [Entry("mgda"), Entry("10.1 ± 0.2", 10.1, True)],
        [Entry("gradnorm"), Entry("−3.0", -3.0)],
    ],
)


def write(root, tables=(TABLE,)):
    collection = load([root / "runs"])
    page.write(collection, benchmarks(collection.runs, collection.stopped), list(tables), root / "report.html")
    return root / "report.html"


def write_all(root):
    """The page as the command writes it."""
    assert main([str(root / "runs"), "--out", str(root), "--format", "html"]) == 0
    return root / "report.html"


def browse(file, script, width=1280, dark=False):
    """What `script` (the body of an async function that returns JSON) finds on the page once all plots are drawn.

    The second result is what must not be: errors, console messages, and all that was fetched or that the page's policy
    stopped. The page is looked at through a frame, since a window cannot be as narrow as a phone.
    """
    before = """<script>window.seen = [];
    addEventListener("error", e => seen.push(String(e.message || e.target.src)), true);
    addEventListener("unhandledrejection", e => seen.push(String(e.reason)));
    addEventListener("securitypolicyviolation", e => seen.push("refused " + e.blockedURI));
    for (const name of ["error", "warn"]) console[name] = (...words) => seen.push(words.join(" "));
    </script>"""
    after = """<script>(async () => {
    while (document.documentElement.dataset.drawn !== "all") await new Promise(done => setTimeout(done, 20));
    const found = await (async () => { %s })();
    const fetched = performance.getEntriesByType("resource").map(e => e.name);
    parent.postMessage(JSON.stringify({ found, seen: seen.concat(fetched) }), "*");
    })();</script></body>"""
    html = file.read_text()
    copy, frame = file.with_name("copy.html"), file.with_name("frame.html")
    copy.write_text(html.replace("<style>", before + "<style>", 1).replace("</body>", after % script))
    frame.write_text(f"""<body><iframe src="copy.html" width="{width}" height="900" style="border:0"></iframe>
    <output></output><script>
    onmessage = e => document.querySelector("output").textContent = encodeURIComponent(e.data);
    </script></body>""")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={file.parent / 'profile'}",
               "--virtual-time-budget=60000", "--dump-dom", f"--blink-settings=preferredColorScheme={1 - dark}",
               frame.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    result = json.loads(unquote(re.search("<output>(.+?)</output>", dom)[1]))
    return result["found"], result["seen"]


@pytest.fixture
def runs(tmp_path):
    for i, loss in enumerate(("dwa", "equal", "mgda")):
        for seed in (0, 1):
            curves = {"test/a_accuracy": [1.0, 5.0 + i + seed], "test/b_accuracy": [3.0, 4.0 - i]}
            write_run(tmp_path / "runs", loss, seed, curves)
    return tmp_path


@needs_browser
def test_a_click_on_a_header_sorts_and_a_third_restores_the_order(runs):
    found, seen = browse(
        write(runs),
        """
        const button = name => [...document.querySelectorAll("th button")].find(b => b.textContent === name);
        const state = () => [[...document.querySelectorAll("table.sortable td:first-child")].map(c => c.textContent),
                             [...document.querySelectorAll("th")].map(h => h.getAttribute("aria-sort"))];
        const states = [state()];
        for (const name of ["accuracy", "accuracy", "accuracy", "strategy"]) {
          button(name).click();
          states.push(state());
        }
        return states;
        """,
    )
    assert seen == []
    written = ["dwa", "equal", "mgda", "gradnorm"]
    assert found == [
        [written, ["none", "none"]],
        [["mgda", "dwa", "gradnorm", "equal"], ["none", "descending"]],  # as numbers, and what is missing last
        [["gradnorm", "dwa", "mgda", "equal"], ["none", "ascending"]],
        [written, ["none", "none"]],
        [["dwa", "equal", "gradnorm", "mgda"], ["ascending", "none"]],
    ]


@needs_browser
def test_plots_show_the_runs_and_the_legend_switches_them_everywhere(runs):
    found, seen = browse(
        write(runs),
        """
        const plots = [...document.querySelectorAll(".plot")];
        const curves = plots[0].data.filter(t => t.hovertemplate).map(t => [t.meta, t.x, t.y, t.customdata]);
        const colours = plots.map(p => p.data.filter(t => t.meta === "dwa" && t.hovertemplate).map(t => t.line.color));
        const chip = document.querySelector('.chips button[data-label="dwa"]');
        const visible = () => plots.every(p => p.data.every(t => t.visible === (t.meta !== "dwa")));
        const first = plots.every(p => p.data.every(t => t.visible));
        chip.click();
        const drawn = plots.map(p => p.querySelectorAll(".trace").length);
        return { curves, colours: [...new Set(colours.flat())], first, then: visible(), drawn,
                 pressed: chip.getAttribute("aria-pressed") };
        """,
    )
    assert seen == []
    assert found["first"] and found["then"] and found["pressed"] == "false" and min(found["drawn"]) > 0
    assert len(found["colours"]) == 1
    assert sorted(found["curves"]) == [
        ["dwa", [1, 2], [1, 5.5], [[1, 1], [5, 6]]],
        ["equal", [1, 2], [1, 6.5], [[1, 1], [6, 7]]],
        ["mgda", [1, 2], [1, 7.5], [[1, 1], [7, 8]]],
    ]


@needs_browser
def test_many_strategies_can_be_filtered_and_a_narrow_screen_does_not_scroll_sideways(tmp_path):
    for i in range(40):
        write_run(tmp_path / "runs", f"strategy_with_a_long_name_{i:02}")
    wide = Table("W", "N", [f"column {i}" for i in range(20)], [[Entry(f"s{i}") for i in range(20)]] * 3)
    found, seen = browse(
        write(tmp_path, [wide]),
        """
        const box = document.getElementById("filter"), chips = [...document.querySelectorAll(".chips button")];
        box.value = "long 07";
        box.dispatchEvent(new Event("input"));
        const left = chips.filter(c => !c.hidden).map(c => c.textContent);
        const rows = [...document.querySelectorAll("table.sortable tbody tr")].filter(r => !r.hidden).length;
        document.querySelector('[data-set="matching"]').click();
        const on = new Set([...document.querySelectorAll(".plot")].flatMap(p => p.data.filter(t => t.visible && t.meta)
                                                                                     .map(t => t.meta)));
        box.value = "";
        box.dispatchEvent(new Event("input"));
        const { scrollWidth, clientWidth } = document.documentElement;
        return { left, rows, on: [...on], again: chips.filter(c => !c.hidden).length,
                 excess: scrollWidth - clientWidth, width: innerWidth };
        """,
        width=390,
    )
    assert seen == []
    assert found["left"] == found["on"] == ["strategy_with_a_long_name_07"]
    assert found["rows"] == 0 and found["again"] == 40
    assert found["width"] == 390 and found["excess"] == 0


@needs_browser
def test_the_legend_stays_in_view_and_tables_stand_beside_their_figures(runs):
    found, seen = browse(
        write_all(runs),
        """
        const last = [...document.querySelectorAll("section[id^=benchmark] .plot")].pop();
        const chips = document.querySelector(".chips"), top = () => Math.round(chips.getBoundingClientRect().top);
        const before = top();
        scrollTo(0, last.getBoundingClientRect().top + scrollY - 200);
        await new Promise(done => setTimeout(done, 50));
        const here = "section[id^=benchmark] > ";
        const order = [...document.querySelectorAll(`${here}figure, ${here}details`)];
        const terms = [...document.querySelectorAll("#words dt")].map(t => t.textContent);
        return { before, after: top(), scrolled: scrollY, terms,
                 open: [...document.querySelectorAll("details")].some(d => d.open),
                 order: order.map(f => f.querySelector("figcaption b, summary").textContent) };
        """,
    )
    assert seen == []
    assert found["before"] > 100 and found["scrolled"] > 500 and found["after"] == 0
    names = [re.sub(r"^(Table|Figure) \d+\. |synthetic, resnet20: |\.$", "", name) for name in found["order"]]
    assert [re.sub(r"^synthetic, resnet20: |\.$", "", n) for n in names] == [
        "test metrics", "Learning curves", "multi-task metrics, last epoch", "All metrics", "Task against task",
        "differences from equal, last epoch", "speed and memory", "Accuracy and cost",
        "The same tables for the best test epoch",
    ]  # fmt: skip
    assert not found["open"] and len(found["terms"]) == len(set(found["terms"])) >= 8


@needs_browser
def test_what_the_pointer_lights_up_has_the_strategys_colour_and_no_band_gets_an_outline(runs):
    found, seen = browse(
        write(runs),
        """
        const chip = document.querySelector('.chips button[data-label="dwa"]');
        chip.dispatchEvent(new Event("pointerenter"));
        const colour = document.querySelector(".plot").data.find(t => t.meta === "dwa" && t.hovertemplate).line.color;
        const lines = [...document.querySelectorAll(".lit path.js-line")].map(p => getComputedStyle(p));
        return { colour, lines: lines.map(s => [s.stroke, Number(s.strokeOpacity), s.strokeWidth]) };
        """,
    )
    assert seen == []
    rgb = tuple(int(found["colour"][i : i + 2], 16) for i in (1, 3, 5))
    visible = {stroke for stroke, opacity, _ in found["lines"] if opacity > 0}
    assert visible == {f"rgb{rgb}"} and any(opacity == 0 for _, opacity, _ in found["lines"])


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_dark_screen_gets_a_dark_page_and_paper_a_light_one_of_one_width(runs, dark):
    found, seen = browse(
        write_all(runs),
        """
        const luminance = colour => colour.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 765;
        const lines = () => [...document.querySelectorAll(".plot")].map(p => p.data.find(t => t.meta === "equal"
                                                                                      && t.hovertemplate).line.color);
        const state = () => ({ lines: [...new Set(lines())], ink: document.querySelector(".plot").layout.font.color,
                               sizes: [...document.querySelectorAll(".plot")].map(p => p._fullLayout.width) });
        const style = getComputedStyle(document.body);
        const screen = state();
        dispatchEvent(new Event("beforeprint"));
        const paper = state();
        dispatchEvent(new Event("afterprint"));
        await new Promise(done => setTimeout(done, 500));  // Plotly takes its time to fit the screen again
        return { background: luminance(getComputedStyle(document.documentElement).getPropertyValue("--paper") === "#fff"
                   ? "rgb(255, 255, 255)" : style.backgroundColor), text: luminance(style.color), screen, paper,
                 again: state() };
        """,
        dark=dark,
    )
    assert seen == []
    assert (found["background"] < 0.2, found["text"] > 0.8) == (dark, dark)
    assert found["screen"]["lines"] == (["#f4f2ec"] if dark else ["#000000"])
    assert found["paper"]["lines"] == ["#000000"] and found["paper"]["ink"] == "#1c1b19"
    assert set(found["paper"]["sizes"]) == {320, 600} and found["again"] == found["screen"]


@pytest.mark.parametrize("strategies", [2, 12])
def test_a_curve_in_colour_knows_its_seeds_and_one_in_grey_their_mean(tmp_path, strategies):
    for i, seed in itertools.product(range(strategies), (0, 1)):
        write_run(tmp_path / "runs", f"m{i:02}", seed, {"test/a_accuracy": [1.0, 10.0 * i + seed]})
    text = write(tmp_path).read_text()
    (first, *_) = json.loads(re.search(r'id="plots">(.+?)</script>', text)[1])
    seeds = {t["meta"]: t["customdata"] for t in first["data"] if "customdata" in t}
    grey = {f"m{i:02}" for i in range(strategies - 8)}  # the best eight are in colour
    assert seeds == {
        f"m{i:02}": [] if f"m{i:02}" in grey else [[1, 1], [10 * i, 10 * i + 1]] for i in range(strategies)
    }
    assert all(("seed 1" in t["hovertemplate"]) == (t["meta"] not in grey) for t in first["data"] if "customdata" in t)
    assert ("in grey" in text) == bool(grey)


def hostile(root):
    write_run(root / "runs", ATTACK.replace("/", "_"), 0, command=f"python train.py '{ATTACK}'", commit=ATTACK)
    write_run(root / "runs", "equal", 0)
    write_run(root / "runs", "mgda", 0, status="failed", error=ATTACK)
    (root / "runs" / "synthetic" / "resnet20" / ATTACK[8:30].replace("/", "_") / "seed0").mkdir(parents=True)
    return write(root, [Table(ATTACK, ATTACK, [ATTACK, "x"], [[Entry(ATTACK), Entry("1", 1.0)]])])


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_what_comes_from_a_run_is_text_and_never_markup(tmp_path):
    file = hostile(tmp_path)
    reader = Elements()
    reader.feed(file.read_text())
    assert [a.get("id") or a.get("type") for t, a in reader.found if t == "script"] == ["plots", None, None]
    assert not [t for t, a in reader.found if t == "img" or any(k.startswith("on") for k in a)]
    assert "&lt;script&gt;document.title=" in file.read_text()


@needs_browser
def test_a_hostile_run_cannot_run(tmp_path):
    found, seen = browse(
        hostile(tmp_path),
        """
        const trace = document.querySelector(".plot").data.find(t => t.meta && t.meta.includes("script"));
        const text = document.getElementById("left-out").textContent;
        return { title: document.title, error: text, meta: trace.meta, scripts: document.scripts.length,
                 images: document.querySelectorAll("main img, header img").length };
        """,
    )
    assert seen == []
    assert found["title"] == "Multi-task learning: synthetic" and found["images"] == 0
    assert "failed: " + ATTACK in found["error"]
    assert found["meta"].startswith("<script>")


def test_negative_numbers_have_a_minus_sign_and_names_keep_their_hyphens(tmp_path):
    (tmp_path / "runs").mkdir()
    table = Table("T", "N", ["strategy", "x"], [[Entry("imtl-g"), Entry("-1.5 ± 0.1", -1.5)]])
    text = write(tmp_path, [table]).read_text()
    assert '<td class="word">imtl-g</td>' in text and '<td data-value="-1.5">−1.5 ± 0.1</td>' in text


def test_the_page_names_its_origin_and_what_was_left_out(runs):
    (runs / "runs" / "synthetic" / "resnet20" / "broken" / "x" / "seed0").mkdir(parents=True)
    (runs / "runs" / "synthetic" / "resnet20" / "broken" / "x" / "seed0" / "run.json").write_text("{")
    write_run(runs / "runs", "famo", 0, status="diverged", error="loss is nan", dirty=True)
    text = write(runs).read_text()
    for word in ("python train.py loss=dwa seed=1", "c0ffee", "Z80, 1 thread", "torch 2.15.0", "6 finished runs of 3",
                 "diverged: loss is nan", "broken/x/seed0", "Mean over seeds."):  # fmt: skip
        assert word in text, word


def test_a_page_without_runs_is_still_a_page(tmp_path):
    (tmp_path / "runs").mkdir()
    assert "There are no finished runs." in write(tmp_path, []).read_text()


def test_the_page_asks_for_nothing(runs):
    reader = Elements()
    reader.feed(write(runs).read_text())
    assert not [a for t, a in reader.found if t in ("script", "img", "iframe") and "src" in a]
    assert {a["href"] for t, a in reader.found if "href" in a and not a["href"].startswith("#")} == {"data:,"}
    (policy,) = [a["content"] for t, a in reader.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_many_benchmarks_are_counted_in_the_title(tmp_path):
    for size in range(1, 4):
        write_run(tmp_path / "runs", digest=f"0000000{size}", batch=size)
    assert "<h1>Multi-task learning: synthetic, batch 1, synthetic, batch 2, " in write(tmp_path).read_text()
    write_run(tmp_path / "runs", digest="00000004", batch=4)
    assert "<h1>Multi-task learning: 4 benchmarks</h1>" in write(tmp_path).read_text()
