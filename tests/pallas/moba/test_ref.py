"""The reference's mask: which keys the chosen blocks let through."""

import jax.numpy as jnp
import numpy as np

from isthmus.pallas.flash.predicate import Predicate, Range
from isthmus.pallas.moba.api import Extras, Options
from isthmus.pallas.moba.layout import packed, uniform
from isthmus.pallas.moba.ref import Chosen, attend
from tests.attention.oracle import inputs
from tests.pallas.moba.sets import mask_of

RNG = np.random.default_rng(0)


def test_the_mask_is_that_of_the_sets():
  """Values that tell keys apart show what is read."""
  q, k, _, _, _ = inputs(1, 21, 21, 4, 2, 8)
  v = jnp.broadcast_to(jnp.eye(21)[:, None], (1, 21, 2, 21))
  ids = jnp.asarray(np.repeat([3, 1], [10, 11])[None], jnp.int32)
  for layout, segment_ids in (
    (uniform(21, 21, block=4), None),
    (packed(ids, block=4), ids),
  ):
    o, _ = attend(q, k, v, Extras(layout), options=Options(4, 2))
    want = mask_of(q, k, block=4, top_k=2, segment_ids=segment_ids)
    np.testing.assert_array_equal(np.asarray(o).swapaxes(1, 2) > 0, want)


def test_bounds_of_tiles_are_bounds():
  """`some` is never False where a key is seen; `every` is never True."""
  predicate = Chosen(2)
  assert isinstance(predicate, Predicate) and predicate.operands == (3, 1)
  for _ in range(50):
    blocks = [RNG.integers(-1, 6, (4, 1)) for _ in range(2)]
    at = RNG.integers(-2, 16, (4, 1))
    start = int(RNG.integers(0, 12))
    j = np.arange(start, start + 4)
    seen = np.asarray(
      predicate(0, j, (*map(jnp.asarray, blocks), at), (jnp.asarray(j // 3),))
    )
    some, every = predicate.tiles(
      Range(0, 3),
      Range(j[0], j[-1]),
      tuple(Range(jnp.min(x), jnp.max(x)) for x in (*blocks, at)),
      (Range(j[0] // 3, j[-1] // 3),),
    )
    assert some or not seen.any()
    assert not every
