"""Folders laid out as the BraTS challenges': four scans and a label a case."""

import dataclasses
import functools
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from isthmus.data import nifti, scan
from isthmus.data.folder import walk
from isthmus.data.patch import PatchSource, Size, check_size, cover, three
from isthmus.data.source import check_split
from isthmus.data.text import check_fraction, is_held_out

#: What an example's channels are, in their order.
MODALITIES = ("flair", "t1", "t1ce", "t2")


class _Style(NamedTuple):
  """How one generation of the challenge names files and numbers classes."""

  years: str
  scans: tuple[str, str, str, str]  # in the order of MODALITIES
  label: str
  values: tuple[int, int, int, int]  # in the file, of the classes 0 to 3


# A 3 of the old numbering and a 4 of the new one mean something else (a
# class of 2015, the cavity after surgery), so each style has its own values.
_STYLES = (
  _Style("2018-2021", ("_flair", "_t1", "_t1ce", "_t2"), "_seg", (0, 1, 2, 4)),
  _Style("2023", ("-t2f", "-t1n", "-t1c", "-t2w"), "-seg", (0, 1, 2, 3)),
)
_OF = {
  suffix: style for style in _STYLES for suffix in (*style.scans, style.label)
}
_NAME = re.compile(rf"(.+)({'|'.join(_OF)})\.nii(?:\.gz)?")


