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


@pytest.mark.parametrize("fixed", [0.0, 3.0, 300.0])
@pytest.mark.parametrize("power", [1, 3])
def test_a_straight_line_is_soon_followed(fixed, power):
  for end in range(2, 201, 3):
    asked = []

    def need(n, asked=asked):
      asked.append(n)
      return fixed + n**power

    budget = fixed + (end + 0.5) ** power
    assert largest(need, budget, low=2, high=200, power=power) == min(end, 200)
    assert len(set(asked)) <= 5
    assert max(asked) <= end + 1  # nothing far too large is compiled


@pytest.mark.parametrize("bend", [0.1, 0.5, 2.0, 8.0])
def test_a_bent_line_takes_no_more_than_four_bisections(bend):
  for end in range(0, 1024, 37):
    asked = []

    def need(n, asked=asked):
      asked.append(n)
      return (n / 1024) ** bend

    budget = ((end + 0.5) / 1024) ** bend
    assert largest(need, budget, low=0, high=1023) == end
    assert len(set(asked)) <= 40


def test_refused():
  with pytest.raises(ValueError, match="4 already needs 4, above 3"):
    largest(float, 3, low=4, high=8)
  with pytest.raises(ValueError, match="no steps of 3 lead from 4 to 8"):
    largest(float, 3, low=4, high=8, step=3)
