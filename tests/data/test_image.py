"""Image folders: labels, crops, splits, and files that are not images."""

import shutil
import sys

import numpy as np
import pytest

from isthmus.data.image import ImageFolder
from isthmus.data.loader import Loader

Image = pytest.importorskip("PIL.Image")


def save(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path):
  """Two classes of flat images; the value tells which image it is."""
  root = tmp_path / "images"
  for label, name in enumerate(("cat", "dog")):
    for i in range(20):
      flat = np.full((10, 14, 3), 100 * label + i, np.uint8)
      save(root / name / f"{i}.png", flat)
  (root / "dog" / "notes.txt").write_text("not an image")
  (root / "readme.md").write_text("not a class")
  return root


def test_labels_values_and_splits(folder):
  data = ImageFolder(folder, size=8, eval_fraction=0.3)
  assert data.classes == ("cat", "dog")
  seen = []
  for split in ("train", "eval"):
    source = data.open(split)
    assert 0 < len(source) < 40
    for i in range(len(source)):
      example = source[i]
      assert example["image"].shape == (8, 8, 3)
      assert example["image"].dtype == np.float32
      value = example["image"] * 255
      np.testing.assert_allclose(value, value[0, 0, 0], atol=1e-4)
      seen.append(round(float(value[0, 0, 0])))
      assert example["label"] == seen[-1] // 100
      assert example["label"].dtype == np.int32
  assert sorted(seen) == [*range(20), *range(100, 120)]


def test_batches_with_threads_equal_those_without(folder):
  source = ImageFolder(folder, size=8).open("train")
  plain, threaded = (
    Loader(source, batch_size=6, seed=0, threads=n).host_batch(3)
    for n in (0, 3)
  )
  for name in plain:
    np.testing.assert_array_equal(plain[name], threaded[name])


def test_shorter_side_is_scaled_and_the_longer_one_cropped(tmp_path):
  # Left third black, middle white, right black: the crop is the middle.
  wide = np.zeros((20, 60, 3), np.uint8)
  wide[:, 20:40] = 255
  save(tmp_path / "a" / "wide.png", wide)
  example = ImageFolder(tmp_path, size=10, eval_fraction=0.0).open("train")[0]
  assert example["image"][:, 2:-2].min() == 1
  grey = ImageFolder(tmp_path, size=10, eval_fraction=0.0, channels=1)
  assert grey.open("train")[0]["image"].shape == (10, 10, 1)


def test_orientation_noted_by_the_camera_is_applied(tmp_path):
  half = np.zeros((12, 12, 3), np.uint8)
  half[:6] = 255  # bright above, as stored
  exif = Image.Exif()
  exif[0x0112] = 3  # upside down
  (tmp_path / "a").mkdir()
  Image.fromarray(half).save(tmp_path / "a" / "x.jpg", exif=exif)
  image = ImageFolder(tmp_path, size=12, eval_fraction=0.0).open("train")[0]
  assert image["image"][:4].max() < 0.2 < 0.8 < image["image"][-4:].min()


def test_separate_eval_folder_keeps_the_training_labels(folder, tmp_path):
  flat = np.full((9, 9), 7, np.uint8)
  save(tmp_path / "held" / "dog" / "0.png", flat)
  data = ImageFolder(folder, size=8, eval_path=tmp_path / "held")
  assert len(data.open("train")) == 40
  (example,) = [data.open("eval")[0]]
  assert example["label"] == 1
  save(tmp_path / "held" / "fox" / "0.png", flat)
  with pytest.raises(ValueError, match="class 'fox'.*2"):
    data.open("eval")


@pytest.mark.parametrize("form", ["zip", "gztar"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_archive_is_read_like_its_folder(
  folder, tmp_path, monkeypatch, form, wrapped
):
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
  base = {"base_dir": folder.name} if wrapped else {}
  root = folder.parent if wrapped else folder
  path = shutil.make_archive(str(tmp_path / "packed"), form, root, **base)
  packed = ImageFolder(path, size=8)
  plain = ImageFolder(folder, size=8)
  assert packed.classes == plain.classes
  for split in ("train", "eval"):
    sources = plain.open(split), packed.open(split)
    assert sources[0].files == sources[1].files
    for i in range(len(sources[0])):
      pair = [source[i]["image"] for source in sources]
      np.testing.assert_array_equal(*pair)
  assert len(list((tmp_path / "cache" / "archives").iterdir())) == 2
  tight = ImageFolder(path, size=8, max_files=10)
  monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "other"))
  with pytest.raises(ValueError, match="packed.*more than max_files of 10"):
    tight.open("train")


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_unreadable_image_is_named(folder, damage):
  path = folder / "cat" / "3.png"
  whole = path.read_bytes()
  path.write_bytes(
    {"text": b"no image", "truncated": whole[:45], "empty": b""}[damage]
  )
  source = ImageFolder(folder, size=8, eval_fraction=0.0).open("train")
  names = [name for name, _ in source.files]
  with pytest.raises(ValueError, match=r"cat/3.png' cannot be read"):
    source[names.index("cat/3.png")]


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
  save(tmp_path / "secret" / "x.png", np.zeros((9, 9), np.uint8))
  data = ImageFolder(folder, size=8, eval_fraction=0.0)
  inner = folder / "cat" / "inner.png"
  inner.symlink_to(folder / "dog" / "0.png")
  assert len(data.open("train")) == 41
  for place, target in (
    ("cat/link.png", "secret/x.png"), ("cat/sub", "secret"), ("fox", "secret")
  ):  # fmt: skip
    (folder / place).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=f"{place}' (links out|is a link)"):
      data.open("train")
    (folder / place).unlink()
  assert len(data.open("train")) == 41


def test_errors_name_what_is_wrong(tmp_path, folder, monkeypatch):
  with pytest.raises(FileNotFoundError, match="no folder.*absent"):
    ImageFolder(tmp_path / "absent", size=8).open("train")
  (tmp_path / "bare" / "a").mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match="no image.*bare"):
    ImageFolder(tmp_path / "bare", size=8).open("train")
  with pytest.raises(FileNotFoundError, match="'eval' has 0 images"):
    ImageFolder(folder, size=8, eval_fraction=0.0).open("eval")
  with pytest.raises(ValueError, match="size is 0"):
    ImageFolder(folder, size=0)
  with pytest.raises(ValueError, match="channels is 2"):
    ImageFolder(folder, size=8, channels=2)
  monkeypatch.setitem(sys.modules, "PIL", None)
  monkeypatch.setitem(sys.modules, "PIL.Image", None)
  with pytest.raises(ImportError, match=r"pip install 'isthmus\[data\]'"):
    ImageFolder(folder, size=8).open("train")
