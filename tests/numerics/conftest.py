"""Hypothesis draws the same examples in every run, so that a failure here is a failure everywhere."""

from hypothesis import settings

settings.register_profile("bitgrain", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("bitgrain")
