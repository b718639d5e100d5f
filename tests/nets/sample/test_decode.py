"""Sampling: against forward passes of the whole, and against its own rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import attention
from isthmus.nets import Decoder
from isthmus.nets.sample.decode import filter_logits, generate

PROMPT = jax.random.randint(jax.random.key(1), (3, 5), 0, 24)
KEY = jax.random.key(0)


@functools.cache
def shared():
  model = Decoder(vocab_size=24, width=32, depth=2, num_heads=4, num_kv_heads=2)
  params = model.init(jax.random.key(0), PROMPT)["params"]
  # Larger weights, so that the likeliest token depends on the context.
  return model, jax.tree.map(lambda x: 4 * x, params)


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, tokens):
  return model.apply({"params": params}, tokens)[0]


def greedy(model, params, prompt, length):
  """argmax by whole forward passes."""
  t = prompt.shape[1]
  tokens = jnp.pad(prompt, ((0, 0), (0, 12 - t)))  # later tokens aren't seen
  for i in range(t, t + length):
    new = jnp.argmax(whole(model, params, tokens)[:, i - 1], axis=-1)
    tokens = tokens.at[:, i].set(new)
  return tokens[:, t : t + length]


def test_greedy_is_the_argmax_of_whole_passes():
  model, params = shared()
  out = generate(model, params, PROMPT, length=6, key=KEY, temperature=0)
  expected = greedy(model, params, PROMPT, 6)
  np.testing.assert_array_equal(out, expected)
  assert len(np.unique(expected)) > 3


def test_top_k_1_is_greedy():
  model, params = shared()
  out = generate(model, params, PROMPT, length=6, key=KEY, top_k=1)
  np.testing.assert_array_equal(out, greedy(model, params, PROMPT, 6))
  free = generate(model, params, PROMPT, length=6, key=KEY, temperature=3.0)
  assert (free != out).any()


def test_ragged_prompts_equal_prompts_alone():
  model, params = shared()
  lengths = jnp.asarray([2, 5, 3])
  run = functools.partial(
    generate, model, params, length=4, key=KEY, temperature=0
  )
  out = run(PROMPT, prompt_lengths=lengths)
  for row, n in enumerate(lengths.tolist()):
    alone = jnp.broadcast_to(PROMPT[row, :n], (3, n))
    np.testing.assert_array_equal(out[row], greedy(model, params, alone, 4)[0])
  junk = jnp.where(jnp.arange(5) < lengths[:, None], PROMPT, 23)
  np.testing.assert_array_equal(out, run(junk, prompt_lengths=lengths))
  assert (out != run(PROMPT)).any()


def test_keys_decide():
  model, params = shared()
  run = functools.partial(generate, model, params, PROMPT, length=6)
  np.testing.assert_array_equal(run(key=KEY), run(key=KEY))
  assert (run(key=KEY) != run(key=jax.random.key(1))).any()
  out = run(key=KEY)
  assert out.shape == (3, 6) and out.dtype == jnp.int32


def test_draws_follow_the_distribution():
  """The first token of 4000 rows, against the softmax at that temperature."""
  model, params = shared()
  prompt = jnp.broadcast_to(PROMPT[:1], (4000, 5))
  out = generate(model, params, prompt, length=1, key=KEY, temperature=2.0)
  logits, _ = model.apply({"params": params}, PROMPT[:1])
  share = jax.nn.softmax(logits[0, -1] / 2.0)
  counts = np.bincount(np.asarray(out[:, 0]), minlength=24) / 4000
  assert np.abs(counts - share).max() < 0.03
  other = jax.nn.softmax(logits[0, -1])
  assert np.abs(counts - other).max() > 0.06


def test_stop_repeats():
  model, params = shared()
  plain = generate(model, params, PROMPT, length=6, key=KEY)
  stop = int(plain[0, 2])
  out = np.asarray(
    generate(model, params, PROMPT, length=6, key=KEY, stop=stop)
  )
  for row, free in zip(out, np.asarray(plain), strict=True):
    at = np.flatnonzero(free == stop)
    end = at[0] if at.size else 6
    np.testing.assert_array_equal(row[: end + 1], free[: end + 1])
    assert (row[end:] == stop).all()
  assert (out != plain).any()


def test_equal_shapes_are_traced_once():
  traces = []

  def attend(*args, **kwargs):
    traces.append(1)
    return attention(*args, **kwargs)

  model, params = shared()
  model = model.copy(attend=attend)
  run = functools.partial(generate, model, params, length=3)
  run(PROMPT, key=KEY, temperature=0.7, top_p=0.9)
  once = len(traces)
  run(PROMPT + 1, key=jax.random.key(5), temperature=1.3, top_p=0.5)
  assert once > 0 and len(traces) == once
  run(PROMPT[:2], key=KEY, temperature=0.7, top_p=0.9)
  assert len(traces) > once


LOGITS = jnp.log(jnp.asarray([[0.1, 0.4, 0.05, 0.25, 0.2]]))


def kept(**kwargs):
  out = filter_logits(LOGITS, **kwargs)
  finite = np.isfinite(out)
  np.testing.assert_array_equal(out[finite], LOGITS[finite])
  return set(np.flatnonzero(finite[0]).tolist())


@pytest.mark.parametrize(
  "settings, expected",
  [
    ({}, {0, 1, 2, 3, 4}),
    ({"top_k": 2}, {1, 3}),
    ({"top_k": 99}, {0, 1, 2, 3, 4}),
    ({"top_p": 0.01}, {1}),
    ({"top_p": 0.39}, {1}),
    ({"top_p": 0.41}, {1, 3}),
    ({"top_p": 0.64}, {1, 3}),
    ({"top_p": 0.66}, {1, 3, 4}),
    ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
    # Of the two largest, 0.4 / 0.65 = 0.615 is the first one's share.
    ({"top_k": 2, "top_p": 0.61}, {1}),
    ({"top_k": 2, "top_p": 0.62}, {1, 3}),
  ],
)
def test_filters_keep_the_smallest_set(settings, expected):
  assert kept(**settings) == expected


def test_of_equal_logits_top_k_keeps_the_first():
  out = filter_logits(jnp.zeros((1, 4)), top_k=2)
  assert np.isfinite(out[0]).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"length": 0}, "length is 0"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"top_k": 0}, "top_k is 0"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"prompt_lengths": jnp.ones(2, jnp.int32)}, "prompt_lengths"),
  ],
)
def test_bad_settings(settings, message):
  model, params = shared()
  with pytest.raises((ValueError, TypeError), match=message):
    generate(model, params, PROMPT, **{"length": 2, "key": KEY, **settings})
