"""The table of a paper: what it holds, that it compiles, and that no reference is made up."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import shipped
from test_report import fine
from test_report_faults import plotless  # noqa: F401
from test_report_output import baselines, crowd, write

from mtl.report import paper_table
from mtl.report.__main__ import main

ROOT = Path(__file__).parents[1]


def test_the_paper_has_one_table_with_names_arrows_and_seeds(tmp_path, plotless):  # noqa: F811
    for seed in range(3):
        write(tmp_path / "runs", "equal", seed, figures=fine(59.0 + seed, 9.0))
        write(tmp_path / "runs", "nash_mtl", seed, figures=fine(61.0 + seed, 11.0))
        write(tmp_path / "runs", "my_own", seed, figures=fine(50.0, 12.0))
    baselines(tmp_path / "runs")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--paper"]) == 0
    text = (tmp_path / "out/paper.tex").read_text()
    assert text.count(r"\begin{tabular}") == 1 and r"\label{tab:cifar100-resnet20}" in text
    assert r"accuracy (\%) $\uparrow$" in text and r"mae $\downarrow$" in text and r"\cmidrule" in text
    assert r"$\Delta_m$ (\%) $\uparrow$" in text and "over 3 seeds (0, 1, 2)" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("Nash-MTL"))
    # Δm by hand: (62 / 60 − 1) / 2 − (11 / 10 − 1) / 2 = −3.33 %
    assert r"Nash-MTL~\cite{navon2022nash} & \textbf{62.00} {\scriptsize$\pm$1.00} & 11.00" in row and "-$3.33" in row
    assert r"Equal weighting~\cite{kurin2022unitary}" in text and r"my\_own &" in text and "Single-task & 60.00" in text
    cited = {key for keys in re.findall(r"\\cite\{(.*?)\}", text) for key in keys.split(",")}
    entries = re.findall(r"^@\w+\{(\w+),", (tmp_path / "out/methods.bib").read_text(), re.M)
    assert cited <= set(entries) and len(entries) == len(set(entries))


def test_names_and_references_are_of_methods():
    """A method without a row in methods.csv stands in the table with its option's name, and without a citation."""
    options = {*shipped.options("loss")}
    known = paper_table._methods()
    assert set(known) <= options, "mtl/report/methods.csv names a method that is gone"
    keys = {row["key"] for row in paper_table._read("references.csv")}
    used = {key for _, found in known.values() for key in found}
    assert used == keys - {"maninis2019astmt"}, "a reference that nobody cites; Δm has its own"
    without = {m for m, (_, found) in known.items() if not found}
    assert without == {"custom", "single", *(m for m in options if m.startswith("annealed_"))}


def test_the_references_say_what_the_sources_say():
    """Titles, first authors, years and numbers of arXiv are those in the headers of the methods: none is made up."""
    sources = [*shipped.files("mtl/losses/*.py"), ROOT / "mtl/report/multitask.py"]
    said = " ".join(" ".join(f.read_text() for f in sources).split())
    for row in paper_table._read("references.csv"):
        title = row["title"].removeprefix("The ")
        places = [said[max(0, m.start() - 90) : m.end() + 60] for m in re.finditer(re.escape(title), said)]
        authors = [author.partition(",")[0] for author in row["authors"].split(" and ")]
        found = [p for p in places if row["year"] in p and row["venue"] in p and authors[0] in p]
        assert found, (row, places)
        numbers = {n for p in found for n in re.findall(rf"{row['year']} \(arXiv (\d+\.\d+)\)", p)}
        assert numbers <= {row["arxiv"]}, row


# One entry of BibTeX: a kind, a key, fields whose values are balanced braces.
_VALUE = r"\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}"
_ENTRY = rf"@(inproceedings|article|misc)\{{(\w+),\n((?:  \w+ = {_VALUE},\n)+)\}}\n"


def test_the_bibliography_is_bibtex_with_whole_author_lists():
    text = paper_table.bibliography()
    entries = re.findall(_ENTRY, text)
    assert len(entries) == text.count("@") >= 40 and text.isascii()
    assert re.sub(_ENTRY, "", text).strip() == paper_table.HEAD.strip()
    for kind, key, block in entries:
        fields = dict(re.findall(rf"  (\w+) = ({_VALUE}),\n", block))
        needed = {"inproceedings": "booktitle", "article": "journal", "misc": "eprint"}[kind]
        assert {"author", "title", "year", needed} <= set(fields), key
        assert re.fullmatch(r"\{(19|20)\d\d\}", fields["year"]) and fields["title"].startswith("{{")
        assert re.fullmatch(r"\{\d{4}\.\d{5}\}", fields.get("eprint", "{0000.00000}"))
        names = fields["author"][1:-1].split(" and ")
        assert all(re.fullmatch(r"[^,]+, [^,]+", name) for name in names) and "others" not in names, key
        assert key.startswith(re.sub(r"[^a-z]", "", names[0].partition(",")[0].lower())[:3]), key
    bib = {key: block for _, key, block in entries}
    assert "Navon, Aviv and Shamsian, Aviv and Achituve, Idan and Maron, Haggai" in bib["navon2022nash"]
    assert r"D{\'{e}}sid{\'{e}}ri, Jean-Antoine" in bib["desideri2012mgda"]


@pytest.mark.skipif(
    not shutil.which("pdflatex"), reason="no pdflatex; on Debian: apt-get install texlive-latex-recommended"
)
def test_the_table_compiles(tmp_path, plotless):  # noqa: F811
    for seed in range(3):
        write(tmp_path / "runs", "equal", seed)
        write(tmp_path / "runs", "dwa", seed, loss__temperature=2.0)
        write(tmp_path / "runs", "dwa", seed, loss__temperature=1.0)
    baselines(tmp_path / "runs")
    crowd(tmp_path / "runs")
    write(tmp_path / "runs", "mgda", 0, status="diverged", error="x")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--paper"]) == 0
    (tmp_path / "out/main.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{paper}\nocite{*}"
        r"\bibliographystyle{plain}\bibliography{methods}\end{document}"
    )
    latex = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main"]
    for words in (latex, ["bibtex", "main"], latex, latex):
        done = subprocess.run(words, cwd=tmp_path / "out", capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stdout[-2000:]
    assert "undefined" not in done.stdout and "Overfull" not in done.stdout and "Warning" not in done.stdout
