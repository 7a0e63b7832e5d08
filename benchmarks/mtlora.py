"""MTLoRA on Swin-T: the library against a plain per-task form of the same arithmetic, and full fine-tuning.

Four sides: the plain form, the library in training form, the merged model, and timm's Swin-T fully fine-tuned
with the same neck and heads. The plain form uses the same parameters as the library; it keeps one tensor per
task in lists, loops over the tasks in every task-aware layer, in patch merging, projections and heads, and
runs timm's own blocks (its windows and its mask of -100). Outputs and gradients are compared before anything
is timed.

    python benchmarks/mtlora.py [--quick] [--json]
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import statistics
import time
import warnings
from pathlib import Path

import torch
from common import interleave, median_ratio, parse, report
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformerBlock,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from polytask.adapters.mtlora import MTLoRA, TaskLinear
from polytask.allocator import keep_freed_memory
from polytask.backbones.timm import BackboneSpec
from polytask.cost import count_macs, saved_activations
from polytask.model import ModelSpec, MultiTaskModel
from polytask.tasks import Normals, Saliency, Segmentation, TaskSet

TASKS = TaskSet(
    {
        "semseg": Segmentation(classes=tuple(f"class {i}" for i in range(21))),
        "normals": Normals(weight=10.0),
        "saliency": Saliency(weight=5.0),
        "human_parts": Segmentation(classes=tuple(f"part {i}" for i in range(7)), weight=2.0),
    }
)


def build(size: int, *, adapter: bool = True, recompute: tuple[int, ...] = ()) -> MultiTaskModel:
    """Swin-T with MTLoRA r64, or fully fine-tuned."""
    backbone = BackboneSpec(
        name="swin_tiny_patch4_window7_224",
        feature_point="after_merge",
        options={"drop_path_rate": 0.2},
        recompute=recompute,
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ModelSpec(backbone=backbone, adapter=MTLoRA() if adapter else None).build(TASKS, (size, size))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.02)
    return model


# --- the plain formulation -------------------------------------------------------------------------


class PlainBranch(nn.Module):
    """A layer without task branches, written out; shares its parameters with the layer it stands for."""

    def __init__(self, layer: TaskLinear) -> None:
        super().__init__()
        self.base, self.shared, self.scale, self.dropout = (
            layer.base,
            layer.shared,
            layer.shared.scale,
            nn.Dropout(layer.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(self.dropout(x), self.shared.A), self.shared.B)


def timm_blocks(model: MultiTaskModel) -> MultiTaskModel:
    """The model with timm's own blocks: undoes ``polytask.backbones.swin.quicken``."""
    for module in model.modules():
        if isinstance(module, SwinTransformerBlock):
            del module.forward
            if module.attn_mask is not None:
                module.attn_mask.masked_fill_(module.attn_mask < 0, -100.0)
        elif isinstance(module, PatchMerging):
            del module.forward
    return model


def plain_twin(model: MultiTaskModel) -> MultiTaskModel:
    """The same parameters under plain layers, to be run by ``plain_forward``."""
    twin = timm_blocks(copy.deepcopy(model, {id(p): p for p in model.parameters()}))
    for name, module in list(twin.named_modules()):
        if isinstance(module, TaskLinear) and not len(module.tasks):
            twin.set_submodule(name, PlainBranch(module))
    return twin


def plain_forward(model: MultiTaskModel, image: Tensor) -> dict[str, Tensor]:
    """Logits with one tensor per task and loops over the tasks."""
    backbone = model.backbone
    backbone.streams.begin((), skip_final_shared=False)  # wrapped layers then run their shared branch only
    net, pyramids = backbone.net, {task: [] for task in TASKS}
    x = net.patch_embed(image)
    for stage, layer in enumerate(net.layers):
        if stage:
            for task in TASKS:
                pyramids[task][-1] = plain_merge(layer.downsample, pyramids[task][-1])
            x = plain_merge(layer.downsample, x)
        for block in layer.blocks[:-1]:
            x = block(x)
        x, streams = plain_last_block(layer.blocks[-1].block, x)
        for task, stream in zip(TASKS, streams, strict=True):
            pyramids[task].append(stream)
    return {task: plain_head(model, task, levels, image.shape[-2:]) for task, levels in pyramids.items()}


