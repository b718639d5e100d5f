"""Memory of compiled steps, and the search for what fits."""

import flax.linen as nn
import jax.numpy as jnp
import pytest

from isthmus.train.metrics.memory import largest, step_bytes
from isthmus.train.tasks.segment import Segment


class Chain(nn.Module):
  """Layers of which the backward pass keeps one array each."""

  depth: int

  @nn.compact
  def __call__(self, x, *, train=False):
    x = nn.Dense(8)(x)
    for _ in range(self.depth):
      x = jnp.sin(nn.Dense(8)(x))
    return nn.Dense(2)(x)


def test_step_bytes_grow_with_what_the_backward_pass_keeps():
  array = 16**3 * 8 * 4
  few, many = (
    step_bytes(Chain(depth), Segment(), (1, 16, 16, 16, 1)) for depth in (4, 12)
  )
  assert 8 * array <= many - few <= 3 * 8 * array


@pytest.mark.parametrize("step", [1, 3, 4])
def test_largest_is_what_counting_finds(step):
  low, high = 4, 4 + 20 * step
  for budget in range(4, high + 3):
    asked = []

    def need(n, asked=asked):
      asked.append(n)
      return n

    counted = max(n for n in range(low, high + 1, step) if n <= budget)
    assert largest(need, budget, low=low, high=high, step=step) == counted
    assert len(asked) < 12 and set(asked) <= set(range(low, high + 1, step))


def test_refused():
  with pytest.raises(ValueError, match="4 already needs 4, above 3"):
    largest(float, 3, low=4, high=8)
  with pytest.raises(ValueError, match="no steps of 3 lead from 4 to 8"):
    largest(float, 3, low=4, high=8, step=3)
