"""Gradients by a joint lse, part by part, add up to those of the whole."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from isthmus.attention import EMPTY, attention
from isthmus.attention.gradient import attention_gradient
from isthmus.attention.merge import add_sinks, merge
from isthmus.attention.sdpa import BACKWARD, OP, prepare
from isthmus.pallas.compat import has_mosaic
from isthmus.pallas.flash import chunked
from isthmus.pallas.flash.joint import delta, sinks_back
from tests.attention.oracle import by_hand, close, dense_mask, inputs, segments
from tests.pallas.flash.hopper import lowered, on

pytestmark = pytest.mark.once

B, T, S, N, K, CUT = 2, 37, 45, 6, 2, 19


def places():
  """Positions with slots that are empty, and ids, of all queries and keys."""
  rng = np.random.default_rng(0)
  k = np.argsort(rng.random((1, K, S)), axis=-1).astype(np.int32)
  k[..., ::4] = EMPTY
  return rng.integers(-5, S, (B, 1, T)).astype(np.int32), k


def standing(t=T, s=S):
  """Bottom-right aligned, as a call of the whole has it."""
  q = np.arange(s - t, s, dtype=np.int32)[None, None]
  return {
    "q_positions": q,
    "kv_positions": np.arange(s, dtype=np.int32)[None, None],
  }


CASES = {
  "all": {},
  "causal": {"causal": True} | standing(),
  "window": {"window": (9, 4)} | standing(),
  "segments": {
    "segment_ids": np.asarray(segments(B, T)),
    "kv_segment_ids": np.asarray(segments(B, S, 1)),
  },
  "positions": {"causal": True}
  | dict(zip(("q_positions", "kv_positions"), places(), strict=True)),
  "softcap": {"softcap": 0.8, "causal": True} | standing(),
  "sinks": {"sinks": np.linspace(-1, 2, N, dtype=np.float32), "causal": True}
  | standing(),
}


def parts(args, do, dlse, settings, impl, cut):
  """((o, lse), gradients) of the keys in two calls; sinks' last."""
  settings = dict(settings)
  sinks = settings.pop("sinks", None)
  keys = ("kv_positions", "kv_segment_ids")

  @jax.jit
  def run(q, k, v, do, dlse, arrays):
    calls = []
    for at in (slice(0, cut), slice(cut, None)):
      here = {n: x[..., at] if n in keys else x for n, x in arrays.items()}
      calls.append((k[:, at], v[:, at], static | here))
    run = functools.partial(attention, q, return_lse=True, impl=impl)
    (o, lse), (o2, lse2) = (run(k, v, **rest) for k, v, rest in calls)
    o, lse = merge(o.astype(lse.dtype), lse, o2.astype(lse.dtype), lse2)
    if sinks is not None:
      o, lse = add_sinks(o, lse, jnp.asarray(sinks))
    o = o.astype(q.dtype)
    back = do, lse, delta(o, lse, do, dlse)
    one, two = (
      attention_gradient(q, k, v, *back, impl=impl, **rest)
      for k, v, rest in calls
    )
    grads = [one[0].astype(lse.dtype) + two[0]]
    grads += [
      jnp.concatenate(x, axis=1) for x in zip(one[1:], two[1:], strict=True)
    ]
    if sinks is not None:
      grads.append(sinks_back(jnp.asarray(sinks), lse, back[2]))
    return (o, lse), grads

  static = {
    n: settings.pop(n) for n in ("causal", "window", "softcap") if n in settings
  }
  return run(*args, do, dlse, settings)


def small(monkeypatch, size=(16, 8)):
  """Chunks of which a short call has several."""
  monkeypatch.setitem(chunked.CHUNK, "cpu", size)


