"""Rings beside one device: what is measured, sent, refused and written."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from isthmus.attention.bench import rings
from isthmus.attention.bench.case import Case
from isthmus.attention.bench.clock import Clock
from isthmus.attention.bench.rings import Ring, main, measure, sends, table
from isthmus.attention.schedule import SCHEDULES, messages
from isthmus.train.rings import Rings, place

pytestmark = pytest.mark.once
ONCE = Clock(slow=0.0)  # several calls at once may wait for each other


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_sent_alone_is_what_the_schedule_sends(schedule):
  """The program's collectives carry the bytes of the model, and no more."""
  mesh = Mesh(np.asarray(jax.devices()[:4]), "seq")
  sent = messages(
    schedule, 4, q_heads=4, kv_heads=4, q_length=32, width=16, dtype="float32"
  )
  run, x = sends(sent, mesh, jnp.float32)
  text = jax.jit(run).lower(x).as_text()
  # Operands of the collectives, in numbers of a device.
  found = re.findall(
    r"stablehlo\.(collective_permute|all_gather|all_to_all)\"?\(.*?:"
    r" \(tensor<(\d+)xf32>",
    text,
  )
  leaves = {
    "collective_permute": lambda n: n,
    "all_gather": lambda n: 3 * n,
    "all_to_all": lambda n: n * 3 // 4,
  }
  assert sum(4 * leaves[kind](int(n)) for kind, n in found) == sum(
    m.bytes for m in sent
  )
  assert np.isfinite(np.asarray(jax.jit(run)(x))).all()


def test_rings_are_measured_beside_one_device(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(rings, "Clock", lambda **_: ONCE)
  argv = "--lengths 64 --heads 3/3 --dim 8 --devices 2 --dtype float32"
  some = ["--schedules", "kv_ring,ulysses", "--passes", "fwd"]
  assert main([*argv.split(), *some, "--out", str(tmp_path)]) == 0
  said = capsys.readouterr().out
  assert "ulysses gives each of 2 devices some heads" in said
  report = json.loads((tmp_path / "rings.json").read_text())
  alone, ring = report["rows"]
  assert (alone["devices"], ring["devices"]) == (1, 2)
  assert ring["sent_ms"] > 0 and ring["ms"] > 0 and alone["sent_ms"] is None
  assert sum(ring["sent_bytes"]) == 2 * 32 * 3 * 8 * 4  # k and v, once
  assert len(report["refused"]) == 1

  # The recipe takes the file, and its rows are those of its job.
  job = Rings(
    length=64,
    devices=(2,),
    heads=3,
    groups=(1,),
    head_dim=8,
    dtype="float32",
    which="fwd",
    measured=str(tmp_path / "rings.json"),
  )
  placed, left_out = place(job.points(), job.read())
  assert left_out == 0
  assert {p.schedule: p.measured for p in placed}["kv_ring"] == pytest.approx(
    ring["ms"] / 1e3
  )


def test_a_pass_gives_the_gradients_of_one_device():
  mesh = Mesh(np.asarray(jax.devices()[:1]), "seq")
  case = Case("causal", 1, 32, 4, 8)
  q, k, v, do = rings.arrays(case, 2, mesh, jnp.float32)
  attend = lambda q, k, v: rings.attention(q, k, v, causal=True)
  o, *grads = rings.function("fwd+bwd", attend)(q, k, v, do)
  wanted = jax.grad(lambda *x: (attend(*x) * do).sum(), (0, 1, 2))(q, k, v)
  np.testing.assert_allclose(o, attend(q, k, v), rtol=1e-5, atol=1e-5)
  for mine, other in zip(grads, wanted, strict=True):
    np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_throughput_is_over_one_device_of_the_same_problem():
  case = Case("causal", 1, 1024, 8, 64)
  found = [
    Ring(case, 1, 1, "", True, "fwd", 1.0),
    Ring(case, 1, 1, "", True, "fwd+bwd", 4.0),
    Ring(case, 1, 2, "kv_ring", True, "fwd", 0.5, 0.1, (8, 0), 1),
    Ring(case, 1, 2, "token_ring", False, "fwd+bwd", 2.5, 0.2, (8, 8), 2),
    Ring(case, 2, 2, "kv_ring", True, "fwd", 0.5, 0.1, (8, 0), 1),
  ]
  *_, kv, token, unknown = table(found).splitlines()
  assert "| **kv_ring** | 0.500 | 2.00 | 0.100 | 1 |" in kv
  assert "| token_ring | 2.500 | 1.60 | 0.200 | 2 |" in token
  assert "| unknown |" in unknown


@pytest.mark.parametrize(
  "argv, said",
  [
    ("--heads 3/2", "3 query heads and 2 kv heads don't fit"),
    ("--schedules ring", "'ring'; there are kv_ring"),
    ("--devices 99", "this machine has 8"),
  ],
)
def test_what_can_not_be_measured_is_refused(argv, said, capsys):
  with pytest.raises(SystemExit) as error:
    main(argv.split())
  assert error.value.code == 2 and said in capsys.readouterr().err


def test_out_of_memory_is_a_line(monkeypatch):
  def full(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

  monkeypatch.setattr(rings, "build", full)
  sizes = dict(clock=ONCE, devices=1, passes=["fwd"], dtype=jnp.float32)
  assert list(measure(16, 2, 1, 8, **sizes)) == [
    "one device, 16 tokens, fwd: out of memory"
  ]
