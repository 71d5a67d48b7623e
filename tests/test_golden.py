"""Each method, network and sharing scheme trains as it did: in float64, on any CPU, against tests/golden/*.json.

tests/test_golden_variants.py has the other half, so that two processes share the work.
"""

import os

import pytest
from golden.cases import FAMILIES
from golden.check import check, load, tidy


@pytest.mark.parametrize("case", sorted(FAMILIES["losses"]))
def test_losses(case, cli, tmp_path, monkeypatch):
    check("losses", case, cli, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", sorted(FAMILIES["archs"]))
def test_archs(case, cli, tmp_path, monkeypatch):
    check("archs", case, cli, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", sorted(FAMILIES["sharing"]))
def test_sharing(case, cli, tmp_path, monkeypatch):
    check("sharing", case, cli, tmp_path, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_trace_is_left_over(family):
    if os.environ.get("GOLDEN"):
        tidy(family)
        return  # `make lists` has not come to all new traces yet: "missing" and "variants" are in the next file
    assert sorted(load(family)) == sorted(FAMILIES[family]), "run: make lists"
