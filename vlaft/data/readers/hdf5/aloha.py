"""ALOHA and ACT recordings: one file per episode, `/action` and `/observations/images/<camera>`.

What is peculiar:

* Compressed files hold one JPEG per row, padded with zeros; `compress_len` is in the recorder's camera order, which is
  not always the file's, so it is not used: a JPEG ends at its own end marker.
* The recorder hands RGB frames to an encoder that expects BGR: red and blue are exchanged *inside* the JPEG, and are
  exchanged back here. Raw frames are what they claim to be.
* Neither an instruction nor a control rate is recorded, as a rule.

Options: `swap_rb` (`auto`, `yes`, `no`: exchange red and blue; auto does so for encoded frames), `shift_action` (true
is ACT's own choice for real robots: step t gets the action of step t - 1, the first one its own; or a number of steps),
`instruction` (a text, or `{attribute | dataset | file_name: ...}`), `drop_last_observation` (true cuts the observation
after the last action).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py

from vlaft.data.layout import Layout
from vlaft.data.readers.hdf5.access import attribute, datasets, find, need_dataset, numeric_order, opened
from vlaft.data.readers.hdf5.dialect import (
    USUAL_ATTRIBUTES,
    Hdf5Reader,
    StoredEpisode,
    count_steps,
    folder_split,
    name_in,
    read_options,
    refuse,
)
from vlaft.data.readers.hdf5.episode import FrameFormat, detect_encoding, is_camera, main_first, short_names
from vlaft.data.readers.hdf5.proposal import refuse_other_frames
from vlaft.data.readers.reader import EpisodeRef
from vlaft.errors import DataError

OPTIONS = ("drop_last_observation", "instruction", "shift_action", "swap_rb")
_IMAGES = "observations/images/"


@dataclass(kw_only=True)
class AlohaReader(Hdf5Reader):
    """Episodes of ALOHA files."""

    swap_rb: bool | None
    observed = "observations/"

    def find(self, file: h5py.File, ref: EpisodeRef) -> StoredEpisode:
        """Find the episode, which is the whole file."""
        where = str(self.file_of(ref))
        stored = datasets(file, where, skip=("compress_len",))
        usual = [] if self.options.rule else [attribute(file, name, where) for name in USUAL_ATTRIBUTES]
        return StoredEpisode(
            where=where,
            group=file,
            length=_count_steps(file, where),
            datasets=stored,
            cameras={name: _format(stored[name], self.swap_rb) for name in _cameras(stored)},
            texts=[text.strip() for text in usual if isinstance(text, str) and text.strip()][:1],
        )


def looks_like_aloha(file: h5py.File, where: str) -> bool:
    """Tell by the dataset `action` beside the group `observations/images`."""
    action, images = find(file, "action", where), find(file, "observations/images", where)
    return isinstance(action, h5py.Dataset) and isinstance(images, h5py.Group)


def open_aloha(root: Path, files: list[Path], options: Mapping[str, object]) -> AlohaReader:
    """Open ALOHA episodes; `files` lie in `root`, or are `root` itself.

    Raises:
        ConfigError: an unknown option.
        DataError: damaged, or no camera images.
    """
    problems: list[str] = []
    shared = read_options(options, OPTIONS, "ALOHA files", problems, shift_when_true=-1)
    choices: dict[object, bool | None] = {"auto": None, "yes": True, "no": False, True: True, False: False}
    choice = options.get("swap_rb", "auto")
    if not isinstance(choice, str | bool) or choice not in choices:
        problems.append(f"'swap_rb' is {choice!r}; write auto, yes or no")
        choice = "auto"
    refuse(problems)
    swap_rb = choices[choice]
    warnings: list[str] = []
    refs: list[EpisodeRef] = []
    layout: Layout | None = None
    for path in sorted(files, key=lambda path: numeric_order(path.as_posix())):
        relative = name_in(root, path)
        with opened(path) as file:
            if _count_steps(file, str(path)) == 0:
                warnings.append(f"{path} has no steps and is left out")
                continue
            refs.append(EpisodeRef(len(refs), relative or path.name, folder_split(relative), (relative,)))
            if layout is None:
                layout = _layout(file, path, swap_rb, warnings)
    if layout is None:
        raise DataError(f"{root} holds no episodes with steps: record some first")
    return AlohaReader(
        path=root, format="aloha", layout=layout, warnings=warnings, refs=refs, options=shared, swap_rb=swap_rb
    )


def _layout(file: h5py.File, path: Path, swap_rb: bool | None, warnings: list[str]) -> Layout:
    stored = datasets(file, str(path))
    cameras = _cameras(stored)
    if not cameras:
        refuse_other_frames(path, "ALOHA does")
        raise DataError(f"{path} holds no camera images below '{_IMAGES}': record with cameras, images are needed")
    if swap_rb is None and any(_format(stored[name], None).swap_rb for name in cameras):
        warnings.append(
            f"{path.parent}: red and blue are exchanged in the compressed frames, as ALOHA's recorder stores them, and"
            " are exchanged back; look at a frame, and give swap_rb=no if its colours are wrong"
        )
    return Layout(
        action=("action",),
        state=("observations/qpos",) if "observations/qpos" in stored else (),
        cameras=short_names(cameras),
    )


def _count_steps(file: h5py.File, where: str) -> int:
    return count_steps(need_dataset(file, "action", where), "action", where)


def _cameras(stored: Mapping[str, h5py.Dataset]) -> list[str]:
    """Everything below `observations/images` but depth, which lies beside the colours under `<camera>_depth`."""
    images = [name for name in stored if name.startswith(_IMAGES) and not name.endswith("_depth")]
    return main_first([name for name in images if is_camera(stored[name]) or _is_encoded(stored[name])])


def _is_encoded(dataset: h5py.Dataset) -> bool:
    return detect_encoding(dataset) == "jpeg"


def _format(dataset: h5py.Dataset, swap_rb: bool | None) -> FrameFormat:
    encoding = detect_encoding(dataset)
    return FrameFormat(encoding=encoding, swap_rb=encoding == "jpeg" if swap_rb is None else swap_rb)
