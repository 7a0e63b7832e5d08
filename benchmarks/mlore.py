"""MLoRE: experts run one by one, dense kernels added up per image and task, and ours.

All sides use the same parameters and the same trunk. `plain` runs every expert and each task's head on
enlarged maps, as the network is written down. `accumulated` keeps a dense kernel per expert and adds the
weighted kernels up one by one for each image and task, the known way to merge them. Ours mixes the kernels of
all images and tasks with one matrix product, joins the 1x1 convolutions between the modules and does most of
the heads' work before maps are enlarged. Outputs (and gradients of a module) are compared before anything is
timed.

    python benchmarks/mlore.py [--quick] [--json] [--sizes small base]
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Mapping

import torch
from common import interleave, median_ratio, options, report
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from polytask.allocator import keep_freed_memory
from polytask.backbones.timm import BackboneSpec
from polytask.cost import unfused_attention
from polytask.heads import UpsampledHead
from polytask.heads.upsampled import UpsampledConv2d
from polytask.model import ModelSpec, MultiTaskModel
from polytask.necks.mlore import ExpertModule, MLoRE, TaskPath
from polytask.progress import track
from polytask.tasks import Edge, Normals, Saliency, Segmentation, TaskSet

TASKS = TaskSet(
    {
        "semseg": Segmentation(classes=tuple(f"class {i}" for i in range(21))),
        "human_parts": Segmentation(classes=tuple(f"part {i}" for i in range(7))),
        "saliency": Saliency(two_channels=True),
        "normals": Normals(),
        "edge": Edge(),
    }
)
SIZES = {
    "small": ("vit_small_patch16_384", MLoRE(gates="softmax_first")),
    "base": (
        "vit_base_patch16_384",
        MLoRE(gates="softmax_first", width=640, ranks=tuple(range(16, 129, 8)), task_rank=64),
    ),
}
CANVAS = 512


def build(size: str, canvas: int) -> MultiTaskModel:
    """The published network for PASCAL-Context, with random weights and statistics."""
    name, neck = SIZES[size]
    options = {"class_token": False, "global_pool": "", "drop_path_rate": 0.15}
    backbone = BackboneSpec(name=name, final_norm=True, options=options)
    torch.manual_seed(0)
    spec = ModelSpec(backbone=backbone, neck=neck, head=UpsampledHead())
    model = spec.build(TASKS, (canvas, canvas))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


# --- the plain formulation and the accumulated one ---------------------------------------------------


def plain_module(module: ExpertModule, maps: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Every expert for every task, one after the other."""
    found, gates = {}, []
    for task, x in maps.items():
        path: TaskPath = module.tasks[task]
        u = path.enter(x)
        gate, factor = path.router(u)
        outputs = torch.stack([expert(u) for expert in module.experts], 1)  # [B, N, C, h, w]
        summed = (outputs * gate[:, :, None, None, None]).sum(1)
        own = factor[:, None, None, None] * path.own(u)
        together = path.expert_norm(summed) + own + module.common(u.detach())
        found[task] = path.leave(F.gelu(path.norm(together)))
        gates.append(gate)
    return found, torch.stack(gates)


