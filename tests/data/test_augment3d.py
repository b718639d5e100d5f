"""3D augmentation: exact where it can be, aligned, and a function of seeds."""

import numpy as np
import pytest

from isthmus.data import ArraySource, Loader
from isthmus.data.augment3d import Augment3D, affine, rotation, smooth_noise
from isthmus.data.resample import nearest, trilinear

pytestmark = pytest.mark.once

OFF = {
  "degrees": 0.0, "scale": 1.0, "flip": "", "elastic": 0.0, "intensity": 0.0
}  # fmt: skip


def example(shape=(16, 18, 20), channels=2, seed=0):
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(*shape, channels)).astype(np.float32)
  label = rng.integers(0, 4, shape, dtype=np.int32)
  return {"image": image, "label": label, "name": "kept"}


def run(augment, given, *seed):
  return augment(given, np.random.default_rng(seed))


def test_nothing_changes_where_all_is_off():
  given = example()
  found = run(Augment3D(**OFF), given, 1)
  assert found.keys() == given.keys() and found["name"] == "kept"
  for name in ("image", "label"):
    np.testing.assert_array_equal(found[name], given[name])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flips_are_exact_and_half_of_the_time(axis):
  given, flipped = example((4, 5, 6)), 0
  augment = Augment3D(**{**OFF, "flip": "zyx"[axis]})
  for seed in range(40):
    found = run(augment, given, seed)
    turned = not np.array_equal(found["image"], given["image"])
    for name in ("image", "label"):
      wanted = np.flip(given[name], axis) if turned else given[name]
      np.testing.assert_array_equal(found[name], wanted)
    flipped += turned
  assert 10 <= flipped <= 30


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("n", [9, 10])
def test_a_right_angle_is_rot90(axis, n):
  given = example((n, n, n))
  matrix = rotation(np.eye(3)[axis] * 3, np.pi / 2)
  at = affine((n, n, n), matrix)
  plane = tuple(a % 3 for a in (axis + 1, axis + 2))
  found = trilinear(given["image"], at)
  wanted = np.rot90(given["image"], -1, plane)
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  wanted = np.rot90(given["label"], -1, plane)
  np.testing.assert_array_equal(nearest(given["label"], at), wanted)


def test_rotations_are_rotations_up_to_the_angle():
  rng = np.random.default_rng(0)
  for angle in (0.1, 1.0, 3.0):
    matrix = rotation(rng.normal(size=3), angle)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.isclose(np.linalg.det(matrix), 1)
    assert np.isclose(np.trace(matrix), 1 + 2 * np.cos(angle))


def test_image_and_label_stay_aligned_and_no_label_is_new():
  label = np.zeros((24, 24, 24), np.int32)
  label[4:20, 6:20, 3:15] = 1
  given = {"image": label[..., None].astype(np.float32), "label": label}
  augment = Augment3D(intensity=0.0)
  moved = 0
  for seed in range(8):
    found = run(augment, given, seed)
    image = found["image"][..., 0]
    assert set(np.unique(found["label"])) == {0, 1}
    # Of the nearest voxel an interpolated value holds an eighth at least.
    assert (image[found["label"] == 1] >= 0.124).all()
    assert (image[found["label"] == 0] <= 0.876).all()
    moved += (found["label"] != label).mean()
  assert moved / 8 > 0.05


def test_displacements_have_their_strength_and_do_not_fold():
  fields = [
    smooth_noise((40, 40, 40), np.random.default_rng(i), sigma=6.0)
    for i in range(12)
  ]
  assert 0.85 < np.std(fields) < 1.15
  lowest = min(
    np.linalg.det(
      np.eye(3)
      + 1.5 * np.moveaxis([np.gradient(f) for f in field], (0, 1), (-2, -1))
    ).min()
    for field in fields
  )
  assert lowest > 0


def test_contrast_changes_tissue_alone_and_within_its_bounds():
  given = example(channels=3)
  given["image"][:5] = 0
  given["image"][6, ..., 1] = 0  # in one channel only: tissue
  found = run(Augment3D(**{**OFF, "intensity": 0.2}), given, 3)["image"]
  assert (found[:5] == 0).all()
  for channel in range(3):
    before = given["image"][5:, ..., channel].ravel()
    after = found[5:, ..., channel].ravel()
    slope, offset = np.polyfit(before, after, 1)
    np.testing.assert_allclose(after, slope * before + offset, atol=1e-4)
    assert 0.8 <= slope <= 1.2 and -0.2 <= offset <= 0.2 and offset != 0
  bent = run(Augment3D(**{**OFF, "gamma": 2.0}), given, 3)["image"]
  assert (bent[:5] == 0).all() and not np.allclose(bent, given["image"])
  for channel in range(3):
    before = given["image"][5:, ..., channel].ravel()
    after = bent[5:, ..., channel].ravel()
    np.testing.assert_allclose(after.min(), before.min(), rtol=1e-5)
    np.testing.assert_allclose(after.max(), before.max(), rtol=1e-5)
    assert (np.diff(after[np.argsort(before)]) >= -1e-5).all()


def test_a_function_of_seed_and_index_that_leaves_its_input():
  given = example((8, 8, 8))
  rows = {k: np.stack([given[k]] * 4) for k in ("image", "label")}
  kept = rows["image"].copy()
  augment = Augment3D(sigma=4.0, elastic=1.0)
  load = lambda seed, threads=0: Loader(
    ArraySource(rows), batch_size=4, seed=seed, transform=augment,
    shuffle=False, threads=threads,
  ).host_batch(0)["image"]  # fmt: skip
  first = load(0)
  np.testing.assert_array_equal(first, load(0, threads=2))
  np.testing.assert_array_equal(rows["image"], kept)
  assert len({row.tobytes() for row in (*first, *load(1))}) == 8


def test_parts_have_draws_of_their_own():
  given = example((8, 8, 8))
  alone = run(Augment3D(**{**OFF, "flip": "zyx"}), given, 5)["label"]
  more = Augment3D(**{**OFF, "flip": "zyx", "intensity": 0.1, "gamma": 2.0})
  np.testing.assert_array_equal(alone, run(more, given, 5)["label"])


def test_what_cannot_be_is_refused():
  for wrong in ({"degrees": -1.0}, {"degrees": 181.0}, {"scale": 0.9},
                {"elastic": 4.0}, {"sigma": 0.0, "elastic": 0.0},
                {"intensity": float("nan")}, {"gamma": 0.5},
                {"flip": "zz"}, {"flip": "w"}):  # fmt: skip
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"^{name} is "):
      Augment3D(**wrong)
  given = example()
  for bad, cause in (
    ({"x": np.ones(3)}, "needs image float32"),
    ({"image": np.ones((4, 4, 4), np.float32)}, "needs image float32"),
    ({**given, "label": given["label"][1:]}, r"\(15, 18, 20\), image \(16"),
  ):
    with pytest.raises(ValueError, match=cause):
      run(Augment3D(), bad, 0)
