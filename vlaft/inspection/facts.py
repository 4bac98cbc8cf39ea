"""What is in a set of demonstrations: the facts that `vlaft inspect` shows, and warns about.

Actions are read whole, in the precision in which they are stored; of the frames, a few per episode are decoded.
A damaged episode is a fact too: it is listed, and the others are measured.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlaft.data.episode import Episode, Frames
from vlaft.data.layout import Layout, apply_layout, likely_action, read_columns
from vlaft.data.sentences import word
from vlaft.data.source import OpenedSource, Progress, SourceRequest, first_of_splits, open_request, silent
from vlaft.data.standardize.evidence import Opening, check_gripper, finger_opening
from vlaft.data.standardize.steps import parse_steps, standardize
from vlaft.errors import ConfigError, DataError
from vlaft.inspection.contents import Contents, NotInspected, contents_of_path, contents_of_source
from vlaft.observation.images import Image

Shape = tuple[int, int, int]  # height, width, channels

FRAME_STEPS = ("rotate", "flip_rows", "swap_red_blue")  # standardizing steps that change frames alone
_ARRAYS_NAMED = 12  # in a sentence
EPISODES_LOOKED_AT = 48  # of which frames are decoded: a video has to be decoded from its start to each frame

# What readers put before a camera's own name, by format: RLDS, robomimic and LIBERO, ALOHA.
_CAMERA_PREFIX = re.compile(r"^(observations/images/|observation/|obs/)")
FRAMES_PER_EPISODE = 8
THUMBNAIL_HEIGHT = 96  # pixels
_DARK = 8.0  # mean level of 0..255 below which a frame counts as black; a lens cap in a dim room stays below
_FLAT = 1.0  # standard deviation in levels below which a frame is of one colour
_RUN = 3  # frames that make a stretch; two may be alike where the arm waits
_STILL = 0.25  # mean difference in levels; a still scene through a lossy codec differs by more than a frozen one


@dataclass(frozen=True, kw_only=True)
class EpisodeFacts:
    """One episode.

    Attributes:
        name: as the source calls it.
        split: the source's own split, or None.
        steps: T, as stored.
        instruction: empty when there is none.
        instructions: all of them, where its steps have several.
        fps: control rate in Hz, or None.
        action: the raw action `[T, A]` float64: the arrays that the layout names, unchanged.
        standardized: the action after the layout's steps `[T', A']`, or None where these refuse the episode.
        state: `[T', S]` after the steps, or None.
        opening: per stored step how far measured fingers are apart `[T]`, or None where nothing tells.
        opening_after: likewise after the steps `[T']`.
        names: of the standardized action's dimensions, or empty.
        refused: why a conversion would refuse the episode, or an empty text.
        cameras: what some of its frames show, by the camera's stored name; empty where none was looked at.
    """

    name: str
    split: str | None
    steps: int
    instruction: str
    fps: float | None
    action: NDArray[np.float64]
    standardized: NDArray[np.float32] | None = None
    state: NDArray[np.float32] | None = None
    opening: Opening | None = None
    opening_after: Opening | None = None
    names: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    refused: str = ""
    cameras: Mapping[str, CameraFacts] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found.

    Attributes:
        path: what was inspected.
        name: the dataset's name.
        kind: a source of demonstrations, or a dataset that `vlaft convert` wrote.
        format: the source's format, or "vlaft".
        preset: the preset that was given, or None.
        layout: how arrays become action, state and cameras; of a converted dataset, its first source's.
        source_steps: the standardizing steps that the reader itself proposes.
        episodes: all that could be read.
        unreadable: names of the others, with why.
        shapes: per camera, by its stored name, the frames' height, width and channels as stored; a camera of which no
            first frame can be decoded is absent.
        split_shapes: likewise per split: frames may differ in size between episodes.
        labels: stored name of a camera to the layout's name for it; cameras that the layout leaves out are absent.
        references: stored name of a camera to its full path in the source.
        pictures: per camera the first frame as stored and as converted, where thumbnails were asked for.
        told: what reader and conversion have warned about.
        question: what the user has to answer before the source can be converted, or an empty text.
        contents: what lies in the first episode or its file, also what the layout does not use; None of converted data.
    """

    path: Path
    name: str
    kind: Literal["source", "converted"]
    format: str
    preset: str | None
    layout: Layout
    source_steps: tuple[Any, ...] = ()
    episodes: tuple[EpisodeFacts, ...]
    unreadable: tuple[tuple[str, str], ...] = ()
    shapes: Mapping[str, Shape]
    split_shapes: Mapping[str | None, Mapping[str, Shape]] = field(default_factory=dict)
    labels: Mapping[str, str]
    references: Mapping[str, str]
    pictures: Mapping[str, tuple[Image, Image]] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    question: str = ""
    contents: Contents | None = None

    @property
    def damaged(self) -> list[tuple[str, str]]:
        """Names of the episodes of which nothing or not all can be read, each with why."""
        frames = [(e.name, facts.error) for e in self.episodes for facts in e.cameras.values() if facts.error]
        known = {name for name, _ in frames}
        refused = [(e.name, e.refused) for e in self.episodes if e.refused and e.name not in known]
        # where every episode is refused it is not they that are damaged, but a setting that is wrong
        return [*self.unreadable, *frames, *(refused if len(refused) < len(self.episodes) else [])]

    @property
    def action(self) -> NDArray[np.float64]:
        """The raw action over all steps `[N, A]`."""
        return np.concatenate([episode.action for episode in self.episodes])

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the raw action's dimensions, or empty."""
        names = self.layout.action_names
        return tuple(names) if len(names) == self.episodes[0].action.shape[1] else ()

    @property
    def fps(self) -> float | None:
        """The rate of most episodes, or None."""
        rates = Counter(episode.fps for episode in self.episodes)
        return rates.most_common(1)[0][0]

    @property
    def instructions(self) -> list[str]:
        """The instructions in order of appearance; an empty one only beside others."""
        return instructions_of(self.episodes)

    @property
    def standardized(self) -> list[EpisodeFacts]:
        """The episodes that the layout's steps accept, of the width that most of them have."""
        usable = [episode for episode in self.episodes if episode.standardized is not None]
        widths = Counter(episode.standardized.shape[1] for episode in usable if episode.standardized is not None)
        width = widths.most_common(1)[0][0] if widths else 0
        return [entry for entry in usable if entry.standardized is not None and entry.standardized.shape[1] == width]


