"""Which implementation of an op runs: one contract for every kernel.

An op has several implementations: an XLA reference that runs everywhere, and
kernels that each take some devices, dtypes and arguments. A call chooses by

* `impl=None`: the order of the platform, or of `with prefer(...)`; the first
  that does not refuse runs;
* `impl="name"`: that one, or its reason;
* `impl=("a", "b")`: the first of these that does not refuse.

An implementation refuses by a cheap check on shapes and dtypes (`Impl.refuse`),
or by raising `NotImplementedError(reason)` while it is traced. Since the check
neither runs nor compiles anything, `Op.explain` can say beforehand who would
run and why the others would not.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

#: Every name an implementation may have, over all ops.
NAMES = ("xla", "chunked", "cudnn", "mosaic", "triton", "tpu")

# A user context is part of the key of jit's cache. A ContextVar is not, and
# would serve the trace that was made under another preference.
_preferred = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class Impl:
  """One implementation of an op.

  Attributes:
    name: what `impl=` calls it; one of `NAMES`.
    function: takes the op's arguments, or "module:function", imported when
      first used, so that what it needs stays optional.
    refuse: takes the op's arguments (arrays or ShapeDtypeStructs) and returns
      why this implementation can't take them, or None. It runs nothing.

  Example:
    >>> triple = Impl("xla", lambda x: 3 * x)
    >>> triple.load()(2)
    6
    >>> Impl("tpu", "nowhere:kernel").reason()
    "tpu: nowhere can't be imported: No module named 'nowhere'"
  """

  name: str
  function: Callable[..., Any] | str
  refuse: Callable[..., str | None] | None = None

  def __post_init__(self):
    if self.name not in NAMES:
      raise ValueError(
        f"implementation {self.name!r}{_nearest(self.name, NAMES)}"
      )

  def load(self) -> Callable[..., Any]:
    """The function itself; a failed import is a refusal."""
    if not isinstance(self.function, str):
      return self.function
    module, _, attribute = self.function.partition(":")
    try:
      return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
      raise NotImplementedError(
        f"{self.name}: {module} can't be imported: {error}"
      ) from error

  def reason(self, *args, **kwargs) -> str | None:
    """Why this implementation refuses these arguments, or None."""
    refused = self.refuse(*args, **kwargs) if self.refuse else None
    if refused is not None:
      return refused
    try:
      self.load()
    except NotImplementedError as error:
      return str(error)
    return None


@dataclasses.dataclass(frozen=True)
class Row:
  """What `explain` says of one implementation.

  Attributes:
    op: the op's name.
    case: what the arguments were, in words; empty if not given.
    name: the implementation's name.
    verdict: "runs" (it is the one), "could" (it comes later in the order, or
      is not in it), or "refuses".
    reason: why it refuses; empty otherwise.

  Example:
    >>> double = Op("double", (Impl("xla", lambda x: x + x),), {})
    >>> double.explain(3)
    [Row(op='double', case='', name='xla', verdict='runs', reason='')]
  """

  op: str
  case: str
  name: str
  verdict: Literal["runs", "could", "refuses"]
  reason: str


@dataclasses.dataclass(frozen=True)
class Op:
  """A named op, its implementations, and their order on each platform.

  Attributes:
    name: for messages.
    impls: the implementations.
    order: names to try, best first, by platform ("gpu", "tpu", "cpu"); a
      platform that is missing tries ("xla",).

  Example:
    >>> double = Op("double", (Impl("xla", lambda x: x + x),), {})
    >>> double(3)
    6
  """

  name: str
  impls: tuple[Impl, ...]
  order: Mapping[str, Sequence[str]]

  def __post_init__(self):
    for names in self.order.values():
      self._check(names)

  def __call__(
    self, *args: Any, impl: str | Sequence[str] | None = None, **kwargs: Any
  ) -> Any:
    """Runs the first implementation that takes the arguments.

    Raises:
      NotImplementedError: `impl` is a name, and it refuses.
      ExceptionGroup: every implementation of the order or sequence refuses.
      ValueError: `impl` holds a name that this op doesn't have.
    """
    errors = []
    table = {i.name: i for i in self.impls}
    for name in self.names(impl):
      one = table[name]
      try:
        refused = one.refuse(*args, **kwargs) if one.refuse else None
        if refused is not None:
          raise NotImplementedError(f"{self.name}: {name} refuses: {refused}")
        return one.load()(*args, **kwargs)
      except NotImplementedError as error:
        if isinstance(impl, str):
          raise
        errors.append(error)
    reasons = "; ".join(str(e) for e in errors)
    raise ExceptionGroup(
      f"{self.name}: no implementation takes these arguments ({reasons})",
      errors,
    )

  def names(self, impl: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """The names that a call with this `impl` tries, in order."""
    if impl is not None:
      names = (impl,) if isinstance(impl, str) else tuple(impl)
      if not names:
        raise ValueError(f"{self.name}: impl=() names no implementation")
      self._check(names)
      return names
    preferred = _preferred.value
    if preferred is None:
      return tuple(self.order.get(platform(), ("xla",)))
    # A preference is for every op: names that only other ops have are passed
    # over, unless nothing is left.
    known = {i.name for i in self.impls}
    names = tuple(n for n in preferred if n in known)
    if not names:
      self._check(preferred)
    return names

  def explain(
    self,
    *args: Any,
    impl: str | Sequence[str] | None = None,
    case: str = "",
    **kwargs: Any,
  ) -> list[Row]:
    """Which implementation would run, and why the others would not.

    Nothing is run or compiled. A kernel may still refuse when it is traced.

    Args:
      *args: what the op takes; ShapeDtypeStructs serve as arrays.
      impl: as in a call.
      case: words for `Row.case`.
      **kwargs: what the op takes.

    Returns:
      A row for each implementation, those of the order first. No row says
      "runs" if every implementation of the order refuses.
    """
    order = self.names(impl)
    table = {i.name: i for i in self.impls}
    rest = [n for n in table if n not in order]
    rows, found = [], False
    for name in (*order, *rest):
      reason = table[name].reason(*args, **kwargs)
      if reason is not None:
        verdict = "refuses"
      elif found or name in rest:
        verdict = "could"
      else:
        verdict, found = "runs", True
      rows.append(Row(self.name, case, name, verdict, reason or ""))
    return rows

  def _check(self, names: Sequence[str]) -> None:
    known = [i.name for i in self.impls]
    for name in names:
      if name not in known:
        raise ValueError(
          f"{self.name} has no implementation {name!r}{_nearest(name, known)}"
        )


def prefer(*names: str):
  """`with prefer("xla"):` sets the order of every op called without `impl`.

  jit knows of it: a function that was compiled under another preference is
  traced again.

  Raises:
    ValueError: a name that no op has.

  Example:
    >>> impls = (Impl("xla", lambda: "plain"), Impl("triton", lambda: "fast"))
    >>> op = Op("op", impls, {})
    >>> with prefer("triton"):
    ...   op()
    'fast'
  """
  if not names:
    raise ValueError("prefer() needs the name of an implementation")
  for name in names:
    if name not in NAMES:
      raise ValueError(
        f"no op has an implementation {name!r}{_nearest(name, NAMES)}"
      )
  return _preferred(names)


def platform() -> str:
  """The platform ops run on: "cpu", "gpu" or "tpu"; honours default_device.

  Example:
    >>> with jax.default_device(jax.devices("cpu")[0]):
    ...   platform()
    'cpu'
  """
  device = jax.config.jax_default_device
  if device is None:
    return jax.default_backend()
  return device if isinstance(device, str) else device.platform


def _nearest(name: str, names: Sequence[str]) -> str:
  near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
  if near:
    return f"; did you mean {near[0]!r}?"
  return f"; there are {', '.join(sorted(names))}"
