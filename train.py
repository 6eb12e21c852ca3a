"""Train SwiftNet-ConvNeXt.

    torchrun --nproc_per_node=8 train.py                    the deck's recipe on the sets in data/
    torchrun --nproc_per_node=2 train.py --demo             generated streets, minutes on two cores
    torchrun --nproc_per_node=2 train.py --recipe camvid    CamVid from scratch
    python train.py --batch-per-process 1 --checkpoint-blocks       one GPU, the same global batch

A run writes runs/<recipe>/{last.pt,best.pt,log.jsonl}. The same command continues an unfinished
run. "the deck": Grcic, "Large-scale semantic segmentation through multi-resolution processing and
selective pseudolabeling", Vision for All Seasons, CVPR 2022.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import os
import platform
import re
import signal
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from convnext import SIZES, load_pretrained
from data import (DATASETS, IGNORE, MANIFEST, Progress, step_keys, TrainSet, annotated,
                  class_counts, classes_of, clock, collate, draw_demo, flag, gather, gather_groups,
                  hold, ignore_sigterm, is_first, parse_flags, parse_spec, run_main, say,
                  whole_file, writing)
from evaluate import (autocast, count_conditions, end_processes, evaluate, gathered, half_type,
                      start_processes, summary_table)
from losses import boundary_aware_focal_loss, boundary_weights
from swiftnet import SwiftNet, build, count_macs, read_checkpoint

LR_END = 1e-7                 # lineage: the cosine ends here
ADAM_BETAS = (0.9, 0.99)      # lineage
ADAM_EPS = 1e-7               # lineage: larger than torch's default, as half precision wants
LEAST_SCALE = 2.0 ** -10       # of fp16's loss; it begins at 2^16 and halves at every overflow
DEFAULT_MIX = [name for name, row in DATASETS.items() if row.role == "annotated"]


@dataclass(frozen=True)
class Config:
    """The flags of train.py."""
    recipe: str = flag("driving", "numbers of a run, under the flags given",
                       choices=("driving", "ade20k", "camvid", "demo"))
    demo: bool = flag(False, "the same as --recipe demo: train on generated streets, "
                      "drawn into demo/")
    data: str = flag("data", "data root, a folder per set")
    train: tuple = flag((), "sets to train on, NAME, NAME:PART,PART or either with *WEIGHT "
                        "(default: the annotated sets found)")
    pseudo: tuple = flag((), "folders of pseudolabel.py to train on as well, FOLDER or "
                         "FOLDER*WEIGHT")
    val: tuple = flag((), "sets to validate on (default: acdc and cityscapes, as found)")
    out: str = flag("", "output folder (default: runs/<recipe>)")
    resume: str = flag("", "run folder to continue, with the settings stored there")
    once: bool = flag(False, "where --out holds this run, finished, leave it so "
                      "instead of starting another beside it")
    init: str = flag("", "checkpoint to take weights from, and nothing else")
    backbone: str = flag("convnext_large", "size of the backbone", choices=tuple(SIZES))
    pretrained: str = flag("in22k_1k_384", "backbone weights: in1k, in22k, in22k_1k_384, a path, "
                           "a URL, or none")
    levels: int = flag(3, "resolutions of the pyramid; 1 is the single-scale SwiftNet")
    width: int = flag(0, "channels of the ladder (default: by size of the backbone)")
    layer_scale: float = flag(1e-6, "initial layer scale")
    drop_path: float = flag(0.0, "stochastic depth of the last block")
    epochs: int = flag(50, "passes over the training set")
    steps: int = flag(0, "optimizer steps in all (default: as many as the epochs have)")
    batch: int = flag(24, "images per optimizer step, over all processes")
    batch_per_process: int = flag(3, "images per forward and process; the rest of the batch is "
                                  "accumulated")
    crop: int = flag(1024, "side of the training crop, pixels")
    zoom: tuple = flag((0.5, 2.0), "range of the random zoom")
    jitter: float = flag(0.0, "brightness, contrast and saturation are scaled by factors "
                         "in 1 - jitter .. 1 + jitter")
    uniform_classes: float = flag(0.0, "share of the crops drawn so that classes come up evenly, "
                                  "0..1")
    skip_bad: int = flag(0, "files per process that may be unreadable before training stops")
    lr: float = flag(4e-4, "learning rate of new layers")
    backbone_lr: float = flag(1e-4, "learning rate of the backbone")
    warmup: int = flag(0, "steps of linear warm-up")
    weight_decay: float = flag(1e-4, "Adam's L2 term")
    bn_momentum: float = flag(0.01, "weight of the newest batch in the running statistics")
    precision: str = flag("auto", "auto is bf16 where the GPU has it, else fp16; float32 on a CPU",
                          choices=("auto", "bf16", "fp16", "fp32"))
    compile: bool = flag(False, "torch.compile the network (torch 2.7 or newer): faster on a GPU, "
                         "after minutes at the first step")
    checkpoint_blocks: bool = flag(False, "recompute ConvNeXt blocks in the backward pass: "
                                   "less memory")
    val_every: int = flag(1, "epochs between validations")
    save_every: int = flag(500, "steps between checkpoints, besides those at validations")
    log_every: int = flag(20, "steps between lines of the log")
    workers: int = flag(8, "loader processes per process")
    seed: int = flag(0, "seed of weights, sampling and augmentation")
    benchmark: bool = flag(False, "time the network on this machine, beside its matrix products; "
                           "--backbone, --levels, --width, --crop, --batch-per-process, "
                           "--precision count, --compile adds the compiled network")


# What differs from the defaults above, which are the deck's.
# NOTE(deck): the recipes below are ours.
FROM_SCRATCH = {"backbone": "convnext_atto", "pretrained": "none", "layer_scale": 0.1, "lr": 1e-3,
                "backbone_lr": 1e-3, "bn_momentum": 0.1, "crop": 256, "batch": 8,
                "batch_per_process": 8, "workers": 0}
RECIPES = {
    "driving": {},
    "ade20k": {"train": ("ade20k",), "val": ("ade20k",), "crop": 512, "batch": 16,
               "batch_per_process": 2, "epochs": 127},
    "camvid": {**FROM_SCRATCH, "train": ("camvid",), "val": ("camvid",), "steps": 2000,
               "warmup": 50, "val_every": 5},
    "demo": {**FROM_SCRATCH, "data": "demo", "train": ("cityscapes", "acdc"),
             "val": ("acdc", "cityscapes"),
             "width": 64, "zoom": (0.75, 1.75), "steps": 400, "warmup": 20, "val_every": 1000},
}
# Flags that may differ between a run and its continuation: they do not change what is learned.
# batch_per_process is not among them: BatchNorm's statistics are those of one forward.
FREE = ("demo", "out", "resume", "compile", "checkpoint_blocks", "save_every", "log_every",
        "workers", "skip_bad", "benchmark", "once")


def settle(given):
    """The Config of a command line: defaults, then the recipe, then the flags given.
    Raises ValueError."""
    if "resume" in given:
        path = last_checkpoint(given["resume"])
        base, kinds = read_checkpoint(path)["config"], {name: type(value) for name, value
                                                 in dataclasses.asdict(Config()).items()}
        inside = {"zoom": float}                       # of the other tuples: str
        if strange := sorted(name for name, value in base.items()
                             if type(value) is not kinds.get(name) or kinds[name] is tuple
                             and {*map(type, value)} - {inside.get(name, str)}):
            raise ValueError(f"{path} was written by another version: it has settings "
                             f"{', '.join(strange)}")
    else:
        if (not given.get("demo")
                and not {"recipe", "data", "train", "val", "pseudo"} & given.keys()
                and not given.get("benchmark") and not Path("data").is_dir()):
            say("no --data given and no folder data/ here: training on the generated demo streets")
            given = {**given, "demo": True}
        if given.get("demo") and given.setdefault("recipe", "demo") != "demo":
            raise ValueError(f"--demo and --recipe {given['recipe']} exclude each other")
        base = RECIPES[given.get("recipe", "driving")]
    config = Config(**{**base, **given})
    for name in ("levels", "epochs", "batch", "batch_per_process", "crop", "val_every",
                 "save_every", "log_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, "
                             f"found {getattr(config, name)}")
    for name in ("steps", "width", "warmup", "workers", "weight_decay", "seed", "skip_bad"):
        if getattr(config, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, "
                             f"found {getattr(config, name)}")
    if not (len(config.zoom) == 2 and 0.01 <= config.zoom[0] <= config.zoom[1] <= 100):
        raise ValueError("--zoom takes two numbers, 0.01 <= low <= high <= 100; "
                         f"found {shown(config.zoom)}")
    for name, most in (("crop", 8192), ("seed", 1_000_000), ("workers", 256), ("batch", 100_000),
                       ("levels", 8), ("width", 4096), ("epochs", 10 ** 6), ("steps", 10 ** 9)):
        if getattr(config, name) > most:
            raise ValueError(f"--{name} must be at most {most}, found {getattr(config, name)}")
    if config.crop <= 32 * 2 ** (config.levels - 1):
        raise ValueError(f"--crop {config.crop} is not above the coarsest stride, "
                         f"{32 * 2 ** (config.levels - 1)}: BatchNorm would see one value there")
    if not (0 <= config.jitter < 1 and 0 <= config.uniform_classes <= 1):
        raise ValueError("expected 0 <= --jitter < 1 and 0 <= --uniform-classes <= 1, "
                         f"found {config.jitter} and {config.uniform_classes}")
    if (not 0 <= config.drop_path < 1 or not 0 < config.bn_momentum <= 1
            or min(config.lr, config.backbone_lr) <= 0):
        raise ValueError("expected 0 <= --drop-path < 1, 0 < --bn-momentum <= 1, --lr and "
                         "--backbone-lr above 0")
    return config


def settle_data(config):
    """Config with the sets filled in that the data root offers, and the class names."""
    if not config.data or not Path(config.data).is_dir():
        raise ValueError(f"--data {config.data}: no such folder; expected a folder per set in it "
                         f"({', '.join(DEFAULT_MIX)}, ...)")
    train = config.train or tuple(annotated(config.data, "train"))
    if not train:
        raise ValueError(f"{config.data} holds none of {', '.join(DEFAULT_MIX)}; `python data.py "
                         f"--data {config.data}` shows what was looked for, --train names other "
                         "sets, --demo trains on generated streets")
    val = config.val or tuple(n for n in ("acdc", "cityscapes")
                              if n in annotated(config.data, "val"))
    if not val:
        raise ValueError(f"{config.data} holds neither acdc nor cityscapes to validate on; "
                         "name a set with --val")
    return dataclasses.replace(config, train=train, val=val)


# --- the run folder -----------------------------------------------------------------------------

def choose_run(config):
    """(folder, state to continue from or None) for this command; reads only.

    An unfinished run with the same settings is continued, a finished one stepped over (runs/demo-2,
    ...), an unfinished one with other settings refused. A folder with a best.pt and no last.pt is
    left alone.
    """
    if config.resume:
        folder = last_checkpoint(config.resume).parent
        state = read_checkpoint(folder / "last.pt")
        if state["step"] >= state["total"]:
            raise ValueError(f"--resume {folder}: this run is finished ({state['total']} steps)")
        refuse_changes(config, state, folder)
        return folder, state
    base = Path(os.path.normpath(config.out or f"runs/{config.recipe}"))
    base = base if base.name else base.resolve()
    if base.exists() and not base.is_dir():
        raise ValueError(f"--out {base} is a file; expected a folder")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    for number in range(1, 10000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if (folder / "last.pt").is_file():
            state = read_checkpoint(folder / "last.pt")
            # A finished one where --once asks for no other, or where it died after its last step.
            if (state["step"] < state["total"] or config.once
                    or restarted and not changes(config, state)):
                refuse_changes(config, state, folder)
                return folder, state
        elif not (folder / "best.pt").is_file():
            return folder, None
    raise ValueError(f"{base} and its 9998 successors are all taken; clean up, or name another "
                     "--out")


def last_checkpoint(path):
    """last.pt of a run that is named by its folder or by a file in it."""
    last = (Path(path).parent if Path(path).suffix == ".pt" else Path(path)) / "last.pt"
    if not last.is_file():
        raise FileNotFoundError(f"--resume {path}: there is no {last}")
    return last


def changes(config, state):
    """Settings that differ between a checkpoint and this command."""
    return [f"--{name.replace('_', '-')} {shown(state['config'].get(name))} there, "
            f"{shown(value)} here"
            for name, value in dataclasses.asdict(config).items()
            if name not in FREE and state["config"].get(name) != value]


# What a continuation needs beside swiftnet.CHECKPOINT.
CONTINUED = {"optimizer": dict, "scaler": dict, "best": float, "untrained": dict, "data": str,
             "world": int, "dtype": str}


def refuse_changes(config, state, folder):
    """Raise ValueError where a run was made with other settings, or its state is not whole."""
    wrong = [key for key, kind in CONTINUED.items() if not isinstance(state.get(key), kind)]
    if wrong or state["step"] < 0:
        raise ValueError(f"{folder / 'last.pt'} cannot be continued (it lacks "
                         f"{', '.join(wrong) or 'steps'}); give it to --init, or remove the folder")
    if differing := changes(config, state):
        raise ValueError(f"{folder} holds a run (step {state['step']} of "
                         f"{state['total']}) with other settings: {'; '.join(differing)}. "
                         "Use those, another --out, or remove the folder")


def refuse_other_data(folder, state, digest, world, dtype):
    """Raise ValueError where the images changed since `state` was saved;
    say what else a reader must know."""
    if state["data"] != digest:
        raise ValueError(f"{folder} was trained on other files: {state['data']} there, {digest} "
                         "here. Bring the data back, or start anew with --init and another --out")
    if (state["world"], state["dtype"]) != (world, dtype):
        say(f"{folder}: {state['world']} processes in {state['dtype']} before, {world} in {dtype} "
            "now: the continuation is valid, but not bit for bit that of the old setup")


def shown(value):
    """A setting as it is typed on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def stop_on_sigterm(rank):
    """A list that becomes true when SIGTERM arrives (schedulers, torchrun). Rank 0 then saves at
    its next step boundary, which needs no other process; the others carry on until it is gone,
    20 seconds at most."""
    stopping = []

    def handler(signum, frame):
        stopping.append(True)
        if rank != 0:
            signal.alarm(20)
    signal.signal(signal.SIGTERM, handler)
    return stopping


