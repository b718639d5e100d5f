"""Calls divided over eight devices equal those of one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from isthmus.attention import BlockMask, attention, save_attention
from isthmus.attention.shard import (
  HEADS,
  ROWS,
  Axes,
  attend_sharded,
  choose,
  place,
  sharded,
  widen,
)
from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.lists import Lists
from isthmus.pallas.flash.predicate import Both, Positions, Segments
from isthmus.pallas.flash.ref import attend
from isthmus.train.mesh import AXES
from tests.nets import suite


def mesh(*, auto=True, **sizes):
  count = int(np.prod(list(sizes.values())))
  kind = AxisType.Auto if auto else AxisType.Explicit
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(kind,) * len(sizes),
    devices=jax.devices()[:count],
  )


def inputs(b=4, t=12, s=16, n=4, k=2, d=8, dv=8, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = [(b, t, n, d), (b, s, k, d), (b, s, k, dv)]
  return tuple(map(jax.random.normal, keys, shapes))


def everything(q, k, rows, heads):
  """Lists, two kinds of operands, sinks; `rows` x `heads`, each all or 1."""
  rng = np.random.default_rng(0)
  (b, t, n, _), (s, kv) = q.shape, k.shape[1:3]
  b, (n, kv) = b if rows else 1, (n, kv) if heads else (1, 1)

  def draw(high, *shape):
    return jnp.asarray(rng.integers(0, high, shape), jnp.int32)

  lists = Lists(
    full_num=draw(3, b, n, 3),
    full=draw(2, b, n, 3, 2).at[..., 1].set(2),
    partial_num=draw(2, b, n, 3) + 1,
    partial=draw(2, b, n, 3, 2).at[..., 1].set(3),
    block=(4, 4),
  )
  extras = Extras(
    lists=lists,
    q=(draw(s, b, n, t), draw(2, b, 1, t)),
    k=(draw(s, b, kv, s), draw(2, b, 1, s)),
    sinks=jnp.arange(float(q.shape[2])),
  )
  return extras, Both(Positions(None, 0), Segments())


def grads(call, q, k, v, extras):
  """Values and gradients of (o, lse), those of sinks among them."""

  def loss(q, k, v, sinks):
    o, lse = call(q, k, v, extras._replace(sinks=sinks))
    seen = jnp.where(jnp.isneginf(lse), 0, lse)
    return jnp.sum(o**3) + jnp.sum(jnp.sin(seen)), (o, lse)

  args = tuple(range(3 if extras.sinks is None else 4))
  whole = jax.value_and_grad(loss, argnums=args, has_aux=True)
  return suite.jit(whole)(q, k, v, extras.sinks)


def same(got, want):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5),
    got,
    want,
  )


def maps(call, *args):
  return str(jax.make_jaxpr(call)(*args)).count("shard_map")


# --- which axes ---


def test_names_are_those_of_the_train_meshes():
  assert {*ROWS, *HEADS} < set(AXES)


@pytest.mark.parametrize(
  "sizes, call, shard_axes, want",
  [
    ({"data": 2, "model": 2}, (4, 4, 2), None, (("data",), ("model",))),
    ({"data": 2, "fsdp": 4}, (8, 1, 1), None, (("data", "fsdp"), ())),
    ({"data": 2, "fsdp": 4}, (2, 1, 1), None, (("data",), ())),
    ({"data": 2, "fsdp": 3}, (3, 1, 1), None, (("fsdp",), ())),
    ({"data": 8}, (1, 1, 1), None, ((), ())),
    ({"data": 1, "model": 1}, (4, 4, 4), None, ((), ())),
    ({"seq": 4}, (4, 4, 4), None, ((), ())),
    ({"data": 2, "model": 3}, (2, 9, 3), None, (("data",), ("model",))),
    ({"model": 4}, (1, 8, 1), None, ((), ("model",))),
    ({"model": 4}, (1, 8, 2), None, ((), ("model",))),
    ({"data": 2, "model": 2}, (4, 3, 1), ((), ()), ((), ())),
    ({"data": 2, "model": 2}, (4, 3, 1), (None, ()), (("data",), ())),
    ({"x": 2, "y": 2}, (4, 4, 4), (["x"], "y"), (("x",), ("y",))),
    ({"data": 2, "model": 2}, (4, 4, 4), ("model", None), (("model",), ())),
    ({"data": 2, "model": 1}, (4, 3, 1), ("data", "model"), (("data",), ())),
  ],
)
def test_choice(sizes, call, shard_axes, want):
  with jax.set_mesh(mesh(**sizes)):
    assert choose(*call, shard_axes) == Axes(*want)


def test_no_mesh_no_axes():
  assert choose(4, 4, 4) == Axes()


@pytest.mark.parametrize(
  "call, shard_axes, words",
  [
    ((4, 9, 3), None, "query heads: 9 .* 2 devices of mesh axis model"),
    ((4, 6, 3), None, r"kv heads: 3 .* 2 .*model; shard_axes=\(None, \(\)\)"),
    ((3, 4, 4), ("data", ()), "a batch of 3 .* 2 devices of mesh axis data"),
    ((2, 4, 4), (("data", "model"), ()), "batch of 2 .* 4 .* data[+]model"),
    ((4, 4, 4), ("rows", ()), "'rows'; the mesh has data, model"),
    ((4, 4, 4), (("data", "data"), ()), "'data' twice"),
    ((4, 4, 4), ("data", "data"), "'data' twice"),
    ((4, 4, 4), "data", r"is 'data'; it is \(batch axes, head axes\)"),
    ((4, 4, 4), ("data",), r"is \('data',\); it is"),
  ],
)
def test_refusals(call, shard_axes, words):
  with jax.set_mesh(mesh(data=2, model=2)):
    with pytest.raises(ValueError, match=words):
      choose(*call, shard_axes)


def test_named_axes_need_a_mesh_with_auto_axes():
  with pytest.raises(ValueError, match="'data'; the mesh has no axes: jax.set"):
    choose(4, 4, 4, ("data", ()))
  with jax.set_mesh(mesh(data=2, auto=False)):
    assert choose(4, 4, 4) == Axes()
    with pytest.raises(ValueError, match="'data', which is Explicit here"):
      choose(4, 4, 4, ("data", ()))


# --- what is computed ---


@pytest.mark.parametrize(
  "sizes, heads, each",
  [
    ({"data": 2, "model": 2}, (4, 2), True),
    ({"data": 2, "model": 3}, (9, 3), False),
    ({"fsdp": 2, "model": 4, "seq": 1}, (4, 1), True),
    ({"data": 2, "model": 2, "seq": 2}, (4, 4), False),
    ({"data": 2, "model": 4}, (8, 2), True),
  ],
  ids=str,
)
def test_equals_one_device(sizes, heads, each):
  """Values, gradients; what all rows and heads share, and what each has."""
  n, k = heads
  q, key, v = inputs(n=n, k=k, dv=6)
  extras, predicate = everything(q, key, each, each)
  attend_ = functools.partial(attend, options=Options(predicate=predicate))
  want = grads(attend_, q, key, v, extras)
  assert not np.isnan(want[0][1][0]).any()
  call = functools.partial(attend_sharded, attend_)
  with jax.set_mesh(mesh(**sizes)):
    assert maps(call, q, key, v, extras) == 1
    same(grads(call, q, key, v, extras), want)


def test_outside_jit_and_under_vmap():
  q, k, v = inputs()
  attend_ = functools.partial(attend, options=Options())
  call = functools.partial(attend_sharded, attend_)
  want = grads(attend_, q, k, v, Extras())
  for sizes in ({"data": 2, "seq": 2}, {"data": 2, "model": 2}):
    with jax.set_mesh(mesh(**sizes)):
      same(call(q, k, v, Extras()), want[0][1])
  with jax.set_mesh(mesh(data=2, model=2)):
    stack = tuple(jnp.stack([x, 2 * x]) for x in (q, k, v))
    o, lse = jax.jit(jax.vmap(lambda *x: call(*x, Extras())))(*stack)
    same((o[1], lse[1]), attend_(2 * q, 2 * k, 2 * v, Extras()))


def test_dropout_has_one_mask_however_it_is_divided():
  q, k, v = inputs(n=4, k=2)
  options = Options(dropout_rate=0.5)
  attend_ = functools.partial(attend, options=options)
  extras = Extras(dropout_key=jax.random.key(3))
  want = grads(attend_, q, k, v, extras)
  other = extras._replace(dropout_key=jax.random.key(4))
  other = suite.jit(attend_)(q, k, v, other)[0]
  assert np.abs(other - want[0][1][0]).max() > 0.1
  call = functools.partial(attend_sharded, attend_)
  with jax.set_mesh(mesh(data=2, model=2)):
    same(grads(call, q, k, v, extras), want)


# --- where ---


def test_one_device_and_no_mesh_are_the_plain_call():
  q, k, v = inputs()
  attend_ = functools.partial(attend, options=Options())
  call = functools.partial(attend_sharded, attend_)
  assert maps(call, q, k, v, Extras()) == 0
  with jax.set_mesh(mesh(data=1, model=1)):
    assert maps(call, q, k, v, Extras()) == 0
  with jax.set_mesh(mesh(data=2, model=2)):
    never = functools.partial(call, shard_axes=((), ()))
    assert maps(never, q, k, v, Extras()) == 0


def test_within_a_map_over_other_axes():
  """The outer map has the rows, this one divides the heads."""
  q, k, v = inputs()
  attend_ = functools.partial(attend, options=Options())
  extras = Extras(sinks=jnp.arange(4.0))
  want = grads(attend_, q, k, v, extras)

  def inner(q, k, v, sinks):
    assert choose(2, 4, 2) == Axes((), ("model",))
    with pytest.raises(ValueError, match="'data', which is Manual here"):
      choose(2, 4, 2, ("data", ()))
    return attend_sharded(attend_, q, k, v, Extras(sinks=sinks))

  def outer(q, k, v, extras):
    rows = P("data")
    divided = jax.shard_map(
      inner,
      in_specs=(rows, rows, rows, P()),
      out_specs=(rows, rows),
      axis_names={"data"},
      check_vma=False,
    )
    return divided(q, k, v, extras.sinks)

  with jax.set_mesh(mesh(data=2, model=2)):
    assert maps(outer, q, k, v, extras) == 2
    same(grads(outer, q, k, v, extras), want)


def test_within_a_checked_map():
  """Isn't divided further, and shared inputs get the sum of gradients."""
  q, k, v = inputs()
  attend_ = functools.partial(attend, options=Options())
  extras = Extras(sinks=jnp.arange(4.0))
  want = grads(attend_, q, k, v, extras)

  def inner(shard_axes, q, k, v, sinks):
    return attend_sharded(
      attend_, q, k, v, Extras(sinks=sinks), shard_axes=shard_axes
    )

  def outer(q, k, v, extras, shard_axes=None):
    rows = P("data")
    divided = jax.shard_map(
      functools.partial(inner, shard_axes),
      in_specs=(rows, rows, rows, P()),
      out_specs=(rows, rows),
      axis_names={"data"},
    )
    return divided(q, k, v, extras.sinks)

  with jax.set_mesh(mesh(data=2, model=2)):
    assert maps(outer, q, k, v, extras) == 1
    same(grads(outer, q, k, v, extras), want)
    with pytest.raises(NotImplementedError, match="check_vma=False"):
      outer(q, k, v, extras, shard_axes=((), "model"))


