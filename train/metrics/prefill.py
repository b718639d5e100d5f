"""What a model reads, and how well, with its attention replaced."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from isthmus.attention.bench.ways import Way, kept_mass, kept_share


class Gauge(nn.Module):
  """Keeps numbers in the collection `gauge`, a layer's in a stack's.

  Example:
    >>> _, found = Gauge().apply({}, kept=jnp.float32(0.5), mutable=["gauge"])
    >>> [float(x) for x in jax.tree.leaves(found)]
    [0.5]
  """

  @nn.compact
  def __call__(self, **numbers: Any) -> None:
    for name, x in numbers.items():
      self.sow("gauge", name, x)


def gauged(
  q: Float[Array, "b t n d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k dv"],
  *,
  way: Way,
  queries: int = 0,
  **others: Any,
) -> Any:
  """A layer's mechanism, with a gauge of what it reads.

  For use as `attend` of a module, whose submodule the gauge becomes. It has
  `kept`, the share of causal blocks (`kept_share`), and `mass`, the share of
  the dense softmax within them, of some queries (`kept_mass`). Compiled, a
  mask that the way computes too is computed once: XLA merges what is equal.

  Args:
    q, k, v: of self-attention.
    way: to choose blocks.
    queries: how many of a row's have their mass counted, at even distances;
      0 for no `mass`.
    **others: to the way's mechanism.

  Example:
    >>> from isthmus.attention.bench.ways import way
    >>> from isthmus.attention.module import Attention
    >>> chosen = way("window", 0.25, block=4, length=16)
    >>> attend = functools.partial(gauged, way=chosen)
    >>> layer = Attention(2, 2, head_dim=4, attend=attend)
    >>> _, found = layer.init_with_output(
    ...   jax.random.key(0), jnp.ones((1, 16, 8))
    ... )
    >>> [round(float(x), 6) for x in jax.tree.leaves(found["gauge"])]  # 9 of 10
    [0.9]
  """
  mask = way.select(q, k)
  numbers = {"kept": kept_share(mask)}
  if queries:
    order = None if way.order is None else way.order(q, k)
    t = q.shape[1]
    places = np.linspace(0, t - 1, min(queries, t)).astype(np.int32)
    mass = kept_mass(q, k, mask, order, queries=jnp.asarray(places))
    numbers["mass"] = jnp.mean(mass)
  Gauge(name="gauge")(**numbers)
  return way.attend(q, k, v, **others)


@functools.partial(jax.jit, static_argnums=0)
def read(model: nn.Module, params: Any, tokens: Int[Array, "b t"]) -> Any:
  """Of each target the loss, of each place the likeliest; and the gauges.

  Args:
    model: whose mechanism may be `gauged`.
    params: its parameters.
    tokens: inputs, and the last target.

  Returns:
    (loss [b t-1], likeliest [b t-1], gauges), these being the means over
    layers of `kept` and `mass`; 1 without a gauge.

  Example:
    >>> from isthmus.nets.transformer import Decoder
    >>> model = Decoder(vocab_size=257, width=8, depth=1, num_heads=2)
    >>> tokens = jnp.ones((1, 5), int)
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> loss, said, gauges = read(model, params, tokens)
    >>> loss.shape, said.shape, float(gauges["kept"])
    ((1, 4), (1, 4), 1.0)
  """
  (logits, _), found = model.apply(
    {"params": params}, tokens[:, :-1], mutable=["gauge"]
  )
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
  gauges = {}
  for name in ("kept", "mass"):
    each = [
      jnp.mean(x)
      for path, x in jax.tree.leaves_with_path(found)
      if jax.tree_util.DictKey(name) in path
    ]
    gauges[name] = jnp.mean(jnp.stack(each)) if each else jnp.float32(1)
  return loss, jnp.argmax(logits, axis=-1), gauges


def measure(
  model: nn.Module,
  params: Any,
  text: Int[np.ndarray, "r t"],
  weights: Float[np.ndarray, "r u"],
  hidden: Int[np.ndarray, "f t"],
  marks: Int[np.ndarray, "f t"],
  dense: Int[np.ndarray, "r u"] | None = None,
) -> tuple[Int[np.ndarray, "r u"], dict[str, float]]:
  """How well a model reads text and recalls facts, a row at a time.

  Args:
    model: whose mechanism may be `gauged`.
    params: its parameters.
    text: rows, the last token of which is a target alone; u = t - 1.
    weights: of their targets.
    hidden: rows with facts, as `isthmus.data.recall.Facts` makes them.
    marks: where their answers are.
    dense: the dense model's likeliest tokens; None if this is the one.

  Returns:
    (likeliest tokens of the text, figures): `kept`, the share of causal blocks
    read, over layers, heads and rows of text; `mass`, of the dense softmax
    within them, if it is gauged; `perplexity`; `agreement`, the
    share of likeliest tokens that are the dense model's; `digits`, the share of
    the answers' tokens that are the likeliest, those before them being given;
    `recall`, of answers right in all tokens, as greedy decoding by the same
    attention would get them.

  Example:
    >>> from isthmus.data.recall import Facts
    >>> from isthmus.data.tokenizer import Bytes
    >>> from isthmus.nets.transformer import Decoder
    >>> model = Decoder(vocab_size=257, width=8, depth=1, num_heads=2)
    >>> text = np.full((1, 97), 97, np.int32)
    >>> params = model.init(jax.random.key(0), jnp.asarray(text))["params"]
    >>> row, mark = Facts(Bytes(), count=1)(text[0], np.random.default_rng(0))
    >>> weights = np.ones((1, 96), np.float32)
    >>> said, figures = measure(
    ...   model, params, text, weights, row[None], mark[None]
    ... )
    >>> {k: figures[k] for k in ("kept", "agreement", "recall")}  # untrained
    {'kept': 1.0, 'agreement': 1.0, 'recall': 0.0}
  """
  rows = [read(model, params, row[None]) for row in text]
  loss, said = (np.concatenate([r[i] for r in rows]) for i in range(2))
  dense = said if dense is None else dense
  right: list[Any] = []
  whole: list[Any] = []
  for row, mark in zip(hidden, marks, strict=True):
    hits = np.asarray(read(model, params, row[None])[1])[0] == row[1:]
    answers = [hits[mark[1:] == i] for i in range(1, mark.max() + 1)]
    right += [np.concatenate(answers).mean()]
    whole += [answer.all() for answer in answers]
  return said, {
    "kept": float(np.mean([r[2]["kept"] for r in rows])),
    "mass": float(np.mean([r[2]["mass"] for r in rows])),
    "perplexity": float(np.exp((loss * weights).sum() / weights.sum())),
    "agreement": float(((said == dense) * weights).sum() / weights.sum()),
    "digits": float(np.mean(right)),
    "recall": float(np.mean(whole)),
  }