class Log:
    """log.jsonl of a run: one JSON object per line, on rank 0. The first holds config and versions.

    A continued run keeps the lines up to its checkpoint, so that no step appears twice.
    """

    def __init__(self, folder, rank, header, state):
        self.path = folder / "log.jsonl" if rank == 0 else None
        if self.path is None:
            return
        if state is None:
            lines = [json.dumps(header)]
        else:
            lines = [*kept_lines(self.path, state["step"]),
                     json.dumps({"restart": state["step"], **header})]
        with whole_file(self.path) as temporary:
            temporary.write_text("\n".join(lines) + "\n")

    def write(self, **record):
        if self.path is not None:
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")


def kept_lines(path, step):
    """Lines of a log up to `step`; a last line cut short by a kill is dropped."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
            if json.loads(line).get("step", 0) <= step:
                kept.append(line)
    return kept


# --- model and optimizer ------------------------------------------------------------------------

def architecture(config, classes):
    """Arguments of swiftnet.build that a checkpoint carries."""
    return {"backbone": config.backbone, "num_classes": len(classes), "levels": config.levels,
            "width": config.width or None, "drop_path": config.drop_path,
            "layer_scale": config.layer_scale}


def make_model(config, classes, state):
    """The network on the CPU: continued, initialised from a checkpoint, ImageNet weights,
    or random."""
    torch.manual_seed(config.seed)
    model = build(**architecture(config, classes))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = config.bn_momentum
    model.backbone.checkpoint_blocks = config.checkpoint_blocks
    if state is not None:
        load_weights(model, state["model"], f"last.pt of {config.out or config.recipe}")
    elif config.init:
        take_weights(model, config.init, classes)
    elif config.pretrained != "none":
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not first:
            dist.barrier()                     # one process of each machine downloads first
        load_pretrained(model.backbone, config.pretrained)
        if first and dist.is_initialized():
            dist.barrier()
    return model


def take_weights(model, path, classes):
    """Weights of a checkpoint of the same architecture;
    the head stays new where it knows other classes."""
    checkpoint = read_checkpoint(path)
    state = checkpoint["model"]
    if tuple(checkpoint["classes"]) != tuple(classes):
        say(f"--init {path}: {len(checkpoint['classes'])} classes there "
            f"({checkpoint['classes'][0]}, ...), {len(classes)} here ({classes[0]}, ...): new head")
        own = model.state_dict()
        state = {**state, **{name: own[name] for name in ("head.2.weight", "head.2.bias")}}
    load_weights(model, state, f"--init {path}")


def load_weights(model, state, source):
    """model.load_state_dict, or ValueError."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit: {str(error).splitlines()[1].strip()[:200]}; "
                         "give the --backbone, --levels and --width "
                         "that it was trained with") from None


