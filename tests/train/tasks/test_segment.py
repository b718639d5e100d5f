"""Segmentation: loss, gradient and Dice by hand; devices, padding, refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train import mesh
from isthmus.train.tasks.segment import Segment

ROWS, SPACE = 8, (3, 4, 5)


class Same(nn.Module):
  """Logits that are the image itself, times a parameter that is one."""

  @nn.compact
  def __call__(self, image, *, train=False):
    return image * self.param("one", nn.initializers.ones, ()), {"seen": image}


def nested(label):
  """Regions that hold each other: any, 1 or 3, 3."""
  return jnp.stack([label != 0, label % 2 == 1, label == 3], -1)


KINDS = {
  "classes": Segment(),
  "background": Segment(background=True, smooth=0.1),
  "cross-entropy": Segment(cross_entropy=0.5),
  "regions": Segment(regions=nested),
  "regions, cross-entropy": Segment(regions=nested, cross_entropy=0.5),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def _batch(kind="classes", space=SPACE, rows=ROWS):
  rng = np.random.default_rng(0)
  n = 3 if "regions" in kind else 4
  return {
    "image": 2 * rng.normal(size=(rows, *space, n)).astype(np.float32),
    "label": rng.integers(0, 4, (rows, *space)).astype(np.int32),
  }


def _params():
  return {"one": jnp.ones(())}


def _truth(task, label):
  if task.regions is None:
    return np.eye(4, dtype=bool)[label]
  return np.stack([label != 0, (label == 1) | (label == 3), label == 3], -1)


def _by_hand(task, batch):
  """(loss, soft Dice, cross-entropy) of each row, in float64."""
  x, truth = batch["image"].astype(np.float64), _truth(task, batch["label"])
  space = tuple(range(1, x.ndim - 1))
  if task.regions is None:
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    nats = -np.log((p * truth).sum(-1)).mean(space)
    counted = slice(0 if task.background else 1, None)
  else:
    p = 1 / (1 + np.exp(-x))
    nats = -np.log(np.where(truth, p, 1 - p)).mean((*space, -1))
    counted = slice(None)
  both = 2 * (p * truth).sum(space) + task.smooth
  dice = both / (p.sum(space) + truth.sum(space) + task.smooth)
  dice = dice[:, counted].mean(-1)
  return 1 - dice + task.cross_entropy * nats, dice, nats


def _loss(task, batch, params=None):
  batch = jax.tree.map(jnp.asarray, batch)
  return task.loss(Same(), params or _params(), {}, batch, jax.random.key(0))


def _sums(task, batch):
  batch = {"valid": np.ones(len(batch["label"]), np.float32), **batch}
  batch = jax.tree.map(jnp.asarray, batch)
  sums = task.evaluate(Same(), _params(), {}, batch)
  return {k: float(v) for k, v in sums.items()}


@kinds
@pytest.mark.parametrize("space", [SPACE, (6, 7)])
def test_loss_by_hand(kind, space):
  task, batch = KINDS[kind], _batch(kind, space)
  loss, aux = _loss(task, batch)
  want, dice, nats = _by_hand(task, batch)
  np.testing.assert_allclose(loss, want.mean(), rtol=1e-6)
  np.testing.assert_allclose(aux.metrics["soft_dice"], dice.mean(), rtol=1e-6)
  assert ("cross_entropy" in aux.metrics) == (task.cross_entropy > 0)
  if task.cross_entropy:
    np.testing.assert_allclose(
      aux.metrics["cross_entropy"], nats.mean(), rtol=1e-6
    )
  assert float(aux.weight) == ROWS


@kinds
def test_gradient_is_the_slope_of_the_loss(kind):
  """Against a difference quotient in float64."""
  task, batch = KINDS[kind], _batch(kind)
  slope = jax.grad(lambda p: _loss(task, batch, p)[0])(_params())["one"]
  low, high = (
    _by_hand(task, {**batch, "image": batch["image"].astype(float) * (1 + h)})
    for h in (-1e-5, 1e-5)
  )
  want = (high[0].mean() - low[0].mean()) / 2e-5
  assert abs(want) > 1e-3
  np.testing.assert_allclose(slope, want, rtol=1e-4)


@kinds
def test_hard_dice_by_hand(kind):
  """Over the whole set, with its loss; the mean is of the counted classes."""
  task, batch = KINDS[kind], _batch(kind)
  result = task.summarize(_sums(task, batch))
  truth, x = _truth(task, batch["label"]), batch["image"]
  if task.regions is None:
    guess = np.eye(4, dtype=bool)[x.argmax(-1)]
  else:
    guess = x >= 0
  first = int(task.regions is None and not task.background)
  want = {
    str(i): 2
    * (guess[..., i] & truth[..., i]).sum()
    / (guess[..., i].sum() + truth[..., i].sum())
    for i in range(first, truth.shape[-1])
  }
  got = {k[5:]: v for k, v in result.items() if k.startswith("dice/")}
  assert got == pytest.approx(want, rel=1e-12)
  assert result["dice"] == pytest.approx(np.mean(list(want.values())))
  assert result["loss"] == pytest.approx(_by_hand(task, batch)[0].mean(), 1e-6)


def test_hard_dice_is_of_the_set_and_no_mean_of_batches():
  """A batch with few voxels of a class weighs as many as it has."""
  task, batch = Segment(), _batch()
  batch["label"][:6][batch["label"][:6] == 1] = 0
  whole = _sums(task, batch)
  for parts in (2, 4):
    cut = [
      _sums(task, {k: np.array_split(x, parts)[i] for k, x in batch.items()})
      for i in range(parts)
    ]
    added = {k: sum(p[k] for p in cut) for k in whole}
    result, want = task.summarize(added), task.summarize(whole)
    assert {k: v for k, v in result.items() if "dice" in k} == {
      k: v for k, v in want.items() if "dice" in k
    }
    mean = np.mean([task.summarize(p)["dice/1"] for p in cut])
    assert abs(mean - want["dice/1"]) > 1e-3
    assert result["loss"] == pytest.approx(want["loss"], 1e-6)


def test_counts_are_exact_beyond_float32():
  """More than 2^24 voxels, which float32 can't count one by one."""
  space = (2**24 + 3,)

  class Wide(nn.Module):
    def __call__(self, image, *, train=False):
      return jnp.concatenate([image, 1 - image], -1)

  batch = {
    "image": jnp.zeros((1, 1, *space, 1), jnp.float32),
    "label": jnp.ones((1, 1, *space), jnp.int8),
    "valid": jnp.ones(1),
  }
  evaluate = functools.partial(Segment().evaluate, Wide(), {}, {})
  assert int(jax.jit(evaluate)(batch)["true/1"]) == 2**24 + 3


