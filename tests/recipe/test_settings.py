"""Layering, refusals and round trips of a recipe's settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import ROOT

from vlaft.errors import ConfigError
from vlaft.files import LARGEST_YAML
from vlaft.recipe.resolve import leaf_types, resolve, to_yaml
from vlaft.recipe.settings import AdaptConfig, LoraConfig, PrecisionConfig, RecipeConfig, TrainConfig, resolve_precision


def problems_of(
    recipe: str | Path | None = None, files: tuple[Path, ...] = (), words: tuple[str, ...] = ()
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(recipe, files, words)
    return caught.value.problems


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_are_upstreams() -> None:
    config = resolve()
    assert config == RecipeConfig()
    assert (config.adapt.lora.rank, config.adapt.lora.dropout, config.adapt.lora.init) == (32, 0.0, "gaussian")
    assert (config.train.learning_rate, config.train.weight_decay, config.train.max_grad_norm) == (5e-4, 0.01, None)
    assert (config.train.batch_size, config.train.accumulation, config.train.schedule.name) == (16, 1, "constant")
    assert len(config.adapt.lora.targets) == len(set(config.adapt.lora.targets)) == 15


@pytest.mark.parametrize(("rank", "alpha", "expected"), [(8, None, 8), (16, None, 16), (64, None, 16), (64, 128, 128)])
def test_alpha_is_upstreams_unless_given(rank: int, alpha: int | None, expected: int) -> None:
    assert LoraConfig(rank=rank, alpha=alpha).effective_alpha == expected


def test_later_layers_win(tmp_path: Path) -> None:
    recipe = write(
        tmp_path, "adapt: {lora: {rank: 1, dropout: 0.1}}\ntrain: {steps: 1, seed: 1, log_every: 1}", "a.yaml"
    )
    first = write(tmp_path, "train: {steps: 2, seed: 2}\nadapt: {lora: {rank: 2}}", "b.yaml")
    second = write(tmp_path, "train: {steps: 3, seed: 3}", "c.yaml")
    config = resolve(recipe, [first, second], ["train.steps=4", "train.steps=5"])
    assert config.train.steps == 5  # the last word
    assert config.train.seed == 3  # the last file
    assert config.adapt.lora.rank == 2  # the first file
    assert config.train.log_every == 1  # the recipe
    assert config.adapt.lora.dropout == 0.1
    assert config.train.batch_size == TrainConfig().batch_size  # the defaults


def test_words_are_yaml() -> None:
    words = [
        "train.batch_size=auto",
        "train.gradient_checkpointing=3",
        "train.betas=[0.8, 0.9]",
        "train.learning_rate=1e-4",
        "data.path=[a, 'b c']",
        "adapt.lora.targets=[q_proj]",
        "train={early_stopping: 3, schedule: {name: cosine}}",
        "train.max_grad_norm=1",
    ]
    config = resolve(words=words)
    assert (config.train.batch_size, config.train.gradient_checkpointing) == ("auto", 3)
    assert (config.train.betas, config.train.learning_rate) == ((0.8, 0.9), 1e-4)
    assert config.data.paths == ["a", "b c"]
    assert config.adapt.lora.targets == ["q_proj"]
    assert (config.train.early_stopping, config.train.schedule.name) == (3, "cosine")
    assert isinstance(config.train.max_grad_norm, float)
    assert resolve(words=["train.max_grad_norm=1", "train.max_grad_norm=null"]).train.max_grad_norm is None
    assert resolve(words=["data.path=a=b"]).data.paths == ["a=b"]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("train.batchsize=4", "unknown key 'train.batchsize'; did you mean 'train.batch_size'?"),
        ("rank=4", "unknown key 'rank'; did you mean 'adapt.lora.rank'?"),
        ("zzz=4", "unknown key 'zzz'"),
        ("train.steps.x=4", "unknown key 'train.steps.x'; did you mean 'train.steps'?"),
        ("train=4", "'train' is a section, not a setting; write its keys, such as 'train.steps'"),
        ("adapt.method=lroa", "adapt.method must be one of lora, full, frozen-vision, last-layer, sandwich, not 'lroa'"
         "; did you mean 'lora'?"),
        ("train.steps=many", "train.steps must be a whole number, not 'many'"),
        ("train.steps=2.5", "train.steps must be a whole number, not '2.5'"),
        ("train.steps=true", "train.steps must be a whole number, not 'true'"),
        ("train.steps=null", "train.steps must be a whole number, not null"),
        ("train.steps={a: 1}", "train.steps must be a whole number, not '{'a': 1}'"),
        ("train.max_grad_norm=no", "train.max_grad_norm must be a number or null, not 'false'"),
        (f"train.max_grad_norm=1{400 * '0'}", f"train.max_grad_norm must be a number or null, not '1{59 * '0'} ...'"),
        ("train.batch_size=atuo",
         "train.batch_size must be a whole number or 'auto', not 'atuo'; did you mean 'auto'?"),
        ("train.gradient_checkpointing=some",
         "train.gradient_checkpointing must be a whole number or one of none, vision, all, not 'some'"),
        ("train.betas=[0.9]", "train.betas must be a list of 2 numbers, such as [0.9, 0.9], not '[0.9]'"),
        ("adapt.lora.targets=q", "adapt.lora.targets must be a list of texts, such as [a, b], not 'q'"),
        ("data.augment=maybe", "data.augment must be true or false, not 'maybe'"),
        ("base=${oc.env:HOME}", "base: '${oc.env:HOME}' is an interpolation; write the value itself"),
        ("adapt.lora.targets=['${base}']",
         "adapt.lora.targets: '['${base}']' is an interpolation; write the value itself"),
        ("--train.steps=4", "'--train.steps=4' is no setting; write key=value, no dashes"),
        ("train.betas=[[[[[[[[[[[[",
         "'train.betas=[[[[[[[[[[[[': the value is not valid YAML (nested deeper than 10 levels)"),
        ("steps", "'steps' is no setting; write key=value, such as train.steps=1000"),
        ("train.steps=0", "train.steps must be at least 1, not 0"),
        ("train.learning_rate=0", "train.learning_rate must be above 0, not 0.0"),
        ("train.learning_rate=.nan", "train.learning_rate must be above 0, not nan"),
        ("train.weight_decay=.inf", "train.weight_decay must be at least 0, not inf"),
        ("train.schedule.min_ratio=2", "train.schedule.min_ratio must be from 0 to 1, not 2.0"),
        ("adapt.lora.dropout=1", "adapt.lora.dropout must be at least 0 and below 1, not 1.0"),
        ("train.betas=[0.9,1]", "train.betas must be at least 0 and below 1, not [0.9, 1.0]"),
        ("train.trackers=[wandd]",
         "train.trackers: unknown tracker 'wandd'; did you mean 'wandb'? (there are: tensorboard, trackio, wandb)"),
        ("adapt.double_quant=true", "adapt.double_quant=true needs adapt.quantize=nf4, not none"),
        ("train.schedule.name=step", "train.schedule.name=step needs train.schedule.step_size"),
        ("adapt.lora.targets=[]", "adapt.lora.targets is empty, so nothing would be trained"),
        ("policy.cameras=[main,wrist,main]", "policy.cameras names 'main' twice"),
        ("policy.cameras=[]", "policy.cameras must name at least one camera, such as [main], and no empty one"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_one_sentence(word: str, sentence: str) -> None:
    assert problems_of(words=(word,)) == [sentence]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("adapt.method=full", "adapt.quantize=nf4"), "quantised weights cannot be trained"),
        (("adapt.method=sandwich", "adapt.lora.rank=8"), "adapt.method=sandwich has no adapters"),
        (("adapt.lora.init=pissa", "adapt.quantize=int8"), "adapt.lora.init=pissa needs adapt.quantize=none, not int8"),
        (("train.schedule.warmup_steps=9", "train.steps=9"), "must be below train.steps=9"),
        (("train.early_stopping=2", "train.evaluate_every=0"), "needs evaluations"),
        (("train.best_by=success",), "train.best_by=success needs an environment to succeed in"),
        (("train.evaluate_env_episodes=0",), "train.evaluate_env_episodes must be at least 1, not 0"),
        (("policy.head=l1", "policy.chunk=0"), "policy.chunk must be at least 1, not 0"),
        (("policy.chunk=2",), "policy.chunk=2 needs all actions written at once: policy.decoding=parallel"),
        (("policy.state=true",), "policy.state=true needs all actions written at once"),
        (("policy.film=true", "policy.cameras=[main,wrist]"), "policy.film=true needs all actions written at once"),
        (("train.schedule.step_size=9",), "needs train.schedule.name=step, not constant"),
    ],
)
def test_contradictions_are_refused(words: tuple[str, ...], part: str) -> None:
    (problem,) = problems_of(words=words)
    assert part in problem


@pytest.mark.parametrize("word", ["policy.head=l1", "policy.decoding=parallel"])
def test_what_writes_all_at_once_may_have_chunks_state_and_film(word: str) -> None:
    policy = resolve(words=[word, "policy.chunk=8", "policy.state=true", "policy.film=true"]).policy
    assert policy.parallel and policy.chunk == 8 and policy.cameras == ["main"]


def test_all_problems_are_told_together(tmp_path: Path) -> None:
    file = write(tmp_path, "train: {stepz: 3, seed: -1}\nadapt: {method: full, quantize: int8}\n")
    problems = problems_of("lora33", (file, tmp_path / "absent.yaml"), ("data.worker=1", "train.steps=x", "oops"))
    told = "\n".join(problems)
    for part in (
        "unknown recipe 'lora33'; did you mean 'lora32'?",
        f"{file}: unknown key 'train.stepz'; did you mean 'train.steps'?",
        f"{tmp_path / 'absent.yaml'}: cannot be read (No such file or directory)",
        "unknown key 'data.worker'; did you mean 'data.workers'?",
        "train.steps must be a whole number, not 'x'",
        "'oops' is no setting",
        "train.seed must be from 0 to 4294967295, not -1",
        "adapt.quantize=int8 needs adapt.method=lora, not full",
    ):
        assert part in told
    assert len(problems) == 8


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: [", "line 1: not valid YAML"),
        ("a: 1\nb: : 2", "line 2: not valid YAML"),
        ("- train", "a recipe is a mapping of keys to values"),
        ("just words", "a recipe is a mapping of keys to values"),
        ("a: &x [1]\nb: *x", "aliases, *name, are not supported; write the value out"),
        ("train: {steps: 1}\ntrain: {seed: 1}", "not valid YAML"),
        ("[" * 60_000, "nested deeper than 10 levels"),
        ("# " + "x" * LARGEST_YAML, "larger than 256 KiB, so not a recipe"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("base: ${oc.env:HOME}", "is an interpolation"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str, part: str) -> None:
    file = write(tmp_path, text)
    (problem,) = problems_of(file)
    assert problem.startswith(str(file)) and part in problem and "\n" not in problem


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert problems_of(file) == [f"{file}: not UTF-8 text"]
    assert problems_of(tmp_path / "nowhere.yaml") == [f"there is no recipe file {tmp_path / 'nowhere.yaml'}"]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "train:\n", "{}"])
def test_a_file_may_say_nothing(tmp_path: Path, text: str) -> None:
    config = resolve(config_files=[write(tmp_path, text)])
    assert config == RecipeConfig()


def test_name_and_description_come_from_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "# For pouring water.\n# Costs little.\ntrain: {steps: 3}\n", "pour.yaml")
    config = resolve(file)
    assert (config.name, config.description) == ("pour", "For pouring water.")
    assert resolve(file, words=["name=mine"]).name == "mine"


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 4096),
    rate=st.floats(1e-12, 1.0),
    batch=st.one_of(st.just("auto"), st.integers(1, 1024)),
    text=st.text(st.characters(blacklist_characters="$", codec="utf-8"), max_size=30).filter(
        lambda text: text != "???"
    ),
    clip=st.one_of(st.none(), st.floats(1e-3, 1e6)),
)
def test_a_resolved_recipe_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, rank: int, rate: float, batch: int, text: str, clip: float | None
) -> None:
    train = TrainConfig(learning_rate=rate, batch_size=batch, max_grad_norm=clip, betas=(0.5, 0.25))
    config = RecipeConfig(
        name="n", description=text or "d", adapt=AdaptConfig(lora=LoraConfig(rank=rank, dora=True)), train=train
    )
    file = write(tmp_path_factory.mktemp("recipe"), to_yaml(config), "recipe.yaml")
    assert resolve(file) == config


def test_precision_auto_depends_on_the_device() -> None:
    assert resolve_precision(PrecisionConfig(), on_gpu=True) == PrecisionConfig("bfloat16", "float32", "bfloat16")
    assert resolve_precision(PrecisionConfig(), on_gpu=False) == PrecisionConfig("float32", "float32", "float32")
    chosen = PrecisionConfig("float32", "bfloat16", "float32")
    assert resolve_precision(chosen, on_gpu=True) == chosen


def test_every_setting_is_explained() -> None:
    """Each field's line in the module ends in a comment, which is where users look settings up."""
    source = (ROOT / "vlaft/recipe/settings.py").read_text(encoding="utf-8")
    for key, _ in leaf_types():
        name = key.rpartition(".")[2]
        lines = [line for line in source.splitlines() if line.startswith(f"    {name}: ")]
        assert lines and all("  # " in line for line in lines), key
