"""The contract of `impl=`, of `prefer` and of `explain`."""

import jax
import jax.numpy as jnp
import pytest

from isthmus.pallas import dispatch
from isthmus.pallas.dispatch import Impl, Op, prefer


def refuse_long(x, **_):
  return f"{x.shape[0]} is too long" if x.shape[0] > 4 else None


def raise_odd(x):
  if x.shape[0] % 2:
    raise NotImplementedError("odd")
  return x * 0 + 2


OP = Op(
  "toy",
  (
    Impl("xla", lambda x: x * 0 + 1),
    Impl("triton", raise_odd),
    Impl("mosaic", lambda x: x * 0 + 3, refuse_long),
    Impl("tpu", "isthmus.pallas.absent:function"),
    Impl("cudnn", "math:floor"),
  ),
  {"cpu": ("mosaic", "xla")},
)


def ran(n, **kwargs):
  return int(OP(jnp.zeros(n, jnp.int32), **kwargs)[0])


def test_none_walks_the_order_of_the_platform():
  assert ran(4) == 3
  assert ran(5) == 1


def test_a_platform_without_an_order_takes_xla(monkeypatch):
  monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
  assert ran(4) == 1


def test_a_name_runs_or_raises_its_reason():
  assert ran(4, impl="mosaic") == 3
  with pytest.raises(NotImplementedError, match="5 is too long"):
    ran(5, impl="mosaic")
  with pytest.raises(NotImplementedError, match="odd"):
    ran(3, impl="triton")


def test_a_sequence_takes_the_first_that_does_not_refuse():
  assert ran(4, impl=("triton", "mosaic")) == 2
  assert ran(3, impl=("triton", "mosaic")) == 3
  assert ran(3, impl=["tpu", "mosaic"]) == 3


def test_all_refused_is_a_group_with_every_reason():
  with pytest.raises(ExceptionGroup, match="5 is too long") as group:
    ran(5, impl=("triton", "mosaic"))
  assert [str(e)[:3] for e in group.value.exceptions] == ["odd", "toy"]
  with pytest.raises(ExceptionGroup):
    ran(5, impl=("mosaic",))


def test_unknown_names_are_errors_with_the_nearest():
  with pytest.raises(ValueError, match="'mosiac'; did you mean 'mosaic'"):
    ran(4, impl="mosiac")
  with pytest.raises(ValueError, match="did you mean 'triton'"):
    ran(4, impl=("xla", "tritn"))
  with pytest.raises(ValueError, match="did you mean 'xla'"):
    prefer("xlaa")
  with pytest.raises(ValueError, match="there are"):
    Impl("zzz", abs)
  with pytest.raises(ValueError, match="no implementation 'tpu'"):
    Op("two", (Impl("xla", abs),), {"tpu": ("tpu", "xla")})
  with pytest.raises(ValueError, match="names no implementation"):
    ran(4, impl=())


def test_other_errors_pass_through():
  op = Op("bad", (Impl("xla", lambda x: x.absent),), {})
  with pytest.raises(AttributeError):
    op(1)


def test_strings_are_imported_on_first_use():
  assert OP(2.5, impl="cudnn") == 2
  with pytest.raises(NotImplementedError, match="absent can't be imported"):
    ran(4, impl="tpu")


def test_prefer_overrides_the_order_and_not_a_name():
  with prefer("xla"):
    assert ran(4) == 1
    assert ran(4, impl="mosaic") == 3
    with prefer("triton", "xla"):
      assert ran(4) == 2 and ran(3) == 1
    assert ran(4) == 1
  assert ran(4) == 3


def test_prefer_passes_over_names_of_other_ops():
  op = Op("one", (Impl("xla", lambda: 1),), {})
  with prefer("mosaic", "xla"):
    assert op() == 1
  with prefer("mosaic"), pytest.raises(ValueError, match="'mosaic'"):
    op()


def test_prefer_is_part_of_the_key_of_jit():
  traces = []

  @jax.jit
  def f(x):
    traces.append(1)
    return OP(x)

  x = jnp.zeros(4, jnp.int32)
  assert int(f(x)[0]) == 3
  with prefer("xla"):
    assert int(f(x)[0]) == 1
    assert int(f(x)[0]) == 1
  assert int(f(x)[0]) == 3
  assert len(traces) == 2


def test_explain_runs_nothing():
  def never(*_):
    raise AssertionError("ran")

  op = Op(
    "toy",
    (
      Impl("xla", never),
      Impl("mosaic", never, refuse_long),
      Impl("triton", never),
      Impl("tpu", "isthmus.pallas.absent:function"),
    ),
    {"cpu": ("mosaic", "tpu", "xla")},
  )

  def said(n, **kwargs):
    x = jax.ShapeDtypeStruct((n,), jnp.float32)
    rows = op.explain(x, case="a case", **kwargs)
    assert all(r.op == "toy" and r.case == "a case" for r in rows)
    assert all(bool(r.reason) == (r.verdict == "refuses") for r in rows)
    return [(r.name, r.verdict) for r in rows]

  assert said(4) == [
    ("mosaic", "runs"),
    ("tpu", "refuses"),
    ("xla", "could"),
    ("triton", "could"),
  ]
  assert said(5)[0] == ("mosaic", "refuses") and said(5)[2] == ("xla", "runs")
  assert said(5, impl="mosaic") == [
    ("mosaic", "refuses"),
    ("xla", "could"),
    ("triton", "could"),
    ("tpu", "refuses"),
  ]
  with prefer("triton"):
    assert said(4)[0] == ("triton", "runs")


def test_platform_honours_the_default_device():
  assert dispatch.platform() == "cpu"
  with jax.default_device(jax.devices("cpu")[1]):
    assert dispatch.platform() == "cpu"
  with jax.default_device("gpu"):
    assert dispatch.platform() == "gpu"