def instructions_of(episodes: Sequence[EpisodeFacts]) -> list[str]:
    """Return the instructions in order of appearance; an empty one only beside others."""
    texts = list(dict.fromkeys(text for each in episodes for text in each.instructions or (each.instruction,)))
    return texts if any(text.strip() for text in texts) else []


def inspect_source(
    request: SourceRequest,
    *,
    limit: int | None = None,
    frames: bool = True,
    thumbnails: bool = False,
    progress: Progress = silent,
) -> Inspection:
    """Read a source of demonstrations and measure it.

    Args:
        request: the source, with preset and settings as `vlaft convert` takes them.
        limit: only the first episodes of each split.
        frames: whether to decode frames, beyond the first one of each camera.
        thumbnails: whether to keep small copies of them.
        progress: called with the phase, how much of it is done, and its total.

    Raises:
        ConfigError: the preset or a setting is wrong.
        NotInspected: the source cannot be opened, no episode of it can be read, or it is not known which arrays are
            the action; it carries what lies there.
    """
    try:
        opened = open_request(request)
        refs = first_of_splits(opened.reader.episodes(), limit)
    except DataError as error:
        raise NotInspected(str(error), contents_of_path(request.path)) from error
    if not refs:
        raise DataError(f"{request.path} has no episodes")
    looked_at = {refs[position].index for position in evenly(len(refs), EPISODES_LOOKED_AT)} if frames else set()
    frame_steps = [spec for spec in opened.layout.steps if parse_steps([spec])[0].name in FRAME_STEPS]
    episodes: list[EpisodeFacts] = []
    unreadable: list[tuple[str, str]] = []
    cameras: _Cameras | None = None
    split_shapes: dict[str | None, Mapping[str, Shape]] = {}
    for done, ref in enumerate(refs):
        progress("reading episodes", done, len(refs))
        try:
            episode = opened.reader.read(ref)
            facts = _measure(episode, opened)
            if episodes and facts.action.shape[1] != episodes[0].action.shape[1]:
                raise DataError(
                    f"episode '{ref.name}': the action has {facts.action.shape[1]} dimensions where the episodes before"
                    f" have {episodes[0].action.shape[1]}"
                )
        except (DataError, ConfigError) as error:
            unreadable.append((ref.name, str(error)))
            continue
        view = _with_frame_steps(episode, opened.layout, frame_steps)
        shown: dict[str, CameraFacts] = {}
        if cameras is None or ref.split not in split_shapes or len(cameras.shapes) < len(cameras.references):
            seen, broken = _cameras(episode, view, opened.layout, thumbnails)
            shown = {name: CameraFacts(error=why) for name, why in broken.items()}
            split_shapes[ref.split] = {**seen.shapes, **split_shapes.get(ref.split, {})}
            cameras = seen if cameras is None else cameras.completed(seen)
        if ref.index in looked_at:
            shown = {
                stored: look_at(_frames_of(stored, cameras, episode, view), thumbnails=thumbnails)
                for stored, path in cameras.references.items()
                if path in episode.cameras
            }
        episodes.append(replace(facts, cameras=shown))
    progress("reading episodes", len(refs), len(refs))
    if cameras is None:
        raise NotInspected(unreadable[0][1], contents_of_source(opened.reader, refs[0]))
    inspection = Inspection(
        path=request.path,
        name=opened.name,
        kind="source",
        format=opened.reader.format,
        preset=request.preset,
        layout=opened.layout,
        source_steps=tuple(opened.reader.layout.steps),
        episodes=tuple(episodes),
        unreadable=tuple(unreadable),
        shapes=cameras.shapes,
        split_shapes=split_shapes,
        labels=cameras.labels,
        references=cameras.references,
        pictures=cameras.pictures,
        # the action is known by now, so a reader's remark that it found no column for it is settled
        told=tuple(text for text in opened.warnings if not re.match("there is no (single )?action column", text)),
        contents=contents_of_source(opened.reader, next(ref for ref in refs if ref.name == episodes[0].name)),
    )
    usable = inspection.standardized
    actions = [entry.standardized for entry in usable if entry.standardized is not None]
    gripper = check_gripper(
        opened, actions, usable[0].names if usable else (), [entry.opening_after for entry in usable]
    )
    return replace(inspection, told=(*inspection.told, *gripper.warnings), question=gripper.question)


