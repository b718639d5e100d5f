"""Feed-forward layers against their formulas."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

from isthmus.data.source import Arrays
from isthmus.nets import (
  GatedMlp,
  HourglassMlp,
  Mlp,
  MlpBlock,
  ResidualMlp,
  unstack_layers,
)
from isthmus.train.ckpt import Checkpointer
from isthmus.train.jobs import Fit
from isthmus.train.loop import Run
from isthmus.train.tasks.restore import Restore

X = jax.random.normal(jax.random.key(0), (2, 3, 8))


def kernels(params):
  return {name: p["kernel"] for name, p in params.items()}


def test_mlp_is_its_formula():
  model = Mlp(16)
  params = model.init(jax.random.key(1), X)["params"]
  w = kernels(params)
  expected = jax.nn.gelu(X @ w["up"]) @ w["down"]
  np.testing.assert_allclose(
    model.apply({"params": params}, X), expected, rtol=1e-5, atol=1e-6
  )


def test_gated_mlp_is_its_formula():
  model = GatedMlp(16)
  params = model.init(jax.random.key(1), X)["params"]
  assert {n: k.shape for n, k in kernels(params).items()} == {
    "gate": (8, 16),
    "up": (8, 16),
    "down": (16, 8),
  }

  def formula(params, x):
    w = kernels(params)
    return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]

  def ours(params, x):
    return model.apply({"params": params}, x)

  np.testing.assert_allclose(
    ours(params, X), formula(params, X), rtol=1e-5, atol=1e-6
  )
  a = jax.grad(lambda p, x: (ours(p, x) ** 2).sum(), argnums=(0, 1))(params, X)
  b = jax.grad(lambda p, x: (formula(p, x) ** 2).sum(), argnums=(0, 1))(
    params, X
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b
  )


@pytest.mark.parametrize("kind", [Mlp, GatedMlp])
def test_dtypes_initial_size_and_checks(kind):
  model = kind(1024, dtype=jnp.bfloat16, out_scale=0.25)
  x = jnp.ones((1, 1, 256))
  params = model.init(jax.random.key(1), x)["params"]
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
  assert model.apply({"params": params}, x).dtype == jnp.bfloat16
  w = kernels(params)
  np.testing.assert_allclose(w["up"].std(), 1 / 16, rtol=0.02)
  np.testing.assert_allclose(w["down"].std(), 0.25 / 32, rtol=0.02)
  with pytest.raises(ValueError, match="hidden is 0"):
    kind(0)


# --- residual stacks ---


def _apply(model, variables, x=X):
  return np.asarray(model.apply(variables, x))


def _norm(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def test_residual_mlp_is_its_formula_scanned_or_written_out():
  model = ResidualMlp(16, 3, activation=jax.nn.relu)
  variables = model.init(jax.random.key(1), X)
  flat = unstack_layers(variables["params"])["stack"]
  x = np.asarray(X)
  for i in range(3):
    block = jax.tree.map(np.asarray, flat[f"block_{i:02d}"])
    h = _norm(x, block["norm"]["scale"]) @ block["mlp"]["up"]["kernel"]
    x = x + np.maximum(h, 0) @ block["mlp"]["down"]["kernel"]
  np.testing.assert_allclose(_apply(model, variables), x, rtol=1e-4, atol=1e-5)
  plain = model.clone(scan=False)
  params = {"params": unstack_layers(variables["params"])}
  np.testing.assert_allclose(_apply(plain, params), x, rtol=1e-4, atol=1e-5)


def test_another_norm():
  model = MlpBlock(16, norm=nn.LayerNorm)
  variables = model.init(jax.random.key(1), X)
  assert set(variables["params"]["norm"]) == {"scale", "bias"}
  shifted = _apply(model, variables, X + 3.0) - 3.0
  np.testing.assert_allclose(shifted, _apply(model, variables), atol=1e-4)
  moved = MlpBlock(16).apply(
    {"params": {**variables["params"], "norm": {"scale": jnp.ones(8)}}}, X + 3.0
  )
  assert np.abs(np.asarray(moved) - 3.0 - shifted).max() > 0.1


def _hourglass(**changes):
  return HourglassMlp(**{"width": 24, "hidden": 4, "depth": 2, **changes})


def test_a_random_lift_is_a_key_and_nothing_else():
  model = _hourglass()
  variables = model.init(jax.random.key(1), X)
  assert set(variables) == {"params", "lift"}
  assert set(variables["params"]) == {"blocks", "readout"}
  key = variables["lift"]["key"]
  assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  # The same key lifts alike, another one doesn't.
  one = _apply(model, variables)
  np.testing.assert_array_equal(one, _apply(model, variables))
  other = {**variables, "lift": {"key": jax.random.key(5)}}
  assert np.abs(_apply(model, other) - one).max() > 0.1


def test_blocks_that_add_nothing_leave_readout_of_lift():
  model = _hourglass(width=64)
  variables = model.init(jax.random.key(1), X)
  params = jax.tree.map_with_path(
    lambda path, p: jnp.zeros_like(p) if "down" in str(path) else p,
    variables["params"],
  )
  lift = jax.random.normal(variables["lift"]["key"], (8, 64)) / np.sqrt(8)
  expected = np.asarray(X) @ lift @ params["readout"]["kernel"]
  out = _apply(model, {**variables, "params": params})
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
  assert np.abs(out - _apply(model, variables)).max() > 0.01


def test_identity_lift_and_readout_leave_a_conventional_stack():
  model = HourglassMlp(width=8, hidden=8, depth=2, lift="trained")
  params = model.init(jax.random.key(1), X)["params"]
  eye = {"kernel": jnp.eye(8)}
  params = {**params, "lift": eye, "readout": eye}
  np.testing.assert_allclose(
    _apply(model, {"params": params}),
    _apply(ResidualMlp(8, 2), {"params": params["blocks"]}),
    rtol=1e-5,
  )


@pytest.mark.parametrize("lift", ["random", "trained"])
def test_parameters_counted(lift):
  model = _hourglass(features=5, lift=lift)
  params = model.init(jax.random.key(1), X)["params"]
  count = sum(p.size for p in jax.tree.leaves(params))
  blocks = 2 * (2 * 24 * 4 + 24)  # two kernels and a norm's scale
  assert count == blocks + 24 * 5 + (8 * 24 if lift == "trained" else 0)


def test_hourglass_refused():
  with pytest.raises(ValueError, match="width is 7, below the input's 8"):
    _hourglass(width=7).init(jax.random.key(0), X)
  with pytest.raises(ValueError, match="width is 0"):
    _hourglass(width=0)
  # Under the tests' type checks the annotation refuses it first.
  refused = (ValueError, jaxtyping.TypeCheckError)
  with pytest.raises(refused, match="'frozen'"):
    _hourglass(lift="frozen")
  with pytest.raises(ValueError, match="hidden is 0"):
    _hourglass(hidden=0)
  with pytest.raises(ValueError, match="depth is 0"):
    ResidualMlp(8, 0)


class Rows(nn.Module):
  """The hourglass on the rows of images [b, y, x, 1]."""

  @nn.compact
  def __call__(self, image, *, train=False):
    return _hourglass(name="net")(image[..., 0], train=train)[..., None]


def _lift(state):
  return jax.random.key_data(state.mutables["lift"]["net"]["key"])


def test_a_random_lift_is_not_trained_and_is_saved_as_a_key(tmp_path):
  rng = np.random.default_rng(0)
  images = {"image": rng.random((16, 8, 8, 1)).astype(np.float32)}
  job = Fit(
    model=Rows(),
    task=Restore(),
    data=Arrays(train=images, eval=images),
    optimizer=optax.adam(1e-2),
    steps=3,
    batch_size=8,
  )
  run = Run(job)
  with jax.set_mesh(run.mesh):
    state = run.init()
    names = {str(p) for p, _ in jax.tree.leaves_with_path(state.opt_state)}
    assert names and not [n for n in names if "lift" in n]
    first = np.asarray(_lift(state))
    for _, batch in run.train.iterate(0, 3):
      state, _ = run.step(state, batch)
    np.testing.assert_array_equal(first, _lift(state))
    with Checkpointer(tmp_path) as ckpt:
      ckpt.save(3, state, wait=True)
      step, restored = ckpt.restore(run.target)
    assert step == 3
    a, b = (run.evaluate(s) for s in (state, restored))
  assert a == b and set(a) == {"loss", "psnr", "psnr_input"}
  manifest = json.loads((tmp_path / "3" / "MANIFEST.json").read_text())
  held = [leaf["path"] for leaf in manifest["leaves"]]
  # Nothing else of the lift is held, or saved.
  assert [path for path in held if "lift" in path] == [
    ["mutables", "lift", "net", "key"]
  ]