def plain_merge(downsample: nn.Module, x: Tensor) -> Tensor:
    """Patch merging of one stream."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return downsample.reduction.layer(downsample.norm(x))


def plain_layer(layer: TaskLinear, x: Tensor, inputs: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """Base once, then every branch on its own (matrix mode)."""
    base, dropped = layer.base(x), F.dropout(x, layer.dropout, layer.training)
    shared = base + layer.shared.scale * F.linear(F.linear(dropped, layer.shared.A), layer.shared.B)
    outputs = []
    for number, task in enumerate(TASKS):
        own, branch = dropped if inputs is None else inputs[number], layer.tasks[task]
        outputs.append(base + branch.scale * F.linear(F.linear(own, branch.A), branch.B))
    return shared, outputs


def plain_last_block(block: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A Swin block whose projections fork: shared attention, then one residual path per stream."""
    _, h, w, c = x.shape
    attn, size = block.attn, block.window_size
    shift = any(block.shift_size)
    windows = block.norm1.layer(x)
    if shift:
        windows = torch.roll(windows, (-block.shift_size[0], -block.shift_size[1]), (1, 2))
    windows = window_partition(windows, size).view(-1, block.window_area, c)
    n = block.window_area
    q, k, v = (
        attn.qkv(windows)
        .reshape(-1, n, 3, attn.num_heads, c // attn.num_heads)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    scores = (q * attn.scale) @ k.transpose(-2, -1) + attn._get_rel_pos_bias()
    if block.attn_mask is not None:
        count = block.attn_mask.shape[0]
        scores = scores.view(-1, count, attn.num_heads, n, n) + block.attn_mask.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, attn.num_heads, n, n)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, n, c)
    shared, outputs = plain_layer(attn.proj, mixed, None)

    def unwindow(y: Tensor) -> Tensor:
        y = window_reverse(y.view(-1, *size, c), size, h, w)
        return torch.roll(y, block.shift_size, (1, 2)) if shift else y

    x1 = x + block.drop_path1(unwindow(shared))
    z = [x + block.drop_path1(unwindow(y)) for y in outputs]
    hidden, hiddens = plain_layer(block.mlp.fc1, block.norm2(x1), [block.norm2(s) for s in z])
    hidden, hiddens = F.gelu(hidden), [F.gelu(y) for y in hiddens]
    out, outs = plain_layer(block.mlp.fc2, hidden, hiddens)
    return x1 + block.drop_path2(out), [s + block.drop_path2(y) for s, y in zip(z, outs, strict=True)]


def plain_head(model: MultiTaskModel, task: str, levels: list[Tensor], size: tuple[int, ...]) -> Tensor:
    """Projections, resize, concatenation, head, resize."""
    maps = [
        F.conv2d(x.permute(0, 3, 1, 2), p.weight[:, :, None, None])
        for x, p in zip(levels, model.neck.projections[task], strict=True)
    ]
    fine = maps[0].shape[-2:]
    maps = [maps[0], *(F.interpolate(m, fine, mode="bilinear", align_corners=False) for m in maps[1:])]
    return F.interpolate(model.heads[task](torch.cat(maps, 1)), size, mode="bilinear", align_corners=False)


