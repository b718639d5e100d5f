"""The recipe of bytes and time: closed forms, break-even, measured points."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import pytest

from isthmus.attention.schedule import SCHEDULES, directions, messages
from isthmus.train.recipes import token_ring as recipe

pytestmark = pytest.mark.once

SMOKE = recipe.get_config("smoke")


def changed(**fields):
  return dataclasses.replace(SMOKE, **fields)


def by_key(points):
  return {p[:3]: p for p in points}


@pytest.fixture(scope="module")
def points():
  return SMOKE.points()


def test_bytes_are_the_byte_models(points):
  """Of both passes; that model's are those of compiled programs."""
  for p in points:
    sent = ()
    for backward in (False, True):
      sent += messages(
        p.schedule,
        p.devices,
        q_heads=32,
        kv_heads=32 // p.group,
        q_length=SMOKE.length // p.devices,
        width=128,
        causal=True,
        backward=backward,
      )
    assert (p.ahead, p.behind) == pytest.approx(directions(sent), abs=4), p
  assert {p.schedule for p in points} == set(SCHEDULES)
  # Each device has some key heads, or there is no such point.
  missing = [k for k in _all() if k not in by_key(points)]
  assert missing == [(4, 16, "ulysses"), (8, 8, "ulysses"), (8, 16, "ulysses")]


def _all():
  return itertools.product(SMOKE.groups, SMOKE.devices, SCHEDULES)


def test_break_even_by_hand():
  """Bytes a token and head of width d, both passes: 6d + 8 against 16d / G."""
  d = SMOKE.head_dim
  both = 16 * d / (6 * d + 8)
  for devices in (4, 16, 256):
    job = changed(length=2**14, devices=(devices,), groups=(4,))
    got = job.break_even(job.points(), "kv_ring")
    assert got == pytest.approx(both)
    got = job.break_even(job.points(), "kv_ring_bidir")
    assert got == pytest.approx(both / 2)
  # Forward alone: 2d + 4 against 4d / G. So the paper's: below 2, for the lse.
  job = changed(which="fwd")
  got = job.break_even(job.points(), "kv_ring")
  assert got == pytest.approx(4 * d / (2 * d + 4))
  # One direction at a time: its two ways add up.
  job = changed(which="fwd", links="one")
  got = job.break_even(job.points(), "kv_ring")
  assert got == pytest.approx(4 * d / (4 * d + 4))
  # Results that pass all devices between load every link.
  job = changed(links="ring", groups=(1,), devices=(64,))
  assert job.break_even(job.points(), "kv_ring") < 1


def test_the_faster_ring_changes_at_the_break_even():
  """Where links set the pace, time follows bytes."""
  fast = changed(flops=1e30, devices=(64,), groups=(1, 2, 4, 8))
  points = by_key(fast.points())
  for group, devices in itertools.product(fast.groups, fast.devices):
    token, one, both = (
      points[group, devices, s].seconds
      for s in ("token_ring", "kv_ring", "kv_ring_bidir")
    )
    assert (token < one) == (group <= 2)
    assert (token < both) == (group == 1)
    ratio = fast.break_even(list(points.values()), "kv_ring")
    assert token / one == pytest.approx(group / ratio, rel=0.05)


def test_more_devices_or_key_heads(points):
  """Compute is divided; a ring's links carry no less in all."""
  found = by_key(points)
  for group, schedule in itertools.product(SMOKE.groups, SCHEDULES[:4]):
    each = [found[group, n, schedule] for n in SMOKE.devices]
    for few, many in itertools.pairwise(each):
      assert many.compute == pytest.approx(few.compute / 2)
      assert many.ahead + many.behind > few.ahead + few.behind
    for p in each:
      assert p.seconds >= p.compute
      other = found.get((8, p.devices, schedule))
      if schedule == "token_ring":
        assert other[3:] == p[3:]
      elif group != 8:
        assert other.ahead == pytest.approx(p.ahead * group / 8)
        assert other.seconds <= p.seconds


def test_thousands_of_devices_and_their_bytes_a_step():
  job = changed(length=2**22, devices=(2048,), groups=(4,), which="fwd")
  found = by_key(job.points())
  size = 2048 * 32 * 128 * 2
  one = found[4, 2048, "kv_ring"]
  assert (one.step_ahead, one.ahead) == (size / 2, 2047 * size / 2)
  token = found[4, 2048, "token_ring"]
  assert (token.step_behind, token.behind) == (size, 2047 * size)
  assert token.step_ahead == size + 2048 * 32 * 4
  assert (4, 2048, "ulysses") not in found


