"""`--run.deterministic` sets XLA's flags before JAX starts its devices, and XLA knows them."""

import os
import subprocess
import sys

import pytest

from train import determinism, main
from train.config.fields import Config
from train.config.tree import replace


def test_flags_that_are_given_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2 --xla_dump_to=x")
    determinism.prepare()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_gpu_autotune_level=2", "--xla_dump_to=x"]
    assert "--xla_gpu_exclude_nondeterministic_ops=true" in flags
    assert sum("autotune" in flag for flag in flags) == 1 and len(flags) == 4
    determinism.prepare()
    assert os.environ["XLA_FLAGS"].split() == flags


@pytest.mark.parametrize("wanted", [False, True])
def test_a_run_sets_them_before_it_reads_data(monkeypatch, wanted):
    class Reached(Exception):
        pass

    def read(config):
        raise Reached("exclude_nondeterministic" in os.environ["XLA_FLAGS"])

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(main, "read_data", read)
    with pytest.raises(Reached, match=str(wanted)):
        main.train(replace(Config(), {"run.deterministic": wanted}))


def test_xla_knows_the_flags():
    """XLA ends a process that sets a flag which it does not know."""
    program = "from train import determinism; determinism.prepare(); import jax; print(jax.numpy.ones(3).sum())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "3.0", done.stderr
