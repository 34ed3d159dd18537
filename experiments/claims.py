"""The paper's claims, the arms that test them, and the rule that decides. They are older than the
runs; docs/log.md has the dates. Only a caveat may be younger.

An arm is a set of runs of train.py on a test bed with one thing changed, one run for each seed. A
seed determines the base model, the problems and every sample of a run. Runs of two arms with the
same seed are a pair.

The rule: a comparison is decided by the mean of the paired differences d = first − second and its
t-interval. m is the margin of the metric (`MARGINS`).

    the paper says   reproduces           contradicts           no difference   otherwise
    more             interval above 0     interval below 0      within ±m       undecided
    alike            interval within ±m   interval outside ±m                   undecided

The columns are tried from the left: a small gain whose interval is above 0 reproduces "more".

Seeds come in blocks, and each comparison is looked at after 5, 10, 15 and 20 seeds (`LOOKS`). It
ends at the first look that decides it, and with the last. To look four times at 95 % would find an
effect too often where there is none; so each interval is one of 1 − 5 %/4 = 98.75 % (Bonferroni),
and a comparison errs in at most 5 % of cases over all its looks (test_experiments.py simulates
it). Nothing corrects for the number of comparisons.

A claim contradicts if one of its primary comparisons does; otherwise it is undecided if one of them
is; otherwise it shows no difference if one of them does; otherwise it reproduces. Comparisons that
are not primary ask for no seeds.

The seeds 0 to 4 were used by an earlier version of this file, with 95 % intervals after five seeds
and the accuracy after the last step alone (experiments/FIVE_SEEDS.md). The seeds here are others.

What is measured, on responses to problems that the run has not trained on:

    late_accuracy   the share of right answers in the last quarter of the training (40 steps: the
                    last ten, 1,280 responses). The responses are the training's own, where each
                    problem is new, at the arm's own temperature. Where an arm trains on few
                    problems, they are held-out responses of the same steps. After the last step
                    alone, a run's accuracy varies twice as much.
    accuracy        the share of right answers to 1,024 held-out problems after the last step
"""

from typing import NamedTuple

MODEL = "tiny-long"
SEEDS = tuple(range(10, 30))
LOOKS = (5, 10, 15, 20)
ERROR_RATE = 0.05  # of a comparison, over all its looks
MARGIN = 0.05
MARGINS = {  # where a margin of five points makes no sense
    "length": 5.0,  # tokens
    "reflection_excess": 5.0,
    "loop_share": 0.02,
    "brier_gain_over_group": 0.01,
    "brier_gain_over_constant": 0.01,
}
# Every arm takes the policy's learning rate that is best for it on a seed used for nothing else.
SWEEP_SEED = 5
RATES = ("2.5e-4", "5e-4", "1e-3")
SAME_RATE = {  # arms that take the rate of another
    "anneal": "default",
    "anneal-hard": "default",
    "critic-only-10": "default",
    "critic-only-20": "default",
    "loops": "default",
    "loops-critic": "default",
    "loops-grpo": "grpo",
}
PRESET = ("demo",)  # arms that take the rate of their model's preset

# Flags of train.py beyond --model tiny-long. What the name of an arm says and no flag can do is in
# experiments/variants.py.
ARMS = {
    "default": "",
    "lam-0.95": "--lam 0.95",
    "gamma-0.95": "--gamma 0.95",
    "kl-loss-0.1": "--kl-loss 0.1",
    "kl-reward-0.01": "--kl-reward 0.01",
    "problems-16": "--eval-every 2",
    "problems-64": "--eval-every 2",
    "off-policy": "--prompts 128 --policy-steps 8 --critic-steps 96 --steps 5",
    "T-0.6": "--temperature 0.6",
    "T-1.2": "--temperature 1.2",
    "T-0.6-top-p-0.95": "--temperature 0.6 --top-p 0.95",
    "grpo": "--advantage grpo",
    "ppo-32x4": "--prompts 32 --samples 4",
    "ppo-64x2": "--prompts 64 --samples 2",
    "ppo-128x1": "--prompts 128 --samples 1",
    "grpo-32x4": "--advantage grpo --prompts 32 --samples 4",
    "grpo-64x2": "--advantage grpo --prompts 64 --samples 2",
    "format-reward": "--reward experiments.format_reward:answer_and_format",
    "head-paper": "--value-head paper",
    "value-clip": "--value-clip 0.2",
    "per-pack": "--micro-tokens 512",
    "retokenised": "",
    "critic-only-10": "--critic-only-steps 10 --steps 50",
    "critic-only-20": "--critic-only-steps 20 --steps 60",
    "decoupled": "--lam 0.95 --lam-critic 1",
    "adaptive": "--lam-adaptive 0.2",
    "half-critic": "",
    "anneal": "",
    "anneal-hard": "",
    "loops": "--model tiny-loops",
    "loops-grpo": "--model tiny-loops --advantage grpo",
    "loops-critic": "--model tiny-loops --critic-only-steps 40 --steps 40",
    "demo": "--model tiny",
}


