"""A run's findings, as a table for a reader and as JSON for a program."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from isthmus.attention.bench.case import Case
from isthmus.attention.bench.chosen import Chosen
from isthmus.attention.bench.decode import Decode, Step
from isthmus.attention.bench.routed import Routed, Routing
from isthmus.attention.bench.rows import Refusal, Row, ratios
from isthmus.attention.bench.run import Build


@dataclasses.dataclass
class Report:
  """What was measured where.

  Attributes:
    machine: of `isthmus.attention.bench.run.machine`.
    settings: the command's options.
    rows: passes measured.
    refusals: what was asked for and did not run.
    builds: costs of making masks.
    decodes: decode steps.
    routed: mixtures of block attention.
    chosen: attention over blocks that are chosen by other means.

  Example:
    >>> report = Report({"platform": "cpu", "device": "cpu"}, {})
    >>> report.as_dict()["rows"]
    []
  """

  machine: dict[str, Any]
  settings: dict[str, Any]
  rows: list[Row] = dataclasses.field(default_factory=list)
  refusals: list[Refusal] = dataclasses.field(default_factory=list)
  builds: list[Build] = dataclasses.field(default_factory=list)
  decodes: list[Decode] = dataclasses.field(default_factory=list)
  routed: list[Routed] = dataclasses.field(default_factory=list)
  chosen: list[Chosen] = dataclasses.field(default_factory=list)

  def as_dict(self) -> dict[str, Any]:
    """For JSON, with the ratios to each peer."""
    return {
      "machine": self.machine,
      "settings": self.settings,
      "rows": [
        row.as_dict()
        | ({"speed_over": ratios(row, self.rows)} if row.ours else {})
        for row in self.rows
      ],
      "mask_builds": [
        dataclasses.asdict(b) | {"share_of_causal_forward": b.share}
        for b in self.builds
      ],
      "decode": [d.as_dict() for d in self.decodes],
      "moba": [r.as_dict() for r in self.routed],
      "chosen": [c.as_dict() for c in self.chosen],
      "refusals": [dataclasses.asdict(r) for r in self.refusals],
    }

  def write(self, path: pathlib.Path) -> None:
    """Puts the JSON at `path`, whole or not at all.

    Example:
      >>> path = pathlib.Path("bench.json")
      >>> Report({}, {"quick": True}).write(path)
      >>> json.loads(path.read_text())["settings"]
      {'quick': True}
    """
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
    part.replace(path)

  @classmethod
  def read(cls, path: pathlib.Path) -> "Report":
    """What `write` left at `path`.

    Raises:
      ValueError: it isn't such a file.

    Example:
      >>> path = pathlib.Path("bench.json")
      >>> Report({"platform": "cpu"}, {}).write(path)
      >>> Report.read(path).machine
      {'platform': 'cpu'}
    """
    try:
      found = json.loads(path.read_text())
      return cls(
        found["machine"],
        found["settings"],
        [_fields(Row, one) for one in found["rows"]],
        [_fields(Refusal, one) for one in found["refusals"]],
        [_fields(Build, one) for one in found["mask_builds"]],
        [_fields(Decode, one) for one in found["decode"]],
        [_fields(Routed, one) for one in found.get("moba", ())],
        [_fields(Chosen, one) for one in found.get("chosen", ())],
      )
    except (KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
      raise ValueError(f"{path} is no bench.json: {error!r}") from error

  def where(self) -> str:
    """The hardware and versions, in a line."""
    m = self.machine
    copy = m["copy_bytes_per_second"] / 1e12
    return (
      f"{m['device']} ({m['platform']}), jax {m['jax']}, {m['backend']}, "
      f"copies at {copy:.3g} TB/s"
    )

  def lines(self) -> Iterator[str]:
    """What the table has no room for, a line each."""
    for b in self.builds:
      share = (
        "no causal forward pass to compare with"
        if b.share is None
        else f"{b.share:.1%} of the causal forward pass"
      )
      where = f"{b.case.label} {b.case.shape}"
      yield f"mask build, {where}: {b.ms:.3f} ms, {share}"
    rate = self.machine["copy_bytes_per_second"]
    yield from (d.line(rate) for d in self.decodes)
    for routed in self.routed:
      yield from routed.lines(self.rows, self.machine["device"])
    yield from (c.line() for c in self.chosen)
    for row in self.rows:
      if row.note:
        where = f"{row.case.label} {row.case.shape} {row.which}"
        yield f"{row.who}, {where}: {row.note}"


def _fields(kind, found: dict[str, Any]) -> Any:
  """An object of a dataclass, of those keys that are its fields."""
  given = {field.name: found[field.name] for field in dataclasses.fields(kind)}
  if given.get("case") is not None:
    given["case"] = Case(**given["case"])
  if "step" in given:
    given["step"] = Step(**given["step"])
  if "routing" in given:
    given["routing"] = Routing(**given["routing"])
  return kind(**given)


def table(report: Report, width: int = 150) -> str:
  """The rows as text: ours with their speed over each peer.

  Example:
    >>> case = Case("causal", 1, 8192, 16, 128)
    >>> rows = [Row("isthmus", True, case, "fwd", 1.0, peak_bytes=2**20)]
    >>> print(table(Report({}, {}, rows), width=80))
    case     shape               pass   who          ms    TF/s   MiB ...
    ...
    causal   B1 S8192 H16 D128   fwd    isthmus   1.000   274.9     1
  """
  import io

  from rich import box
  from rich.console import Console
  from rich.table import Table

  view = Table(box=box.SIMPLE, pad_edge=False)
  for name in ("case", "shape", "pass", "who"):
    view.add_column(name, no_wrap=True)
  for name in ("ms", "TF/s", "MiB", "first s"):
    view.add_column(name, justify="right", no_wrap=True)
  view.add_column("speed over each peer")
  key = lambda row: (*row.case.as_dict().values(), row.which)
  previous = None
  for row in ordered(report.rows):
    if previous is not None and key(row)[:-1] != previous[:-1]:
      view.add_section()
    previous = key(row)
    over = ratios(row, report.rows) if row.ours else {}
    view.add_row(
      row.case.label,
      row.case.shape,
      row.which,
      row.who,
      f"{row.ms:.3f}",
      f"{row.tflops:.4g}",
      "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
      "" if row.first_seconds is None else f"{row.first_seconds:.1f}",
      "  ".join(f"{who} {ratio:.2f}x" for who, ratio in over.items()),
      style="bold" if row.ours else None,
    )
  out = io.StringIO()
  Console(file=out, width=width).print(view)
  lines = out.getvalue().splitlines()
  return "\n".join(line.rstrip() for line in lines if line.strip())


def ordered(rows: list[Row]) -> list[Row]:
  """By case, then pass, then ours before peers; else as they came.

  Example:
    >>> case = Case("causal", 1, 8192, 16, 128)
    >>> rows = [Row("cudnn", False, case, "fwd", 1.0)]
    >>> rows += [Row("isthmus", True, case, which, 1.0)
    ...          for which in ("bwd", "fwd")]
    >>> [(row.which, row.who) for row in ordered(rows)]
    [('bwd', 'isthmus'), ('fwd', 'isthmus'), ('fwd', 'cudnn')]
  """
  cases = list(dict.fromkeys(row.case for row in rows))
  passes = list(dict.fromkeys(row.which for row in rows if row.ours))
  passes += [row.which for row in rows if row.which not in passes]
  return sorted(
    rows,
    key=lambda r: (cases.index(r.case), passes.index(r.which), not r.ours),
  )


def markdown(report: Report) -> str:
  """TF/s, a line for each case and pass, a column for each contender.

  The fastest of a line is bold, whoever it is.

  Example:
    >>> case = Case("causal", 1, 8192, 16, 128)
    >>> rows = [Row("isthmus", True, case, "fwd", 1.0)]
    >>> rows += [Row("cudnn", False, case, "fwd", 0.9)]
    >>> print(markdown(Report({}, {}, rows)))
    | case | density | shape | pass | isthmus | cudnn |
    |---|---|---|---|---|---|
    | causal | 0.500 | B1 S8192 H16 D128 | fwd | 275 | **305** |
  """
  rows = ordered(report.rows)
  names = list(dict.fromkeys(row.who for row in sorted(rows, key=_peer)))
  head = ["case", "density", "shape", "pass", *names]
  lines = [head, ["---"] * len(head)]
  for case, which in dict.fromkeys((row.case, row.which) for row in rows):
    found = {
      row.who: row.tflops
      for row in rows
      if (row.case, row.which) == (case, which)
    }
    best = max(found.values())
    texts = {
      who: f"**{rate:.0f}**" if rate == best else f"{rate:.0f}"
      for who, rate in found.items()
    }
    lines.append(
      [
        case.label,
        f"{case.density:.3f}",
        case.shape,
        which,
        *(texts.get(name, "") for name in names),
      ]
    )
  rule = "|" + "|".join(lines[1]) + "|"
  return "\n".join(
    rule if line is lines[1] else f"| {' | '.join(line)} |" for line in lines
  )


def _peer(row: Row) -> bool:
  return not row.ours
