"""Folders of images, one sub-folder per class."""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from isthmus.data.archive import unpacked
from isthmus.data.folder import check_link
from isthmus.data.source import Example, check_split
from isthmus.data.text import check_fraction, is_held_out

_SUFFIXES = frozenset(
  ".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
)


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """Images in sub-folders that are named after their classes.

  An example holds image float32 [size, size, channels] in [0, 1] and label
  int32 []: the class's place among the sorted names of the sub-folders. The
  shorter side is scaled to `size`, the longer one cropped about its centre.

  Args:
    path: folder of the class folders, or a .zip or .tar (.gz, .bz2, .xz) of
      it. An archive is unpacked once into the cache, by its hash; if all in
      it lies in one folder of folders, that one is meant.
    size: height and width, in pixels.
    channels: 3 for RGB or 1 for grey.
    eval_fraction: share of the images that is held out, by a hash of their
      names.
    eval_path: a folder or archive with the same classes that holds the eval
      split instead; eval_fraction is then not used.
    max_bytes: the most that an archive may unpack to.
    max_files: the most files and folders in an archive.

  Raises:
    ValueError: size < 1, channels other than 1 and 3, eval_fraction outside
      [0, 1]; when opened, links out of the folder, or eval classes that the
      training folder lacks, or an archive that is damaged or refused (see
      archive.extract); when read, a file that is not a whole image.
    FileNotFoundError: when opened, no such folder, or no image in it.
    ImportError: when opened, where pillow is missing.

  Example:
    >>> import PIL.Image
    >>> for name in ("cat", "dog"):
    ...   pathlib.Path("pets", name).mkdir(parents=True)
    ...   PIL.Image.new("RGB", (40, 30)).save(f"pets/{name}/1.png")
    >>> pets = ImageFolder("pets", size=8, eval_fraction=0.0)
    >>> pets.classes, pets.open("train")[0]["image"].shape
    (('cat', 'dog'), (8, 8, 3))
  """

  path: str | os.PathLike
  _: dataclasses.KW_ONLY
  size: int
  channels: int = 3
  eval_fraction: float = 0.1
  eval_path: str | os.PathLike | None = None
  max_bytes: int = 2**35
  max_files: int = 2**21

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f"size is {self.size}; it must be at least 1")
    if self.channels not in (1, 3):
      raise ValueError(f"channels is {self.channels}; it must be 1 or 3")
    check_fraction(self.eval_fraction)

  @property
  def classes(self) -> tuple[str, ...]:
    """Names of the classes in order of their labels; reads the folder."""
    return tuple(sorted(p.name for p in _folders(self._folder(self.path))))

  def open(self, split: str) -> "ImageSource":
    """The images of a split; each is read when it is asked for."""
    check_split(split)
    _pillow()
    held_out = split == "eval"
    separate = self.eval_path is not None
    given = self.eval_path if separate and held_out else self.path
    assert given is not None
    root = self._folder(given)
    labels = {name: i for i, name in enumerate(self.classes)}
    files = []
    for name in _images(root):
      folder = name.split("/", 1)[0]
      if folder not in labels:
        raise ValueError(
          f"class {folder!r} of {os.fspath(given)!r} is not among the"
          f" {len(labels)} of {os.fspath(self.path)!r}"
        )
      if separate or is_held_out(name, self.eval_fraction) == held_out:
        files.append((name, labels[folder]))
    if not files:
      raise FileNotFoundError(
        f"split {split!r} has 0 images of {os.fspath(given)!r}; set eval_path,"
        f" or another eval_fraction than {self.eval_fraction}"
      )
    return ImageSource(
      root,
      tuple(files),
      size=self.size,
      channels=self.channels,
    )

  def _folder(self, path: str | os.PathLike) -> pathlib.Path:
    """The folder of the classes, unpacked if it is an archive."""
    root = pathlib.Path(path).expanduser()
    if not root.is_file():
      return root
    root = unpacked(root, max_bytes=self.max_bytes, max_files=self.max_files)
    while True:
      inner = list(root.iterdir())
      if len(inner) != 1 or not any(p.is_dir() for p in inner[0].glob("*")):
        return root
      root = inner[0]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
  """Images read when they are asked for; see ImageFolder.

  Example:
    >>> import PIL.Image
    >>> PIL.Image.new("L", (4, 4), color=255).save("white.png")
    >>> files = (("white.png", 7),)
    >>> source = ImageSource(pathlib.Path(), files, size=2, channels=1)
    >>> source[0]["image"].ravel().tolist(), int(source[0]["label"])
    ([1.0, 1.0, 1.0, 1.0], 7)
  """

  root: pathlib.Path
  files: tuple[tuple[str, int], ...]
  _: dataclasses.KW_ONLY
  size: int
  channels: int

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, i: int) -> Example:
    name, label = self.files[i]
    path = self.root / name
    try:
      image = _read(path, size=self.size, channels=self.channels)
    except FileNotFoundError:
      raise
    except Exception as error:  # pillow's decoders raise many kinds
      raise ValueError(
        f"{os.fspath(path)!r} cannot be read as an image ({error}); repair or"
        " remove it"
      ) from error
    return {"image": image, "label": np.asarray(label, np.int32)}


def _read(path: pathlib.Path, *, size: int, channels: int) -> np.ndarray:
  pillow = _pillow()
  with pillow.Image.open(path) as file:
    image = pillow.ImageOps.exif_transpose(file)
    image = image.convert("RGB" if channels == 3 else "L")
  image = pillow.ImageOps.fit(
    image, (size, size), pillow.Image.Resampling.BICUBIC
  )
  array = np.asarray(image, np.float32) / 255
  return array.reshape(size, size, channels)


def _folders(root: str | os.PathLike) -> list[pathlib.Path]:
  path = pathlib.Path(root).expanduser()
  if not path.is_dir():
    raise FileNotFoundError(f"no folder {os.fspath(root)!r}")
  return [p for p in path.iterdir() if p.is_dir() and p.name[0] != "."]


def _images(root: str | os.PathLike) -> list[str]:
  """Sorted relative paths of the images, none of them outside the folder."""
  inside = pathlib.Path(root).expanduser().resolve()
  names = []
  for folder in _folders(root):
    check_link(folder, inside)
    for place, inner, files in os.walk(folder):
      for name in (*inner, *files):
        path = pathlib.Path(place, name)
        # A walk would pass over linked folders in silence.
        check_link(path, inside)
        if name in files and path.suffix.lower() in _SUFFIXES:
          names.append(path.relative_to(folder.parent).as_posix())
  if not names:
    raise FileNotFoundError(
      f"no image in the sub-folders of {os.fspath(root)!r}; an image lies in a"
      f" folder named after its class and ends in {sorted(_SUFFIXES)}"
    )
  return sorted(names)


def _pillow() -> Any:
  try:
    import PIL.Image
    import PIL.ImageOps
  except ImportError as error:
    raise ImportError(
      "ImageFolder needs the package pillow: pip install 'isthmus[data]'"
    ) from error
  return PIL
