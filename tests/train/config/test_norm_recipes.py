"""Recipes of fixed norms: the numbers that a published rule gives, and what the configs make of them."""

import math

import pytest

from train.cli import parse
from train.config.norm_recipes import hero_numbers


def test_the_rule_of_the_hero_run():
    """At 2.6G tokens in steps of 131,072: exponents and ratio of marin's heuristic.py, worked out by logarithms."""
    found = hero_numbers(2.6e9, 131_072, 768)
    logarithm = math.log(0.06602) - 0.395 * math.log(2.6e9) - 0.150 * math.log(768)
    assert math.log(found.learning_rate) == pytest.approx(logarithm + math.log(131_072) / 2)
    assert found.angle == pytest.approx(13 / 3) and found.b2 == pytest.approx(0.999)
    # Both rates are bounded by 0.05, each by itself, and so is b2.
    for tokens, angle in (
        (2.6e6, 0.05 / hero_numbers(2.6e6, 131_072, 768).learning_rate),
        (1e3, 1),
    ):
        assert hero_numbers(tokens, 131_072, 768).angle == pytest.approx(angle)
    assert hero_numbers(1e3, 131_072, 768).learning_rate == 0.05
    assert hero_numbers(2.6e9, 131_072 * 100, 768).b2 == 0.95
    assert hero_numbers(2.6e9, 1024, 768).b2 == 0.9999


def test_the_recipes_say_what_their_authors_set():
    hero = parse(["hyperball_130m"])
    assert hero.optimizer.direction.sphere.sphere == ("hidden", "head")
    assert hero.optimizer.clip is None and hero.decay.strength.weight_decay == 0
    assert hero.optimizer.schedule.warmup_steps == 200 and hero.optimizer.schedule.final == 0.05
    nanochat = parse(["nanochat_d12"])
    decay, rate = nanochat.decay.strength, nanochat.optimizer.learning_rate
    # Per step at the peak a weight shrinks by 0.02 · 0.28, and the coefficient is zero at the end of the run.
    assert decay.rate(0) * rate == pytest.approx(0.02 * 0.28)
    assert decay.rate(nanochat.run.steps) == pytest.approx(0, abs=1e-6)
    scale = nanochat.optimizer.direction.shape_scale.as_scale().factor(768, 768)
    assert scale * rate == pytest.approx(0.02)
    moonlight = parse(["muon_moonlight"])
    scale = moonlight.optimizer.direction.shape_scale.as_scale().factor
    assert scale(1024, 4864) == pytest.approx(0.2 * 4864**0.5)
