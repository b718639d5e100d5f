"""The pure step: accumulation, averages, keys."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from isthmus.train.optim.fuse import Fused
from isthmus.train.state import make_init, make_step
from isthmus.train.tasks.task import Aux, Task


class Net(nn.Module):
  """A dense layer, dropout, and a running mean, as BatchNorm keeps one."""

  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, *, train=False):
    mean = self.variable("stats", "mean", jnp.zeros, (3,))
    if train:
      mean.value = 0.5 * mean.value + 0.5 * x.mean(axis=0)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(2, name="out")(x)


@dataclasses.dataclass(frozen=True)
class Weighted(Task):
  """Squares weighted by row, so that micro-batches differ in weight."""

  def init(self, model, batch, key):
    return model.init(key, batch["x"])

  def loss(self, model, params, mutables, batch, key):
    y, new = model.apply(
      {"params": params, **mutables},
      batch["x"],
      train=True,
      rngs={"dropout": key},
      mutable=list(mutables),
    )
    weight = batch["w"].sum()
    loss = jnp.sum(batch["w"] * jnp.square(y).sum(-1)) / weight
    metrics = {"first": jnp.sum(batch["w"] * y[:, 0]) / weight}
    return loss, Aux(weight=weight, metrics=metrics, mutables=dict(new))


def _batch(rows=8):
  keys = jax.random.split(jax.random.key(0))
  return {
    "x": jax.random.normal(keys[0], (rows, 3)),
    "w": jax.random.uniform(keys[1], (rows,)) + 0.1,
  }


def _state(tx, model=None, **kwargs):
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _batch()
  )
  return make_init(model or Net(), Weighted(), tx, batch, seed=0, **kwargs)()


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_is_the_whole_batch(parts):
  tx = optax.sgd(0.1)
  state, batch = _state(tx), _batch()
  whole, m1 = jax.jit(make_step(Net(), Weighted(), tx))(state, batch)
  cut, m2 = jax.jit(make_step(Net(), Weighted(), tx, accumulate=parts))(
    state, batch
  )
  np.testing.assert_allclose(
    whole.params["out"]["kernel"], cut.params["out"]["kernel"], rtol=1e-5
  )
  for name in ("loss", "first", "grad_norm"):
    np.testing.assert_allclose(m1[name], m2[name], rtol=1e-5)
  # A plain mean over the parts would not be the same: the weights differ.
  plain = [
    make_step(Net(), Weighted(), tx)(
      state, jax.tree.map(lambda x, i=i: x[i::parts], batch)
    )[1]["loss"]
    for i in range(parts)
  ]
  assert abs(np.mean(plain) - m1["loss"]) > 1e-4


def test_accumulation_refuses_uneven_parts():
  tx = optax.sgd(0.1)
  with pytest.raises(ValueError, match="8 rows do not cut into 3"):
    make_step(Net(), Weighted(), tx, accumulate=3)(_state(tx), _batch())


def test_mutables_are_updated_once_a_micro_batch():
  tx = optax.sgd(0.1)
  batch = _batch()
  one, _ = make_step(Net(), Weighted(), tx)(_state(tx), batch)
  np.testing.assert_allclose(
    one.mutables["stats"]["mean"], 0.5 * batch["x"].mean(0), rtol=1e-5
  )
  two, _ = make_step(Net(), Weighted(), tx, accumulate=2)(_state(tx), batch)
  expected = 0.25 * batch["x"][0::2].mean(0) + 0.5 * batch["x"][1::2].mean(0)
  np.testing.assert_allclose(
    two.mutables["stats"]["mean"], expected, rtol=1e-4, atol=1e-6
  )


def test_ema():
  tx = optax.sgd(0.1)
  state = _state(tx, ema=0.9)
  step = make_step(Net(), Weighted(), tx, ema=0.9)
  expected = state.params["out"]["kernel"]
  for _ in range(3):
    state, _ = step(state, _batch())
    expected = 0.9 * expected + 0.1 * state.params["out"]["kernel"]
  np.testing.assert_allclose(state.ema["out"]["kernel"], expected, rtol=1e-5)
  assert np.abs(
    state.ema["out"]["kernel"] - state.params["out"]["kernel"]
  ).max()
  assert _state(tx).ema is None


def test_a_step_uses_its_own_key():
  tx = optax.sgd(0.0)
  model = Net(dropout=0.5)
  step = jax.jit(make_step(model, Weighted(), tx))
  state = _state(tx, model)
  after, first = step(state, _batch())
  _, again = step(state, _batch())
  _, second = step(after, _batch())
  assert first["loss"] == again["loss"]
  assert first["loss"] != second["loss"]  # same parameters, another mask
  assert int(after.step) == 1


def test_init_depends_on_the_seed_alone():
  tx = optax.adam(0.1)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _batch()
  )
  states = [
    make_init(Net(), Weighted(), tx, batch, seed=s)() for s in (0, 0, 1)
  ]
  kernels = [s.params["out"]["kernel"] for s in states]
  assert (kernels[0] == kernels[1]).all()
  assert (kernels[0] != kernels[2]).any()


def test_an_optimiser_takes_its_step_itself():
  """Where it can; with the same numbers as by its update."""
  plain, calls = optax.adam(0.1), []

  def step(params, gradients, state):
    calls.append(1)
    updates, state = plain.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  ends = []
  for tx in (plain, Fused(plain.init, plain.update, step)):
    run = jax.jit(make_step(Net(), Weighted(), tx, accumulate=2, ema=0.5))
    state = _state(tx, ema=0.5)
    for _ in range(2):
      state, metrics = run(state, _batch())
    ends.append((state.params, state.opt_state, state.ema, metrics))
  assert calls
  jax.tree.map(np.testing.assert_array_equal, *ends)
