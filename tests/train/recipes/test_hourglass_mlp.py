"""The hourglass recipe: parameters counted, statements made of made-up runs."""

import jax
import jax.numpy as jnp
import pytest

from isthmus.train.recipes import hourglass_mlp as recipe
from isthmus.train.study import Study


def _params(net):
  variables = jax.eval_shape(
    net.init, jax.random.key(0), jnp.zeros((1, recipe.PIXELS))
  )
  return sum(x.size for x in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("budget", [1_500_000, 12_000_000])
@pytest.mark.parametrize("depth", [1, 4])
def test_nets_fill_their_budget_and_no_more(budget, depth):
  for net in (
    recipe.conventional(budget, depth),
    recipe.hourglass(budget, 832, depth),
  ):
    if net is None:
      continue
    count = _params(net)
    width = getattr(net, "width", recipe.PIXELS)
    assert budget - 2 * depth * width < count <= budget


def test_nets_that_would_be_of_the_other_family_are_left_out():
  assert recipe.conventional(1_500_000, 1).hidden > recipe.PIXELS
  assert recipe.conventional(1_500_000, 2) is None  # would narrow
  assert recipe.hourglass(12_000_000, 832, 2) is None  # would widen
  assert recipe.hourglass(1_500_000, 1900, 4) is None  # nothing is left


def test_a_trained_lift_is_the_same_net_with_more_to_train():
  random = recipe.hourglass(1_500_000, 832, 4)
  trained = recipe.hourglass(1_500_000, 832, 4, lift="trained")
  assert trained.clone(lift="random") == random
  assert _params(trained) - _params(random) == 784 * 832


def test_flops_follow_the_weights():
  wide = recipe.Flat(recipe.conventional(1_500_000, 1))
  assert wide.flops_per_row((28, 28, 1)) == 6 * 2 * 784 * wide.net.hidden
  net = recipe.hourglass(1_500_000, 832, 4)
  blocks = 2 * 832 * 4 * net.hidden
  assert recipe.Flat(net).flops_per_row((28, 28, 1)) == (
    6 * (blocks + 832 * 784) + 2 * 832 * 784
  )
  trained = recipe.Flat(net.clone(lift="trained"))
  assert trained.flops_per_row((28, 28, 1)) == 6 * (blocks + 2 * 832 * 784)


def _results(gain, lift, deeper=True):
  """Runs whose hourglasses are better by `gain`, at 2 of 4 shapes each."""
  results = {}
  for budget in (1_500_000, 6_000_000):
    late = budget > 2e6
    for case, value in {
      f"conventional/{budget}/d1-lr0.003": 20.0,
      f"conventional/{budget}/d2-lr0.003": 19.0,
      f"hourglass/{budget}/w832-d4-lr0.003": 20.0 + gain - (late and deeper),
      f"hourglass/{budget}/w1280-d16-lr0.003": 19.5
      + gain
      + (late and deeper)
      - (0.5 if late else 0.0),
      f"trained/{budget}/w832-d4-lr0.003": 20.0
      + gain
      - lift
      - (late and deeper),
    }.items():
      results[f"denoise/{case}"] = [
        {"eval/psnr": value + 0.01 * seed} for seed in range(3)
      ]
  return results


def _compare(results, tmp_path):
  study = Study(grid=dict, seeds=3)
  figures = recipe.compare(study, tmp_path, results)
  return figures, (tmp_path / "report.md").read_text()


def test_statements_hold_when_they_do(tmp_path):
  figures, text = _compare(_results(gain=1.0, lift=0.05), tmp_path)
  assert figures["denoise/1.5M/gain_db"] == pytest.approx(1.0)
  assert figures["denoise/1.5M/hourglass_db"] == pytest.approx(21.01)
  assert figures["denoise/6M/random_minus_trained_db"] == pytest.approx(0.05)
  assert "net at every budget: replicated" in text
  assert "of a trained one: replicated" in text
  # The best goes from w832-d4 to w1280-d16: 126 to 121 wide inside.
  assert "hourglass's depth, denoise: +1.000" in text
  assert "narrower inside: replicated" in text
  assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_statements_fall_when_they_do(tmp_path):
  _, text = _compare(_results(gain=-0.5, lift=-0.3, deeper=False), tmp_path)
  assert "net at every budget: refuted" in text
  assert "of a trained one: refuted" in text
  assert "narrower inside: refuted" in text  # the same shape, wider inside


def test_the_twin_of_a_trained_lift_is_its_own_shape(tmp_path):
  """Not the best hourglass: that would be another net."""
  results = _results(gain=1.0, lift=0.05)
  results["denoise/hourglass/1500000/w1280-d16-lr0.003"] = [
    {"eval/psnr": 30.0 + seed} for seed in range(3)
  ]
  figures, _ = _compare(results, tmp_path)
  assert figures["denoise/1.5M/random_minus_trained_db"] == pytest.approx(0.05)
  assert figures["denoise/1.5M/hourglass_db"] == pytest.approx(31.0)
