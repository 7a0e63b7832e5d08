"""MTLoRA on Swin-T: batched streams against a plain per-task formulation of the same arithmetic.

Both sides use the same parameters of the same model. The plain side keeps one tensor per task in lists and
loops over tasks in every task-aware layer, in patch merging, in the projections and heads. Outputs and
gradients are compared before anything is timed.

    python benchmarks/mtlora_step.py [--quick] [--json]
"""

from __future__ import annotations

import copy
import warnings

import torch
from common import interleave, median_ratio, parse, report
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F

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


def plain_twin(model: MultiTaskModel) -> MultiTaskModel:
    """The same parameters under plain layers, to be run by ``plain_forward``."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
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


def check_equal(model: MultiTaskModel, twin: MultiTaskModel, batch) -> float:
    """Largest difference of logits and of gradients between the two formulations, relative to the scale."""
    model.eval(), twin.eval()
    worst, gradients = 0.0, []
    logits = [plain_forward(twin, batch["image"]), model(batch["image"]).logits]
    for task in TASKS:
        worst = max(
            worst,
            float(
                (logits[0][task] - logits[1][task]).detach().abs().max()
                / logits[0][task].detach().abs().max()
            ),
        )
    for side in logits:
        model.zero_grad()
        sum(TASKS.losses(side, batch).values()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        if name in gradients[1]:
            worst = max(
                worst, float((gradient - gradients[1][name]).norm() / gradient.norm().clamp(min=1e-6))
            )
    return worst


def main() -> None:
    """Time forward, training step and merged inference; count memory."""
    args = parse(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    keep_freed_memory()  # as `polytask train` does; for both sides
    size, repeats = (224, 3) if args.quick else (448, 9)
    model, batch = build(size), make_batch(size, 2)
    twin = plain_twin(model)
    difference = check_equal(model, twin, batch)
    assert difference < 1e-3, f"the two formulations differ by {difference}"
    one = batch["image"][:1]
    model.eval()
    merged = model.merged()

    @torch.no_grad()
    def infer(run) -> None:
        run(one)

    forward = interleave(
        {
            "plain": lambda: infer(lambda x: plain_forward(twin, x)),
            "streams": lambda: infer(model),
            "merged": lambda: infer(merged),
        },
        repeats,
    )
    model.train(), twin.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    training = interleave(
        {
            "plain": lambda: step(lambda x: plain_forward(twin, x), batch, optimizer),
            "streams": lambda: step(lambda x: model(x).logits, batch, optimizer),
        },
        repeats,
    )
    full, thrifty = build(size, adapter=False), build(size, recompute=(0, 1, 2, 3))
    activations = {name: saved_activations(m, one, list(TASKS)) for name, m in
                   (("full", full), ("streams", model), ("recompute", thrifty))}  # fmt: skip
    ratios = {
        "forward, streams / plain": median_ratio(forward, "streams", "plain"),
        "training step, streams / plain": median_ratio(training, "streams", "plain"),
        "merged inference / plain": median_ratio(forward, "merged", "plain"),
        "activation memory, streams / full fine-tuning": activations["streams"] / activations["full"],
        "activation memory, recompute / full fine-tuning": activations["recompute"] / activations["full"],
        "MACs, merged / streams": count_macs(merged, one, list(TASKS)) / count_macs(model, one, list(TASKS)),
    }
    settings = {
        "backbone": "swin_tiny_patch4_window7_224", "image_size": size, "rank": 64, "task_rank": 4,
        "tasks": list(TASKS), "batch": {"forward": 1, "training": 2}, "rounds": repeats,
        "unit": "CPU seconds of one thread, median of ratios",
        "largest relative difference": difference,
    }  # fmt: skip
    report(args, settings, ratios)


if __name__ == "__main__":
    main()