@dataclass(frozen=True)
class _Cameras:
    shapes: Mapping[str, Shape]
    labels: Mapping[str, str]
    references: Mapping[str, str]
    pictures: Mapping[str, tuple[Image, Image]]

    def completed(self, other: _Cameras) -> _Cameras:
        """Return this with what only another episode shows: of a camera whose first frame here is damaged."""
        return replace(self, shapes={**other.shapes, **self.shapes}, pictures={**other.pictures, **self.pictures})


def _measure(episode: Episode, opened: OpenedSource) -> EpisodeFacts:
    """Return all facts but those about frames; what standardizing refuses becomes `refused`."""
    layout = opened.layout
    paths = [reference.partition("[")[0] for reference in layout.action]
    if not paths or any(path not in episode.arrays for path in paths):
        raise DataError(_which_action(episode, opened, [path for path in paths if path not in episode.arrays]))
    columns = [read_columns(episode, reference).astype(np.float64) for reference in layout.action]
    facts = EpisodeFacts(
        name=episode.name,
        split=episode.split,
        steps=episode.length,
        instruction=episode.instruction if layout.instruction is None else layout.instruction,
        instructions=tuple(dict.fromkeys(episode.instructions)) if layout.instruction is None else (),
        fps=episode.fps if layout.fps is None else layout.fps,
        action=np.concatenate(columns, axis=1),
    )
    try:
        chosen = apply_layout(episode, layout)
        facts = replace(facts, opening=finger_opening(chosen))
        changed = standardize(chosen, layout.steps)
    except (DataError, ConfigError) as error:
        return replace(facts, refused=str(error))
    return replace(
        facts,
        standardized=changed.action,
        state=changed.state,
        opening_after=finger_opening(changed),
        names=changed.action_names,
        fps=changed.fps,
    )