def make_optimizer(model, config, device):
    """Adam with two groups: the backbone, and the new layers (lineage)."""
    backbone = list(model.backbone.parameters())
    known = {id(p) for p in backbone}
    groups = [{"params": [p for p in model.parameters() if id(p) not in known], "peak": config.lr},
              {"params": backbone, "peak": config.backbone_lr}]
    return torch.optim.Adam(groups, lr=config.lr, betas=ADAM_BETAS, eps=ADAM_EPS,
                            weight_decay=config.weight_decay, fused=device.type == "cuda")


def learning_rate(step, peak, warmup, total):
    """Linear to `peak` over `warmup` steps, then a cosine that would reach LR_END at
    step `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return LR_END + (peak - LR_END) * 0.5 * (1 + math.cos(math.pi * progress))


def wrap(model, config, device, world):
    """The module whose forward the loop calls: SyncBatchNorm on GPUs, DDP, torch.compile,
    as asked."""
    if world > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True)
    return torch.compile(model, dynamic=False) if config.compile else model


def equalise_buffers(model):
    """Give every process the running statistics of rank 0.

    After a step they differ, as each process saw other images. Rank 0's are the ones that count:
    DDP copies them to all at the next training forward.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


# --- the loop -----------------------------------------------------------------------------------

class Steps:
    """Optimizer steps: one call takes this process's share of a global batch through the network.

    The loss of a step is divided by the number of valid pixels of the whole global batch, over all
    processes and all accumulated parts, so the gradient does not depend on how images fall on
    processes. DDP averages gradients; hence the factor `world`.
    """

    def __init__(self, model, network, optimizer, scaler, config, device, dtype, rank, world,
                 total):
        self.model, self.network, self.optimizer, self.scaler = model, network, optimizer, scaler
        self.config, self.device, self.dtype = config, device, dtype
        self.rank, self.world, self.total = rank, world, total
        self.weigh, self.criterion = boundary_weights, boundary_aware_focal_loss
        if config.compile and device.type == "cuda":
            self.weigh, self.criterion = (torch.compile(function, dynamic=False) for function in
                                          (self.weigh, self.criterion))
        self.loss = torch.zeros((), device=device)    # of the last step, this process's share of it
        self.bad_step = torch.full((), -1, device=device)    # first step whose loss was not finite

    def __call__(self, step, images, ids):
        """images (B, 3, H, W), ids (B, H, W): uint8 on any device, B = batch / world."""
        config, device = self.config, self.device
        # A function of (seed, step, rank), so stochastic depth repeats when a run is continued.
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_000_003 + self.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, group["peak"], config.warmup, self.total)
        images = images.to(device, non_blocking=True)
        labels = ids.to(device, non_blocking=True)
        # Started before the forward, awaited before the first loss: valid pixels of the global
        # batch, and whether any process met a loss that is not finite in the step before.
        shared = torch.stack([(labels != IGNORE).sum(), ~self.loss.isfinite()]).double()
        pending = dist.all_reduce(shared, async_op=True) if self.world > 1 else None

        loss_sum = torch.zeros_like(self.loss)
        parts = list(zip(images.split(config.batch_per_process),
                         labels.split(config.batch_per_process)))
        for i, (part, part_labels) in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last or self.world == 1 else self.network.no_sync():
                weights = self.weigh(part_labels)
                with autocast(device, self.dtype):
                    logits = self.network(part)
                if pending is not None:
                    pending.wait()
                    pending = None
                loss = self.criterion(logits, part_labels.long(), weights,
                                      normalizer=shared[0]) * self.world
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        self.bad_step = torch.where((shared[1] > 0) & (self.bad_step < 0), step - 1, self.bad_step)
        self.loss = loss_sum
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def finite(self):
        """Whether the last loss, the weights and the running statistics are finite here;
        a bool tensor."""
        state = [tensor for tensor in self.model.state_dict().values()
                 if tensor.is_floating_point()]
        return torch.stack([self.loss.isfinite(),
                            *(tensor.isfinite().all() for tensor in state)]).all()

    def mean_loss(self, step):
        """Loss of the last step over all processes. Raises ValueError on all of them where one
        loss, or what the step made of the weights, is not finite: so nothing is saved after it."""
        shared = torch.stack([self.loss, (~self.finite()).float()])
        if self.world > 1:
            dist.all_reduce(shared)
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise ValueError(f"the gradients overflow float16 at any scale (step {step}): nothing "
                             "is learned; checkpoints are intact. Try --precision fp32, or lower "
                             "--lr")
        loss, bad = (shared / self.world).tolist()
        first = int(self.bad_step) if self.bad_step >= 0 else step if bad else -1
        if first >= 0:
            raise ValueError(f"the loss of step {first}, or what it made of the weights, "
                             "is not finite; checkpoints before it are intact. Lower --lr, "
                             "raise --warmup, or try --precision fp32")
        return loss