def check(args, do, dlse, settings, impl, cut=CUT):
  b, t, n, _ = args[0].shape
  s, k = args[1].shape[1:3]
  dtype, low = args[0].dtype, args[0].dtype != jnp.float32
  got = parts(args, do, dlse, settings, impl, cut)
  rest = dict(settings)
  how = {"softcap": rest.pop("softcap", None)}
  sinks = [rest.pop("sinks")] if "sinks" in rest else []
  mask = dense_mask(b, t, s, n, k, **rest)
  clean = [np.nan_to_num(np.asarray(x, np.float32)) for x in (*args, do)]
  args, do = [*clean[:3], *sinks], clean[3]
  want = by_hand(args, do, dlse, mask, **how)
  naive = by_hand(args, do, dlse, mask, dtype=dtype, **how) if low else want
  for factor, place in ((2, 0), (3, 1)):
    for x, y, z in zip(got[place], want[place], naive[place], strict=True):
      assert x.shape == y.shape
      close(x, y, z, factor, 1e-5 if low else 5e-6)
  return mask


def each(names, slow):
  """(name, impl); the reference's `slow` ones are of the long run."""
  marks = {name: [pytest.mark.slow] for name in slow}
  return [
    *((name, "chunked") for name in names),
    *(pytest.param(name, "xla", marks=marks.get(name, [])) for name in names),
  ]


@pytest.mark.parametrize(
  "name, impl", each(CASES, ("causal", "window", "segments"))
)
def test_parts_add_up(name, impl, monkeypatch):
  """Odd lengths, groups of 3, wider values, cotangents of the lse too."""
  small(monkeypatch)
  *args, do, dlse = inputs(B, T, S, N, K, 8, 12)
  mask = check(args, do, dlse, CASES[name], impl)
  assert mask.all() == (name == "all")


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_bfloat16(impl, monkeypatch):
  small(monkeypatch)
  *args, do, dlse = inputs(B, T, S, N, K, 8, dtype=jnp.bfloat16)
  check(args, do, dlse, CASES["causal"], impl)


def padded(b, t, s, n, k, dtype=jnp.float32):
  """Documents; those of the last queries and of the last keys are alone.

  Their queries, keys, values and cotangents are NaN.
  """
  *args, do, dlse = (np.array(x) for x in inputs(b, t, s, n, k, 8, dtype=dtype))
  ids = {
    "segment_ids": np.array(segments(b, t)),
    "kv_segment_ids": np.array(segments(b, s, 1)),
  }
  ids["segment_ids"][:, -5:], ids["kv_segment_ids"][:, -9:] = 100, 200
  (q, k, v), nan = args, np.nan
  q[:, -5:] = k[:, -9:] = v[:, -9:] = do[:, -5:] = dlse[..., -5:] = nan
  return jax.tree.map(jnp.asarray, ((q, k, v), do, dlse, ids))


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_nan_padding_does_not_leak(impl, monkeypatch):
  """In rows that no part shows a key, and in keys that nobody sees."""
  small(monkeypatch)
  args, do, dlse, ids = padded(B, T, S, N, K)
  mask = check(args, do, dlse, ids, impl)
  assert (~mask.any(-1)).sum(-1).min() >= 5


@pytest.mark.skipif(not has_mosaic(), reason="the kernels need jax 0.11")
@pytest.mark.parametrize(
  "name",
  [
    "causal, empty rows",
    "padding",
    pytest.param("softcap", marks=pytest.mark.slow),
    pytest.param("sinks", marks=pytest.mark.slow),
  ],
)
def test_mosaic(name):
  """Interpreted; the second part begins within a tile of the whole."""
  t, s, cut = (40, 60, 30) if name == "padding" else (140, 131, 70)
  rest = {"causal": True} | standing(t, s)
  if name == "padding":
    args, do, dlse, rest = padded(1, t, s, 2, 1, jnp.bfloat16)
  else:
    *args, do, dlse = inputs(1, t, s, 2, 1, 40, dtype=jnp.bfloat16)
  if name in ("softcap", "sinks"):
    rest |= {name: CASES[name][name]}
    rest |= {"sinks": rest["sinks"][:2]} if name == "sinks" else {}
  with on():
    mask = check(args, do, dlse, rest, "mosaic", cut)
  assert not mask.any(-1).all()


