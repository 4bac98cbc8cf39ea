"""From images and an instruction to an action: a checkpoint with everything that it records about its input.

    policy = vlaft.load("model/")
    prediction = policy.predict(image, "pick up the red block")
    prediction.action  # float64 [A], in the robot's units

What makes it fast: prompts whose last block is computed at one position, a cache allocated once
(`vlaft.model.generation`), adapters folded into the weights (`vlaft.adapt.merging`), on a CPU oneDNN's weight layout
(`vlaft.model.packed_linear`), on a GPU recorded kernels (`vlaft.model.cuda_graphs`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from vlaft.action.statistics import choose_key
from vlaft.action.tokens import normalize, unnormalize
from vlaft.action.written import Written
from vlaft.adapt.policies import base_folder, check_policy, checkpoint_folder, policy_folder
from vlaft.checksums import files_hash
from vlaft.errors import Assumed, CheckpointError, DataError, UsageError
from vlaft.model.configuration import Policy as ModelPolicy
from vlaft.model.cuda_graphs import CudaGraphs
from vlaft.model.load import fill_policy, load_model
from vlaft.model.packed_linear import pack_linears
from vlaft.observation.batch import Observation
from vlaft.observation.images import Image, ImagePipeline, Resize, is_finetune
from vlaft.observation.prompts import BaseFiles, load_base_files, prompt_style_of
from vlaft.recipe.resolve import given_policy
from vlaft.weights.layout import check_tensor_checksums, fingerprint
from vlaft.weights.trained import Trained, base_name, check_base, find_trained, is_trained, statistics_of

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_QUANTIZED = ("int8", "nf4")


@dataclass(frozen=True)
class Prediction:
    """What a policy answers to one observation: K actions of A dimensions; the released OpenVLA answers one.

    Attributes:
        actions: float64 `[K, A]`, in the robot's units.
        normalized_actions: float64 `[K, A]`, in [-1, 1].
        action_token_ids: the K * A token ids, as generated; None of a policy without tokens.
        unnorm_key: name of the statistics that turned one into the other.
        non_action_tokens: how many of the ids stand for no action; each was read as a full move, so a robot should
            not act on a prediction that has any.
    """

    actions: NDArray[np.float64]
    normalized_actions: NDArray[np.float64]
    action_token_ids: tuple[int, ...] | None
    unnorm_key: str
    non_action_tokens: int

    @property
    def action(self) -> NDArray[np.float64]:
        """The first action, float64 `[A]`, in the robot's units."""
        return self.actions[0]

    @property
    def normalized_action(self) -> NDArray[np.float64]:
        """The first action, float64 `[A]`, in [-1, 1]."""
        return self.normalized_actions[0]


