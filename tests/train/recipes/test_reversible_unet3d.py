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


def test_limits_enlarge_one_thing_at_a_time(tmp_path, monkeypatch):
  """With a made-up need: depth costs a plain net, and no reversible one."""
  asked = set()

  def need(model, task, shape):
    depth = model.depth if model.mode == "plain" else 1
    asked.add((shape[1], model.depth, model.widths[0]))
    assert model.widths == tuple(k * model.widths[0] for k in (1, 2, 4))
    return shape[1] ** 3 * depth * model.widths[0] * 2**8

  monkeypatch.setattr(recipe, "step_bytes", need)
  job = recipe.Limits(modes=("plain", "reversible"))
  # 2 GiB are 2^23 of its last factor.
  assert job.run(tmp_path) == {
    "plain/size": 48.0,  # 48^3 4 16; 52 is too much
    "plain/depth": 4.0,  # 48^3 4 16
    "plain/width": 16.0,  # 48^3 4 16; 20 is too much
    "reversible/size": 80.0,  # 80^3 16
    "reversible/depth": 64.0,  # no end
    "reversible/width": 72.0,  # 48^3 72
  }
  assert all((n != 48) + (d != 4) + (w != 16) <= 1 for n, d, w in asked), asked
  text = (tmp_path / "limits.md").read_text()
  assert "| plain | 48 | 4 | 16 |" in text
  assert "| reversible | 80 | 64 or more | 72 |" in text


@pytest.mark.slow
def test_limits_are_of_the_compiled_step():
  """A deeper net needs more where it is plain, and no more where it isn't."""
  job = recipe.Limits()
  need = {
    (mode, depth): job.need(mode, 24, depth, 16)
    for mode in job.modes
    for depth in (4, 12)
  }
  assert need["plain", 12] > 2 * need["plain", 4]
  assert need["reversible", 12] < 1.05 * need["reversible", 4]
  assert need["reversible", 4] < need["remat", 4] < need["plain", 4]


def test_limits_refuse_what_the_net_would():
  with pytest.raises(
    ValueError, match="size is 6; it is a multiple of 4 of at"
  ):
    recipe.Limits(size=6)
  with pytest.raises(ValueError, match=r"budget is 0\.0 GiB"):
    recipe.Limits(budget=0.0)