@kinds
def test_padding_counts_nothing(kind):
  """In an evaluation and in a loss; what it holds doesn't matter."""
  task, batch = KINDS[kind], _batch(kind)
  part = {k: x[:5] for k, x in batch.items()}
  batch["valid"] = (np.arange(ROWS) < 5).astype(np.float32)
  batch["image"][5:] = 7.0
  if task.regions is None:
    batch["label"][5:] = 255
  assert _sums(task, batch) == pytest.approx(_sums(task, part), rel=1e-6)
  padded, aux = _loss(task, batch)
  np.testing.assert_allclose(padded, _loss(task, part)[0], rtol=1e-6)
  assert float(aux.weight) == 5


@kinds
def test_devices_change_nothing(kind):
  """Rows on eight devices: the loss, its gradient, the exact counts."""
  task, batch = KINDS[kind], _batch(kind)
  batch["valid"] = (np.arange(ROWS) != 2).astype(np.float32)
  grid = mesh.Mesh(data=4, fsdp=2).build()
  rows = jax.sharding.NamedSharding(grid, mesh.ROWS)
  split = jax.device_put(batch, rows)
  assert len(split["image"].sharding.device_set) == 8

  @jax.jit
  def both(params, batch):
    loss = jax.value_and_grad(lambda p: _loss(task, batch, p)[0])(params)
    return loss, task.evaluate(Same(), params, {}, batch)

  one = both(_params(), batch)
  with jax.set_mesh(grid):
    many = both(_params(), split)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), one, many)
  counts = {k: v for k, v in one[1].items() if "/" in k}
  assert counts == {k: v for k, v in many[1].items() if "/" in k}
  assert all(v.dtype == jnp.int32 for v in counts.values())


