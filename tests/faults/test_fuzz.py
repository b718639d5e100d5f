"""Nonsense: names, settings, recipes, and the files of a workdir.

Fault: 200 texts after --config, 200 after --set, 200 recipe files, and 200
each of config.json, metrics.jsonl and results.json, that are cut, flipped,
nested, huge, of another type, or not text at all.
Promised: refused in one line with exit 2 (a recipe's own error included), or
taken; never a traceback, never a hang. Nothing is deleted: a record or a
result that can't be read is left out with a warning, and the file as it was
is kept beside the new one.
"""

import json
import random
import shutil
import signal
import time

import pytest

from isthmus.train import config, log, workdir
from isthmus.train.jobs import Fit
from tests.faults.runs import one_line, told
from tests.train.child import TOY

SECONDS = 5  # for any one of them


@pytest.fixture(autouse=True)
def no_hang():
  """An alarm: the test that hangs fails at that line."""

  def late(*_):
    raise TimeoutError(f"{SECONDS} s")

  before = signal.signal(signal.SIGALRM, late)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


def _spoil(random_, text: bytes) -> bytes:
  """A text with a few slips, or something else altogether."""
  junk = [
    b"",
    b"\x00",
    b"\xff\xfe\x00",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"text"',
    b"{}",
    b"[" * 50_000,
    b'{"a":' * 20_000,
    b"9" * 5_000,
    b'{"resolved": 3}',
    b'{"resolved": {"model": 3}}',
    b'{"step": -1, "train/loss": "x"}',
    "é\u2028\n".encode() * 9,
  ]
  if random_.random() < 0.2:
    return random_.choice(junk)
  data = bytearray(text)
  for _ in range(random_.choice([1, 1, 2, 8])):
    at = random_.randrange(len(data) + 1)
    kind = random_.randrange(4)
    if kind == 0 and at < len(data):
      data[at] ^= 1 << random_.randrange(8)
    elif kind == 1:
      del data[at:]
    elif kind == 2:
      data[at:at] = random_.choice(junk[:9])
    else:
      del data[at : at + random_.randrange(20)]
    if not data:
      break
  return bytes(data)


# --- what is typed ---