def make_batches(samples, weights, classes, config, steps_per_epoch, first, total, rank, world,
                 device):
    """Iterator over this process's share of every remaining step: images, ids, errors.
    Workers start once."""
    counts = None
    if config.uniform_classes:
        if rank == 0:
            class_counts(samples, len(classes), config.workers)
        if world > 1:
            dist.barrier()
        counts = class_counts(samples, len(classes))       # read from the file that rank 0 wrote
    sampler = step_keys(weights, config.batch, steps_per_epoch, first, total, config.seed, rank,
                          world, counts, config.uniform_classes)
    dataset = TrainSet(samples, len(classes), config.crop, config.zoom, config.seed, config.jitter)
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate,
                                       num_workers=config.workers, worker_init_fn=ignore_sigterm,
                                       pin_memory=device.type == "cuda")


def validate(model, samples, classes, config, rank, world, device):
    """{condition: dict of Metrics.compute} of the validation samples at their native size,
    T = 1."""
    equalise_buffers(model)
    model.eval()
    results = evaluate(model, samples, len(classes), device, precision=config.precision,
                       workers=min(config.workers, 4), rank=rank, world=world)
    model.train()
    results = {condition: group[0].compute() for condition, group in results.items()}
    if not results["all"]["pixels"]:
        raise ValueError(f"--val {shown(config.val)}: not one labelled pixel in {len(samples)} "
                         "images")
    return results


