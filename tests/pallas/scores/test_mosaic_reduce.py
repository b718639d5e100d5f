"""The kernel of reduced logits, of arrays that are whole tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import has_mosaic, interpreted

if not has_mosaic():
  pytest.skip("the kernels need jax 0.11", allow_module_level=True)

from isthmus.pallas import hopper
from isthmus.pallas.scores import mosaic, ref
from isthmus.pallas.scores.api import Options
from isthmus.pallas.scores.mosaic_reduce import _seen, reduce_tiles
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once


def test_lengths_hide_what_is_padding():
  q, k, *_ = inputs(1, 128, 384, 1, 1, 64, dtype=jnp.bfloat16)
  options = Options(64, "sum", causal=False)
  with interpreted():
    found, *_ = jax.jit(
      lambda *a: reduce_tiles(*a, lengths=(128, 300), options=options)
    )(q, k)
  want, _ = ref.reduce_logits(q, k[:, :300], options=options)
  np.testing.assert_allclose(found[:, :, :5], want, rtol=1e-5, atol=1e-5)
  assert np.isneginf(found[:, :, 5]).all()


@pytest.mark.parametrize(
  "reduce, causal",
  [
    ("sum", True),
    ("sum", False),
    ("max", True),
    ("max", False),
    ("none", False),
  ],
)
def test_a_walk_is_cut(reduce, causal, monkeypatch):
  """Into several, of which one is short, and one beyond what is seen."""
  monkeypatch.setattr(hopper, "PROCESSORS", 2 if causal else 4)
  jax.clear_caches()
  q, k, *_ = inputs(1, 300, 300, 1, 1, 64, dtype=jnp.bfloat16)
  options = Options(64, reduce, causal)
  with interpreted():
    found = jax.jit(lambda *a: mosaic.reduce_logits(*a, options=options))(q, k)
  jax.clear_caches()
  want = ref.reduce_logits(q, k, options=options)
  some = slice(reduce == "none", None)
  for x, y in zip(found[some], want[some], strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_few_queries_fill_the_processors_once():
  """The last 128 of 32 heads on 8: 16 rows of tiles, whatever the length."""
  for steps in (256, 512, 1024, 2048):
    work = 16 * steps * _seen(128, 128 * steps)
    assert hopper.walks(work, steps) == 8
