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
  """A sum that is rounded before it is divided gives 1.0078125 here."""
  x = jnp.array([1, 1.015625, 1.0234375], jnp.bfloat16).reshape(1, 3, 1, 1)
  assert pool_blocks(x, 3).item() == 1.015625