class _Case(NamedTuple):
  name: str
  scans: tuple[pathlib.Path, ...]
  label: pathlib.Path | None
  values: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class BratsFolder:
  """Patches or whole volumes of brain tumours in the layout of BraTS.

  An example holds image float32 [z, y, x, 4], whose channels are `MODALITIES`,
  and label int32 [z, y, x]: 0 background, 1 necrotic core, 2 oedema, 3
  enhancing tumour; `regions` makes the challenge's three regions of it. Each
  channel has mean 0 and standard deviation 1 over the brain, the voxels where
  any of the four files is not 0; outside of it the image is 0.

  A case is a folder, at any depth, with one file of each modality and a label,
  .nii or .nii.gz, named in one of two styles: CASE_flair, _t1, _t1ce, _t2 and
  _seg, with the labels 0, 1, 2, 4, or CASE-t2f, -t1n, -t1c, -t2w and -seg,
  with the labels 0, 1, 2, 3. Other files are left alone. A case is in one
  split; of the second style so are all time points of a patient.

  Args:
    path: the folder that holds the cases.
    size: voxels along z, y and x of a patch, one number for all or three;
      None for whole volumes, which make a batch only where they are alike.
    stride: voxels from a patch to the next; None means the size. The last
      patch along an axis ends with the volume.
    label: False for cases that have none, such as a challenge's test cases;
      labels that are there are not read then.
    eval_fraction: share of the cases that is held out, by a hash of their
      names.
    eval_path: a folder that holds the eval split instead; eval_fraction is
      then not used.
    keep: cases kept in memory; one of 240 x 240 x 155 voxels takes 152 MB.
    max_bytes: the most that a file may take unpacked.

  Raises:
    ValueError: a size, stride or keep below 1, eval_fraction outside [0, 1];
      when opened, a case that lacks a file, has two of a kind or two styles,
      shapes that differ or are smaller than a patch, links out of the folder;
      when read, a damaged file, files that lie in different places, voxels
      that are not finite, a scan without contrast, labels of no class.
    FileNotFoundError: when opened, no such folder, or no case in it.
    ImportError: when opened, where nibabel is missing.

  Example:
    >>> nibabel = nifti.require()
    >>> scan = np.arange(64, dtype=np.int16).reshape(4, 4, 4)
    >>> for kind in ("flair", "t1", "t1ce", "t2", "seg"):
    ...   data = scan % 2 if kind == "seg" else scan
    ...   image = nibabel.Nifti1Image(data, np.eye(4))
    ...   nibabel.save(image, f"BraTS20_001_{kind}.nii.gz")
    >>> source = BratsFolder(".", size=None, eval_fraction=0.0).open("train")
    >>> source[0]["image"].shape, source[0]["label"].max()
    ((4, 4, 4, 4), np.int32(1))

  Reference:
    Menze et al., The Multimodal Brain Tumor Image Segmentation Benchmark
    (BRATS), IEEE Transactions on Medical Imaging 34(10), 2015.
  """

  path: str | os.PathLike
  _: dataclasses.KW_ONLY
  size: Size | None
  stride: int | None = None
  label: bool = True
  eval_fraction: float = 0.1
  eval_path: str | os.PathLike | None = None
  keep: int = 4
  max_bytes: int = 2**32

  def __post_init__(self):
    check_size(self.size, self.stride)
    check_fraction(self.eval_fraction)
    if self.keep < 1:
      raise ValueError(f"keep is {self.keep}; it must be at least 1")

  def open(self, split: str) -> PatchSource:
    """Examples of "train" or "eval"; see the class."""
    check_split(split)
    nifti.require()
    separate, held_out = self.eval_path is not None, split == "eval"
    root = self.eval_path if separate and held_out else self.path
    assert root is not None
    cases, rows = [], []
    for case in _cases(root, self.label):
      if not separate:
        if is_held_out(_patient(case.name), self.eval_fraction) != held_out:
          continue
      files = [*case.scans, *filter(None, [case.label])]
      shape = scan.read_shape(files, max_bytes=self.max_bytes)
      corners = cover(
        shape, self.size, stride=self.stride, name=f"case {case.name!r}"
      )
      rows.append(np.insert(corners, 0, len(cases), axis=1))
      cases.append(case)
    if not cases:
      raise FileNotFoundError(
        f"split {split!r} has 0 cases of {os.fspath(root)!r}; set eval_path,"
        f" or another eval_fraction than {self.eval_fraction}"
      )
    load = functools.lru_cache(self.keep)(lambda i: self._load(cases[i]))
    size = None if self.size is None else three(self.size)
    return PatchSource(load, np.concatenate(rows), size)

  def _load(self, case: _Case) -> tuple[np.ndarray, np.ndarray | None]:
    """Image [z y x 4] and classes [z y x] of a case."""
    first, *others = case.scans
    volume = scan.read_image(first, max_bytes=self.max_bytes)
    image = np.empty((*volume.data.T.shape, len(case.scans)), np.float32)
    image[..., 0] = volume.data.T
    for i, path in enumerate(others, 1):
      other = scan.read_image(path, max_bytes=self.max_bytes)
      scan.check_place(path, other, like=first, other=volume)
      image[..., i] = other.data.T
    _normalize(image, case.scans)
    if case.label is None:
      return image, None
    label = scan.read_label(case.label, max_bytes=self.max_bytes)
    scan.check_place(case.label, label, like=first, other=volume)
    return image, _classes(label.data.T, case)


def regions(
  label: Int[np.ndarray, "*place"] | Int[jax.Array, "*place"],
) -> Bool[np.ndarray, "*place 3"] | Bool[jax.Array, "*place 3"]:
  """The three regions, one inside the other, that BraTS scores.

  Args:
    label: classes of any shape: 0 background, 1 necrotic core, 2 oedema, 3
      enhancing tumour.

  Returns:
    [..., 3]: whole tumour (1, 2, 3), tumour core (1, 3), enhancing tumour
    (3); of NumPy for NumPy, of JAX for JAX.

  Example:
    >>> regions(np.arange(4)).astype(int).tolist()
    [[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]
  """
  space: Any = label.__array_namespace__()
  enhancing = label == 3
  return space.stack([label > 0, (label == 1) | enhancing, enhancing], axis=-1)


