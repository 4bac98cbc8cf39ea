"""From a camera's frame to the square that the vision backbones take. What runs on tensors is in `augmentation`."""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    size: int
    resize: Resize
    strategy: Strategy
    letterbox_fill: tuple[int, int, int]
    center_crop: bool
    means: tuple[Triple, ...]
    stds: tuple[Triple, ...]

    def prepare(self, image: Image) -> Image:
        """Return the frame (uint8 `[H, W, 3]`) as uint8 `[size, size, 3]`."""
        from PIL import Image as PillowImage

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
        return asdict(self)

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
        """Return the pipeline with which a checkpoint is to be used.

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
    def for_training(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> ImagePipeline:
        """Return the pipeline for converting demonstrations to train this checkpoint with.

        A checkpoint of vlaft keeps its own; upstream trains every release on Lanczos-resized frames of ignored
        aspect ratio, whatever its processor does when it is served (docs/upstream.md, In training).
        """
        pipeline = cls.from_checkpoint(config, preprocessor)
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
