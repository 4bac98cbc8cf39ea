"""What is measured on held-out demonstrations, and that models and data that don't fit are told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from golden_models import NAMES, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from small_base import convert_small, write_small_base

from vlaft.action.metrics import f1_score, measure_actions
from vlaft.action.statistics import compute_statistics
from vlaft.action.tokens import ActionTokenizer
from vlaft.action.written import Written
from vlaft.checksums import checksum, sealed
from vlaft.cli.console import show
from vlaft.cli.evaluate import by_step
from vlaft.cli.main import main
from vlaft.data.codec import encode_image
from vlaft.data.convert.run import ConvertRequest, SourceRequest, convert
from vlaft.data.held_out import HeldOut
from vlaft.data.store import ConvertedDataset, example_schema, shard_entry, write_shard
from vlaft.errors import CheckpointError, ConfigError, DataError
from vlaft.evaluation.offline import Evaluation, check_models, evaluate
from vlaft.evaluation.plots import draw_episode, draw_evaluations, draw_steps
from vlaft.files import write_json
from vlaft.model.generation import decode_both, generate_action_ids
from vlaft.pages.curves import LOG_FILE
from vlaft.policy import load

ACTIONS = ActionTokenizer(512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return write_small_base(folder / "base")


@pytest.fixture(scope="module")
def data(folder: Path, base: Path) -> Path:
    return convert_small(base, folder / "data")


def train(base: Path, data: Path, out: Path, *words: str) -> Path:
    always = [
        "train.steps=3",
        "train.batch_size=4",
        "train.evaluate_every=3",
        "data.workers=0",
        "data.val_examples=null",
    ]
    command = ["train", "--base", str(base), "--data", str(data), "--out", str(out), *always, *words]
    assert main(command) == 0
    return out


@pytest.fixture(scope="module")
def run(folder: Path, base: Path, data: Path) -> Path:
    """Trained without augmentation, so used without a crop, as its own evaluations are."""
    return train(base, data, folder / "run", "--recipe", "lora8", "data.augment=false")


@pytest.fixture(scope="module")
def held_out(data: Path) -> HeldOut:
    return HeldOut.open([data])


@pytest.mark.parametrize("name", NAMES)
def test_both_ways_of_decoding_are_those_of_the_model(name: str) -> None:
    """Rows of different lengths, one of them without padding."""
    case = golden(name)
    model, batch = case.load(), case.batch
    lengths = case.expected["prompt_lengths"]
    assert len(set(lengths)) > 1
    prompts = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(prompts)
    targets = torch.stack([row[row != -100][:7] for row in batch["labels"]])
    for row, length in enumerate(lengths):
        prompts[row, :length] = batch["input_ids"][row, :length]
        mask[row, :length] = 1
    forced, free = decode_both(model, prompts, mask, batch["pixel_values"], targets)
    assert free.tolist() == case.expected["generated"]
    assert free.equal(generate_action_ids(model, prompts, batch["pixel_values"], mask, num_tokens=7))
    output = model(**batch)
    by_row = output.logits.argmax(dim=-1)
    counts = [int((row != -100).sum()) for row in batch["labels"]]
    expected = [part[:7] for part in by_row.split(counts)]
    for row, length in enumerate(lengths):
        first = int((batch["labels"][row] != -100).nonzero()[0])
        if first == length:  # the golden prompt is the one that the labels follow
            assert forced[row].equal(expected[row])
    assert any(int((row != -100).nonzero()[0]) == length for row, length in zip(batch["labels"], lengths, strict=True))


def test_teacher_forcing_on_its_own_tokens_is_free_running() -> None:
    case = golden("single")
    model, batch = case.load(), case.batch
    prompts, pixels = batch["input_ids"][:, :5], batch["pixel_values"]
    _, free = decode_both(model, prompts, torch.ones_like(prompts), pixels, torch.zeros(3, 7, dtype=torch.int64))
    forced, again = decode_both(model, prompts, torch.ones_like(prompts), pixels, free)
    assert forced.equal(free) and again.equal(free)
    one, same = decode_both(model, prompts, torch.ones_like(prompts), pixels, free[:, :1])
    assert one.equal(free[:, :1]) and same.equal(one)


def test_measures_by_hand() -> None:
    low, high = 511, 256  # ids of the first and the last bin; 257 decodes to the same as 256
    targets = np.array([[low, 400, high], [low, 400, low]])
    ids = np.array([[low - 1, 400, 257], [7, 402, low]])  # one bin off; no action; two bins off
    demonstrated = np.array([[-1, 0, 1], [-1, 0, 0]], np.float32)
    predicted = np.array([[-0.9, 0.1, 0.9], [1.0, -0.3, 0.2]])
    written, target = (Written(ACTIONS.decode(i), i, ACTIONS.is_action(i)) for i in (ids[:, None], targets[:, None]))
    centers = ACTIONS.centers
    measure = partial(measure_actions, written, target, predicted[:, None], demonstrated[:, None])
    metrics = measure(ends=(centers[0], centers[-1]), names=["x", "y", "gripper"], gripper=True)
    x, y, gripper = metrics.dimensions
    assert (x.token_accuracy, y.token_accuracy, gripper.token_accuracy) == (0.0, 0.5, 0.5)
    assert (x.within_one_bin, y.within_one_bin, gripper.within_one_bin) == (0.5, 0.5, 1.0)
    assert (x.non_action, y.non_action, gripper.non_action) == (0.5, 0.0, 0.0)
    assert (x.saturated, y.saturated, gripper.saturated) == (0.0, 0.0, 1.0)
    assert (x.saturated_demonstrated, y.saturated_demonstrated) == (1.0, 0.0)
    width = 2 / 255
    assert x.l1_normalized == pytest.approx((width + 254 * width) / 2)  # no action is decoded to the far end
    assert y.l1_normalized == pytest.approx(width) and gripper.l1_normalized == 0.0
    assert [x.l1_robot, y.l1_robot, gripper.l1_robot] == pytest.approx([1.05, 0.2, 0.15])
    assert metrics.gripper_f1 == 1.0
    assert metrics.overall.token_accuracy == pytest.approx(1 / 3) and metrics.overall.l1_robot is None
    no_gripper = measure(ends=(centers[0], centers[-1]), names=["a", "b", "c"], gripper=False)
    assert no_gripper.gripper_f1 is None and no_gripper.dimensions[2].name == "c"


def written_chunks(held_out: HeldOut, name: str, chunk: int) -> Evaluation:
    """A model whose error grows by 0.1 with each step of the chunk, in every dimension."""
    demonstrated = held_out.chunks(held_out.chosen, chunk)
    grows = np.broadcast_to(0.1 * np.arange(1, chunk + 1)[:, None], demonstrated.shape)
    target, written = Written(demonstrated * 1.0), Written(demonstrated + grows)
    names, gripper = held_out.names, held_out.gripper
    metrics = measure_actions(
        written, target, written.actions, demonstrated, ends=(-1.0, 1.0), names=names, gripper=gripper
    )
    return Evaluation(name, None, metrics, "model", 1.0, written.actions, grows, None)


def test_each_step_of_a_chunk_is_measured(data: Path) -> None:
    held_out = HeldOut.open([data], chunk=4)
    metrics = written_chunks(held_out, "m", 4).free_running
    assert [step.overall.l1_normalized for step in metrics.steps] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert metrics.overall.l1_normalized == pytest.approx(0.25)
    for step in metrics.steps:
        assert [each.name for each in step.dimensions] == [each.name for each in metrics.dimensions]
        assert step.dimensions[3].l1_robot == pytest.approx(step.overall.l1_normalized) and not step.steps
    assert written_chunks(held_out, "m", 1).free_running.steps == ()


def test_chunks_are_drawn_from_their_start_over_the_demonstration(data: Path, tmp_path: Path) -> None:
    held_out = HeldOut.open([data], "train", chunk=3)
    chunked, single = written_chunks(held_out, "chunked", 3), written_chunks(held_out, "single", 1)
    axis = draw_episode(held_out.episodes[1], [chunked, single], held_out).axes[2]
    demonstration, *acted, alone = axis.get_lines()
    assert demonstration.get_xdata().tolist() == list(range(8)) and alone.get_xdata().tolist() == list(range(6))
    assert [line.get_xdata().tolist() for line in acted] == [[0, 1, 2], [3, 4, 5]]  # then too few steps are left
    (thin,) = axis.collections
    assert [segment[:, 0].tolist() for segment in thin.get_segments()] == [[s, s + 1, s + 2] for s in (1, 2, 4, 5)]
    for line in acted:
        steps = line.get_xdata().astype(int)
        assert line.get_ydata() - demonstration.get_ydata()[steps] == pytest.approx([0.1, 0.2, 0.3])
    files = draw_evaluations(tmp_path / "plots", [chunked, single], held_out, episodes=1)
    assert [file.name for file in files] == ["episode-0000.png", "errors.png", "steps.png"]
    mean, first = draw_steps([chunked, single], held_out).axes[0].get_lines()
    assert mean.get_ydata() == pytest.approx([0.1, 0.2, 0.3]) and first.get_ydata() == pytest.approx([0.1])
    draw_evaluations(tmp_path / "plots", [single], held_out, episodes=1)
    assert not (tmp_path / "plots/steps.png").exists()


def test_a_table_tells_the_steps_of_chunks(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = HeldOut.open([data], chunk=3)
    show(by_step([written_chunks(held_out, "runs/chunked", 3), written_chunks(held_out, "runs/single", 1)]))
    heading, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heading[:3] == ["step", "model", "all"] and len(heading) == 10
    assert [row[:3] for row in rows] == [
        ["1", "chunked", "0.1000"], ["1", "single", "0.1000"], ["2", "chunked", "0.2000"], ["3", "chunked", "0.3000"]
    ]  # fmt: skip


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs: list[tuple[bool, bool]]) -> None:
    predicted, demonstrated = np.array(pairs).T
    value = f1_score(predicted, demonstrated)
    hits = int((predicted & demonstrated).sum())
    if not predicted.any() and not demonstrated.any():
        assert value is None
    elif not hits:
        assert value == 0.0
    else:
        precision, recall = hits / predicted.sum(), hits / demonstrated.sum()
        assert value == pytest.approx(2 * precision * recall / (precision + recall))


def test_held_out_examples(data: Path, held_out: HeldOut) -> None:
    dataset = ConvertedDataset(data)
    assert len(held_out) == dataset.rows("val") == 8 and len(held_out.episodes) == 1
    assert held_out.gripper  # unnamed, but its last dimension lies in 0..1
    assert held_out.names == tuple("0123456") and held_out.frame.tolist() == list(range(8))
    row = dataset.row("val", 5)
    assert held_out.action[5].tolist() == row["action"] and held_out.prompts[5] == row["prompt_token_ids"]
    assert held_out.images([5, 0]).shape == (2, 56, 56, 3)
    training = HeldOut.open([data, data], "train", limit=10)
    assert len(training) == 10 and len(training.action) == 80 and len(training.episodes) == 10
    assert training.chosen[0] == 0 and training.chosen[-1] == 79
    assert np.array_equal(training.images([3])[0], training.images([43])[0])  # the same folder twice
    with pytest.raises(ConfigError, match="split 'test' is not known: give train or val"):
        HeldOut.open([data], "test")
    with pytest.raises(ConfigError, match="a limit of 0 examples"):
        HeldOut.open([data], limit=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"action": None}, "demo_0, step 3: its action, prompt or place is missing"),
        ({"action": [0.0] * 6 + [float("nan")]}, "step 3: its action, prompt or place is missing or not finite"),
        ({"action": [0.0] * 5}, r"actions of \[5, 7\] dimensions"),
        ({"prompt_token_ids": []}, "its action, prompt or place is missing"),
        ({"prompt_token_ids": [1, 10**6]}, "a prompt has tokens that .* does not have"),
        ({"dataset": "other"}, "it has no statistics of 'other'"),
        ({"image": None}, "step 3: the row has no image"),
        (
            {"image": {"bytes": encode_image(np.zeros((8, 9, 3), np.uint8), "png"), "path": None}},
            "8 x 9 pixels where 56",
        ),
        ({"image": {"bytes": b"no picture", "path": None}}, "step 3"),
    ],
)
def test_damaged_rows(base: Path, data: Path, tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    source = ConvertedDataset(data)
    rows = [source.row("val", number) | {"source": "demo_0"} for number in range(8)]
    rows[3] = rows[3] | change
    copy = shutil.copytree(data, tmp_path / "data")
    name = next(shard["file"] for shard in source.info["shards"] if shard["split"] == "val")
    shard = write_shard(copy / name, "val", example_schema(("image",)), [rows])
    others = [entry for entry in source.info["shards"] if entry["split"] != "val"]
    write_json(copy / "dataset.json", source.info | {"shards": [*others, shard_entry(shard)]})
    with pytest.raises(DataError, match=sentence):
        evaluate(str(base), HeldOut.open([copy]))


def test_a_missing_column(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    info = json.loads((copy / "dataset.json").read_text())
    entry = next(entry for entry in info["shards"] if entry["split"] == "val")
    table = pq.read_table(copy / entry["file"]).drop_columns(["instruction"])
    pq.write_table(table, copy / entry["file"])
    entry |= {"bytes": (copy / entry["file"]).stat().st_size, "crc32c": checksum(copy / entry["file"])}
    write_json(copy / "dataset.json", sealed(info))
    with pytest.raises(DataError, match="split 'val' has no column 'instruction'"):
        HeldOut.open([copy])


def test_teacher_forced_is_what_training_logs(run: Path, held_out: HeldOut) -> None:
    """Another batch size, another order, and a cache; the same numbers."""
    lines = [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]
    logged = next(line for line in lines if "val_loss" in line)
    done: list[int] = []
    evaluation = evaluate(str(run), held_out, batch_size=3, advance=done.append)
    assert done == [3, 3, 2] and evaluation.statistics_from == "model"
    overall = evaluation.teacher_forced.overall
    assert overall.token_accuracy == pytest.approx(logged["val_action_accuracy"], abs=1e-9)
    assert overall.l1_normalized == pytest.approx(logged["val_action_l1"], abs=1e-6)


def test_free_running_is_what_predict_gives(folder: Path, base: Path, data: Path, held_out: HeldOut) -> None:
    """With augmentation on, so that the crop is part of it; from the run, one of its checkpoints, and merged."""
    run = train(base, data, folder / "cropped", "--recipe", "last-layer", "train.learning_rate=0.01")
    policy = load(run)
    assert policy.pipeline.center_crop
    predictions = policy.predict(list(held_out.images(range(8))), held_out.episodes[0].instruction)
    evaluation = evaluate(str(run), held_out)
    assert evaluation.predicted == pytest.approx(np.stack([each.actions for each in predictions]))
    ids = np.array([each.action_token_ids for each in predictions])
    overall = evaluation.free_running.overall
    assert overall.non_action == pytest.approx(1 - policy.files.actions.is_action(ids).mean())
    distance = abs(evaluation.predicted[:, 0] - held_out.action).mean(axis=0)
    assert [each.l1_robot for each in evaluation.free_running.dimensions] == pytest.approx(list(distance))
    merged = folder / "cropped-merged"
    assert main(["merge", str(run), "--out", str(merged)]) == 0
    for other in (merged, run / "checkpoints/step-000003"):
        again = evaluate(str(other), held_out)
        assert (again.free_running, again.teacher_forced) == (evaluation.free_running, evaluation.teacher_forced)


def test_a_perfect_model_is_off_by_the_rounding_alone(
    base: Path, held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vlaft.model.heads.tokens.decode_both", lambda model, prompts, mask, pixels, targets: (targets, targets)
    )
    evaluation = evaluate(str(base), held_out)
    overall = evaluation.free_running.overall
    assert (overall.token_accuracy, overall.l1_normalized, overall.non_action) == (1.0, 0.0, 0.0)
    assert evaluation.free_running.gripper_f1 == 1.0 and not evaluation.error.any()
    assert evaluation.statistics_from == "dataset"  # the base knows another robot only
    statistics = held_out.datasets[0].statistics["small"]["action"]
    low, high = np.array(statistics["q01"]), np.array(statistics["q99"])
    within = np.clip(held_out.action, low, high)
    bound = np.where(statistics["mask"], (high - low) / 510, 1 / 255) + 1e-6
    assert (abs(evaluation.predicted[:, 0] - within) <= bound).all()


def test_demonstrations_are_tokenized_in_the_models_own_range(
    base: Path, data: Path, folder: Path, held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored tokens where the statistics are the same; other ones where the model's differ."""
    seen: list[NDArray] = []

    def keep(model: Any, prompts: Any, mask: Any, pixels: Any, targets: torch.Tensor) -> Any:
        seen.append(targets.numpy())
        return targets, targets

    monkeypatch.setattr("vlaft.model.heads.tokens.decode_both", keep)
    evaluate(str(base), held_out)
    stored = [held_out.datasets[0].row("val", row)["action_token_ids"] for row in range(8)]
    assert seen[0].tolist() == stored
    other = shutil.copytree(base, folder / "other-range")
    wider = {"small": compute_statistics([held_out.action * 2])}
    (other / "dataset_statistics.json").write_text(json.dumps(wider))
    evaluation = evaluate(str(other), held_out)
    assert evaluation.statistics_from == "model" and seen[1].tolist() != stored
    inside = abs(evaluation.predicted[:, 0] - held_out.action)[:, :6]
    assert (inside < 4 / 255 + 1e-6).all()


