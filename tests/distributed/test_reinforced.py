"""The stage of reinforcement learning: sampling and training agree, on every layout and over a resume."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from layouts import FAMILY, RATE, SmallRun, gather_parameters, small_config
from torch import Tensor

from data_pipeline.prepare import prepare
from data_pipeline.prompts import Prompt, Prompts
from moe.config import ConfigError
from trainer.checkpoints.assemble import build_model
from trainer.engine.loss import agree_on_totals
from trainer.engine.policy import SUMS, PolicyBatch
from trainer.stages.reinforced import Reinforced
from trainer.train import train_step

TOLERANCE = 1e-5
PATTERN = "rl.verifiers={vowel: {kind: regex, weight: 1.0, options: {pattern: '[aeiou]', match: search}}}"
# ZeRO-3 would never release the small weights of this model, nor one that it needs again soon
_ZERO3 = "++deepspeed.zero_optimization.stage3"
RELEASED = [f"{_ZERO3}_param_persistence_threshold=0", f"{_ZERO3}_max_reuse_distance=0"]
SMALL_GROUPS = [
    *("model.vocab_size=512", "model.initializer_range=0.3", "stage.seq_len=64"),
    *("stage.global_batch_size=16", "micro_batch_size=4", "rl=grpo", "rl.group_size=4", PATTERN),
    *("rl.max_prompt_tokens=48", "rl.sampling.max_new_tokens=12", "rl.sampling.rows_at_once=5"),
    *("evaluate.rows=3", "parallel.ep_size=1", "deepspeed=zero0"),
]


def prepare_prompts(folder: Path, held_out: float, texts: list[str]) -> list[str]:
    """Overrides for a prepared source of prompts."""
    rows = [{"prompt": text, "answer": "e"} for text in texts]
    (folder / "asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        *("data=jsonl", f"data.dir={folder}/prepared", "data.tokenizer_vocab_size=512"),
        *(f"data.validation_fraction={held_out}", "data.slice_bytes=1000"),
        f"+data.sources.asks={{kind: prompts, paths: [{folder}/asks.jsonl]}}",
    ]
    config = small_config(*SMALL_GROUPS, *overrides)
    prepare(config.data, 512, config.seed)
    return overrides


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Prompts of different lengths."""
    texts = [" ".join(f"{n * k}" for k in range(n % 5)) + f" {n}" for n in range(80)]
    return prepare_prompts(tmp_path_factory.mktemp("prompts"), 0.1, texts)


def open_stage(run: SmallRun, step: int = 0, state: dict[str, Any] | None = None) -> Reinforced:
    build = partial(build_model, plan=run.plan, ranks=run.ranks)
    return Reinforced(run.config, run.ranks, run.engine, run.balance, step, state or {}, build)


def train(run: SmallRun, stage: Reinforced) -> tuple[list[PolicyBatch], dict[str, Any]]:
    """One step, as the loop of train.py does it; its micro-batches, and the metrics of the stage."""
    batches = stage.micro_batches()
    totals = agree_on_totals(batches, False)
    train_step(run.engine, run.balance, stage.loss_shares, batches, totals, RATE)
    learned = sum(int((batch.weights > 0).sum()) for batch in batches)
    assert stage._sums[SUMS.index("tokens")] == learned, "of this step alone"
    return batches, stage.metrics()


def largest_difference(run: SmallRun, batches: list[PolicyBatch]) -> float:
    """Of the log-probabilities of labels, between sampling and a forward of training."""
    found = []
    for batch in batches:
        output = run.engine.forward(batch, run.balance.bias)
        apart = (output.log_probs - batch.sampled_log_probs)[batch.labels != -100]
        assert len(apart) == batch.label_tokens > 0
        found.append(apart.abs().max().item())
    return max(found)


def sample_and_train(cases: list[list[str]]) -> list[dict[str, Any]]:
    """For each list of overrides: the differences in two phases, and the metrics after each step."""
    found = []
    for overrides in cases:
        run = SmallRun(*overrides)
        stage = open_stage(run)
        result: dict[str, Any] = {"differences": [], "metrics": [], "training": []}
        for _ in range(2):
            with torch.no_grad():
                before = stage._step
                batches = stage.micro_batches()
                result["differences"].append(largest_difference(run, batches))
                stage._step = before  # the same phase again, which is the same to the bit
            again, metrics = train(run, stage)
            assert all(
                torch.equal(one.input_ids, two.input_ids)
                and torch.equal(one.sampled_log_probs, two.sampled_log_probs)
                for one, two in zip(batches, again, strict=True)
            )
            result["metrics"].append(metrics)
            result["training"].append(run.engine.module.training)
        stage.close()
        run.engine.close()
        found.append(result)
    return found


LAYOUTS = {
    "zero0": ["deepspeed=zero0"],
    "zero1-ep2": ["deepspeed=zero1", "parallel.ep_size=2", "balance.bias_update_rate=0.01"],
    "zero2-ep2": ["deepspeed=zero2", "parallel.ep_size=2", "recompute=full"],
    "zero3": ["deepspeed=zero3", *RELEASED],
    "zero3-ep2": ["deepspeed=zero3", "parallel.ep_size=2", *RELEASED],
    "zero3-ep2-layerwise": [
        *("deepspeed=zero3", "parallel.ep_size=2", "rl.sampling.gather_weights=false", *RELEASED)
    ],
    **{f"{name}-zero1": [*of, "deepspeed=zero1"] for name, of in FAMILY.items()},
    "hot": ["rl.sampling.temperature=1.7"],
}


