"""What goes wrong in a long run ends in one sentence, with the last good checkpoint intact."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_base import convert_small, write_small_base
from small_run import Small, checkpoint_content, log_lines, run

from vlaft.cli.main import main
from vlaft.errors import CheckpointError, ConfigError, DataError, MissingExtra, VlaftError
from vlaft.training import folder, trainer
from vlaft.training import run as run_module
from vlaft.weights.trained import find_trained

STEPS = ("train.steps=6", "train.save_every=2", "train.evaluate_every=0", "train.keep_checkpoints=3")


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Call `action(run)` before the update after `step`."""
    original = trainer.Run.step

    def changed(self: trainer.Run, *arguments, **keywords):  # type: ignore[no-untyped-def]
        if self.progress.step == step:
            action(self)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(trainer.Run, "step", changed)


def spoil_weights(started: trainer.Run) -> None:
    with torch.no_grad():
        next(p for p in started.model.parameters() if p.requires_grad).fill_(float("nan"))


@pytest.mark.parametrize("name", ["lora8", "last-layer"])
def test_nan_stops_with_a_sentence_and_resumes(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe, out = small.recipe(name, *STEPS), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(VlaftError, match="the loss is nan at step 4; the last good"):
        at_step(patch, 3, spoil_weights)
        run(recipe, out)
    assert checkpoints(out) == ["step-000002"]
    assert '"status": "failed"' in (out / "run.json").read_text()
    run(recipe, out, resume=True)
    run(recipe, tmp_path / "whole")
    assert checkpoint_content(out, "step-000006") == checkpoint_content(tmp_path / "whole", "step-000006")
    assert log_lines(out) == log_lines(tmp_path / "whole")


def test_nan_between_two_logged_steps_is_never_saved(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer.Run.step

    def step(self: trainer.Run, *arguments, **keywords):  # type: ignore[no-untyped-def]
        result = original(self, *arguments, **keywords)
        if self.progress.step == 4:  # after the update: the loss of step 4 was finite
            spoil_weights(self)
        return result

    monkeypatch.setattr(trainer.Run, "step", step)
    with pytest.raises(VlaftError, match="no longer finite at step 4"):
        run(small.recipe("lora8", *STEPS), tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["step-000002"]


def test_full_disk_leaves_the_last_good_checkpoint(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("needs to mount a small disk")
    try:
        recipe, out = small.recipe("lora8", *STEPS), disk / "run"

        def fill(started: trainer.Run) -> None:
            with (disk / "ballast").open("wb") as file:
                while True:
                    file.write(bytes(1000))
                    file.flush()

        def fill_up(started: trainer.Run) -> None:
            with pytest.raises(OSError):
                fill(started)

        with monkeypatch.context() as patch, pytest.raises(VlaftError, match="make room and continue with --resume"):
            at_step(patch, 3, fill_up)
            run(recipe, out)
        assert checkpoints(out) == ["step-000002"]
        before = checkpoint_content(out, "step-000002")
        (disk / "ballast").unlink()
        run(recipe, out, resume=True)
        assert checkpoint_content(out, "step-000002") == before
        run(recipe, tmp_path / "whole")
        assert checkpoint_content(out, "step-000006") == checkpoint_content(tmp_path / "whole", "step-000006")
        assert log_lines(out) == log_lines(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_disk_full_while_a_checkpoint_is_written(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = small.recipe("lora8", *STEPS), tmp_path / "run"
    original = run_module.write_adapter

    def save(folder: Path, *given: Any) -> None:
        if "step-000004" in folder.name:
            raise OSError(28, "No space left on device")
        original(folder, *given)

    monkeypatch.setattr(run_module, "write_adapter", save)
    with pytest.raises(VlaftError, match=r"step-000004: the checkpoint could not be written \(No space left"):
        run(recipe, out)
    assert checkpoints(out) == ["step-000002"]


def test_out_of_gpu_memory_says_what_to_change(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(started: trainer.Run) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    at_step(monkeypatch, 0, full)
    advice = "train.batch_size=2 with train.accumulation=2, or train.gradient_checkpointing=all, or --recipe qlora32"
    with pytest.raises(VlaftError, match=f"GPU's memory is not enough for a step of train.batch_size=4: take {advice}"):
        run(small.recipe("lora8"), tmp_path / "run")
    small_as_can_be = small.recipe("qlora32", "train.batch_size=1")
    with pytest.raises(VlaftError, match="take a larger GPU or a smaller base; `vlaft report` says what fits"):
        run(small_as_can_be, tmp_path / "smallest")


def damage(out: Path, name: str, file: str) -> None:
    path = out / "checkpoints" / name / file
    if file == "state.json":
        path.write_text(path.read_text()[:-40])
        return
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(small: Small, tmp_path: Path, file: str) -> None:
    recipe, out = small.recipe("lora8", *STEPS), tmp_path / "run"
    run(recipe, out)
    whole = checkpoint_content(out, "step-000006")
    damage(out, "step-000006", file)
    told = run(recipe, out, resume=True)
    assert told.banner is not None and told.banner.first_step == 4
    assert len(told.warnings) == 1 and "step-000006" in told.warnings[0]
    assert told.warnings[0].endswith("falling back to the one before")
    assert checkpoint_content(out, "step-000006") == whole


def test_damaged_checkpoints_never_push_out_good_ones(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = small.recipe("lora8", *STEPS), tmp_path / "run"
    recipe = replace(recipe, train=replace(recipe.train, keep_checkpoints=2))
    run(recipe, out)
    assert checkpoints(out) == ["step-000004", "step-000006"]
    damage(out, "step-000006", "optimizer.safetensors")
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        at_step(patch, 5, lambda started: {}["die"])
        run(recipe, out, resume=True)
    assert find_trained(out).weights.name == "step-000004"  # run.json names none that is not there
    run(recipe, out, resume=True)
    assert checkpoints(out) == ["step-000004", "step-000006"]


def test_best_checkpoint_that_is_gone_no_longer_counts(small: Small, tmp_path: Path) -> None:
    recipe, out = small.recipe("lora8", *STEPS, "train.evaluate_every=2", "train.steps=4"), tmp_path / "run"
    told = run(recipe, out)
    assert told.summary is not None and told.summary.best is not None
    best = told.summary.best
    if best == "step-000004":
        damage(out, best, "optimizer.safetensors")
    else:
        shutil.rmtree(out / "checkpoints" / best)
    again = run(replace(recipe, train=replace(recipe.train, steps=6)), out, resume=True)
    assert again.summary is not None and again.summary.best is not None
    assert (out / "checkpoints" / again.summary.best).is_dir() and find_trained(out).weights.is_dir()


def test_all_checkpoints_damaged_begins_anew(small: Small, tmp_path: Path) -> None:
    recipe, out = small.recipe("lora8", *STEPS, "train.steps=2"), tmp_path / "run"
    run(recipe, out)
    whole = checkpoint_content(out, "step-000002")
    damage(out, "step-000002", "state.json")
    told = run(recipe, out, resume=True)
    assert "beginning at step 0" in told.warnings[-1] and len(told.losses) == 2
    assert checkpoint_content(out, "step-000002") == whole


def test_resume_into_another_run_is_refused(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(small.recipe("lora8"), out)
    before = checkpoint_content(out, "step-000003")
    with pytest.raises(ConfigError, match=r"these settings differ: adapt.lora.rank \(was 8, now 16\)"):
        run(small.recipe("lora16"), out, resume=True)
    with pytest.raises(ConfigError, match=r"train.learning_rate \(was 0.0005, now 0.1\)"):
        run(small.recipe("lora8", "train.learning_rate=0.1"), out, resume=True)
    other_data = convert_small(small.base, tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=rf"the data is no longer the one that the run began with \({other_data}\)"):
        run(small.recipe("lora8", f"data.path='{other_data}'"), out, resume=True)
    other_base = write_small_base(tmp_path / "base", "fused")
    with pytest.raises((ConfigError, DataError), match="base"):
        run(small.recipe("lora8", f"base='{other_base}'"), out, resume=True)
    assert checkpoint_content(out, "step-000003") == before


def test_resume_with_base_or_data_exchanged_in_place_is_refused(tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base")
    here = Small(base, convert_small(base, tmp_path / "data"))
    run(here.recipe("lora8"), tmp_path / "run")
    shutil.rmtree(tmp_path / "data")
    convert_small(base, tmp_path / "data", seed=1)
    with pytest.raises(ConfigError, match="the data is no longer the one that the run began with"):
        run(here.recipe("lora8"), tmp_path / "run", resume=True)
    shutil.rmtree(tmp_path / "data")
    convert_small(base, tmp_path / "data")
    shard = base / "model-00001-of-00006.safetensors"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00006.safetensors: the tensor '.*' is not as it was"):
        run(here.recipe("lora8"), tmp_path / "run", resume=True)
    (tmp_path / "run/environment.json").unlink()  # as an earlier version left it: the fingerprint is compared
    with pytest.raises(ConfigError, match="the base is no longer the one that the run began with"):
        run(here.recipe("lora8"), tmp_path / "run", resume=True)


def test_a_run_whose_data_and_base_moved_goes_on_where_they_are_now(tmp_path: Path) -> None:
    base = write_small_base(tmp_path / "base")
    here = Small(base, convert_small(base, tmp_path / "data"))
    run(here.recipe("lora8", *STEPS, "train.steps=4"), tmp_path / "run")
    run(here.recipe("lora8", *STEPS), tmp_path / "whole")
    moved = Small(tmp_path / "elsewhere" / "base", tmp_path / "elsewhere" / "data")
    moved.base.parent.mkdir()
    for old, new in ((here.base, moved.base), (here.data, moved.data)):
        old.rename(new)
    told = run(moved.recipe("lora8", *STEPS), tmp_path / "run", resume=True)
    assert told.banner is not None and told.banner.first_step == 4
    contents = [checkpoint_content(tmp_path / name, "step-000006") for name in ("run", "whole")]
    for content in contents:
        del content["adapter_config.json"]  # it names the base's folder
    assert contents[0] == contents[1]
    assert str(moved.data) in (tmp_path / "run" / "recipe.yaml").read_text()
    assert find_trained(tmp_path / "run").base == str(moved.base)


def test_moved_data_is_named_to_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = write_small_base(tmp_path / "base")
    here = Small(base, convert_small(base, tmp_path / "data"))
    assert main(["train", "--recipe", "lora8", "--out", str(tmp_path / "run"), *here.words()]) == 0
    (tmp_path / "data").rename(tmp_path / "new")
    again = ["train", "--resume", "--out", str(tmp_path / "run"), "train.steps=4"]
    capfd.readouterr()
    assert main(again) == 1
    said = capfd.readouterr().err
    assert (
        said.count("\n") == 1
        and f"data of {tmp_path / 'run'} is not here; if it moved, say where to with --data" in said
    )
    assert main([*again, "--data", str(tmp_path / "new")]) == 0
    assert "step-000004" in capfd.readouterr().err


def test_a_run_without_a_fingerprint_of_its_data_keeps_its_path(small: Small, tmp_path: Path) -> None:
    run(small.recipe("lora8"), tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{}")
    moved = shutil.copytree(small.data, tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"these settings differ: data.path"):
        run(small.recipe("lora8", f"data.path='{moved}'"), tmp_path / "run", resume=True)


def spoiled_base(folder: Path) -> Small:
    """Return a base whose head is not finite, and data for it."""
    base = write_small_base(folder / "base")
    here = Small(base, convert_small(base, folder / "data"))
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("lm_head.weight"):
                tensors[name].fill_(float("nan"))
        save_file(tensors, file, metadata={"format": "pt"})
    return here


def test_a_base_that_gives_no_finite_loss_leaves_no_folder_and_replaces_none(small: Small, tmp_path: Path) -> None:
    spoiled = spoiled_base(tmp_path)
    sentence = "not finite before the first step"
    with pytest.raises(VlaftError, match=sentence):
        run(spoiled.recipe("lora8"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(small.recipe("lora8"), tmp_path / "run")
    before = checkpoint_content(tmp_path / "run", "step-000003")
    with pytest.raises(VlaftError, match=sentence):
        run(spoiled.recipe("lora8"), tmp_path / "run", overwrite=True)
    assert checkpoint_content(tmp_path / "run", "step-000003") == before


def test_a_run_that_diverges_before_its_first_checkpoint_does_not_block_its_folder(
    small: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    words = ["train", "--recipe", "lora8", "--out", str(out), *small.words()]
    with monkeypatch.context() as patch:
        at_step(patch, 1, spoil_weights)
        assert main(words) == 1
    said = capfd.readouterr().err
    assert "the loss is nan at step 2; nothing was saved yet: begin again with a lower train.learning_rate" in said
    assert len((out / "log.jsonl").read_text().splitlines()) == 2  # what led there can be looked at
    assert main([*words, "train.learning_rate=1e-5"]) == 0  # no --overwrite
    assert checkpoints(out) == ["step-000003"] and len((out / "log.jsonl").read_text().splitlines()) == 4
    assert main(words) == 1  # a run that came to something is never replaced unasked
    assert "is not empty" in capfd.readouterr().err


def test_a_failed_run_with_a_file_of_the_users_is_not_replaced(
    small: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--recipe", "lora8", "--out", str(tmp_path / "run"), *small.words()]
    with monkeypatch.context() as patch:
        at_step(patch, 0, spoil_weights)
        assert main(words) == 1
    (tmp_path / "run" / "notes.txt").write_text("why?")
    capfd.readouterr()
    assert main(words) == 1
    assert "is not empty" in capfd.readouterr().err
    assert (tmp_path / "run" / "notes.txt").read_text() == "why?"


def test_after_a_divergence_the_advice_can_be_followed(
    small: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    words = ["train", "--recipe", "lora8", "--out", str(out), *small.words(), *STEPS]
    with monkeypatch.context() as patch:
        at_step(patch, 3, spoil_weights)
        assert main(words) == 1
    said = capfd.readouterr().err
    assert "the last good checkpoint, step-000002, is untouched: continue from it with --resume and a lower" in said
    assert main([*words, "--resume", "train.learning_rate=1e-5", "train.max_grad_norm=1"]) == 0
    assert checkpoints(out)[-1] == "step-000006"
    assert main([*words, "--resume"]) == 1  # back to the first settings, of a run that no longer fails
    assert "train.learning_rate (was 1e-05, now 0.0005)" in capfd.readouterr().err


def test_an_old_checkpoint_that_cannot_be_deleted_is_told_and_the_run_goes_on(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "run", Path.rename

    def failing(self: Path, target: Path) -> Path:
        if str(target).endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    told = run(small.recipe("lora8", *STEPS, "train.keep_checkpoints=1"), out)
    assert told.summary is not None and told.summary.last == "step-000006"
    assert "step-000002: an old checkpoint could not be deleted (Input/output error)" in told.warnings[0]
    assert checkpoints(out) == ["step-000002", "step-000004", "step-000006"]


def test_what_lies_where_old_and_damaged_checkpoints_go_is_in_nobodys_way(small: Small, tmp_path: Path) -> None:
    recipe, out = small.recipe("lora8", *STEPS, "train.keep_checkpoints=1"), tmp_path / "run"
    run(small.recipe("lora8", *STEPS, "train.keep_checkpoints=1", "train.steps=2"), out)
    (out / "checkpoints" / ".step-000002.old").write_text("a file")
    (out / "checkpoints" / ".step-000004.old").symlink_to(tmp_path)
    told = run(recipe, out, resume=True)
    assert checkpoints(out) == ["step-000006"] and not told.warnings
    damage(out, "step-000006", "state.json")
    (out / "checkpoints" / ".step-000006.damaged").write_text("a file")
    run(recipe, out, resume=True)
    assert checkpoints(out) == ["step-000006"] and (tmp_path / "run").is_dir()


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_named(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = small.recipe("lora8", *STEPS), tmp_path / "run"
    run(recipe, out)
    damage(out, "step-000006", "state.json")

    def failing(self: Path, target: Path) -> Path:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("vlaft.training.checkpoints._move_away", failing)
        with pytest.raises(VlaftError, match=r"step-000006: this damaged checkpoint cannot be set aside \(Input"):
            run(recipe, out, resume=True)


def test_resume_into_a_folder_that_is_no_run_is_refused(small: Small, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ConfigError, match=r"photos: there is no recipe.yaml"):
        run(small.recipe("lora8"), tmp_path / "photos", resume=True)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_told_to_stop_while_a_runs_file_is_replaced_nothing_hidden_stays(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small.recipe("lora8"), tmp_path / "run")
    before = {path.name for path in (tmp_path / "run").iterdir()}

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.RunFolder(tmp_path / "run").write_status(status="running")
    assert {path.name for path in (tmp_path / "run").iterdir()} == before


def test_overwrite_replaces_only_once_the_new_run_begins(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(small.recipe("lora8"), out)
    before = checkpoint_content(out, "step-000003")
    with pytest.raises(DataError):
        run(small.recipe("lora8", "data.path=/nowhere"), out, overwrite=True)
    assert checkpoint_content(out, "step-000003") == before
    run(small.recipe("lora16", "train.steps=2"), out, overwrite=True)
    assert checkpoints(out) == ["step-000002"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_overwrite_never_deletes_what_it_reads(tmp_path: Path) -> None:
    out = tmp_path / "run"
    base = write_small_base(out / "base")
    data = convert_small(base, tmp_path / "data")
    with pytest.raises(ConfigError, match="which --overwrite would delete"):
        run(Small(base, data).recipe("lora8"), out, overwrite=True)
    assert (base / "config.json").is_file()


@pytest.mark.parametrize(
    "words", [["adapt.quantize=nf4"], ["adapt.quantize=int8"], ["train.optimizer=paged-adamw-8bit"]]
)
def test_an_extra_that_is_not_installed_is_named_before_anything_is_loaded(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(MissingExtra, match=r"needs bitsandbytes: pip install 'vlaft\[qlora\]'"):
        run(replace(small.recipe("lora8", *words), base="no/such-base-anywhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_command_line_says_it_in_one_sentence(small: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--recipe", "lora8", "--out", str(tmp_path / "run"), *small.words()]
    assert main(words) == 0
    capfd.readouterr()
    assert main([*words, "train.seed=1", "--resume"]) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "train.seed (was 7, now 1)" in said
    assert main(words) == 1
    assert "is not empty" in capfd.readouterr().err
