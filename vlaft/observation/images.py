"""From a camera's frame to the square that the vision backbones take. What runs on tensors is in `augmentation`."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vlaft.documents import WrongValue, read_as, shown
from vlaft.errors import CheckpointError

Resize = Literal["lanczos", "bicubic"]
Strategy = Literal["resize-naive", "letterbox"]
Triple = tuple[float, float, float]

_IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# the backbones in the order in which their channels are stacked; the first prefix that fits is taken
_NORMALIZATION: dict[str, tuple[tuple[Triple, Triple], ...]] = {
    "dinosiglip": (_IMAGENET, _HALF),
    "dinoclip": (_IMAGENET, _CLIP),
    "dinov2": (_IMAGENET,),
    "siglip": (_HALF,),
    "in1k": (_HALF,),
    "clip": (_CLIP,),
}
_JPEG_QUALITY = 95  # TensorFlow's, with colours at half the resolution
_LIBERO = re.compile(r"libero_(spatial|object|goal|10|90|spatial_object_goal_10)(_no_noops)?")


@dataclass(frozen=True)
class ImagePipeline:
    """How a frame becomes the model's input.

    Attributes:
        size: edge of the square, in pixels.
        resize: resampling filter, with antialiasing; upstream trains with Lanczos and serves with bicubic.
        strategy: `"resize-naive"` ignores the aspect ratio; `"letterbox"` pads to a square first.
        letterbox_fill: colour of the padding, 0..255.
        center_crop: whether the model is to be used on the central 90 % of the area, as after training with
            random crops of that area (`augmentation.center_crop`); `prepare` does not crop.
        means: per backbone and channel, on the 0..1 scale.
        stds: likewise.
        jpeg: whether a frame goes through JPEG first, as OpenVLA's evaluation does with what a simulator drew;
            `"resized"` for frames of another size than `size` only, as OpenVLA-OFT does.
    """

    size: int
    resize: Resize
    strategy: Strategy
    letterbox_fill: tuple[int, int, int]
    center_crop: bool
    means: tuple[Triple, ...]
    stds: tuple[Triple, ...]
    jpeg: bool | Literal["resized"] = False

    def prepare(self, image: Image) -> Image:
        """Return the frame (uint8 `[H, W, 3]`) as uint8 `[size, size, 3]`."""
        from PIL import Image as PillowImage

        if self.jpeg is True or (self.jpeg and image.shape[:2] != (self.size, self.size)):
            image = _through_jpeg(image)
        resample = PillowImage.Resampling.LANCZOS if self.resize == "lanczos" else PillowImage.Resampling.BICUBIC
        if self.strategy == "letterbox":
            image = self._letterbox(image)
        height, width = image.shape[:2]
        if self.strategy == "letterbox":
            # one pixel short of a square where the padding was odd: scale the short side, then cut the long one
            short = min(height, width)
            shape = (int(self.size * width / short), int(self.size * height / short))
        else:
            shape = (self.size, self.size)
        if (width, height) != shape:
            image = np.asarray(PillowImage.fromarray(np.ascontiguousarray(image)).resize(shape, resample))
        top, left = round((shape[1] - self.size) / 2.0), round((shape[0] - self.size) / 2.0)
        return np.array(image[top : top + self.size, left : left + self.size])

    def _letterbox(self, image: Image) -> Image:
        height, width = image.shape[:2]
        edge = max(height, width)
        rows, columns = (edge - height) // 2, (edge - width) // 2
        padded = np.empty((height + 2 * rows, width + 2 * columns, 3), dtype=np.uint8)
        padded[:] = self.letterbox_fill
        padded[rows : rows + height, columns : columns + width] = image
        return padded

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict that `from_json` takes back."""
        value = asdict(self)
        if not self.jpeg:
            del value["jpeg"]  # as it was before there was such a key: records are compared
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ImagePipeline:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: a key is missing, unknown, or holds what it cannot.
        """
        try:
            pipeline = read_as(cls, value)
            if unknown := sorted(str(key) for key in set(value) - set(asdict(pipeline))):
                raise WrongValue(f"unknown key {shown(unknown[0])}")
        except WrongValue as error:
            raise CheckpointError(f"the image pipeline cannot be read ({error})") from error
        pipeline._check()
        return pipeline

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> ImagePipeline:
        """Return the pipeline that a checkpoint itself names; `for_acting` knows fine-tunes that name the wrong one.

        The key `image_pipeline`, which vlaft writes, wins: it is what the model was trained on. A release without
        it is used as its processor says (bicubic, no crop; docs/upstream.md, In the release's processor).

        Args:
            config: `config.json`.
            preprocessor: `preprocessor_config.json`, or None to go by the backbone's name.

        Raises:
            CheckpointError: a value is missing, unknown or contradicts another.
        """
        if isinstance(config.get("image_pipeline"), Mapping):
            return cls.from_json(config["image_pipeline"])
        preprocessor = preprocessor or {}
        try:
            sizes = [int(size[-1]) for size in preprocessor.get("input_sizes", ())] or [
                int(size) for size in config.get("image_sizes") or (224,)
            ]
            if "means" in preprocessor and "stds" in preprocessor:
                means, stds = _triples(preprocessor["means"]), _triples(preprocessor["stds"])
            else:
                means, stds = _normalization_of(str(config.get("vision_backbone_id", "siglip-vit-so400m")))
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"preprocessor_config.json: its sizes, means or stds cannot be read ({error})"
            ) from error
        if len(set(sizes)) != 1:
            raise CheckpointError(f"the vision backbones take images of different sizes {sizes}; they must be the same")
        strategy = preprocessor.get("image_resize_strategy") or config.get("image_resize_strategy") or "letterbox"
        pipeline = cls(
            size=sizes[0],
            resize="bicubic",
            strategy=strategy,  # type: ignore[arg-type]  # checked below
            # of a fused letterbox the last backbone's fill wins, upstream's loop overwrites it
            letterbox_fill=tuple(int(level * 255) for level in means[-1]),  # type: ignore[arg-type]
            center_crop=False,
            means=means,
            stds=stds,
        )
        pipeline._check()
        return pipeline

    @classmethod
    def for_acting(
        cls,
        config: Mapping[str, Any],
        preprocessor: Mapping[str, Any] | None = None,
        statistics: Collection[str] = (),
        *,
        resize: Resize | None = None,
        center_crop: bool | None = None,
    ) -> ImagePipeline:
        """Return the pipeline with which a checkpoint is to act.

        What vlaft recorded is kept. Of the others a fine-tune (`is_finetune`) is used as upstream evaluates its own:
        JPEG, Lanczos, the central 90 % (docs/upstream.md, At evaluation), and a release as its processor says.

        Args:
            config: `config.json`.
            preprocessor: `preprocessor_config.json`, or None.
            statistics: names of the dataset statistics by which it acts.
            resize: what is used instead. Where nothing is recorded, Lanczos means upstream's evaluation, and bicubic
                the release's processor, with all that goes with them but the crop.
            center_crop: likewise.

        Raises:
            CheckpointError: a value is missing, unknown or contradicts another.
        """
        pipeline = cls.from_checkpoint(config, preprocessor)
        if isinstance(config.get("image_pipeline"), Mapping):
            resize, crop = resize or pipeline.resize, pipeline.center_crop
            pipeline = replace(pipeline, resize=resize)
        else:
            crop = is_finetune(config, statistics)
            if (resize or ("lanczos" if crop else "bicubic")) == "lanczos":
                pipeline = replace(pipeline, resize="lanczos", strategy="resize-naive", jpeg=True)
        return replace(pipeline, center_crop=crop if center_crop is None else center_crop)

    @classmethod
    def for_training(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> ImagePipeline:
        """Return the pipeline for converting demonstrations to train this checkpoint with.

        A checkpoint of vlaft keeps its own; upstream trains every release on Lanczos-resized frames of ignored
        aspect ratio, whatever its processor does when it is served (docs/upstream.md, In training).
        """
        pipeline = replace(cls.from_checkpoint(config, preprocessor), jpeg=False)  # demonstrations are stored anyway
        if isinstance(config.get("image_pipeline"), Mapping):
            return pipeline
        return replace(pipeline, resize="lanczos", strategy="resize-naive")

    def _check(self) -> None:
        if not 1 <= self.size <= 4096:
            raise CheckpointError(f"an image size of {self.size} pixels is out of range")
        if self.resize not in get_args(Resize):
            raise CheckpointError(f"unknown resize filter {self.resize!r}; known: {', '.join(get_args(Resize))}")
        if self.strategy not in get_args(Strategy):
            raise CheckpointError(f"unknown resize strategy {self.strategy!r}; known: {', '.join(get_args(Strategy))}")
        if not 1 <= len(self.means) == len(self.stds) or any(std <= 0 for triple in self.stds for std in triple):
            raise CheckpointError("the image pipeline needs a mean and a positive std per backbone and channel")
        if len(self.letterbox_fill) != 3 or not all(0 <= level <= 255 for level in self.letterbox_fill):
            raise CheckpointError(f"the letterbox fill {self.letterbox_fill} is no RGB colour of levels 0 to 255")


def is_finetune(config: Mapping[str, Any], statistics: Collection[str]) -> bool:
    """Say whether a checkpoint is a fine-tune that nobody recorded a pipeline of, such as upstream's own.

    Its statistics tell: upstream leaves the base's in `config.json` and puts the fine-tune's beside the weights, and no
    base was trained on LIBERO's suites.

    Args:
        config: `config.json`.
        statistics: names of the dataset statistics by which it acts.

    >>> base = {"norm_stats": {"bridge_orig": {}, "fractal20220817_data": {}}}
    >>> is_finetune(base, ["bridge_orig", "fractal20220817_data"]), is_finetune(base, ["bridge_orig"])
    (False, True)
    >>> is_finetune({"norm_stats": {"libero_goal_no_noops": {}}}, ["libero_goal_no_noops"])
    True
    """
    if isinstance(config.get("image_pipeline"), Mapping) or not statistics:
        return False
    return set(statistics) != set(config.get("norm_stats") or ()) or any(map(_LIBERO.fullmatch, statistics))


def recorded(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, statistics: Collection[str]
) -> dict[str, Any]:
    """Return a `config.json` that says how a fine-tune is to be used, for a copy that looks like a base.

    Args:
        config: `config.json`; comes back as it is of whatever is no fine-tune.
        preprocessor: `preprocessor_config.json`, or None.
        statistics: names of the dataset statistics by which it acts.
    """
    if not is_finetune(config, statistics):
        return dict(config)
    return {**config, "image_pipeline": ImagePipeline.for_acting(config, preprocessor, statistics).to_json()}


def _through_jpeg(image: Image) -> Image:
    from PIL import Image as PillowImage

    file = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(image)).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling="4:2:0")
    return np.asarray(PillowImage.open(file))


def _triples(values: Any) -> tuple[Triple, ...]:
    result = []
    for value in values:
        red, green, blue = (float(channel) for channel in value)
        result.append((red, green, blue))
    return tuple(result)


def _normalization_of(backbone: str) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    for prefix, constants in _NORMALIZATION.items():
        if backbone.startswith(prefix):
            return tuple(mean for mean, _ in constants), tuple(std for _, std in constants)
    raise CheckpointError(
        f"the means and stds of vision backbone '{backbone}' are not known;"
        " its checkpoint needs a preprocessor_config.json"
    )


Image = NDArray[np.uint8]  # [height, width, 3], RGB, row 0 on top
