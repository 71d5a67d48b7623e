"""As tests/test_golden.py: each method where labels are missing, and variants of the step, the optimizer, the data."""

import pytest
from golden.cases import FAMILIES
from golden.check import check


@pytest.mark.parametrize("case", sorted(FAMILIES["missing"]))
def test_missing(case, cli, tmp_path, monkeypatch):
    check("missing", case, cli, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", sorted(FAMILIES["variants"]))
def test_variants(case, cli, tmp_path, monkeypatch):
    check("variants", case, cli, tmp_path, monkeypatch)
