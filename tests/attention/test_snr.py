"""The law of missed blocks against closed forms, and against routing itself."""

import math

import jax
import numpy as np
import pytest

from isthmus.attention.snr import (
  effective_gap,
  failure_rate,
  fit_gap,
  sample_failure,
  signal_to_noise,
)

pytestmark = pytest.mark.once

KEY = jax.random.key(0)


def phi(x):
  return 0.5 * math.erfc(-x / math.sqrt(2))


def test_against_one_block_it_is_the_normal_tail():
  for snr in (-0.5, 0.0, 0.3, 1.0, 2.5):
    assert failure_rate(snr) == pytest.approx(phi(-snr), abs=1e-7)


@pytest.mark.parametrize("blocks, slots", [(1, 1), (7, 1), (7, 3), (63, 8)])
def test_without_a_signal_all_blocks_are_alike(blocks, slots):
  got = failure_rate(0.0, blocks=blocks, slots=slots)
  assert got == pytest.approx(1 - slots / (blocks + 1), abs=1e-4)


def test_against_draws_of_scores():
  """The scores themselves, without keys."""
  rng = np.random.default_rng(0)
  for snr, blocks, slots in ((1.0, 15, 1), (0.8, 15, 4), (1.5, 63, 2)):
    sought = rng.standard_normal((100_000, 1)) + math.sqrt(2) * snr
    above = (rng.standard_normal((100_000, blocks)) > sought).sum(1)
    drawn = np.mean(above >= slots)
    law = failure_rate(snr, blocks=blocks, slots=slots)
    assert abs(law - drawn) < 4 * math.sqrt(drawn / 100_000), (law, drawn)


def test_monotone():
  rates = [failure_rate(x, blocks=31, slots=3) for x in (0, 0.5, 1, 2)]
  assert rates == sorted(rates, reverse=True) and rates[0] - rates[-1] > 0.5
  rates = [failure_rate(1.0, blocks=31, slots=s) for s in (1, 3, 9, 31)]
  assert rates == sorted(rates, reverse=True)
  rates = [failure_rate(1.0, blocks=n, slots=3) for n in (3, 9, 31)]
  assert rates == sorted(rates)
  assert failure_rate(0.0, blocks=3, slots=4) == 0.0


def test_half_a_block_is_worth_a_root_of_two():
  whole = signal_to_noise(0.7, head_dim=64, block=128)
  half = signal_to_noise(0.7, head_dim=64, block=64)
  assert half / whole == pytest.approx(math.sqrt(2))
  assert whole == pytest.approx(0.7 / 2)
  assert effective_gap(0.7) == 0.7


@pytest.mark.parametrize(
  "case",
  [
    {"block": 8},
    {"block": 32},
    {"block": 8, "blocks": 15},
    {"block": 8, "blocks": 15, "slots": 4},
    {"block": 16, "blocks": 7, "slots": 2, "cluster": 4, "lift": 0.3},
  ],
  ids=["one", "larger block", "top-1", "top-4", "cluster"],
)
def test_routing_fails_as_often_as_the_law_says(case):
  """By `moba`, within 4 standard deviations, which 1.3 times the gap is not."""
  trials, d = 2000, 16
  known = {"gap": 1.0, "head_dim": d, **case}
  got = sample_failure(KEY, trials=trials, batch=200, **known)
  gap = effective_gap(
    1.0, cluster=case.get("cluster", 1), lift=case.get("lift", 0.0)
  )
  other = {k: case[k] for k in ("blocks", "slots") if k in case}

  def law(gap):
    snr = signal_to_noise(gap, head_dim=d, block=case["block"])
    return failure_rate(snr, **other)

  error = 4 * math.sqrt(got * (1 - got) / trials)
  assert 0.03 < got < 0.97
  assert abs(got - law(gap)) < error
  assert abs(got - law(1.3 * gap)) > error / 2
  again = sample_failure(KEY, trials=trials, batch=200, **known)
  assert again == got


def test_a_gap_is_found_again():
  sizes = {"block": (8, 16, 64), "blocks": (63, 31, 7), "slots": (7, 3, 1)}
  rates = [
    failure_rate(signal_to_noise(1.3, head_dim=64, block=b), blocks=n, slots=s)
    for b, n, s in zip(*sizes.values(), strict=True)
  ]
  gap, r2 = fit_gap(rates, head_dim=64, **sizes)
  assert gap == pytest.approx(1.3, abs=1e-3) and r2 > 0.9999
  _, other = fit_gap(rates[::-1], head_dim=64, **sizes)
  assert other < 0.5  # another order is no law


def test_refusals():
  for call, words in (
    (lambda: failure_rate(1.0, blocks=0), "blocks 0"),
    (lambda: failure_rate(1.0, slots=0), "slots 0"),
    (lambda: effective_gap(1.0, cluster=0), "cluster is 0"),
    (
      lambda: sample_failure(KEY, gap=1.0, head_dim=4, block=2, cluster=3),
      "cluster is 3; it lies in .1, block = 2",
    ),
    (
      lambda: sample_failure(KEY, gap=1.0, head_dim=4, block=2, trials=0),
      "trials is 0",
    ),
  ):
    with pytest.raises(ValueError, match=words):
      call()
