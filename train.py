"""Train SwiftNet-ConvNeXt.

    torchrun --nproc_per_node=8 train.py                    the deck's recipe on the sets in data/
    torchrun --nproc_per_node=2 train.py --recipe demo      generated streets, minutes on two cores
    python train.py --checkpoint-blocks                     one GPU, the same global batch

A run writes last.pt, best.pt and log.jsonl into runs/<recipe>; the same command continues an
unfinished one. "the deck": Grcic, "Large-scale semantic segmentation through multi-resolution
processing and selective pseudolabeling", Vision for All Seasons, CVPR 2022."""

import contextlib
import dataclasses
import filecmp
import functools
import hashlib
import itertools
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from convnext import SIZES, load_pretrained, read_tensors
from data import (ANNOTATED, DATASETS, PRECISIONS, TrainSet, all_gather, autocast, count_classes,
                  differences, draw_demo, epoch_keys, flag, gather, half_type, is_first,
                  lock_folder, look_through, make_loader, misplaced, parse_flags, parse_name,
                  require, run_main, say, scan, start_processes, step_keys, to_json, whole_file)
from evaluate import count_conditions, evaluate, summary_table
from losses import ALPHAS, GAMMA, PADDING, boundary_aware_focal_loss, boundary_weights
from swiftnet import build, compiled, load_checkpoint

LR_END = 1e-7                                  # lineage: the cosine ends here
EPS = 1e-7                                     # lineage: Adam's; torch has 1e-8


@dataclass(frozen=True)
class Config:
    """The flags of train.py. The defaults are the deck's recipe."""
    recipe: str = flag("driving", "defaults to start from, flags override them",
                       choices=("driving", "ade20k", "camvid", "demo"))
    data: str = flag("data", "data root, a folder per set")
    train: tuple = flag((), "sets, NAME[@SPLIT][:PART,PART][*WEIGHT] (default: the annotated ones)")
    pseudo: tuple = flag((), "folders of pseudolabels to train on as well, FOLDER[*WEIGHT]")
    val: tuple = flag((), "sets to validate on (default: acdc if it is there, else cityscapes)")
    out: str = flag("", "output folder (default: runs/<recipe>)")
    init: str = flag("", "checkpoint whose weights to begin with, not --pretrained")
    backbone: str = flag("convnext_large", "size of the backbone", choices=tuple(SIZES))
    pretrained: str = flag("in22k_1k_384", "in1k, in22k, in22k_1k_384, a path, a URL, or none")
    levels: int = flag(3, "resolutions of the pyramid", least=1)
    width: int = flag(0, "channels of the ladder (default: by size of the backbone)", least=0)
    layer_scale: float = flag(1e-6, "initial layer scale")
    drop_path: float = flag(0.0, "stochastic depth of the last block")
    epochs: int = flag(50, "passes over the training set", least=1)
    steps: int = flag(0, "optimizer steps in all (default: as many as the epochs have)", least=0)
    batch: int = flag(24, "images per optimizer step, over all processes", least=1)
    batch_per_process: int = flag(3, "images of a forward, accumulated to --batch", least=1)
    crop: int = flag(1024, "side of the training crop, pixels")
    zoom: tuple = flag((0.5, 2.0), "range of the random zoom", nargs=2)
    jitter: float = flag(0.0, "brightness, contrast, saturation scaled by 1 - jitter .. 1 + jitter")
    uniform_classes: float = flag(0.0, "share of the crops drawn so that classes come up evenly")
    gamma: float = flag(GAMMA, "of the factor exp(gamma (1 - p)) of the loss; 0 turns it off")
    alphas: tuple = flag(tuple(map(float, ALPHAS)), "weights from the boundary outwards", nargs=5)
    lr: float = flag(4e-4, "learning rate of ladder and head", least=0)
    backbone_lr: float = flag(1e-4, "learning rate of backbone and laterals", least=0)
    warmup: int = flag(0, "steps of linear warm-up", least=0)
    weight_decay: float = flag(1e-4, "Adam's L2 term", least=0)
    beta2: float = flag(0.999, "Adam's decay of squared gradients", least=0)
    bn_momentum: float = flag(0.01, "weight of a batch in the running statistics", least=1e-6)
    precision: str = flag("auto", "auto is bf16 or fp16 by GPU, fp32 on a CPU", choices=PRECISIONS)
    compile: bool = flag(False, "torch.compile the network: faster, after minutes at first")
    checkpoint_blocks: bool = flag(False, "recompute blocks in the backward pass: less memory")
    val_every: int = flag(1, "epochs between validations", least=1)
    save_every: int = flag(500, "steps between checkpoints, besides those at validations", least=1)
    log_every: int = flag(20, "steps between lines of the log", least=1)
    workers: int = flag(8, "loader processes of each process")
    seed: int = flag(0, "seed of weights, sampling and augmentation", least=0)


