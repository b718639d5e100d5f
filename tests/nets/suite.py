"""The suite of every block `(x, *, train) -> x | (x, aux)`.

A block is one `Entry` in `test_blocks.py`; each function here takes an entry
and raises AssertionError with the entry's name and what doesn't hold.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from isthmus.nets.stack import unstack_layers
from isthmus.train.mesh import Mesh, P, Rules, path_name, shardings

WIDTH = 32


# Half of the time that these tests take is compilation, of programs that run
# for microseconds; what they compute doesn't depend on how well they are.
jit = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)


def rows(key: jax.Array) -> jax.Array:
  """The usual input: normal [8, 6, 32]."""
  return jax.random.normal(key, (8, 6, WIDTH))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A block under test.

  Attributes:
    name: of the entry, and of its file in tests/golden.
    build: `build(dtype=...)` makes the block that multiplies in that dtype;
      with `dropout` it is also called with `dropout=rate`.
    inputs: makes x from a key, rows first; integers have no gradient.
    output: shape of the result, where it isn't x's.
    wide: the result is float32 whatever the dtype, as logits are.
    train: the call takes `train`.
    dropout: `build` takes `dropout`.
    rules: what is split over the mesh axis `model`, for `train.mesh`.
  """

  name: str
  build: Callable[..., nn.Module]
  inputs: Callable[[jax.Array], jax.Array] = rows
  output: tuple[int, ...] | None = None
  wide: bool = False
  train: bool = True
  dropout: bool = False
  rules: Rules = ()


@functools.cache
def setting(entry: Entry) -> tuple[nn.Module, Any, Any, jax.Array]:
  """(block, parameters, other collections, x) in float32.

  Parameters are drawn anew, so that none is 0, as biases are at the start.
  """
  model = entry.build(dtype=jnp.float32)
  x = entry.inputs(jax.random.key(0))
  variables = dict(jax.eval_shape(model.init, jax.random.key(1), x))
  if len(variables) > 1:  # else nothing needs to be run, or compiled
    variables = dict(jit(model.init)(jax.random.key(1), x))
  rng = np.random.default_rng(2)

  def draw(leaf):
    z = rng.standard_normal(leaf.shape)
    z = z / leaf.shape[-2] ** 0.5 if leaf.ndim > 1 else 1 + 0.1 * z
    return jnp.asarray(z, leaf.dtype)

  return model, jax.tree.map(draw, variables.pop("params")), variables, x


def call(entry: Entry, model: nn.Module, params: Any, x: Any, **kwargs) -> Any:
  """y alone, of blocks that return y and of those that return (y, aux)."""
  if not entry.train:
    kwargs.pop("train", None)
  variables = {"params": params, **setting(entry)[2]}
  out = model.apply(variables, x, **kwargs)
  return out[0] if isinstance(out, tuple) else out


def gradient(
  entry: Entry,
  model: nn.Module,
  *,
  wrap: Callable[..., Any] = lambda f: f,
) -> Callable[..., Any]:
  """`(params, x, dy) -> (gradients, y)` of `<dy, y>`.

  Args:
    entry: says how the block is called.
    model: the block.
    wrap: put around the function that is differentiated.
  """

  def loss(params, x, dy):
    y = call(entry, model, params, x, train=False)
    return jnp.sum(dy * y.astype(jnp.float32)), y

  def run(params, x, dy):
    real = jnp.issubdtype(x.dtype, jnp.floating)
    argnums = (0, 1) if real else (0,)
    return jax.grad(wrap(loss), argnums=argnums, has_aux=True)(params, x, dy)

  return run


@functools.cache
def compiled(entry: Entry) -> Callable[..., Any]:
  """`gradient` in float32 on one device, jitted."""
  return jit(gradient(entry, setting(entry)[0]))


@functools.cache
def cotangent(entry: Entry) -> np.ndarray:
  """Fixed random dy, no two entries alike."""
  shape = setting(entry)[3].shape if entry.output is None else entry.output
  dy = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
  return dy / dy.size**0.5


@functools.cache
def reference(entry: Entry) -> tuple[Any, jax.Array]:
  """(gradients, y), which other ways to compute them are compared with."""
  _, params, _, x = setting(entry)
  return compiled(entry)(params, x, cotangent(entry))