def _with_frame_steps(episode: Episode, layout: Layout, steps: Sequence[Any]) -> Episode | None:
    """Return the episode with the layout's cameras and only the steps on frames, so that frame t stays frame t."""
    try:
        chosen = apply_layout(replace(episode, action=None), layout)
        return standardize(chosen, steps)
    except (DataError, ConfigError):
        return None


def _cameras(
    episode: Episode, view: Episode | None, layout: Layout, thumbnails: bool
) -> tuple[_Cameras, dict[str, str]]:
    """Decode the first frame of every camera, as its size is not believed from metadata; and say where that fails."""
    stored = [_CAMERA_PREFIX.sub("", path) for path in episode.cameras]
    references = {
        name if stored.count(name) == 1 else path: path for name, path in zip(stored, episode.cameras, strict=True)
    }
    ours = {path: label for label, path in layout.cameras.items()}
    # in the layout's order, which puts the main camera first; what it leaves out follows
    order = list(layout.cameras.values())
    ordered = sorted(references, key=lambda name: order.index(references[name]) if references[name] in order else 999)
    references = {name: references[name] for name in ordered}
    labels = {name: ours[path] for name, path in references.items() if path in ours}
    cameras = _Cameras({}, labels, references, {})
    shapes: dict[str, Shape] = {}
    pictures: dict[str, tuple[Image, Image]] = {}
    broken: dict[str, str] = {}
    for name, path in references.items():
        try:
            image = next(iter(episode.cameras[path].read([0])))
            if thumbnails:
                pictures[name] = (image, next(iter(_frames_of(name, cameras, episode, view).read([0]))))
        except DataError as error:
            broken[name] = str(error)
            continue
        shapes[name] = (image.shape[0], image.shape[1], image.shape[2])
    return replace(cameras, shapes=shapes, pictures=pictures), broken


def _frames_of(stored: str, cameras: _Cameras, episode: Episode, view: Episode | None) -> Any:
    """Return a camera's frames, as converted where the layout keeps the camera."""
    label = cameras.labels.get(stored)
    if view is not None and label in view.cameras:
        return view.cameras[str(label)]
    return episode.cameras[cameras.references[stored]]


def _which_action(episode: Episode, opened: OpenedSource, missing: Sequence[str]) -> str:
    """Say which arrays there are, and what to type."""
    shapes = {
        name: np.shape(episode.arrays[name])
        for name in episode.arrays
        if np.asarray(episode.arrays[name]).dtype.kind in "biuf"
    }
    lacking = f"there is no array {', '.join(missing)}" if missing else "no array is called so"
    known = [f"{name} {list(shape[1:])}" for name, shape in sorted(shapes.items())]
    more = f" and {len(known) - _ARRAYS_NAMED} more" if len(known) > _ARRAYS_NAMED else ""
    told = f"there are, with their widths: {', '.join(known[:_ARRAYS_NAMED]) or 'none'}{more}"
    example = likely_action(shapes)
    typed = f"type for example {word('action', example)}" if example else "name them with action='[...]'"
    return f"{opened.request.path}: it is not known which arrays are the action ({lacking}; {told}); {typed}"


