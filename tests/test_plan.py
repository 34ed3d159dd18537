"""tools/plan.py: it computes what is really allocated, and what it says fits does fit."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import Ended
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.profiler import ProfilerActivity, profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2Config,
)

import distributed
import policy
import ppo
from config import QWEN, Config, parse
from critic import Critic
from data import Problem
from distributed import Sharding
from packing import MicroBatch, micro_batches
from policy import Policy
from rollout import Rollout
from tools import plan

PARAMETERS = {
    "tiny": 104_256,
    "tiny-long": 104_320,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
}


class Case(NamedTuple):
    """An update to measure. A micro-batch has three sequences: two tokens or more of a prompt, its
    own or that of all three, and a response."""

    role: str
    checkpointing: bool
    layers: int
    vocab: int
    tied: bool
    response: int = 150
    chunk: int = 2**25  # logits held at once
    prompt: int = 2
    shared: bool = False

    @property
    def tokens(self) -> int:
        """Input tokens of a micro-batch. The last token of a sequence is no input."""
        return (1 if self.shared else 3) * self.prompt + 3 * (self.response - 1)

    def cfg(self, folder: str, gpus: int) -> Config:
        return Config(
            model=folder,
            gpus=gpus,
            micro_tokens=self.tokens,
            samples=3 if self.shared else 1,
            critic_steps=1,
            prompt_tokens=self.prompt,
            response_tokens=round(self.response / plan.MEAN),
            activation_checkpointing=self.checkpointing,
        )


CASES = [  # each has its peak at another stage of the update
    Case("policy", False, 3, 1000, False),
    Case("policy", True, 6, 1000, True),
    Case("policy", True, 3, 5000, True),
    Case("policy", True, 3, 5000, False, chunk=2**16),
    Case("policy", True, 2, 5000, True, response=5),
    Case("critic", False, 4, 1000, False),
    Case("critic", True, 6, 1000, True),
    Case("critic", True, 24, 1000, True, response=5),
]
SHARED = [  # prompts that are longer than the responses, and shorter
    Case(role, False, 6, 500, True, prompt=prompt, response=response, shared=True)
    for role in ("policy", "critic")
    for prompt, response in ((240, 80), (60, 180))
]


def random_config(folder: Path, case: Case) -> str:
    """A folder with the config.json of a small Qwen2."""
    config = Qwen2Config(
        vocab_size=case.vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=case.tied,
        pad_token_id=0,
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(folder)
    return str(folder)


def open_module(folder: str, case: Case) -> Policy | Critic:
    """The policy or critic of a case with random weights, sharded."""
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    sharding = Sharding(activation_checkpointing=case.checkpointing)
    settings = {"dtype": torch.float32, "attn_implementation": "packed"}
    if case.role == "policy":
        module = Policy(AutoModelForCausalLM.from_config(config, **settings).eval())
        distributed.apply_fsdp(module, sharding)
    else:
        module = Critic(AutoModelForSequenceClassification.from_config(config, **settings).eval())
        distributed.apply_fsdp(module, sharding, module.model.score)
    return module


def loss(module: Policy | Critic, micro: MicroBatch) -> torch.Tensor:
    if isinstance(module, Policy):
        logp, _ = module(micro)
        return ppo.policy_loss(logp, logp.detach(), torch.ones_like(logp))[0]
    return ppo.value_loss(module(micro), torch.ones(len(micro.actions)))


def two_packs(case: Case) -> list[MicroBatch]:
    """This rank's two micro-batches of an update."""
    count = 2 * 3 * distributed.world_size()
    rollouts = []
    for i in range(count):
        prompt = (i // 3 if case.shared else i,) + (2,) * (case.prompt - 1)
        problem = Problem("", "", "", prompt)
        rollouts.append(Rollout(problem, [3] * case.response, [0.0] * case.response, "", ""))
    packs = list(micro_batches(rollouts, range(count), case.tokens))
    assert [pack.input_ids.numel() for pack in packs] == [case.tokens, case.tokens]
    return packs


def measured(folder: str, case: Case) -> dict[str, int]:
    """The most bytes of live tensors while a model updates, and while it only predicts."""
    gc.collect()  # nothing of an earlier measurement may be freed in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        module = open_module(folder, case)
        optimizer = ppo.adamw(list(module.parameters()))
        for parameter in module.parameters():  # a step of zero gradients creates the moments
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        packs = two_packs(case)
        with record_function("predict"), torch.no_grad():
            module(packs[0])
        with record_function("update"):
            for pack in packs:
                loss(module, pack).backward()
            optimizer.step()
    return most_live_bytes(recorded, "predict", "update")


def most_live_bytes(recorded: profile, *names: str) -> dict[str, int]:
    """The most bytes that are allocated at once inside each recorded function: a running sum over
    the allocator's events."""
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    spans = {e.name(): (e.start_ns(), e.end_ns()) for e in events if e.name() in names}
    live, most = 0, dict.fromkeys(spans, 0)
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
        for name, (start, end) in spans.items():
            if start <= event.start_ns() <= end:
                most[name] = max(most[name], live)
    return most


def agrees(case: Case, cfg: Config, real: dict[str, int]) -> None:
    """The plan is within 7 % of the whole, and within 7 % of what comes on top of weights,
    moments and gradients, which may be a small part of it."""
    parameters = getattr(plan.shape(cfg.model), case.role) / plan.shards(cfg)
    needs = plan.memory(cfg)
    on_top = plan.update(cfg, case.role)
    items = {
        name: size
        for name, size in needs[case.role].items()
        if name.startswith(case.role) or name in on_top
    }
    whole, top = sum(items.values()), sum(on_top.values())
    assert whole == pytest.approx(16 * parameters + top)
    assert whole == pytest.approx(real["update"], rel=0.07), items
    assert top == pytest.approx(real["update"] - 16 * parameters, rel=0.07), on_top
    if case.role == "critic" and case.tokens > 100:
        values = needs["values"]
        top = values["activations"] + values["gathered weights"]
        assert top == pytest.approx(real["predict"] - 12 * parameters, rel=0.15), values


@pytest.mark.parametrize("case", CASES + SHARED, ids=str)
def test_an_update_on_a_cpu_allocates_what_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    monkeypatch.setitem(policy.CHUNK, "cpu", case.chunk)
    monkeypatch.setattr(policy, "LEAST", 1)
    monkeypatch.setattr(distributed, "device", lambda: "cpu")
    folder = random_config(tmp_path, case)
    agrees(case, case.cfg(folder, gpus=0), measured(folder, case))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[str, dict[str, int]]]:
    """The same updates as one of eight ranks makes them, in bfloat16 as on GPUs: the model folder
    and the measurement of each. They run in another process, which only pretends that the seven
    other ranks exist; their absence changes no size."""
    folders = [random_config(tmp_path_factory.mktemp("model"), case) for case in CASES]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, *folders]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    real = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(CASES, zip(folders, real, strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_update_on_eight_gpus_allocates_what_is_computed(
    sharded: dict[Case, tuple[str, dict[str, int]]], monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    folder, real = sharded[case]
    monkeypatch.setitem(policy.CHUNK, "cuda", case.chunk)
    monkeypatch.setattr(policy, "LEAST", 1)
    agrees(case, case.cfg(folder, gpus=8), real)


def pretend_eight_ranks(folders: list[str]) -> None:
    """Measure every case as rank 0 of 8, and print the measurements as JSON."""

    def bfloat16(**_: Any) -> MixedPrecisionPolicy:  # distributed.py asks for it on GPUs only
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, keep: int = 1) -> torch.Tensor:
        return out.zero_()  # on a GPU the product needs no memory beside `out`

    torch.set_num_threads(1)
    policy._add_product = product
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    distributed._started, distributed.MixedPrecisionPolicy = True, bfloat16
    found = []
    for folder, case in zip(folders, CASES, strict=True):
        policy.CHUNK["cpu"], policy.LEAST = case.chunk, 1
        found.append(measured(folder, case))
    print(json.dumps(found))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name: str) -> None:
    shape = plan.shape(name)
    assert shape.policy == PARAMETERS[name]
    vocabulary_head = 0 if shape.tied else shape.vocab * shape.hidden
    assert shape.critic == shape.policy - vocabulary_head + shape.hidden
    assert plan.shape(f"Qwen/{name}") == shape


def test_known_shapes_are_used_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked for a config file")

    monkeypatch.setattr(plan.preflight, "model_config", refuse)
    plan.shape.cache_clear()
    assert plan.shape("Qwen/Qwen2.5-7B").layers == 28


def test_a_folder_is_read(tmp_path: Path) -> None:
    case = Case("policy", False, layers=3, vocab=1234, tied=True)
    shape = plan.shape(random_config(tmp_path, case))
    assert (shape.hidden, shape.layers, shape.width) == (128, 3, 256)
    assert (shape.heads, shape.kv_heads, shape.head_size) == (4, 2, 32)
    assert (shape.vocab, shape.tied) == (1234, True)


def seven(**settings: Any) -> Config:
    """The settings of Qwen2.5-7B, on 8 × 80 GB unless `settings` say otherwise."""
    return replace(parse(["--model", "Qwen2.5-7B"]), **settings)


def test_states_of_7b_on_eight_gpus() -> None:
    """16 bytes per parameter while it trains, over 8 GPUs; 57,344 bytes per token of key-value
    cache; vLLM has its share."""
    needs = plan.memory(seven())
    policy_parameters = PARAMETERS["Qwen2.5-7B"]
    critic_parameters = policy_parameters - 152064 * 3584 + 3584

    def states(role: str) -> float:
        names = (f"{role} {state}" for state in ("weights", "moments", "gradients"))
        return sum(needs["policy"].get(name, 0) for name in names)

    assert states("policy") == 16 / 8 * policy_parameters
    assert states("critic") == 12 / 8 * critic_parameters
    assert plan.kv_bytes(seven()) == 57_344
    assert plan.kv_bytes(seven(tensor_parallel=4)) == 57_344 / 4  # it has 4 key-value heads
    assert plan.kv_bytes(seven(tensor_parallel=7)) == 57_344 / 4
    assert sum(plan.sampler(seven()).values()) == pytest.approx(0.4 * 80e9)
    assert "sampler weights" in needs["sync"] and "sampler weights" not in needs["critic"]


def test_less_per_gpu_on_more_gpus_and_more_for_more_tokens() -> None:
    peaks = [plan.peak(seven(gpus=gpus))[1] for gpus in (1, 2, 4, 8, 16, 32)]
    assert all(more > less for more, less in pairwise(peaks))
    updates = [plan.memory(seven(micro_tokens=2**i))["policy"] for i in (14, 15, 16)]
    needs = [sum(items.values()) for items in updates]
    assert all(less < more for less, more in pairwise(needs))
    assert plan.peak(seven(gpus=16, replicas=2)) == plan.peak(seven(gpus=8))
    assert plan.peak(seven(activation_checkpointing=False))[1] > plan.peak(seven())[1]


def test_offload_lowers_every_phase_and_takes_time() -> None:
    kept, moved = plan.memory(seven()), plan.memory(seven(offload=True))
    assert all(sum(moved[phase].values()) < sum(kept[phase].values()) for phase in kept)
    assert not any(name.startswith(("policy", "critic")) for name in moved["sample"])
    slower, faster = plan.work(seven(offload=True)), plan.work(seven())
    for phase in ("values", "critic", "policy", "sync"):
        assert slower[phase][1] > faster[phase][1]


def test_without_a_critic_and_with_a_reference() -> None:
    items = plan.memory(seven(advantage="grpo", kl_loss=0.1))
    assert list(items) == list(plan.work(seven(advantage="grpo"))) == ["sample", "policy", "sync"]
    assert not any(name.startswith("critic") for phase in items.values() for name in phase)
    assert items["policy"]["reference weights"] == PARAMETERS["Qwen2.5-7B"] / 2


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("model", "gpus"), [("Qwen2.5-0.5B", 1), ("Qwen2.5-7B", 8), ("Qwen2.5-32B", 16)]
)
def test_the_largest_micro_batch_fits_and_the_next_does_not(
    model: str, gpus: int, offload: bool
) -> None:
    cfg = replace(parse(["--model", model]), gpus=gpus, offload=offload)
    largest = plan.largest_micro_tokens(cfg)
    if not largest:
        assert plan.obstacles(replace(cfg, micro_tokens=1))
        return
    assert plan.obstacles(replace(cfg, micro_tokens=largest)) == []
    assert plan.obstacles(replace(cfg, micro_tokens=largest + 1))


