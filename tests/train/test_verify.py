"""A recipe's check: read, run again, compared."""

import dataclasses
import json
import subprocess

import pytest

from isthmus.train import cli, recipe, verify
from isthmus.train.config import ConfigError, load
from isthmus.train.verify import Figure, parse
from isthmus.train.workdir import WorkdirError

pytestmark = pytest.mark.once

GOOD = "smoke: eval/loss <= 6, eval/bits_per_byte = 7 +- 2; two CPU cores"


@pytest.fixture
def checked(monkeypatch):
  """Gives the recipe quickstart another check."""
  real = recipe.read

  def put(text):
    found = real("quickstart")
    changed = dataclasses.replace(found, fields={**found.fields, "Check": text})
    monkeypatch.setattr(
      recipe, "read", lambda name: changed if name == found.name else real(name)
    )

  return put


def test_parse():
  check = parse("x", "small: a/b = 1.5 +- 2e-1,\n c >= -3, d <= .5e1 ; one GPU")
  assert check.variant == "small" and check.hardware == "one GPU"
  assert check.figures == (
    Figure("a/b", "=", 1.5, 0.2),
    Figure("c", ">=", -3.0),
    Figure("d", "<=", 5.0),
  )


@pytest.mark.parametrize(
  "text",
  [
    "small",
    "small: a = 1; GPU",
    "small: a = 1 +- 1",
    "small: ; GPU",
    "a = 1 +- 1; GPU",
    "small: a = 1 +- x; GPU",
    "small: a > 1; GPU",
    "small: a = 1 +- 1 b = 2 +- 1; GPU",
  ],
)
def test_what_is_no_check(text):
  with pytest.raises(
    ConfigError, match=r"recipe x: Check .* is not of the form"
  ):
    parse("x", text)


def test_none():
  with pytest.raises(ConfigError, match="recipe x has no committed check"):
    parse("x", "none")


@pytest.mark.parametrize(
  ("figure", "good", "bad"),
  [
    (Figure("m", "=", 1.0, 0.1), (0.91, 1.09), (0.89, 1.11)),
    (Figure("m", ">=", 1.0), (1.0, 7.0), (0.99,)),
    (Figure("m", "<=", 1.0), (1.0, -7.0), (1.01,)),
  ],
)
def test_what_holds(figure, good, bad):
  assert all(map(figure.holds, good))
  assert not any(map(figure.holds, bad))
  assert not any(
    map(figure.holds, (None, float("nan"), float("inf"), -float("inf")))
  )


def test_checks_of_recipes_name_what_there_is():
  """A variant that exists, and where it was measured."""
  found = 0
  for name in recipe.recipe_names():
    text = recipe.read(name)["Check"]
    if text != "none":
      check = parse(name, text)
      load(f"{name}:{check.variant}")
      assert check.figures and check.hardware
      found += 1
  assert found


def test_verify_writes_what_was_found(checked, tmp_path, capsys):
  checked(GOOD)
  assert cli.main(["verify", "quickstart", "--workdir", str(tmp_path)]) == 0
  out = capsys.readouterr().out
  assert "quickstart:smoke verified" in out and "MISS" not in out
  folder = tmp_path / "quickstart"
  report = json.loads((folder / "verify.json").read_text())
  assert report["ok"] and report["variant"] == "smoke"
  results = json.loads((folder / "results.json").read_text())
  assert [f["measured"] for f in report["figures"]] == [
    results["eval/loss"],
    results["eval/bits_per_byte"],
  ]
  assert report["hardware"]["device"] == "cpu"
  assert report["versions"]["jax"] and report["settings"]["steps"] == "8"
  head = subprocess.run(
    ["git", "rev-parse", "HEAD"], capture_output=True, text=True
  ).stdout.strip()
  assert report["commit"].removesuffix("+changes") == head != ""


@pytest.mark.parametrize(
  "text",
  [
    "smoke: eval/loss <= 0.5; nowhere",
    "smoke: eval/loss <= 6, no/such/metric >= 0; nowhere",
  ],
)
def test_a_miss_is_told_and_fails(checked, tmp_path, capsys, text):
  checked(text)
  assert cli.main(["verify", "quickstart", "--workdir", str(tmp_path)]) == 1
  out = capsys.readouterr().out
  assert "NOT verified" in out and out.count("MISS") == 1
  report = json.loads((tmp_path / "quickstart" / "verify.json").read_text())
  assert not report["ok"]


def test_an_old_run_is_not_taken_for_a_new_one(checked, tmp_path, capsys):
  checked(GOOD)
  (tmp_path / "quickstart").mkdir()
  (tmp_path / "quickstart" / "results.json").write_text("{}")
  with pytest.raises(WorkdirError, match="is not empty"):
    verify.verify("quickstart", tmp_path / "quickstart")
  assert cli.main(["verify", "quickstart", "--workdir", str(tmp_path)]) == 2
  assert "is not empty" in capsys.readouterr().err


def test_refused_before_anything_runs(checked, tmp_path, capsys):
  checked("none")
  for names, said in (
    (["quickstart"], "has no committed check"),
    (["quickstarf"], "did you mean 'quickstart'?"),
  ):
    assert cli.main(["verify", *names, "--workdir", str(tmp_path / "x")]) == 2
    assert said in capsys.readouterr().err
  assert not (tmp_path / "x").exists()


def test_commit_is_none_outside_a_checkout(tmp_path):
  assert verify.commit(tmp_path) is None
