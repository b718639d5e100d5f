"""The step on TPUs: interpreted on a CPU, lowered, refused elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.pallas.compat import interpreted
from isthmus.pallas.quant8 import step, tpu
from isthmus.pallas.quant8.api import zeros
from tests.pallas.quant8.test_mosaic import CASES, case, equals_the_reference

MORE = {
  # The last program has fewer lines than the others.
  "lines that don't divide": {"shape": (3, 65536), "block": 512},
  "few lines": {"shape": (3, 4096), "block": 4096},
}


@pytest.mark.once
@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_equals_the_reference(name):
  with interpreted("tpu"):
    assert equals_the_reference(case(**(CASES | MORE)[name]), impl="tpu")


def test_one_case_of_any_jax():
  with interpreted("tpu"):
    assert equals_the_reference(case(), impl="tpu")


@pytest.mark.once
def test_a_block_with_nan_is_nan_and_its_neighbours_are_not():
  g, m, v, rates, p = case()
  bad = g.at[0, 5].set(jnp.nan)
  with interpreted("tpu"):
    _, m1, v1 = step.adam(bad, m, v, rates, p, impl="tpu")
  for q in (m1, v1):
    assert np.isnan(q.absmax[0, 0]) and np.isfinite(q.absmax[0, 1:]).all()
    assert np.isfinite(q.absmax[1:]).all()


@pytest.mark.once
@pytest.mark.parametrize("name", ["roots", "updates", "bfloat16", "few lines"])
def test_it_is_in_the_program_once_and_writes_in_place(name):
  g, m, v, given, p = case(**(CASES | MORE)[name])
  f = jax.jit(lambda g, m, v, p: tpu.adam(g, m, v, given, p))
  text = f.trace(g, m, v, p).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("@tpu_custom_call") == 1
  # Codes and scales of both moments, and parameters.
  aliases = text.count("#stablehlo.output_operand_alias<")
  assert aliases == (4 if p is None else 5)


@pytest.mark.once
@pytest.mark.parametrize(
  "how, said",
  [
    ({}, None),
    ({"block": 4096, "shape": (1, 4096)}, None),
    ({"block": 64}, "it takes blocks of multiples of 128 up to 4096, not 64"),
    ({"block": 8192, "shape": (1, 8192)}, "it takes blocks of multiples"),
    ({"shape": (8, 300)}, "it takes whole blocks of 256, not 300"),
    ({"axis": -2, "shape": (512, 8)}, "it takes blocks along the last axis"),
    ({"shape": (0, 256)}, "it takes no empty arrays"),
  ],
)
def test_what_is_refused(how, said):
  with interpreted("tpu"):
    found = tpu.refuse(*case(**how))
  assert found == said or (said and found.startswith(said))


@pytest.mark.once
def test_a_machine_without_a_tpu_is_refused(monkeypatch):
  args = case()
  said = "it needs a TPU, and the platform is cpu"
  assert tpu.refuse(*args) == said
  with pytest.raises(NotImplementedError, match=said):
    step.adam(*args, impl="tpu")
  monkeypatch.setattr(tpu, "platform", lambda: "tpu")
  assert tpu.refuse(*args) is None


@pytest.mark.once
def test_it_writes_where_it_reads():
  g, m = jnp.ones((16, 512)), zeros((16, 512))
  with interpreted("tpu"):
    assert step.in_place(g, m, m, impl="tpu")
  assert not step.in_place(g, m, m, impl="xla")