def test_names_after_config(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  random_ = random.Random(0)
  known = ["quickstart", "quickstart:smoke", "quickstart:full", str(TOY)]
  odd = ["", ":", "::", ".py", "x.py", "/", "..", "~", "-", "\n", "a\nb.py"]
  odd += ["\0", "\0.py", "a" * 5000, "a" * 5000 + ".py", "é", "x.py:y.py"]
  odd += [str(tmp_path), f"{tmp_path}.py", "/dev/null", "/proc/self/mem.py"]
  odd += ["\ud800", "quickstart:\n", "%s", "{}", "os", "isthmus.train", "*"]
  taken = 0
  for i in range(200):
    name = random_.choice(odd if i % 3 == 0 else known)
    for _ in range(random_.choice([0, 1, 1, 2])):
      at = random_.randrange(len(name) + 1)
      slip = random_.choice([":", ".", "/", " ", "x", "\n", "\0", ".py", ""])
      name = name[:at] + slip + name[at + 1 :]
    signal.alarm(SECONDS)
    try:
      job = config.load(name)
    except config.ConfigError as error:
      assert len(str(error).splitlines()) <= 1, repr(name)
    else:
      assert isinstance(job, Fit), name
      taken += 1
  assert 5 < taken < 100, taken
  assert not list(tmp_path.iterdir())


def test_texts_after_set():
  """From names and values that are nearly right."""
  random_ = random.Random(0)
  job = config.load("quickstart:smoke")
  settings = config.flatten(job)
  names = [*settings, "", "x", ".", "model.", "..", "a.b.c", "rules"]
  values = ["0", "-1", "1", "3", "1e9", "1e-3", "nan", "inf", "None", "True"]
  values += ["", "abc", "(1, 2)", "[", "{}", "'", "b'x'", "1" * 5000]
  values += ["bfloat16", "float32", "linear", "lambda: 0", "__import__('os')"]
  values += ["((((", "é\0", "{'a': 1}", "...", "1j", "9" * 30, "-0.0"]
  values += ["(" * 300]
  made = 0
  for _ in range(200):
    name = random_.choice(names)
    value = random_.choice([*values, *[settings.get(name, "1")] * 8])
    if random_.random() < 0.3 and name:  # a slip of the finger
      at = random_.randrange(len(name))
      slip = random_.choice(["", "x", ".", "=", " "])
      name = name[:at] + slip + name[at + 1 :]
    item = name + random_.choice(["=", "=", "=", "=", "", "=="]) + value
    signal.alarm(SECONDS)
    try:
      new = config.override(job, [item])
    except config.ConfigError as error:
      assert "\n" not in str(error), item
    else:
      assert isinstance(new, Fit) and config.flatten(new), item
      made += 1
  assert 5 < made < 150, made


RECIPE = b"""
import dataclasses
from tests.train import toy

def get_config(variant="one"):
  job = toy.get_config()
  if variant != "one":
    raise ValueError(f"no variant {variant!r}")
  return dataclasses.replace(job, steps=2, batch_size=16, seed=3)
"""


def test_recipes(tmp_path):
  """Files that are nearly Python; what they raise is one line of ours."""
  random_ = random.Random(0)
  taken = 0
  for i in range(200):
    path = tmp_path / f"recipe{i}.py"
    text = RECIPE if i % 20 == 0 else _spoil(random_, RECIPE)
    if i % 10 == 5:
      text += random_.choice(
        [b"raise SystemExit(3)\n", b"raise Exception('a\\nb')\n", b"1 / 0\n"]
        + [b"get_config = 3\n", b"get_config = lambda v='': None\n"]
        + [b"get_config = lambda: 1 / 0\n", b"get_config = lambda: [][0]\n"]
        + [b"get_config = lambda: get_config()\n", b"def f(): f()\nf()\n"]
      )
    path.write_bytes(text)
    signal.alarm(SECONDS)
    try:
      job = config.load(str(path))
    except config.ConfigError as error:
      assert len(str(error).splitlines()) == 1, text
      assert str(path) in str(error), (text, error)
    else:
      assert isinstance(job, Fit)
      taken += 1
  assert 10 <= taken < 150, taken


# --- the files of a workdir ---


def test_config_json(whole, tmp_path):
  """Another text than a run wrote is compared, or refused."""
  random_ = random.Random(0)
  folder = tmp_path / "run"
  folder.mkdir()
  path, good = folder / "config.json", (whole / "config.json").read_bytes()
  job = config.load(str(TOY))
  refused = 0
  for i in range(200):
    text = good if i % 20 == 0 else _spoil(random_, good)
    path.write_bytes(text)
    signal.alarm(SECONDS)
    try:
      workdir.record(folder, job, source={"config": str(TOY)}, force=False)
    except (config.ConfigError, workdir.WorkdirError) as error:
      assert len(str(error).splitlines()) == 1, text
      assert str(folder) in str(error)
      assert path.read_bytes() == text  # as it was
      refused += 1
    else:  # what differed is not a setting of this job's
      assert workdir.load(folder)["resolved"] == config.flatten(job)
      assert [p.name for p in folder.iterdir()] == ["config.json"]
  assert 100 < refused < 200, refused


def test_metrics_jsonl(whole, tmp_path, capsys):
  random_ = random.Random(0)
  path, good = tmp_path / log.METRICS, (whole / log.METRICS).read_bytes()
  warned = 0
  for i in range(200):
    text = good if i % 20 == 0 else _spoil(random_, good)
    path.write_bytes(text)
    signal.alarm(SECONDS)
    writer = log.Writer(tmp_path, step=16)
    writer.write(17, {"loss": 1.0})
    writer.close()
    warning = capsys.readouterr().err
    if warning:
      assert len(warning.splitlines()) == 1 and "metrics.jsonl" in warning
      assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == text
      warned += 1
    for line in path.read_bytes().splitlines():
      assert isinstance(json.loads(line)["step"], int)
    assert list(log.read(tmp_path))[-1] == {"step": 17, "train/loss": 1.0}
    if i % 50 == 1:
      assert log.plot_losses(tmp_path, "whatever is left")
    shutil.rmtree(tmp_path / "tensorboard")
  assert 20 < warned < 200, warned


def test_results_json(whole, tmp_path, capsys):
  random_ = random.Random(0)
  path, good = tmp_path / log.RESULTS, (whole / log.RESULTS).read_bytes()
  aside = 0
  for i in range(200):
    text = good if i % 20 == 0 else _spoil(random_, good)
    path.write_bytes(text)
    signal.alarm(SECONDS)
    found = log.read_results(tmp_path)
    assert all(f"{value:.6g}" for value in found.values())
    if not found and text.strip() != b"{}":
      assert "results.json" in capsys.readouterr().err
      assert (tmp_path / "results.json.damaged").read_bytes() == text
      aside += 1
  assert 50 < aside < 200, aside


@pytest.mark.parametrize("name", ["config.json", log.METRICS, log.RESULTS])
def test_the_whole_command_on_a_spoilt_file(whole, tmp_path, name):
  """The finished run is run again, with one file of it spoilt."""
  random_ = random.Random(name)
  folder = shutil.copytree(whole, tmp_path / "run")
  spoilt = _spoil(random_, (whole / name).read_bytes()) + b"\n\xff\n"
  (folder / name).write_bytes(spoilt)
  before = {p.name for p in folder.iterdir()}
  began = time.perf_counter()
  status, out, err = told("--workdir", folder)
  assert time.perf_counter() - began < 30
  assert before <= {p.name for p in folder.iterdir()}
  if name == "config.json":
    assert status == 2 and "damaged" in one_line(err)
    assert (folder / name).read_bytes() == spoilt
  else:
    assert status == 0 and "Traceback" not in err
    assert (folder / f"{name}.damaged").read_bytes() == spoilt
    assert "step 16" in out and "eval/loss" in out
