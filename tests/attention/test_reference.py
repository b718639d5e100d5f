"""What the reference keeps for its backward pass."""

import jax

from isthmus.attention import attention, save_attention


def inputs(t, n, d):
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(key, (1, t, n, d)) for key in keys]


def test_checkpoint_with_the_policy_keeps_out_and_lse():
  """Without it, the forward pass runs again: more products."""
  q, k, v = inputs(16, 2, 8)

  def count(**kwargs):
    f = jax.checkpoint(lambda q: attention(q, k, v).sum(), **kwargs)
    return str(jax.make_jaxpr(jax.grad(f))(q)).count("dot_general")

  plain = str(jax.make_jaxpr(jax.grad(lambda q: attention(q, k, v).sum()))(q))
  assert count(policy=save_attention) == plain.count("dot_general")
  assert count() > count(policy=save_attention)


def test_nothing_of_size_ts_is_kept_for_the_backward_pass():
  q, k, v = inputs(64, 2, 8)
  _, pull = jax.vjp(lambda *a: attention(*a, causal=True), q, k, v)
  sizes = [x.size for x in jax.tree.leaves(pull)]
  assert sizes and max(sizes) < 64 * 64