def test_nothing_is_exchanged():
  """Of the forward pass; in the backward pass, not the keys."""
  q, k, v = inputs()
  attend_ = functools.partial(attend, options=Options())

  def call(q, k, v):
    return attend_sharded(attend_, q, k, v, Extras())[0]

  def grad(q, k, v):
    return jax.grad(lambda *x: call(*x).sum(), argnums=(0, 1, 2))(q, k, v)

  here = mesh(data=2, model=2)
  placed = NamedSharding(here, P("data", None, "model"))
  args = [jax.device_put(x, placed) for x in (q, k, v)]
  moves = r"all-gather|all-reduce|all-to-all|collective-permute"
  with jax.set_mesh(here):
    for f in (call, grad):
      compiled = jax.jit(f).lower(*args).compile()
      assert not re.findall(moves, compiled.as_text())
      for out in jax.tree.leaves(compiled.output_shardings):
        assert out.is_equivalent_to(placed, 4)
    whole = jax.device_put(k, NamedSharding(here, P()))
    gathered = jax.jit(jnp.positive, out_shardings=whole.sharding)
    assert re.findall(moves, gathered.lower(args[1]).compile().as_text())
    same(call(args[0], whole, args[2]), attend_(q, k, v, Extras())[0])


# --- attention itself ---