def test_hidden_to_is_where_links_take_over(points):
  """At 2^17 tokens some rings hide their bytes and some don't."""
  results = SMOKE.results(points)
  found = by_key(points)
  several = set()
  for group, schedule in itertools.product(SMOKE.groups, SCHEDULES[:3]):
    hidden = results[f"group={group}/{schedule}/hidden_to"]
    several.add(hidden)
    for devices in SMOKE.devices:
      p = found[group, devices, schedule]
      if devices <= hidden:
        assert p.seconds <= 1.1 * p.compute
      if devices == 2 * hidden:
        assert p.seconds > 1.1 * p.compute
  assert len(several) > 2, several


def row(**fields):
  case = {"mask": "causal", "batch": 1, "heads": 32, "width": 128}
  case |= {"length": SMOKE.length} | fields.pop("case", {})
  return {
    "devices": 2,
    "group": 4,
    "schedule": "kv_ring",
    "which": "fwd+bwd",
    "ms": 500.0,
    "case": case,
    **fields,
  }


def test_measured_points_are_beside_the_models(tmp_path):
  rows = [
    row(),
    row(schedule="token_ring", ms=900.0),
    row(devices=3),  # no such point
    row(which="fwd", ms=7.0),
    row(case={"length": 64}, ms=7.0),
    {"who": "cudnn", "ms": 1.0},  # of one device
  ]
  (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
  job = changed(measured=str(tmp_path / "bench.json"))
  results = job.run(tmp_path / "with")
  assert (results["measured"], results["left_out"]) == (2, 3)
  model = by_key(SMOKE.points())[4, 2, "kv_ring"].seconds
  got = results["group=4/devices=2/kv_ring/measured_over_model"]
  assert got == pytest.approx(0.5 / model)
  assert "| 0.5 |" in (tmp_path / "with" / "rings.md").read_text()

  results = SMOKE.run(tmp_path / "without")
  assert (results["measured"], results["left_out"]) == (0, 0)
  pictures = [
    (tmp_path / x / "rings.png").read_bytes() for x in ("with", "without")
  ]
  assert min(len(p) for p in pictures) > 20_000
  assert pictures[0] != pictures[1]
  saved = json.loads((tmp_path / "without" / "rings.json").read_text())
  assert len(saved) == len(SMOKE.points())


def test_half_the_heads_take_half_the_time(tmp_path):
  """Rows of 16 heads are points of 32, where no step costs a latency."""
  rows = [row(case={"heads": 16}, ms=250.0)]
  (tmp_path / "rows.json").write_text(json.dumps(rows))
  read = {"measured": str(tmp_path / "rows.json")}
  results = changed(**read).run(tmp_path / "scaled")
  model = by_key(SMOKE.points())[4, 2, "kv_ring"].seconds
  got = results["group=4/devices=2/kv_ring/measured_over_model"]
  assert got == pytest.approx(0.5 / model)
  results = changed(**read, latency=1e-5).run(tmp_path / "latency")
  assert (results["measured"], results["left_out"]) == (0, 1)


@pytest.mark.parametrize(
  "text",
  ["no json", "[1]", '[{"devices": 2}]', json.dumps([row(schedule="ring")])],
)
def test_rows_that_are_none_are_refused_before_anything_is_written(
  text, tmp_path
):
  (tmp_path / "rows.json").write_text(text)
  with pytest.raises(ValueError, match=r"rows.json has no rows of rings"):
    changed(measured=str(tmp_path / "rows.json")).run(tmp_path / "run")
  with pytest.raises(ValueError, match="absent.json has no rows of rings"):
    changed(measured="absent.json").run(tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_full_goes_to_thousands():
  job = recipe.get_config("full")
  assert max(job.devices) == 4096 and job.groups == (1, 4, 8)
  assert jnp.dtype(job.dtype).itemsize == 2


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"length": 0}, "length is 0"),
    ({"devices": ()}, "at least one entry"),
    ({"devices": (1,)}, "devices 1: at least 2"),
    ({"devices": (3,)}, "two chunks for each divide"),
    ({"groups": (5,)}, "group 5 doesn't divide 32 heads"),
    ({"which": "both"}, "there are fwd, bwd, fwd"),
    ({"dtype": "bf"}, "dtype 'bf' is none"),
    ({"flops": 0.0}, "flops is 0"),
    ({"links": "mesh"}, "links 'mesh'"),
  ],
)
def test_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    changed(**fields)
