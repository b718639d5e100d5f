"""What is captured is what layers attend with; regrouping keeps logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.data.library import PythonLibrary
from isthmus.data.tokenizer import Bytes
from isthmus.nets.norm import rms_norm
from isthmus.nets.rotary import rope, rotation
from isthmus.nets.transformer import Decoder
from isthmus.train.metrics.capture import (
  capture,
  extended,
  long_text,
  regrouped,
)

pytestmark = pytest.mark.once

MODEL = Decoder(vocab_size=257, width=24, depth=3, num_heads=6, num_kv_heads=2)


@pytest.fixture(scope="module")
def read():
  tokens = long_text(PythonLibrary(), Bytes(), 40)
  params = MODEL.init(jax.random.key(0), jnp.asarray(tokens))["params"]
  return tokens, params, capture(MODEL, params, tokens, (2, 0))


def test_layers_are_in_the_order_asked_for(read):
  tokens, params, (q, k, v) = read
  assert q.shape == (2, 1, 40, 6, 4) and k.shape == v.shape == (2, 1, 40, 2, 4)
  block = jax.tree.map(lambda x: x[0], params["stack"]["blocks"])
  x = params["embed"]["embedding"][tokens]
  x = rms_norm(x, block["norm_attn"]["scale"], 1e-6)
  turn = rotation(jnp.arange(40)[None], head_dim=4)
  for found, name, heads in ((q, "q", 6), (k, "k", 2)):
    want = (x @ block["attn"][name]["kernel"]).reshape(1, 40, heads, 4)
    np.testing.assert_allclose(found[1], rope(want, turn), atol=1e-5)
  want = (x @ block["attn"]["v"]["kernel"]).reshape(1, 40, 2, 4)
  np.testing.assert_allclose(v[1], want, atol=1e-5)
  assert np.abs(q[0] - q[1]).max() > 0.1
  # A model that ends earlier has the same.
  one = capture(MODEL, params, tokens, (0,))
  np.testing.assert_allclose(one[0][0], q[1], atol=1e-5)


def test_logits_stay_in_other_heads(read):
  q, k, v = read[2]
  sizes = {"heads": 12, "kv_heads": 3, "width": 8, "dtype": jnp.float32}
  wide_q, wide_k, wide_v = regrouped(q, k, v, **sizes)
  assert wide_q.shape == (1, 40, 12, 8) and wide_v.shape == (1, 40, 3, 8)
  # (layer, kv head) of each kv head, and three query heads, the first twice.
  for head, (layer, own) in enumerate([(0, 0), (0, 1), (1, 0)]):
    for i, query in enumerate((0, 1, 2, 0)):
      x = q[layer, 0, :, 3 * own + query] @ k[layer, 0, :, own].T * 4**-0.5
      y = wide_q[0, :, 4 * head + i] @ wide_k[0, :, head].T * 8**-0.5
      np.testing.assert_allclose(y, x, atol=1e-5)
  assert (np.abs(wide_k) > 1e-6).mean() > 0.95
  same = regrouped(q, k, v, heads=6, kv_heads=2, width=4, dtype=jnp.float32)
  np.testing.assert_array_equal(same[0], q[0])


def test_positions_are_stretched_at_the_slow_end_alone():
  model = dataclasses.replace(MODEL, head_dim=8)
  slow = extended(model, 1024, context=256)
  pairs = np.arange(0, 8, 2) / 8
  before, after = (m.rope_theta**-pairs for m in (model, slow))
  np.testing.assert_allclose(after[0], before[0])
  np.testing.assert_allclose(after[-1], before[-1] / 4)
  assert extended(model, 100, context=256).rope_theta == model.rope_theta


@pytest.mark.parametrize(
  "sizes, words",
  [
    ({"heads": 5, "kv_heads": 2, "width": 8}, "5 heads don't split"),
    ({"heads": 10, "kv_heads": 5, "width": 8}, "2 layers have 4"),
    ({"heads": 4, "kv_heads": 2, "width": 2}, "below the model's 4"),
  ],
)
def test_refused(read, sizes, words):
  tokens, params, arrays = read
  with pytest.raises(ValueError, match=words):
    regrouped(*arrays, **sizes)
  with pytest.raises(ValueError, match="of a model of 3"):
    capture(MODEL, params, tokens, (3,))
  with pytest.raises(ValueError, match="scan is False"):
    capture(MODEL.clone(scan=False), params, tokens, (0,))
  with pytest.raises(ValueError, match="tokens are wanted"):
    long_text(PythonLibrary(), Bytes(), 10**9)
