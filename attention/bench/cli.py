"""The command: `python -m isthmus.attention.bench`."""

import argparse
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from isthmus.attention.bench.case import MASKS, PASSES, SPARSE, Case, grid, must

_HELP = """\
Times attention, forward and backward, beside whatever peers are installed.
TF/s count 4 b t s n d times the density of the mask; a backward pass counts
2.5 times that. Sparse cases have block lists of their own for each head.
With --chosen the grid of cases is left out, unless --cases names some."""
_LENGTHS = 4096, 8192, 16384, 32768, 65536, 131072
# Those of which speed is promised come first.
_LONG = 131072, 262144, 65536, 32768
_DIMS = 64, 128, 256


class _Parser(argparse.ArgumentParser):
  """Errors are one line."""

  def error(self, message):
    self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; the status: 0, 1 if ours failed, 2 if it can't be run.

  Example:
    >>> main("--cases causal --lengths 32 --dims 8 --hidden 16 --tokens 32"
    ...      " --impls xla --passes fwd --quick --no-decode".split())
    ... # on a CPU
    cpu (cpu), jax ...
    ...
    causal ... isthmus xla ...
    0
  """
  parser = _parser()
  options = parser.parse_args(argv)
  if options.show:
    return _show(options.show, parser)
  try:
    cases = _cases(options)
    peers = _peers(options)
    routed = _routed(options)
    chosen = _chosen(options)
  except ValueError as error:
    parser.error(str(error))
  # Torch's process needs some of the memory; without effect once a device is
  # in use.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  report = _start(options)
  print(report.where(), flush=True)
  if report.machine["compilation_cache"]:
    print("first-call seconds may come out of the compilation cache")
  if report.machine["platform"] != "gpu":
    print("no GPU here: these times say nothing about the GPU kernels")
  _choices(options, chosen, peers, report)
  if cases or routed:
    _measure(options, cases, routed, peers, report)
  _finish(options, report)
  failed = [r for r in report.refusals if r.ours and r.failed]
  found = report.routed or report.chosen or any(r.ours for r in report.rows)
  return 1 if failed or not found else 0


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    "python -m isthmus.attention.bench",
    description=_HELP,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--cases", type=_names, help=f"of {', '.join(MASKS)}; default: all")
  add("--sparse", action="store_true", help="the sparse cases alone")
  add("--lengths", type=_numbers, help="tokens of a row")
  add("--dims", type=_numbers, help="head widths")
  add("--tokens", type=int, default=32768, help="of a batch; at least a row")
  add("--hidden", type=int, default=2048, help="channels: heads times width")
  add("--passes", type=_names, default=tuple(PASSES))
  add(
    "--impls",
    type=_names,
    help="implementations of ours to time, by name; default: the best",
  )
  add(
    "--peers",
    nargs="?",
    type=_names,
    const=("all",),
    default=(),
    help="time peers too: all that are installed, or these names",
  )
  add(
    "--torch-seconds",
    type=float,
    default=480,
    help="after which torch's peers are given up",
  )
  add(
    "--must",
    action="store_true",
    help="the promised shapes alone: 32k and 8k tokens, D 128 and 64",
  )
  add("--quick", action="store_true", help="short rounds: rough figures")
  add(
    "--moba",
    type=_names,
    default=(),
    metavar="BLOCKxTOP_K",
    help="mixture of block attention too, at each length and width: 128x8",
  )
  add(
    "--chosen",
    type=_names,
    default=(),
    metavar="WAY[=LEVEL]",
    help="prefill over chosen blocks of drawn arrays, with the choice: of"
    " window, top-k, mass, antidiagonal, pbs, pbs-kv, unpermuted, proxy,"
    " proxy-kv, proxy-head",
  )
  add("--mass", type=float, default=0.9, help="of --chosen, level by default")
  add("--part", type=float, default=0.125, help="that of window and top-k")
  add("--heads", type=int, default=32, help="query heads of --chosen")
  add("--kv-heads", type=int, default=8, help="kv heads of --chosen")
  add("--seconds", type=float, help="after which --chosen begins nothing new")
  add("--batch", type=int, help="rows, whatever their tokens")
  add("--no-decode", action="store_true", help="leave out the decode steps")
  add(
    "--show",
    type=pathlib.Path,
    metavar="JSON",
    help="measure nothing: the tables of an earlier run, and its plot anew",
  )
  add("--out", type=pathlib.Path, help="folder for bench.json, bench.png")
  return parser


def _names(text: str) -> tuple[str, ...]:
  return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in _names(text))


def _cases(options) -> list[Case]:
  for name in options.passes:
    if name not in PASSES:
      raise ValueError(f"pass {name!r}; there are {', '.join(PASSES)}")
  if options.chosen and not (options.cases or options.sparse or options.must):
    return []
  masks = options.cases or (tuple(SPARSE) if options.sparse else MASKS)
  if options.must:
    wanted = options.cases or (tuple(SPARSE) if options.sparse else None)
    return [c for c in must() if wanted is None or c.mask in wanted]
  return grid(
    masks,
    options.lengths or _LENGTHS,
    options.dims or _DIMS,
    tokens=options.tokens,
    hidden=options.hidden,
    batch=options.batch,
  )


def _routed(options) -> list[Any]:
  """Problems of block routing, at the shapes of the grid."""
  from isthmus.attention.bench.routed import Routing, parse

  shapes = grid(
    ("causal",),
    options.lengths or _LENGTHS,
    options.dims or _DIMS,
    tokens=options.tokens,
    hidden=options.hidden,
    batch=options.batch,
  )
  return [
    Routing(*parse(text), c.batch, c.length, c.heads, c.width)
    for text in options.moba
    for c in shapes
  ]


def _chosen(options) -> list[tuple[str, float]]:
  """(way, level) of what is chosen; its sizes are checked."""
  from isthmus.attention.bench.chosen import parse
  from isthmus.attention.bench.drawn import check_sizes

  sizes = {"mass": options.mass, "share": options.part}
  found = [parse(text, **sizes) for text in options.chosen]
  if found:
    for width in options.dims or (128,):
      check_sizes(options.heads, options.kv_heads, width)
  return found


def _peers(options) -> tuple[list[Any], list[str]]:
  """(peers under JAX, names of those under torch)."""
  from isthmus.attention.bench.peers import JAX_PEERS
  from isthmus.attention.bench.torch_peers import TORCH_PEERS
  from isthmus.attention.sdpa import OP

  known = [*(p.name for p in JAX_PEERS), *TORCH_PEERS]
  peers = known if options.peers == ("all",) else options.peers
  for name in peers:
    if name not in known:
      raise ValueError(f"peer {name!r}; there are {', '.join(known)}")
  OP.names(options.impls)  # refuses what there is not
  return (
    [p for p in JAX_PEERS if p.name in peers],
    [name for name in TORCH_PEERS if name in peers],
  )


def _clock(options):
  from isthmus.attention.bench.clock import Clock

  return Clock(rounds=3, seconds=0.02) if options.quick else Clock()


def _start(options):
  from isthmus.attention.bench import run
  from isthmus.attention.bench.report import Report

  settings = {
    name: str(value) if isinstance(value, pathlib.Path) else value
    for name, value in vars(options).items()
  }
  if options.out:
    options.out.mkdir(parents=True, exist_ok=True)
  return Report(run.machine(_clock(options)), settings)


def _measure(options, cases, routed, peers, report) -> None:
  """Fills the report; after each case, what there is so far is written."""
  from isthmus.attention.bench import run, torch_peers
  from isthmus.attention.bench.rows import Refusal, Row

  clock = _clock(options)
  under_jax, under_torch = peers

  def take(found: Iterable[Row | Refusal]):
    for one in found:
      if isinstance(one, Row):
        report.rows.append(one)
        print(
          f"{one.case.label} {one.case.shape} {one.which} {one.who}: "
          f"{one.ms:.3f} ms, {one.tflops:.4g} TF/s",
          flush=True,
        )
      elif one not in report.refusals:
        report.refusals.append(one)
        print(one, flush=True)

  def keep():
    if options.out:
      report.write(options.out / "bench.json")

  missing = {p.name: p.absent() for p in under_jax}
  take(Refusal(name, why) for name, why in missing.items() if why)
  present = [p for p in under_jax if not missing[p.name]]
  for case in cases:
    ours = _ours(options, case)
    take(one for one in ours if isinstance(one, Refusal))
    ours = [one for one in ours if not isinstance(one, Refusal)]
    own = [p for p in present if not p.package]
    take(run.measure(case, [*ours, *own], options.passes, clock))
    if case.sparse:
      try:
        report.builds.append(run.mask_build(case, clock, report.rows))
      except Exception as error:
        take([Refusal.of("mask build", error, case, ours=True)])
    keep()
  take(_routes(options, routed, clock, report))
  keep()
  if not options.no_decode:
    take(_decodes(options, clock, report))
    keep()
  take(
    torch_peers.run(
      cases,
      options.passes,
      under_torch,
      limit=options.torch_seconds,
      quick=options.quick,
    )
  )
  keep()
  # Last: a fault in somebody's extension ends this process.
  others = [p for p in present if p.package]
  for case in cases if others else ():
    take(run.measure(case, others, options.passes, clock))
    keep()


def _choices(options, wanted, peers, report) -> None:
  """Chosen blocks, at every width; the JSON is written after each."""
  from isthmus.attention.bench import chosen

  for width in (options.dims or (128,)) if wanted else ():
    source = chosen.drawn(options.heads, options.kv_heads, width)
    for one in chosen.measure(
      {"drawn": source},
      wanted,
      options.lengths or _LONG,
      _clock(options),
      peers=[p.name for p in peers[0]] or ["cudnn"],
      seconds=options.seconds,
    ):
      if isinstance(one, chosen.Chosen):
        report.chosen.append(one)
        print(one.line(), flush=True)
      else:
        report.refusals.append(one)
        print(one, flush=True)
      if options.out:
        report.write(options.out / "bench.json")


def _ours(options, case) -> list[Any]:
  """Ours for a case, or why there is none."""
  from isthmus.attention.bench.peers import best, isthmus
  from isthmus.attention.bench.rows import Refusal

  try:
    return [isthmus(impl) for impl in options.impls or (best(case),)]
  except Exception as error:
    return [Refusal.of("isthmus", error, case, ours=True)]


def _routes(options, routed, clock, report) -> Iterator[Any]:
  from isthmus.attention.bench.routed import measure
  from isthmus.attention.bench.rows import Refusal

  for problem in routed:
    try:
      found = measure(problem, clock, options.passes)
    except Exception as error:
      yield Refusal.of(f"{problem.label} {problem.length}", error, ours=True)
      continue
    report.routed.append(found)
    for line in found.lines(report.rows, report.machine["device"]):
      print(line, flush=True)


def _decodes(options, clock, report) -> Iterator[Any]:
  from isthmus.attention.bench import decode
  from isthmus.attention.bench.rows import Refusal

  accelerator = report.machine["platform"] != "cpu"
  for batch, length in (
    ((1, 131072), (16, 32768)) if accelerator else ((1, 256),)
  ):
    step = decode.Step(batch, length, heads=32, kv_heads=8, width=128)
    try:
      report.decodes.append(decode.measure(step, clock))
    except Exception as error:
      yield Refusal.of(f"decode {batch} x {length}", error, ours=True)


def _show(path, parser) -> int:
  from isthmus.attention.bench.plot import plot
  from isthmus.attention.bench.report import Report, markdown

  try:
    report = Report.read(path)
  except (OSError, ValueError) as error:
    parser.error(str(error))
  print(report.where())
  _tell(report)
  if report.rows:
    print(f"\n{markdown(report)}")
  if report.rows:
    plot(report.rows, path.with_suffix(".png"), report.where())
  _view(report, path.parent)
  return 0


def _finish(options, report) -> None:
  from isthmus.attention.bench.plot import plot

  _tell(report)
  if options.out and report.rows:
    plot(report.rows, options.out / "bench.png", report.where())
    print(f"wrote bench.json and bench.png in {options.out}")
  if options.out:
    _view(report, options.out)


def _view(report, folder) -> None:
  """The table of chosen blocks, and its plot."""
  from isthmus.attention.bench import chosen_view

  if report.chosen:
    text = chosen_view.table(report.chosen)
    (folder / "chosen.md").write_text(f"{report.where()}\n\n{text}\n")
    chosen_view.plot(report.chosen, folder / "chosen.png", report.where())
    print(f"wrote chosen.md and chosen.png in {folder}")


def _tell(report) -> None:
  from isthmus.attention.bench.chosen_view import verdicts
  from isthmus.attention.bench.report import table

  print()
  if report.rows:
    print(table(report))
  for line in report.lines():
    print(line)
  for line in verdicts(report.chosen):
    print(line)
  for refusal in report.refusals:
    print(f"not measured: {refusal}")