def scores(results):
    """What the log and the checkpoint keep of a validation: {condition: mIoU}."""
    return {condition: round(r["miou"], 6) for condition, r in results.items()}


def load_data(config):
    """(config with its sets, training samples, their weights, validation samples, class names)."""
    config = settle_data(config)
    for name, specs in (("train", config.train), ("pseudo", config.pseudo)):
        for spec in specs:
            if (parse_spec(spec)[0] in DATASETS) != (name == "train"):
                raise ValueError(f"--{name} {spec}: --train takes sets ({', '.join(DEFAULT_MIX)}, "
                                 "...), --pseudo folders of pseudolabel.py")
    specs = config.train + config.pseudo
    groups = gather_groups(config.data, specs, "train", True)
    weights = np.concatenate([np.full(len(group), parse_spec(spec)[2])
                              for spec, group in zip(specs, groups)])
    val_samples = gather(config.data, config.val, "val", True)
    classes, val_classes = (classes_of(config.data, parse_spec(specs[0])[0])
                            for specs in (config.train, config.val))
    if classes != val_classes:
        raise ValueError(f"--train {shown(config.train)} and --val {shown(config.val)} "
                         "have different classes")
    return config, sum(groups, []), weights, val_samples, classes


def make_steps(config, classes, state, rank, world, device, total):
    """Model, optimizer and scaler, fresh or as `state` has them, in a Steps."""
    # Order of a resume: weights before DDP copies them, optimizer state once the parameters are on
    # the device. Data starts at the step reached; device randomness is seeded by step.
    model = make_model(config, classes, state).to(device).train()
    optimizer = make_optimizer(model, config, device)
    dtype = half_type(device, config.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state:
        try:
            for group in state["optimizer"]["param_groups"]:      # of this device, not of that one
                group["fused"] = device.type == "cuda"
            optimizer.load_state_dict(state["optimizer"])
            if state["scaler"] and scaler.is_enabled():
                scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"last.pt holds no state of this optimizer ({error!r:.200}); give it "
                             "to --init, or remove the folder") from None
    network = wrap(model, config, device, world)
    return Steps(model, network, optimizer, scaler, config, device, dtype, rank, world, total)


def save(path, steps, classes, standing):
    """Write a checkpoint: tensors and plain values only,
    so that it can be read without running code."""
    config = steps.config
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        torch.save({"model": steps.model.state_dict(), "optimizer": steps.optimizer.state_dict(),
                    "scaler": steps.scaler.state_dict(), **standing, "total": steps.total,
                    "world": steps.world, "dtype": str(steps.dtype or torch.float32),
                    "architecture": architecture(config, classes), "classes": tuple(classes),
                    "config": dataclasses.asdict(config), "torch": str(torch.__version__)},
                   file)


def train(config, rank, world, device):
    """Run the training that `config` describes, from its beginning or from where its
    folder stands."""
    config, samples, weights, val_samples, classes = load_data(config)
    steps_per_epoch = max(1, round(weights.sum()) // config.batch)
    total = config.steps or config.epochs * steps_per_epoch
    digest = data_digest(samples, weights, val_samples, config.pseudo)
    folder, state = choose_run(config)     # every process looks; none writes before all have looked
    if len(set(gathered((str(folder), state and state["step"])))) > 1:
        raise ValueError(f"the processes see different runs (here {folder}); --out must lie on a "
                         "file system that all machines share")
    if state and state["step"] >= state["total"]:
        refuse_other_data(folder, state, digest, world, state["dtype"])
        return say(f"{folder}: finished before, nothing to do")
    steps = make_steps(config, classes, state, rank, world, device, total)
    dtype = str(steps.dtype or torch.float32)
    if state:
        refuse_other_data(folder, state, digest, world, dtype)
        # lets go of the tensors
        state = {key: state[key] for key in ("step", "best", "untrained", "data")}
    with hold(folder, rank):
        log = Log(folder, rank,
                  {"config": dataclasses.asdict(config), "world": world, "device": str(device),
                   "versions": versions(), "images": len(samples), "total": total},
                  state)
        standing = state or {"step": 0, "best": -1.0, "data": digest}
        say(f"{folder}: {'continued at step ' + str(standing['step']) if state else 'new'}; "
            f"{len(samples)} images of {shown(config.train + config.pseudo)}, "
            f"{steps_per_epoch} steps per epoch, {total} in all; {config.backbone} on "
            f"{world} x {device.type}, {dtype[6:]}, batch {config.batch}")
        batches = make_batches(samples, weights, classes, config, steps_per_epoch, standing["step"],
                               total, rank, world, device)
        loop(steps, batches, standing, steps_per_epoch, folder, log, val_samples, classes)


def data_digest(samples, weights, val_samples, pseudo):
    """A line that changes with the files that are trained and validated on, their order, and what
    the folders of pseudolabels hold."""
    lines = [*(os.fsencode(s.image) for s in samples), *(str(w).encode() for w in weights),
             *(os.fsencode(s.image) for s in val_samples),
             *((Path(parse_spec(spec)[0]) / MANIFEST).read_bytes() for spec in pseudo)]
    digest = hashlib.blake2b(b"\n".join(lines), digest_size=8).hexdigest()
    return f"{len(samples)} + {len(val_samples)} images {digest}"


def versions():
    """What the first record of the log says of the software."""
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "pillow": PIL.__version__}


