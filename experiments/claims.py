"""The paper's claims, the arms that test them, and the rule that decides. Written before the runs; docs/log.md has the dates.

An arm is a run of train.py on the test bed (`--model tiny-long`) with one thing changed, once for each of SEEDS. A seed
changes the base model, its problems and every draw of a run; the runs of two arms with the same seed are a pair.

The rule. A comparison is decided by the mean of the paired differences d = first − second and its 95 % t-interval:

    the paper says     reproduces                  does not                     not visible at this scale
    more               the interval is above 0     the interval is below 0      else
    alike              it lies within ±MARGIN      it lies outside ±MARGIN      else

A claim has the verdict of its primary comparisons: it reproduces if all of them do, and it does not if one of them does not.
The intervals are not corrected for their number: of forty comparisons without any effect two would leave 0 out by chance.
Accuracy is the share of right answers to 1,024 held-out problems, one response each, sampled as the arm samples in training.
"""

from typing import NamedTuple

SEEDS = (0, 1, 2, 3, 4)
MARGIN = 0.05
SWEEP_SEED, RATES = (
    5,
    ("2.5e-4", "5e-4", "1e-3"),
)  # of the policy: every arm takes its best on this seed

# Flags of train.py beyond --model tiny-long. Where there are none, experiments/run.py prepares or changes what the name says.
ARMS = {
    "default": "",
    "lam-0.95": "--lam 0.95",
    "lam-0.99": "--lam 0.99",
    "lam-0.998": "--lam 0.998",
    "gamma-0.95": "--gamma 0.95",
    "gamma-0.99": "--gamma 0.99",
    "gamma-0.999": "--gamma 0.999",
    "kl-loss-0.1": "--kl-loss 0.1",
    "kl-loss-0.01": "--kl-loss 0.01",
    "kl-reward-0.01": "--kl-reward 0.01",
    "kl-reward-0.001": "--kl-reward 0.001",
    "problems-16": "",
    "problems-64": "",
    "problems-512": "",
    "off-policy": "--prompts 128 --policy-steps 8 --critic-steps 96 --steps 5",
    "T-0.6": "--temperature 0.6",
    "T-1.2": "--temperature 1.2",
    "T-0.6-top-p-0.95": "--temperature 0.6 --top-p 0.95",
    "grpo": "--advantage grpo",
    "format-reward": "--reward experiments.format_reward:answer_and_format",
    "head-paper": "--value-head paper",
    "head-zeros": "--value-head zeros",
    "value-clip": "--value-clip 0.2",
    "per-pack": "--micro-tokens 512",
    "retokenised": "",
    "critic-first": "",
    "anneal": "",
    "anneal-hard": "",
}


class Comparison(NamedTuple):
    """`first` against `second` in a metric of the held-out responses after training; `ARM@0` is an arm before it."""

    first: str
    second: str
    metric: str = "accuracy"
    paper: str = "more"
    primary: bool = True


class Claim(NamedTuple):
    """A sentence of the paper, where it stands, and what is compared."""

    text: str
    place: str
    comparisons: tuple[Comparison, ...]

    def arms(self, primary: bool = False) -> list[str]:
        """Its arms, the reference first; or those of its primary comparisons."""
        compared = [c for c in self.comparisons if c.primary or not primary]
        return list(
            dict.fromkeys(arm.removesuffix("@0") for c in compared for arm in (c.first, c.second))
        )


def _default(
    *arms: str, primary: bool = True, metric: str = "accuracy", paper: str = "more"
) -> tuple[Comparison, ...]:
    return tuple(Comparison("default", arm, metric, paper, primary) for arm in arms)


CLAIMS = {
    "rise": Claim(
        "Reward and response length rise together",
        "Fig. 2, 5",
        (Comparison("default", "default@0"), Comparison("default", "default@0", "length")),
    ),
    "format": Claim(
        "The format is learned from the 0/1 reward alone",
        "Fig. 4",
        (Comparison("default", "default@0", "format"),),
    ),
    "reflection": Claim(
        "Reflection becomes more frequent, and correct reflecting responses are longer than the mean",
        "Fig. 6",
        (
            Comparison("default", "default@0", "reflection"),
            Comparison("default", "default", "reflection_excess"),
        ),
    ),
    "lambda": Claim(
        "λ = 1 beats λ = 0.95",
        "Fig. 7, 13",
        _default("lam-0.95") + _default("lam-0.99", "lam-0.998", primary=False),
    ),
    "gamma": Claim(
        "γ < 1 shortens the responses and hurts",
        "§3.3",
        _default("gamma-0.95")
        + _default("gamma-0.95", metric="length")
        + _default("gamma-0.99", "gamma-0.999", primary=False)
        + _default("gamma-0.99", "gamma-0.999", metric="length", primary=False),
    ),
    "kl": Claim(
        "Without KL it learns better than with a KL loss or a KL penalty in the reward",
        "Fig. 8",
        _default("kl-loss-0.1", "kl-reward-0.01")
        + _default("kl-loss-0.01", "kl-reward-0.001", primary=False),
    ),
    "data": Claim(
        "More problems beat fewer",
        "Fig. 9",
        _default("problems-16", "problems-64") + _default("problems-512", primary=False),
    ),
    "onpolicy": Claim(
        "Strictly on-policy beats 8 updates per rollout", "Fig. 12", _default("off-policy")
    ),
    "sampling": Claim(
        "Temperature and top-p of the training hardly matter",
        "Fig. 14",
        _default("T-0.6", "T-1.2", "T-0.6-top-p-0.95", paper="alike"),
    ),
    "grpo": Claim("PPO with a critic beats GRPO", "§2.2", _default("grpo")),
    "repetition": Claim(
        "The critic devalues repetition",
        "§2.2",
        (Comparison("default", "default", "value_lost_by_repetition"),),
    ),
    "formatreward": Claim(
        "A reward for the format is not needed", "§2.2", _default("format-reward", paper="alike")
    ),
    "valuehead": Claim(
        "The printed value head U(−√5, √5) is as good as the code's N(0, 1/(d+1)²)",
        "§3.1",
        _default("head-paper", paper="alike")
        + _default("head-zeros", paper="alike", primary=False),
    ),
    "anneal": Claim(
        "Annealing on mined hard problems helps on hard problems",
        "§2.1.1",
        (
            Comparison("anneal-hard", "anneal", "hard_accuracy"),
            Comparison("anneal-hard", "anneal", primary=False),
        ),
    ),
    "valueclip": Claim(
        "Clipping the value loss at 0.2 changes little",
        "authors' code",
        _default("value-clip", paper="alike"),
    ),
    "perpack": Claim(
        "Means per pack instead of one over all tokens change little",
        "authors' code",
        _default("per-pack", paper="alike"),
    ),
    "retokenise": Claim(
        "Training on re-tokenised text changes little",
        "authors' code",
        _default("retokenised", paper="alike"),
    ),
    "criticwarmup": Claim(
        "A critic trained before the policy moves changes little",
        "often asked",
        _default("critic-first", paper="alike"),
    ),
}
