"""A whole decoder's prefill: arrays that are given, work that is its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.sdpa import attention
from isthmus.train.prefill_deep import PrefillDeep, table
from isthmus.train.prefill_speed import PrefillSpeed

pytestmark = pytest.mark.once

ARRAYS = PrefillSpeed(
  levels={"window": (0.25,)},
  lengths=(128,),
  heads=4,
  kv_heads=2,
  width=16,
  block=16,
  rounds=1,
  round_seconds=1e-4,
)
SMALL = functools.partial(
  PrefillDeep,
  arrays=ARRAYS,
  source="drawn",
  width=32,
  depth=2,
  hidden=48,
  vocab_size=50,
  dtype=jnp.float32,
)


def test_a_run_times_dense_and_each_way(tmp_path):
  found = SMALL().run(tmp_path)
  assert list(found) == [
    "128/dense/ms",
    "128/window=0.25/ms",
    "128/window=0.25/kept",
  ]
  assert found["128/window=0.25/kept"] == pytest.approx(26 / 36)
  assert "| 128 | window=0.25 |" in (tmp_path / "deep.md").read_text()
  assert (tmp_path / "deep.png").stat().st_size > 5_000


def test_layers_attend_with_the_arrays_and_do_their_own_work():
  job = SMALL()
  q, k, _ = (x.astype(jnp.float32) for x in ARRAYS.sources()["drawn"](128))
  params, tokens = job.params(), jnp.arange(128)[None] % 50
  call = jax.jit(job.prefill(attention))

  @jax.jit
  def with_arrays(params, tokens, q, k):
    def attend(own_q, own_k, v, **settings):
      return attention(q, k, v, **settings)

    return job.model(attend).apply({"params": params}, tokens)[0][:, -1]

  out = call(params, tokens, q, k, 0.0)
  assert out.shape == (1, 50)
  given = params, tokens, q, k
  np.testing.assert_allclose(out, with_arrays(*given), atol=1e-5)
  traced = call(*given, 1e-3)
  np.testing.assert_allclose(traced, out, atol=0.05)
  # Queries and keys of the layers are made, not dropped: 2 m (n + k) d each.
  more, less = (
    f.lower(*x).compile().cost_analysis()["flops"]
    for f, x in ((call, (*given, 0.0)), (with_arrays, given))
  )
  head = 127 * 2 * 32 * 50  # of logits that a prefill doesn't have
  assert more + head - less > 128 * 2 * 32 * (4 + 2) * 16
  # Their traces alone are the model itself.
  whole = call(params, tokens, 0 * q, 0 * k, 1.0)
  logits, _ = job.model(attention).apply({"params": params}, tokens)
  np.testing.assert_allclose(whole, logits[:, -1], atol=1e-4)
  assert np.abs(whole - out).max() > 0.1


def test_the_table_compares():
  found = {"64/dense/ms": 4.0, "64/cudnn/ms": 3.0, "64/pbs=0.9/ms": 2.0}
  assert table(found).splitlines()[-1].endswith("| 2.00x | 1.50x |")


@pytest.mark.parametrize(
  "fields, words",
  [({"depth": 0}, "depth is 0"), ({"source": "read"}, "is none of drawn")],
)
def test_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    SMALL(**fields)
