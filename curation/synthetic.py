"""Reasoning tasks made by a program (§2.1.1), here by reasoning-gym (`pip install reasoning-gym`).

`TASKS` are those that the reward is honest for: one right answer, a number or a few words, that the grader tells from all
others. Left out are tasks with many right answers (countdown), grids and lists (sudoku), rounded numbers, and whatever asks
for the value of an expression: the grader would find the expression itself equal to its value.
"""

from collections.abc import Iterator

TASKS = """
    acre aiw circuit_logic coin_flip color_cube_rotation count_bits count_primes course_schedule dice
    family_relationships gcd isomorphic_strings knights_knaves largest_island lcm leg_counting letter_counting
    maze needle_haystack number_sequence rectangle_count rotten_oranges self_reference simple_equations
    simple_geometry spell_backward syllogism zebra_puzzles
""".split()
TRIES = 10  # small tasks repeat themselves


def tasks(spec: str, seed: int) -> Iterator[tuple[str, str, str]]:
    """(place, question, answer) of as many different questions as `spec` says, `name:count`. The same seed makes the same.
    Raises ValueError for another name, or where the task has too few questions."""
    name, _, number = spec.partition(":")
    if name not in TASKS or not number.isdigit() or int(number) == 0:
        raise ValueError(f"--synthesize {spec}: expected name:count with one of {', '.join(TASKS)}")
    try:
        from reasoning_gym.factory import create_dataset
    except ImportError:
        raise ValueError(f"--synthesize {spec}: needs `pip install reasoning-gym`") from None
    count, seen = int(number), set()
    made = create_dataset(name, seed=seed, size=TRIES * count)
    for k in range(TRIES * count):
        question = made[k]["question"].strip()
        if question not in seen:
            seen.add(question)
            yield f"{name}:{k + 1}", question, str(made[k]["answer"])
        if len(seen) == count:
            return
    raise ValueError(
        f"--synthesize {spec}: found only {len(seen)} different questions; ask for fewer"
    )
