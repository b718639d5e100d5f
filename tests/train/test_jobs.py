"""Jobs refuse at construction what can't be run; Bench times what it says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
import pytest

from isthmus.data.tokenizer import Bytes
from isthmus.nets.transformer import Decoder
from isthmus.train import jobs
from isthmus.train.jobs import Bench, Case, Generate
from isthmus.train.workdir import WorkdirError, lock
from tests.train import toy

MODEL = Decoder(vocab_size=257, width=8, depth=1, num_heads=2, hidden=8)


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(steps=0), "steps is 0"),
    (dict(batch_size=-4), "batch_size is -4"),
    (dict(accumulate=0), "accumulate is 0"),
    (dict(accumulate=3), "batch_size 16 is not divisible by accumulate 3"),
    (dict(log_every=0), "log_every is 0"),
    (dict(keep=0), "keep is 0"),
    (dict(save_every=-1), "save_every is -1"),
    (dict(eval_every=-2), "eval_every is -2"),
    (dict(eval_batch_size=0), "eval_batch_size is 0"),
    (dict(ema=1.0), "ema is 1.0"),
    (dict(ema=-0.1), "ema is -0.1"),
    (dict(seed=-1), "seed is -1"),
    (dict(seed=2**32), "seed is 4294967296"),
    (dict(profile=(5, 5)), r"profile is \(5, 5\)"),
  ],
)
def test_fit_refuses(changes, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(toy.get_config(), **changes)


def test_fit_takes_an_optimizer_or_a_chain():
  job = toy.get_config()
  schedule = job.schedule()
  assert schedule is not None
  assert float(schedule(0)) == pytest.approx(job.optimizer.learning_rate)
  plain = dataclasses.replace(job, optimizer=optax.sgd(0.5))
  assert plain.schedule() is None
  update, _ = plain.transformation().update({"x": jnp.ones(())}, (None, None))
  assert update["x"] == -0.5


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(length=0), "length is 0"),
    (dict(temperature=-0.5), "temperature is -0.5"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(top_k=0), "top_k is 0"),
    (dict(top_p=0.0), "top_p is 0.0"),
    (dict(top_p=1.5), "top_p is 1.5"),
  ],
)
def test_generate_refuses(changes, words):
  with pytest.raises(ValueError, match=words):
    Generate(model=MODEL, tokenizer=Bytes(), **changes)


def test_generate_goes_on_from_its_prompt():
  params = MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]

  def text(prompt, **kwargs):
    kwargs = {"length": 12, "temperature": 3.0, **kwargs}
    job = Generate(model=MODEL, tokenizer=Bytes(), prompt=prompt, **kwargs)
    return job.text(params)

  assert text("ab") == text("ab")
  assert text("ab", seed=1) != text("ab")
  greedy = text("ab", temperature=0.0)
  assert greedy == text("ab", temperature=0.0, seed=5)


def _case(*, flops=None, moved=None):
  return Case(
    function=jax.jit(lambda x: x + 1),
    arguments=lambda: (jnp.zeros(4),),
    flops=flops,
    bytes=moved,
  )


def test_bench_times_each_case_in_turn(tmp_path, monkeypatch, capsys):
  now = iter(range(1000))  # a second between any two looks at the clock
  monkeypatch.setattr(jobs.time, "perf_counter", lambda: float(next(now)))
  cases = {
    "plain": _case,
    "work": lambda: _case(flops=5e11, moved=2.5e9),
  }
  results = Bench(cases=cases, rounds=3, calls=2).run(tmp_path)
  assert results == {
    "plain/ms": 500.0,
    "work/ms": 500.0,
    "work/tflops": 1.0,
    "work/gbps": 5.0,
  }
  assert json.loads((tmp_path / "bench.json").read_text()) == results
  out = capsys.readouterr().out
  assert "plain" in out and "1.0 TF/s" in out and "5.0 GB/s" in out


def test_bench_refuses(tmp_path):
  for wrong in (dict(cases={}), dict(rounds=0), dict(calls=0)):
    with pytest.raises(ValueError, match="each is at least 1"):
      Bench(**{"cases": {"plain": _case}, **wrong})
  with lock(tmp_path), pytest.raises(WorkdirError, match="in use"):
    Bench(cases={"plain": _case}).run(tmp_path)
