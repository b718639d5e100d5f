"""Re-runs a recipe's committed check and compares it with its docstring.

The field `Check` of a recipe's docstring names a variant that is small enough
to run anywhere, and the figures that it gave us:

  Check: small: eval/loss = 1.30 +- 0.02, margin/psnr >= 0.5; two CPU cores

Each figure is a metric of the job's results with what it may differ by, or a
bound that it keeps. What follows the last `;` says where it was measured.
"""

import dataclasses
import datetime
import math
import os
import pathlib
import platform
import re
import subprocess
import time
from importlib import metadata
from typing import Any, Literal

from isthmus.train import log, recipe
from isthmus.train.config import ConfigError, flatten, load
from isthmus.train.workdir import WorkdirError

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_FIGURE = re.compile(
  rf"(?P<metric>\S+) (?:= (?P<value>{_NUMBER}) \+- (?P<tolerance>{_NUMBER})"
  rf"|(?P<sign>>=|<=) (?P<bound>{_NUMBER}))"
)
PACKAGES = ("isthmus", "jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True)
class Figure:
  """One figure of a check: `metric sign value`, within a tolerance for "=".

  Example:
    >>> figure = Figure("eval/loss", "=", 1.3, 0.02)
    >>> figure.holds(1.31), figure.holds(1.35), figure.holds(None)
    (True, False, False)
  """

  metric: str
  sign: Literal["=", ">=", "<="]
  value: float
  tolerance: float = 0.0

  def holds(self, measured: float | None) -> bool:
    """Whether a measured value is what this says; a missing one isn't."""
    if measured is None or not math.isfinite(measured):
      return False
    if self.sign == ">=":
      return measured >= self.value
    if self.sign == "<=":
      return measured <= self.value
    return abs(measured - self.value) <= self.tolerance

  def __str__(self) -> str:
    end = f" +- {self.tolerance:g}" if self.sign == "=" else ""
    return f"{self.metric} {self.sign} {self.value:g}{end}"


@dataclasses.dataclass(frozen=True)
class Check:
  """A variant to run, the figures it has to give, and where it gave them.

  Example:
    >>> figures = (Figure("eval/loss", "<=", 1.3),)
    >>> check = Check("smoke", figures, "two CPU cores")
    >>> print(check.figures[0])
    eval/loss <= 1.3
  """

  variant: str
  figures: tuple[Figure, ...]
  hardware: str


def parse(name: str, text: str) -> Check:
  """The check that a docstring's field `Check` describes.

  Raises:
    ConfigError: the recipe has none, or the text is none.

  Example:
    >>> check = parse("x", "small: eval/loss = 1.3 +- 0.02; two CPU cores")
    >>> check.variant, str(check.figures[0]), check.hardware
    ('small', 'eval/loss = 1.3 +- 0.02', 'two CPU cores')
  """
  if text == "none":
    raise ConfigError(f"recipe {name} has no committed check")
  body, semicolon, hardware = text.rpartition(";")
  variant, colon, rest = body.partition(":")
  figures = []
  for item in rest.split(","):
    match = _FIGURE.fullmatch(" ".join(item.split()))
    if not (semicolon and colon and match):
      raise ConfigError(
        f"recipe {name}: Check {item.strip() or text!r} is not of the form "
        "VARIANT: metric = value +- tolerance, metric >= bound; hardware"
      )
    if match["sign"]:
      sign: Any = match["sign"]
      figures.append(Figure(match["metric"], sign, float(match["bound"])))
    else:
      value, tolerance = float(match["value"]), float(match["tolerance"])
      figures.append(Figure(match["metric"], "=", value, tolerance))
  return Check(variant.strip(), tuple(figures), hardware.strip())


def verify(name: str, workdir: pathlib.Path) -> dict[str, Any]:
  """Runs a recipe's check in a new folder, and writes verify.json there.

  Args:
    name: the recipe.
    workdir: a folder that doesn't exist yet or is empty: a check that goes on
      from an earlier run would measure that one.

  Returns:
    What verify.json holds: `ok`, each figure with what was measured, hardware,
    versions, commit, seconds.

  Raises:
    ConfigError: no such recipe, or it has no check.
    WorkdirError: a folder with something in it.

  Example:
    >>> verify("quikstart", pathlib.Path("run"))
    Traceback (most recent call last):
    isthmus.train.config.ConfigError: no recipe 'quikstart'; did you mean ...
  """
  check = parse(name, recipe.read(name)["Check"])
  job = load(f"{name}:{check.variant}")
  if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise WorkdirError(
      f"{workdir} is not empty; a check starts anew, give another --workdir"
    )
  began = time.perf_counter()
  source = {"config": f"{name}:{check.variant}", "set": []}
  results = job.run(workdir, source=source)
  figures = [
    {
      "figure": str(figure),
      "measured": results.get(figure.metric),
      "ok": figure.holds(results.get(figure.metric)),
    }
    for figure in check.figures
  ]
  report = {
    "recipe": name,
    "variant": check.variant,
    "ok": all(f["ok"] for f in figures) and not results.get("interrupted"),
    "figures": figures,
    "measured_by_us_on": check.hardware,
    "seconds": round(time.perf_counter() - began, 1),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "hardware": hardware(),
    "versions": {name: _version(name) for name in PACKAGES},
    "commit": commit(pathlib.Path(__file__).parent),
    "settings": flatten(job),
  }
  log.write_json(workdir / "verify.json", report)
  return report


def lines(report: dict[str, Any]) -> list[str]:
  """What `verify` found, for a person.

  Example:
    >>> figure = {"figure": "loss <= 2", "measured": 1.5, "ok": True}
    >>> report = {"recipe": "x", "variant": "small", "ok": True, "seconds": 9}
    >>> for line in lines({**report, "figures": [figure]}):
    ...   print(line)
    x:small verified in 9 s
      ok    loss <= 2: measured 1.5
  """
  verdict = "verified" if report["ok"] else "NOT verified"
  name = f"{report['recipe']}:{report['variant']}"
  out = [f"{name} {verdict} in {report['seconds']:.0f} s"]
  for figure in report["figures"]:
    value = figure["measured"]
    text = "nothing" if value is None else f"{value:.6g}"
    word = "ok" if figure["ok"] else "MISS"
    out.append(f"  {word:5s} {figure['figure']}: measured {text}")
  return out


def hardware() -> dict[str, Any]:
  """The devices that jax uses here, the machine, its cores.

  Example:
    >>> sorted(hardware())
    ['cores', 'device', 'devices', 'machine', 'python', 'system']
  """
  import jax

  devices = jax.devices()
  return {
    "device": devices[0].device_kind,
    "devices": len(devices),
    "machine": platform.machine(),
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "system": platform.system(),
  }


def commit(folder: pathlib.Path) -> str | None:
  """The commit that a checkout is at, "+changes" if files of it differ.

  None outside a checkout: then the version says what ran.

  Example:
    >>> commit(pathlib.Path("/")) is None  # no checkout
    True
  """

  def git(*words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()

  try:
    if git("check-ignore", "-q", ".") == "":
      return None  # installed inside a folder that some checkout ignores
  except subprocess.CalledProcessError:
    pass
  except OSError:
    return None
  try:
    head = git("rev-parse", "HEAD")
    return head + ("+changes" if git("status", "--porcelain") else "")
  except subprocess.CalledProcessError:
    return None


def _version(name: str) -> str | None:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return None