class Accumulated(nn.Module):
    """Dense kernels, weighted and added up one by one."""

    def __init__(self, module: ExpertModule) -> None:
        super().__init__()
        self.module = module
        self.kernels, self.biases = (x.detach() for x in module.experts.dense())
        self.own = {task: [x.detach() for x in path.own.dense()] for task, path in module.tasks.items()}

    def forward(self, maps: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """As the module."""
        found, gates, common = {}, [], self.module.common
        for task, x in maps.items():
            path: TaskPath = self.module.tasks[task]
            u = path.enter(x)
            gate, factor = path.router(u)
            norm = path.expert_norm
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            rows = []
            for sample in range(len(u)):
                kernel, bias = torch.zeros_like(self.kernels[0]), torch.zeros_like(self.biases[0])
                for expert in range(len(self.kernels)):
                    kernel = kernel + gate[sample, expert] * self.kernels[expert]
                    bias = bias + gate[sample, expert] * self.biases[expert]
                bias = scale * (bias - norm.running_mean) + norm.bias
                kernel = scale[:, None] * kernel + factor[sample] * self.own[task][0]
                kernel = kernel.view_as(common.weight) + common.weight
                bias = bias + factor[sample] * self.own[task][1] + common.bias
                rows.append(F.conv2d(u[sample : sample + 1], kernel, bias, padding=1))
            found[task] = path.leave(F.gelu(path.norm(torch.cat(rows))))
            gates.append(gate)
        return found, torch.stack(gates)


def on_large_maps(convolution: UpsampledConv2d) -> nn.Module:
    """The head's first layer as it is written down."""
    plain = nn.Conv2d(convolution.in_channels, convolution.out_channels, 3, padding=1)
    plain.weight, plain.bias = convolution.weight, convolution.bias
    up = nn.Upsample(scale_factor=convolution.factor, mode="bilinear", align_corners=False)
    return nn.Sequential(up, plain)


def variant(model: MultiTaskModel, kind: Callable[[ExpertModule], nn.Module]) -> MultiTaskModel:
    """The same parameters with other modules, and heads on enlarged maps."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for modules in (twin.neck.first, twin.neck.second):
        for number, module in enumerate(modules):
            modules[number] = kind(module)
    for head in twin.heads.values():
        head[0] = on_large_maps(head[0])
    return twin.eval()


class Plain(nn.Module):
    """``plain_module`` in the place of a module."""

    def __init__(self, module: ExpertModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, maps: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """As the module."""
        return plain_module(self.module, maps)


# --- measurement -------------------------------------------------------------------------------------


def gflop(model: nn.Module, image: Tensor) -> float:
    """Of one forward pass, two per multiply-accumulate, attention included."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), unfused_attention(model), counter:
        model(image)
    return counter.get_total_flops() / 1e9


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest, relative to the largest value."""
    return max(float((one[t] - other[t]).abs().max() / other[t].abs().max()) for t in other)


def inference(size: str, canvas: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios, and figures that are none."""
    model = build(size, canvas)
    sides = {
        "plain": variant(model, Plain),
        "accumulated": variant(model, Accumulated),
        "ours": model.merged(),
    }
    image = torch.randn(1, 3, canvas, canvas, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = sides["plain"](image).logits
        worst = {name: difference(side(image).logits, wanted) for name, side in sides.items()}
        assert max(worst.values()) < 1e-4, worst
        seconds = interleave({name: lambda side=side: side(image) for name, side in sides.items()}, rounds)
    others = {f"{name}, GFLOP": round(gflop(side, image), 1) for name, side in sides.items()}
    others |= {f"{name}, s": round(statistics.median(values), 2) for name, values in seconds.items()}
    others |= {f"{name}, difference": value for name, value in worst.items() if value}
    ratios = {f"ours / {name}": median_ratio(seconds, "ours", name) for name in ("plain", "accumulated")}
    return ratios, others


def training(width: int, grid: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Forward and backward of one module, two images, all tasks."""
    spec = MLoRE(gates="softmax_first", width=width, ranks=tuple(range(16, 129, 8)), task_rank=72)
    torch.manual_seed(0)
    module = ExpertModule(spec, tuple(TASKS), (grid, grid)).train()
    x = torch.randn(2, width, grid, grid, requires_grad=True)
    target = torch.randn(2, width, grid, grid)

    def run(forward: Callable[..., tuple[dict[str, Tensor], Tensor]]) -> None:
        module.zero_grad()
        x.grad = None
        torch.manual_seed(1)  # the noise of the gates
        maps, _ = forward(dict.fromkeys(TASKS, x))
        sum((y * target).mean() for y in maps.values()).backward()

    def gradients(forward: Callable[..., tuple[dict[str, Tensor], Tensor]]) -> dict[str, Tensor]:
        run(forward)
        found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        return {**found, "x": x.grad.clone()}

    sides = {"plain": lambda maps: plain_module(module, maps), "ours": module}
    one, other = gradients(sides["ours"]), gradients(sides["plain"])
    idle = ("expert_norm.bias", "common.bias", "places.bias")  # rounding only
    scale = torch.stack([g.abs().max() for g in other.values()]).median()
    worst = max(
        float((one[n] - other[n]).abs().max() / other[n].abs().max().clamp(min=1e-3 * scale))
        for n in other if not n.endswith(idle)
    )  # fmt: skip
    assert worst < 1e-3, worst
    seconds = interleave({name: lambda side=side: run(side) for name, side in sides.items()}, rounds)
    ratios = {"training step of a module, ours / plain": median_ratio(seconds, "ours", "plain")}
    return ratios, {"gradients, difference": worst}


def main() -> None:
    """Compare, then time."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="of the ViT; default: small")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    sizes = args.sizes or ["small"]
    canvas, rounds = (256, 3) if args.quick else (CANVAS, 5)
    ratios, settings = {}, {"canvas": canvas, "rounds": rounds, "unit": "CPU seconds of one thread, medians"}
    for size in track(sizes, "networks"):
        found, others = inference(size, canvas, rounds)
        ratios |= {f"{size}, {name}": value for name, value in found.items()}
        settings |= {f"{size}, {name}": value for name, value in others.items()}
    width, grid = (192, 16) if args.quick else (452, 32)
    found, others = training(width, grid, rounds)
    report(args, settings | others, ratios | found)


if __name__ == "__main__":
    main()
