"""Which states are coded, and along which axis."""

import jax
import jax.numpy as jnp
import pytest

from isthmus.nets.transformer import Decoder
from isthmus.pallas.quant8.maps import SIGNED
from isthmus.train.mesh import P, path_name
from isthmus.train.optim.codes import Codes, tensors

pytestmark = pytest.mark.once

RULES = (
  ("row$", P("fsdp", None)),
  ("col$", P(None, "fsdp")),
  ("both$", P("fsdp", "model")),
)


@pytest.mark.parametrize(
  "name, shape, axis",
  [
    ("free", (512, 512), -1),
    ("free", (512, 64), -2),
    ("free", (64, 128), -1),
    ("free", (8, 512, 16), -2),
    ("row", (512, 512), -1),
    ("row", (512, 64), -1),
    ("col", (512, 512), -2),
    ("col", (64, 512), -2),
    ("col", (4, 512, 512), -2),
    ("both", (512, 512), -1),
  ],
)
def test_blocks_lie_along_axes_that_are_whole(name, shape, axis):
  assert Codes(rules=RULES).blocks(name, shape).axis == axis


def test_blocks_that_devices_would_cut_are_refused():
  with pytest.raises(ValueError, match="blocks of 256 don't fit 640"):
    Codes(rules=RULES).blocks("both", (512, 640))
  assert Codes(rules=RULES, block=128).blocks("both", (512, 640)).axis == -1


def test_what_is_kept_whole():
  params = {
    "embed": {"embedding": jnp.ones((512, 64))},
    "head": {"kernel": jnp.ones((64, 512))},
    "norm": {"scale": jnp.ones(64)},
  }

  def coded(codes):
    return [n for n, b in codes.plan(params) if b is not None]

  assert coded(Codes()) == ["head/kernel"]
  assert coded(Codes(whole=None)) == ["embed/embedding", "head/kernel"]
  assert coded(Codes(min_size=64)) == ["head/kernel", "norm/scale"]
  assert coded(Codes(min_size=2**20)) == []
  mask = {"embed": {"embedding": True}, "head": {"kernel": False}}
  mask["norm"] = {"scale": True}
  assert coded(Codes(mask=mask)) == []
  every = lambda params: jax.tree.map(lambda p: p.ndim == 2, params)
  assert coded(Codes(mask=every, whole=None, min_size=0)) == [
    "embed/embedding",
    "head/kernel",
  ]


def test_paths_end_as_those_of_parameters():
  params = {"a": {"kernel": jnp.ones((64, 128))}, "b": {"bias": jnp.ones(3)}}
  moment = Codes().zeros(params, SIGNED)
  names = [path_name(p) for p, _ in jax.tree.leaves_with_path(moment)]
  assert names == ["codes/a/kernel", "codes/b/bias", "absmax/a/kernel"]
  assert moment.codes["b"]["bias"].dtype == jnp.float32
  tree, plan = jax.tree.structure(params), Codes().plan(params)
  first, second = tensors(moment, tree, plan, SIGNED)
  assert first.blocks.scales == (64, 1) and second.shape == (3,)


@pytest.mark.parametrize(
  "how, said",
  [
    ({"block": 3}, "power of two"),
    ({"min_size": -1}, "min_size is -1"),
    ({"flat": True, "rules": RULES}, "flat blocks can't be divided"),
  ],
)
def test_what_is_refused(how, said):
  with pytest.raises(ValueError, match=said):
    Codes(**how)


def test_a_stable_embedding_has_a_state_of_32_bits():
  model = Decoder(
    vocab_size=64, width=32, depth=1, num_heads=2, stable_embedding=True
  )
  params = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
  )["params"]
  plan = dict(Codes(min_size=0).plan(params))
  whole = {name for name, blocks in plan.items() if blocks is None}
  assert whole == {
    "embed/embedding", "embed_norm/scale", "embed_norm/bias"
  }  # fmt: skip
  coded = dict(Codes(min_size=0, whole=None).plan(params))
  assert all(blocks is not None for blocks in coded.values())
