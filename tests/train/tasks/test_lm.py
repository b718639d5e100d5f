"""Next-token loss: weights, bits a byte, padding, segments."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.zigzag import zigzag
from isthmus.nets.transformer import Decoder
from isthmus.train.tasks.lm import NextToken, arrange, cross_entropy


class Bigram(nn.Module):
  """Logits that depend on the token, and on whether segments are given."""

  vocab_size: int = 5

  @nn.compact
  def __call__(self, tokens, *, segment_ids=None, train=False):
    size = self.vocab_size
    table = self.param("table", nn.initializers.normal(1.0), (size, size))
    logits = table[tokens]
    if segment_ids is not None:
      logits = logits * segment_ids[..., None]
    return logits, {}


def _batch():
  keys = jax.random.split(jax.random.key(0), 2)
  return {
    "tokens": jax.random.randint(keys[0], (3, 9), 0, 5),
    "segment_ids": jnp.full((3, 9), 2),
    "weights": jax.random.bernoulli(keys[1], 0.6, (3, 8)).astype(jnp.float32),
    "num_bytes": jnp.array([10, 20, 30]),
  }


def _by_hand(params, batch, rows, scale):
  tokens, weights = np.asarray(batch["tokens"]), np.asarray(batch["weights"])
  table = np.asarray(params["table"], np.float64) * scale
  total = count = 0.0
  for r in rows:
    for i in range(tokens.shape[1] - 1):
      row = table[tokens[r, i]]
      nats = np.log(np.exp(row).sum()) - row[tokens[r, i + 1]]
      total += weights[r, i] * nats
      count += weights[r, i]
  return total, count


@pytest.mark.parametrize("segments, scale", [(True, 2), (False, 1)])
def test_loss_by_hand(segments, scale):
  task, batch = NextToken(segments=segments), _batch()
  params = task.init(Bigram(), batch, jax.random.key(1))["params"]
  loss, aux = task.loss(Bigram(), params, {}, batch, jax.random.key(2))
  total, count = _by_hand(params, batch, range(3), scale)
  assert float(loss) == pytest.approx(total / count, rel=1e-5)
  assert float(aux.weight) == count


def test_bits_per_byte_leaves_padding_out():
  task = NextToken(segments=False)
  batch = {**_batch(), "valid": jnp.array([1.0, 0.0, 1.0])}
  params = task.init(Bigram(), batch, jax.random.key(1))["params"]
  sums = task.evaluate(Bigram(), params, {}, batch)
  result = task.summarize({k: float(v) for k, v in sums.items()})
  total, count = _by_hand(params, batch, (0, 2), 1)
  assert result["loss"] == pytest.approx(total / count, rel=1e-5)
  assert result["bits_per_byte"] == pytest.approx(
    total / (10 + 30) / math.log(2), rel=1e-5
  )


def test_z_loss_adds_the_square_of_the_normaliser():
  batch = _batch()
  params = NextToken().init(Bigram(), batch, jax.random.key(1))["params"]
  plain, _ = NextToken().loss(Bigram(), params, {}, batch, jax.random.key(0))
  both, aux = NextToken(z_loss=0.1).loss(
    Bigram(), params, {}, batch, jax.random.key(0)
  )
  logits = 2 * params["table"][batch["tokens"][:, :-1]]
  z = np.square(jax.nn.logsumexp(logits, axis=-1)) * batch["weights"]
  expected = float(0.1 * z.sum() / batch["weights"].sum())
  assert float(aux.metrics["z_loss"]) == pytest.approx(expected, rel=1e-5)
  assert float(both - plain) == pytest.approx(expected, rel=1e-4)


def test_cross_entropy_is_float32():
  logits = jnp.array([[[300.0, 0.0]]], jnp.bfloat16)
  nats = cross_entropy(logits, jnp.array([[1]]))
  assert nats.dtype == jnp.float32
  assert float(nats[0, 0]) == pytest.approx(300.0)


def test_throughput_uses_the_models_formula():
  class Counted(Bigram):
    def flops_per_token(self, seq_len):
      return 7.0 * seq_len

  shapes = {"weights": (4, 8), "tokens": (4, 9)}
  assert NextToken().throughput(Counted(), shapes) == ("tokens", 32, 32 * 56.0)
  assert math.isnan(NextToken().throughput(Bigram(), shapes)[2])


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_arranged_rows_hold_the_same(layout):
  """Each token beside its target, weight and document; the loss is the same."""
  batch = {k: np.asarray(v) for k, v in _batch().items()}
  made = arrange(batch, devices=2, layout=layout)
  turn = (lambda x: zigzag(x, 2)) if layout == "zigzag" else (lambda x: x)
  np.testing.assert_array_equal(made["tokens"], turn(batch["tokens"][:, :-1]))
  np.testing.assert_array_equal(made["targets"], turn(batch["tokens"][:, 1:]))
  np.testing.assert_array_equal(made["weights"], turn(batch["weights"]))
  assert made["num_bytes"] is batch["num_bytes"]
  task, key = NextToken(), jax.random.key(0)
  batch, made = (jax.tree.map(jnp.asarray, x) for x in (batch, made))
  params = task.init(Bigram(), made, key)["params"]  # of tokens one by one
  want, got = (
    task.loss(Bigram(), params, {}, x, key)[0] for x in (batch, made)
  )
  assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_rows_that_devices_do_not_divide():
  batch = {k: np.asarray(v) for k, v in _batch().items()}
  for layout, devices, parts in (("zigzag", 3, 6), ("contiguous", 3, 3)):
    words = f"mesh.seq is 3, and rows of 8 tokens are not a multiple of {parts}"
    with pytest.raises(ValueError, match=words):
      arrange(batch, devices=devices, layout=layout)


def test_only_known_models_are_divided():
  with pytest.raises(ValueError, match="model is a Bigram"):
    NextToken().divide(Bigram(), 2)
  model = Decoder(vocab_size=5, width=8, depth=1, num_heads=2)
  assert NextToken().divide(model, 2)(_batch())["targets"].shape == (3, 8)
