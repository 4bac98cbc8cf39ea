"""The commands of the documents run in a checkout as they are written, on what docs/samples.md makes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from vlaft.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = ("evaluation", "export", "inference", "recipes")
# needs the Hub, another page's files, an extra; or many episodes (tests/training/test_success.py runs a few)
ELSEWHERE = ("--push", "--env", "tests/data/", "trackers", "evaluate_env")


def commands(page: str) -> list[str]:
    """Return the lines of a page that are shell commands, fenced or indented."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [re.sub(r"\s{5,}.*", "", line.strip()) for line in re.findall(r"^(?: {4})?(vlaft .*)$", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of docs/samples.md were run, with the checkout's `tests` in it."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "tests").symlink_to(REPOSITORY / "tests")
    (block,) = re.findall(r"```bash\n(.*?)```", (DOCS / "samples.md").read_text(encoding="utf-8"), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in block.splitlines():
            if line.startswith("vlaft "):
                assert main(shlex.split(line)[1:]) == 0, line
            else:
                subprocess.run(["bash", "-ec", line], check=True, cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(job)
    found = [line for line in commands(page) if not any(word in line for word in ELSEWHERE)]
    assert found
    for line in found:
        words = shlex.split(line.replace("openvla/openvla-7b", "base/"))[1:]
        if words[0] == "train":
            words += ["train.steps=1", "train.batch_size=1"]
        if words[0] == "merge":  # docs/samples.md did that
            assert words == ["merge", "run/", "--out", "model/"] and (job / "model/config.json").is_file()
        else:
            assert main(words) == 0, line


def test_no_document_names_a_path_outside_the_checkout() -> None:
    for page in [REPOSITORY / "README.md", *DOCS.glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        assert "../shared" not in text, page.name
        for path in re.findall(r"(?<![\w/])(?:tests|tools|benchmarks|recipes)/[\w./-]+\w", text):
            assert (REPOSITORY / path).exists(), f"{page.name}: {path}"


def test_what_the_code_cites_of_upstream_is_there() -> None:
    headings = re.findall(r"^#+ (.*)$", (DOCS / "upstream.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = []
    for file in [*(REPOSITORY / "vlaft").rglob("*.py"), *(REPOSITORY / "tests").rglob("test_*.py")]:
        text = file.read_text(encoding="utf-8")
        cited += re.findall(r"docs/upstream\.md,\s+([A-Z][\w' ]*\w)", text)
    assert len(cited) >= 10
    assert {name for name in cited if name not in headings} == set()
