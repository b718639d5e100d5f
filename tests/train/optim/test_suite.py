"""The suite of optimisers can fail: a broken one for each of its checks."""

import itertools

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.optim import suite
from tests.train.optim.suite import Entry


def _optimiser(init=lambda params: (), update=None):
  """Gradient descent, but for what is given."""

  def plain(updates, state, params=None):
    return jax.tree.map(lambda u: -0.1 * u, updates), state

  return optax.GradientTransformation(init, update or plain)


def _uphill(updates, state, params=None):
  return jax.tree.map(lambda u: 0.1 * u, updates), state


def _random_by_trace(updates, state, params=None):
  rate = -np.random.default_rng().uniform(0.05, 0.2)
  return jax.tree.map(lambda u: rate * u, updates), state


def _relative(updates, state, params=None):
  """Divides by the gradient's own size: 0 / 0."""
  size = optax.tree.norm(updates)
  return jax.tree.map(lambda u: -u / size, updates), state


def _by_name(updates, state, params=None):
  """Knows layers by the names that this suite gives them."""
  return (
    jax.tree.map_with_path(
      lambda path, u: -0.1 * u * (1 + ("dense" in str(path))), updates
    ),
    state,
  )


def _by_mesh(updates, state, params=None):
  rate = -0.1 if jax.sharding.get_abstract_mesh().empty else -0.11
  return jax.tree.map(lambda u: rate * u, updates), state


def _by_call(updates, state, params=None):
  """Counts beside the state."""
  _by_call.calls += 1
  return jax.tree.map(lambda u: -0.1 * u / _by_call.calls, updates), state


_by_call.calls = 0


def _count(params):
  return jnp.zeros((), jnp.int32)


def _half_a_count(updates, state, params=None):
  return jax.tree.map(lambda u: -0.1 * u, updates), state + 0.5


def _flat(params):
  leaves = [p.reshape(-1) for p in jax.tree.leaves(params)]
  return {"moments": jnp.concatenate(leaves)}


def _by_host(updates, state, params=None):
  """Counts its steps on the host, where no checkpoint sees it."""
  shape = jax.ShapeDtypeStruct((), jnp.float32)
  count = jax.experimental.io_callback(lambda: next(_STEPS), shape)
  return jax.tree.map(lambda u: -0.1 * u / count, updates), state


_STEPS = (np.float32(i) for i in itertools.count(1))

BROKEN = {
  "resumed": _optimiser(init=_flat, update=_by_host),
  "uphill": _optimiser(update=_uphill),
  "by trace": _optimiser(update=_random_by_trace),
  "0 / 0": _optimiser(update=_relative),
  "by name": _optimiser(update=_by_name),
  "by mesh": _optimiser(update=_by_mesh),
  "by call": _optimiser(update=_by_call),
  "flat": _optimiser(init=_flat),
  "state": _optimiser(init=_count, update=_half_a_count),
}


def _entry(name, **kwargs):
  return Entry(name=name, build=lambda steps: BROKEN[name], **kwargs)


@pytest.mark.parametrize(
  "name, assertion, message",
  [
    ("uphill", suite.assert_it_descends, "parabola in float32 went from"),
    ("flat", suite.assert_state_is_like_the_parameters, "is no parameter's"),
    ("state", suite.assert_state_is_like_the_parameters, "from int32"),
    ("by trace", suite.assert_jit_changes_nothing, "without jit"),
    ("by call", suite.assert_it_chains, "in a chain"),
    ("0 / 0", suite.assert_a_zero_gradient_is_harmless, "moves parameters"),
    ("by call", suite.assert_micro_steps_average, "in MultiSteps"),
    ("by name", suite.assert_containers_change_nothing, "in a list"),
    ("by mesh", suite.assert_devices_change_nothing, "on 8 devices"),
  ],
)
def test_a_broken_optimiser_is_found(name, assertion, message):
  with pytest.raises(AssertionError, match=message):
    assertion(_entry(name))


def test_a_state_that_changes_its_dtype_has_no_conditional():
  with pytest.raises(TypeError, match="float32"):
    suite.assert_nan_is_skipped_by_apply_if_finite(_entry("state"))


def test_a_rate_that_is_not_the_injected_one_is_found():
  entry = _entry("by name", inject=lambda learning_rate: optax.scale(-0.1))
  with pytest.raises(AssertionError, match="at twice the learning rate"):
    suite.assert_hyperparameters_can_be_injected(entry)


def test_a_step_that_is_not_in_the_state_is_found(tmp_path):
  entry = _entry("resumed", extra="moments")
  with pytest.raises(AssertionError, match="resumed: .*kernel differs"):
    suite.assert_it_resumes(entry, tmp_path)