class Comparison(NamedTuple):
    """`first` against `second` in a metric of an arm's end. `ARM@0` is an arm before its
    training."""

    first: str
    second: str
    metric: str = "late_accuracy"
    paper: str = "more"
    primary: bool = True

    @property
    def margin(self) -> float:
        """How small a difference is none."""
        return MARGINS.get(self.metric, MARGIN)

    def arms(self) -> list[str]:
        """Its arms, once each."""
        return list(dict.fromkeys(arm.removesuffix("@0") for arm in (self.first, self.second)))


class Claim(NamedTuple):
    """A claim of the paper, where the paper makes it, and what is compared."""

    text: str
    place: str
    comparisons: tuple[Comparison, ...]
    five_seeds: str = ""  # what the seeds 0 to 4 said, see FIVE_SEEDS.md
    caveat: str = ""  # added after the runs

    def arms(self, primary: bool = False) -> list[str]:
        """Its arms, the reference first; with `primary`, those of its primary comparisons."""
        arms: list[str] = []
        for comparison in self.comparisons:
            if comparison.primary or not primary:
                arms += comparison.arms()
        return list(dict.fromkeys(arms))


def _default(
    *arms: str, primary: bool = True, metric: str = "late_accuracy", paper: str = "more"
) -> tuple[Comparison, ...]:
    """The default arm against each of `arms`."""
    return tuple(Comparison("default", arm, metric, paper, primary) for arm in arms)


def _of_one(
    arm: str, *metrics: str, primary: bool = True, paper: str = "more"
) -> tuple[Comparison, ...]:
    """Metrics of one arm that are differences already: against 0."""
    return tuple(Comparison(arm, arm, metric, paper, primary) for metric in metrics)


NOT_VISIBLE = "not visible"

