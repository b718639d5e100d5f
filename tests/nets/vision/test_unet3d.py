"""The 3D U-Net: one set of parameters, three backward passes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets.reversible import MODES
from isthmus.nets.vision.unet3d import UNet3D, upsample
from isthmus.train.mesh import Mesh, P, path_name, shardings
from tests.nets.suite import distance, jit

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
IMAGE = jax.random.normal(KEY, (2, 8, 4, 8, 2))
TARGET = jax.random.normal(jax.random.key(1), (2, 8, 4, 8, 3))

# Of "conv", which compiles in a fraction of MBConv's time; that is tested on
# one level in test_reversible.py, and here where it is asked for.
small = functools.partial(
  UNet3D, classes=3, widths=(8, 16), depth=2, block="conv"
)
inverted = functools.partial(small, block="mbconv", depth=(1, 2))


@functools.cache
def variables(model):
  """Those of the model; parameters with noise, so that no gradient is 0."""
  made = dict(jit(model.init)(KEY, IMAGE))
  rng = np.random.default_rng(0)
  made["params"] = jax.tree.map(
    lambda p: p + 0.1 * jnp.asarray(rng.standard_normal(p.shape), p.dtype),
    made["params"],
  )
  return made


def loss(model, rest, params, image, train=False):
  out, new = model.apply(
    {**rest, "params": params},
    image,
    train=train,
    mutable=list(rest) if train else [],
    rngs={"dropout": jax.random.key(2)},
  )
  logits, _ = out
  return ((logits - TARGET[: len(image)]) ** 2).mean(), (logits, new)


def graded(model, made, *, train=False):
  """((loss, (logits, new collections)), gradients)."""
  rest = {k: v for k, v in made.items() if k != "params"}
  run = jax.value_and_grad(
    lambda p, x: loss(model, rest, p, x, train), has_aux=True
  )
  return jit(run)(made["params"], IMAGE)


def apart(a, b):
  """|a - b| / |b| over all parameters together."""
  flat = lambda tree: np.concatenate(
    [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
  )
  return distance(flat(a), flat(b))


# --- shapes ---


@pytest.mark.parametrize(
  "options",
  [
    {"widths": (8, 16, 12), "depth": (1, 2, 3), "decoder_depth": 2},
    {"widths": (6,), "depth": 3, "block": "conv"},
    {"widths": (8, 16), "depth": 1, "decoder_depth": (2, 1), "se_ratio": 0.5},
  ],
)
def test_shapes_and_flops(options):
  """Each parameter of a convolution is multiplied once a voxel and pass."""
  model = UNet3D(classes=5, **options)
  (logits, aux), made = jax.eval_shape(model.init_with_output, KEY, IMAGE)
  assert logits.shape == (2, 8, 4, 8, 5) and aux == {}
  down, up = model.depths
  total = 0
  for path, leaf in jax.tree.leaves_with_path(made["params"]):
    name = path_name(path)
    place, _, number = name.partition("/")[0].partition("_")
    level = int(number or 0)
    if place in ("encoder", "decoder"):
      assert leaf.shape[0] == {"encoder": down, "decoder": up}[place][level]
    if name.endswith("kernel"):
      once = "excite/" in name
      total += leaf.size * (1 if once else 8 * 4 * 8 >> 3 * level)
  assert model.flops_per_row(IMAGE.shape[1:]) == 6 * total
  names = {f"encoder_{i}" for i in range(len(model.widths))}
  assert names < set(made["params"])
  assert made["params"]["stem"]["kernel"].shape[-2:] == (2, model.widths[0])


def test_upsampling_is_trilinear_between_centres():
  x = jax.random.normal(KEY, (2, 3, 1, 4, 2))
  expected = jax.image.resize(x, (2, 6, 2, 8, 2), "trilinear")
  np.testing.assert_allclose(upsample(x), expected, rtol=1e-5, atol=1e-6)


def test_skips_join_the_levels():
  """A path through the last level alone would not see single voxels."""
  model = small()
  made = variables(model)
  params = {**made["params"]}
  run = jit(lambda p, x: model.apply({"params": p}, x)[0])
  whole = run(params, IMAGE)
  params["up_1"] = {"kernel": jnp.zeros_like(params["up_1"]["kernel"])}
  cut = run(params, IMAGE)
  assert distance(cut, whole) > 0.01  # the lower level counts
  moved = run(params, IMAGE.at[0, 3, 2, 4].add(1.0))
  assert np.abs(moved - cut)[0, 3, 2, 4].max() > 1e-2


# --- three backward passes ---


@pytest.mark.parametrize(
  "model, bound",
  [
    (small(dropout=0.3), 1e-5),
    pytest.param(inverted(se_ratio=0.25), 1e-5, marks=pytest.mark.slow),
    pytest.param(inverted(cache=0.5), 1e-5, marks=pytest.mark.slow),
    pytest.param(small(dtype=jnp.bfloat16), 5e-3, marks=pytest.mark.slow),
    pytest.param(inverted(dtype=jnp.bfloat16), 5e-3, marks=pytest.mark.slow),
  ],
  ids=["conv", "mbconv", "cache", "conv bfloat16", "mbconv bfloat16"],
)
def test_gradients_are_those_of_autodiff(model, bound):
  made = variables(model)
  plain = model.clone(mode="plain", cache=0.0)
  (_, (logits, _)), ours = graded(model, made, train=True)
  (_, (expected, _)), theirs = graded(plain, made, train=True)
  assert distance(logits, expected) < bound
  assert apart(ours, theirs) < bound
  for path, leaf in jax.tree.leaves_with_path(ours):
    assert np.abs(leaf).max() > 0, path_name(path)


@pytest.mark.slow
def test_dropout_is_a_training_matter():
  model = small(dropout=0.5)
  made = variables(model)
  run = jit(
    lambda key, train: model.apply(
      made, IMAGE, train=train, rngs={"dropout": key}
    )[0],
    static_argnums=1,
  )
  one, two = jax.random.key(3), jax.random.key(4)
  first = run(one, True)
  assert distance(first, run(one, True)) == 0
  assert distance(first, run(two, True)) > 0.01
  quiet = jit(lambda: model.apply(made, IMAGE)[0])()
  assert distance(run(one, False), quiet) < 1e-6 < distance(first, quiet)


def test_parameters_move_between_modes():
  """The same tree; remat and plain agree on its values."""
  trees = {
    mode: jax.eval_shape(small(mode=mode).init, KEY, IMAGE) for mode in MODES
  }
  assert trees["reversible"] == trees["remat"] == trees["plain"]
  made = variables(small())
  logits = [
    jit(lambda m=mode: small(mode=m).apply(made, IMAGE)[0])() for mode in MODES
  ]
  assert distance(logits[1], logits[0]) < 1e-6
  assert distance(logits[2], logits[0]) < 1e-6


# --- devices and batches ---


@pytest.mark.slow
def test_four_devices_change_nothing():
  """Rows over `data`, what convolutions give over `model`.

  On a fine grid: sums in another order move a rounding by one of its steps.
  """
  model = small(depth=1, grid=18)
  made = variables(model)
  mesh = Mesh(data=2, model=2).build(jax.devices()[:4])
  rules = ((r"conv/kernel$", P("model")),)
  spread = jax.device_put(
    made["params"], shardings(made["params"], rules, mesh)
  )
  rows = jax.device_put(IMAGE, jax.NamedSharding(mesh, P("data")))
  with jax.set_mesh(mesh):
    run = jit(
      jax.value_and_grad(lambda p, x: loss(model, {}, p, x), has_aux=True)
    )
    (_, (logits, _)), found = run(spread, rows)
  assert len(logits.sharding.device_set) == 4
  kernel = found["encoder_0"]["f"]["conv"]["kernel"]
  assert not kernel.sharding.is_fully_replicated
  (_, (expected, _)), gradients = graded(model, made)
  assert distance(logits, expected) < 1e-5
  assert apart(found, gradients) < 1e-5


@pytest.mark.slow
def test_vmap_is_a_loop():
  model = small(depth=1, grid=18)
  made = variables(model)

  @jit
  def run(p, x):
    return jax.vmap(jax.grad(lambda p, x: loss(model, {}, p, x)[0]), (None, 0))(
      p, x
    )

  stacked = run(made["params"], IMAGE[:, None])
  looped = [
    jit(jax.grad(lambda p, x: loss(model, {}, p, x)[0]))(
      made["params"], IMAGE[i : i + 1]
    )
    for i in range(2)
  ]
  expected = jax.tree.map(lambda *xs: np.stack(xs), *looped)
  assert apart(stacked, expected) < 1e-5


# --- memory, of compiled programs that are not run ---


def temporary(side, **options):
  """Bytes of temporaries of a gradient."""
  model = UNet3D(classes=3, widths=(16, 32), **options)
  x = jax.ShapeDtypeStruct((1, side, side, side, 1), jnp.float32)
  params = jax.eval_shape(model.init, KEY, x)["params"]
  run = jit(jax.grad(lambda p, x: model.apply({"params": p}, x)[0].mean()))
  analysis = run.lower(params, x).compile().memory_analysis()
  return analysis.temp_size_in_bytes


def test_memory_does_not_grow_with_the_depth():
  two, sixteen = (temporary(16, depth=d, block="conv") for d in (2, 16))
  assert abs(sixteen / two - 1) < 0.05
  plain = temporary(16, depth=16, block="conv", mode="plain")
  assert plain > 2 * sixteen


@pytest.mark.slow
def test_memory_of_mbconv_does_not_grow_with_the_depth():
  """And that of both other modes does."""
  found = {
    mode: [temporary(32, depth=d, mode=mode) for d in (2, 16)] for mode in MODES
  }
  low, high = found["reversible"]
  assert abs(high / low - 1) < 0.05, found
  assert found["remat"][1] > 1.5 * found["remat"][0], found
  assert found["plain"][1] > 3 * found["plain"][0], found


@pytest.mark.slow
@pytest.mark.parametrize("block", ["mbconv", "conv"])
def test_volume_at_a_budget(block):
  """The largest cube whose gradient takes 256 MiB at most, by bisection."""

  def largest(mode):
    low, high = 4, 64  # halves of a side
    while high - low > 1:
      middle = (low + high) // 2
      size = temporary(2 * middle, depth=4, mode=mode, block=block)
      low, high = (middle, high) if size <= 2**28 else (low, middle)
    return (2 * low) ** 3

  voxels = {mode: largest(mode) for mode in MODES}
  assert voxels["reversible"] >= 1.5 * voxels["plain"], voxels
  assert voxels["reversible"] >= voxels["remat"] >= voxels["plain"], voxels


# --- what is refused ---


@pytest.mark.parametrize(
  "options, message",
  [
    ({"classes": 0}, "classes is 0; it must be at least 1"),
    ({"widths": (8, 15)}, r"widths are \(8, 15\); even numbers"),
    ({"widths": ()}, r"widths are \(\); even numbers"),
    ({"depth": 0}, r"depths are \(0, 0\) for 2 levels"),
    ({"depth": (1, 2, 3)}, r"depths are \(1, 2, 3\) for 2 levels"),
    ({"decoder_depth": (1,)}, r"depths are \(1,\) for 2 levels"),
    ({"block": "resnet"}, "block is 'resnet', neither 'mbconv' nor 'conv'"),
    ({"block": "conv", "expand": 2.0}, "expand is 2.0; block 'conv' has none"),
    ({"block": "conv", "se_ratio": 0.5}, "se_ratio is 0.5; block 'conv' has"),
    ({"norm": "layer"}, "norm is 'layer'"),
    ({"dropout": 1.0}, r"dropout is 1.0; it lies in \[0, 1\)"),
    ({"mode": "rev"}, "mode 'rev' is none of reversible, remat, plain"),
    ({"cache": 0.5, "mode": "plain"}, "cache is 0.5, mode 'plain'"),
    ({"grid": 30}, "grid is 30; it is None or in"),
  ],
)
def test_what_can_not_be_built_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    small(**options)


@pytest.mark.parametrize("sides", list(itertools.permutations((8, 16, 12)))[:3])
def test_sides_that_levels_do_not_halve_are_refused(sides):
  model = small(widths=(4, 4, 4, 4))
  x = jnp.ones((1, *sides, 1))
  with pytest.raises(ValueError, match="in 4 levels; sides must be multiples"):
    model.init(KEY, x)
  with pytest.raises(ValueError, match="multiples of 8: pad it, or use slidi"):
    model.flops_per_row(x.shape[1:])
