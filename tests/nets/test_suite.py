"""The suite of blocks can fail: a broken block for each of its checks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.train.mesh import P
from tests.nets import suite
from tests.nets.suite import Entry


class Broken(nn.Module):
  """`x + x W`, and one defect.

  Attributes:
    defect: which.
    dtype: what is multiplied.
    dropout: rate.
  """

  defect: str = "none"
  dtype: jnp.dtype = jnp.float32
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, *, train=False):
    stored = self.dtype if self.defect == "narrow parameters" else jnp.float32
    init = nn.initializers.normal(0.2)
    w = self.param("kernel", init, (x.shape[-1], x.shape[-1]), stored)
    y = self._damage(x @ w.astype(x.dtype))
    if self.dropout:
      off = not (train or self.defect == "dropout in evaluation")
      key = None
      if self.defect == "dropout of one key":
        key = jax.random.key(0)
      if not off and key is None:
        key = self.make_rng("dropout") if train else jax.random.key(1)
      y = nn.Dropout(self.dropout)(y, deterministic=off, rng=key)
    y = x + y
    return y[:, :1] if self.defect == "one token" else y

  def _damage(self, y):
    if self.defect == "float32 result":
      return y.astype(jnp.float32)
    if self.defect == "dead parameter":
      return y + 0 * self.param("dead", nn.initializers.ones, (1,))
    if self.defect == "infinite gradient":
      return y + jnp.sqrt(jnp.abs(y - jax.lax.stop_gradient(y)))
    if self.defect == "new at each trace":
      return y * np.random.default_rng().uniform(0.5, 2)
    if self.defect == "own rule for vmap":
      return _crossed(y)
    if self.defect == "narrow statistics":
      return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1)
    if self.defect == "three digits":
      return jnp.round(y * 8) / 8 if y.dtype == jnp.bfloat16 else y
    if self.defect == "mesh":
      return y * (1 if jax.sharding.get_abstract_mesh().empty else 1.001)
    return y


@jax.custom_vjp
@jax.custom_batching.custom_vmap
def _crossed(y):
  return jnp.tanh(y)


@_crossed.fun.def_vmap
def _(size, batched, y):
  return jnp.tanh(y[::-1]), True


_crossed.defvjp(
  lambda y: (jnp.tanh(y), y), lambda y, dz: (dz * (1 - jnp.tanh(y) ** 2),)
)


def _entry(defect, **kwargs):
  def build(dtype, dropout=0.0):
    return Broken(defect, dtype=dtype, dropout=dropout)

  return Entry(name=defect, build=build, **kwargs)


@pytest.mark.parametrize("assertion", suite.CHECKS, ids=lambda c: c.__name__)
def test_the_sound_block_passes(assertion):
  rules = ((r"kernel$", P(None, "model")),)
  assertion(_entry("none", dropout=True, rules=rules))


@pytest.mark.parametrize(
  "defect, assertion, message",
  [
    (
      "one token",
      suite.assert_shape_and_dtype_are_kept,
      "of .8, 6, 32.",
    ),
    ("float32 result", suite.assert_shape_and_dtype_are_kept, "not bfloat16"),
    ("dead parameter", suite.assert_every_parameter_learns, "dead is dead"),
    ("infinite gradient", suite.assert_every_parameter_learns, "not finite"),
    ("new at each trace", suite.assert_jit_changes_nothing, "without jit"),
    ("own rule for vmap", suite.assert_vmap_is_a_loop, "under vmap"),
    ("new at each trace", suite.assert_remat_changes_nothing, "under remat"),
    ("narrow parameters", suite.assert_bfloat16_is_close, "is bfloat16"),
    ("narrow statistics", suite.assert_bfloat16_is_close, "rsqrt in bfloat16"),
    ("three digits", suite.assert_bfloat16_is_close, "bfloat16 is off"),
    (
      "dropout in evaluation",
      suite.assert_dropout_follows_its_key,
      "dropout in evaluation",
    ),
    (
      "dropout of one key",
      suite.assert_dropout_follows_its_key,
      "drops the same",
    ),
    ("mesh", suite.assert_devices_change_nothing, "on 8 devices"),
  ],
)
def test_a_broken_block_is_found(defect, assertion, message):
  entry = _entry(defect, dropout=defect.startswith("dropout"))
  with pytest.raises(AssertionError, match=message):
    assertion(entry)
