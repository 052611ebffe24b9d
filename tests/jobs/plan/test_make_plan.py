"""The planner against known runs, against what the trainer really allocates, and where its inputs
disagree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.cli import main
from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig
from jobs.exact.run_state import run_state
from jobs.exact.run_values import run_sharding
from jobs.plan.formulas import (
    checkpoint_interval_s,
    goodput,
    gpu_days,
    mean_time_between_failures_s,
    parameter_flops,
)
from jobs.plan.make_plan import make_plan
from jobs.plan.memory import activation_bytes, gpu_memory, host_memory, layout_of
from jobs.plan.table import size, table
from model.config import GPTConfig
from model.gpt import GPT
from raymill.sums.step_plan import StepPlan
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.runs import trained_run
from tests.repository import REPOSITORY

GPT3 = {
    "model": {"preset": "gpt3-175b"},
    "train": {"max_tokens": 300_000_000_000, "precision": "bf16"},
}


def planned(run: dict[str, Any], **options: Any) -> dict[str, Any]:
    return make_plan(RunConfig.model_validate(run), PlanConfig.model_validate(options))


def small(**train: Any) -> dict[str, Any]:
    """A run that gives no cause for a warning."""
    train = {"max_tokens": 10_000_000_000, "precision": "bf16", "global_batch_size": 512} | train
    return {
        "model": {"preset": "gpt2-124m"},
        "train": train,
        "checkpoint": {"save_every_steps": 500},
    }


def test_gpt3_as_its_paper_counts_it() -> None:
    flops = parameter_flops(174.6e9, 300e9)
    assert flops == pytest.approx(3.14e23, rel=1e-3)
    assert gpu_days(flops, 1e15) == pytest.approx(3637, abs=1)
    assert gpu_days(flops, 28e12) == pytest.approx(129_900, rel=1e-3)


def test_gpt3_on_1024_a100_with_recomputation() -> None:
    """Narayanan et al., 2021, section 5.1: 8 N D / (1024 x 140 TFLOP/s) is 33.9 days for 175
    billion parameters."""
    assert gpu_days(parameter_flops(175e9, 300e9, recompute=True), 140e12) / 1024 == pytest.approx(
        33.9, abs=0.05
    )
    run = GPT3 | {"train": GPT3["train"] | {"recompute": True}}
    plan = planned(run, gpu="a100", count=1024, sustained_tflops=140)
    assert plan["days"] == pytest.approx(33.9, rel=0.003)
    assert plan["total_flops"] == pytest.approx(3.14e23, rel=2e-3)


def test_gpt3_on_v100() -> None:
    plan = planned(GPT3, gpu="v100", count=10_000, sustained_tflops=28)
    assert plan["gpu_days"] == pytest.approx(129_900, rel=1e-3)
    assert plan["petaflop_s_days"] == pytest.approx(3637, abs=1)
    assert plan["mfu"] == pytest.approx(0.23, abs=0.01), "PaLM's table 3 has 0.213 for it"


def test_an_mfu_is_a_share_of_the_peak_with_attention() -> None:
    plan = planned(GPT3, gpu="h100", count=512, mfu=0.5)
    assert plan["model_flops"] > plan["total_flops"]
    assert plan["days"] * 86400 == pytest.approx(plan["model_flops"] / (512 * 0.5 * 989e12))
    assert plan["tokens_per_s"] * plan["days"] * 86400 == pytest.approx(300e9)
    assert plan["cost"] == pytest.approx(plan["gpu_days"] * 24 * 3.0)
    assert planned(GPT3, gpu="h100", count=512, mfu=0.5, price=1.5)["cost"] == pytest.approx(
        plan["cost"] / 2
    )


def test_intervals_by_young_and_daly() -> None:
    # Young's, for a small cost
    assert checkpoint_interval_s(1, 1e6) == pytest.approx(2**0.5 * 1e3, rel=1e-3)
    # Daly's equation 37, by hand
    assert checkpoint_interval_s(60, 3600) == pytest.approx(617.9, abs=0.1)
    assert checkpoint_interval_s(10, 4) == 4
    assert mean_time_between_failures_s(50_000, 16_384) / 3600 == pytest.approx(3.05, abs=0.01), (
        "Llama 3: every 3 h"
    )
    chances = {"cost_s": 60.0, "restart_s": 120.0, "mtbf_s": 36_000.0}
    best = checkpoint_interval_s(60, 36_000)
    shares = [goodput(interval_s=interval, **chances) for interval in (best / 3, best, 3 * best)]
    assert max(shares) == shares[1]
    assert goodput(interval_s=60, cost_s=1, restart_s=100, mtbf_s=100) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_activations_are_those_that_autograd_keeps(precision: str, activation: Any) -> None:
    of_llama: Any = (
        {"architecture": "llama", "n_kv_head": 2, "n_inner": 160} if activation == "swiglu" else {}
    )
    shape = GPTConfig(
        301,
        n_positions=32,
        n_layer=3,
        n_head=4,
        n_embd=64,
        activation_function=activation,
        **of_llama,
    )
    config = RunConfig.model_validate(
        {
            "model": vars(shape),
            "train": {"micro_batch_size": 4, "precision": precision, "max_tokens": 10**6},
        }
    )
    model = GPT(shape)
    model.init_weights(0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Or its copy in bf16
        is_weight = tensor.shape in {parameter.shape for parameter in model.parameters()}
        if storage.data_ptr() not in weights and not is_weight:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    token_ids = torch.randint(301, (4, 32))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        loss = model.loss(token_ids, token_ids)
    # A ReLU keeps its output, which the layer after it keeps anyway; GELU its input.
    spared = 3 * 4 * 32 * 256 * (2 if precision == "bf16" else 4) if activation == "relu" else 0
    assert sum(kept.values()) == pytest.approx(
        activation_bytes(config) - spared, rel=0.05 if of_llama else 0.03
    )
    loss.backward()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("shard", "group"),
    [("none", None), ("optimizer", None), ("gradients", 2), ("parameters", 2), ("parameters", 4)],
)
def test_what_a_worker_keeps_has_the_planned_sizes(
    precision: str, shard: str, group: int | None
) -> None:
    """Of one of four workers, made without the other ones."""
    config = RunConfig.model_validate(
        {
            "model": {"preset": "small-10m", "vocab_size": 3000},
            "train": {
                "global_batch_size": 32,
                "micro_batch_size": 1,
                "max_tokens": 10**6,
                "precision": precision,
            },
            "scaling": {"shard": shard, "shard_group": group},
        }
    )
    model, workers = GPT(config.model), WorkerGroup(rank=1, world_size=4)
    model.init_weights(0)
    largest = max(parameter.numel() for parameter in model.parameters())
    embeddings = model.transformer.wte.weight.nbytes + model.transformer.wpe.weight.nbytes
    sharding = run_sharding(config.scaling, rank=1, world_size=4)
    state = run_state(
        model, config.train, device=torch.device("cpu"), group=workers, sharding=sharding
    )
    parts = gpu_memory(config, layout_of(config), world_size=4)
    num_buffers = StepPlan(sharding, 32, 1).num_buffers
    assert num_buffers == {"none": 3, "optimizer": 3, "gradients": 4}.get(
        shard, 4 if group == 2 else 5
    )
    assert parts["weights"] == pytest.approx(state.values.nbytes, rel=0.02)
    assert parts["gradients"] == pytest.approx(state.gradient.nbytes, rel=0.02)
    assert parts["optimizer"] == pytest.approx(
        sum(moment.nbytes for moment in state.vectors.values()), rel=0.02
    )
    assert parts["lane_sums"] == pytest.approx(
        (num_buffers - 1) * state.gradient.nbytes + 4 * largest, rel=0.02
    )
    passing = {
        weights.untyped_storage().data_ptr(): weights.untyped_storage().nbytes()
        for weights in model.parameters()
    }
    assert parts["two_blocks"] == pytest.approx(
        sum(passing.values()) if shard == "parameters" else 0, rel=0.01
    )
    assert parts["embeddings"] == {"gradients": embeddings, "parameters": 2 * embeddings}.get(
        shard, 0
    )
    state.close()


def test_the_memory_of_1_3b_is_as_its_table_says() -> None:
    """The columns of the table in k8s/scale.md: one of eight GPUs, with a batch of 512
    sequences."""
    both = {"recompute": True, "micro_batches_per_lane": 16}
    columns = [{}, {"recompute": True}, {"micro_batches_per_lane": 16}, both, both, both, both]
    sizes = {
        "global_batch_size": 512,
        "micro_batch_size": 4,
        "max_tokens": 10**10,
        "precision": "bf16",
    }
    shards = ["none", "none", "none", "none", "optimizer", "gradients", "parameters"]
    runs = [
        {"model": {"preset": "gpt3-1.3b"}, "train": sizes | column, "scaling": {"shard": shard}}
        for column, shard in zip(columns, shards, strict=True)
    ]
    found = [planned(run, gpu="h100", count=8)["memory_bytes"] for run in runs]
    text = (REPOSITORY / "k8s" / "scale.md").read_text()
    for part in found[0]:
        row = f"| {part} | {' | '.join(f'{parts[part] / 1e9:.1f}' for parts in found)} |"
        assert row in text, f"expected {row}"


def test_a_checkpoint_has_the_planned_bytes(tmp_path: Path) -> None:
    plan = trained_run(str(tmp_path))
    folder = max((tmp_path / "runs").glob("*/checkpoints/step-*"))
    found = sum(
        (folder / name).stat().st_size for name in ("model.safetensors", "train_state.safetensors")
    )
    planned_bytes = make_plan(plan.config, PlanConfig())["checkpoint"]["bytes"]
    assert planned_bytes == pytest.approx(found, rel=0.1)  # a header of a few kB


@pytest.mark.parametrize("shard", ["none", "optimizer", "gradients", "parameters"])
def test_muons_state__is_planned_for_the_worker_that_has_most(shard: str) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"preset": "demo", "vocab_size": 1024},
            "train": {"optimizer": "muon", "precision": "fp32"},
            "scaling": {"shard": shard},
        }
    )
    moments: list[int] = []
    gradients: list[int] = []
    for rank in range(3):
        with torch.device("meta"):
            model = GPT(config.model)
        group = WorkerGroup(rank=rank, world_size=3)
        sharding = run_sharding(config.scaling, rank=rank, world_size=3)
        state = run_state(
            model, config.train, device=torch.device("cpu"), group=group, sharding=sharding
        )
        moments.append(sum(moment.nbytes for moment in state.vectors.values()))
        gradients.append(state.gradient.nbytes)
        state.close()
    parts = gpu_memory(config, layout_of(config), world_size=3)
    assert parts["optimizer"] == max(moments)
    assert parts["gradients"] == max(gradients)


def test_muons_update__costs_about_what_its_products_do() -> None:
    """GPT-2's 124M parameters, by the formula of the rule; a checkpoint has less than AdamW's."""
    plans = {
        optimizer: planned(
            {
                "model": {"preset": "gpt2-124m"},
                "train": {"global_batch_size": 480, "optimizer": optimizer, "precision": "bf16"},
            }
        )
        for optimizer in ("adamw", "muon")
    }
    assert plans["adamw"]["update_share"] < 1e-4
    products = 12 * 5 * (24 + 36) * 768**3
    assert plans["muon"]["update_flops"] == pytest.approx(products, rel=1e-3)
    assert 0.003 < plans["muon"]["update_share"] < 0.005
    saved = plans["adamw"]["checkpoint"]["bytes"] - plans["muon"]["checkpoint"]["bytes"]
    assert saved == 4 * 12 * 12 * 768**2, "a number for each value of a matrix"


def test_memory_beside_the_gpus() -> None:
    def beside(**scaling: Any) -> dict[str, float]:
        config = RunConfig.model_validate(small() | {"scaling": scaling})
        return host_memory(config, layout, world_size=16, gpus_per_node=8)

    layout = layout_of(RunConfig.model_validate(small()))
    state = 12 * layout.size
    assert beside()["snapshots"] == beside()["checkpoints"] == 2 * state
    assert beside()["copies_of_another_node"] == 0, "every node has the whole state"
    shares = beside(shard="optimizer")
    assert shares["snapshots"] == 1.5 * state == 1.5 * shares["copies_of_another_node"]
    assert shares["checkpoints"] == state, "every rank stores its shard"
    halves = beside(shard="parameters")
    assert halves["snapshots"] == 1.5 * state
    assert halves["copies_of_another_node"] == halves["checkpoints"] == state
    groups = beside(shard="parameters", shard_group=8)
    assert groups["snapshots"] == groups["checkpoints"] == 2 * state
    assert groups["copies_of_another_node"] == 0, "the other group has the same shares"


def test_a_model_too_large_is_said_first_and_how_it_fits() -> None:
    plan = planned(GPT3 | {"scaling": {"shard": "optimizer"}}, gpu="a100", count=1024)
    assert plan["warnings"][0].startswith("The run does not fit its GPUs: each needs ")
    assert "--scaling.shard parameters --scaling.shard-group" in plan["warnings"][0]
    assert plan["memory_bytes"]["weights"] == pytest.approx(4 * 174.6e9, rel=1e-3)
    assert plan["memory_bytes"]["optimizer"] == pytest.approx(8 * 174.6e9 / 1024, rel=1e-3)
    assert plan["memory_bytes"]["total"] == sum(
        v for k, v in plan["memory_bytes"].items() if k != "total"
    )
    advised = plan["advice"]
    assert advised["memory_bytes"]["total"] < 72e9
    followed = {"train": GPT3["train"] | advised["train"], "scaling": advised["scaling"]}
    assert (
        planned(GPT3 | followed, gpu="a100", count=1024)["memory_bytes"] == advised["memory_bytes"]
    )
    few = planned(GPT3, gpu="a100", count=64)
    assert few["advice"] is None
    assert "No sharding makes it fit 64 of them" in few["warnings"][0]


def test_the_cheapest_sharding_that_fits_is_named() -> None:
    run = {
        "model": {"preset": "gpt3-2.7b"},
        "train": {"precision": "bf16", "global_batch_size": 512},
    }
    run["train"] |= {"max_tokens": 10**11, "micro_batch_size": 4, "warmup_tokens": 10**8}  # type: ignore[operator]
    for hardware in ({"gpu": "a100", "count": 128}, {"gpu": "a100-40gb", "count": 16}):
        plan = planned(run, **hardware)
        way, costs = plan["advice"]["scaling"], {}
        for shard in ("optimizer", "gradients", "parameters"):
            for group in (2, 4, 8, 16, hardware["count"]):
                scaling = {"shard": shard} | (
                    {"shard_group": group} if shard != "optimizer" else {}
                )
                other = planned(
                    run | {"scaling": scaling, "train": run["train"] | plan["advice"]["train"]},
                    **hardware,
                )
                if not any("does not fit" in text for text in other["warnings"]):
                    costs[shard, scaling.get("shard_group")] = other["exchange"]["exposed_s"]
        assert costs[way["shard"], way.get("shard_group")] == min(costs.values())


@pytest.mark.parametrize(
    ("train", "options", "said"),
    [
        ({}, {}, None),
        ({}, {"count": 100}, "64 GPUs"),
        ({}, {"count": 24}, "some compute 3 a step, others 2 and wait: 11%"),
        ({"precision": "fp32"}, {}, "set --train.precision bf16"),
        ({"warmup_tokens": 10**10}, {}, "never reaches its peak"),
        ({"decay_tokens": 2 * 10**10}, {}, "never reaches its least"),
        ({"decay_tokens": 5 * 10**9}, {}, "for the last 50% of the run"),
        ({"seq_len": 512}, {}, "later positions are never trained"),
        ({"recompute": True}, {}, "train.recompute changes no days"),
        (
            {},
            {"count": 64, "network_gbit_per_s": 0.1},
            "bound by the network: a step exchanges for",
        ),
    ],
)
def test_inputs_that_disagree(
    train: dict[str, Any], options: dict[str, Any], said: str | None
) -> None:
    if said == "64 GPUs":
        train, said = {"global_batch_size": 512, "micro_batch_size": 8}, "100 GPUs for 64 lanes"
    warnings = planned(small(**train), **{"count": 8} | options)["warnings"]
    if said is None:
        assert warnings == []
    else:
        assert any(said in text for text in warnings), warnings


def test_an_exchange_that_computing_does_not_hide_is_said_with_a_sharding_that_helps() -> None:
    """1.3B on eight nodes, whose weights all GPUs gather: most of a step would be exchange."""
    run: dict[str, Any] = {
        "model": {"preset": "gpt3-1.3b"},
        "train": {"precision": "bf16", "global_batch_size": 512},
        "scaling": {"shard": "parameters"},
    }
    run["train"] |= {"max_tokens": 10**11, "micro_batch_size": 4}
    hardware = {"gpu": "h100", "count": 64}
    plan = planned(run, **hardware)
    advised = plan["exchange"]["advice"]
    scaling = {name: value for name, value in advised["scaling"].items() if value is not None}
    assert scaling.get("shard_group", 8) <= 8, "within a node"
    (warning,) = [
        text for text in plan["warnings"] if "Computing does not hide the exchange" in text
    ]
    flags = " ".join(f"--scaling.{name.replace('_', '-')} {scaling[name]}" for name in scaling)
    assert f"{flags} makes it {advised['step_s']:.3g} s" in warning
    followed = planned(run | {"scaling": scaling}, **hardware)
    assert followed["exchange"]["step_s"] == pytest.approx(advised["step_s"])
    assert followed["exchange"]["step_s"] < 0.7 * plan["exchange"]["step_s"]
    assert followed["exchange"]["advice"] is None
    assert not any("exchange" in text for text in followed["warnings"])


def test_whole_weights_of_eight_nodes__are_exchanged_beside_backward() -> None:
    """Each GPU of a node sends an eighth through its card. On a network of a tenth of the speed no
    sharding sends less."""
    run: dict[str, Any] = {
        "model": {"preset": "gpt3-1.3b"},
        "train": {"precision": "bf16", "global_batch_size": 512},
    }
    run["train"] |= {"max_tokens": 10**11, "micro_batch_size": 4}
    fast = planned(run, gpu="h100", count=64)
    assert fast["exchange"]["exposed_s"] < 0.002 * fast["exchange"]["compute_s"]
    assert fast["warnings"] == []
    slow = planned(run, gpu="h100", count=64, network_gbit_per_s=40)
    (warning,) = slow["warnings"]
    assert "0.109 s, 29% more, so it takes 0.485 s. No other sharding that fits" in warning
    assert planned(run, gpu="h100", count=8)["exchange"]["advice"] is None


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of h100-pcie"):
        PlanConfig.model_validate({"gpu": "a1000"})
    with pytest.raises(ValueError, match="exceeds the 125 TFLOP/s that one v100 can do"):
        PlanConfig.model_validate({"gpu": "v100", "sustained_tflops": 140})


def test_the_table_is_aligned_and_has_its_units() -> None:
    options = PlanConfig.model_validate({"gpu": "a100", "count": 1024})
    plan = make_plan(RunConfig.model_validate(GPT3), options)
    text, moments = table(plan, options), plan["advice"]["memory_bytes"]["optimizer"]
    lines = text.splitlines()
    assert lines[0].startswith("warning: The run does not fit its GPUs")
    assert max(map(len, lines)) <= 120
    assert "  operations, 6 N D         3.14e+23 FLOPs = 3,638 petaflop/s-days" in lines
    assert any(
        line.startswith("  optimizer's moments")
        and line.split()[-4:-1] == ["1.397", "TB", size(moments)[:-3]]
        for line in lines
    )
    assert size(2.5e15) == "2.5 PB"
    assert size(12, "/s") == "12 B/s"


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "--model.preset",
        "gpt3-175b",
        "--train.max-tokens",
        "300000000000",
        "--gpu",
        "a100",
        "--count",
        "1024",
    ]
    assert main(["plan", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["total_flops"] == pytest.approx(3.14e23, rel=2e-3)
    assert found["gpu_days"] == pytest.approx(1024 * found["days"])
    assert {"cost", "checkpoint", "exchange", "data", "advice", "warnings"} <= found.keys()
    assert {"weights", "gradients", "optimizer", "activations", "logits_chunk"} <= found[
        "memory_bytes"
    ].keys()
    assert main(["plan", *words]) == 0
    said = capsys.readouterr()
    lines = [line.partition("  ")[0] for line in said.out.splitlines()]
    assert lines[:4] == ["time", "memory", "cost", ""]
    assert "a GPU-hour" in said.out and "Exchange" not in said.out
    assert said.err.startswith("next: `raymill plan") and "--all` has all figures" in said.err
    assert main(["plan", "--gpu", "a1000"]) == 2