def test_attention_with_a_block_mask_and_all_else():
  """Traced lists of each row and head; the default implementation."""
  q, k, v = inputs(t=48, s=48, n=9, k=3)
  blocks = jax.random.bernoulli(jax.random.key(7), 0.6, (4, 9, 3, 3))
  ids = jnp.repeat(jnp.arange(4), 12)[None] // jnp.arange(1, 5)[:, None]

  def loss(q, k, v, sinks, blocks, **settings):
    mask = BlockMask.from_blocks(blocks, block=(16, 16), causal=True)
    o, lse = attention(
      q,
      k,
      v,
      mask=mask,
      window=(20, None),
      segment_ids=ids,
      sinks=sinks,
      dropout_rate=0.2,
      dropout_key=jax.random.key(1),
      return_lse=True,
      **settings,
    )
    return jnp.sum(o**3) + jnp.sum(jnp.sin(lse))

  args = (q, k, v, jnp.arange(9.0), blocks)

  def grad(**settings):
    fixed = functools.partial(loss, **settings)
    return suite.jit(jax.value_and_grad(fixed, argnums=(0, 1, 2, 3)))(*args)

  want = grad()
  with jax.set_mesh(mesh(data=2, model=3)):
    same(grad(), want)
    assert maps(loss, *args) == 1
    assert maps(functools.partial(loss, shard_axes=((), ())), *args) == 0
    with pytest.raises(ValueError, match="of 4 is not a multiple of the 3"):
      attention(q, k, v, shard_axes=("model", ()))