def test_names_and_background():
  names = ("none", "grey", "white", "fluid")
  batch = _batch()
  sums = [_sums(Segment(names=n), batch) for n in ((), names)]
  plain, named = map(Segment().summarize, sums)
  assert [k for k in named if "/" in k] == [f"dice/{n}" for n in names[1:]]
  assert list(plain.values()) == list(named.values())
  task = Segment(background=True)
  assert "dice/0" in task.summarize(_sums(task, batch))


def test_a_class_that_is_nowhere():
  """Neither true nor predicted: 1; predicted: 0."""
  batch = _batch()
  batch["label"][batch["label"] == 3] = 0
  absent = {**batch, "image": batch["image"].copy()}
  absent["image"][..., 3] = -100
  task = Segment()
  assert task.summarize(_sums(task, absent))["dice/3"] == 1.0
  assert task.summarize(_sums(task, batch))["dice/3"] == 0.0


def test_a_label_of_no_class_is_no_number():
  for label in (4, -1):
    batch = _batch()
    batch["label"][1, 0, 0, 0] = label
    assert np.isnan(_loss(Segment(), batch)[0])
    assert np.isnan(Segment().summarize(_sums(Segment(), batch))["loss"])


def test_bfloat16_logits_are_summed_in_float32():
  batch = _batch()
  batch["image"] = jnp.asarray(batch["image"], jnp.bfloat16)
  loss, _ = _loss(Segment(), batch, {"one": jnp.ones((), jnp.bfloat16)})
  batch["image"] = np.asarray(batch["image"], np.float32)
  np.testing.assert_allclose(
    loss, _by_hand(Segment(), batch)[0].mean(), rtol=1e-6
  )


def test_throughput_counts_voxels_and_pixels():
  shapes = {"image": (2, 3, 4, 5, 1), "label": (2, 3, 4, 5)}
  unit, count, flops = Segment().throughput(Same(), shapes)
  assert (unit, count) == ("voxels", 120) and np.isnan(flops)
  shapes = {"image": (2, 4, 5, 1), "label": (2, 4, 5)}
  assert Segment().throughput(Same(), shapes)[:2] == ("pixels", 40)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"cross_entropy": -1.0}, r"cross_entropy is -1\.0; it is at least 0"),
    ({"smooth": 0.0}, r"smooth is 0\.0; it must be above 0"),
    ({"names": ("a", "a", "b")}, "3 of which 2 differ"),
    ({"regions": nested, "background": True}, "background=True beside regions"),
  ],
)
def test_refused_when_built(settings, message):
  with pytest.raises(ValueError, match=message):
    Segment(**settings)


@pytest.mark.parametrize(
  "task, change, message",
  [
    (Segment(), {"label": np.zeros((8, 3, 4), int)}, r"labels \(8, 3, 4\);"),
    (Segment(names=("a", "b")), {}, "gives 4 logits, names are 2"),
    (
      Segment(),
      {"image": np.zeros((8, 3, 4, 5, 1), np.float32)},
      "gives 1 logits; .* at least 2",
    ),
    (Segment(regions=nested), {}, r"bool \(8, 3, 4, 5, 3\); for 4 logits"),
    (
      Segment(regions=lambda label: jnp.stack([label] * 4, -1)),
      {},
      "int32 .* must be bool",
    ),
  ],
)
def test_refused_when_called(task, change, message):
  batch = {**_batch(), **change}
  with pytest.raises(ValueError, match=message):
    _loss(task, batch)
  with pytest.raises(ValueError, match=message):
    _sums(task, batch)


def test_a_batch_too_large_to_count_is_refused():
  batch = {
    "image": jax.ShapeDtypeStruct((8, 1024, 512, 512, 2), jnp.float32),
    "label": jax.ShapeDtypeStruct((8, 1024, 512, 512), jnp.int32),
    "valid": jax.ShapeDtypeStruct((8,), jnp.float32),
  }
  evaluate = functools.partial(Segment().evaluate, Same(), _params(), {})
  with pytest.raises(ValueError, match="2147483648 voxels .* eval_batch_size"):
    jax.eval_shape(evaluate, batch)