def assert_shape_and_dtype_are_kept(entry: Entry) -> None:
  for dtype in (jnp.float32, jnp.bfloat16):
    x = _cast(setting(entry)[3], dtype)
    model = entry.build(dtype=dtype)
    y = jax.eval_shape(
      lambda p, x, model=model: call(entry, model, p, x, train=False),
      setting(entry)[1],
      x,
    )
    shape = x.shape if entry.output is None else entry.output
    wanted = jnp.float32 if entry.wide else dtype
    assert y.shape == shape, f"{entry.name}: {y.shape} of {shape}"
    assert y.dtype == wanted, f"{entry.name}: {y.dtype}, not {wanted.__name__}"


def assert_every_parameter_learns(entry: Entry) -> None:
  """Gradients are finite, and none is 0 throughout, layer by layer."""
  gradients, y = reference(entry)
  assert np.isfinite(y).all(), f"{entry.name}: the result is not finite"
  params, *rest = gradients
  for path, g in jax.tree.leaves_with_path((unstack_layers(params), *rest)):
    name = path_name(path)
    assert np.isfinite(g).all(), f"{entry.name}: gradient {name} not finite"
    assert np.abs(g).max() > 0, f"{entry.name}: {name} is dead, its gradient 0"


def assert_jit_changes_nothing(entry: Entry) -> None:
  model, params, _, x = setting(entry)
  y = call(entry, model, params, x, train=False)
  _close(entry, "without jit", y, reference(entry)[1], 1e-5)


def assert_vmap_is_a_loop(entry: Entry) -> None:
  model, params, _, x = setting(entry)
  more = np.stack([x, np.roll(x, 1, axis=1), x[::-1]])

  @jit
  @jax.vmap
  def batched(x):
    return call(entry, model, params, x, train=False)

  looped = [compiled(entry)(params, x, cotangent(entry))[1] for x in more]
  assert np.abs(looped[0] - looped[1]).max() > 0, f"{entry.name} ignores x"
  _close(entry, "under vmap", batched(more), np.stack(looped), 1e-5)


def assert_remat_changes_nothing(entry: Entry) -> None:
  """Same values and gradients, with the recomputation in the jaxpr."""
  model, params, _, x = setting(entry)
  args = params, x, cotangent(entry)
  again = gradient(entry, model, wrap=jax.checkpoint)
  plain, more = (
    sum(name in _REMAT for name in _primitives(f, *args))
    for f in (gradient(entry, model), again)
  )
  assert plain < more, f"{entry.name}: {more} recomputations, {plain} without"
  (gradients, y), expected = jit(again)(*args), reference(entry)
  _close(entry, "under remat", y, expected[1], 1e-5)
  _close(entry, "gradient under remat", gradients, expected[0], 1e-5)


def assert_bfloat16_is_close(entry: Entry) -> None:
  """Parameters, gradients and statistics stay float32; errors are bounded.

  An error is `|y - y32| / |y32|` over a whole array. The bound is twice, for
  gradients three times, the error of the float32 block whose parameters, x, y
  and dy are rounded to bfloat16 (of gradients, the largest of them), or the
  unit of bfloat16 if that is more.
  """
  _, params, _, x = setting(entry)
  dy = cotangent(entry)
  model, narrow = entry.build(dtype=jnp.bfloat16), _cast(x, jnp.bfloat16)
  made = jax.eval_shape(model.init, jax.random.key(0), narrow)["params"]
  gradients, y = jit(gradient(entry, model))(params, narrow, dy)
  for path, leaf in jax.tree.leaves_with_path((made, gradients[0])):
    assert leaf.dtype == jnp.float32, (
      f"{entry.name}: {path_name(path)} is {leaf.dtype}, not float32"
    )

  def forward(params, x):
    return call(entry, model, params, x, train=False)

  for eqn in _equations(jax.make_jaxpr(forward)(params, narrow).jaxpr):
    if eqn.primitive.name not in _STATISTICS:
      continue
    dtype = eqn.outvars[0].aval.dtype
    assert dtype not in _NARROW, (
      f"{entry.name}: {eqn.primitive.name} in {dtype}, not float32"
    )
  naive = compiled(entry)(*jax.tree.map(_round, (params, x, dy)))
  expected = reference(entry)
  error = distance(y, expected[1])
  allowed = 2 * max(_UNIT, distance(_round(naive[1]), expected[1]))
  assert error <= allowed, (
    f"{entry.name}: bfloat16 is off by {error:.2g}, more than {allowed:.2g}"
  )
  naives = jax.tree.leaves(_distances(naive[0], expected[0]))
  allowed = 3 * max(_UNIT, *naives)
  errors = _distances(gradients, expected[0])
  for path, error in jax.tree.leaves_with_path(errors):
    assert error <= allowed, (
      f"{entry.name}: bfloat16 gradient {path_name(path)} is off by {error:.2g}"
      f", more than {allowed:.2g}"
    )


