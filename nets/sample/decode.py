"""Sampling tokens one by one from a decoder with a KV cache."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from isthmus.attention.mask import EMPTY


def generate(
  model: nn.Module,
  params: Any,
  prompt: Int[Array, "b t"],
  *,
  length: int,
  key: PRNGKeyArray,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  prompt_lengths: Int[Array, "b"] | None = None,
  stop: int | None = None,
) -> Int[Array, "b {length}"]:
  """Continues each prompt by `length` tokens.

  One forward pass over the prompts fills the cache, then a scan draws a token
  a step from `softmax(logits / temperature)`, cut by `filter_logits`. All of
  it is one jitted function: equal shapes and static settings (model, length,
  top_k, stop, whether temperature is 0, whether top_p is given) are compiled
  once.

  Args:
    model: a `Decoder`, or what has its `__call__`, `project`, `init_cache`.
    params: the model's parameters (without the outer `params`).
    prompt: ids; at least one column.
    length: tokens to draw, at least 1.
    key: typed key; equal keys draw equal tokens.
    temperature: 0 takes the likeliest token.
    top_k: draw among the k likeliest only.
    top_p: draw among the fewest likeliest whose share reaches p, after top_k.
    prompt_lengths: tokens that count in each row, from the left, at least 1;
      the rest is padding. Default: all.
    stop: a token after which a row repeats it.

  Returns:
    The new tokens.

  Raises:
    ValueError: a setting outside its range.

  Example:
    >>> from isthmus.nets.transformer import Decoder
    >>> model = Decoder(vocab_size=16, width=8, depth=1, num_heads=2)
    >>> prompt = jnp.array([[3, 1, 4]])
    >>> params = model.init(jax.random.key(0), prompt)["params"]
    >>> key = jax.random.key(1)
    >>> generate(model, params, prompt, length=5, key=key).shape
    (1, 5)
  """
  if length < 1:
    raise ValueError(f"length is {length}; it is at least 1")
  if prompt.shape[1] < 1:
    raise ValueError("the prompt has no tokens")
  if not temperature >= 0:
    raise ValueError(f"temperature is {temperature}; it is at least 0")
  if top_k is not None and top_k < 1:
    raise ValueError(f"top_k is {top_k}; it is at least 1")
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f"top_p is {top_p}, not in (0, 1]")
  if prompt_lengths is not None and prompt_lengths.shape != prompt.shape[:1]:
    raise ValueError(
      f"prompt_lengths {prompt_lengths.shape} for {prompt.shape[0]} prompts"
    )
  return _generate(
    model,
    params,
    prompt.astype(jnp.int32),
    key,
    jnp.asarray(temperature, jnp.float32),
    None if top_p is None else jnp.asarray(top_p, jnp.float32),
    prompt_lengths,
    length=length,
    greedy=temperature == 0,
    top_k=top_k,
    stop=stop,
  )


def filter_logits(
  logits: Float[Array, "b v"],
  *,
  top_k: int | None = None,
  top_p: float | Float[Array, ""] | None = None,
) -> Float[Array, "b v"]:
  """-inf for tokens that are not to be drawn.

  Args:
    logits: unnormalised log-probabilities.
    top_k: keeps the k largest (of equal ones the first).
    top_p: of these, keeps the fewest of the largest whose share of their
      probability is at least p; always one.

  Example:
    >>> filter_logits(jnp.array([[3.0, 1.0, 2.0]]), top_k=2).tolist()
    [[3.0, -inf, 2.0]]

  Reference: https://arxiv.org/abs/1904.09751 (top_p)
  """
  if top_k is None and top_p is None:
    return logits
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  keep = jnp.ones(logits.shape, bool)
  if top_k is not None:
    keep = keep & (jnp.arange(logits.shape[-1]) < top_k)[None]
    ranked = jnp.where(keep, ranked, -jnp.inf)
  if top_p is not None:
    share = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    first = jnp.arange(logits.shape[-1]) == 0
    keep = keep & ((before < top_p) | first[None])
  rank = jnp.argsort(order, axis=-1)
  return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), logits, -jnp.inf)


@functools.partial(
  jax.jit, static_argnames=("model", "length", "greedy", "top_k", "stop")
)
def _generate(
  model,
  params,
  prompt,
  key,
  temperature,
  top_p,
  prompt_lengths,
  *,
  length,
  greedy,
  top_k,
  stop,
):
  variables = {"params": params}
  b, t = prompt.shape
  column = jnp.arange(t, dtype=jnp.int32)[None]
  if prompt_lengths is None:
    ends, positions = jnp.full((b,), t, jnp.int32), column
  else:
    ends = prompt_lengths.astype(jnp.int32)
    positions = jnp.where(column < ends[:, None], column, EMPTY)

  def draw(logits, key):
    if greedy:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)

  def halt(token, done):
    if stop is None:
      return token, done
    token = jnp.where(done, stop, token)
    return token, token == stop

  # ---- the prompts: only the last token of each needs logits
  # The last token drawn is never read, so it needs no slot.
  cache = model.init_cache(batch=b, capacity=t + length - 1)
  _, aux = model.apply(variables, prompt, positions=positions, cache=cache)
  last = jnp.take_along_axis(aux["hidden"], ends[:, None, None] - 1, axis=1)
  logits = model.apply(variables, last, method="project")
  keys = jax.random.split(key, length)
  token, done = halt(draw(logits[:, 0], keys[0]), jnp.zeros((b,), bool))

  # ---- one token a step
  def step(carry, key):
    token, done, position, cache = carry
    logits, aux = model.apply(
      variables, token[:, None], positions=position[:, None], cache=cache
    )
    new, done = halt(draw(logits[:, 0], key), done)
    return (new, done, position + 1, aux["cache"]), new

  _, rest = jax.lax.scan(step, (token, done, ends, aux["cache"]), keys[1:])
  return jnp.concatenate([token[:, None], rest.T], axis=1)