def test_a_remedy_fits_and_the_verdict_names_it() -> None:
    cfg = replace(parse(["--model", "Qwen2.5-1.5B"]), gpus=1, gpu_memory=40.0)
    assert plan.obstacles(cfg)
    remedy = plan.remedy(cfg)
    assert remedy and plan.obstacles(remedy) == []
    assert plan.flags(remedy, cfg) in plan.verdict(cfg)
    assert plan.remedy(replace(cfg, gpu_memory=8.0)) is None
    assert "--gpus" in plan.verdict(seven(gpus=1))
    assert plan.verdict(seven()) == "It fits."


def test_vllm_must_hold_a_whole_sequence() -> None:
    (why,) = plan.obstacles(seven(vllm_memory=0.22))
    assert "cannot hold one sequence" in why
    assert "--vllm-memory" in plan.verdict(seven(vllm_memory=0.22))


def test_operations_of_a_step() -> None:
    """With P parameters in the layers, a token costs 2·P forward, and 8·P in an update with
    activation checkpointing. A prompt is read once for all of its responses that meet: in the
    values and the policy's update all 64, in the critic's twelve mini-batches a twelfth of them.
    The policy's update has the vocabulary head besides."""
    cfg = seven(response_tokens=8, prompt_tokens=64)  # too short for attention to matter
    shape, work = plan.shape(cfg.model), plan.work(cfg)
    weights = shape.layers * shape.layer
    responses = cfg.prompts * cfg.samples  # of one token each
    tokens = responses + 64 * cfg.prompts
    assert work["values"][0] == pytest.approx(2 * weights * tokens, rel=0.01)
    head = 8 * shape.vocab * shape.hidden * responses
    assert work["policy"][0] == pytest.approx(8 * weights * tokens + head, rel=0.01)
    tokens = responses + 64 * 12 * cfg.prompts
    assert work["critic"][0] == pytest.approx(8 * weights * tokens, rel=0.01)
    halved = plan.work(replace(cfg, gpus=16))
    assert halved["critic"][1] == pytest.approx(work["critic"][1] / 2)