def loop(steps, batches, standing, steps_per_epoch, folder, log, val_samples, classes):
    """Take all steps from standing["step"] on; log, validate and save as the config says."""
    config, rank, began = steps.config, steps.rank, time.monotonic()

    def record(**what):
        log.write(step=standing["step"], epoch=round(standing["step"] / steps_per_epoch, 3), **what,
                  seconds=round(time.monotonic() - began, 2))

    def validated():
        results = validate(steps.model, val_samples, classes, config, rank, steps.world,
                           steps.device)
        record(miou=scores(results))
        return results

    if "untrained" not in standing:
        standing["untrained"] = scores(validated())
        if rank == 0:                          # from here on there is a checkpoint to continue from
            save(folder / "last.pt", steps, classes, standing)
    stopping, skipped = stop_on_sigterm(rank), Skipped(config.skip_bad, log)
    progress, note = Progress(steps.total, "step", standing["step"]), ""
    for step, (images, ids, errors) in enumerate(batches, standing["step"]):
        skipped.count(errors, step + 1)
        steps(step, images, ids)
        standing["step"] = done = step + 1
        epoch_end = done % (steps_per_epoch * config.val_every) == 0 or done == steps.total
        saving, logging = epoch_end or done % config.save_every == 0, done % config.log_every == 0
        if saving or logging:
            note = f"loss {(loss := steps.mean_loss(step)):.4f}"
        if logging:
            record(loss=loss, lr=steps.optimizer.param_groups[0]["lr"])
        if epoch_end:
            results = validated()
            say(f"step {done}: mIoU "
                + ", ".join(f"{c} {100 * v:.2f}" for c, v in scores(results).items()))
            if results["all"]["miou"] > standing["best"]:
                standing["best"] = results["all"]["miou"]
                if rank == 0:
                    save(folder / "best.pt", steps, classes, standing)
        if rank == 0 and (saving or stopping and steps.finite()):
            save(folder / "last.pt", steps, classes, standing)
        if rank == 0 and stopping:
            raise SystemExit(f"{folder}: stopped by SIGTERM after step {done}; the same command "
                             "continues")
        progress.update(note=note)
    if rank == 0:
        report(folder, results, standing, count_conditions(val_samples), time.monotonic() - began)


class Skipped:
    """Counts unreadable files, each once; raises the first error beyond `most`."""

    def __init__(self, most, log):
        self.most, self.log, self.paths = most, log, set()

    def count(self, errors, step):
        for path, error in errors:
            if path in self.paths:
                continue
            self.paths.add(path)
            number = len(self.paths)
            if number > self.most:
                raise ValueError(f"{error} ({number} unreadable files; --skip-bad {self.most})"
                                 if self.most else error)
            print(f"skipped, number {number} of at most {self.most}: {error}", flush=True)
            self.log.write(step=step, skipped=error)


def report(folder, results, standing, counts, seconds):
    """Print the last validation beside the untrained network's."""
    print(f"\n{folder}: finished in {clock(seconds)}; last validation, percent; best mIoU "
          f"{100 * standing['best']:.2f}")
    lines = summary_table(results, counts)
    print(lines[0] + f"{'untrained':>11}{'gain':>8}")
    for line, (condition, r) in zip(lines[1:], results.items()):
        before = standing["untrained"][condition]
        print(line + f"{100 * before:>11.2f}{100 * (r['miou'] - before):>+8.2f}")
    if "clear" in results:
        print("mIoU below clear: " + ", ".join(
            f"{condition} {100 * (results['clear']['miou'] - r['miou']):.2f}"
            for condition, r in results.items() if condition not in ("all", "clear")))
    print("next: python evaluate.py --temperature 0.67")


# --- benchmark ----------------------------------------------------------------------------------

def milliseconds(pieces, device, rounds):
    """{name: times of `rounds` rounds} of {name: function}. The functions take turns, so that a
    change in the machine's speed meets all of them; short ones run several times in a row."""
    def took(function, times):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(times):
                function()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / times
        start = time.perf_counter()
        for _ in range(times):
            function()
        return 1000 * (time.perf_counter() - start) / times
    for function in pieces.values():                                  # compiles, allocates, tunes
        function()
    repeats = {name: max(1, int(10 / took(function, 1))) for name, function in pieces.items()}
    repeats = gathered(repeats)[0]           # collectives inside must be as many on every process
    times = {name: [] for name in pieces}
    for _ in range(rounds):
        for name, function in pieces.items():
            times[name].append(took(function, repeats[name]))
    return times


