"""Times are of calls, sizes of programs."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

from isthmus.attention.bench.clock import Clock, build, inputs, kernels

pytestmark = pytest.mark.once


def test_the_time_is_that_of_a_call():
  seen = []

  def call(x):
    seen.append(x)
    time.sleep(0.004)
    return x

  seconds = Clock(rounds=3, seconds=0.012).seconds_of(call, [(1,), (2,)])
  assert 0.004 <= seconds < 0.02
  # Two to warm up, three to guess by, three rounds of about three.
  assert 8 <= len(seen) <= 17 and seen[5:8] == [1, 2, 1]


def test_a_slow_call_is_timed_once():
  seen = []

  def call(x):
    seen.append(x)
    time.sleep(0.01)

  clock = Clock(rounds=3, seconds=0.5, slow=0.005)
  seconds = clock.in_turns([call, lambda x: None], [(1,), (2,)])
  assert seen == [1, 2, 1, 1] and seconds[0] >= 0.01 > seconds[1]


def test_a_slow_round_does_not_count():
  calls = iter(range(100))

  def call():
    time.sleep(0.1 if next(calls) == 4 else 0.001)

  assert Clock(rounds=3, seconds=0.001).seconds_of(call, [()]) < 0.05


def test_a_program_tells_its_memory_and_time():
  x = jnp.ones((256, 256))
  program = build(lambda x: (x @ x) * 2, x)
  assert np.asarray(program(x))[0, 0] == 512
  assert program.peak_bytes == 2 * x.nbytes + program.temp_bytes
  assert 0 < program.first_seconds < 60


def test_kernels_are_named():
  hlo = """
    a = f32[] custom-call(b), custom_call_target="__cudnn$fmhaSoftmax"
    c = f32[] custom-call(b), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(f)/transpose(jvp(g))/flash_dq/mosaic_gpu"}
    d = f32[] custom-call(b), custom_call_target="__cudnn$fmhaSoftmax"
    e = f32[] add(a, b)
  """
  assert kernels(hlo) == {
    "__cudnn$fmhaSoftmax": 2,
    "mosaic_gpu_v2/flash_dq/mosaic_gpu": 1,
  }


def test_inputs_are_random_and_differ():
  sets = inputs(1, 64, 2, 32, jnp.bfloat16, count=3)
  flat = np.stack([np.asarray(x, np.float32) for s in sets for x in s])
  assert len(sets) > 1 and len({x.tobytes() for x in flat}) == len(flat)
  assert abs(flat.mean()) < 0.05 and abs(flat.std() - 1) < 0.05
