"""The reward of the arm format-reward: 1 for the right answer and 0.1 for following the format.

§2.2 of the paper says that a reward for the format is not needed.
"""

from data import Problem
from grading.extract import extract
from reports.metrics import follows_format

BONUS = 0.1


def answer_and_format(response: str, problem: Problem) -> float:
    """R = 1[answer is the gold answer] + BONUS · 1[format]. The answers of the test bed are whole
    numbers, so equal answers are equal strings."""
    return float(extract(response) == problem.answer) + BONUS * follows_format(response)
