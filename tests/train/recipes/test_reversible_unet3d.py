"""The reversible U-Net's recipe: its variants, report and comparison."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets.vision.unet3d import UNet3D
from isthmus.train import config
from isthmus.train.recipes import reversible_unet3d as recipe
from isthmus.train.study import Study


def test_the_pair_differs_in_its_mode_alone():
  runs = config.load("reversible_unet3d:pair").runs()
  one, other = (runs[f"{mode}/0"] for mode in ("reversible", "plain"))
  assert one.model.mode == "reversible" and other.model.mode == "plain"
  assert one == dataclasses.replace(other, model=one.model)
  assert one.model == other.model.clone(mode="reversible")
  assert one == config.load("reversible_unet3d:cpu")


def test_nothing_of_the_front_is_trained_on():
  data = config.load("reversible_unet3d:cpu").data
  train, front = (
    dataclasses.replace(data, size=size, stride=None, foreground=0.0).open(s)
    for size, s in (((189, 169, 197), "train"), (recipe.FRONT, "eval"))
  )
  assert len(train) == len(front) == 1
  assert 169 + recipe.FRONT[1] == 233


def test_full_is_of_three_regions_and_four_scans():
  job = config.load("reversible_unet3d:full")
  shapes = jax.eval_shape(
    lambda x: job.model.init_with_output(jax.random.key(0), x)[0][0],
    jax.ShapeDtypeStruct((1, *job.data.size, 4), jnp.float32),
  )
  label = jax.ShapeDtypeStruct(shapes.shape[:-1], jnp.int32)
  assert jax.eval_shape(job.task.regions, label).shape == shapes.shape


def test_the_report_is_of_the_whole_front(tmp_path):
  """A net that says grey everywhere has the Dice that counting gives."""
  model = UNet3D(classes=3, widths=(2,), depth=1, block="conv")
  job = config.load("reversible_unet3d:cpu")
  data = dataclasses.replace(job.data, size=recipe.FRONT, stride=None)
  job = dataclasses.replace(job, model=model, data=data)
  image = jnp.zeros((1, 8, 8, 8, 1))
  params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
  params["head"]["bias"] = jnp.array([0.0, 1.0, 0.0])
  figures = recipe.show(job, tmp_path, params, {})
  label = dataclasses.replace(data, foreground=0.0).open("eval")[0]["label"]
  grey = 2 * (label == 1).sum() / ((label == 1).sum() + label.size)
  assert figures["volume/dice/grey"] == pytest.approx(grey, rel=1e-12)
  assert figures["volume/dice/white"] == 0.0
  assert figures["volume/dice"] == pytest.approx(grey / 2)
  assert (tmp_path / "slice.png").stat().st_size > 5000


def test_the_report_counts_by_place():
  label = np.array([[[1, 1, 2, 0]]], np.int32)
  found = np.array([[[1, 2, 1, 0]]], np.int32)
  figures = recipe._dice(found, label)
  assert figures["volume/dice/grey"] == 0.5
  assert figures["volume/dice/white"] == 0.0


def _results(*pairs):
  modes = zip(("reversible", "plain"), zip(*pairs, strict=True), strict=True)
  return {
    mode: [
      {"volume/dice": d, "eval/dice": d - 0.1, "eval/loss": 1 - d}
      for d in values
    ]
    for mode, values in modes
  }


@pytest.mark.parametrize(
  "pairs, apart, verdict",
  [
    ([(0.8, 0.809)], 0.009, "replicated"),
    # Equal on the mean, and not the same.
    ([(0.80, 0.82), (0.82, 0.80)], 0.02, "refuted"),
  ],
)
def test_comparison(pairs, apart, verdict, tmp_path):
  study = Study(grid=dict, seeds=len(pairs))
  figures = recipe.compare(study, tmp_path, _results(*pairs))
  assert figures["volume/dice_difference"] == pytest.approx(apart)
  assert figures["reversible/volume/dice"] == pytest.approx(
    np.mean([p[0] for p in pairs])
  )
  assert f"volume/dice within 0.01 for every seed: {verdict}" in (
    (tmp_path / "report.md").read_text()
  )
