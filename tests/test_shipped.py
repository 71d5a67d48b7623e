"""A user's own addition to a checkout leaves the suite green: tests look at what git tracks."""

import re
import subprocess

import pytest
import shipped


@pytest.fixture
def checkout(tmp_path):
    """A folder with an option of ours and one of a user's own."""
    loss = tmp_path / "conf" / "loss"
    loss.mkdir(parents=True)
    (loss / "ours.yaml").touch(), (loss / "mine.yaml").touch()
    return tmp_path


def names(root):
    return [file.stem for file in shipped.files("conf/loss/*.yaml", root)]


def test_only_what_git_tracks_is_tested(checkout):
    for words in (["init", "-q"], ["add", "conf/loss/ours.yaml"]):
        subprocess.run(["git", "-C", str(checkout), *words], check=True)
    assert names(checkout) == ["ours"]


def test_where_git_cannot_tell_all_files_are_tested(checkout):
    """No git, as in a downloaded archive; or the folder lies in another repository, which does not track it."""
    assert names(checkout) == ["mine", "ours"]
    shipped.tracked.cache_clear()
    subprocess.run(["git", "-C", str(checkout.parent), "init", "-q"], check=True)
    assert names(checkout) == ["mine", "ours"]


def test_no_test_lists_the_checkout_by_itself():
    """The tests of the wheel may: it holds a user's own files, too."""
    listing = re.compile(r"""(ROOT|CONF|DOCS|parents\[\d\]).*\.r?glob\(""")
    found = [
        f"{file.name}: {line.strip()}"
        for file in sorted(shipped.ROOT.glob("tests/**/*.py"))
        for line in file.read_text().splitlines()
        if listing.search(line) and file.name not in ("shipped.py", "test_shipped.py", "test_wheel.py")
    ]
    assert found == [
        'cases.py: return sorted(file.stem for file in (shipped.ROOT / "conf" / group).glob("*.yaml"))',
        'test_certify.py: written = {file.name: file.read_text() for file in pages.DOCS.glob("*.md")}',
    ]
