"""The page of `vlaft inspect --html`: what it says of a small file, and that names from data are only names."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from html_page import Page

from vlaft.cli.main import main
from vlaft.inspection.facts import FRAMES_PER_EPISODE

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


def write_demonstrations(file: Path, episode: str, camera: str) -> None:
    """Write two episodes of six steps: a two-dimensional action and one camera."""
    noise = np.random.default_rng(0)
    with h5py.File(file, "w") as root:
        for number in range(2):
            group = root.create_group(f"episodes/{episode}{number}")
            group["action"] = noise.normal(size=(6, 2))
            group[camera] = noise.integers(0, 256, size=(6, 16, 24, 3), dtype=np.uint8)


def page_of(file: Path, camera: str, *words: str) -> tuple[str, Page]:
    settings = ["episodes=episodes/*", "action=[action]", f"cameras={{{camera}}}", *words]
    out = file.with_name("page.html")
    assert main(["inspect", str(file), *settings, "--html", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    return text, Page(text)


def test_the_page_tells_what_was_found(tmp_path: Path) -> None:
    write_demonstrations(tmp_path / "demos.hdf5", "demo_", "front")
    _, page = page_of(tmp_path / "demos.hdf5", "main: front", "instruction=push it", "fps=5")  # nothing to warn of
    for said in (
        "format hdf5",
        "episodes 2 ",
        "steps 12 (6 to 6 per episode)",
        "control rate 5 Hz",
        "cameras front (16×24×3 as main)",
        "instructions push it (2 episodes)",
        "action 2 dimensions of action",
        f"Up to {FRAMES_PER_EPISODE} frames per episode, from the first to the last.",
        "Counts on a logarithmic scale; dashed: q01 and q99, between which training clips.",
        "# name mean std min q01 q99 max clipped",
    ):
        assert said in page.text, said
    assert page.headings == ["Warnings", "Frames", "Lengths", "Actions over time", "The action as converted"]
    assert page.alts[:2] == ["front, demo_0", "front, demo_1"]


def test_names_from_data_stay_text(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "\N{DIVISION SLASH}")  # a name in HDF5 has no slash
    write_demonstrations(tmp_path / "demos.hdf5", name, "front")
    text, page = page_of(tmp_path / "demos.hdf5", "main: front", f"instruction={HOSTILE}")
    assert "<script" not in text and not {"script", "onerror"} & {*page.tags}
    assert all(link.startswith("data:") for link in page.links)
    assert page.text.count(HOSTILE) >= 3  # the instruction: in the overview and beside each episode's frames
    assert "type <code>fps=10</code>" in text  # what is to be typed about a warning
    assert page.alts[0] == f"front, {name}0"
