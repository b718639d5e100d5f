"""Tokens divided over a mesh axis, rows and heads over others: one device's."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from isthmus.attention import attention
from isthmus.attention.sequence import sequence_attention
from isthmus.attention.zigzag import unzigzag, zigzag
from tests.attention.oracle import inputs, segments, vjp

pytestmark = pytest.mark.once

B, T, N, K, D = 4, 32, 4, 2, 8


def mesh(**sizes):
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=jax.devices()[: int(np.prod(list(sizes.values())))],
  )


def arranged(devices, layout, **settings):
  """`sequence_attention` of arrays in their own order."""
  there, back = zigzag, unzigzag
  if layout == "contiguous":
    there = back = lambda x, *_: x

  def run(q, k, v, *sinks, **arrays):
    arrays = {name: there(x, devices) for name, x in arrays.items()}
    if sinks:
      arrays["sinks"] = sinks[0]
    o, lse = sequence_attention(
      *(there(x, devices) for x in (q, k, v)),
      layout=layout,
      return_lse=True,
      **settings,
      **arrays,
    )
    return back(o, devices), back(lse, devices, 2)

  return run


@pytest.mark.parametrize(
  "sizes, layout, schedule",
  [
    ({"data": 2, "seq": 4}, "zigzag", "auto"),
    ({"fsdp": 2, "model": 2, "seq": 2}, "zigzag", "token_ring"),
    ({"model": 4, "seq": 2}, "contiguous", "kv_ring"),  # a kv head for two
    ({"seq": 2}, "contiguous", "ulysses"),
  ],
  ids=str,
)
def test_equals_one_device(sizes, layout, schedule):
  """Values and all gradients, with documents and sinks."""
  *args, do, dlse = inputs(B, T, T, N, K, D)
  args, ids = [*args, jnp.linspace(-1, 1, N)], segments(B, T)
  settings = {"causal": True, "softcap": 2.0}
  run = arranged(sizes["seq"], layout, schedule=schedule, **settings)

  def plain(q, k, v, sinks):
    return attention(
      q, k, v, sinks=sinks, segment_ids=ids, return_lse=True, **settings
    )

  want = vjp(plain, args, do, dlse)
  with jax.set_mesh(mesh(**sizes)):
    one = functools.partial(run, segment_ids=ids)
    got = vjp(one, args, do, dlse)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5)


def test_nothing_is_gathered():
  """Devices send each other keys and values, and nothing else."""
  place = mesh(data=2, model=2, seq=2)
  spec = NamedSharding(place, P("data", "seq", "model"))
  q, k, v = (jax.device_put(x, spec) for x in inputs(B, T, T, N, K, D)[:3])

  def loss(q, k, v):
    return sequence_attention(q, k, v, schedule="kv_ring", causal=True).sum()

  with jax.set_mesh(place):
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().as_text()
  assert "collective-permute" in text
  assert not re.search("all-gather|all-to-all", text)


def test_without_the_axis_it_is_attention():
  q, k, v, *_ = inputs(B, T, T, N, K, D)
  want = attention(q, k, v, causal=True)
  assert np.array_equal(sequence_attention(q, k, v, causal=True), want)
  with jax.set_mesh(mesh(data=2, seq=1)):
    run = functools.partial(sequence_attention, causal=True)
    assert "ppermute" not in str(jax.make_jaxpr(run)(q, k, v))


def test_refused_lengths():
  q, k, v, *_ = inputs(B, 30, 30, N, K, D)
  with jax.set_mesh(mesh(seq=4)):
    with pytest.raises(
      ValueError, match="30 queries are not a multiple of the"
    ):
      sequence_attention(q, k, v)
  with jax.set_mesh(mesh(seq=2)):
    with pytest.raises(ValueError, match="zigzag gives a device two chunks"):
      sequence_attention(q, k, v, causal=True)
  with jax.set_mesh(mesh(data=2, seq=4)):
    q, k, v, *_ = inputs(B, 32, 32, N, K, D)
    with pytest.raises(NotImplementedError, match="2 kv heads"):
      sequence_attention(q, k, v, schedule="ulysses")
