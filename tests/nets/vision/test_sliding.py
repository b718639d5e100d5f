"""Sliding windows against the network on the whole volume."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.nets.vision.sliding import sliding_window

pytestmark = pytest.mark.once

KEY = jax.random.key(0)
VOLUME = jax.random.normal(KEY, (11, 9, 13, 2))


def blur(x):
  """A translation-invariant network that sees 1 voxel to each side."""
  kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 2, 4))
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (1, 1, 1),
    "SAME",
    dimension_numbers=("NZYXC", "ZYXIO", "NZYXC"),
  )


@pytest.mark.parametrize(
  "shape, options",
  [
    ((11, 9, 13, 2), {"window": 4}),
    ((11, 9, 13, 2), {"window": (4, 9, 5), "batch": 3}),
    ((11, 9, 13, 2), {"window": 5, "overlap": 0.0, "blend": "constant"}),
    ((11, 9, 13, 2), {"window": 6, "overlap": 0.9, "batch": 100}),
    ((3, 9, 2, 1), {"window": (4, 4, 7)}),  # larger than the volume
    ((1, 1, 1, 1), {"window": 8, "blend": "constant"}),
    ((40, 1, 1, 1), {"window": (32, 1, 1), "overlap": 0.25}),
    ((10, 7, 3), {"window": 4}),  # an image
  ],
)
def test_what_looks_at_one_voxel_comes_out_as_it_is(shape, options):
  """Every voxel has a weight, and they sum to 1."""
  volume = jax.random.normal(KEY, shape) + 2.0
  pointwise = lambda x: jnp.concatenate([x, x**2], -1)
  y = jax.jit(lambda v: sliding_window(pointwise, v, **options))(volume)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, pointwise(volume), rtol=2e-6)


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_weights_are_those_of_the_formula(blend):
  """Windows at 0, 2, 3 of 7 voxels: y is the blend of their numbers."""
  volume = jnp.arange(7.0)[:, None]
  first = lambda x: jnp.broadcast_to(x[:, :1], x.shape)
  y = sliding_window(first, volume, window=4, blend=blend)[:, 0]
  away = np.arange(4) - 1.5
  shape = np.exp(-2 * away**2) if blend == "gaussian" else np.ones(4)
  top, bottom = np.zeros(7), np.zeros(7)
  for start in (0, 2, 3):
    top[start : start + 4] += shape * start
    bottom[start : start + 4] += shape
  np.testing.assert_allclose(y, top / bottom, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_convolution_agrees_where_windows_see_enough(batch):
  """And the gaussian blend gives the others half the error, or less."""

  def trusted(x):
    """What lies a voxel from a window's edge, and how often that is."""
    y = blur(x)
    inner = jnp.zeros(y.shape[1:-1]).at[1:-1, 1:-1, 1:-1].set(1.0)[..., None]
    return jnp.concatenate([y * inner, inner + 0 * y[..., :1]], -1)

  run = lambda f: jax.jit(
    lambda v: sliding_window(f, v, window=6, batch=batch)
  )(VOLUME)
  whole = blur(VOLUME[None])[0]
  inside = (slice(1, -1),) * 3
  found = run(trusted)
  assert found[..., -1][inside].min() > 0  # each is in the middle of a window
  np.testing.assert_allclose(
    (found[..., :-1] / found[..., -1:])[inside],
    whole[inside],
    rtol=1e-3,
    atol=1e-4,
  )
  far = np.abs(run(blur) - whole)[inside]
  flat = jax.jit(lambda v: sliding_window(blur, v, window=6, blend="constant"))(
    VOLUME
  )
  assert far.mean() < np.abs(flat - whole)[inside].mean() / 2


def test_dtypes():
  """bfloat16 goes in and out; between, nothing is rounded to it."""
  narrow = VOLUME.astype(jnp.bfloat16)

  def apply(x):
    assert x.dtype == jnp.bfloat16
    return x, {"more": None}

  y = sliding_window(apply, narrow, window=4, overlap=0.8)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(y, np.float32), np.asarray(narrow, np.float32)
  )
  with jax.enable_x64(True):
    wide = jnp.asarray(np.asarray(VOLUME, np.float64))
    y = sliding_window(lambda x: x, wide, window=4)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, wide, rtol=1e-14)


def test_one_trace_whatever_the_number_of_windows():
  traces = []

  def apply(x):
    traces.append(x.shape)
    return x

  counts = []
  for window, overlap in ((9, 0.0), (4, 0.75)):
    run = jax.jit(
      lambda v, w=window, o=overlap: sliding_window(
        apply, v, window=w, overlap=o
      )
    )
    run(VOLUME)
    run(VOLUME + 1)
    counts.append(len(traces))
    traces.clear()
  assert counts[0] == counts[1] <= 3


def test_memory_does_not_grow_with_the_number_of_windows():
  """The temporaries of 8 windows and of 1331: one window's, and the sum."""
  volume = jax.ShapeDtypeStruct((32, 32, 32, 1), jnp.float32)
  widen = lambda x: jnp.tanh(jnp.repeat(x, 8, -1)) * 2

  def temporary(overlap):
    run = jax.jit(
      lambda v: sliding_window(widen, v, window=16, overlap=overlap)
    )
    return run.lower(volume).compile().memory_analysis().temp_size_in_bytes

  few, many = temporary(0.0), temporary(0.9)
  result = 32**3 * 8 * 4
  assert many < few + 0.05 * result < 2.5 * result


@pytest.mark.parametrize(
  "options, message",
  [
    ({"window": 0}, "window is 0 and batch 1; they are at least 1"),
    ({"window": 4, "batch": 0}, "window is 4 and batch 0; they are at least"),
    ({"window": (4, 4)}, r"window is \(4, 4\); the volume has 3 axes"),
    ({"window": 4, "overlap": 1.0}, r"overlap is 1.0; it lies in \[0, 1\)"),
    ({"window": 4, "blend": "cosine"}, "blend is 'cosine', neither"),
  ],
)
def test_what_makes_no_windows_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    sliding_window(lambda x: x, VOLUME, **options)


def test_a_network_that_changes_the_extent_is_refused():
  with pytest.raises(ValueError, match=r"apply gives \(1, 2, 4, 4, 2\) for wi"):
    sliding_window(lambda x: x[:, ::2], VOLUME, window=4)
