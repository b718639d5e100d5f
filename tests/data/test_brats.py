"""BraTS folders: both styles, classes, regions, splits, and what is refused."""

import os
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.data import Loader
from isthmus.data.brats import MODALITIES, BratsFolder, regions
from isthmus.data.text import is_held_out

pytestmark = pytest.mark.once

nibabel = pytest.importorskip("nibabel")

SHAPE = (6, 7, 8)
OLD = ("_flair", "_t1", "_t1ce", "_t2", "_seg")
NEW = ("-t2f", "-t1n", "-t1c", "-t2w", "-seg")


def save(path, array, affine=None):
  affine = np.diag([-1, -1, 1, 1]) if affine is None else affine
  path.parent.mkdir(parents=True, exist_ok=True)
  nibabel.save(nibabel.Nifti1Image(array, affine), path)


def content(seed, shape=SHAPE):
  """Four scans, of which a corner is empty, and a label of classes 0 to 3."""
  rng = np.random.default_rng(seed)
  scans = rng.normal(100, 20, (4, *shape)).astype(np.float32)
  scans[:, :2, :3] = 0
  scans[1, 4, 4, 4] = 0  # still brain: the others aren't 0
  classes = rng.integers(0, 4, shape, dtype=np.uint8)
  return scans, classes


def case(root, name, suffixes, seed, *, ext=".nii.gz", shape=SHAPE):
  scans, classes = content(seed, shape)
  last = 4 if suffixes is OLD else 3
  label = np.array([0, 1, 2, last], np.uint8)[classes]
  for suffix, array in zip(suffixes, (*scans, label), strict=True):
    save(root / name / f"{name}{suffix}{ext}", array)
  return root / name


def of(root, **more):
  return BratsFolder(root, **{"size": None, "eval_fraction": 0.0, **more})


@pytest.mark.parametrize("ext", [".nii", ".nii.gz"])
@pytest.mark.parametrize("suffixes", [OLD, NEW], ids=["old", "new"])
def test_both_styles_against_the_formula(tmp_path, suffixes, ext):
  case(tmp_path / "HGG", "CASE_1", suffixes, 3, ext=ext)
  (example,) = list(of(tmp_path).open("train"))
  image, label = example["image"], example["label"]
  assert image.shape == (8, 7, 6, 4) and image.dtype == np.float32
  assert label.shape == (8, 7, 6) and label.dtype == np.int32
  scans, classes = content(3)
  np.testing.assert_array_equal(label, classes.T)
  brain = (scans != 0).any(axis=0)
  assert brain[4, 4, 4] and 0 < brain.mean() < 1
  assert MODALITIES == ("flair", "t1", "t1ce", "t2")
  for i, scan in enumerate(scans.astype(np.float64)):
    inside = scan[brain]
    wanted = np.where(brain, (scan - inside.mean()) / inside.std(), 0)
    np.testing.assert_allclose(image[..., i], wanted.T, atol=1e-5)
    assert (image[..., i][~brain.T] == 0).all()


def test_patches_are_cut_where_they_say(tmp_path):
  case(tmp_path, "A", OLD, 1, ext=".nii")
  (whole,) = list(of(tmp_path).open("train"))
  source = of(tmp_path, size=(4, 3, 2), stride=2).open("train")
  assert len(source) == 3 * 3 * 3
  for example, (_, z, y, x) in zip(source, source.rows.tolist(), strict=True):
    box = slice(z, z + 4), slice(y, y + 3), slice(x, x + 2)
    np.testing.assert_array_equal(example["image"], whole["image"][box])
    np.testing.assert_array_equal(example["label"], whole["label"][box])


def test_regions_are_nested_and_of_the_same_library():
  label = np.random.default_rng(0).integers(0, 4, (2, 3, 4, 5))
  found = regions(label)
  assert isinstance(found, np.ndarray) and found.dtype == bool
  assert found.shape == (2, 3, 4, 5, 3)
  for i, classes in enumerate(((1, 2, 3), (1, 3), (3,))):
    np.testing.assert_array_equal(found[..., i], np.isin(label, classes))
  assert (found[..., 0] >= found[..., 1]).all()
  assert (found[..., 1] >= found[..., 2]).all()
  traced = jax.jit(regions)(jnp.asarray(label))
  assert isinstance(traced, jax.Array)
  np.testing.assert_array_equal(traced, found)


