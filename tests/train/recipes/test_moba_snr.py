"""The recipe of the law: its fit, and its figures."""

import pytest

from isthmus.train.recipes import moba_snr as recipe


def test_the_law_itself_is_fitted_without_rest():
  job = recipe.get_config("small")
  points = {
    (gap, cluster): [job.law(job.gap(gap, cluster), b) for b in job.block]
    for gap in job.gaps
    for cluster in job.clusters
  }
  results = job.fit(points)
  assert results["r2"] > 0.9999 and results["r2_true"] > 0.9999
  for name, value in results.items():
    if name.endswith("/gap"):
      assert value == pytest.approx(1.0, abs=0.01)
  # Shares that fall where they should rise are not the law.
  other = job.fit({k: v[::-1] for k, v in points.items()})
  assert other["r2"] < 0.5 and other["r2_true"] < 0.5


def test_a_curve_without_a_slope_has_no_fit():
  job = recipe.get_config("smoke")
  results = job.fit({(1.0, 1): [1.0] * len(job.block)})
  assert not [name for name in results if name.endswith(("gap", "r2"))]


def test_smaller_blocks_and_clusters_help():
  job = recipe.get_config("full")
  found = [job.law(job.gap(8.0, 1), b) for b in job.block]
  assert found == sorted(found) and found[-1] > 2 * found[0]
  assert job.law(job.gap(8.0, 4), 128) > job.law(job.gap(8.0, 1), 128) + 0.1
  assert job.sizes(128) == {"blocks": 63, "slots": 8}


def test_smoke_keeps_near_the_law(tmp_path):
  results = recipe.get_config("smoke").run(tmp_path)
  assert results["r2_true"] > 0.8
  assert (tmp_path / "retrieval.png").stat().st_size > 10_000
  assert "(0." in (tmp_path / "retrieval.md").read_text()


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"trials": 0}, "trials is 0"),
    ({"block": ()}, "at least one entry"),
    ({"block": (96,)}, "block 96 doesn't divide"),
    ({"budget": 8192}, "reads all of a context of 8192"),
    ({"clusters": (1, 17)}, "least block 16"),
  ],
)
def test_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    recipe.Retrieval(**fields)
