"""The paper's claims, the arms that test them, and the rule that decides. They are older than the
runs; docs/log.md has the dates. Only a caveat may be younger.

An arm is a set of runs of train.py on the test bed (`--model tiny-long`) with one thing changed,
one run for each of SEEDS. A seed determines the base model, the problems and every sample of a run.
Runs of two arms with the same seed are a pair.

The rule: a comparison is decided by the mean of the paired differences d = first − second and its
95 % t-interval.

    the paper says   reproduces                 does not reproduce         otherwise
    more             interval above 0           interval below 0           not visible at this scale
    alike            interval within ±MARGIN    interval outside ±MARGIN   not visible at this scale

A claim reproduces if all its primary comparisons do. It does not reproduce if one of them does not.
Otherwise it is inconclusive: not visible at this scale. The intervals are not corrected for their
number: of forty comparisons without any effect, two would exclude 0 by chance.

Accuracy is the share of right answers to 1,024 held-out problems, one response each, sampled with
the temperature and top-p that the arm trains with.
"""

from typing import NamedTuple

MODEL = "tiny-long"
SEEDS = (0, 1, 2, 3, 4)
MARGIN = 0.05
# Every arm takes the policy's learning rate that is best for it on a seed used for nothing else.
SWEEP_SEED = 5
RATES = ("2.5e-4", "5e-4", "1e-3")

# Flags of train.py beyond --model tiny-long. What the name of an arm says and no flag can do is in
# experiments/variants.py.
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
    """`first` against `second` in a metric of the held-out responses after the training. `ARM@0` is
    an arm before its training."""

    first: str
    second: str
    metric: str = "accuracy"
    paper: str = "more"
    primary: bool = True


class Claim(NamedTuple):
    """A claim of the paper, where the paper makes it, and what is compared."""

    text: str
    place: str
    comparisons: tuple[Comparison, ...]
    caveat: str = ""  # added after the runs

    def arms(self, primary: bool = False) -> list[str]:
        """Its arms, the reference first; with `primary`, those of its primary comparisons."""
        arms = []
        for comparison in self.comparisons:
            if comparison.primary or not primary:
                arms += [comparison.first, comparison.second]
        return list(dict.fromkeys(arm.removesuffix("@0") for arm in arms))


def _default(
    *arms: str, primary: bool = True, metric: str = "accuracy", paper: str = "more"
) -> tuple[Comparison, ...]:
    """The default arm against each of `arms`."""
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
        "Reflection becomes more frequent, "
        "and correct reflecting responses are longer than the mean",
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
        caveat="each arm is measured at its own temperature, so this says more about sampling "
        "than about training",
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
