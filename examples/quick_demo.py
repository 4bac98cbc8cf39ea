"""The whole job in a minute or two, with no download: demonstrations, a base, LoRA, merge, export, predict.

A toy arm is seen from above: move its tool to the block of the named colour, then close. A small base is trained on
one set-up (`full`), and adapted to another one with other camera, background and colours (`lora32`). Each command is
printed before it runs, so that this script is also a tour of the tool. It shows that the parts fit together, not a
skill: a base of two million parameters that saw a few thousand frames is no policy.

    python examples/quick_demo.py --out demo-out
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from rlds_writer import write_rlds
from small_base import IMAGE_SIZE, make_small_base

COLOURS = {"red": (214, 48, 49), "green": (46, 160, 67), "blue": (41, 98, 214), "yellow": (240, 196, 25)}
MAX_STEPS = 14


@dataclass(frozen=True)
class SetUp:
    """What differs between two robots' worlds: the view, its colours, and how large a step is."""

    name: str
    angle: float  # of the camera, in radians
    background: tuple[int, int, int]
    tool: tuple[int, int, int]
    step: float  # largest move, in units of the table's half width


TRAINING = SetUp("table_a", 0.0, (205, 205, 200), (40, 40, 40), 0.25)
NEW_ROBOT = SetUp("table_b", 0.4, (120, 140, 165), (250, 250, 250), 0.18)


def draw(setup: SetUp, tool: NDArray, closed: bool, blocks: dict[str, NDArray]) -> NDArray[np.uint8]:
    """Return the camera's view, uint8 `[84, 84, 3]`; positions lie in [-1, 1]²."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = setup.background
    turn = np.array([[np.cos(setup.angle), -np.sin(setup.angle)], [np.sin(setup.angle), np.cos(setup.angle)]])
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]

    def pixel(position: NDArray) -> NDArray:
        return (turn @ position * 0.33 + 0.5) * IMAGE_SIZE

    for colour, position in blocks.items():
        x, y = pixel(position)
        image[(abs(columns - x) < 6) & (abs(rows - y) < 6)] = COLOURS[colour]
    x, y = pixel(tool)
    distance = np.hypot(columns - x, rows - y)
    image[distance < (3 if closed else 5)] = setup.tool
    if not closed:
        image[distance < 2.5] = setup.background
    return image


def demonstrate(setup: SetUp, generator: np.random.Generator) -> dict[str, object]:
    """Return one episode: the tool moves to the named block in steps with a little noise, then closes."""
    names = list(generator.choice(list(COLOURS), size=2, replace=False))
    while True:
        places = generator.uniform(-0.9, 0.9, size=(3, 2))
        if min(np.linalg.norm(places[i] - places[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.5:
            break
    blocks, tool = dict(zip(names, places[:2], strict=True)), places[2]
    goal = blocks[names[0]]
    frames, actions = [], []
    for _ in range(MAX_STEPS):
        offset = goal - tool
        arrived = np.linalg.norm(offset) < 0.06
        move = np.zeros(2) if arrived else offset * min(1.0, setup.step / np.linalg.norm(offset))
        frames.append(draw(setup, tool, False, blocks))
        actions.append([*move, 0, 0, 0, 0, 0.0 if arrived else 1.0])
        if arrived:
            break
        tool = tool + move + generator.normal(0, 0.01, 2)
    return {
        "action": np.asarray(actions, np.float32),
        "observation/image": np.stack(frames),
        "language_instruction": [f"touch the {names[0]} block"] * len(frames),
    }


def record(setup: SetUp, folder: Path, episodes: int, seed: int) -> Path:
    """Write demonstrations of one set-up as an RLDS dataset."""
    generator = np.random.default_rng(seed)
    return write_rlds(folder, setup.name, {"train": [demonstrate(setup, generator) for _ in range(episodes)]})


def run(*words: object) -> str:
    """Print a vlaft command, run it, and return what it printed on stdout."""
    command = ["vlaft", *map(str, words)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, check=False)
    print(" ".join(done.stdout.split()) if "--json" in words else done.stdout, flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo in that folder")
    options = parser.parse_args()
    out: Path = options.out
    if out.exists() and any(out.iterdir()):
        if not options.overwrite:
            sys.exit(f"{out} is not empty; name another folder with --out, or give --overwrite")
        shutil.rmtree(out)
    old = record(TRAINING, out / "recorded", episodes=100, seed=1)
    new = record(NEW_ROBOT, out / "recorded", episodes=40, seed=2)
    blank = make_small_base(out / "blank", [f"touch the {colour} block" for colour in COLOURS])
    quick = ("train.log_every=50", "data.augment=false", "data.workers=0", "train.evaluate_every=0")

    print("A small generalist first: everything trained on the first robot's demonstrations.")
    run("convert", old, "--base", blank, "--out", out / "data-a")
    full = ("train.steps=150", "train.batch_size=16", "train.learning_rate=1e-3")
    run("train", "--recipe", "full", "--base", blank, "--data", out / "data-a", "--out", out / "run-a", *quick, *full)
    base = out / "base"
    run("merge", out / "run-a", "--out", base)

    print("\nNow a new robot: other camera, other colours, smaller steps, 40 demonstrations.")
    data, adapted, model = out / "data-b", out / "run-b", out / "model"
    run("convert", new, "--base", base, "--out", data)
    run("report", "--base", base, "--recipe", "lora32")
    steps = ("train.steps=120", "train.batch_size=16", "train.learning_rate=5e-3", "train.evaluate_every=60")
    run("train", "--recipe", "lora32", "--base", base, "--data", data, "--out", adapted, *quick[:-1], *steps)
    run("merge", adapted, "--out", model)
    run("export", model, "--out", out / "exported", "--to", "huggingface")

    from vlaft.data.codec import encode_image

    frame = draw(NEW_ROBOT, np.array([0.5, 0.5]), False, {"red": np.array([-0.5, 0.5]), "blue": np.array([0.5, -0.6])})
    (out / "frame.png").write_bytes(encode_image(frame, "png"))
    words = ("--image", out / "frame.png", "--instruction", "touch the red block", "--json")
    answers = [json.loads(run("predict", source, *words)) for source in (adapted, model, out / "exported")]
    if any(answer["action_token_ids"] != answers[0]["action_token_ids"] for answer in answers):
        sys.exit("the adapter, the merged and the exported model disagree")
    print(f"\nAdapter, merged and exported model agree. All of it is in {out}.")


if __name__ == "__main__":
    main()