@dataclass(frozen=True)
class Policy:
    """A loaded checkpoint; `load` makes one.

    Attributes:
        model: in eval mode, with its adapter folded in where it has one; for prediction only.
        files: tokenizer, prompt style and action tokens.
        pipeline: how frames become input.
        statistics: dataset name to statistics.
        device: where the model is.
        graphs: recordings of predictions on a GPU; None where none are made.
    """

    model: Any
    files: BaseFiles
    pipeline: ImagePipeline
    statistics: Mapping[str, Any]
    device: torch.device
    graphs: CudaGraphs | None = None

    def predict(
        self,
        images: Image | Mapping[str, Image] | Sequence[Image | Mapping[str, Image]],
        instruction: str | Sequence[str],
        *,
        state: ArrayLike | None = None,
        unnorm_key: str | None = None,
        action_ids_only: bool = False,
    ) -> Any:
        """Predict what to do at one moment, or at each of several in one batch.

        Rows of a batch do not see each other: each gets the action that it would get alone, up to rounding.

        Args:
            images: uint8 `[H, W, 3]` RGB of any size; of a policy with several cameras a mapping from their names to
                such frames. Or a list of either.
            instruction: one for all, or one for each image.
            state: of a policy that reads it, the robot's state as recorded: `[S]`, or `[B, S]` for a list.
            unnorm_key: name of the statistics to use; needed only where the checkpoint has several.
            action_ids_only: choose among action tokens only.

        Returns:
            A `Prediction`, or a list of them for a list of images.

        Raises:
            DataError: an image is not uint8 RGB, a camera or the state is missing, the numbers of images and
                instructions differ, or the key is missing or unknown.
        """
        several = not isinstance(images, Mapping) and (not isinstance(images, np.ndarray) or images.ndim == 4)
        moments: list[Any] = list(images) if several else [images]
        texts = [instruction] * len(moments) if isinstance(instruction, str) else list(instruction)
        if len(texts) != len(moments):
            raise DataError(
                f"{len(moments)} images and {len(texts)} instructions: give one instruction, or one for each"
            )
        if not moments:
            return []
        key = choose_key(self.statistics, unnorm_key)
        frames = [self._frames(moment, index) for index, moment in enumerate(moments)]
        observation = self.observe(
            [self.files.prompt_token_ids(text) for text in texts],
            np.stack([np.stack([self.pipeline.prepare(frame) for frame in each]) for each in frames]),
            self._state(state, key, len(moments)),
        )
        written = self.model.head.predict(
            self.model,
            observation,
            len(self.statistics[key]["action"]["q01"]),
            action_ids_only=action_ids_only,
            graphs=self.graphs,
        )
        predictions = [self._prediction(written[[row]], key) for row in range(len(moments))]
        return predictions if several else predictions[0]

    def observe(
        self, prompts: Sequence[Sequence[int]], frames: NDArray[np.uint8], state: NDArray[np.float32] | None = None
    ) -> Observation:
        """Return what the model reads.

        Args:
            prompts: B lists of token ids.
            frames: uint8 `[B, size, size, 3]`, as `pipeline.prepare` gives them, or `[B, N, size, size, 3]`.
            state: float32 `[B, S]`, normalised, of a policy that reads it.
        """
        return Observation.of(
            prompts,
            frames,
            self.pipeline,
            pad_id=self.files.tokenizer.pad_id,
            device=self.device,
            dtype=self.model.dtype,
            state=state,
        )

    def _prediction(self, written: Written, key: str) -> Prediction:
        ids, is_action = written.token_ids, written.is_action
        statistics = self.statistics[key]["action"]
        return Prediction(
            actions=unnormalize(written.actions[0], statistics, self.model.policy.normalization),
            normalized_actions=written.actions[0],
            action_token_ids=None if ids is None else tuple(int(token) for token in ids.ravel()),
            unnorm_key=key,
            non_action_tokens=0 if is_action is None else int((~is_action).sum()),
        )

    def _frames(self, moment: Any, index: int) -> list[Image]:
        """Return the frames of the policy's cameras at one moment, in its order."""
        cameras = list(self.model.policy.cameras)
        if not isinstance(moment, Mapping):
            if len(cameras) > 1:
                raise DataError(
                    f"the policy looks through {', '.join(cameras)}: give image {index} as a mapping of these"
                )
            moment = {cameras[0]: moment}
        if missing := [camera for camera in cameras if camera not in moment]:
            there = ", ".join(moment)
            raise DataError(f"image {index} lacks the camera '{missing[0]}', which the policy reads (it has: {there})")
        frames = [moment[camera] for camera in cameras]
        for frame in frames:
            if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                shape = getattr(frame, "shape", type(frame).__name__)
                raise DataError(f"image {index} must be uint8 [height, width, 3] in RGB, not {shape}")
        return frames

    def _state(self, state: ArrayLike | None, key: str, count: int) -> NDArray[np.float32] | None:
        """Return the robot's states `[B, S]`, normalised, or None of a policy that reads none."""
        policy = self.model.policy
        if not policy.state:
            return None
        if state is None:
            raise DataError(f"the policy reads the robot's state: give its {policy.state_size} numbers")
        with np.errstate(over="ignore"):  # told below
            values = np.atleast_2d(np.asarray(state, dtype=np.float32))
        if values.shape != (count, policy.state_size):
            raise DataError(f"the policy reads states of {policy.state_size} numbers, not {list(np.shape(state))}")
        if not np.isfinite(values).all():
            raise DataError("the state holds a number that is not finite, or too large for a float32")
        if "proprio" not in self.statistics[key]:
            raise DataError(f"the statistics of '{key}' say nothing of the state, which the policy reads")
        return normalize(values, self.statistics[key]["proprio"], policy.normalization)