def products(model, height, width, batch, dtype, device):
    """{name: (function, multiply-accumulates)} of matrix products: squares, and the first pointwise
    layer of each stage at its number of pixels."""
    shapes = [(size,) * 3 for size in ((2048, 4096, 8192) if device.type == "cuda"
                                       else (512, 1024, 2048))]
    shapes += [(batch * height * width // 4 ** (i + 2), dim, 4 * dim)
               for i, dim in enumerate(model.backbone.dims)]

    def product(m, k, n):
        a, b = (torch.randn(size, dtype=dtype, device=device) for size in ((m, k), (n, k)))
        return lambda: a @ b.T
    return {f"{m} x {k} x {n}": (product(m, k, n), m * k * n) for m, k, n in shapes}


def kinds_of_blocks(model, height, width, batch, device, dtype, training):
    """(kind, number, function, how often) of depthwise layers, pointwise layers and whole blocks
    of the backbone, at the shapes of a pyramid of batch images. A function runs one of them,
    forward or forward and backward."""
    for level in range(model.levels):
        for i, dim in enumerate(model.backbone.dims):
            size = (height // 2 ** (i + 2 + level), width // 2 ** (i + 2 + level))
            block, count = model.backbone.stages[i][0], model.backbone.depths[i]
            x = torch.randn(batch, dim, *size, device=device)
            x = x.contiguous(memory_format=torch.channels_last)
            pieces = {"depthwise": (block.dwconv, [block.dwconv], x), "blocks": (block, [block], x),
                      "pointwise": (lambda y, b=block: b.pwconv2(b.pwconv1(y)),
                                    [block.pwconv1, block.pwconv2], x.permute(0, 2, 3, 1))}
            for kind, (module, layers, given) in pieces.items():
                weights = [weight for layer in layers for weight in layer.parameters()]
                run = runner(module, weights, given, device, dtype, training)
                yield kind, (level, i), run, count


class StoredFeatures(nn.Module):
    """In a backbone's place: features that are there already, parameters for their gradients."""

    def __init__(self, dims, levels, height, width, batch):
        super().__init__()
        self.dims, self.kept = dims, nn.ParameterDict()
        for level in range(levels):
            self.kept[str(height >> level)] = nn.ParameterList(
                torch.randn(batch, dim, height >> i + 2 + level, width >> i + 2 + level)
                .contiguous(memory_format=torch.channels_last) for i, dim in enumerate(dims))

    def forward(self, x):
        return self.kept[str(x.shape[2])]


def ladder_alone(model, height, width, batch, device, dtype, training):
    """A function that runs all of the network but its backbone: normalising and shrinking the
    images, projections, ladder, head."""
    features = StoredFeatures(model.backbone.dims, model.levels, height, width, batch)
    ladder = SwiftNet(features, model.num_classes, model.width, model.levels).to(device)
    images = torch.zeros(batch, 3, height, width, device=device)
    return runner(ladder.train(training), ladder.parameters(), images, device, dtype, training)


def runner(module, weights, given, device, dtype, training):
    """A function that runs `module` on `given`: forward, and if `training` the gradients of `given`
    and of `weights`."""
    if not training:
        def run():
            with torch.inference_mode(), autocast(device, dtype):
                return module(given)
        return run
    # in the type that autocast feeds these layers, so that no cast is counted with them
    given = given.to(dtype or torch.float32).requires_grad_()
    wanted = (given, *weights)

    def run():
        with autocast(device, dtype):
            y = module(given)
        torch.autograd.grad(y, wanted, y.detach(), allow_unused=True)
    return run


KERNELS = (("generated by torch.compile (norms, elementwise, loss, copies)", r"^triton_"),
           ("depthwise", r"depthwise|_c1_k1_|wgrad2d_"),
           ("matrix products and dense convolutions", r"nvjet|gemm|xmma|cutlass|convolve"),
           ("batch norm", r"batch_?norm|bn_(fw|bw)"), ("upsampling", "upsample"),
           ("optimizer", "multi_tensor"), ("communication", "nccl"),
           ("layer norm, elementwise, copies", ""))


def kernel_times(function):
    """{kind of KERNELS: milliseconds} that one call of `function` keeps the GPU busy."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    times = dict.fromkeys((kind for kind, _ in KERNELS), 0.0)
    for event in profile.key_averages():
        if not event.is_user_annotation:                # which lies around kernels
            kind = next(kind for kind, names in KERNELS if re.search(names, event.key, re.I))
            times[kind] += event.self_device_time_total / 1000
    return times


def benchmark(config, rank, world, device):
    """Print speed, memory and share of the matrix-product ceiling of one network on this machine,
    and where the time goes: forward of one image of crop x (2 crop), training step of
    batch_per_process crops; eager, with blocks recomputed, and with --compile both compiled.
    Weights are random. The table comes last."""
    if config.crop % (32 * 2 ** (config.levels - 1)):
        raise ValueError(f"--benchmark takes a --crop that needs no padding, a multiple of "
                         f"{32 * 2 ** (config.levels - 1)}; found {config.crop}")
    config = dataclasses.replace(config, batch=config.batch_per_process * world,
                                 pretrained="none", init="")
    rows, rates = [], {}
    for compiled in (False, True)[:1 + config.compile]:
        for recomputed in (False, True):
            variant = dataclasses.replace(config, compile=compiled, checkpoint_blocks=recomputed)
            try:
                for row in time_variant(variant, rank, world, device, rates):
                    rows.append(row)
            except torch.OutOfMemoryError:
                if world > 1:                                 # the others would wait for this one
                    raise
                say(f"out of memory: {'compiled' if compiled else 'eager'}"
                    + ", blocks recomputed" * recomputed)
            torch.compiler.reset()                            # frees what the variant held
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if not rows:
        raise ValueError("the network does not fit into the GPU's memory; choose a smaller --crop, "
                         "--batch-per-process or --backbone")
    best = max(rates, key=rates.get)
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads")
    say(f"\n{name} x {world}, torch {torch.__version__}, "
        f"{str(half_type(device, config.precision) or torch.float32)[6:]}, {config.backbone}\n"
        f"ceiling: {rates[best]:.3f} TFLOP/s, the matrix product {best}; others: "
        + ", ".join(f"{n} {rate:.3f}" for n, rate in rates.items() if n != best))
    width = max(len(title) for title, *_ in rows)
    say(f"{'':<{width}} {'ms':>8} {'10-90 %':>15} {'GPU busy':>8} {'images/s':>8} {'TFLOP/s':>8} "
        f"{'of ceiling':>10} {'memory':>9}")
    for title, times, images, speed, busy, memory in rows:
        total, low, high = np.percentile(times, [50, 10, 90])
        say(f"{title:<{width}} {total:>8.1f} {f'{low:.1f}-{high:.1f}':>15} "
            f"{f'{busy:.1f}' if busy else '-':>8} {1000 * images / total:>8.2f} {speed:>8.3f} "
            f"{speed / rates[best]:>10.1%} {f'{memory:.1f} GiB' if memory else '-':>9}")


def peak_memory(function, before):
    """GiB beyond `before` bytes that a second call of `function` needs on the GPU."""
    function()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 30


def benchmark_images(batch, crop, device):
    """Random images and label ids of a training step, as the loader gives them, and a picture for
    the forward, on the device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, crop, crop), dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)     # as collate makes them
    areas = torch.randint(0, 19, (batch, crop // 64 + 1, crop // 64 + 1), dtype=torch.uint8,
                          generator=generator)        # a street has areas, not noise
    ids = areas.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :crop, :crop].contiguous()
    picture = torch.randint(0, 256, (1, 3, crop, 2 * crop), dtype=torch.uint8, generator=generator)
    if device.type == "cuda":
        images, ids = images.pin_memory(), ids.pin_memory()
    return images, ids, picture.to(device)


