"""Tile sizes and pipeline depths of the Mosaic GPU kernels, by head width.

A rule of thumb, and before it the table of the device, if there is one: see
`isthmus.pallas.table`.
"""

import dataclasses
import functools
import pathlib
from typing import Any, TypeVar

from isthmus.pallas import table
from isthmus.pallas.flash.mosaic_backward import BackwardConfig
from isthmus.pallas.flash.mosaic_forward import ForwardConfig

_Config = TypeVar("_Config", ForwardConfig, BackwardConfig)


@dataclasses.dataclass(frozen=True)
class Configs:
  """One of each pass: the forward one, that for dq, that for dk and dv.

  Example:
    >>> Configs().queries
    BackwardConfig(block=64, stages=4)
  """

  forward: ForwardConfig = ForwardConfig()
  queries: BackwardConfig = BackwardConfig(64, 4)
  keys: BackwardConfig = BackwardConfig(64, 4)


def allowed(width: int) -> dict[str, tuple[Any, ...]]:
  """Values of each field that the kernels take.

  Stages are powers of two, for a remainder by 3 is slow. Sums of values wider
  than 64 don't fit into the registers of three warpgroups.

  Args:
    width: of heads, the wider of queries' and values'.

  Example:
    >>> allowed(64)["groups"], allowed(128)["groups"]
    ((2, 3), (2,))
  """
  return {
    "block_k": (64, 128),
    "block": (64, 128),
    "stages": (1, 2, 4),
    "ping_pong": (True, False),
    "groups": (2, 3) if width <= 64 else (2,),
  }


def configs(width: int, value_width: int) -> Configs:
  """What a call with these (padded) widths is compiled with.

  Args:
    width: of queries and keys.
    value_width: of values.

  Raises:
    ValueError: a table of this device that holds what no kernel takes.

  Example:
    >>> configs(64, 128).forward  # on a CPU, which has no table
    ForwardConfig(block_k=128, stages=2, ping_pong=True, groups=2)
  """
  return _configs(table.device_kind(), table.cached(), max(width, value_width))


@functools.cache
def _configs(kind: str, _cached: pathlib.Path, width: int) -> Configs:
  """Of the first table that names the width; files are read once."""
  for file, best in table.find(kind, "flash"):
    if str(width) in best:
      return parse(best[str(width)], width, f"{file}: best.{width}")
  return guess(width)


def guess(width: int) -> Configs:
  """What is good on one H100, where nothing was measured.

  Example:
    >>> guess(128).keys, guess(256).keys
    (BackwardConfig(block=64, stages=4), BackwardConfig(block=64, stages=1))
    >>> guess(64).forward
    ForwardConfig(block_k=128, stages=2, ping_pong=True, groups=3)
  """
  if width > 128:
    return Configs(
      ForwardConfig(64, 2), BackwardConfig(64, 1), BackwardConfig(64, 1)
    )
  return Configs(ForwardConfig(groups=max(allowed(width)["groups"])))


def parse(entry: Any, width: int, where: str) -> Configs:
  """Configs out of a table.

  Args:
    entry: {"forward": {"block_k": 128, ...}, "queries": ..., "keys": ...}.
    width: of heads, that the entry is for.
    where: file and field, for errors.

  Raises:
    ValueError: fields that are missing, unknown or out of range.

  Example:
    >>> backward = {"block": 64, "stages": 2}
    >>> forward = {
    ...   "block_k": 64,
    ...   "stages": 4,
    ...   "ping_pong": False,
    ...   "groups": 3,
    ... }
    >>> entry = {"forward": forward, "queries": backward, "keys": backward}
    >>> parse(entry, 64, "flash.json: best.64").forward
    ForwardConfig(block_k=64, stages=4, ping_pong=False, groups=3)
    >>> parse(entry, 128, "flash.json: best.128")
    Traceback (most recent call last):
    ValueError: flash.json: best.128.forward.groups is 3, not one of (2,)
  """
  names = tuple(field.name for field in dataclasses.fields(Configs))
  _check_names(entry, names, where)
  return Configs(
    forward=_parse(ForwardConfig, entry["forward"], width, f"{where}.forward"),
    queries=_parse(BackwardConfig, entry["queries"], width, f"{where}.queries"),
    keys=_parse(BackwardConfig, entry["keys"], width, f"{where}.keys"),
  )


def _parse(cls: type[_Config], entry: Any, width: int, where: str) -> _Config:
  names = tuple(field.name for field in dataclasses.fields(cls))
  _check_names(entry, names, where)
  for name in names:
    taken, value = allowed(width)[name], entry[name]
    if type(value) is not type(taken[0]) or value not in taken:
      raise ValueError(f"{where}.{name} is {value!r}, not one of {taken}")
  return cls(**entry)


def _check_names(entry, names, where) -> None:
  if not isinstance(entry, dict):
    raise ValueError(f"{where} is {entry!r}, not an object")
  for name in names:
    if name not in entry:
      raise ValueError(f"{where}.{name} is missing")
  for name in entry:
    if name not in names:
      raise ValueError(
        f"{where}.{name} is unknown; there are {', '.join(names)}"
      )
