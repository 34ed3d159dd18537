"""Ask a model one question, the way it was trained to be asked, and watch it answer.

    python -m tools.ask --model Open-Reasoner-Zero/Open-Reasoner-Zero-7B "How many positive divisors does 196 have?"
    python -m tools.ask --model runs/demo/policy --critic runs/demo/critic "7+4+12+3+9+6+11=?"

These models know one prompt, the training template, and end an answer with `</answer>` instead of an end-of-sequence token:
asked by any other prompt, or without the stop strings, they ramble. With a critic, V(s_t) is shown along the response: the
chance, as the critic sees it, that the answer will be right, given the question and the text so far (γ = λ = 1, R ∈ {0, 1}).
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import transformers
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

import data
import distributed
import packing
import preflight
from config import hub_id
from critic import load_critic, value_head
from data import Problem
from grading.extract import extract
from hf_sampler import STOP
from rollout import Rollout


@dataclass(frozen=True)
class Question:
    """Ask a model one question."""

    question: Annotated[str, tyro.conf.Positional]
    """The question; `-` reads it from standard input."""
    model: str = "runs/demo/policy"
    """Folder or hub id: a run's exported policy, a model that the authors released, or any causal language model."""
    critic: str = ""
    """Folder of the critic trained with it, to show V(s_t) along the response; none: not shown."""
    temperature: float = 1.0
    """Sampling temperature; 0: the likeliest token each time."""
    top_p: float = 1.0
    """Nucleus sampling mass."""
    response_tokens: int = 8000
    """Longest response, within what the model's positions allow."""
    template: Literal["authors", "paper"] = "authors"
    """Prompt wording, as in training."""
    seed: int = 0
    """Of the random stream."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto: bfloat16 on a GPU, float32 elsewhere."""


def main() -> None:
    """Command line; what is wrong with the model or the critic is said in one line."""
    cfg = tyro.cli(Question, description=__doc__, prog="python -m tools.ask")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    question = sys.stdin.read().strip() if cfg.question == "-" else cfg.question
    path = hub_id(cfg.model)
    try:
        config = preflight.model_config(path)
        if cfg.critic and value_head(cfg.critic) is None:
            raise ValueError(
                f"--critic {cfg.critic}: a local folder with a value head is needed, and this holds none"
            )
        tokenizer = AutoTokenizer.from_pretrained(path)
        (problem,) = data.tokenize([Problem("question", question, "")], tokenizer, config.max_position_embeddings - 1,
                                   data.TEMPLATES[cfg.template])  # fmt: skip
    except (ValueError, OSError) as error:
        sys.exit(f"tools.ask: {error}")
    response = answer(cfg, path, tokenizer, problem, config.max_position_embeddings)
    if cfg.critic:
        show_values(cfg.critic, tokenizer, response)
    final = extract(response.text)
    missing = "cut off" if response.finish_reason == "length" else "none in the tags"
    print(f"\nanswer: {final}" if final else f"\nno answer ({missing})")


def answer(
    cfg: Question, path: str, tokenizer: PreTrainedTokenizerBase, problem: Problem, positions: int
) -> Rollout:
    """Sample one response with transformers, printing it as it comes."""
    on_gpu = torch.cuda.is_available()
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    model = (
        AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        .to(distributed.device())
        .eval()
    )
    torch.manual_seed(cfg.seed)
    draw = (
        {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": 0} if cfg.temperature else {}
    )
    prompt = torch.tensor([problem.prompt_ids], device=model.device)
    print("<think>", end="", flush=True)
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=bool(draw), **draw,
        stop_strings=list(STOP), tokenizer=tokenizer,
        max_new_tokens=min(cfg.response_tokens, positions - len(problem.prompt_ids)),
        eos_token_id=preflight.eos_ids(path, tokenizer), pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )[0, len(problem.prompt_ids) :].tolist()  # fmt: skip
    text = tokenizer.decode(ids)
    ended = ids[-1] in preflight.eos_ids(path, tokenizer) or any(stop in text for stop in STOP)
    return Rollout(problem, ids, [0.0] * len(ids), "stop" if ended else "length", text)


@torch.no_grad()
def show_values(
    path: str, tokenizer: PreTrainedTokenizerBase, response: Rollout, per_line: int = 12
) -> None:
    """Print the response again, some tokens a line, each line with V(s_t) at its first token: what the critic expects before
    it reads the line."""
    critic = load_critic(path)  # on the device that distributed.device() names
    longest = len(response.problem.prompt_ids) + len(response.token_ids)
    values = packing.forward_all_tokens(critic, [response], longest, distributed.device()).tolist()
    print("\n V(s_t)")
    for t in range(0, len(values), per_line):
        bar = "█" * round(10 * min(1.0, max(0.0, values[t])))
        text = tokenizer.decode(response.token_ids[t : t + per_line]).replace("\n", "⏎")
        print(f"{values[t]:7.3f} {bar:<10} {text}")


if __name__ == "__main__":
    main()
