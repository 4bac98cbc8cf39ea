"""Training checkpoints: bit for bit, damaged ones passed over, never half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlaft.errors import CheckpointError, VlaftError
from vlaft.training import checkpoints
from vlaft.training.checkpoints import (
    checkpoint_name,
    flatten_optimizer,
    list_checkpoints,
    newest_good,
    random_state,
    read_checkpoint,
    restore_optimizer,
    restore_random_state,
    rotate_checkpoints,
    trained_tensors,
    write_checkpoint,
)
from vlaft.weights.trained import TRAINED_FILE

POSITION = {"seed": 3, "epoch": 0, "offset": 7, "data": "a dataset"}


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters(), "lr": 3e-3}]
    return model, torch.optim.AdamW(groups, weight_decay=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(4, 5)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def write(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, **state: object) -> Path:
    names = [name for name, _ in model.named_parameters()]

    def weights(target: Path) -> None:
        save_file(trained_tensors(model, names), target / TRAINED_FILE)

    return write_checkpoint(folder, step, write_weights=weights, optimizer=optimizer, state=state)


def test_continued_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, 3)
    path = write(tmp_path, 3, model, optimizer, epoch=1, best=0.25)
    expected = train(model, optimizer, 4)

    again, fresh = build(seed=99)
    state, tensors, random = read_checkpoint(path)
    assert (state["step"], state["epoch"], state["best"]) == (3, 1, 0.25)
    again.load_state_dict(load_file(path / TRAINED_FILE))
    restore_optimizer(fresh, tensors, state["optimizer_scalars"])
    restore_random_state(random)
    assert train(again, fresh, 4) == expected
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    before, after = flatten_optimizer(optimizer)[0], flatten_optimizer(fresh)[0]
    assert set(before) == set(after) == {f"{i}.{key}" for i in range(4) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert [group["lr"] for group in fresh.param_groups] == [1e-2, 3e-3]


def test_half_precision_parameters_keep_the_moments_they_had(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(6).bfloat16())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2)
    parameter.square().sum().backward()
    optimizer.step()
    path = write_checkpoint(tmp_path, 1, write_weights=lambda folder: None, optimizer=optimizer, state={})
    fresh = torch.optim.AdamW([parameter], lr=1e-2)
    state, tensors, _ = read_checkpoint(path)
    restore_optimizer(fresh, tensors, state["optimizer_scalars"])
    before, after = flatten_optimizer(optimizer)[0], flatten_optimizer(fresh)[0]
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_optimizers_scalars_survive(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    optimizer.state[parameter]["count"] = 7
    path = write_checkpoint(tmp_path, 1, write_weights=lambda folder: None, optimizer=optimizer, state={})
    fresh = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    state, tensors, _ = read_checkpoint(path)
    restore_optimizer(fresh, tensors, state["optimizer_scalars"])
    assert fresh.state[parameter]["count"] == 7
    assert torch.equal(fresh.state[parameter]["momentum_buffer"], torch.ones(2))


def test_random_state_comes_back() -> None:
    state = random_state()
    first = torch.rand(5)
    restore_random_state(state)
    assert torch.equal(torch.rand(5), first)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = write(tmp_path, 1, *build())
    assert {file.name for file in path.iterdir()} == {TRAINED_FILE, "optimizer.safetensors", "state.json"}


def test_names_and_order(tmp_path: Path) -> None:
    assert checkpoint_name(500) == "step-000500"
    model, optimizer = build()
    for step in (1_000_000, 20, 999_999, 3):
        write(tmp_path, step, model, optimizer)
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-000500.old").mkdir()
    (tmp_path / ".step-000500.partial").mkdir()
    (tmp_path / "notes").mkdir()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-000003", "step-000020", "step-999999", "step-1000000"]
    assert list_checkpoints(tmp_path / "absent") == []


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    model, optimizer = build()
    write(tmp_path, 5, model, optimizer, note="first")
    write(tmp_path, 5, model, optimizer, note="second")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]
    assert read_checkpoint(tmp_path / "step-000005")[0]["note"] == "second"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights truncated": lambda path: _truncate(path / TRAINED_FILE),
    "weights flipped": lambda path: _flip(path / TRAINED_FILE),
    "weights missing": lambda path: (path / TRAINED_FILE).unlink(),
    "optimizer flipped": lambda path: _flip(path / "optimizer.safetensors"),
    "optimizer missing": lambda path: (path / "optimizer.safetensors").unlink(),
    "state missing": lambda path: (path / "state.json").unlink(),
    "state truncated": lambda path: _truncate(_shorten(path / "state.json")),
    "state empty": lambda path: (path / "state.json").write_text(""),
    "state no object": lambda path: (path / "state.json").write_text("[1, 2]"),
    "state nested": lambda path: (path / "state.json").write_text("[" * 100_000),
    "state no text": lambda path: (path / "state.json").write_bytes(b"\xff\xfe\xfd"),
    "state without files": lambda path: (path / "state.json").write_text('{"step": 3}'),
    "state outside": lambda path: (path / "state.json").write_text('{"step": 3, "files": {"../x": 0}}'),
}


def _shorten(path: Path) -> Path:
    path.write_text(path.read_text()[:-3])
    return path


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    model, optimizer = build()
    train(model, optimizer, 1)
    for step in (1, 2, 3):
        write(tmp_path, step, model, optimizer)
    assert newest_good(tmp_path) == (tmp_path / "step-000003", [])
    damage(tmp_path / "step-000003")
    with pytest.raises(CheckpointError, match="step-000003"):
        read_checkpoint(tmp_path / "step-000003")
    path, warnings = newest_good(tmp_path)
    assert path == tmp_path / "step-000002"
    assert len(warnings) == 1
    assert "step-000003" in warnings[0]


def test_nothing_good_is_left(tmp_path: Path) -> None:
    write(tmp_path, 1, *build())
    _flip(tmp_path / "step-000001" / TRAINED_FILE)
    path, warnings = newest_good(tmp_path)
    assert path is None
    assert len(warnings) == 1
    assert newest_good(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, "step-000001", [1, 4, 5]),
        (2, "step-000005", [4, 5]),
        (2, None, [4, 5]),
        (1, "step-000003", [3, 5]),
        (0, "step-000002", [2, 5]),
        (9, "step-000001", [1, 2, 3, 4, 5]),
        (1, "step-000099", [5]),
    ],
)
def test_rotation_keeps_the_best_and_the_last(tmp_path: Path, keep: int, best: str | None, left: list[int]) -> None:
    for step in range(1, 6):
        (tmp_path / checkpoint_name(step)).mkdir()
    rotate_checkpoints(tmp_path, keep, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(step) for step in left]


def test_a_killed_deletion_leaves_no_checkpoint_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build()
    for step in (1, 2):
        write(tmp_path, step, model, optimizer)
    calls = []

    def killed(path: Path, ignore_errors: bool = False) -> None:
        calls.append(path)
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate_checkpoints(tmp_path, 1, None)
    assert calls
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]


@pytest.mark.parametrize("at", ["weights", "optimizer", "state", "sync"])
def test_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    model, optimizer = build()
    train(model, optimizer, 1)
    good = write(tmp_path, 1, model, optimizer)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    def weights(target: Path) -> None:
        if at == "weights":
            full()
        save_file(trained_tensors(model, ["0.weight"]), target / TRAINED_FILE)

    if at == "optimizer":
        monkeypatch.setattr(checkpoints, "save_file", full)
    elif at == "state":
        monkeypatch.setattr(Path, "write_text", full)
    elif at == "sync":
        monkeypatch.setattr(checkpoints, "sync", full)
    with pytest.raises(VlaftError, match=r"No space left on device.*--resume"):
        write_checkpoint(tmp_path, 2, write_weights=weights, optimizer=optimizer, state={})
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert newest_good(tmp_path) == (good, [])


def test_an_interrupted_write_is_never_listed(tmp_path: Path) -> None:
    model, optimizer = build()
    good = write(tmp_path, 1, model, optimizer)

    def killed(target: Path) -> None:
        (target / TRAINED_FILE).write_bytes(b"half")
        assert [path.name for path in list_checkpoints(tmp_path)] == [good.name]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 2, write_weights=killed, optimizer=optimizer, state={})
    assert list_checkpoints(tmp_path) == [good]
    assert write(tmp_path, 2, model, optimizer).name == "step-000002"  # what was left there is in nobody's way
    assert newest_good(tmp_path) == (tmp_path / "step-000002", [])


def test_state_lists_a_checksum_of_every_other_file(tmp_path: Path) -> None:
    path = write(tmp_path, 1, *build())
    files = json.loads((path / "state.json").read_text())["files"]
    assert set(files) == {TRAINED_FILE, "optimizer.safetensors"}


def test_every_changed_digit_of_the_state_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path, 12, *build(), progress={"step": 12, "best_l1": 0.25}, loader=POSITION)
    file = path / "state.json"
    text = file.read_text()
    places = [place for place, letter in enumerate(text) if letter.isdigit()]
    assert len(places) > 20
    for place in places:
        file.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        with pytest.raises(CheckpointError, match="step-000012"):
            read_checkpoint(path)
    file.write_text(text)
    assert read_checkpoint(path)[0]["loader"] == POSITION


def test_a_state_without_its_own_checksum_is_taken_and_told(tmp_path: Path) -> None:
    path = write(tmp_path, 1, *build())
    content = json.loads((path / "state.json").read_text())
    del content["crc32c"]
    content["files"] = {name: crc32((path / name).read_bytes()) for name in content["files"]}
    (path / "state.json").write_text(json.dumps(content))
    found, (sentence,) = newest_good(tmp_path)
    assert found == path and "an earlier vlaft wrote it without a checksum" in sentence
    _flip(path / TRAINED_FILE)
    assert newest_good(tmp_path)[0] is None
