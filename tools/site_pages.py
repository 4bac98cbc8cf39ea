"""A hook of mkdocs (see mkdocs.yml): the pages of the site that no file in docs/ has.

The help of every command, written by typer from the commands themselves; and the documents of the repository's root.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to those of the docs folder."""
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    for document, page in DOCUMENTS.items():
        files.append(File.generated(config, page, content=site_page(document)))
    return files


def commands_page() -> str:
    """Return the help of every command as Markdown."""
    words = [sys.executable, "-m", "typer", "vlaft.cli.main", "utils", "docs", "--name", "vlaft", "--title", "Commands"]
    page = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    # typer's overview cuts sentences off, and the page's table of contents names every command
    page = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n?", "", page)
    return re.sub(r"^Example: (.*)$", r"Example:\n\n```console\n$ \1\n```", page, flags=re.MULTILINE)


def site_page(document: str) -> str:
    """Return a document of the root with its links as they are within the site."""
    text = (ROOT / document).read_text(encoding="utf-8").replace("](docs/", "](")
    for name, page in DOCUMENTS.items():
        text = text.replace(f"]({name})", f"]({page})")
    return text