def test_the_probabilities_of_sampling_are_those_of_training(prompts: list[str]) -> None:
    cases = [[*SMALL_GROUPS, *prompts, *of] for of in LAYOUTS.values()]
    for of_rank in run_ranks(sample_and_train, 2, cases, timeout=600):
        for name, found in zip(LAYOUTS, of_rank, strict=True):
            assert max(found["differences"]) < TOLERANCE, (name, found["differences"])
            for metrics in found["metrics"]:
                assert metrics["ratio"] == pytest.approx(1, abs=TOLERANCE), name
                assert metrics["clipped_low"] == metrics["clipped_high"] == 0
            assert found["training"] == [True, True], f"{name}: sampling leaves the model in training mode"


def learn(overrides: list[str], steps: int) -> dict[str, Any]:
    """Train for some steps, with an evaluation in between."""
    run = SmallRun(*overrides)
    stage, found = open_stage(run), {"completions": [], "metrics": [], "held out": []}
    asked, complete = [], stage._completer.complete

    def listening(prompts: list[Prompt], each: int, temperature: float, *more: Any) -> Any:
        asked.append((temperature == 0, each, {prompt.fields["prompt"] for prompt in prompts}))
        return complete(prompts, each, temperature, *more)

    stage._completer.complete = listening  # type: ignore[method-assign]
    for _ in range(steps):
        _, metrics = train(run, stage)
        assert stage._of_step is not None
        some = stage._of_step.completions
        found["completions"].append([(one.row, one.number, one.ids, one.reward) for one in some])
        found["metrics"].append({key: value for key, value in metrics.items() if "second" not in key})
        found["held out"].append(stage.evaluate())
    trained, held_out = (
        set.union(*(of for is_greedy, _, of in asked if is_greedy == how)) for how in (False, True)
    )
    assert len(held_out) == run.config.evaluate.rows
    assert not trained & held_out
    assert len(trained) == 4 * steps, "each phase asks other prompts"
    assert {each for is_greedy, each, _ in asked if is_greedy} == {1}
    learned = {row for of in found["completions"] for row, *_ in of}
    assert len(learned) == 4 * steps, "each step learns from prompts of its own"
    for of in found["completions"]:
        assert len({tuple(ids) for _, _, ids, _ in of}) > 4, "the completions of a prompt differ"
    found["parameters"] = gather_parameters(run.engine, run.plan, run.ranks)
    stage.close()
    run.engine.close()
    return found


def test_every_layout_gives_the_same_run(prompts: list[str]) -> None:
    """Completions, rewards, losses and weights, over steps with evaluations in between."""
    shared = [
        *SMALL_GROUPS,
        *prompts,
        "balance.bias_update_rate=0.01",
        "rl.updates=2",
        "rl.advantage=deviation",
        "rl.loss_sum=token",
    ]
    [expected] = run_ranks(learn, 1, [*shared, "micro_batch_size=16"], 4, timeout=200)
    assert 0 < sum(of["reward"] for of in expected["metrics"]) < 4, "rewards that differ"
    for layout in (["micro_batch_size=2", *LAYOUTS["zero1-ep2"]], ["micro_batch_size=8", *LAYOUTS["zero3"]]):
        for found in run_ranks(learn, 2, [*shared, *layout], 4, timeout=300):
            assert found["completions"] == expected["completions"], layout
            for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
                assert mine["samples"] == theirs["samples"]
                numbers = [key for key, value in theirs.items() if isinstance(value, float | int)]
                assert {key: mine[key] for key in numbers} == pytest.approx(
                    {key: theirs[key] for key in numbers}, rel=1e-4, abs=TOLERANCE
                ), layout
            for mine, theirs in zip(found["held out"], expected["held out"], strict=True):
                assert mine == pytest.approx(theirs)
            for name, value in expected["parameters"].items():
                apart = (found["parameters"][name] - value).abs().max() / value.abs().max()
                assert apart < 1e-4, (name, layout)


def stop_inside_a_phase(overrides: list[str]) -> dict[str, Any]:
    """The second step of a phase from a stage that goes on, and from one that starts with its state."""
    run = SmallRun(*overrides)
    stage = open_stage(run)
    train(run, stage)
    straight, file = stage.micro_batches(), io.BytesIO()  # the loop has them when it hears of a stop
    torch.save(stage.state(1), file)
    file.seek(0)
    other = open_stage(run, step=1, state=torch.load(file, weights_only=True))
    resumed = other.micro_batches()
    assert stage.state(2) == other.state(2) == {}, "the phase is over"
    for one, two in zip(straight, resumed, strict=True):
        for key, value in vars(one).items():
            theirs = vars(two)[key]
            assert torch.equal(value, theirs) if isinstance(value, Tensor) else value == theirs, key
    differs = largest_difference(run, resumed)
    first, second = ([one.ids for one in of._of_step.completions] for of in (stage, other))
    stage.close()
    other.close()
    run.engine.close()
    return {"differs": differs, "same": first == second}