def assert_dropout_follows_its_key(entry: Entry) -> None:
  """Equal by key, new by key, and off in evaluation."""
  _, params, _, x = setting(entry)
  if not entry.dropout:
    _same_in_training(entry)
    return
  model = entry.build(dtype=jnp.float32, dropout=0.5)

  @functools.partial(jit, static_argnames="train")
  def run(key, train):
    return call(entry, model, params, x, train=train, rngs={"dropout": key})

  one, two = jax.random.key(4), jax.random.key(5)
  first = run(one, True)
  assert np.array_equal(first, run(one, True)), f"{entry.name}: one key, two y"
  assert not np.array_equal(first, run(two, True)), (
    f"{entry.name}: another key drops the same"
  )
  off = run(one, False)
  _close(entry, "dropout in evaluation", off, reference(entry)[1], 1e-5)


def _same_in_training(entry: Entry) -> None:
  """A block without dropout needs no key in training."""
  model, params, _, x = setting(entry)
  y = jit(lambda p, x: call(entry, model, p, x, train=True))(params, x)
  _close(entry, "in training", y, reference(entry)[1], 1e-5)


def assert_devices_change_nothing(entry: Entry) -> None:
  """Rows over `data`, parameters over `model` by the rules: values of one."""
  model, params, _, x = setting(entry)
  mesh = Mesh(data=-1, model=2 if entry.rules else 1).build()
  placed = shardings(params, entry.rules, mesh)
  spread = jax.device_put(params, placed)
  split = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
  with jax.set_mesh(mesh):
    run = jit(gradient(entry, model))
    gradients, y = run(spread, split, cotangent(entry))
  assert len(y.sharding.device_set) == len(jax.devices()) > 1, entry.name
  assert not y.sharding.is_fully_replicated, f"{entry.name}: y is not split"
  for leaf, place in zip(
    jax.tree.leaves(spread), jax.tree.leaves(placed), strict=True
  ):
    assert leaf.sharding == place
  expected = reference(entry)
  _close(entry, f"on {mesh.size} devices", y, expected[1], 1e-5)
  _close(entry, "gradient, split", gradients, expected[0], 1e-5)


CHECKS = (
  assert_shape_and_dtype_are_kept,
  assert_every_parameter_learns,
  assert_jit_changes_nothing,
  assert_vmap_is_a_loop,
  assert_remat_changes_nothing,
  assert_bfloat16_is_close,
  assert_dropout_follows_its_key,
  assert_devices_change_nothing,
)

_REMAT = ("checkpoint", "remat", "remat2")
# Sums, and what turns a sum into a factor or a probability.
_STATISTICS = ("reduce_sum", "rsqrt", "exp", "log", "cumsum")
_UNIT = 2.0**-8
_NARROW = (jnp.bfloat16, jnp.float16)


def distance(a: Any, b: Any) -> float:
  """`|a - b| / |b|` in the Euclidean norm."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def _distances(a: Any, b: Any) -> Any:
  return jax.tree.map(distance, a, b)


def _close(entry: Entry, what: str, got: Any, want: Any, bound: float) -> None:
  """Every leaf's distance is at most `bound`."""
  for path, error in jax.tree.leaves_with_path(_distances(got, want)):
    assert error <= bound, (
      f"{entry.name}: {what}, {path_name(path) or 'y'} is off by {error:.2g}, "
      f"more than {bound:g}"
    )


def _cast(x: Any, dtype: Any) -> Any:
  return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _round(x: Any) -> Any:
  return _cast(_cast(x, jnp.bfloat16), x.dtype)


def _primitives(function: Any, *args: Any) -> list[str]:
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return [eqn.primitive.name for eqn in _equations(jaxpr)]


def _equations(jaxpr: Any):
  """All equations, those of inner jaxprs included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from _equations(inner)
