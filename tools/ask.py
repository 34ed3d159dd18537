"""Ask a model one question with its training prompt, and print its answer as it is generated.

    python -m tools.ask "How many positive divisors does 196 have?" \\
        --model Open-Reasoner-Zero/Open-Reasoner-Zero-7B
    python -m tools.ask "7+4+12+3+9+6+11=?" --model runs/demo/policy --critic runs/demo/critic

These models were trained with one prompt template, and they end a response with `</answer>` instead
of an end-of-sequence token. With another prompt, or without the stop strings, they ramble. Both are
those that the model was trained with, as far as its folder says (prompt.json), or the authors'.

With a critic, V(s_t) is printed along the response: the critic's estimate of the chance that the
answer will be right, given the question and the text so far (γ = λ = 1, R ∈ {0, 1}).
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import torch
import transformers
import tyro
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, TextStreamer

import data
import distributed
import packing
import preflight
from config import Range, SamplingSettings, hub_id, validate_ranges
from critic import load_critic
from data import Problem
from grading.extract import extract
from hf_sampler import load_for_sampling
from rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Question(SamplingSettings):
    """A question, the model that is asked, and how it samples."""

    question: Annotated[str, tyro.conf.Positional]
    """The question; `-` reads it from standard input."""
    model: str = "runs/demo/policy"
    """Folder or hub id: a run's exported policy, a model that the authors released, or any causal
    language model."""
    critic: str = ""
    """Folder of the critic trained with it, to print V(s_t) along the response; none: not
    printed."""
    template: str = "auto"
    """auto: the prompt that the model was trained with, which an exported folder keeps in its
    prompt.json; without one, authors. Otherwise as for train.py."""
    stop: tuple[str, ...] | None = None
    """Strings that end a response; none: those that the model was trained with, as for
    --template."""
    temperature: Annotated[float, Range(0, 100)] = 1.0
    """Sampling temperature; 0: the likeliest token each time."""


def main() -> None:
    """Command line. An error of the model or the critic is printed in one line."""
    settings = tyro.cli(Question, description=__doc__, prog="python -m tools.ask")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = hub_id(settings.model)
    try:
        validate_ranges(settings)
        path = preflight.model_folder("--model", name)
        config = preflight.model_config(path)
        if not settings.temperature:
            names, why = ("top_p", "seed"), "with --temperature 0, which draws nothing"
            preflight.refuse_without_effect(settings, Question(question=""), names, why)
        settings = preflight.with_prompt(settings, path)
        template = data.template_text(settings.template)
        longest = len(template) + len(settings.question) + settings.response_tokens
        positions = getattr(config, "max_position_embeddings", None) or longest
        preflight.require_unquantized(config, path)
        tokenizer = preflight.load_tokenizer(path, config.vocab_size)
        if settings.critic:  # V(s_t) is read as in training
            of_critic = preflight.check_critic(
                "--critic", settings.critic, config, tokenizer, longest
            )
            positions = min(
                positions, getattr(of_critic, "max_position_embeddings", 0) or positions
            )
        eos = preflight.eos_ids(path, tokenizer, config.vocab_size)
        problem = tokenized(settings, tokenizer, max_tokens=positions - 1)
        path = preflight.model_folder("--model", name, weights=True)
        model = load_for_sampling(path, torch_dtype(settings.dtype)).to(distributed.device())
    except (ValueError, OSError) as error:
        sys.exit(f"tools.ask: {error}")
    response = answer(settings, model, tokenizer, eos, problem, positions)
    del model  # the critic takes its place
    if settings.critic:
        try:
            show_values(settings.critic, settings.dtype, tokenizer, response)
        except (ValueError, OSError) as error:  # its weights are not those of its architecture
            sys.exit(f"tools.ask: {error}")
    print_answer(response)


def tokenized(settings: Question, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Problem:
    """The question in the prompt template. Raises ValueError if it has more than `max_tokens`."""
    text = settings.question
    if text == "-":
        text = sys.stdin.read()
    text = text.strip()
    if not text:
        raise ValueError("the question is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("the question is not text in UTF-8")
    question = Problem(source="question", question=text, answer="")
    template = data.template_text(settings.template)
    (problem,) = data.tokenize([question], tokenizer, max_tokens, template)
    return problem


def answer(
    settings: Question,
    model: transformers.PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos: list[int],
    problem: Problem,
    positions: int,
) -> Rollout:
    """Sample one response with transformers, and print it as it is generated. Prompt and response
    together have at most `positions` tokens."""
    prompt = torch.tensor([problem.prompt_ids], device=model.device)
    sampling = {"do_sample": False}
    if settings.temperature:
        sampling = {"do_sample": True, "temperature": settings.temperature}
        sampling |= {"top_p": settings.top_p, "top_k": 0}
    model.generation_config.stop_strings = None  # exports of early versions have some
    longest = max((len(stop.encode()) for stop in settings.stop), default=1)

    def ends(token_ids: Tensor, _: object) -> Tensor:
        """Whether the response, without the prompt, holds a stop string, as for the samplers."""
        tail = tokenizer.decode(token_ids[0, len(problem.prompt_ids) :][-longest:])
        return torch.tensor([any(stop in tail for stop in settings.stop)], device=model.device)

    torch.manual_seed(settings.seed)
    if data.template_text(settings.template).endswith("<think>"):
        print("<think>", end="", flush=True)
    sequences = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(settings.response_tokens, positions - len(problem.prompt_ids)),
        stopping_criteria=StoppingCriteriaList([ends]),
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
        **sampling,
    )
    token_ids = sequences[0, len(problem.prompt_ids) :].tolist()
    text = tokenizer.decode(token_ids)
    stopped = token_ids[-1] in eos or any(stop in text for stop in settings.stop)
    finish_reason = "stop" if stopped else "length"
    return Rollout(problem, token_ids, [0.0] * len(token_ids), finish_reason, text)


def print_answer(response: Rollout) -> None:
    """Print the extracted answer, or why there is none."""
    final = extract(response.text)
    if final:
        print(f"\nanswer: {final}")
    elif response.finish_reason == "length":
        print("\nno answer (cut off)")
    else:
        print("\nno answer (none in the tags)")


def torch_dtype(dtype: str) -> torch.dtype:
    """The dtype of that name; `auto` is bfloat16 on a GPU, else float32. (On a GPU, attention in
    float32 would hold T × T scores.)"""
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, dtype)


@torch.no_grad()
def show_values(
    path: str, dtype: str, tokenizer: PreTrainedTokenizerBase, response: Rollout, per_line: int = 12
) -> None:
    """Print the response again, `per_line` tokens a line. Each line begins with V(s_t) at its first
    token: what the critic expects before it reads the line."""
    critic = load_critic(path)
    critic.model.base_model.to(torch_dtype(dtype))  # the head stays float32, as in training
    length = len(response.problem.prompt_ids) + len(response.token_ids)
    values = packing.forward_all_tokens(critic, [response], length, distributed.device()).tolist()
    print("\n V(s_t)")
    for t in range(0, len(values), per_line):
        bar = "█" * round(10 * min(1.0, max(0.0, values[t])))
        text = tokenizer.decode(response.token_ids[t : t + per_line]).replace("\n", "⏎")
        print(f"{values[t]:7.3f} {bar:<10} {text}")


if __name__ == "__main__":
    main()