def test_decoding_is_bounded_by_memory_and_by_the_longest_response() -> None:
    """It takes at least the time to read the weights once for every token of the longest
    response."""
    work = plan.work(seven(prompts=1, samples=8))  # one response on each GPU
    read_weights = 2 * PARAMETERS["Qwen2.5-7B"] / (0.65 * 3.35e12)
    assert work["sample"][1] == pytest.approx(8000 * read_weights)
    assert plan.work(seven())["sample"][1] > work["sample"][1]


@pytest.mark.parametrize(
    "arguments",
    [["--model", "Qwen2.5-7B"], ["--model", "Qwen2.5-32B", "--offload"], ["--gpus", "0"]],
)
def test_show_adds_up(arguments: list[str]) -> None:
    cfg = parse(arguments)
    text = plan.show(cfg)
    most = plan.peak(cfg)[1]
    scale = 1e9 if most > 1e9 else 1e6
    assert f"{most / scale:.1f}" in text
    assert f"{plan.largest_micro_tokens(cfg):,}" in text
    assert text.endswith(plan.verdict(cfg))
    assert ("TFLOP/s" in text) == bool(cfg.gpus)


def test_hardware_table_is_what_the_functions_say(call: Callable[..., Ended]) -> None:
    printed = call(plan.main).out.strip()
    assert printed == plan.hardware_table()
    header, _, *rows = (line.strip("| ").split(" | ") for line in printed.splitlines())
    assert [row[0] for row in rows] == list(QWEN)
    cells = {(row[0], place): row[i] for row in rows for i, place in enumerate(header, 1)}
    assert cells["Qwen2.5-7B", "8 × 80 GB"] == "yes" and not plan.obstacles(seven())
    assert cells["Qwen2.5-7B", "1 × 80 GB"] == "–" and plan.remedy(seven(gpus=1)) is None
    assert call(plan.main, "--gpus", 8).code != 0  # it has no options


if __name__ == "__main__":
    pretend_eight_ranks(sys.argv[1:])
