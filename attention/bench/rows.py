"""What a run finds: rows of measurements, and what was refused."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from isthmus.attention.bench.case import Case


@dataclasses.dataclass(frozen=True)
class Row:
  """One measurement.

  Attributes:
    who: the contender.
    ours: whether it is an implementation of isthmus.
    case: the problem.
    which: the pass; one of `PASSES`.
    ms: milliseconds of a call.
    peak_bytes: arguments, results and temporaries; None if unknown.
    temp_bytes: temporaries alone; None if unknown.
    first_seconds: tracing and compiling (a peer under torch: its first call).
    kernels: custom calls of the program, with their number.
    note: what else to know, such as a forward kernel in a backward program.

  Example:
    >>> case = Case("causal", 1, 8192, 16, 128)
    >>> row = Row("cudnn", False, case, "fwd", ms=0.5)
    >>> f"{row.tflops:.1f}"
    '549.8'
  """

  who: str
  ours: bool
  case: Case
  which: str
  ms: float
  peak_bytes: int | None = None
  temp_bytes: int | None = None
  first_seconds: float | None = None
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)
  note: str = ""

  @property
  def tflops(self) -> float:
    """Counted TF/s: see `Case.flops`."""
    return self.case.flops(self.which) / self.ms / 1e9

  def as_dict(self) -> dict[str, Any]:
    """For JSON; what follows from the rest (density, TF/s) is there too."""
    found = dataclasses.asdict(self)
    return found | {"density": self.case.density, "tflops": self.tflops}


@dataclasses.dataclass(frozen=True)
class Refusal:
  """A contender that was asked for and did not run.

  Attributes:
    who: the contender.
    reason: in a line.
    case: the problem, or None for all of them.
    which: the pass, or None for all of them.
    ours: whether it is an implementation of isthmus.
    failed: it should have run: an error, not a limit that it has.

  Example:
    >>> print(Refusal("fa4", "flash_attn isn't installed"))
    fa4: flash_attn isn't installed
  """

  who: str
  reason: str
  case: Case | None = None
  which: str | None = None
  ours: bool = False
  failed: bool = False

  def __str__(self):
    at = f", {self.case.label} {self.case.shape}" if self.case else ""
    which = f" {self.which}" if self.which else ""
    return f"{self.who}{at}{which}: {self.reason}"

  @classmethod
  def of(
    cls, who: str, error: BaseException, case=None, which=None, *, ours=False
  ) -> "Refusal":
    """What an exception says, in a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    expected = isinstance(error, NotImplementedError)
    if not expected:
      text = f"{type(error).__name__}: {text}"
    return cls(who, text[:300], case, which, ours, failed=not expected)


def ratios(row: Row, rows: Iterable[Row]) -> dict[str, float]:
  """How fast `row` is over each peer of its case and pass; above 1 is faster.

  Example:
    >>> case = Case("causal", 1, 8192, 16, 128)
    >>> ours = Row("isthmus", True, case, "fwd", ms=1.0)
    >>> ratios(ours, [ours, Row("cudnn", False, case, "fwd", ms=0.9)])
    {'cudnn': 0.9}
  """
  return {
    other.who: other.ms / row.ms
    for other in rows
    if not other.ours and (other.case, other.which) == (row.case, row.which)
  }