def test_remat_runs_a_divided_kernel_once():
  q, k, v = inputs()

  def count(**kwargs):
    f = jax.checkpoint(lambda q: attention(q, k, v).sum(), **kwargs)
    text = str(jax.make_jaxpr(jax.grad(f))(q))
    assert "shard_map" in text
    return text.count("dot_general")

  with jax.set_mesh(mesh(data=2, model=2)):
    plain = jax.make_jaxpr(jax.grad(lambda q: attention(q, k, v).sum()))(q)
    assert count(policy=save_attention) == str(plain).count("dot_general")
    assert count() > count(policy=save_attention)


def test_sharded_copies_axes_of_size_one():
  def add(x, y):
    assert x.shape == (2, 3, 2) and y.shape == (1, 3, 2)
    return x + y

  x, y = jnp.arange(24.0).reshape(4, 3, 2), jnp.ones((1, 3, 4))
  with jax.set_mesh(mesh(data=2, model=2)):
    x = jnp.concatenate([x, x], 2)
    call = (add, (x, y), ("b.n", "b.k"), "b.n")
    out = sharded(*call, sizes=(4, 4, 4))
  np.testing.assert_array_equal(out, x + y)


def test_place():
  """Rows by the batch axes, tokens by seq, where they divide; also eagerly."""
  x = jnp.ones((4, 6, 8))
  assert place(x) is x and widen(x[0]).sharding == x.sharding
  with jax.set_mesh(mesh(data=2, fsdp=2, seq=2)):
    assert place(x).sharding.spec == P(("data", "fsdp"), "seq")
    assert jax.jit(place)(x).sharding.spec == P(("data", "fsdp"), "seq")
    assert place(x[:2, :3]).sharding.spec == P("data")
    one = x[:1, :3]
    assert place(one) is one
  with jax.set_mesh(mesh(model=4)):
    assert place(x) is x

  @jax.shard_map(
    mesh=mesh(data=2, seq=2),
    in_specs=P("data", "seq"),
    out_specs=P("data", "seq"),
    check_vma=False,
  )
  def inside(x):
    return place(x) + widen(x[0])

  np.testing.assert_array_equal(jax.jit(inside)(x), x + 1)


def test_widen():
  """Columns are whole; rows stay divided."""
  place_ = mesh(fsdp=2, model=2)
  table = jax.device_put(
    jnp.arange(32.0).reshape(8, 4), NamedSharding(place_, P("model", "fsdp"))
  )
  with jax.set_mesh(place_):
    got = jax.jit(widen)(table)
  assert got.sharding.spec == P("model")
  np.testing.assert_array_equal(got, table)