def _cases(root: str | os.PathLike, labelled: bool) -> list[_Case]:
  """The cases below a folder, sorted by name."""
  folders: dict[pathlib.Path, list[pathlib.Path]] = {}
  for path in walk(root):
    folders.setdefault(path.parent, []).append(path)
  cases: dict[str, tuple[pathlib.Path, _Case]] = {}
  for folder, files in folders.items():
    if not any(_NAME.fullmatch(path.name) for path in files):
      continue
    case = _case(folder, files, labelled)
    if case.name in cases:
      raise ValueError(
        f"case {case.name!r} is in {os.fspath(cases[case.name][0])!r} and in"
        f" {os.fspath(folder)!r}; remove one"
      )
    cases[case.name] = folder, case
  if not cases:
    raise FileNotFoundError(
      f"no case in {os.fspath(root)!r}; a case's files end in"
      f" {' or '.join(', '.join(s.scans) for s in _STYLES)}, .nii or .nii.gz"
    )
  return [cases[name][1] for name in sorted(cases)]


def _case(
  folder: pathlib.Path, files: list[pathlib.Path], labelled: bool
) -> _Case:
  """The case whose files are in a folder."""
  shown, found, stems = repr(os.fspath(folder)), {}, set()
  for path in files:
    if named := _NAME.fullmatch(path.name):
      stem, suffix = named.groups()
      if suffix in found:
        raise ValueError(
          f"{shown} has {found[suffix].name!r} and {path.name!r}; a case has a"
          " folder of its own, with one file of each kind"
        )
      found[suffix] = path
      stems.add(stem)
  styles = {_OF[suffix].years for suffix in found}
  if len(styles) > 1:
    raise ValueError(
      f"{shown} mixes the names of {' and '.join(sorted(styles))}:"
      f" {sorted(path.name for path in found.values())}; rename one kind"
    )
  if len(stems) > 1:
    raise ValueError(
      f"{shown} has files of {len(stems)} cases, {sorted(stems)}; a case has a"
      " folder of its own"
    )
  style, name = _OF[next(iter(found))], stems.pop()
  wanted = style.scans + ((style.label,) if labelled else ())
  if lacking := [name + s for s in wanted if s not in found]:
    known = {path.name for path in found.values()}
    others = sorted({p.name for p in files if ".nii" in p.name} - known)
    hint = "; label=False is for cases without one"
    raise ValueError(
      f"{shown} lacks {', '.join(f'{stem}.nii.gz' for stem in lacking)}"
      + (f" but has {others}" if others else "")
      + (hint if lacking == [name + style.label] else "; add or remove it")
    )
  scans = tuple(found[suffix] for suffix in style.scans)
  return _Case(
    name, scans, found[style.label] if labelled else None, style.values
  )


def _patient(name: str) -> str:
  """A case's name without its time point, e.g. BraTS-GLI-00005-001."""
  return re.sub(r"(?<=-\d{5})-\d{3}$", "", name)


def _normalize(image: np.ndarray, paths: tuple[pathlib.Path, ...]) -> None:
  """In place: mean 0 and deviation 1 in the brain, a channel at a time."""
  brain = image[..., 0] != 0
  for i in range(1, image.shape[-1]):
    brain |= image[..., i] != 0
  for i, path in enumerate(paths):
    inside = image[..., i][brain]
    spread = inside.std(dtype=np.float64) if inside.size else 0.0
    if not spread > 0:
      raise ValueError(
        f"{os.fspath(path)!r} has no contrast: its {inside.size} voxels of the"
        f" brain are all {inside[0] if inside.size else 0:g}; remove the case"
      )
    mean = inside.mean(dtype=np.float64)
    image[..., i][brain] = ((inside - mean) / spread).astype(np.float32)


def _classes(label: np.ndarray, case: _Case) -> np.ndarray:
  """Classes 0 to 3 of the label's own values."""
  classes = np.full(label.shape, 255, np.uint8)
  for number, value in enumerate(case.values):
    classes[label == value] = number
  if bad := int((classes == 255).sum()):
    odd = np.unique(label[classes == 255])[:4].tolist()
    raise ValueError(
      f"{os.fspath(case.label or '')!r} has {bad} voxels of labels {odd}, which"
      f" are none of {list(case.values)}; relabel them"
    )
  return classes
