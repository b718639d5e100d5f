"""Optimisers in eight bits: beside float32, the hazard, bytes, devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from isthmus.pallas.quant8.api import dequantise, quantise
from isthmus.pallas.quant8.maps import SIGNED, UNSIGNED
from isthmus.train.ckpt import Checkpointer
from isthmus.train.mesh import P, shardings
from isthmus.train.optim import quant8
from isthmus.train.optim.chain import Optimizer
from isthmus.train.optim.coded import CodedState
from isthmus.train.optim.codes import Codes, Moment, tensors
from isthmus.train.optim.quant8 import adamw8bit, scale_by_adam8bit
from isthmus.train.optim.rounding import stochastic_rounding

FLAT = Codes(flat=True)


# --- beside float32 ---


@pytest.mark.once
@pytest.mark.parametrize("width", [32, 256])
def test_protocol_of_published_scheme(width):
  """50 steps of small gradients; after each, states are those of float32."""
  rng = np.random.default_rng(0)
  ours = scale_by_adam8bit(second="plain", codes=FLAT)
  theirs = optax.scale_by_adam()
  p = jnp.asarray(0.1 * rng.normal(size=(1024, width)), jnp.float32)
  mine, state, wide, rate = p, ours.init(p), theirs.init(p), 1e-3

  @jax.jit
  def step(g, p, mine, state, wide):
    u, state = ours.update(g, state)
    w, wide = theirs.update(g, wide)
    return p - rate * w, mine - rate * u, state, wide

  @jax.jit
  def same(wide):
    """The state in eight bits that holds what the wide one holds."""
    q = {}
    for name, x, map in (("mu", wide.mu, SIGNED), ("nu", wide.nu, UNSIGNED)):
      y = quantise(x, map=map, axis=None)
      q[name] = Moment(y.codes, y.absmax)
    return CodedState(wide.count, q)

  offs, shares = [], []
  for _ in range(50):
    g = jnp.asarray(0.01 * rng.normal(size=p.shape), jnp.float32)
    p, mine, state, wide = step(g, p, mine, state, wide)
    off = jnp.abs(p - mine)
    offs.append(off.mean())
    shares.append((off / (jnp.abs(p) + 1e-9)).mean())
    held = read(state, p, "plain", FLAT)
    for x, y in ((held["mu"], wide.mu), (held["nu"], wide.nu)):
      assert (~np.isclose(x, y, atol=3e-3, rtol=1e-3)).sum() < 5
    mine, state = p, same(wide)
  assert 0 < np.mean(offs) < 6e-5 and np.mean(shares) < 6e-4


def read(state, params, second, codes):
  """Moments of the only parameter."""
  maps = {"mu": SIGNED, "nu": quant8._SECOND[second]}
  tree, plan = jax.tree.structure(params), codes.plan(params)
  return {
    n: dequantise(tensors(state.moments[n], tree, plan, m)[0])
    for n, m in maps.items()
  }


@functools.cache
def free(second, uneven, steps=100, rows=128):
  """Largest step, in learning rates, and drift of the sum from float32's."""
  rng = np.random.default_rng(0)
  shape = (rows, 1024)
  scale = np.exp(rng.normal(size=shape)) if uneven else np.ones(shape)
  ours, theirs = scale_by_adam8bit(second=second), optax.scale_by_adam()
  states = [tx.init(jnp.zeros(shape)) for tx in (ours, theirs)]
  runs = [jax.jit(tx.update) for tx in (ours, theirs)]
  largest, sums = [0.0, 0.0], [0.0, 0.0]
  for _ in range(steps):
    g = jnp.asarray(0.01 * scale * rng.normal(size=shape), jnp.float32)
    for i, run in enumerate(runs):
      u, states[i] = run(g, states[i])
      largest[i] = max(largest[i], float(jnp.abs(u).max()))
      sums[i] = sums[i] + u
  drift = jnp.linalg.norm(sums[0] - sums[1]) / jnp.linalg.norm(sums[1])
  return largest, float(drift)


@pytest.mark.once
def test_a_second_moment_of_zero_makes_steps_of_a_hundred_rates():
  """As published, where gradients in a block differ; by default, not."""
  (plain, wide), _ = free("plain", True)
  assert plain > 100 and wide < 2
  for second in ("nozero", "sqrt"):
    (largest, _), _ = free(second, True)
    assert largest < 5


@pytest.mark.once
def test_roots_drift_least():
  drifts = [free(second, True)[1] for second in ("sqrt", "nozero", "plain")]
  assert drifts[0] < drifts[1] < drifts[2] and drifts[0] < 0.08


@pytest.mark.once
def test_even_gradients_drift_little_with_any_map():
  for second in ("sqrt", "nozero", "plain"):
    (largest, _), drift = free(second, False)
    assert largest < 5 and drift < 0.03


