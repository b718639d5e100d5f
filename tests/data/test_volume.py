"""Brain patches and NIfTI folders: places, labels, splits, refusals."""

import numpy as np
import pytest

from isthmus.data import volume
from isthmus.data.package import package_file
from isthmus.data.volume import BrainVolume, NiftiFolder

nibabel = pytest.importorskip("nibabel")


def test_brain_patches_are_cut_where_they_say():
  pytest.importorskip("nilearn")
  data = BrainVolume(size=(16, 24, 32))
  train, held = data.open("train"), data.open("eval")
  example = train[len(train) // 2]
  assert example["image"].shape == (16, 24, 32, 1)
  assert example["image"].dtype == np.float32
  assert example["label"].shape == (16, 24, 32)
  assert example["label"].dtype == np.int32
  # Against the package's own files, read by nibabel.
  maps = {}
  for name in ("t1", "gm", "wm"):
    path = package_file(
      "nilearn", volume._TEMPLATE.format(name), name="test", extra="volume"
    )
    maps[name] = np.asanyarray(nibabel.load(path).dataobj).T
  larger = np.maximum(maps["gm"], maps["wm"])
  tissue = np.where(maps["wm"] > maps["gm"], 2, 1) * (larger > 127.5)
  border = round(tissue.shape[1] * 0.75)
  whole = np.concatenate([train.load(0)[1], held.load(0)[1]], axis=1)
  np.testing.assert_array_equal(whole, tissue)
  rng = np.random.default_rng(0)
  for source, offset in ((train, 0), (held, border)):
    for i in rng.integers(len(source), size=5).tolist():
      z, y, x = source.rows[i][1:] + (0, offset, 0)
      box = slice(z, z + 16), slice(y, y + 24), slice(x, x + 32)
      image = source[i]["image"][..., 0]
      np.testing.assert_allclose(image, maps["t1"][box] / 255, rtol=1e-6)
      np.testing.assert_array_equal(source[i]["label"], tissue[box])


def test_brain_splits_share_no_voxel_and_hold_all_tissues():
  pytest.importorskip("nilearn")
  data = BrainVolume(size=32, stride=20, foreground=0.2)
  train, held = data.open("train"), data.open("eval")
  whole = BrainVolume(eval_fraction=0.0).open("train").load(0)[1].shape[1]
  border = train.load(0)[1].shape[1]
  assert border + held.load(0)[1].shape[1] == whole
  assert (train.rows[:, 2] + 32 <= border).all()
  for source in (train, held):
    labels = [source[i]["label"] for i in range(len(source))]
    assert set(np.unique(labels)) == {0, 1, 2}
    assert min((label > 0).mean() for label in labels) >= 0.2


def test_why_brain_halves_are_not_the_split():
  """The template is its own mirror image: a half would leak the other."""
  pytest.importorskip("nilearn")
  image, label = BrainVolume(eval_fraction=0.0).open("train").load(0)
  image = image[..., 0]
  np.testing.assert_array_equal(image, image[:, :, ::-1])
  np.testing.assert_array_equal(label, label[:, :, ::-1])


def test_brain_names_what_cannot_be():
  pytest.importorskip("nilearn")
  with pytest.raises(ValueError, match=r"'eval' has \(189, 58, 197\) .* \(64,"):
    BrainVolume(size=64).open("eval")
  with pytest.raises(ValueError, match="0 patches.*of 1.0; the largest is 0"):
    BrainVolume(foreground=1.0).open("train")
  for wrong in ({"size": 0}, {"size": (8, 8, 0)}, {"stride": 0},
                {"foreground": 1.5}, {"eval_fraction": -1}):  # fmt: skip
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
      BrainVolume(**wrong)


def save(path, array, affine=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  affine = np.eye(4) if affine is None else affine
  nibabel.save(nibabel.Nifti1Image(array, affine), path)


@pytest.fixture
def folder(tmp_path):
  """Six subjects whose voxels tell where they lie."""
  rng = np.random.default_rng(0)
  for i in range(6):
    image = rng.normal(i, 3, (8, 10, 12)).astype(np.float32)
    root = tmp_path / "scans" / f"sub{i}"
    save(root / f"sub{i}_t1.nii.gz", image)
    save(root / f"sub{i}_seg.nii.gz", (image > i).astype(np.uint8))
  return tmp_path / "scans"


def of(folder, **more):
  options = {"image": "_t1.nii.gz", "label": "_seg.nii.gz", "size": 4}
  return NiftiFolder(folder, **{**options, "eval_fraction": 0.4, **more})


def test_folder_pairs_patches_and_splits(folder):
  data = of(folder, normalize=False)
  train, held = data.open("train"), data.open("eval")
  # Of 8 x 10 x 12 voxels: 2 x 3 x 3 patches, the last of 10 overlapping.
  assert len(train) + len(held) == 6 * 18
  volumes = set()
  for source in (train, held):
    assert len(source) % 18 == 0 and len(source)
    for i in range(len(source)):
      example = source[i]
      assert example["image"].shape == (4, 4, 4, 1)
      assert example["image"].dtype == np.float32
      assert example["label"].dtype == np.int32
    volumes |= {source.load(v)[0].tobytes() for v in set(source.rows[:, 0])}
  assert len(volumes) == 6
  path = folder / "sub3" / "sub3_t1.nii.gz"
  raw = nibabel.load(path).get_fdata()
  own = [s for s in (train, held)
         for v in set(s.rows[:, 0])
         if np.array_equal(s.load(v)[0][..., 0], raw.T)]  # fmt: skip
  assert len(own) == 1
  only = of(folder / "sub3", normalize=False, eval_fraction=0.0).open("train")
  for i, (_, z, y, x) in enumerate(only.rows):
    cut = raw[x : x + 4, y : y + 4, z : z + 4].T
    np.testing.assert_allclose(only[i]["image"][..., 0], cut, rtol=1e-6)
    np.testing.assert_array_equal(only[i]["label"], cut > 3)


def test_folder_normalises_and_keeps_few_volumes(folder):
  source = of(folder, eval_fraction=0.0, keep=2).open("train")
  for v in range(6):
    image = source.load(v)[0]
    assert abs(image.mean()) < 1e-4 and abs(image.std() - 1) < 1e-4
  assert source.load.cache_info().currsize == 2
  flat = folder.parent / "flat"
  save(flat / "a.nii.gz", np.full((4, 4, 4), 7, np.int16))
  plain = NiftiFolder(flat, size=4, eval_fraction=0.0).open("train")
  assert set(plain[0]) == {"image"} and (plain[0]["image"] == 0).all()


def test_folder_with_a_separate_eval_folder(folder, tmp_path):
  save(tmp_path / "held" / "a_t1.nii.gz", np.ones((4, 4, 4), np.int16))
  save(tmp_path / "held" / "a_seg.nii.gz", np.ones((4, 4, 4), np.int16))
  data = of(folder, eval_path=tmp_path / "held")
  assert len(data.open("train")) == 6 * 18 and len(data.open("eval")) == 1


def test_whole_volumes(folder):
  """One example each, and they may differ in shape."""
  save(folder / "sub3" / "sub3_t1.nii.gz", np.ones((5, 6, 7), np.int16))
  save(folder / "sub3" / "sub3_seg.nii.gz", np.ones((5, 6, 7), np.uint8))
  source = of(folder, size=None, eval_fraction=0.0).open("train")
  assert len(source) == 6
  shapes = [source[i]["image"].shape for i in range(6)]
  assert shapes == [(12, 10, 8, 1)] * 3 + [(7, 6, 5, 1)] + [(12, 10, 8, 1)] * 2
  assert source[3]["label"].shape == (7, 6, 5)


def test_labels_whose_suffix_ends_in_the_images(tmp_path):
  save(tmp_path / "a.nii.gz", np.ones((4, 4, 4), np.int16))
  save(tmp_path / "a_seg.nii.gz", np.ones((4, 4, 4), np.int16))
  data = of(tmp_path, image=".nii.gz", eval_fraction=0.0)
  assert len(data.open("train")) == 1


def test_folder_names_what_does_not_fit(folder, tmp_path):
  seg = folder / "sub2" / "sub2_seg.nii.gz"
  data = of(folder, eval_fraction=0.0)

  def read():
    source = data.open("train")
    for v in range(6):
      source.load(v)

  read()
  shape = (8, 10, 12)
  for array, affine, cause in (
    (
      np.ones((8, 10, 11), np.uint8),
      None,
      r"\(8, 10, 11\), 'sub2_t1.* has \(8, ",
    ),
    (np.ones(shape, np.uint8), np.diag([1, 1, 2, 1]), "lies elsewhere"),
    (np.full(shape, 0.5, np.float32), None, "not int32"),
  ):
    save(seg, array, affine)
    with pytest.raises(ValueError, match=f"sub2_seg.nii.gz' .*{cause}"):
      read()
  seg.unlink()
  with pytest.raises(ValueError, match="no label 'sub2_seg.nii.gz' beside"):
    read()
  outside = tmp_path / "elsewhere.nii.gz"
  save(outside, np.ones(shape, np.uint8))
  seg.symlink_to(outside)
  with pytest.raises(ValueError, match="sub2_seg.* links out of"):
    read()
  seg.unlink()
  data = of(folder, label=None, eval_fraction=0.0)
  for array, cause in (
    (np.ones((8, 10), np.int16), "must have 3 axes|rank is 2"),
    (np.ones((8, 10, 3), np.int16), r"has \(3, 10, 8\) voxels"),
    (np.full(shape, np.nan, np.float32), "960 voxels not finite"),
  ):
    save(folder / "sub2" / "sub2_t1.nii.gz", array)
    with pytest.raises(ValueError, match=f"sub2_t1.*{cause}"):
      read()
  with pytest.raises(FileNotFoundError, match="no folder .*absent"):
    of(tmp_path / "absent").open("train")
  with pytest.raises(FileNotFoundError, match=r"no file \*_t2.nii in"):
    of(folder, image="_t2.nii").open("train")
  with pytest.raises(ValueError, match="keep is 0"):
    of(folder, keep=0)
