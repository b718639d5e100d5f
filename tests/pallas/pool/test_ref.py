"""Means of blocks in XLA."""

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.pool.ref import pool_blocks
from tests.attention.oracle import inputs

pytestmark = pytest.mark.once


@pytest.mark.parametrize("t", [21, 24, 3, 0])
def test_means_divide_by_the_block_also_at_the_end(t):
  x, *_ = inputs(2, max(t, 1), 1, 4, 4, 8)
  x = x[:, :t]
  wide = np.pad(np.asarray(x), ((0, 0), (0, -t % 8), (0, 0), (0, 0)))
  found = pool_blocks(x, 8)
  want = wide.reshape(2, -(-t // 8), 8, 4, 8).mean(2)
  assert found.shape == want.shape
  np.testing.assert_allclose(found, want, atol=1e-6)
  assert pool_blocks(x.astype(jnp.bfloat16), 8).dtype == jnp.bfloat16


def test_sums_are_in_float32():
  """Of 1,000 ones and a small number; in bfloat16 they would stay at 256."""
  x = jnp.ones((1, 1024, 1, 1), jnp.bfloat16)
  assert pool_blocks(x, 1024).item() == 1