def load(
    source: str | Path,
    *,
    base: str | None = None,
    checkpoint: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    policy: Mapping[str, Any] | None = None,
    center_crop: bool | None = None,
    resize: str | None = None,
) -> Policy:
    """Load a checkpoint for prediction.

    A run or an adapter answers as the checkpoint that it is merged into: what was trained is put into the weights
    here, with merging's own arithmetic. Where the weights are quantised while they are loaded (`dtype="nf4"`), an
    adapter stays beside them in full precision, as it was in `qlora32` training.

    Args:
        source: a merged or exported checkpoint (quantised ones too), a base (folder or Hub id), a run, an adapter, or a
            folder of OpenVLA-OFT's.
        base: of a run or adapter: the base, where it is no longer where training found it.
        checkpoint: of a run: `best`, `last` or `step-000500`.
        dtype: `float32`, `bfloat16` or `float16`, or `int8` or `nf4` to quantise while loading; None takes bfloat16
            on a GPU and float32 on a CPU. A checkpoint that was saved quantised stays so, and `dtype` is the type of
            what is not quantised in it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        policy: what a folder of OpenVLA-OFT's does not tell: `{"chunk": 8, "cameras": ["main", "wrist"],
            "normalization": "q99"}`.
        center_crop: whether the model acts on the central 90 % of frames; None does as the checkpoint says, and takes
            that of a fine-tune that says nothing.
        resize: filter for frames, `lanczos` or `bicubic`; None likewise (`ImagePipeline.for_acting`).

    Warns:
        Assumed: it is a fine-tune that does not say how its frames are prepared.

    Raises:
        CheckpointError: something is missing, damaged, or does not fit together.
        ConfigError: `policy` is not what the checkpoint is.
        MissingExtra: quantised weights, and bitsandbytes is not installed.
        UsageError: there is no such device or filter.
    """
    place = _place(device)
    default = "bfloat16" if place.type == "cuda" else "float32"
    if dtype is not None and dtype not in (*_TYPES, *_QUANTIZED):
        raise CheckpointError(f"dtype '{dtype}' is not known: give {', '.join(_TYPES)}, int8 or nf4")
    if resize not in (None, *get_args(Resize)):
        raise UsageError(f"--resize {resize}: give {' or '.join(get_args(Resize))}")
    kind = _TYPES.get(dtype or default, _TYPES[default])
    quantize = dtype if dtype in _QUANTIZED else None
    path = Path(source)
    trained = find_trained(path, checkpoint) if path.is_dir() and is_trained(path) else None
    said = given_policy({"policy": dict(policy)}) if policy else {}
    if trained is None:
        folder = policy_folder(str(source), said, base=base)
    else:
        folder = _base_of(trained, base)
        check_policy(ModelPolicy.of(trained.inference, str(path)), said, str(path))
    files = load_base_files(folder)
    if trained is not None:
        files = replace(files, config={**files.config, **trained.inference})
        files = replace(files, prompt_style=prompt_style_of(files.config))
    bare = trained is not None  # what was trained brings modules of its own, in the place of the base's
    model = load_model(folder, dtype=kind, device=place, quantization=_quantization(quantize, kind), bare=bare)
    if trained is not None:
        model = _with_trained(model, trained, folder)
        if files.config.get("policy"):
            _attach_policy(model, trained, folder, files.config)
    if place.type == "cpu" and not getattr(model, "is_quantized", False):
        pack_linears(model)
    statistics = statistics_of(trained, folder, files.config)
    pipeline = ImagePipeline.for_acting(
        files.config,
        files.preprocessor,
        statistics,
        resize=resize,  # type: ignore[arg-type]  # checked above
        center_crop=center_crop,
    )
    if None in (resize, center_crop) and is_finetune(files.config, statistics):
        _tell_assumed(str(source), pipeline, statistics)
    return Policy(model, files, pipeline, statistics, place, _graphs(model, place))


def weights_hash(source: str | Path) -> str:
    """Return a hash by which it is seen that a checkpoint is the one that it was: its files' names, sizes and times.

    Args:
        source: as `load` takes it.

    Raises:
        CheckpointError: it is not there.
    """
    path = Path(source)
    folder = find_trained(path).weights if path.is_dir() and is_trained(path) else checkpoint_folder(str(source))
    return files_hash(folder, (file for suffix in ("safetensors", "pt", "json") for file in folder.glob(f"*.{suffix}")))


def _tell_assumed(name: str, pipeline: ImagePipeline, statistics: Mapping[str, Any]) -> None:
    crop = "cropped" if pipeline.center_crop else "not cropped"
    how = f"{'through JPEG, ' if pipeline.jpeg else ''}by {pipeline.resize}, {crop}"
    warnings.warn(
        f"{name} is a fine-tune ({', '.join(sorted(statistics))}) that does not say how its frames are prepared, so"
        f" they are as in OpenVLA's own evaluation: {how}; --resize and --[no-]center-crop say otherwise",
        Assumed,
        stacklevel=3,
    )


def _place(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: give auto, cpu, cuda or cuda:N")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: {torch.cuda.device_count()} GPUs are here; give auto or cpu")
    return place


def _quantization(kind: str | None, compute: torch.dtype) -> Any:
    if kind is None:
        return None
    from vlaft.adapt.methods import quantization_config
    from vlaft.recipe.settings import AdaptConfig

    return quantization_config(AdaptConfig(quantize=kind, double_quant=kind == "nf4"), compute)  # type: ignore[arg-type]


def _graphs(model: Any, device: torch.device) -> CudaGraphs | None:
    """Products in 8 bits look for outliers, on the host, which cannot be recorded."""
    return CudaGraphs() if device.type == "cuda" and not getattr(model, "is_loaded_in_8bit", False) else None


def _base_of(trained: Trained, base: str | None) -> Path:
    folder = base_folder(base_name(trained, base), trained.inference.get("policy"))
    if trained.base_checksums is not None:
        check_tensor_checksums(folder, trained.base_checksums)
    check_base(trained, folder, fingerprint(folder))
    return folder


def _with_trained(model: Any, trained: Trained, base: Path) -> Any:
    """Fold in what was trained; an adapter on quantised weights stays beside them."""
    from vlaft.adapt.merging import changes, fold

    beside = trained.has_adapter and getattr(model, "is_quantized", False)
    fold(model, base, changes(trained, base, adapter=not beside))
    if not beside:
        return model
    from vlaft.adapt.adapter import load_adapter

    return load_adapter(model, trained.weights)


def _attach_policy(model: Any, trained: Trained, base: Path, config: Mapping[str, Any]) -> None:
    """Give a model the head and the other modules that were trained in full beside its adapter."""
    from vlaft.adapt.merging import policy_tensors

    model.attach(ModelPolicy.of(config, str(trained.run or trained.weights)))
    fill_policy(model, policy_tensors(trained, base), str(trained.weights))
