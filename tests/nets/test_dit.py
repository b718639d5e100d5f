"""The DiT: names, formulas, the start, conditions, and states of layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention import attention, rettention
from isthmus.nets import stack_layers, unstack_layers
from isthmus.nets.dit import DiT, from_patches, place_features, time_features
from isthmus.nets.vision.vit import patches
from tests.nets.suite import distance, jit
from tests.nets.vision.test_vit import equations, names

SIZES = {
  "size": (4, 6),
  "patch": 2,
  "width": 16,
  "depth": 3,
  "num_heads": 2,
  "classes": 7,
}
X = jax.random.normal(jax.random.key(1), (5, 4, 6, 3))
T = jnp.linspace(0.1, 1.0, 5)
LABEL = jnp.array([0, 6, 3, 7, 1])


@functools.cache
def shared():
  model = DiT(**SIZES)
  variables = jax.eval_shape(model.init, jax.random.key(0), X, T)
  rng = np.random.default_rng(2)  # no parameter is 0, no two alike
  return model, jax.tree.map(
    lambda x: jnp.asarray(
      rng.normal(0, (x.shape[-2] if x.ndim > 1 else 4) ** -0.5, x.shape),
      x.dtype,
    ),
    variables,
  )


@functools.partial(jit, static_argnums=0)
def run(model, variables, *args, **given):
  return model.apply(variables, *args, **given)


def test_parameter_paths_are_api():
  layer = {
    **{f"attn/{n}/kernel": (16, 16) for n in "qkvo"},
    "mlp/down/kernel": (64, 16),
    "mlp/up/kernel": (16, 64),
    **{f"modulate_{n}/kernel": (16, 48) for n in ("attn", "mlp")},
    **{f"modulate_{n}/bias": (48,) for n in ("attn", "mlp")},
  }
  rest = {
    "params/head/bias": (12,),
    "params/head/kernel": (16, 12),
    "params/labels/embedding": (8, 16),
    "params/modulate_out/bias": (32,),
    "params/modulate_out/kernel": (16, 32),
    "params/patchify/kernel": (12, 16),
    "params/time/down/kernel": (16, 16),
    "params/time/up/kernel": (16, 16),
  }
  assert names(shared()[1]) == rest | {
    f"params/stack/blocks/{n}": (3, *s) for n, s in layer.items()
  }
  learned = DiT(**{**SIZES, "positions": "learned", "classes": None})
  found = names(jax.eval_shape(learned.init, jax.random.key(0), X, T))
  assert found["params/positions/embedding"] == (6, 16)
  assert "params/labels/embedding" not in found


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"channels": 1, "hidden": 5, "classes": None},
    {"size": 8, "depth": 1, "positions": "learned"},
  ],
)
def test_param_count(settings):
  model = DiT(**{**SIZES, **settings})
  x = jnp.zeros((1, *model.sides, model.channels))
  variables = jax.eval_shape(model.init, jax.random.key(0), x, T[:1])
  assert model.param_count() == sum(x.size for x in jax.tree.leaves(variables))


def test_flops_are_those_of_the_lowered_matmuls():
  """Forward dot_generals, tripled."""
  model = DiT(**SIZES, hidden=40, scan=False)
  params = jax.eval_shape(model.init, jax.random.key(0), X, T)
  jaxpr = jax.make_jaxpr(lambda p: model.apply(p, X, T)[0])(params)
  flops = 0
  for eqn in equations(jaxpr.jaxpr):
    if eqn.primitive.name == "dot_general":
      (lhs, _), _ = eqn.params["dimension_numbers"]
      a, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
      flops += 2 * np.prod(out) * np.prod([a[i] for i in lhs])
  assert len(X) * model.flops_per_row(X.shape[1:]) == 3 * flops


def test_at_the_start_the_velocity_is_0_and_every_block_the_identity():
  model = DiT(**SIZES)
  variables = jit(model.init)(jax.random.key(0), X, T)
  v, _ = run(model, variables, X, T, LABEL)
  np.testing.assert_array_equal(v, np.zeros_like(X))
  # A head that is not 0 reads the tokens as they went in.
  params = {**variables["params"]}
  params["head"] = {"kernel": jnp.eye(16, 12), "bias": jnp.zeros(12)}
  v, _ = run(model, {"params": params}, X, T, LABEL)
  z = patches(X, 2) @ params["patchify"]["kernel"] + place_features(2, 3, 16)
  z = (z - z.mean(-1, keepdims=True)) / jnp.sqrt(
    z.var(-1, keepdims=True) + 1e-6
  )
  np.testing.assert_allclose(patches(v, 2), z[..., :12], atol=1e-5)


@jit
def written_out(params):
  p = unstack_layers(params)

  def norm(x, shift, scale):
    y = x - x.mean(-1, keepdims=True)
    y = y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    return (1 + scale) * y + shift

  def modulation(p, parts):
    return jnp.split((c @ p["kernel"] + p["bias"])[:, None], parts, -1)

  wave = 1000 * 10.0 ** (-4 * jnp.arange(8) / 8)
  angle = T[:, None] * wave
  c = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
  c = jax.nn.silu(c @ p["time"]["up"]["kernel"]) @ p["time"]["down"]["kernel"]
  c = jax.nn.silu(c + p["labels"]["embedding"][LABEL])
  x = patches(X, 2) @ p["patchify"]["kernel"] + place_features(2, 3, 16)
  for i in range(3):
    layer = p["stack"][f"block_{i:02d}"]
    w = {n: layer["attn"][n]["kernel"] for n in "qkvo"}
    shift, scale, gate = modulation(layer["modulate_attn"], 3)
    h = norm(x, shift, scale)
    q, k, v = ((h @ w[n]).reshape(5, 6, 2, 8) for n in "qkv")
    o = attention(q, k, v).reshape(5, 6, 16)
    x = x + gate * (o @ w["o"])
    shift, scale, gate = modulation(layer["modulate_mlp"], 3)
    h = norm(x, shift, scale) @ layer["mlp"]["up"]["kernel"]
    x = x + gate * (jax.nn.gelu(h) @ layer["mlp"]["down"]["kernel"])
  x = norm(x, *modulation(p["modulate_out"], 2))
  v = x @ p["head"]["kernel"] + p["head"]["bias"]
  v = v.reshape(5, 2, 3, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
  return v.reshape(5, 4, 6, 3)


def test_equals_the_formula():
  """The whole forward pass, written out."""
  model, variables = shared()
  v, aux = run(model, variables, X, T, LABEL)
  np.testing.assert_allclose(
    v, written_out(variables["params"]), atol=1e-4, rtol=1e-4
  )
  assert aux == {}


def test_time_and_label_are_read_and_no_label_is_the_last_row():
  model, variables = shared()
  v, _ = run(model, variables, X, T, LABEL)
  later, _ = run(model, variables, X, T / 2, LABEL)
  other, _ = run(model, variables, X, T, LABEL.at[0].set(2))
  assert np.abs(later - v).min(axis=(1, 2, 3)).shape == (5,)
  assert (np.abs(later - v).max(axis=(1, 2, 3)) > 1e-3).all()
  changed = np.abs(other - v).max(axis=(1, 2, 3)) > 1e-4
  assert changed.tolist() == [True] + 4 * [False]
  none, _ = run(model, variables, X, T)
  last, _ = run(model, variables, X, T, jnp.full(5, 7))
  np.testing.assert_array_equal(none, last)


@pytest.mark.parametrize(
  "settings", [{"scan": False}, {"mode": "remat"}], ids=str
)
def test_ways_to_run_agree(settings):
  model, variables = shared()
  want, _ = run(model, variables, X, T, LABEL)
  if not settings.get("scan", True):
    variables = unstack_layers(variables)
    assert names(stack_layers(variables)) == names(shared()[1])
  found, _ = run(DiT(**SIZES, **settings), variables, X, T, LABEL)
  np.testing.assert_allclose(found, want, atol=1e-5, rtol=1e-5)


def test_two_streams_backwards_have_the_gradients_of_those_kept():
  _, variables = shared()

  @functools.partial(jit, static_argnums=0)
  def gradient(model, variables):
    loss = lambda p: (model.apply(p, X, T, LABEL)[0] ** 2).mean()
    return jax.grad(loss)(variables)

  kept, walked = (
    gradient(DiT(**SIZES, mode=mode, streams=2), variables)
    for mode in ("plain", "reversible")
  )
  for (path, a), b in zip(
    jax.tree.leaves_with_path(walked), jax.tree.leaves(kept), strict=True
  ):
    assert distance(a, b) < 1e-5, jax.tree_util.keystr(path)
    assert np.abs(b).max() > 0, jax.tree_util.keystr(path)


def sparse(**settings):
  return DiT(
    **SIZES, attend=functools.partial(rettention, window=1, **settings)
  )


def test_a_dense_step_is_the_model_itself_and_each_layer_keeps_its_own():
  model, variables = shared()
  want, _ = run(model, variables, X, T, LABEL)
  wise = sparse(ramp=0.0)
  state = wise.init_state(5)
  assert names(state) == {"ratio": (3, 5, 2, 6), "residual": (3, 5, 6, 2, 8)}
  v, aux = run(wise, variables, X, T, LABEL, state=state, dense=True)
  np.testing.assert_allclose(v, want, atol=1e-5)
  ratio = np.asarray(aux["state"].ratio)
  assert (ratio < 0.999).any(axis=(1, 2, 3)).all()
  assert np.abs(np.diff(ratio, axis=0)).max(axis=(1, 2, 3)).min() > 1e-3
  # The same inputs again: what was missed is put back.
  again, aux = run(
    wise, variables, X, T, LABEL, state=aux["state"], dense=False
  )
  np.testing.assert_allclose(again, want, atol=1e-4)
  np.testing.assert_array_equal(aux["state"].ratio, ratio)
  # Layers' states in another order are others' states.
  turned = jax.tree.map(lambda x: x[::-1], aux["state"])
  wrong, _ = run(wise, variables, X, T, LABEL, state=turned, dense=False)
  assert np.abs(wrong - want).max() > 1e-2


def test_without_memory_the_window_alone_is_seen():
  model, variables = shared()
  wise = sparse()
  v, _ = run(
    wise, variables, X, T, LABEL, state=wise.init_state(5), dense=False
  )
  alone = model.clone(attend=functools.partial(attention, window=1))
  want, _ = run(alone, variables, X, T, LABEL)
  np.testing.assert_allclose(v, want, atol=1e-5)
  assert np.abs(v - run(model, variables, X, T, LABEL)[0]).max() > 1e-2


def test_strict_promotion_and_bfloat16():
  model, variables = shared()
  low = model.copy(dtype=jnp.bfloat16)
  with jax.numpy_dtype_promotion("strict"):
    a, _ = run(model, variables, X, T, LABEL)
    b, _ = run(low, variables, X, T, LABEL)
    wise = sparse().copy(dtype=jnp.bfloat16)
    given = {"state": wise.init_state(5), "dense": True}
    c, aux = run(wise, variables, X, T, LABEL, **given)
  assert a.dtype == b.dtype == c.dtype == jnp.float32
  assert aux["state"].residual.dtype == jnp.bfloat16
  assert 0 < distance(b, a) < 0.05 and distance(c, a) < 0.05


def test_patches_come_back():
  np.testing.assert_array_equal(from_patches(patches(X, 2), 2, (4, 6)), X)


def test_features():
  angle = 0.25 * 1000 * 10.0 ** (-4 * np.arange(3) / 3)
  found = time_features(jnp.array([0.25]), 6)[0]
  want = np.concatenate([np.cos(angle), np.sin(angle)])
  np.testing.assert_allclose(found, want, atol=1e-4)
  table = place_features(3, 4, 8).reshape(3, 4, 8)
  np.testing.assert_array_equal(table[:, :1, :4], table[:, 1:2, :4])
  np.testing.assert_allclose(table[2, 0, :4], np.r_[
    np.sin([2, 0.02]), np.cos([2, 0.02])
  ], atol=1e-6)  # fmt: skip
  np.testing.assert_allclose(table[0, 3, 4:], np.r_[
    np.sin([3, 0.03]), np.cos([3, 0.03])
  ], atol=1e-6)  # fmt: skip
  assert len(np.unique(table.reshape(12, 8), axis=0)) == 12


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"depth": 0}, "depth is 0"),
    ({"patch": 0}, "patch is 0"),
    ({"classes": 0}, "classes is 0"),
    ({"hidden": 0}, "hidden is 0"),
    ({"size": 5}, "size 5 along y"),
    ({"width": 18}, "width 18 is not a multiple of 4"),
    ({"num_heads": 3}, "of num_heads 3"),
    ({"positions": "rotary"}, "positions is 'rotary'"),
  ],
)
def test_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    DiT(**{**SIZES, **settings})


def test_calls_refused():
  model, variables = shared()
  with pytest.raises(ValueError, match=r"an image of .* = \(4, 4, 3\)"):
    model.apply(variables, X[:, :, :4], T)
  with pytest.raises(ValueError, match="without classes"):
    DiT(**{**SIZES, "classes": None}).apply(variables, X, T, LABEL)
