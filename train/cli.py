"""The command line: run, list and show recipes, look at the machine."""

import argparse
import os
import pathlib
import signal
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version

COMMANDS = ("show", "doctor", "generate", "export", "table", "verify")


class _Parser(argparse.ArgumentParser):
  """Errors are one line, with the nearest option named."""

  def error(self, message):
    from isthmus.train.config import nearest

    unknown = message.partition("unrecognized arguments: ")[2].split()
    if unknown:
      options = [o for a in self._actions for o in a.option_strings]
      names = options if unknown[0].startswith("-") else COMMANDS
      message = f"unknown {unknown[0]!r}{nearest(unknown[0], names)}"
    self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status.

  0: done, or stopped by SIGTERM with everything saved. 1: the run failed.
  2: the command, the settings or the folder can't be used.

  Example:
    >>> main(["show", "quickstart"])
    quickstart: A byte-level language model on Python's own source
    ...
    0
  """
  if argv is None:  # a program of its own, not a call from a notebook
    argv = sys.argv[1:]
    # Python's handler may print a traceback while modules are imported; a run
    # brings a handler of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  argv = list(argv)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  command = argv[0] if argv and not argv[0].startswith("-") else "run"
  run = {
    "run": _run,
    "show": _show,
    "doctor": _doctor,
    "generate": _generate,
    "export": _export,
    "table": _table,
    "verify": _verify,
  }.get(command)
  if run is None:
    from isthmus.train.config import nearest

    return _refuse(f"no command {command!r}{nearest(command, COMMANDS)}")
  try:
    status = run(argv if command == "run" else argv[1:])
    sys.stdout.flush()
    return status
  except BrokenPipeError:  # `isthmus --list | head`
    # What is still buffered would raise once more when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except KeyboardInterrupt:
    return 128 + signal.SIGINT


def _refuse(text: str) -> int:
  print(f"isthmus: {text}", file=sys.stderr)
  return 2


def _run(argv: list[str]) -> int:
  parser = _Parser(
    prog="isthmus",
    allow_abbrev=False,
    description="Trains and measures block-structured deep learning.",
    epilog="Other commands: isthmus show NAME, isthmus doctor, "
    "isthmus generate --workdir DIR, isthmus export --workdir DIR FILE, "
    "isthmus table, isthmus verify NAME. "
    "A recipe given as path.py is Python code, and is run as such.",
  )
  parser.add_argument(
    "--config",
    default="quickstart",
    metavar="NAME|path.py[:VARIANT]",
    help="the recipe (default: quickstart)",
  )
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="a.b=VALUE",
    help="override a field of the job; may be given many times",
  )
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    metavar="DIR",
    help="folder of the run (default: runs/NAME); a run in it is resumed",
  )
  parser.add_argument(
    "--force",
    action="store_true",
    help="resume although the folder's run has other settings",
  )
  parser.add_argument("--list", action="store_true", help="list the recipes")
  parser.add_argument("--version", action="version", version=version("isthmus"))
  hosts = parser.add_argument_group("several processes")
  hosts.add_argument(
    "--distributed",
    action="store_true",
    help="find the other processes (SLURM, Kubernetes, Cloud TPU)",
  )
  hosts.add_argument("--coordinator", metavar="HOST:PORT")
  hosts.add_argument("--processes", type=int, metavar="N")
  hosts.add_argument("--process", type=int, metavar="I")
  args = parser.parse_args(argv)
  if args.list:
    return _list()

  from isthmus.train import config
  from isthmus.train.ckpt import CheckpointError
  from isthmus.train.loop import NonFiniteError
  from isthmus.train.workdir import WorkdirError

  try:
    _join(args)
    job = config.load(args.config, args.set)
    name = pathlib.Path(args.config.replace(":", "-")).name.replace(".py", "")
    workdir = args.workdir or pathlib.Path("runs") / name
    results = job.run(
      workdir,
      source={"config": args.config, "set": args.set},
      force=args.force,
    )
  except (config.ConfigError, WorkdirError) as error:
    return _refuse(str(error))
  except (CheckpointError, NonFiniteError) as error:
    print(f"isthmus: {error}", file=sys.stderr)
    return 1
  _print_results(results)
  return 0


def _join(args: argparse.Namespace) -> None:
  """Joins the other processes of the run, if it has any."""
  from isthmus.train import hosts
  from isthmus.train.config import ConfigError

  given = (args.coordinator, args.processes, args.process)
  if any(v is not None for v in given):
    if None in given or args.distributed:
      raise ConfigError(
        "--coordinator, --processes and --process are given together, and "
        "without --distributed"
      )
    hosts.join(*given)
  elif args.distributed:
    hosts.join_cluster()


def _print_results(results: dict[str, float]) -> None:
  import jax

  if jax.process_index() == 0:
    for name, value in results.items():
      print(f"{name} {value:.6g}")


def _list() -> int:
  from isthmus.train import recipe

  names = recipe.recipe_names()
  width = max(map(len, names))
  for name in names:
    print(f"{name:{width}s}  {recipe.read(name).title}")
  return 0


def _show(argv: list[str]) -> int:
  parser = _Parser(prog="isthmus show", description="A recipe's own words.")
  parser.add_argument("name")
  args = parser.parse_args(argv)
  from isthmus.train import recipe
  from isthmus.train.config import ConfigError

  try:
    found = recipe.read(args.name)
  except ConfigError as error:
    return _refuse(str(error))
  print(f"{found.name}: {found.title}")
  for field in recipe.FIELDS:
    print(f"  {field.lower():10s}  {found[field]}")
  print(f"  {'recipe':10s}  train/recipes/{found.name}.py")
  return 0


def _table(argv: list[str]) -> int:
  parser = _Parser(
    prog="isthmus table", description="The table of systems, in Markdown."
  )
  parser.add_argument(
    "--write", type=pathlib.Path, metavar="README.md", help="put it in there"
  )
  args = parser.parse_args(argv)
  from isthmus.train import recipe
  from isthmus.train.config import ConfigError

  if args.write is None:
    print(recipe.table())
    return 0
  try:
    recipe.write_table(args.write)
  except ConfigError as error:
    return _refuse(str(error))
  return 0


def _doctor(argv: list[str]) -> int:
  _Parser(
    prog="isthmus doctor",
    description="Devices, versions, and the kernel that each op would take.",
  ).parse_args(argv)
  from isthmus.train import doctor

  for line in doctor.report():
    print(line)
  return 0


def _generate(argv: list[str]) -> int:
  parser = _Parser(
    prog="isthmus generate",
    allow_abbrev=False,
    description="Samples text from the last good checkpoint of a run.",
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument(
    "--config",
    metavar="path.py[:VARIANT]",
    help="the recipe again, for a run of a recipe given by path: it is run",
  )
  parser.add_argument("--prompt", default="")
  parser.add_argument(
    "--set", action="append", default=[], metavar="NAME=VALUE"
  )
  args = parser.parse_args(argv)
  from isthmus.train import config, workdir
  from isthmus.train.ckpt import CheckpointError
  from isthmus.train.jobs import Fit, Generate

  try:
    saved = workdir.load(args.workdir)
    if "config" not in saved:
      raise workdir.WorkdirError(
        f"{args.workdir} was trained from Python, not from a recipe: call "
        "isthmus.train.jobs.Generate with its model and tokenizer"
      )
    if ".py" in saved["config"] and args.config is None:
      raise workdir.WorkdirError(
        f"{args.workdir} was made by the code in {saved['config']}, which "
        "would be run: read it, then give it as --config"
      )
    fit = config.load(args.config or saved["config"], saved.get("set", []))
    if not isinstance(fit, Fit) or not hasattr(fit.data, "tokenizer"):
      raise workdir.WorkdirError(f"{args.workdir} holds no model of text")
    job = Generate(
      model=fit.model, tokenizer=fit.data.tokenizer, prompt=args.prompt
    )
    config.override(job, args.set).run(args.workdir)
  except (config.ConfigError, workdir.WorkdirError, CheckpointError) as error:
    return _refuse(str(error))
  return 0


def _export(argv: list[str]) -> int:
  parser = _Parser(
    prog="isthmus export",
    allow_abbrev=False,
    description="Writes the parameters of a run as one safetensors file.",
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument(
    "--step", type=int, help="the checkpoint (default: the last good one)"
  )
  parser.add_argument("file", type=pathlib.Path, metavar="FILE.safetensors")
  args = parser.parse_args(argv)
  from isthmus.train import log, manifest
  from isthmus.train.ckpt import CheckpointError, restore_params
  from isthmus.train.export import export_safetensors

  try:
    folder = args.workdir / "ckpt"
    step, params = restore_params(folder, step=args.step)
    export_safetensors(args.file, params, metadata={"step": str(step)})
    leaves = manifest.read(folder / str(step), step=step)["leaves"]
    rest = ["/".join(x["path"]) for x in leaves if x["path"][0] == "mutables"]
    if rest:
      more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
      log.say(
        "warning: the model also holds what is no parameter, and is left out: "
        + ", ".join(rest[:3])
        + more
      )
  except CheckpointError as error:
    return _refuse(str(error))
  except OSError as error:
    return _refuse(f"{args.file}: {error.strerror or error}")
  print(f"step {step}: {args.file}")
  return 0


def _verify(argv: list[str]) -> int:
  parser = _Parser(
    prog="isthmus verify",
    allow_abbrev=False,
    description="Runs the checks that recipes commit to and compares the "
    "figures; exits with 1 if one is missed.",
  )
  parser.add_argument("names", nargs="+", metavar="NAME", help="recipes")
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    metavar="DIR",
    help="a new folder (default: runs/verify/TIME); NAME/verify.json in it",
  )
  args = parser.parse_args(argv)
  from isthmus.train import recipe, verify
  from isthmus.train.ckpt import CheckpointError
  from isthmus.train.config import ConfigError
  from isthmus.train.loop import NonFiniteError
  from isthmus.train.workdir import WorkdirError

  folder = args.workdir
  if folder is None:
    folder = pathlib.Path("runs/verify") / time.strftime("%Y%m%d-%H%M%S")
  try:
    for name in args.names:  # before the first of them runs for minutes
      verify.parse(name, recipe.read(name)["Check"])
    reports = [verify.verify(n, folder / n) for n in dict.fromkeys(args.names)]
  except (ConfigError, WorkdirError) as error:
    return _refuse(str(error))
  except (CheckpointError, NonFiniteError) as error:
    print(f"isthmus: {error}", file=sys.stderr)
    return 1
  for report in reports:
    for line in verify.lines(report):
      print(line)
    print(f"  {folder / report['recipe'] / 'verify.json'}")
  return 0 if all(report["ok"] for report in reports) else 1
