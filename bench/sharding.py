"""Sharded models: what a rank holds, how long a commit of shards stalls, what exact sums cost compared with FSDP2's
own.

`python bench/sharding.py [RANKS] [LAYERS] [WIDTH]`: gloo processes on this machine, each with one thread, so times say
nothing about GPUs; bytes do. Memory is the process's own (RssAnon), sampled every few milliseconds, above what it had
before it loaded the model.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

SAMPLE = 0.003
PARTS = 4
TOKENS = 64
ROUNDS = 3
CPU = torch.device("cpu")


class Watch:
    """The peak of the process's own memory while the body ran, in bytes."""

    def __enter__(self) -> Watch:
        self.peak, self._done = own_memory(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(SAMPLE):
            self.peak = max(self.peak, own_memory())


def own_memory() -> int:
    """Return the process's memory that is not backed by files, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("RssAnon:")[2].split()[0])


def seconds(function: Callable[[], object], times: int = ROUNDS) -> float:
    """Return the median time of a call that all ranks make."""
    taken: list[float] = []
    for _ in range(times):
        dist.barrier()
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def rank(place: int, ranks: int, folder: Path) -> None:
    """Measure as one rank; rank 0 writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=place, world_size=ranks)
    found = measured(folder, ranks)
    if place == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(folder: Path, ranks: int) -> dict[str, Any]:
    """Load, train, copy, write, and gather."""
    from onward.config import Config
    from onward.data.plan.loader import Batch
    from onward.data.plan.order import RowReference
    from onward.data.tokenized import Row
    from onward.training.model.load import build_model
    from onward.training.model.spec import ModelSpec
    from onward.training.model.weights import save_weights
    from onward.training.optimizers import ADAMW
    from onward.training.sharding.files import host_mesh, read_manifest, require_files, write_shards
    from onward.training.sharding.model import ShardedModel
    from onward.training.sharding.state import start_sharded
    from onward.training.sharding.steps import InShards, loss_in_shards
    from onward.training.sharding.whole import whole_state
    from onward.training.steps.parts import Part

    config = Config.model_validate({"model": str(folder / "model"), "method": "full"})
    mesh = init_device_mesh("cpu", (ranks,))
    idle = own_memory()
    with Watch() as loading:
        spec = ModelSpec(config, folder / "model", CPU, torch.float32)
        sharded = ShardedModel(build_model(spec, mapped=True), mesh)
        state, shards = start_sharded(sharded, config)
    loss_of = loss_in_shards(sharded, CPU, torch.float32)
    ids = np.arange(TOKENS) % 97
    batch = Batch([Row(ids, ids >= 0)], [RowReference("x", 0)], [0])

    in_shards = InShards[Part](sharded, shards, loss_of)

    def train(parts: Sequence[Part]) -> torch.Tensor:
        loss = loss_of(parts[0].batch) / TOKENS
        loss.backward()
        return loss

    def gradients() -> None:
        in_shards.total([[Part(batch, 0)] for _ in range(PARTS)], train)

    exact = seconds(gradients)
    clipping = seconds(lambda: shards.clip(1e9))
    state.optimizer.step()
    shards.stepped()
    shard = sum(tensor.nbytes for tensor in state.view().tensors())
    copy = state.snapshot()
    sources, targets = state.view().tensors(), [torch.empty_like(tensor) for tensor in state.view().tensors()]
    plain = seconds(lambda: [target.copy_(source) for target, source in zip(targets, sources, strict=True)])
    stall = seconds(lambda: state.snapshot(into=copy))
    host = host_mesh()
    before = own_memory()
    with Watch() as writing:
        begun = time.perf_counter()
        write_shards(folder / "shards", copy, shards, host)
        written = time.perf_counter() - begun
    largest = max(shard.shape.numel() for shard in shards.values()) * 4
    found = {
        "ranks": ranks, "shard_mb": shard / 1e6, "state_mb": ranks * shard / 1e6, "largest_tensor_mb": largest / 1e6,
        "loading_peak_mb": (loading.peak - idle) / 1e6, "stall_s": stall, "copy_s": plain, "stall_ratio": stall / plain,
        "write_s": written, "writing_peak_mb": (writing.peak - before) / 1e6, "gradients_s": exact,
        "clip_s": clipping,
    }  # fmt: skip
    if dist.get_rank() == 0:
        before = own_memory()
        with Watch() as gathering:
            begun = time.perf_counter()
            manifest = read_manifest(folder / "shards")
            require_files(folder / "shards", manifest)
            whole = whole_state(folder / "shards", manifest, sharded.bare, ADAMW, folder)
            (folder / "hf").mkdir()
            save_weights(whole.model, whole.state.weights, folder / "hf")
            torch.save(whole.state.optimizer, folder / "hf" / "optimizer.pt")
        found |= {"whole_s": time.perf_counter() - begun, "whole_peak_mb": (gathering.peak - before) / 1e6}
    dist.barrier()
    return {**found, "plain_gradients_s": plain_gradients(folder, batch, ranks)}


def plain_gradients(folder: Path, batch: Any, ranks: int) -> float:
    """Return the seconds of the same gradients by FSDP2 alone, with its own reduce-scatter in any order."""
    from torch.distributed.fsdp import fully_shard

    from onward.config import Config
    from onward.training.model.load import build_model
    from onward.training.model.spec import ModelSpec
    from onward.training.sharding.model import decoder_layers
    from onward.training.steps.loss import TargetLoss

    class Root(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, function: Callable[[], Any]) -> Any:
            return function()

    config = Config.model_validate({"model": str(folder / "model"), "method": "full"})
    model = build_model(ModelSpec(config, folder / "model", CPU, torch.float32))
    for layer in decoder_layers(model):
        fully_shard(layer)
    root: Any = fully_shard(Root(model))
    loss_of = root(lambda: TargetLoss(model, CPU, torch.float32))

    def gradients() -> None:
        for _ in range(PARTS // ranks):
            root(lambda: loss_of(batch) / TOKENS).backward()
        for weight in model.parameters():
            weight.grad = None

    return seconds(gradients)


def make_model(folder: Path, layers: int, width: int) -> None:
    """Write a random Llama in bfloat16, as models are published."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def main() -> None:
    """Make a model and measure it on several ranks."""
    ranks, layers, width = (int(word) for word in [*sys.argv[1:], *("2", "4", "384")[len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:
        folder = Path(place)
        make_model(folder / "model", layers, width)
        multiprocessing.spawn(rank, (ranks, folder), nprocs=ranks)
        print(json.dumps(json.loads((folder / "found.json").read_text()), indent=2))


if __name__ == "__main__":
    main()
