"""Times of prefills over chosen blocks, of drawn arrays and of a model's."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.bench.report import Report
from isthmus.data.library import PythonLibrary
from isthmus.data.tokenizer import Bytes
from isthmus.train.metrics.capture import capture, extended, long_text
from isthmus.train.prefill_speed import PrefillSpeed
from isthmus.train.recipes.sparse_prefill import tiny

pytestmark = pytest.mark.once

SMALL = functools.partial(
  PrefillSpeed,
  load=tiny,
  context=64,
  layers=(1, 0),
  levels={"window": (0.25, 0.5)},
  lengths=(128,),
  heads=4,
  kv_heads=2,
  width=16,
  block=16,
  queries=8,
  rounds=1,
  round_seconds=1e-4,
)
WAYS = ("window=0.25", "window=0.5")


def test_both_sources_are_timed_and_written(tmp_path):
  found = SMALL().run(tmp_path)
  for source in ("drawn", "read"):
    name = f"{source}/128/window=0.25"
    assert found[f"{name}/fwd/ms"] > 0 and found[f"{name}/choice/ms"] > 0
    assert 0 < found[f"{name}/mass"] <= 1
    assert found[f"{name}/kept"] == pytest.approx(26 / 36)
    assert found[f"{source}/128/window=0.5/kept"] > found[f"{name}/kept"]
  report = Report.read(tmp_path / "bench.json")
  digests = [row.digest for row in report.chosen]
  assert len(set(digests)) == 2 and {len(x) for x in digests} == {64}
  whole = json.loads((tmp_path / "bench.json").read_text())
  assert whole["settings"]["layers"] == [1, 0]
  text = (tmp_path / "chosen.md").read_text()
  for source in ("drawn", "read"):  # whichever way was the faster is bold
    ways = {w: found[f"{source}/128/{w}/fwd/ms"] for w in WAYS}
    assert f"| {source} | 128 | **{min(ways, key=ways.get)}** |" in text
  assert (tmp_path / "chosen.png").stat().st_size > 10_000


def test_what_is_read_is_the_models_at_stretched_positions():
  job = SMALL(lengths=(128, 64))
  sources = job.sources()
  q, k, _ = sources["read"](64)
  assert q.shape == (1, 64, 4, 16) and k.shape == (1, 64, 2, 16)
  np.testing.assert_array_equal(q, sources["read"](128)[0][:, :64])
  model, params, _ = tiny()
  tokens = long_text(PythonLibrary(), Bytes(), 128)
  x = []
  for one in (extended(model, 128, context=64), model):
    own_q, own_k, _ = capture(one, params, tokens, (1,))
    x.append(own_q[0, 0, :, 0] @ own_k[0, 0, :, 0].T * 8**-0.5)
  found = q[0, :, 0].astype(jnp.float32) @ k[0, :, 0].T * 16**-0.5
  np.testing.assert_allclose(found, x[0][:64, :64], atol=0.05)
  assert np.abs(x[0] - x[1]).max() > 0.2
  assert list(SMALL(load=None).sources()) == ["drawn"]


def test_without_time_it_says_so(tmp_path):
  with pytest.raises(RuntimeError, match="bench.json has the reasons"):
    SMALL(load=None, seconds=1e-9).write(tmp_path)
  found = json.loads((tmp_path / "bench.json").read_text())
  assert found["refusals"][-1]["reason"] == "there was no time left"


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"queries": 0}, "queries is 0"),
    ({"rounds": 0}, "rounds is 0"),
    ({"width": 12}, "width is 12"),
    ({"lengths": (32,)}, "4 blocks of 16"),
    ({"lengths": ()}, "4 blocks of 16"),
    ({"levels": {"masses": (0.5,)}}, "'masses' is none of window"),
    ({"levels": {"mass": (2.0,)}}, "lies in"),
  ],
)
def test_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    SMALL(**fields)