def edited(data: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> HeldOut:
    shutil.copytree(data, out)
    info = json.loads((out / "dataset.json").read_text())
    change(info)
    (out / "dataset.json").write_text(json.dumps(sealed(info)))
    return HeldOut.open([out])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda info: info["tokenizer"].update(fingerprint="f"), "converted with another tokenizer than that of"),
        (lambda info: info["tokenizer"].update(n_action_bins=128), "its action tokens are not those of"),
        (lambda info: info["tokenizer"].pop("fingerprint"), "'tokenizer.fingerprint' is missing"),
        (lambda info: info.update(prompt_style="vicuna"), "its prompts are in style 'vicuna', and .* takes 'openvla'"),
        (lambda info: info["image"]["pipeline"].update(size=84), "its frames are 84 pixels wide, and .* takes 56"),
        (lambda info: info["image"]["pipeline"].update(strategy="letterbox"), "resized by lanczos and letterbox"),
    ],
)
def test_data_that_do_not_fit(
    run: Path, data: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        evaluate(str(run), edited(data, tmp_path / "data", change))


@pytest.mark.parametrize(
    ("statistics", "sentence"),
    [
        ({"small": compute_statistics([np.zeros((3, 2), np.float32)])}, "gives 2 action dimensions for 'small'"),
        ({"small": {"action": {"q01": [0.0]}}}, r"small\.action\.q99 has to be a list of finite numbers"),
        ({"small": 3}, "small.action is missing"),
    ],
)
def test_statistics_that_do_not_fit(
    base: Path, held_out: HeldOut, tmp_path: Path, statistics: Any, sentence: str
) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    (other / "dataset_statistics.json").write_text(json.dumps(statistics))
    with pytest.raises(DataError, match=sentence):
        evaluate(str(other), held_out)


def test_models_are_looked_for_before_any_is_loaded(run: Path, base: Path, tmp_path: Path) -> None:
    check_models([str(run), str(base), str(run / "checkpoints/step-000003")])
    with pytest.raises(CheckpointError, match="no such folder"):
        check_models([str(run), str(tmp_path / "absent")])
    with pytest.raises(CheckpointError, match=r"no config\.json here"):
        check_models([str(tmp_path)])
    with pytest.raises(ConfigError, match="is named twice"):
        check_models([str(run), str(base), str(run)])


def test_pictures(base: Path, run: Path, data: Path, tmp_path: Path) -> None:
    held_out = HeldOut.open([data], "train", limit=20)
    evaluations = [evaluate(str(model), held_out) for model in (base, run)]
    out = tmp_path / "plots"
    out.mkdir()
    for name in ("episode-0099.png", "notes.txt"):
        (out / name).write_text("old")
    files = draw_evaluations(out, evaluations, held_out, episodes=2)
    names = ["episode-0000.png", "episode-0004.png", "errors.png"]
    assert [file.name for file in files] == names
    assert sorted(path.name for path in out.iterdir()) == [*names, "notes.txt"]  # a picture of before is gone
    for file in files:
        with Image.open(file) as image:
            assert image.width > 800 and image.height > 800 and len(image.convert("RGB").getcolors(10**6) or []) > 50


def test_pictures_of_odd_names(base: Path, data: Path, tmp_path: Path) -> None:
    """A formula that is none, another script, a leading underscore: text, not a traceback."""
    odd = shutil.copytree(base, tmp_path / "_$x^{_model")
    held_out = HeldOut.open([data])
    strange = "lift $\\frac{ the \u6876 " * 20
    held_out = HeldOut(**{**held_out.__dict__, "names": ("$y_{", *held_out.names[1:])})
    object.__setattr__(held_out.episodes[0], "instruction", strange)
    files = draw_evaluations(tmp_path / "plots", [evaluate(str(odd), held_out)], held_out)
    assert all(file.stat().st_size > 10_000 for file in files)


def test_two_dimensions_and_no_gripper(samples: Path, base: Path, tmp_path: Path) -> None:
    """PushT: absolute positions in pixels."""
    source = SourceRequest(path=samples / "lerobot/v2.1-pusht_image", layout={})
    convert(ConvertRequest(sources=[source], base=str(base), out=tmp_path / "pusht", workers=1, val_fraction=0.3))
    held_out = HeldOut.open([tmp_path / "pusht"], limit=12)
    assert not held_out.gripper and held_out.action.shape[1] == 2
    evaluation = evaluate(str(base), held_out)
    assert evaluation.free_running.gripper_f1 is None and len(evaluation.free_running.dimensions) == 2
    robot = evaluation.free_running.dimensions[0].l1_robot
    assert robot is not None and robot > 5  # pixels, not shares of a range
