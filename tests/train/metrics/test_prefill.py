"""What is gauged is what is read; figures of models that are known."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.bench.ways import kept_mass, way
from isthmus.attention.module import Attention
from isthmus.data.recall import Facts
from isthmus.data.tokenizer import Bytes
from isthmus.nets.transformer import Decoder
from isthmus.train.metrics.prefill import gauged, measure, read


def chosen(name, level, *, block, length, queries=0):
  found = way(name, level, block=block, length=length)
  return functools.partial(gauged, way=found, queries=queries)


@pytest.mark.parametrize("name", ["mass", "pbs"])
def test_the_share_is_of_the_layers_own_queries_and_keys(name):
  attend = chosen(name, 0.6, block=8, length=64, queries=5)
  found = attend.keywords["way"]
  layer = Attention(4, 2, head_dim=8, attend=attend)
  x = 3 * jax.random.normal(jax.random.key(0), (2, 64, 16))
  params = layer.init(jax.random.key(1), x)["params"]
  (y, _), gauges = layer.apply({"params": params}, x, mutable=["gauge"])
  kept, mass = jax.tree.leaves(gauges)
  q = (x @ params["q"]["kernel"]).reshape(2, 64, 4, 8)
  k = (x @ params["k"]["kernel"]).reshape(2, 64, 2, 8)
  full, partial = found.select(q, k).to_blocks()
  counts = np.asarray(full | partial).sum((2, 3))
  assert np.ptp(counts) > 0
  np.testing.assert_allclose(kept, counts.mean() / 36, rtol=1e-6)
  want = kept_mass(
    q,
    k,
    found.select(q, k),
    found.order and found.order(q, k),
    queries=jnp.array([0, 15, 31, 47, 63]),
  )
  np.testing.assert_allclose(mass, want.mean(), rtol=1e-6)
  assert 0.5 < mass < 0.99
  # The gauge is beside the values; without its collection it is silent.
  plain = layer.clone(attend=found.attend)
  np.testing.assert_array_equal(y, plain.apply({"params": params}, x)[0])
  np.testing.assert_array_equal(y, layer.apply({"params": params}, x)[0])


@pytest.mark.parametrize("scan", [True, False])
def test_the_share_is_the_mean_over_layers(scan):
  attend = chosen("window", 0.1, block=4, length=16)
  model = Decoder(
    vocab_size=11, width=16, depth=3, num_heads=2, scan=scan, attend=attend
  )
  tokens = jax.random.randint(jax.random.key(0), (2, 17), 0, 11)
  params = model.init(jax.random.key(1), tokens[:, :-1])["params"]
  _, found = model.apply({"params": params}, tokens[:, :-1], mutable=["gauge"])
  assert sum(x.size for x in jax.tree.leaves(found)) == 3
  loss, said, gauges = read(model, params, tokens)
  # The diagonal, the ones before it, and the first.
  np.testing.assert_allclose(gauges["kept"], 0.9, rtol=1e-6)
  assert gauges["mass"] == 1.0
  logits, _ = model.apply({"params": params}, tokens[:, :-1])
  np.testing.assert_array_equal(said, logits.argmax(-1))
  p = jax.nn.log_softmax(logits)
  want = -jnp.take_along_axis(p, tokens[:, 1:, None], axis=-1)[..., 0]
  np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)
  dense = read(model.clone(attend=Decoder.attend), params, tokens)
  assert dense[2]["kept"] == 1 and np.abs(dense[0] - loss).max() > 1e-3


class Told(nn.Module):
  """Says the next token of the rows among its parameters that it is given."""

  @nn.compact
  def __call__(self, tokens):
    rows = self.variables["params"]["rows"]
    which = jnp.all(rows[:, :1] == tokens[0, :1], axis=1).argmax()
    logits = 20.0 * jax.nn.one_hot(rows[which][None, 1:], 257)
    return logits, {}


def test_figures_of_a_model_that_is_told_the_answers():
  hay = np.full(200, 97, np.int32)
  hay[0] = 98
  row, mark = Facts(Bytes(), count=2)(hay, np.random.default_rng(0))
  text = np.full((1, 200), 99, np.int32)
  weights = np.ones((1, 199), np.float32)
  weights[0, :99] = 0
  arguments = text, weights, row[None], mark[None]

  def figures(text, row, dense=None):
    params = {"rows": jnp.asarray([text, row])}
    return measure(Told(), params, *arguments, dense)

  said, right = figures(text[0], row)
  assert (said == 99).all()
  assert right["kept"] == right["mass"] == right["agreement"] == 1.0
  assert right["digits"] == right["recall"] == 1.0
  assert right["perplexity"] == pytest.approx(1.0, abs=1e-5)
  # One digit wrong of ten, and a word that isn't asked for.
  wrong = row.copy()
  wrong[np.flatnonzero(mark == 2)[1]] = 65
  wrong[np.flatnonzero(mark == 2)[0] - 1] = 65
  # Of the text 10 tokens that count, and 10 that don't, are others.
  other = text[0].copy()
  other[[*range(50, 60), *range(150, 160)]] = 65
  _, found = figures(other, wrong, said)
  assert found["digits"] == pytest.approx(0.9) and found["recall"] == 0.5
  assert found["agreement"] == pytest.approx(0.9)
  assert found["perplexity"] == pytest.approx(np.exp(2.0), rel=1e-3)