def test_splits_hold_whole_cases_and_patients(tmp_path):
  """Time points of a patient stay together; where the folder lies is moot."""
  names = [f"BraTS-GLI-{p:05d}-{t:03d}" for p in range(8) for t in range(2)]
  for i, name in enumerate(names):
    case(tmp_path / "all" / "sub", name, NEW, i, ext=".nii")
  split = {
    name: is_held_out(name.removesuffix(name[-4:]), 0.4) for name in names
  }
  for root in (tmp_path / "all", tmp_path / "all" / "sub"):
    data = of(root, eval_fraction=0.4)
    train, held = data.open("train"), data.open("eval")
    assert len(train) == 16 - sum(split.values()) > 0
    assert len(held) == sum(split.values()) > 0
    mine = {held.load(i)[0].tobytes() for i in range(len(held))}
    every = of(root).open("train")
    for i, name in enumerate(names):
      assert (every.load(i)[0].tobytes() in mine) == split[name], name


def test_separate_eval_folder(tmp_path):
  for i in range(5):
    case(tmp_path / "train", f"T{i}", OLD, i, ext=".nii")
  case(tmp_path / "held", "H", NEW, 9, ext=".nii")
  data = of(tmp_path / "train", eval_path=tmp_path / "held")
  assert len(data.open("train")) == 5 and len(data.open("eval")) == 1


def test_cases_without_a_label_need_the_argument(tmp_path):
  folder = case(tmp_path, "A", OLD, 0)
  (folder / "A_seg.nii.gz").unlink()
  with pytest.raises(
    ValueError, match=r"A' lacks A_seg.nii.gz; label=False is for cases"
  ):
    of(tmp_path).open("train")
  (example,) = list(of(tmp_path, label=False).open("train"))
  assert set(example) == {"image"}
  # As one case of 2020 is: the label is there, under another name.
  save(folder / "W39_Segm.nii.gz", np.zeros(SHAPE, np.uint8))
  with pytest.raises(ValueError, match=r"A_seg.nii.gz but has \['W39_Segm.nii"):
    of(tmp_path).open("train")
  case(tmp_path, "B", NEW, 0)
  assert set(of(tmp_path, label=False).open("train")[1]) == {"image"}


@pytest.mark.parametrize("suffix", [*OLD[:4], *NEW[:4]])
def test_a_missing_modality_is_named(tmp_path, suffix):
  folder = case(tmp_path, "A", OLD if suffix in OLD else NEW, 0)
  (folder / f"A{suffix}.nii.gz").unlink()
  for label in (True, False):
    with pytest.raises(ValueError, match=f"A' lacks A{suffix}.nii.gz; add"):
      of(tmp_path, label=label).open("train")


def test_folders_that_are_no_case_are_refused(tmp_path):
  folder = case(tmp_path, "A", OLD, 0, ext=".nii")
  data, array = of(tmp_path), np.ones(SHAPE, np.int16)
  assert len(data.open("train")) == 1
  for name, cause in (
    ("A-t1c.nii", "A' mixes the names of 2018-2021 and 2023: .*'A-t1c.nii'"),
    ("A_t1.nii.gz", "A' has 'A_t1.nii' and 'A_t1.nii.gz'; a case has"),
    ("B_t1.nii", "A' has 'A_t1.nii' and 'B_t1.nii'; a case has a folder"),
    ("../B/A_seg.nii", "B' lacks A_flair.nii.gz, A_t1.nii.gz, A_t1ce"),
  ):
    save(folder / name, array)
    with pytest.raises(ValueError, match=cause) as info:
      data.open("train")
    assert "\n" not in str(info.value)
    (folder / name).unlink()
  os.rename(folder / "A_t2.nii", folder / "B_t2.nii")
  with pytest.raises(ValueError, match=r"has files of 2 cases, \['A', 'B'\]"):
    data.open("train")
  os.rename(folder / "B_t2.nii", folder / "A_t2.nii")
  other = case(tmp_path / "again", "A", OLD, 1, ext=".nii")
  with pytest.raises(ValueError, match="case 'A' is in '.*A' and in '.*A'"):
    data.open("train")
  for path in other.iterdir():
    path.unlink()
  (other / "link_t1.nii").symlink_to("/etc/hostname")
  with pytest.raises(ValueError, match="link_t1.nii' links out of"):
    data.open("train")


