"""Against bitsandbytes' wheel on a CPU; pytest -m parity.

Its quantiser has two roads there. Numbers of float64 are searched for in the
map, as on its GPUs; those of float32 are looked up in 65536 bins, so that
nothing below 1.5e-5 of a block's largest number is told apart, 0 included.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.quant8.api import dequantise, quantise
from isthmus.pallas.quant8.maps import SIGNED, UNSIGNED, table
from isthmus.train.optim.codes import Codes
from isthmus.train.optim.quant8 import adamw8bit

pytestmark = pytest.mark.parity
BLOCK = 256
each = pytest.mark.parametrize(
  "which", [SIGNED, UNSIGNED], ids=("signed", "unsigned")
)


@pytest.fixture(scope="module")
def peer():
  pytest.importorskip("torch")
  return pytest.importorskip("bitsandbytes")


def values(peer, which):
  return peer.functional.create_dynamic_map(which.signed)


def numbers(which, size=2**18):
  rng = np.random.default_rng(0)
  x = rng.normal(size=size) * np.exp(rng.normal(size=size))
  x = x.astype(np.float32)
  return x if which.signed else np.square(x)


def theirs(peer, x, which, *, search):
  """Codes and scales: by a search in the map, or by its bins."""
  import torch

  x = torch.from_numpy(np.asarray(x, np.float64 if search else np.float32))
  run = torch.ops.bitsandbytes.quantize_blockwise
  # The search makes an array of 256 times the size.
  parts = [run(y, values(peer, which), BLOCK) for y in x.split(2**14)]
  return tuple(np.concatenate([p[i].numpy() for p in parts]) for i in (0, 1))


@each
def test_maps_are_equal_but_for_their_last_bit(peer, which):
  np.testing.assert_allclose(
    values(peer, which).numpy(), table(which), rtol=1.5e-7, atol=0
  )


@each
def test_codes_are_equal_but_for_ties(peer, which):
  x = numbers(which)
  codes, scales = theirs(peer, x, which, search=True)
  ours = quantise(jnp.asarray(x), map=which, block=BLOCK, axis=None)
  np.testing.assert_allclose(ours.absmax, scales, rtol=1e-7)
  off = np.asarray(ours.codes) != codes
  assert off.mean() < 2e-5
  both = [table(which)[np.asarray(c)[off]] for c in (ours.codes, codes)]
  y = (x / np.repeat(scales, BLOCK))[off]
  np.testing.assert_allclose(np.mean(both, axis=0), y, rtol=2e-6)


@each
def test_its_bins_are_as_wide_as_they_are_said_to_be(peer, which):
  x = numbers(which)
  codes, scales = theirs(peer, x, which, search=False)
  ours = quantise(jnp.asarray(x), map=which, block=BLOCK, axis=None)
  off = np.asarray(ours.codes) != codes
  assert 1e-4 < off.mean() < 0.3
  y = x / np.repeat(scales, BLOCK)
  near = np.abs(table(which)[codes] - y)
  best = np.abs(table(which)[np.asarray(ours.codes)] - y)
  assert (near - best).max() < 3.1e-5
  zeros, _ = theirs(peer, np.eye(1, BLOCK)[0], which, search=False)
  assert (zeros[1:] != which.zero).all()


@each
def test_codes_read_as_the_same_numbers(peer, which):
  import torch

  q = quantise(jnp.asarray(numbers(which)), map=which, block=BLOCK, axis=None)
  codes, scales = (torch.from_numpy(np.array(x)) for x in (q.codes, q.absmax))
  read = torch.ops.bitsandbytes.dequantize_blockwise
  got = read(codes, scales, values(peer, which), BLOCK, torch.float32)
  np.testing.assert_allclose(got.numpy(), dequantise(q), rtol=3e-7, atol=0)


def gradients(shape, uneven, steps):
  rng = np.random.default_rng(0)
  scale = np.exp(rng.normal(size=shape)) if uneven else np.ones(shape)
  for _ in range(steps):
    yield (0.01 * scale * rng.normal(size=shape)).astype(np.float32)


@functools.cache
def run(search, uneven, steps=60, shape=(128, 1024)):
  """Its Adam in eight bits beside ours, `plain`: largest steps, and paths."""
  import bitsandbytes
  import torch
  from bitsandbytes.backends.cpu import ops

  rate = 1e-3
  p = torch.nn.Parameter(torch.zeros(shape))
  optimizer = bitsandbytes.optim.Adam([p], lr=rate, optim_bits=8)
  ours = adamw8bit(
    rate, weight_decay=0.0, second="plain", codes=Codes(flat=True)
  )
  q = {"w": jnp.zeros(shape)}
  state, step = ours.init(q), jax.jit(ours.step)

  def searched(x, values, scales, codes, block):
    found = torch.ops.bitsandbytes.quantize_blockwise
    parts = [
      found(y.double(), values, block) for y in x.reshape(-1).split(2**14)
    ]
    codes.copy_(torch.cat([c for c, _ in parts]).reshape(codes.shape))
    scales.copy_(torch.cat([s for _, s in parts]))

  largest = [0.0, 0.0]
  with pytest.MonkeyPatch.context() as patch:
    if search:
      patch.setattr(ops, "_quant_blockwise_fp32_direct", searched)
    for g in gradients(shape, uneven, steps):
      before, p.grad = p.detach().clone(), torch.from_numpy(g)
      optimizer.step()
      old, (q, state) = q, step(q, {"w": jnp.asarray(g)}, state)
      moves = (p.detach() - before).numpy(), np.asarray(q["w"] - old["w"])
      largest = [
        max(a, np.abs(b).max() / rate)
        for a, b in zip(largest, moves, strict=True)
      ]
  return largest, p.detach().numpy(), np.asarray(q["w"])


def test_adam_takes_the_same_path(peer):
  """Evenly sized gradients, sixty steps, nothing set right in between."""
  (_, _), p, q = run(True, False)
  assert np.linalg.norm(p - q) < 0.01 * np.linalg.norm(p)


def test_a_second_moment_of_zero(peer):
  """The wheel's own scheme, by its own search: steps of a hundred rates.

  By its bins, which have no 0 to give, not.
  """
  (theirs, ours), *_ = run(True, True)
  assert theirs > 100 and ours > 100
  (theirs, _), *_ = run(False, True)
  assert theirs < 5
