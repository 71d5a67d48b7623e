"""The command line end to end on procedural data."""

import json


def run_directory(root):
    (file,) = root.rglob("run.json")
    return file.parent


def test_a_run_writes_every_file_and_is_skipped_when_repeated(smoke, tmp_path):
    first = smoke("loss=pcgrad")
    assert first.code == 0, first.err
    directory = run_directory(tmp_path / "out")
    assert directory.parts[-5:-2] == ("synthetic", "resnet20", "pcgrad")
    assert directory.name == "seed42"
    for name in ("config.yaml", "run.json", "metrics.jsonl", "summary.json", "last.pt", "best.pt", "train.log"):
        assert (directory / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["lr"] == 0.05  # half-way down the cosine
    again = smoke("loss=pcgrad")
    assert again.code == 0 and "finished" in again.out and "epoch 1/2" not in again.out