def random(shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
  "make, peer",
  [
    (quant8.adamw8bit, functools.partial(optax.adamw, weight_decay=1e-2)),
    (quant8.lion8bit, functools.partial(optax.lion, weight_decay=1e-3)),
    (quant8.momentum8bit, functools.partial(optax.sgd, momentum=0.9)),
    (
      functools.partial(quant8.momentum8bit, nesterov=True),
      functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    ),
    (quant8.rmsprop8bit, functools.partial(optax.rmsprop, eps_in_sqrt=False)),
    (
      quant8.adagrad8bit,
      functools.partial(optax.adagrad, initial_accumulator_value=0.0, eps=0.0),
    ),
  ],
)
def test_first_steps_are_those_of_the_peer(make, peer):
  """Kept whole they are its steps; in eight bits nearly."""
  params = {"w": random((64, 128))}
  for codes, bound in ((Codes(min_size=2**20), 1e-5), (Codes(), 0.1)):
    ours, theirs = make(0.1, codes=codes), peer(0.1)
    states = [tx.init(params) for tx in (ours, theirs)]
    runs = [jax.jit(tx.update) for tx in (ours, theirs)]
    for i in range(4):
      g = {"w": random((64, 128), i + 1)}
      found = [run(g, s, params) for run, s in zip(runs, states, strict=True)]
      states = [s for _, s in found]
      u, w = (np.asarray(x["w"]) for x, _ in found)
      assert np.linalg.norm(u - w) <= bound * np.linalg.norm(w)


# --- what is kept in eight bits ---


def test_states_take_the_bytes_of_the_formula():
  params = {
    "embed": {"embedding": jnp.zeros((512, 64))},
    "mlp": {"kernel": jnp.zeros((64, 1024)), "bias": jnp.zeros((1024,))},
    "conv": {"kernel": jnp.zeros((3, 3, 512, 16))},
  }
  state = scale_by_adam8bit().init(params)
  held = sum(x.nbytes for x in jax.tree.leaves(state.moments))
  large = (64 * 1024 + 4 * 64 * 4) + (3 * 3 * 512 * 16 + 4 * 3 * 3 * 2 * 16)
  assert held == Codes().state_bytes(params)
  assert held == 2 * (large + 4 * (512 * 64 + 1024))
  one = Codes(block=2048).state_bytes({"w": jnp.zeros((2048, 2048))})
  assert one / 2048**2 == pytest.approx(2.0039, abs=1e-4)


@pytest.mark.once
@pytest.mark.parametrize("shape, count", [((2048, 1024), 6), ((512, 512), 16)])
def test_temporaries_hold_no_moments_in_32_bits(shape, count):
  """Of all parameters together, which would be 8 bytes a number."""
  params = {str(i): jnp.zeros(shape) for i in range(count)}
  one, total = params["0"].size, sum(x.size for x in params.values())
  tx = scale_by_adam8bit()
  run = jax.jit(tx.update, donate_argnums=(0, 1))
  memory = run.lower(params, tx.init(params)).compile().memory_analysis()
  # Where parameters are small, XLA holds on to their updates; both moments of
  # all would be twice that.
  assert memory.temp_size_in_bytes < 5 * total + 6 * one < 8 * total
  state = memory.argument_size_in_bytes - 4 * total
  assert state == Codes().state_bytes(params) + 4


def test_bfloat16_parameters_move_by_small_steps_when_rounded_at_random():
  params = {"w": jnp.ones((64, 128), jnp.bfloat16)}
  g = {"w": jnp.ones((64, 128), jnp.bfloat16)}
  means = []
  for rounding in (False, True):
    tx = adamw8bit(1e-4, weight_decay=0.0, rounding=rounding)
    p, state = params, tx.init(params)
    run = jax.jit(tx.update)
    for _ in range(20):
      u, state = run(g, state, p)
      p = optax.apply_updates(p, u)
    assert p["w"].dtype == jnp.bfloat16
    means.append(float(p["w"].astype(jnp.float32).mean()))
  assert means[0] == 1.0
  assert means[1] == pytest.approx(1 - 20e-4, abs=2e-4)


def test_nan_is_not_hidden():
  g = {"w": jnp.ones((64, 128)).at[0, 0].set(jnp.nan)}
  tx = scale_by_adam8bit()
  _, state = tx.update(g, tx.init(g))
  u, _ = tx.update({"w": jnp.ones((64, 128))}, state)
  assert jnp.isnan(u["w"][0]).all() and jnp.isfinite(u["w"][1:]).all()


# --- checkpoints ---


