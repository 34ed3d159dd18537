"""The arm that pays for the format, too: 1 for the right answer and 0.1 for following the format (§2.2 says: not needed)."""

from data import Problem
from grading.extract import extract
from reports.metrics import follows_format

BONUS = 0.1


def answer_and_format(response: str, problem: Problem) -> float:
    """R = 1[answer is the gold one] + BONUS · 1[format]; the test bed's answers are whole numbers, equal as strings."""
    return float(extract(response) == problem.answer) + BONUS * follows_format(response)
