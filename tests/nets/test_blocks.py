"""Every block in the common suite; a new block is one entry."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from isthmus.attention import attention, moba
from isthmus.nets import (
  Attention,
  Block,
  Decoder,
  GatedMlp,
  HourglassMlp,
  MBConv,
  Mlp,
  MlpBlock,
  ResidualMlp,
  RMSNorm,
  SqueezeExcite,
  Stack,
)
from isthmus.nets.dit import DiT
from isthmus.nets.lm.hybrid import HybridDecoder, Layer, take_turns
from isthmus.nets.vision.vit import ViT
from isthmus.train.mesh import P
from tests.nets import suite
from tests.nets.suite import Entry

MLP = (
  (r"(gate|up)/kernel$", P(None, "model")),
  (r"down/kernel$", P("model", None)),
)
ATTENTION = (
  (r"(q|k|v)/kernel$", P(None, "model")),
  (r"o/kernel$", P("model", None)),
)
CONV = (
  (r"(expand|depthwise)/kernel$", P("model")),
  (r"project/kernel$", P("model", None)),
)


def _attention(dtype):
  return Attention(4, 2, 8, dtype=dtype, parent=None)


def _block(dtype, dropout=0.0):
  mlp = GatedMlp(48, dtype=dtype, parent=None)
  return Block(_attention(dtype), mlp, dropout=dropout, parent=None)


def _stack(dtype, dropout=0.0):
  return Stack(_block(dtype, dropout), 2)


def _decoder(dtype, dropout=0.0):
  return Decoder(
    vocab_size=40,
    width=32,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    scan=False,
    dtype=dtype,
    dropout=dropout,
  )


def _hybrid(dtype, dropout=0.0):
  local = Layer(functools.partial(attention, window=(3, 0)))
  # All three blocks: a choice between them may change with a rounding.
  far = Layer(functools.partial(moba, block=2, top_k=3), rope=False, kconv=3)
  return HybridDecoder(
    vocab_size=40,
    width=32,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    dtype=dtype,
    dropout=dropout,
    layers=take_turns(local, far, depth=2),
  )


def _vit(dtype, dropout=0.0):
  return ViT(
    classes=10,
    size=(4, 6),
    patch=2,
    width=32,
    depth=2,
    num_heads=4,
    scan=False,
    dtype=dtype,
    dropout=dropout,
  )


class AtTimes(nn.Module):
  """A DiT, each row at a time of its own."""

  net: nn.Module

  def __call__(self, x, *, train=False):
    rows = jnp.arange(len(x))
    return self.net(x, rows / len(x), rows % 3, train=train)


def _dit(dtype):
  return AtTimes(
    DiT(
      size=(4, 6),
      patch=2,
      width=32,
      depth=2,
      num_heads=4,
      classes=3,
      scan=False,
      dtype=dtype,
    )
  )


def _pictures(key):
  return jax.random.normal(key, (8, 4, 6, 3))


def _tokens(key):
  return jax.random.randint(key, (8, 6), 0, 40)


def _images(key):
  return jax.random.normal(key, (8, 5, 6, 8))


def _volumes(key):
  return jax.random.normal(key, (8, 3, 4, 3, 8))


BLOCKS = [
  Entry(name="rms_norm", build=lambda dtype: RMSNorm(), train=False),
  Entry(name="mlp", build=lambda dtype: Mlp(48, dtype=dtype), rules=MLP),
  Entry(
    name="gated_mlp",
    build=lambda dtype: GatedMlp(48, dtype=dtype),
    rules=MLP,
  ),
  Entry(
    name="mlp_block",
    build=lambda dtype: MlpBlock(48, dtype=dtype),
    rules=MLP,
  ),
  Entry(
    name="residual_mlp",
    build=lambda dtype: ResidualMlp(48, 2, dtype=dtype),
    rules=MLP,
  ),
  Entry(
    name="hourglass_mlp",
    build=lambda dtype: HourglassMlp(64, 8, 2, dtype=dtype),
    rules=MLP,
  ),
  Entry(
    name="mbconv",
    build=lambda dtype: MBConv(se_ratio=0.25, residual=True, dtype=dtype),
    inputs=_volumes,
    rules=CONV,
  ),
  Entry(
    name="fused_mbconv",
    build=lambda dtype: MBConv(12, fused=True, strides=2, dtype=dtype),
    inputs=_images,
    output=(8, 3, 3, 12),
    rules=CONV[1:],
  ),
  Entry(
    name="squeeze_excite",
    build=lambda dtype: SqueezeExcite(4, dtype=dtype),
    inputs=_images,
  ),
  Entry(name="attention", build=_attention, rules=ATTENTION),
  Entry(name="block", build=_block, rules=ATTENTION + MLP, dropout=True),
  Entry(
    name="stack",
    build=_stack,
    rules=ATTENTION + MLP,
    dropout=True,
  ),
  Entry(
    name="decoder",
    build=_decoder,
    inputs=_tokens,
    output=(8, 6, 40),
    wide=True,
    rules=ATTENTION + MLP,
    dropout=True,
  ),
  Entry(
    name="hybrid_decoder",
    build=_hybrid,
    inputs=_tokens,
    output=(8, 6, 40),
    wide=True,
    rules=ATTENTION + MLP,
    dropout=True,
  ),
  Entry(
    name="vit",
    build=_vit,
    inputs=_pictures,
    output=(8, 10),
    wide=True,
    rules=ATTENTION + MLP,
    dropout=True,
  ),
  Entry(
    name="dit",
    build=_dit,
    inputs=_pictures,
    output=(8, 4, 6, 3),
    wide=True,
    rules=ATTENTION + MLP,
  ),
]


@pytest.mark.parametrize("assertion", suite.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.name)
def test_block(block, assertion):
  assertion(block)