def test_a_run_resumes_to_the_bit(tmp_path):
  params = {
    "embed": random((64, 64)),
    "kernel": random((64, 300)).astype(jnp.bfloat16),
  }
  tx = Optimizer(
    scale=functools.partial(scale_by_adam8bit, codes=Codes(block=64))
  ).build(6)
  tx = optax.chain(tx, stochastic_rounding())

  @jax.jit
  def step(params, state, i):
    g = jax.tree.map(
      lambda p: jax.random.normal(
        jax.random.fold_in(jax.random.key(5), i), p.shape
      ).astype(p.dtype),
      params,
    )
    u, state = tx.update(g, state, params)
    return optax.apply_updates(params, u), state

  def run(carry, first, last):
    for i in range(first, last):
      carry = step(*carry, i)
    return carry

  start = (params, tx.init(params))
  whole, half = run(start, 0, 6), run(start, 0, 3)
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(3, half, wait=True)
    _, back = checkpoints.restore(jax.tree.map(jnp.zeros_like, half))
  jax.tree.map(np.testing.assert_array_equal, back, half)
  jax.tree.map(np.testing.assert_array_equal, run(back, 3, 6), whole)
  kinds = {str(x.dtype) for x in jax.tree.leaves(back[1])}
  assert "uint8" in kinds


# --- devices ---

RULES = (
  (r"up/kernel$", P("fsdp", None)),
  (r"down/kernel$", P(None, "fsdp")),
  (r"both/kernel$", P("fsdp", "model")),
)


def placed():
  params = {
    "up": {"kernel": random((64, 512))},
    "down": {"kernel": random((512, 64), 1)},
    "both": {"kernel": random((64, 1024), 2)},
    "odd": {"kernel": random((5, 1000), 3)},
  }
  mesh = jax.make_mesh(
    (2, 4), ("fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  return params, mesh


def steps(tx, params, state, count=4):
  run = jax.jit(tx.update)
  for i in range(count):
    g = jax.tree.map(lambda p, i=i: p * (i + 1) + jnp.sin(37 * p), params)
    u, state = run(g, state, params)
    params = optax.apply_updates(params, u)
  return params, state


@pytest.mark.parametrize("known", [True, False], ids=("rules", "no rules"))
def test_eight_devices_give_the_bits_of_one(known):
  params, mesh = placed()
  tx = scale_by_adam8bit(codes=Codes(rules=RULES))
  want = steps(tx, params, tx.init(params))
  if not known:
    # The blocks that rules choose, without saying that they are split.
    blind = Codes(rules=RULES)
    object.__setattr__(blind, "spec", lambda name, n: P(*(None,) * n))
    original = Codes(rules=RULES)
    object.__setattr__(blind, "blocks", original.blocks)
    tx = scale_by_adam8bit(codes=blind)
  both = (params, tx.init(params))
  both = jax.device_put(both, shardings(both, RULES, mesh))
  with jax.set_mesh(mesh):
    got = steps(tx, *both)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  if known:
    codes = got[1].moments["nu"].codes["both"]["kernel"]
    assert codes.sharding.spec == P("fsdp", "model")


def test_nothing_moves_between_devices():
  """Of the compiled update: no collective, whichever axes are split."""
  params, mesh = placed()
  tx = scale_by_adam8bit(codes=Codes(rules=RULES))
  both = (params, tx.init(params))
  specs = shardings(both, RULES, mesh)
  moment = specs[1].moments["mu"]
  assert moment.codes["down"]["kernel"].spec == P(None, "fsdp")
  assert moment.absmax["down"]["kernel"].spec == P(None, "fsdp")
  both = jax.device_put(both, specs)
  with jax.set_mesh(mesh):
    run = jax.jit(tx.update, out_shardings=specs)
    text = run.lower(*both).compile().as_text()
  assert collectives(text) == []


def test_blocks_across_devices_would_move():
  """The check above can fail: blocks along the split axis, cut by devices."""
  params, mesh = placed()
  w = {"w": random((64, 1024))}
  tx = scale_by_adam8bit(codes=Codes(block=1024))
  spec = jax.sharding.NamedSharding(mesh, P(None, "model"))
  whole = jax.sharding.NamedSharding(mesh, P())
  state = tx.init(w)
  specs = jax.tree.map(
    lambda x: spec if x.shape == (64, 1024) else whole, state
  )
  with jax.set_mesh(mesh):
    run = jax.jit(tx.update, in_shardings=({"w": spec}, specs))
    text = run.lower(w, state).compile().as_text()
  assert collectives(text)


def collectives(text):
  return re.findall(
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\(",
    text,
  )


def test_roots_are_the_default():
  g = {"w": random((64, 128), 1)}
  default, root, plain = (
    tx.update(g, tx.init(g))[1].moments["nu"].codes["w"]
    for tx in (
      scale_by_adam8bit(),
      scale_by_adam8bit(second="sqrt"),
      scale_by_adam8bit(second="plain"),
    )
  )
  assert (default == root).all() and (default != plain).any()
