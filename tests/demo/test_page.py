"""The demo's page: what it says of a made-up demo, and what it leaves out."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from PIL import Image

from vlaft.demo.page import render
from vlaft.demo.results import Command, Cost, DemoResult, SeedResult, Success


def outcomes(successes: int, others: int, seed: int, episodes: int = 100) -> dict[str, Any]:
    """Return what `vlaft evaluate --env --json` prints: successes first, then other objects, then nothing."""
    ends = [("red", True, 14)] * successes + [("blue", False, 17)] * others
    ends += [(None, False, 30)] * (episodes - len(ends))  # type: ignore[list-item]
    episodes_of = [
        {"seed": seed + number, "instruction": "pick up the red disc", "success": success, "steps": steps}
        | {"info": {"instruction": "pick up the red disc", "success": success, "picked_up": picked}}
        for number, (picked, success, steps) in enumerate(ends)
    ]
    model = {"model": "m", "successes": successes, "episodes": episodes, "outcomes": episodes_of}
    return {"env": "tabletop", "seed": seed, "models": [model]}


def write_seed(folder: Path, seed: int, before: int, after: int) -> SeedResult:
    folder.mkdir(parents=True, exist_ok=True)
    for name, successes, others in (("before", before, 30), ("after", after, 5)):
        (folder / f"{name}.json").write_text(json.dumps(outcomes(successes, others, 1000 * seed)))
    lines: list[dict[str, Any]] = []
    for step in (1, *range(20, 301, 20)):
        values = {"loss": 5 / step, "action_accuracy": step / 400, "action_l1": 1 / step, "learning_rate": 0.005}
        lines.append({"step": step, **values, "grad_norm": 2.0, "memory_bytes": None, "seconds_left": 3.0})
        if step % 100 == 0:
            held_out = {"val_loss": 1.5, "val_action_accuracy": 0.6123, "val_action_l1": 0.0456}
            lines.append({"step": step, **held_out, "best": True})
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = Success(before, 100, "base"), Success(after, 100, "run")
    return SeedResult(seed, folder, *counts, train_seconds=40.0 + seed)


def write_pictures(folder: Path) -> None:
    for name in ("before", "after"):
        (folder / name).mkdir()
        shots = [Image.new("RGB", (24, 16), colour) for colour in ("red", "green", "blue")]
        shots[0].save(folder / name / "episodes.gif", save_all=True, append_images=shots[1:], duration=100)
        Image.new("RGB", (40, 20)).save(folder / name / "episodes.png")
    (folder / "held-out").mkdir()
    for name in ("episode-0000", "episode-0003", "errors"):
        Image.new("RGB", (30, 30)).save(folder / f"held-out/{name}.png")


def demo(out: Path, afters: tuple[int, ...] = (81,)) -> DemoResult:
    seeds = [
        write_seed(out if number == 1 else out / f"seed-{number}", number, 10 + number, after)
        for number, after in enumerate(afters, start=1)
    ]
    commands = (
        Command("vlaft train --recipe lora32 --out demo-out/run", 43.2),
        Command("vlaft merge demo-out/run --out demo-out/model", 3.14),
    )
    cost = Cost(312_448, 2_312_345, 143_100_000, 147_400_000)
    success = Success(80, 100, "demo-out/model"), Success(76, 100, "demo-out/model-nf4")
    return DemoResult(out, "lora32", 50, 612, cost, tuple(seeds), *success, commands)


def test_the_page_tells_what_was_measured(tmp_path: Path) -> None:
    result = demo(tmp_path)
    write_pictures(tmp_path)
    text = render(result)
    page = Page(text)
    assert (
        "With 50 demonstrations of a new robot, success went from 11.0 % (6.3 to 18.6 %) to 81.0 % (72.2 to 87.5 %)"
        in page.text
    )
    for said in (
        "100 episodes before and 100 after, 1 training seed, recipe lora32",
        "The two intervals do not overlap.",
        "promises no figure",
        "a model of 2.3 million parameters say little of a model of seven billion",
        "312,448 of 2,312,345 parameters (13.5 %)",
        "143.1 MB",
        "147.4 MB (3.0 % more)",
        "time of training 41 s",
        "50 (612 frames)",
        "merged 80.0 % 71.1 to 86.7 % 80 of 100 yes, with adapted",
        "exported to nf4 76.0 % 66.8 to 83.3 % 76 of 100 yes, with adapted",
        "picked up another object 30 (30.0 %) 5 (5.0 %)",
        "picked up nothing within 30 steps 59 (59.0 %) 14 (14.0 %)",
        "70 that failed before succeeded after, and 0 the other way round",
        "Held out, at step 300: 61.2 % of action tokens exactly right, L1 0.0456",
        "1 further episode",
        "46 s in all",
        "43 s vlaft train --recipe lora32 --out demo-out/run",
        "vlaft serve demo-out/model",
        "vlaft evaluate demo-out/model --env tabletop",
    ):
        assert said in page.text, said
    assert page.headings == [
        *("Success", "Films", "How episodes ended", "What it cost", "Training", "Predicted against demonstrated"),
        *("The commands that were run", "What to type next"),
    ]


def test_the_page_is_self_contained_and_its_pictures_open(tmp_path: Path) -> None:
    result = demo(tmp_path)
    write_pictures(tmp_path)
    text = render(result)
    page = Page(text)
    assert not re.search(r"https?:|//cdn|<script|@import|url\(", text)
    assert "script" not in page.tags and all(link.startswith("data:") for link in page.links)
    kinds = []
    for link in page.links:
        if link.startswith("data:image/"):
            with Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) as image:
                image.load()
                kinds.append(image.format)
                assert image.format != "GIF" or getattr(image, "n_frames", 1) == 3
    # two films; a contact sheet, three curves, three of held-out examples
    assert kinds.count("GIF") == 2 and kinds.count("PNG") == 7
    assert len(page.alts) == 9 and all(page.alts)


def test_what_is_missing_or_damaged_is_left_out(tmp_path: Path) -> None:
    result = demo(tmp_path)
    (tmp_path / "run/log.jsonl").write_text("{half\n")
    (tmp_path / "after.json").write_text('{"models": [')
    page = Page(render(replace(result, commands=(), exported=None)))
    assert page.headings == ["Success", "What it cost", "What to type next"]
    assert "exported" not in page.text and "needs bitsandbytes" in page.text and not page.alts
    (tmp_path / "after").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "after/episodes.png")
    page = Page(render(result))
    assert "frame by frame" in page.text and "same on both sides" not in page.text and len(page.alts) == 1


def test_several_seeds_are_pooled_above_and_told_apart_below(tmp_path: Path) -> None:
    result = demo(tmp_path, (81, 90, 75))
    write_pictures(tmp_path / "seed-2")
    page = Page(render(result))
    assert "from 12.0 % (8.8 to 16.2 %) to 82.0 % (77.3 to 85.9 %)" in page.text
    assert "3 training seeds of 50 demonstrations each" in page.text and "say nothing of how seeds differ" in page.text
    assert "Success of seed 1" in page.headings and "Training seeds" in page.headings
    assert "2 12.0 % (7.0 to 19.8 %) 90.0 % (82.6 to 94.5 %) 100 42 s" in page.text
    assert "mean 12.0 % (9.5 to 14.5 %) 82.0 % (63.2 to 100.0 %)" in page.text
    assert "The first episodes of seed 2" in page.text and "3 seeds over each other" in page.text
    assert "picked up the named object 36 (12.0 %) 246 (82.0 %)" in page.text


@pytest.mark.parametrize(
    ("after", "said"),
    [(15, "does not show that success changed"), (1, "the adapted model does worse"), (95, "The two intervals do not")],
)
def test_the_verdict_is_that_of_the_intervals(after: int, said: str, tmp_path: Path) -> None:
    result = demo(tmp_path)
    seeds = (replace(result.seeds[0], before=Success(12, 100), after=Success(after, 100)),)
    text = Page(render(replace(result, seeds=seeds))).text
    assert said in text and ("do not overlap" in text) == (after != 15)


def test_text_is_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('$x_1')</script>\"&"
    result = demo(tmp_path)
    commands = (Command(f"vlaft train --recipe '{hostile}'", 1.0),)
    merged = Success(1, 2, f"out/{hostile}")
    result = replace(result, recipe=hostile, commands=commands, merged=merged, out=tmp_path / "<b onclick=x>")
    text = render(result)
    page = Page(text)  # which refuses attributes like onclick
    assert "<script" not in text and "script" not in page.tags
    assert page.text.count(hostile) == 2  # the recipe and the command; the model is quoted for the shell besides
    assert page.text.count("<script>") == 4 and "<b onclick=x>" in page.text


def test_episodes_of_unknown_ends_and_other_seeds(tmp_path: Path) -> None:
    result = demo(tmp_path)
    before, after = outcomes(10, 0, 0), outcomes(50, 0, 7)
    for outcome in after["models"][0]["outcomes"]:
        del outcome["info"]["picked_up"]
    (tmp_path / "before.json").write_text(json.dumps(before))
    (tmp_path / "after.json").write_text(json.dumps(after))
    text = Page(render(result)).text
    assert "failed, and the log does not say how 0 (0.0 %) 50 (50.0 %)" in text
    assert "Episode by episode" not in text  # the seeds of the scenes differ