@pytest.mark.skipif(not has_mosaic(), reason="the kernels need jax 0.11")
def test_mosaic_runs_its_two_passes_and_no_forward():
  x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
  rows = jax.ShapeDtypeStruct((1, 2, 256), jnp.float32)

  def run(x, rows):
    return attention_gradient(x, x, x, x, rows, rows, impl="mosaic")

  with on_cuda():
    _, found = lowered(run, x, rows)
  assert found == ["flash_backward_dk_dv", "flash_backward_dq"]


@contextlib.contextmanager
def on_cuda():
  """As if there were a GPU to run on."""
  from isthmus.pallas.flash import mosaic

  known, mosaic.refuse_machine = mosaic.refuse_machine, lambda: None
  try:
    yield
  finally:
    mosaic.refuse_machine = known


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_no_forward_pass(impl, monkeypatch):
  """Five products for a forward's two and a backward's five."""
  small(monkeypatch, (1, 1))
  q, k, v, do, dlse = inputs(1, 4, 4, 2, 1, 8)

  def run(*args):
    return attention_gradient(*args, impl=impl)

  text = str(jax.make_jaxpr(run)(q, k, v, do, dlse, dlse))
  assert text.count("dot_general[") == 5
  assert len(re.findall(r"= exp\b", text)) == 1


# --- who runs ---


def test_the_choice_is_the_forward_pass_s():
  """But for cuDNN, which has no lse of a part either."""
  q, k, v, do, dlse = inputs(1, 4, 4, 2, 1, 8, dtype=jnp.bfloat16)
  assert [x.name for x in BACKWARD.impls] == [x.name for x in OP.impls]
  assert BACKWARD.order == OP.order
  options, extras = prepare(q, k, v, return_lse=True)
  rows = do, dlse, dlse
  there = OP.explain(q, k, v, extras, options=options)
  back = BACKWARD.explain(q, k, v, extras, *rows, options=options)
  said = {x.name: x.reason for x in back}
  assert said.pop("cudnn") == "it has no backward pass of its own"
  assert said == {x.name: x.reason for x in there if x.name != "cudnn"}
  assert [x.name for x in back if x.verdict == "runs"] == ["chunked"]
  run = functools.partial(attention_gradient, q, k, v, *rows)
  with pytest.raises(
    NotImplementedError, match="cudnn refuses: it has no back"
  ):
    run(impl="cudnn")
  got, want = run(impl=("cudnn", "mosaic", "xla")), run(impl="xla")
  assert all(map(np.array_equal, got, want))


def test_refused_arguments():
  q, k, v, do, dlse = inputs(1, 4, 6, 2, 1, 8)
  with pytest.raises(ValueError, match="no sinks: they are in the lse"):
    attention_gradient(q, k, v, do, dlse, dlse, sinks=jnp.zeros(2))
  with pytest.raises(ValueError, match=r"lse is bfloat16 .*wanted float32"):
    attention_gradient(q, k, v, do, dlse.astype(jnp.bfloat16), dlse)
  low = do.astype(jnp.bfloat16)
  with pytest.raises(ValueError, match="do is bfloat16 .*wanted float32"):
    attention_gradient(q, k, v, low, dlse, dlse)
  with pytest.raises(ValueError, match="softcap is -1.0"):
    attention_gradient(q, k, v, do, dlse, dlse, softcap=-1.0)


def test_heads_and_rows_divided_over_devices():
  """Four devices for two kv heads: each of those has two shares to add up."""
  q, k, v, do, dlse = inputs(2, 8, 8, 4, 2, 8)
  o, lse = attention(q, k, v, return_lse=True)
  rows = do, lse, delta(o, lse, do, dlse)
  want = attention_gradient(q, k, v, *rows)
  mesh = jax.make_mesh(
    (2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )
  with jax.set_mesh(mesh):
    call = jax.jit(attention_gradient)
    assert "shard_map" in str(jax.make_jaxpr(call)(q, k, v, *rows))
    got = call(q, k, v, *rows)
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)
