"""Retrieval: whether a model says again what stands far back in its context."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

#: (row's tokens, generator, depth) -> (tokens, which are the answer).
Probe = Callable[..., tuple[np.ndarray, np.ndarray]]


def needle_scores(
  model: nn.Module,
  params: Any,
  rows: Int[np.ndarray, "r t"],
  probe: Probe,
  *,
  depths: Sequence[float],
  seed: int = 0,
  batch_size: int = 8,
) -> dict[str, float]:
  """Answers to needles at several depths of rows of held-out text.

  The likeliest next token is compared with the needle's, the answer's tokens
  before it being given.

  Args:
    model: returns (logits, aux), as a `Decoder` does.
    params: its parameters.
    rows: the hay.
    probe: hides a needle in a row and asks for it, such as
      `isthmus.data.needle.Needles().probe`, with `depth`.
    depths: in [0, 1], of which every row has each once.
    seed: of the needles.
    batch_size: rows at once.

  Returns:
    `whole`, the share of answers right in all of their tokens; `whole/D`, of
    depth D; `tokens`, the share of the answers' tokens.

  Raises:
    ValueError: no rows or depths.

  Example:
    >>> from isthmus.data.needle import Needles
    >>> from isthmus.nets.transformer import Decoder
    >>> model = Decoder(vocab_size=257, width=8, depth=1, num_heads=2)
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 2), int))["params"]
    >>> hay, probe = np.full((2, 80), 97), Needles(pairs=1).probe
    >>> scores = needle_scores(model, params, hay, probe, depths=(0.0, 1.0))
    >>> list(scores), scores["whole"]  # untrained
    (['whole/0', 'whole/1', 'whole', 'tokens'], 0.0)
  """
  if not len(rows) or not depths:
    raise ValueError(f"{len(rows)} rows, {len(depths)} depths: at least 1 each")
  rng = np.random.default_rng(seed)
  whole: dict[str, float] = {}
  right = asked = 0
  for depth in depths:
    pairs = [probe(row, rng, depth=depth) for row in rows]
    tokens, answer = (np.stack(x) for x in zip(*pairs, strict=True))
    hits = 0
    for start in range(0, len(rows), batch_size):
      at = slice(start, start + batch_size)
      some, mask = tokens[at], answer[at]
      short = batch_size - len(some)  # the last batch has the shape of others
      some, mask = (np.pad(x, ((0, short), (0, 0))) for x in (some, mask))
      wrong = np.asarray(
        _wrong(model, params, jnp.asarray(some), jnp.asarray(mask))
      )[: batch_size - short]
      hits += int((wrong == 0).sum())
      right += int(mask.sum() - wrong.sum())
      asked += int(mask.sum())
    whole[f"whole/{depth:g}"] = hits / len(rows)
  mean = sum(whole.values()) / len(whole)
  return {**whole, "whole": mean, "tokens": right / asked}


@functools.partial(jax.jit, static_argnums=0)
def _wrong(
  model: nn.Module,
  params: Any,
  tokens: Int[Array, "b t"],
  answer: Bool[Array, "b t"],
) -> Int[Array, "b"]:
  """Tokens of each answer that are not the likeliest."""
  logits, _ = model.apply({"params": params}, tokens[:, :-1])
  said = jnp.argmax(logits, axis=-1)
  return jnp.sum((said != tokens[:, 1:]) & answer[:, 1:], axis=1)