FROM_SCRATCH = {"backbone": "convnext_atto", "pretrained": "none", "layer_scale": 0.1, "lr": 1e-3,
                "backbone_lr": 1e-3, "beta2": 0.99, "bn_momentum": 0.1, "crop": 256, "batch": 8,
                "batch_per_process": 8, "workers": 0}
RECIPES = {                               # what differs from the deck's recipe: our choices
    "driving": {},
    "ade20k": {"train": ("ade20k",), "val": ("ade20k",), "crop": 512, "batch": 16,
               "batch_per_process": 2, "epochs": 127},
    "camvid": {**FROM_SCRATCH, "train": ("camvid",), "val": ("camvid",), "steps": 2000,
               "warmup": 50, "val_every": 5},
    "demo": {**FROM_SCRATCH, "data": "demo", "train": ("cityscapes", "acdc"),
             "val": ("acdc", "cityscapes"), "width": 64, "zoom": (0.75, 1.75), "steps": 400,
             "warmup": 20, "val_every": 1000},
}


# --- the loop -----------------------------------------------------------------------------------

def take_step(network, optimizer, scaler, images, labels, config, world):
    """One optimizer step on this process's share of the batch. Returns its share of the loss.

    images (B, 3, H, W) uint8, labels (B, H, W) uint8, B = batch / world. The loss is divided by the
    labelled pixels of the whole global batch: each counts alike, however images fall on processes
    and accumulated parts; BatchNorm sees one forward. DDP averages gradients, hence `world *`."""
    valid, total, size = (labels < PADDING).sum(), 0, config.batch_per_process
    if world > 1:
        dist.all_reduce(valid)
    parts = [*zip(images.split(size), labels.split(size))]
    for i, (part, ids) in enumerate(parts):
        last = i == len(parts) - 1                     # only its backward exchanges gradients
        with contextlib.nullcontext() if last or world == 1 else network.no_sync():
            weights = boundary_weights(ids, alphas=config.alphas)
            with autocast(images.device, config.precision):
                logits = network(part)
            loss = boundary_aware_focal_loss(logits, ids.long(), weights, config.gamma, valid)
            scaler.scale(world * loss).backward()
        total = total + loss.detach()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def learning_rate(step, peak, warmup, total):
    """Linear to `peak` over `warmup` steps, then a cosine that would reach LR_END at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return LR_END + (peak - LR_END) * 0.5 * (1 + math.cos(math.pi * done))


def read_sets(config):
    """(training samples, their weights, classes, validation samples)."""
    names = config.train + config.pseudo
    samples, weights, classes = gather(config.data, names, "train")
    val_samples, _, val_classes = gather(config.data, config.val, "val")
    named = {Path(sample.image).name: sample.image for sample in val_samples}
    both = [s.image for s in samples if (twin := named.get(Path(s.image).name))
            and filecmp.cmp(s.image, twin, shallow=False)]
    require((classes == val_classes, f"{names[0]} and --val {config.val[0]} differ in classes"),
            (not both, f"{len(both)} images of --train or --pseudo are in --val, first {both[:1]}"))
    for use, group in (("train", samples), ("val", val_samples)):
        for name, own in itertools.groupby(group, lambda sample: sample.dataset):
            if is_first() and not (Path(config.out) / "last.pt").exists():
                for problem in look_through([*own], classes, f"{name} {use}", config.workers):
                    raise ValueError(problem)
    return samples, weights, classes, val_samples


def train(config, rank, world, device):
    """Run the training that `config` describes, from its beginning or from its last checkpoint."""
    samples, weights, classes, val_samples = read_sets(config)
    steps_per_epoch = max(1, round(weights.sum()) // config.batch)
    total = config.steps or config.epochs * steps_per_epoch
    run = Run(config, digest(config, samples, weights, val_samples, classes), world)
    if run.step >= total:
        return say(f"{run.folder}: finished, nothing to do; another run takes another --out")

    # Order of a resume: weights before DDP copies them, optimizer state once the parameters are on
    # the device. Data starts at the step reached; device randomness is seeded by step.
    model = network = make_model(config, classes, run.state).to(device).train()
    optimizer, scaler = make_optimizer(model, config, device, run.state)
    if world > 1:
        gpu = device.type == "cuda"
        network = nn.SyncBatchNorm.convert_sync_batchnorm(model) if gpu else model
        network = DistributedDataParallel(network, [device.index] if gpu else None,
                                          gradient_as_bucket_view=True)
    if config.compile:
        network = compiled(network)
    run.begin(model, optimizer, scaler, classes, total)
    if run.untrained is None:
        run.untrained = validate(run, model, val_samples, rank, world)
        run.save("last.pt")
    counting = config.uniform_classes and rank == 0                  # for all processes
    labels = [sample._replace(image="", invalid="") for sample in samples]
    counts = count_classes(labels, len(classes), config.workers)[0] if counting else 0
    keys_of = functools.partial(epoch_keys, weights, config.batch * steps_per_epoch, config.seed,
                                counts=all_gather(counts)[0], uniform=config.uniform_classes)
    loader = make_loader(
        TrainSet(samples, len(classes), config.crop, config.zoom, config.seed, config.jitter),
        config.workers, step_keys(keys_of, steps_per_epoch, run.step, total, rank, world))
    say(f"{run.folder}: step {run.step} of {total}, {steps_per_epoch} an epoch of {len(samples)} "
        f"images of {' '.join(config.train + config.pseudo)}; {config.backbone} on {world} x "
        f"{device.type}")
    rest = config.batch // world % config.batch_per_process          # the last part of a step
    together = (rest or config.batch_per_process) * (world if device.type == "cuda" else 1)
    if together < 3:
        say(f"BatchNorm sees {together} image(s) at a time, too few for its statistics: give a "
            "larger --batch-per-process, with --checkpoint-blocks where memory is short")

    run.awaiting = True
    run.stop()
    for step, (images, ids) in enumerate(loader, run.step):
        run.awaiting = False
        torch.manual_seed(((config.seed * 1_000_003 + step) * 1_000_003 + rank) % 2 ** 63)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, group["peak"], config.warmup, total)
        torch.backends.cudnn.benchmark = True                        # pays for crops of one size
        images = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
        ids = ids.to(device, non_blocking=True)
        loss = take_step(network, optimizer, scaler, images, ids, config, world)

        run.step = done = step + 1
        epoch_end = done % (steps_per_epoch * config.val_every) == 0 or done == total
        saving, logging = epoch_end or done % config.save_every == 0, done % config.log_every == 0
        if (saving or logging) and world > 1:
            dist.all_reduce(loss)
        if saving or logging:
            run.check_finite(loss)
        if logging:
            run.report(loss.item(), done / steps_per_epoch)
        if epoch_end:
            miou = validate(run, model, val_samples, rank, world)
            if miou["all"] > run.best:
                run.best = miou["all"]
                run.save("best.pt")
        if saving:
            run.save("last.pt")
        run.awaiting = done < total
        run.stop()
    first = ", ".join(f"{name} {100 * miou:.2f}" for name, miou in run.untrained.items())
    say(f"before training: mIoU {first}\nbest.pt: mIoU {100 * run.best:.2f}\n"
        f"next: python evaluate.py --checkpoint {run.folder}/best.pt --temperature 0.67")


def validate(run, model, samples, rank, world):
    """{condition: mIoU} of the validation samples, scored at native size, printed and logged."""
    torch.backends.cudnn.benchmark = False                  # images come in many sizes
    for buffer in model.buffers() if world > 1 else ():    # after a step they differ: take rank 0's
        dist.broadcast(buffer, 0)
    results = evaluate([model.eval()], samples, rank=rank, world=world,
                       precision=run.config.precision, workers=min(run.config.workers, 4))
    model.train()
    results = {condition: group[0].compute() for condition, group in results.items()}
    require((results["all"]["pixels"], f"not one labelled pixel in --val {run.config.val}"))
    say("\n".join(["", *summary_table(results, count_conditions(samples))]))
    miou = {condition: r["miou"] for condition, r in results.items()}
    run.log(miou=miou)
    run.since = time.monotonic(), run.step                  # its time is not that of the steps
    return miou


def architecture(config, classes):
    """Arguments of swiftnet.build that a checkpoint carries."""
    names = "backbone", "levels", "width", "drop_path", "layer_scale"
    return {"num_classes": len(classes), **{name: getattr(config, name) for name in names}}


def make_model(config, classes, state):
    """The network on the CPU: continued, from --init, with ImageNet weights, or random."""
    torch.manual_seed(config.seed)
    model = build(**architecture(config, classes))
    if state:
        model.load_state_dict(state["model"])
    elif config.init:
        source, there = load_checkpoint(config.init)
        if there["classes"] != classes:
            say(f"--init {config.init} knows other classes: new head")
            source.head[2] = model.head[2]
        shapes = [[(k, v.shape) for k, v in m.state_dict().items()] for m in (source, model)]
        require((shapes[0] == shapes[1], "--init has another --backbone, --levels or --width"))
        model.load_state_dict(source.state_dict())
    elif config.pretrained != "none":
        for turn in (0, 1):                     # one process of each machine downloads, then all
            if turn == (os.environ.get("LOCAL_RANK", "0") != "0"):
                load_pretrained(model.backbone, config.pretrained)
            all_gather(None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = config.bn_momentum
    model.backbone.checkpoint_blocks = config.checkpoint_blocks
    return model


def make_optimizer(model, config, device, state):
    """Adam, ladder with head apart from backbone with laterals (lineage), and fp16's scaler."""
    new = [*model.ladder.parameters(), *model.head.parameters()]
    backbone = [*model.backbone.parameters(), *model.lateral.parameters()]
    groups = {"params": new, "peak": config.lr}, {"params": backbone, "peak": config.backbone_lr}
    fused = device.type == "cuda"                    # of this device, not of the checkpoint's
    optimizer = torch.optim.Adam(groups, betas=(0.9, config.beta2), eps=EPS, fused=fused,
                                 weight_decay=config.weight_decay)
    half = half_type(device, config.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
    if state:
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = fused
        optimizer.load_state_dict(state["optimizer"])
    if state and state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return optimizer, scaler


# --- the run folder -----------------------------------------------------------------------------

# Flags in which a continuation may differ: they change rounding, and the steps that fp16 skips.
FREE = "out compile checkpoint_blocks precision save_every log_every workers".split()
LEAST_SCALE = 2.0 ** -10       # of fp16's loss; it begins at 2^16 and halves at every overflow


class Run:
    """The folder of a run: where it stands, its checkpoints, its log, and its end by SIGTERM."""

    def __init__(self, config, data, world):
        self.config, self.data, self.stopping, self.awaiting = config, data, False, False
        self.folder, self.world = Path(config.out), world
        self.step, self.best, self.untrained, self.state = 0, -1.0, None, None
        if (self.folder / "last.pt").exists():
            state = self.state = read_tensors(self.folder / "last.pt")
            here = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
            there = {**state.get("config", {}), "files": state.get("data")}
            other = differences(there, {**here, "files": data})
            require((not other, f"{self.folder} has other settings, {other}; use another --out"))
            self.step, self.best, self.untrained = state["step"], state["best"], state["untrained"]
            if state.get("world", world) != world:
                say(f"{state['world']} processes came this far; BatchNorm's batches may differ")
        require((self.state or not (self.folder / "best.pt").exists(),
                 f"{self.folder} holds a best.pt of something else; use another --out"),
                (len({*all_gather((self.step, data))}) == 1, "processes see other --data or --out"))

    def begin(self, model, optimizer, scaler, classes, total):
        """Lock the folder, begin the log or cut it at the checkpoint, and heed SIGTERM."""
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.classes, self.total, self.state = classes, total, None         # lets go of its tensors
        self.began, self.since = time.monotonic(), (time.monotonic(), self.step)
        # Rank 0 saves and ends between two steps. Others step on until it has, for 20 s at most.
        signal.signal(signal.SIGTERM, lambda *x: self.stop(*x) if is_first() else signal.alarm(20))
        if is_first():
            self.lock, path = lock_folder(self.folder), self.folder / "log.jsonl"
            lines = path.read_text().splitlines() if self.untrained and path.exists() else []
            with whole_file(path) as temporary:                # a kill may have cut the last line
                temporary.write_text("".join(
                    line + "\n" for line in lines if '"seconds": ' in line and line.endswith("}")
                    and json.loads(line)["step"] <= self.step))
        self.log(config=dataclasses.asdict(self.config), total=total, torch=str(torch.__version__))

    def stop(self, *sigterm):
        """If SIGTERM came, save and end: at once where a batch is awaited, else after the step."""
        self.stopping |= bool(sigterm)
        if self.stopping and self.awaiting and not torch.multiprocessing.parent_process():
            self.awaiting = False
            self.check_finite()
            self.save("last.pt")
            raise SystemExit(f"{self.folder}: stopped by SIGTERM; the same command continues")

    def log(self, **record):
        """Append a line to log.jsonl on rank 0."""
        if is_first():
            record["seconds"] = time.monotonic() - self.began
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(to_json({"step": self.step, **record}) + "\n")

    def report(self, loss, epoch):
        """Print and log the loss of this step, the rate since the last report, the peak memory."""
        (then, step), self.since = self.since, (time.monotonic(), self.step)
        rate, images = (self.step - step) / (self.since[0] - then), self.config.batch
        left = timedelta(seconds=round((self.total - self.step) / rate))
        gib = torch.cuda.max_memory_allocated() / 2 ** 30 if torch.cuda.is_available() else 0
        say(f"step {self.step}/{self.total}  epoch {epoch:.2f}  loss {loss:.4f}  "
            f"{rate * images:.1f} images/s  {left} left" + f"  {gib:.1f} GiB" * bool(gib))
        self.log(epoch=epoch, loss=loss, lr=self.optimizer.param_groups[0]["lr"],
                 images_per_second=rate * images, gib=gib)

    def check_finite(self, *loss):
        """Raise ValueError, on all processes, before anything is saved that is not finite."""
        finite = all(t.isfinite().all() for t in (*loss, *self.model.state_dict().values()))
        remedy = "Continue with --precision fp32, or begin with a lower --lr and another --out"
        require((finite, f"the loss of step {self.step}, or what it made of the weights, is not "
                 f"finite; earlier checkpoints are intact. {remedy}"),
                (not self.scaler.is_enabled() or self.scaler.get_scale() >= LEAST_SCALE,
                 f"step {self.step}: gradients overflow float16 at any scale. {remedy}"))

    def save(self, name):
        """Write a checkpoint on rank 0: tensors and plain values, readable without running code."""
        if is_first():
            with whole_file(self.folder / name) as temporary, open(temporary, "wb") as file:
                torch.save({"model": self.model.state_dict(), "scaler": self.scaler.state_dict(),
                            "optimizer": self.optimizer.state_dict(), "step": self.step,
                            "best": self.best, "untrained": self.untrained, "data": self.data,
                            "classes": self.classes, "world": self.world,
                            "config": dataclasses.asdict(self.config),
                            "architecture": architecture(self.config, self.classes)}, file)


def digest(config, samples, weights, val_samples, classes):
    """A line that changes with the image paths and weights of a run and its pseudolabels."""
    lines = [*classes, *(s.image for s in samples + val_samples), *map(str, weights)]
    folders = {parse_name(name)[0] for name in config.train + config.pseudo} - {*DATASETS}
    lines += [Path(folder, "manifest.csv").read_text() for folder in sorted(folders)]
    digest = hashlib.md5("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
    return f"{len(samples)} + {len(val_samples)} images {digest}"


def read_config():
    """The Config of the command line: defaults, then the recipe, then the flags given."""
    recipes = "\n".join(f"  {name}: {changes}" for name, changes in RECIPES.items())
    given = parse_flags(Config, f"{__doc__}\n\nRecipes, by what they change:\n{recipes}")
    if not {"recipe", "data", "train", "pseudo", "val"} & {*given} and not Path("data").is_dir():
        say("no --data given and no folder data/ here: training on the generated demo streets")
        given["recipe"] = "demo"
    recipe = given.get("recipe", "driving")
    config = Config(**{"out": f"runs/{recipe}", **RECIPES[recipe], **given})
    coarsest = 32 * 2 ** (config.levels - 1)             # BatchNorm needs more than one value there
    shares = config.jitter, config.drop_path, config.uniform_classes, config.bn_momentum
    require((config.crop > coarsest, f"--crop must be above the coarsest stride, {coarsest}"),
            (0 < config.zoom[0] <= config.zoom[1], "--zoom takes LOW HIGH, both above 0"),
            (0 <= min(shares) <= max(shares) <= 1, f"shares lie in [0, 1], found {shares}"))
    return config


def main():
    config = read_config()
    if config.data == "demo" and is_first():
        draw_demo(config.data)                            # the others wait in start_processes
    rank, world, device = start_processes()

    def sets_in(names, split):
        for message in misplaced(config.data, names, split):
            raise ValueError(message)
        return tuple(name for name in names if scan(config.data, name, split)[1][0])
    config = dataclasses.replace(config, train=config.train or sets_in(ANNOTATED, "train"),
                                 val=config.val or sets_in(("acdc", "cityscapes"), "val")[:1])
    require((config.batch % world == 0, f"--batch {config.batch} is no multiple of {world}"),
            (config.train and config.val, f"--data {config.data} holds none of {ANNOTATED}, or "
             "neither acdc nor cityscapes to validate on; name --train, --val, or --recipe demo"))
    train(config, rank, world, device)


if __name__ == "__main__":
    run_main(main)
