"""Which configs a call gets: of a table, or by the rule of thumb."""

import copy
import dataclasses
import json

import jax
import pytest

from isthmus.pallas import table
from isthmus.pallas.compat import has_mosaic

if not has_mosaic():
  pytest.skip("needs jax 0.11", allow_module_level=True)

from isthmus.pallas.flash import configs as module
from isthmus.pallas.flash.configs import configs, guess, parse
from isthmus.pallas.flash.mosaic_backward import BackwardConfig
from isthmus.pallas.flash.mosaic_forward import ForwardConfig
from tests.pallas.flash.hopper import Call, lowered, shapes

pytestmark = pytest.mark.once

ENTRY = {
  "forward": {"block_k": 64, "stages": 4, "ping_pong": False, "groups": 2},
  "queries": {"block": 128, "stages": 1},
  "keys": {"block": 64, "stages": 2},
}


@pytest.fixture
def files(tmp_path, monkeypatch):
  """Writers of the packaged table and of the user's."""
  packaged, cache = tmp_path / "tables", tmp_path / "cache"
  monkeypatch.setattr(table, "PACKAGED", packaged)
  monkeypatch.setattr(table, "device_kind", lambda: "Abacus")
  monkeypatch.setenv("ISTHMUS_CACHE", str(cache))
  module._configs.cache_clear()
  yield lambda best: write(packaged, best), lambda best: write(cache, best)
  module._configs.cache_clear()


def write(folder, best):
  folder = folder if folder.name == "tables" else folder / "tables"
  file = table.place(folder, "Abacus", "flash")
  file.parent.mkdir(parents=True)
  file.write_text(json.dumps({"best": best}))
  return file


def test_rule_of_thumb_without_a_table(files):
  for width in (64, 128, 192, 256):
    assert configs(width, 64) == guess(width)
  assert guess(64) != guess(128) != guess(192) == guess(256)


def test_the_wider_of_both_widths_is_looked_up(files):
  files[0]({"128": ENTRY})
  found = parse(ENTRY, 128, "")
  assert found.forward == ForwardConfig(64, 4, ping_pong=False)
  assert found.queries == BackwardConfig(128, 1)
  assert found.keys == BackwardConfig(64, 2)
  assert configs(64, 128) == configs(128, 64) == configs(128, 128) == found
  assert configs(64, 64) == guess(64) != found
  assert configs(256, 128) == guess(256)


def test_the_users_table_overrides_the_widths_it_has(files):
  other = copy.deepcopy(ENTRY)
  other["keys"]["stages"] = 1
  files[0]({"64": ENTRY, "128": ENTRY})
  files[1]({"64": other})
  assert configs(64, 64) == parse(other, 64, "") != parse(ENTRY, 64, "")
  assert configs(128, 128) == parse(ENTRY, 128, "")


def test_files_are_read_once(files):
  file = files[0]({"64": ENTRY})
  assert configs(64, 64) == parse(ENTRY, 64, "")
  file.unlink()
  assert configs(64, 64) == parse(ENTRY, 64, "")


@pytest.mark.parametrize(
  "path, value, said",
  [
    (("forward", "block_k"), 96, ".forward.block_k is 96, not one of (64, "),
    (("forward", "ping_pong"), 1, ".forward.ping_pong is 1, not one of (True"),
    (("forward", "groups"), 4, ".forward.groups is 4, not one of (2, 3)"),
    (("forward", "groups"), None, ".forward.groups is missing"),
    (("keys", "stages"), 3, ".keys.stages is 3, not one of (1, 2, 4)"),
    (("keys", "stages"), True, ".keys.stages is True, not one of"),
    (("keys", "stages"), 2.0, ".keys.stages is 2.0, not one of"),
    (("keys", "stages"), "2", ".keys.stages is '2', not one of"),
    (("queries",), [1], ".queries is [1], not an object"),
    (("queries", "steps"), 1, ".queries.steps is unknown; there are block, "),
    (("extra",), {}, ".extra is unknown; there are forward, queries, keys"),
    (("forward",), None, ".forward is missing"),
    (("queries", "block"), None, ".queries.block is missing"),
  ],
)
def test_what_no_kernel_takes_is_one_line(files, path, value, said):
  """It names the file and the field."""
  entry = copy.deepcopy(ENTRY)
  inner = entry
  for name in path[:-1]:
    inner = inner[name]
  if value is None:
    del inner[path[-1]]
  else:
    inner[path[-1]] = value
  file = files[1]({"64": entry})
  with pytest.raises(ValueError) as caught:
    configs(64, 64)
  message = str(caught.value)
  assert message.startswith(f"{file}: best.64{said}"), message
  assert "\n" not in message


def test_three_warpgroups_are_for_narrow_heads(files):
  entry = copy.deepcopy(ENTRY)
  entry["forward"]["groups"] = 3
  file = files[1]({"64": entry, "128": entry})
  assert configs(64, 64).forward == ForwardConfig(64, 4, False, 3)
  with pytest.raises(ValueError) as caught:
    configs(64, 128)
  said = f"{file}: best.128.forward.groups is 3, not one of (2,)"
  assert str(caught.value) == said


def test_packaged_tables_hold_what_kernels_take():
  """Every one in the package, and the rule of thumb."""
  for file in table.PACKAGED.glob("*/flash.json"):
    best = json.loads(file.read_text())["best"]
    assert best
    for width, entry in best.items():
      assert int(width) in (64, 128, 192, 256)
      parse(entry, int(width), f"{file}: best.{width}")
  for width in (64, 128, 192, 256):
    found = guess(width)
    assert parse(dataclasses.asdict(found), width, "") == found


@pytest.mark.parametrize(
  "file", sorted(table.PACKAGED.glob("*/flash.json")), ids=lambda f: f.parent
)
def test_packaged_tables_fit_where_values_have_another_width(file, monkeypatch):
  """Shared memory is counted while lowering."""
  found = json.loads(file.read_text())
  monkeypatch.setattr(table, "device_kind", lambda: found["device"])
  for widths in ((64, 64), (64, 128), (128, 64), (192, 192), (256, 256)):
    call = Call((256, 256), widths=widths)

    def gradients(args, do, dlse, call=call):
      return jax.vjp(call.function(), *args)[1]((do, dlse))

    width = max(widths)
    entry = found["best"].get(str(width))
    want = parse(entry, width, "") if entry else guess(width)
    assert configs(*widths) == want
    assert "flash_backward_dq" in lowered(gradients, *shapes(call))[1]