@dataclass(frozen=True)
class CameraFacts:
    """What a few frames of one camera show, over one episode.

    Attributes:
        steps: which frames were looked at.
        black: how many of them are black.
        flat: how many are of one colour, black ones included.
        frozen: whether all of them are the same picture.
        paired: which of them the frame after was looked at too.
        repeated: which of these it repeats, to the last bit.
        still: first and last of the longest run of frames looked at that show one picture to the last bit, where these
            are three or more and neither is the episode's whole; else None.
        thumbnails: small copies of them, where asked for.
        error: why a frame could not be decoded, or an empty text.
    """

    steps: tuple[int, ...] = ()
    black: int = 0
    flat: int = 0
    frozen: bool = False
    paired: tuple[int, ...] = ()
    repeated: tuple[int, ...] = ()
    still: tuple[int, int] | None = None
    thumbnails: tuple[Image, ...] = ()
    error: str = ""


def look_at(frames: Frames, *, thumbnails: bool = False) -> CameraFacts:
    """Decode up to `FRAMES_PER_EPISODE` frames, from the first to the last at even distances, and measure them.

    The frame after each is decoded too, to see whether pictures repeat.
    """
    try:
        count = len(frames)
    except DataError as error:  # a video that is no video, or has too few frames
        return CameraFacts(error=str(error))
    if count == 0:
        return CameraFacts()
    steps = np.unique(np.linspace(0, count - 1, min(count, FRAMES_PER_EPISODE)).round().astype(int)).tolist()
    black = flat = 0
    differs = False
    first: Image | None = None
    before: Image | None = None
    runs: list[list[int]] = []
    repeated: list[int] = []
    kept: list[Image] = []
    wanted = sorted({*steps, *(step + 1 for step in steps if step + 1 < count)})
    try:
        for step, image in zip(wanted, frames.read(wanted), strict=True):
            same = before is not None and np.array_equal(before, image)
            if same and step - 1 in steps:
                repeated.append(step - 1)
            if step not in steps:
                continue  # `before` stays the last frame that was looked at
            if same:
                runs[-1].append(step)
            else:
                runs.append([step])
            before = image
            black += bool(image.mean() < _DARK)
            flat += bool(image.std(axis=(0, 1)).max() < _FLAT)
            if first is None:
                first = image
            elif not differs:
                differs = float(np.abs(image.astype(np.int16) - first).mean()) > _STILL
            if thumbnails:
                kept.append(thumbnail(image))
    except DataError as error:
        return CameraFacts(steps=tuple(steps), thumbnails=tuple(kept), error=str(error))
    longest = max(runs, key=len)
    return CameraFacts(
        steps=tuple(steps),
        black=black,
        flat=flat,
        frozen=len(steps) > 1 and not differs,
        paired=tuple(step for step in steps if step + 1 < count),
        repeated=tuple(repeated),
        still=(longest[0], longest[-1]) if _RUN <= len(longest) < len(steps) else None,
        thumbnails=tuple(kept),
    )


def thumbnail(image: Image) -> Image:
    """Return the image shrunk to `THUMBNAIL_HEIGHT` at most (uint8 `[H', W', 3]`), the aspect ratio kept."""
    from PIL import Image as PillowImage

    height, width = image.shape[:2]
    if height <= THUMBNAIL_HEIGHT:
        return image
    size = (max(1, round(width * THUMBNAIL_HEIGHT / height)), THUMBNAIL_HEIGHT)
    return np.asarray(PillowImage.fromarray(np.ascontiguousarray(image)).resize(size, PillowImage.Resampling.BOX))


def evenly(count: int, most: int) -> Sequence[int]:
    """Return at most `most` of the numbers 0 to `count` - 1, at even distances.

    >>> list(evenly(3, 5)), list(evenly(9, 3))
    ([0, 1, 2], [0, 4, 8])
    """
    if count <= most:
        return range(count)
    return [int(position) for position in np.linspace(0, count - 1, most).round()]
