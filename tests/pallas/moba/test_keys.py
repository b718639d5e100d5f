"""Keys cut into blocks, against loops over blocks."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.moba.api import Options
from isthmus.pallas.moba.keys import KEYS, Blocks, pieces
from isthmus.pallas.moba.layout import packed, uniform

pytestmark = pytest.mark.once

IDS = jnp.asarray(np.repeat([4, 2, 4], [70, 11, 119])[None], jnp.int32)
LAYOUTS = {
  "aligned": (64, uniform(200, 200, block=64)),
  "short": (24, uniform(200, 200, block=24)),
  "pieces": (150, uniform(200, 200, block=150)),
  "segments": (64, packed(IDS, block=64, max_segments=3)),
  "lost": (64, packed(IDS, block=64, max_segments=2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_keys_there_and_back(name):
  block, layout = LAYOUTS[name]
  x = np.random.default_rng(0).normal(size=(1, 200, 2, 3)).astype("float32")
  options = Options(block, 1)
  size, parts = pieces(options)
  assert size in KEYS
  blocks = Blocks(options, jnp.asarray(x), jnp.asarray(x), layout)
  cut = blocks.cut(blocks.keys(jnp.asarray(x)), blocks.bounds)
  assert cut.shape[2] == size
  start, stop = (np.asarray(y)[0] for y in (layout.start, layout.stop))
  known = np.zeros(200, bool)
  for lane in range(2):
    for j, (first, last) in enumerate(zip(start, stop, strict=True)):
      known[first:last] = True
      for part in range(parts):
        low = min(first + part * size, last)
        want = np.zeros((size, 3), "float32")
        want[: min(size, last - low)] = x[0, low : min(low + size, last), lane]
        np.testing.assert_array_equal(cut[lane, j * parts + part], want)
  back = blocks.back(blocks.joined(cut, blocks.keys_at()))
  np.testing.assert_array_equal(back, np.where(known[:, None, None], x, 0))


def test_keys_that_no_query_sees_are_zero():
  layout = uniform(4, 100, block=32, positions=jnp.arange(10, 14)[None])
  x = jnp.full((1, 100, 1, 2), jnp.nan).at[:, :14].set(1.0)
  blocks = Blocks(Options(32, 1), x[:, :4], x, layout)
  cut = np.asarray(blocks.cut(blocks.keys(x), blocks.bounds))
  assert cut.sum() == 28 and cut[0, 0, :14].all()