def time_variant(config, rank, world, device, rates):
    """Rows (title, milliseconds, images, TFLOP/s of a process, milliseconds that the GPU is busy,
    GiB of peak memory) of forward and training step of one variant; the last two 0 on a CPU.
    Times matrix products in turns with the network and keeps the best rate of each in `rates`."""
    batch, crop, on_gpu = config.batch_per_process, config.crop, device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    steps = make_steps(config, range(19), None, rank, world, device, 1000)
    model, dtype = steps.model, steps.dtype
    images, ids, picture = benchmark_images(batch, crop, device)
    labels = ids.to(device)
    network = model
    if config.compile:        # a CUDA graph, where there is a GPU: nothing waits for the host
        network = torch.compile(model, dynamic=False, mode="reduce-overhead")

    def forward():
        with torch.inference_mode(), autocast(device, dtype):
            network(picture)

    def step():
        steps(0, images, ids)
    wholes = [("training step", step, 6, (batch, crop, crop))]
    if not config.checkpoint_blocks:              # without a backward pass nothing is recomputed
        # the first, whose memory should be without optimizer state
        wholes.insert(0, ("forward", forward, 2, (1, crop, 2 * crop)))
    with torch.device("meta"):
        plain = build(config.backbone, 19, config.width or None, config.levels)
    for title, whole, factor, shape in wholes:
        title += (f" {'x'.join(map(str, shape))}{', compiled' * config.compile}"
                  f"{', a CUDA graph' * (on_gpu and config.compile and whole is forward)}"
                  f"{', blocks recomputed' * config.checkpoint_blocks}")
        model.train(whole is step)
        memory, extra = peak_memory(whole, before) if on_gpu else 0, {}
        if whole is step:
            logits = torch.randn(batch, 19, crop, crop, device=device)      # resize's are float32
            logits = logits.contiguous(memory_format=torch.channels_last).requires_grad_()
            weights = steps.weigh(labels)
            extra = {"boundary weights": lambda: steps.weigh(labels),
                     "loss": lambda: torch.autograd.grad(
                         steps.criterion(logits, labels.long(), weights), logits),
                     "input": lambda: (images.to(device).float() - model.mean) / model.std}
        ceiling = products(model, crop, crop, batch, dtype or torch.float32, device)
        pieces = {"whole": whole, **extra,
                  **{name: product for name, (product, _) in ceiling.items()}}
        counts, form = {}, (*shape[1:], shape[0], device, dtype, whole is step)
        if not config.compile:                             # else no part runs as it does alone
            pieces["ladder"] = ladder_alone(model, *form)
            if not on_gpu and not config.checkpoint_blocks:    # a GPU's kernels tell more
                for kind, number, run, count in kinds_of_blocks(model, *form):
                    pieces[kind, number], counts[kind, number] = run, count
        times = milliseconds(pieces, device, 15 if on_gpu else 5)
        took = {name: float(np.median(values)) for name, values in times.items()}
        for name, (_, macs) in ceiling.items():
            rates[name] = max(rates.get(name, 0), 2e-9 * macs / took[name])
        total, kernels = took["whole"], kernel_times(whole) if on_gpu else {}
        busy = sum(kernels.values())
        parts = {name: took[name] for name in (*extra, "ladder") if name in took}
        if on_gpu:
            parts = {f"of it {name}": time for name, time in parts.items()}
            # with more processes, communication runs beside the rest
            idle = {"idle": total - busy} if world == 1 else {}
            parts = {**kernels, **idle, **parts}
        if counts:
            for (kind, number), count in counts.items():
                parts[kind] = parts.get(kind, 0) + took[kind, number] * count
            parts["norm, elementwise"] = (parts.pop("blocks") - parts["depthwise"]
                                          - parts["pointwise"])
            parts["the rest"] = total - sum(parts.values())
        shares = ", ".join(f"{n} {t:.1f} ms ({t / total:.1%})" for n, t in parts.items())
        say(f"{title}: {total:.1f} ms" + f"\n  {shares}" * bool(parts))
        speed = 1e-9 * factor * shape[0] * count_macs(plain, *shape[1:]) / total
        yield title, times["whole"], shape[0] * world, speed, busy, memory
        del pieces, ceiling                                # the step's memory is without them


def main():
    recipes = "".join(textwrap.fill(f"  {name}: " + (", ".join(
        f"{key.replace('_', '-')} {shown(value)}" for key, value in changes.items())
        or "the defaults below, the deck's"),
        110, subsequent_indent="    ") + "\n" for name, changes in RECIPES.items())
    config = settle(parse_flags(Config, f"{__doc__}\nRecipes, by what they change:\n{recipes}"))
    if config.benchmark:
        benchmark(config, *start_processes())
        return end_processes()
    if config.recipe == "demo" and config.data == "demo" and is_first():
        draw_demo(config.data)                 # the others wait in start_processes
    rank, world, device = start_processes()
    if config.batch % world:
        raise ValueError(f"--batch {config.batch} does not divide by {world} processes; choose a "
                         f"multiple of {world}")
    train(config, rank, world, device)
    end_processes()


if __name__ == "__main__":
    run_main(main)