CLAIMS = {
    "rise": Claim(
        "Reward and response length rise together",
        "Fig. 2, 5",
        (
            Comparison("default", "default@0", "accuracy"),
            Comparison("default", "default@0", "length"),
        ),
        "reproduces",
    ),
    "format": Claim(
        "The format is learned from the 0/1 reward alone",
        "Fig. 4",
        (Comparison("default", "default@0", "format"),),
        "reproduces",
    ),
    "reflection": Claim(
        "Reflection becomes more frequent, and correct reflecting responses are longer",
        "Fig. 6",
        (
            Comparison("demo", "demo@0", "reflection"),
            *_of_one("demo", "reflection_excess"),
            Comparison("default", "default@0", "reflection", primary=False),
        ),
        NOT_VISIBLE,
        "in between it does: the share rises from .03 to between .18 and .30 at steps 10 to 13, "
        "and falls again",
    ),
    "lambda": Claim("λ = 1 beats λ = 0.95", "Fig. 7, 13", _default("lam-0.95"), "reproduces"),
    "gamma": Claim(
        "γ < 1 shortens the responses and hurts",
        "§3.3",
        _default("gamma-0.95") + _default("gamma-0.95", metric="length"),
        "reproduces",
    ),
    "klloss": Claim(
        "Without KL it learns better than with a KL loss",
        "Fig. 8",
        _default("kl-loss-0.1"),
        NOT_VISIBLE,
    ),
    "klreward": Claim(
        "Without KL it learns better than with a KL penalty in the reward",
        "Fig. 8",
        _default("kl-reward-0.01"),
        NOT_VISIBLE,
    ),
    "data": Claim(
        "More problems beat fewer (640 against 16 and 64)",
        "Fig. 9",
        _default("problems-16", "problems-64")
        + _of_one("problems-16", "memorized", primary=False)
        + _of_one("problems-64", "memorized", primary=False),
        NOT_VISIBLE,
    ),
    "onpolicy": Claim(
        "Strictly on-policy beats 8 updates per rollout",
        "Fig. 12",
        _default("off-policy"),
        "reproduces",
    ),
    "sampling": Claim(
        "Temperature and top-p hardly matter, each arm at its own",
        "Fig. 14",
        _default("T-0.6", "T-1.2", "T-0.6-top-p-0.95", paper="alike"),
        "contradicts",
    ),
    "samplingone": Claim(
        "Temperature and top-p hardly matter, all arms sampled at T = 1",
        "Fig. 14",
        _default("T-0.6", "T-1.2", "T-0.6-top-p-0.95", metric="accuracy_at_1", paper="alike"),
    ),
    "grpo": Claim(
        "PPO with a critic beats GRPO, 8 responses a prompt",
        "§2.2",
        _default("grpo"),
        NOT_VISIBLE,
    ),
    "grpo4": Claim(
        "PPO with a critic beats GRPO, 4 responses a prompt",
        "§2.2",
        (Comparison("ppo-32x4", "grpo-32x4"),),
    ),
    "grpo2": Claim(
        "PPO with a critic beats GRPO, 2 responses a prompt",
        "§2.2",
        (Comparison("ppo-64x2", "grpo-64x2"),),
    ),
    "single": Claim(
        "With a critic, one response to each of 8 times as many prompts is as good",
        "SAO",
        (
            Comparison("ppo-128x1", "default", paper="alike"),
            Comparison("ppo-128x1", "grpo", primary=False),
            Comparison("ppo-128x1", "grpo-64x2", primary=False),
        ),
    ),
    "calibration": Claim(
        "V(s_t) predicts success better than the mean of the prompt's group",
        "§2.2",
        _of_one("default", "brier_gain_over_group")
        + _of_one("default", "brier_gain_over_constant", primary=False)
        + _of_one("ppo-128x1", "brier_gain_over_group", primary=False)
        + _of_one("loops-critic", "brier_gain_over_group", primary=False),
    ),
    "repetition": Claim(
        "The critic devalues repetition",
        "§2.2",
        _of_one("loops-critic", "value_lost_against_going_on")
        + _of_one("loops-critic", "value_lost_by_4_repeats", primary=False)
        + _of_one("loops", "value_lost_against_going_on", primary=False),
        NOT_VISIBLE,
        "V rises less along a loop than along the response; against V before the loop it hardly "
        "changes",
    ),
    "loops": Claim(
        "GRPO removes loops more slowly",
        "§2.2",
        (Comparison("loops-grpo", "loops", "loop_share"),),
    ),
    "criticonly": Claim(
        "A critic trained alone first helps",
        "VC-PPO, VAPO",
        (
            Comparison("critic-only-10", "default"),
            Comparison("critic-only-20", "default"),
        ),
        NOT_VISIBLE,
    ),
    "decoupled": Claim(
        "With λ = 0.95 for the policy, λ = 1 for the critic helps",
        "VC-PPO",
        (
            Comparison("decoupled", "lam-0.95"),
            Comparison("default", "decoupled", primary=False),
        ),
    ),
    "adaptive": Claim(
        "A λ that grows with the response beats one λ of the same mean horizon",
        "VAPO",
        (
            Comparison("adaptive", "decoupled"),
            Comparison("default", "adaptive", primary=False),
        ),
    ),
    "smallcritic": Claim(
        "A critic half as wide is as good",
        "often asked",
        _default("half-critic", paper="alike"),
    ),
    "formatreward": Claim(
        "A reward for the format is not needed",
        "§2.2",
        _default("format-reward", paper="alike"),
        NOT_VISIBLE,
    ),
    "valuehead": Claim(
        "The printed value head U(−√5, √5) is as good as the code's N(0, 1/(d+1)²)",
        "§3.1",
        _default("head-paper", paper="alike"),
        NOT_VISIBLE,
    ),
    "anneal": Claim(
        "Annealing on mined hard problems helps on hard problems",
        "§2.1.1",
        (
            Comparison("anneal-hard", "anneal", "hard_accuracy"),
            Comparison("anneal-hard", "anneal", "accuracy", primary=False),
        ),
        NOT_VISIBLE,
    ),
    "valueclip": Claim(
        "Clipping the value loss at 0.2 changes little",
        "authors' code",
        _default("value-clip", paper="alike"),
        NOT_VISIBLE,
    ),
    "perpack": Claim(
        "Means per pack instead of one over all tokens change little",
        "authors' code",
        _default("per-pack", paper="alike"),
        NOT_VISIBLE,
    ),
    "retokenise": Claim(
        "Training on re-tokenised text changes little",
        "authors' code",
        _default("retokenised", paper="alike"),
        NOT_VISIBLE,
    ),
}