def plain_macs(twin: MultiTaskModel, image: Tensor) -> int:
    """Multiply-accumulates of ``plain_forward``."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        plain_forward(twin, image)
    return int(counter.get_total_flops()) // 2


# --- measurement -----------------------------------------------------------------------------------


def make_batch(size: int, count: int) -> dict[str, Tensor]:
    """A random labeled batch."""
    g = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(count, 3, size, size, generator=g),
        "semseg": torch.randint(0, 21, (count, 1, size, size), generator=g),
        "human_parts": torch.randint(0, 7, (count, 1, size, size), generator=g),
        "saliency": torch.randint(0, 2, (count, 1, size, size), generator=g),
        "normals": F.normalize(torch.randn(count, 3, size, size, generator=g), dim=1),
    }


def step(forward, batch, optimizer) -> None:
    """One training step, the same for both sides but for ``forward``."""
    optimizer.zero_grad(set_to_none=True)
    losses = TASKS.losses(forward(batch["image"]), batch)
    sum(TASKS[task].weight * loss for task, loss in losses.items()).backward()
    optimizer.step()


def check_equal(model: MultiTaskModel, twin: MultiTaskModel, batch) -> tuple[float, float]:
    """Largest relative differences: of logits in float32 and, of every gradient's norm, in float64."""
    model.eval(), twin.eval()
    with torch.no_grad():
        plain, ours = plain_forward(twin, batch["image"]), model(batch["image"]).logits
    logits = max(float((plain[t] - ours[t]).abs().max() / plain[t].abs().max()) for t in TASKS)
    model.double(), twin.double()
    precise = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    gradients = []
    for forward in (lambda x: plain_forward(twin, x), lambda x: model(x).logits):
        model.zero_grad()
        sum(TASKS.losses(forward(precise["image"]), precise).values()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(), model.float(), twin.float()
    plain, ours = gradients
    spare = {n for n in plain if n not in ours}  # the branch that nothing reads
    assert all(not plain[n].any() for n in spare) and not ours.keys() - plain.keys(), spare
    worst = max(float((plain[n] - ours[n]).norm() / plain[n].norm().clamp(min=1e-12)) for n in ours)
    return logits, worst


class Kernels(TorchDispatchMode):
    """Counts operations that compute or move numbers; views and empty tensors aside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count, then run."""
        is_free = function.is_view or "empty" in str(function) or str(function).startswith("aten.detach")
        self.count += not is_free
        return function(*args, **(kwargs or {}))


def kernels(run) -> int:
    """Operations of one call."""
    with Kernels() as counter:
        run()
    return counter.count


def resident() -> int:
    """Bytes of the process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak() -> int:
    """Largest value of ``resident`` so far."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def _measure_peak(side: str, size: int, count: int, sender) -> None:
    torch.set_num_threads(1)
    model, batch = SIDES[side](size), make_batch(size, count)
    forward = (lambda x: plain_forward(model, x)) if side == "plain" else (lambda x: model(x).logits)
    gc.collect()
    before = resident()
    losses = TASKS.losses(forward(batch["image"]), batch)
    sum(TASKS[task].weight * loss for task, loss in losses.items()).backward()
    sender.send(peak() - before)


SIDES = {
    "plain": lambda size: plain_twin(build(size)),
    "training": build,
    "recompute": lambda size: build(size, recompute=(0, 1, 2, 3)),
    "full": lambda size: timm_blocks(build(size, adapter=False)),
}


def step_peak(side: str, size: int, count: int) -> int:
    """Bytes a forward and backward pass needs above the loaded model: resident peak of a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(side, size, count, sender))
    process.start()
    value = receiver.recv()
    process.join()
    return value


def main() -> None:
    """Compare, then time inference and training steps; count MACs, operations and memory."""
    args = parse(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    keep_freed_memory()  # as `polytask train` does; for all sides
    size, rounds = (224, 3) if args.quick else (448, 5)
    model, batch, names = build(size), make_batch(size, 2), list(TASKS)
    twin, one = plain_twin(model), batch["image"][:1]
    logits, gradients = check_equal(model, twin, batch)
    assert logits < 1e-5 and gradients < 1e-9, f"the two forms differ by {logits} and {gradients}"
    merged, full, thrifty = model.eval().merged(), SIDES["full"](size).eval(), SIDES["recompute"](size)
    with torch.no_grad():
        folded, unfolded = merged(one).logits, model(one).logits
    same = max(float((folded[t] - unfolded[t]).abs().max() / unfolded[t].abs().max()) for t in names)
    assert same < 1e-5, f"the merged model differs by {same}"
    runs = {"plain": lambda x: plain_forward(twin, x), "training": lambda x: model(x).logits,
            "merged": lambda x: merged(x).logits, "full": lambda x: full(x).logits}  # fmt: skip

    @torch.no_grad()
    def infer(name: str) -> None:
        runs[name](one)

    forward = interleave({name: (lambda name=name: infer(name)) for name in runs}, rounds)
    counted = {name: kernels(lambda name=name: infer(name)) for name in runs}
    macs = {"plain": plain_macs(twin, one), "training": count_macs(model, one, names),
            "merged": count_macs(merged, one, names), "full": count_macs(full, one, names)}  # fmt: skip
    for side in (model, twin, full, thrifty):
        side.train()
    runs |= {"recompute": lambda x: thrifty(x).logits}
    owners = {"plain": model, "training": model, "full": full, "recompute": thrifty}
    optimizers = {
        name: torch.optim.AdamW([p for p in owner.parameters() if p.requires_grad], lr=1e-5)
        for name, owner in owners.items()
    }
    steps = {name: (lambda name=name: step(runs[name], batch, optimizers[name])) for name in owners}
    training = interleave(steps, rounds)
    step_kernels = {name: kernels(run) for name, run in steps.items()}
    peaks = {name: step_peak(name, size, 2) for name in SIDES}
    saved = {name: saved_activations(m, one, names)
             for name, m in (("training", model), ("recompute", thrifty), ("full", full))}  # fmt: skip
    ratios: dict[str, float] = {}
    for name in ("training", "merged", "full"):
        ratios[f"inference, {name} / plain"] = median_ratio(forward, name, "plain")
    for name in ("training", "recompute", "full"):
        ratios[f"training step, {name} / plain"] = median_ratio(training, name, "plain")
    for name in ("plain", "training", "recompute"):
        ratios[f"peak memory of a step, {name} / full"] = peaks[name] / peaks["full"]
    for name in ("training", "recompute"):
        ratios[f"saved activations, {name} / full"] = saved[name] / saved["full"]
    ratios |= {f"GFLOP of inference, {name}": 2e-9 * value for name, value in macs.items()}
    ratios |= {f"operations of inference, {name}": value for name, value in counted.items()}
    ratios |= {f"operations of a step, {name}": value for name, value in step_kernels.items()}
    ratios |= {f"CPU s of inference, {name}": statistics.median(v) for name, v in forward.items()}
    ratios |= {f"CPU s of a step, {name}": statistics.median(v) for name, v in training.items()}
    ratios |= {f"peak MB of a step, {name}": value / 1e6 for name, value in peaks.items()}
    settings = {
        "backbone": "swin_tiny_patch4_window7_224", "image_size": size, "rank": 64, "task_rank": 4,
        "tasks": names, "batch": {"inference": 1, "training": 2}, "rounds": rounds,
        "unit": "CPU seconds of one thread, sides taking turns, median of ratios",
        "relative difference of logits": logits, "of gradients (float64)": gradients,
        "of merged logits": same,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    report(args, settings, ratios)


if __name__ == "__main__":
    main()
