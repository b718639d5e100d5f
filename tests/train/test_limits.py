"""The search for the largest nets, with memory made up and, once, compiled."""

import dataclasses
import json

import pytest

from isthmus.nets.vision.unet3d import UNet3D
from isthmus.train.limits import AXES, Limits

pytestmark = pytest.mark.once

NET = UNet3D(classes=2, widths=(4, 8), depth=1, block="conv")
SHARE = {"reversible": 1.0, "remat": 2.0, "plain": 5.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeUp(Limits):
  """Memory in proportion to voxels, depth and width, and no compilation."""

  def need(self, mode, axis, n):
    return SHARE[mode] * (n / 8) ** (3 if axis == "volume" else 1)

  def _need(self, net, sides):
    return SHARE[net.mode] * 10.0

  def execute(self, name, net, sides):
    assert net.mode == "reversible"
    size = {"volume": sides[0], "depth": net.depth, "width": net.widths[0]}
    assert name == "x".join(map(str, sides)) or name in {
      f"{axis}={n}" for axis, n in size.items()
    }
    return {f"{name}/reversible/ran": 1.0}


def _job(**options):
  return MadeUp(net=NET, **{"budget": 20.0, "most": (64, 40, 40), **options})


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("mode", SHARE)
@pytest.mark.parametrize("budget", [0.01, 0.9, 3.7, 20.0, 1e6])
def test_found_is_what_trying_all_finds(axis, mode, budget):
  job = _job(budget=budget)
  low, high, step = job.ends(axis)
  fits = [
    n for n in range(low, high + 1, step) if job.need(mode, axis, n) <= budget
  ]
  assert job.largest(mode, axis) == max(fits, default=0)


def test_gains_count_voxels_and_leave_out_what_has_no_end(tmp_path):
  results = _job(most=(64, 40, 400)).run(tmp_path)
  assert results["reversible/volume"] == 20 and results["plain/volume"] == 12
  assert results["gain/volume"] == pytest.approx((20 / 12) ** 3)
  assert results["gain/depth"] == 40 / 32  # at least: 40 is the most
  assert results["gain/width"] == 160 / 32
  text = (tmp_path / "limits.md").read_text()
  assert "| reversible | 20 | 40 or more | 160 |" in text
  assert "depth, reversible / plain: at least 1.25" in text
  assert "width, reversible / plain: 5.00" in text
  # Where plain doesn't fit.
  ran = {name for name in results if name.endswith("/ran")}
  assert ran == {
    f"{size}/reversible/ran" for size in ("volume=20", "depth=40", "width=160")
  }
  assert json.loads((tmp_path / "limits.json").read_text())["plain/depth"] == 32
  assert "gain/depth" not in _job(budget=1e6).gains(
    {"plain/depth": 40.0, "reversible/depth": 40.0}
  )


def test_a_volume_that_only_the_reversible_net_fits_is_run(tmp_path):
  job = _job(axes=("depth",), shown=(6, 4, 2))
  results = job.run(tmp_path / "one")
  assert results["plain/gib"] == 50.0
  assert results["6x4x2/reversible/ran"] == 1.0
  wide = dataclasses.replace(job, budget=50.0).run(tmp_path / "all")
  assert "6x4x2/reversible/ran" not in wide
  small = dataclasses.replace(job, budget=5.0).run(tmp_path / "none")
  assert "6x4x2/reversible/ran" not in small


def test_late_figures_are_not_begun(tmp_path):
  results = _job(limit_s=1e-9).run(tmp_path)
  assert results == {}
  assert (tmp_path / "limits.md").read_text().count("not searched") == 9


def test_what_is_known_is_not_found_again(tmp_path, monkeypatch):
  """A run that was given up goes on; new settings, forced, begin anew."""
  two = ("reversible", "plain")
  job = _job(shown=(6, 4, 2), axes=("depth",), modes=two)
  whole = job.run(tmp_path / "whole")
  known = {"reversible/depth": 20.0, "plain/depth": 4.0}
  (tmp_path / "part").mkdir()
  (tmp_path / "part" / "limits.json").write_text(json.dumps(known))
  assert job.run(tmp_path / "part") == {
    **known,
    **{k: v for k, v in whole.items() if k.endswith("/gib")},
    "gain/depth": 5.0,
    "6x4x2/reversible/ran": 1.0,
    "depth=20/reversible/ran": 1.0,
  }
  for name in ("largest", "execute"):
    monkeypatch.setattr(MadeUp, name, None)
  assert job.run(tmp_path / "whole") == whole
  monkeypatch.undo()
  forced = dataclasses.replace(job, budget=10.0)
  assert forced.run(tmp_path / "part", force=True)["plain/depth"] == 16


def test_sizes_are_set_in_all_levels():
  job = _job()
  assert job.resized("remat", "width", 10).widths == (10, 20)
  assert job.resized("remat", "depth", 3).depths == ((3, 3), (3, 3))
  assert job.resized("plain", "volume", 8) == NET.clone(mode="plain")


def test_a_step_is_compiled_and_run():
  net = NET.clone(widths=(4,))  # compiles sooner
  job = Limits(net=net, budget=1.0, axes=("depth",), modes=("reversible",))
  few, many = (
    dataclasses.replace(job, sides=(n, n, n)).need("reversible", "depth", 1)
    for n in (4, 8)
  )
  assert 0 < 4 * few < many < 0.1
  ran = job.execute("4x4x4", net.clone(mode="reversible"), (4, 4, 4))
  # A CPU's memory is the machine's: the plain net isn't tried there.
  assert set(ran) == {"4x4x4/reversible/ran", "4x4x4/reversible/ms"}
  assert ran["4x4x4/reversible/ran"] == 1.0 and ran["4x4x4/reversible/ms"] > 0


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"budget": 0.0}, "budget is 0.0 GiB"),
    ({"limit_s": -1.0}, "limit_s -1.0"),
    ({"channels": 0}, "channels is 0"),
    ({"axes": ("height",)}, "'height' is none of volume, depth, width"),
    ({"modes": ("fast",)}, "'fast' is none of"),
    ({"most": (2, 4, 4)}, "most of volume is 2; the search begins at 4"),
  ],
)
def test_refused(wrong, message):
  with pytest.raises(ValueError, match=message):
    _job(**wrong)
