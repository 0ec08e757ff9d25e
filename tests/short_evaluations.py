"""Evaluations of five steps of the policy, for tests of what surrounds them: a module of its own,
which worker processes import."""

import gymnasium

from common import make_chunked_env as make_whole


def make_chunked_env(*words):
    """`common.make_chunked_env`, with episodes cut short."""
    return gymnasium.wrappers.TimeLimit(make_whole(*words), max_episode_steps=5)
