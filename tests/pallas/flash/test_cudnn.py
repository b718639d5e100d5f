"""cuDNN's attention: its refusals everywhere, its numbers on a GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import attention, save_attention
from isthmus.pallas.flash.api import Extras, Options
from isthmus.pallas.flash.cudnn import refuse_call
from isthmus.pallas.flash.predicate import Band, Positions, Segments
from tests.attention.oracle import close, inputs, oracle


def refusal(dtype=jnp.bfloat16, t=64, s=64, d=64, dv=None, hopper=True, **kw):
  struct = jax.ShapeDtypeStruct
  q = struct((1, t, 4, d), dtype)
  k, v = struct((1, s, 2, d), dtype), struct((1, s, 2, dv or d), dtype)
  arrays = {x: kw.pop(x) for x in list(kw) if x in Extras._fields}
  options = Options(**kw)
  return refuse_call(q, k, v, Extras(**arrays), options=options, hopper=hopper)


def test_cudnn_takes_what_it_can():
  assert refusal() is None
  assert refusal(predicate=Band(None, 0)) is None
  assert refusal(predicate=Band(7, 0)) is None
  assert refusal(dtype=jnp.float16, t=32) is None
  assert refusal(d=256) is None


@pytest.mark.parametrize(
  "settings, word",
  [
    ({"predicate": Segments()}, "Segments"),
    ({"predicate": Positions(None, 0)}, "Positions"),
    ({"lists": 0}, "lists"),
    ({"sinks": 0}, "sinks"),
    ({"softcap": 3.0}, "softcap"),
    ({"dropout_rate": 0.1}, "dropout"),
    ({"return_lse": True}, "lse"),
    ({"dtype": jnp.float32}, "float32"),
    ({"predicate": Band(None, 0), "t": 32}, "32 queries meet 64 keys"),
    ({"predicate": Band(None, 0, 5)}, "offset of 5"),
    ({"t": 113, "s": 113}, "even lengths, not 113"),
    ({"s": 63}, "63 keys"),
    ({"predicate": Band(3, 3)}, "window"),
    ({"d": 60}, "60"),
    ({"d": 256, "hopper": False}, "256"),
    ({"d": 264}, "264"),
    ({"dv": 32}, "32"),
  ],
)
def test_cudnn_refuses_the_rest_with_the_reason(settings, word):
  assert word in refusal(**settings)


GPU = [
  ((2, 256, 256, 8, 8, 64), {"causal": True}),
  ((2, 256, 256, 9, 3, 64), {"causal": True}),
  ((2, 256, 256, 8, 2, 128), {"causal": True, "scale": 0.1}),
  ((1, 128, 384, 4, 1, 64), {}),
  ((1, 114, 114, 4, 4, 96), {"causal": True}),
  ((1, 256, 256, 4, 4, 256), {"causal": True}),
  ((1, 512, 512, 4, 2, 64), {"causal": True, "window": (100, 0)}),
  ((1, 512, 512, 4, 2, 64), {"causal": True, "window": 64}),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape, settings", GPU)
def test_cudnn_equals_oracle_on_gpu(shape, settings, dtype):
  q, k, v, do, _ = inputs(*shape, dtype=dtype)
  b, t, s, n, heads, _ = shape
  settings = dict(settings)
  scale = settings.pop("scale", None)
  i, j = np.arange(t)[:, None] + s - t, np.arange(s)
  seen = np.ones((t, s), bool)
  if settings.get("causal"):
    seen &= j <= i
  if "window" in settings:
    w = settings["window"]
    left, right = (w, w) if isinstance(w, int) else w
    seen &= (j >= i - left) & (j <= i + right)
  mask = np.broadcast_to(seen, (b, n, t, s))

  def run(f, *args):
    o, pull = jax.vjp(f, *args)
    return o, pull(do.astype(o.dtype))

  def written(*a):
    return oracle(*a, mask, scale=scale)[0]

  def cudnn(*a):
    return attention(*a, scale=scale, impl="cudnn", **settings)

  ours = run(jax.jit(cudnn), q, k, v)
  wide = run(written, *(x.astype(jnp.float32) for x in (q, k, v)))
  naive = run(written, q, k, v)
  assert "fmha" in jax.jit(cudnn).lower(q, k, v).as_text()
  wide = jax.tree.map(np.asarray, wide)
  close(ours[0], wide[0], naive[0], 2, 1e-5)
  for a, e, low in zip(ours[1], wide[1], naive[1], strict=True):
    close(a, e, low, 3, 1e-4)


@pytest.mark.gpu
def test_cudnn_runs_once_under_the_policy_on_gpu():
  q, k, v, _, _ = inputs(1, 128, 128, 4, 4, 64, dtype=jnp.bfloat16)

  def count(**kwargs):
    f = jax.checkpoint(
      lambda q: attention(q, k, v, causal=True, impl="cudnn").sum(), **kwargs
    )
    text = jax.jit(jax.value_and_grad(f)).lower(q).as_text()
    return len(re.findall(r"fmhaSoftmax[\"(]", text))

  assert count(policy=save_attention) == 1
  assert count() == 2
