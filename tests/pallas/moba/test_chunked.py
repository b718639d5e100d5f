"""Block routing by tiles of inverted lists: its memory, order and sizes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.moba import chunked, ref
from isthmus.pallas.moba.api import Extras, Options
from isthmus.pallas.moba.layout import packed, uniform
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once

OPTIONS = Options(block=4, top_k=3, scale=0.4)


def run(attend, layout, **kwargs):
  q, k, v, do, dlse = inputs(2, 37, 37, 6, 2, 8, 12)

  def call(q, k, v):
    return attend(q, k, v, Extras(layout), options=OPTIONS, **kwargs)

  out, pull = jax.vjp(call, q, k, v)
  return out, pull((do, dlse))


@pytest.mark.parametrize(
  "chunk", [(24, 4), (200, 64), (3, 1), (60, 7)], ids=str
)
def test_chunks_and_tiles_of_any_size(chunk):
  """A tile of one choice, one larger than all choices, a chunk of a query."""
  layout = uniform(37, 37, block=4)
  got, want = run(chunked.attend, layout, chunk=chunk), run(ref.attend, layout)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5)


def arrays(text):
  """{shape: bytes} of the arrays of a compiled program."""
  found = {}
  for kind, width, shape in re.findall(r"\b([a-z]+)(\d+)\[([\d,]+)\]", text):
    sizes = [int(x) for x in shape.split(",")]
    bits = 8 if kind == "pred" else int(width)
    found[f"{kind}{width}[{shape}]"] = int(np.prod(sizes)) * bits // 8
  return found


def test_nothing_is_as_large_as_the_scores_of_blocks():
  """At 64K tokens and blocks of 128 those are 134 MB, and logits 17 GB."""
  s, block = 2**16, 128
  layout = uniform(s, s, block=block)
  x = jax.ShapeDtypeStruct((1, s, 1, 64), jnp.float32)

  def gradient(attend, q, k, v):
    def loss(*x):
      o, lse = attend(*x, Extras(layout), options=Options(block=block, top_k=8))
      return o.sum() + lse.sum()

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  f = functools.partial(gradient, chunked.attend)
  compiled = jax.jit(f).lower(x, x, x).compile()
  scores = s * (s // block) * 4
  # What is that of the arguments, with room for a block and a tile.
  found = arrays(compiled.as_text())
  assert max(found.values()) < 1.1 * s * 64 * 4 < scores / 4, sorted(
    found.items(), key=lambda x: -x[1]
  )[:5]
  # Three sums in float32, one chunk's parts, and the rows of chunks.
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < scores


def test_memory_is_linear_in_the_length_and_in_the_bound():
  """Also of packed rows whose segments may be as many as tokens."""

  def temporary(t, bound):
    x = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, t), jnp.int32)

    def gradients(q, k, v, ids):
      def loss(*x):
        layout = packed(ids, block=32, max_segments=bound)
        options = Options(block=32, top_k=4)
        return chunked.attend(*x, Extras(layout), options=options)[0].sum()

      return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    compiled = jax.jit(gradients).lower(x, x, x, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  sizes = [temporary(t, None) for t in (8192, 16384)]
  assert sizes[1] < 2.2 * sizes[0], sizes
  # Scores of all tokens and as many blocks would be a gigabyte.
  assert sizes[1] < 16384 * 16384 / 4, sizes


def test_floats_are_not_added_by_a_scatter():
  """Whose order would be undefined on a GPU."""
  layout = uniform(37, 37, block=4)
  f = functools.partial(run, chunked.attend, layout, chunk=(24, 4))
  text = jax.jit(f).lower().as_text()
  bodies = re.findall(r'"stablehlo.scatter".*?stablehlo.return', text, re.S)
  added = [body for body in bodies if "stablehlo.add" in body]
  assert bodies and not any("tensor<f" in body for body in added)


def test_within_a_shard_map_that_checks():
  """Carries of the loops have to vary over the mesh as the arrays do."""
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  x, _, _, _, _ = inputs(2, 24, 24, 2, 2, 8)

  def loss(x):
    extras = Extras(uniform(24, 24, block=4))
    o, lse = chunked.attend(x, x, x, extras, options=OPTIONS, chunk=(16, 4))
    return jnp.sum(o * jnp.swapaxes(lse, 1, 2)[..., None])

  gradient = jax.grad(loss)
  spec = jax.sharding.PartitionSpec("data")
  divided = jax.jit(
    jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec)
  )
  np.testing.assert_allclose(divided(x), gradient(x), atol=1e-5)


def test_tiles_that_are_not_there_are_not_met(monkeypatch):
  """The work is that of the choices, not that of the bound on blocks."""
  count = []
  original = chunked._scores

  def scores(*args):
    jax.debug.callback(lambda: count.append(1))
    return original(*args)

  monkeypatch.setattr(chunked, "_scores", scores)
  ids = jnp.asarray(np.repeat([0, 1], [30, 34])[None], jnp.int32)
  x = jnp.ones((1, 64, 1, 8))
  options = Options(block=16, top_k=1, scale=0.321)
  for bound in (None, 2):
    count.clear()
    layout = packed(ids, block=16, max_segments=bound)
    o, _ = chunked.attend(
      x, x, x, Extras(layout), options=options, chunk=(64, 16)
    )
    jax.block_until_ready(o)
    jax.effects_barrier()
    assert len(count) == 5  # blocks of 16, 14, 16, 16 and 2
