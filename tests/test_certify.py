"""The certificates on disk are those of this code, and a method that is not what it claims makes them fail."""

import pytest

from mtl import certify
from mtl.config.errors import UserError
from mtl.losses import CAGrad, UPGrad


def test_every_page_is_up_to_date_and_every_claim_holds(capsys):
    assert certify.main(["check"]) == 0, capsys.readouterr().err


def test_a_claim_that_does_not_hold_is_named(monkeypatch, capsys):
    monkeypatch.setattr(CAGrad, "claims", ("non_conflicting",))
    assert certify.main(["loss=cagrad"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: cagrad claims to be non conflicting and is not\n"
    assert captured.out.startswith("# `loss=cagrad`")


def test_a_broken_method_loses_its_properties(monkeypatch):
    honest = UPGrad.weights
    monkeypatch.setattr(UPGrad, "weights", lambda self, *args: honest(self, *args).flip(0))
    broken = certify.certify("upgrad")
    assert broken.failed == ["linear", "non_conflicting"]


def test_a_stale_page_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(certify, "DOCS", tmp_path)
    monkeypatch.setattr(certify, "names", lambda: ["equal"])
    assert certify.main([]) == 0
    assert certify.main(["check"]) == 0
    (tmp_path / "equal.md").write_text("old")
    (tmp_path / "gone.md").write_text("a method that is no more")
    assert certify.main(["check"]) == 1
    assert [line.split(";")[0] for line in capsys.readouterr().err.splitlines()] == [
        "stale: docs/methods/equal.md",
        "stale: docs/methods/gone.md",
    ]


@pytest.mark.parametrize("words", [["loss=cagrat"], ["los=cagrad"]])
def test_a_mistyped_method_gets_one_line(words):
    with pytest.raises(UserError, match=r"did you mean cagrad|not understood") as error:
        certify.main(words)
    assert "\n" not in str(error.value)
