"""How often small runs see their text: told, estimated for the real run, and said where the two differ."""

import dataclasses

import numpy as np
import pytest

from tests.support.runs import flags
from tests.train.study.test_tune import TINY
from train import cli
from train.config import tree
from train.config.fields import UserError
from train.step.tasks import LanguageTask
from train.study.tune import repetition
from train.study.tune.options import Tune, small_config


def test_small_runs_see_their_text_as_often_as_the_real_one(tmp_path):
    given = flags(tmp_path, "--run.steps", "20000", "--data.tokenizer", "bytes")
    real, often = cli.parse(given), Tune(proxy=dataclasses.replace(TINY, epochs=4.0))
    data = LanguageTask.read(small_config(often, real))
    epochs = 20_000 * real.data.batch_size * real.data.length / len(data.train)
    (said,) = repetition.advice(Tune(proxy=TINY), real, data)
    assert f"about {epochs:.0f} times" in said and f"--proxy.epochs {epochs:.0f}." in said
    right = Tune(proxy=dataclasses.replace(TINY, epochs=epochs))
    assert repetition.advice(right, real, data) == []
    assert "saw it 4 times" in repetition.advice(often, real, data)[0]
    once = tree.replace(real, {"run.steps": 10})
    assert repetition.advice(Tune(proxy=TINY), once, data) == []
    # Small runs that repeat a short text more often than the real run cannot be told to see more of it.
    long = Tune(proxy=dataclasses.replace(TINY, steps=100 * len(data.train)))
    assert "--proxy.steps" in repetition.advice(long, once, data)[0]

    cut = repetition.cut(often.proxy, data)
    assert len(cut.train) == 6 * 4 * 12 / 4 and cut.digest != data.digest
    tokens = data.train.windows(np.arange(len(data.train) - 71), 72)
    assert (tokens == cut.train.windows(np.array([0]), 72)).all(axis=1).any()
    assert repetition.cut(TINY, data) is data
    for wrong, nearest in ((0.001, f"{288 / len(data.train):.1g}"), (99.0, "nearest: 20,")):
        with pytest.raises(UserError, match="nearest: ") as error:
            repetition.cut(dataclasses.replace(TINY, epochs=wrong), data)
        assert nearest[:3] in str(error.value)
    with pytest.raises(UserError, match="leave out one"):
        repetition.cut(often.proxy, dataclasses.replace(data, documents=True))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-512"])
@pytest.mark.parametrize("documents", [False, True])
def test_epochs_of_the_real_run_are_known_before_it_reads_its_text(tmp_path, tokenizer, documents):
    given = flags(tmp_path, "--run.steps", "3000", "--data.tokenizer", tokenizer)
    real = tree.replace(cli.parse(given), {"data.documents": documents})
    small = LanguageTask.read(small_config(Tune(proxy=TINY), real))
    often, _ = repetition.epochs(Tune(proxy=TINY), real, small)
    data = LanguageTask.read(real)
    assert often == pytest.approx(3000 / data.steps_per_epoch, rel=0.1)