def test_files_that_do_not_fit_are_named(tmp_path):
  folder = case(tmp_path, "A", OLD, 0, ext=".nii")
  scans, _ = content(0)
  moved = np.diag([-1, -1, 2, 1])
  for kind, array, affine, cause in (
    ("t1", np.ones((6, 7, 9), np.int16), None, r"has shape \(6, 7, 9"),
    ("seg", np.ones((6, 7, 9), np.uint8), None, r"\(6, 7, 9\), 'A_flair.nii'"),
    ("flair", scans[0][None], None, "must have 3 axes"),
    ("t2", scans[3], moved, "lies elsewhere than 'A_flair.nii'"),
    (
      "seg",
      np.ones(SHAPE, np.uint8),
      moved,
      "lies elsewhere than 'A_flair.nii'",
    ),
    ("t1ce", np.full(SHAPE, np.nan, np.float32), None, "336 voxels not fin"),
    ("t1", np.zeros(SHAPE, np.int16), None, "no contrast: its 288 .* all 0;"),
    ("seg", np.full(SHAPE, 0.5, np.float32), None, "labels that are not int32"),
    ("seg", np.full(SHAPE, 3, np.uint8), None, r"336 .* labels \[3\], which"),
  ):
    path = folder / f"A_{kind}.nii"
    kept = path.read_bytes()
    save(path, array, affine)
    with pytest.raises(ValueError, match=f"A_{kind}.nii.*{cause}") as info:
      of(tmp_path).open("train")[0]
    assert "\n" not in str(info.value)
    path.write_bytes(kept)
  of(tmp_path).open("train")[0]
  with pytest.raises(ValueError, match=r"case 'A' has \(8, 7, 6\) voxels"):
    of(tmp_path, size=7).open("train")
  with pytest.raises(ValueError, match="takes 1696 bytes, max_bytes is 1000"):
    of(tmp_path, max_bytes=1000).open("train")


def test_labels_of_another_style_are_refused(tmp_path):
  """A 4 of the new style is no enhancing tumour, nor a 3 of the old one."""
  for suffixes, value, allowed in ((OLD, 3, "4"), (NEW, 4, "3"), (NEW, -1, 3)):
    root = tmp_path / f"{suffixes[0]}{value}"
    folder = case(root, "A", suffixes, 0)
    label = np.ones(SHAPE, np.int16)
    label[0, 0, 0] = value
    save(folder / f"A{suffixes[-1]}.nii.gz", label)
    with pytest.raises(
      ValueError, match=rf"1 voxels of labels \[{value}\].*0, 1, 2, {allowed}\]"
    ):
      of(root).open("train")[0]


def test_settings_and_folders_that_cannot_be(tmp_path):
  for wrong in ({"size": 0}, {"size": 4, "stride": 0}, {"stride": 4},
                {"eval_fraction": 2}, {"keep": 0}):  # fmt: skip
    with pytest.raises(ValueError, match=f"{list(wrong)[-1]} is "):
      of(tmp_path, **wrong)
  with pytest.raises(FileNotFoundError, match="no case in .*_flair.*-t2f"):
    of(tmp_path).open("train")
  with pytest.raises(FileNotFoundError, match="no folder .*absent"):
    of(tmp_path / "absent").open("train")
  case(tmp_path, "A", OLD, 0)
  with pytest.raises(FileNotFoundError, match="'eval' has 0 cases .* 0.0"):
    of(tmp_path).open("eval")


def test_few_cases_are_kept_and_none_read_when_opened(tmp_path, monkeypatch):
  from isthmus.data import nifti

  shape = (32, 32, 32)
  for i in range(6):
    case(tmp_path, f"C{i}", OLD, i, ext=".nii", shape=shape)
  reads, read = [], nifti.read
  monkeypatch.setattr(
    nifti, "read", lambda path, **k: reads.append(path) or read(path, **k)
  )
  source = of(tmp_path, keep=2).open("train")
  assert not reads
  source[0]
  assert len(reads) == 5
  tracemalloc.start()
  for i in range(6):
    source[i]
  taken, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  one = 32**3 * (4 * 4 + 1)
  assert taken < 2.5 * one, f"{taken} bytes kept of {one} a case"
  assert peak < 6 * one
  assert source.load.cache_info().currsize == 2


def test_batches_of_patches_with_regions(tmp_path):
  for i in range(3):
    case(tmp_path, f"C{i}", (OLD, NEW)[i % 2], i)
  loader = Loader(
    of(tmp_path, size=4, keep=1).open("train"), batch_size=2, seed=0, threads=2
  )
  batch = loader.batch(1)
  assert batch["image"].shape == (2, 4, 4, 4, 4)
  assert regions(batch["label"]).shape == (2, 4, 4, 4, 3)