@pytest.mark.parametrize("replay", ["none", "replay"])
def test_a_phase_goes_on_from_its_state(prompts: list[str], replay: str) -> None:
    overrides = [*SMALL_GROUPS, *prompts, "rl.updates=2", f"rl.sampling.router_replay={replay}"]
    for found in run_ranks(stop_inside_a_phase, 2, overrides, timeout=200):
        assert found["same"]
        assert found["differs"] > 1e-3, "the weights have moved, the kept probabilities have not"


def test_experts_that_differ_in_bf16_are_counted_and_replayed(prompts: list[str]) -> None:
    close = ["model.num_experts=32", "model.num_experts_per_tok=8", "init.router_scale=0.01"]  # near ties
    base = [*SMALL_GROUPS, *prompts, "dtype=bf16", *close]
    cases = [[*base, f"rl.sampling.router_replay={how}"] for how in ("none", "measure", "replay")]
    for none, measured, replayed in run_ranks(sample_and_train, 2, cases, timeout=300):
        assert all("router_mismatch" not in metrics for metrics in none["metrics"])
        assert all(0 < metrics["router_mismatch"] < 0.2 for metrics in measured["metrics"]), measured
        assert all(metrics["router_mismatch"] == 0 for metrics in replayed["metrics"])


def judge(overrides: list[str]) -> dict[str, Any]:
    """A step whose verifier fails on some completions."""
    run = SmallRun(*overrides)
    stage = open_stage(run)
    _, metrics = train(run, stage)
    stage.close()
    run.engine.close()
    return metrics


def test_a_verifier_that_raises_costs_its_completions_only(
    prompts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "def check(fields, completion, options):\n"
        "    if len(completion) % 2: raise RuntimeError('odd')\n"
        "    return 1.0, f'{len(completion)} characters'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    settings = [one for one in SMALL_GROUPS if one != PATTERN]
    mine = "rl.verifiers={mine: {kind: 'mine:check', weight: 1.0}}"
    for metrics in run_ranks(judge, 2, [*settings, *prompts, mine]):
        assert 0 < metrics["failed_checks"] < 1
        assert metrics["reward"] == pytest.approx(1 - metrics["failed_checks"])
        assert {of["reasons"]["mine"][0] for of in metrics["samples"]} <= {"0", "1"}


def rewards_over(overrides: list[str], seeds: list[int], steps: int) -> list[list[float]]:
    """For each seed the mean reward of every step, from random weights."""
    found = []
    for seed in seeds:
        run = SmallRun(*overrides, f"seed={seed}")
        stage = open_stage(run)
        found.append([train(run, stage)[1]["reward"] for _ in range(steps)])
        stage.close()
        run.engine.close()
    return found


def test_rewards_rise(prompts: list[str]) -> None:
    """A small form of experiment=demo_rl: the model learns to write what is rewarded, for every seed."""
    chosen = ["stage.global_batch_size=32", "micro_batch_size=16", "rl.loss_sum=token", "deepspeed=zero1"]
    few = "rl.verifiers={short: {kind: regex, weight: 1.0, options: {pattern: '[^aeiou]*'}}}"
    settings = [one for one in SMALL_GROUPS if one != PATTERN]
    overrides = [*settings, *prompts, *chosen, few]
    for rewards in run_ranks(rewards_over, 2, overrides, [1, 2, 3], 24, timeout=300)[0]:
        first, last = sum(rewards[:4]) / 4, sum(rewards[-4:]) / 4
        assert last > first + 0.25, rewards


def refused(overrides: list[str], limits: list[int]) -> list[str]:
    """What a stage says that is opened with each of these limits; "" if nothing."""
    said = []
    for limit in limits:
        run = SmallRun(*overrides, f"rl.max_prompt_tokens={limit}")
        try:
            open_stage(run).close()
            said.append("")
        except ConfigError as error:
            said.append(str(error))
        run.engine.close()
    return said


def test_no_prompt_is_longer_than_allowed(tmp_path: Path) -> None:
    """Neither to learn from nor to be evaluated. Most prompts are held out here, among them the longest."""
    overrides = [*SMALL_GROUPS, *prepare_prompts(tmp_path, 0.9, ["7" * n for n in range(1, 25)])]
    config, lengths = small_config(*overrides), {}
    for split in ("train", "validation"):
        with Prompts(config.data, seed=config.seed, split=split, source="asks") as some:
            lengths[split] = max(len(some[n].ids) for n in range(len(some)))
            assert some.longest() == lengths[split]
    train, held_out = lengths["train"], lengths["validation"]
    assert train < held_out
    limits = [train - 1, train, held_out - 1, held_out]
    for said in run_ranks(refused, 2, overrides, limits):
        for limit, longest, message in zip(limits, (train, held_out, held_out), said, strict=False):
            assert f"has {longest} tokens, but rl.max_prompt_tokens={limit}; raise it" in message
        assert said[-1] == ""
