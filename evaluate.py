"""Evaluate checkpoints: mIoU, UIoU, AUIoU and ECE per condition, at several temperatures in one pass.

    python evaluate.py --temperature 0.67
    python evaluate.py --checkpoint runs/driving/best.pt --val acdc --temperature 0.67 1.0 1.5
    torchrun --nproc_per_node=8 evaluate.py --checkpoint a.pt b.pt --scales 1 1.5 2 --flip

Several checkpoints are an ensemble: their logits are averaged. Without --checkpoint the newest run
under runs/ is taken, with the data that it was trained with.

IoU: Everingham et al., IJCV 2010, as Cityscapes uses it. UIoU and AUIoU: Sakaridis et al., ACDC, ICCV 2021
and "Map-Guided Curriculum", TPAMI 2020; ECE: Guo et al., ICML 2017.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data import IGNORE, EvalSet, Progress, classes_of, flag, gather, ignore_sigterm, parse_flags, parse_spec, run_main
from swiftnet import load_checkpoint, predict

CELLS = 1000               # midpoints of the integral mean that is AUIoU
ECE_BINS = 15
FIXED_POINT = 2 ** 24      # confidence is summed in units of 2^-24: integers add alike in any order


# --- processes ----------------------------------------------------------------------------------

def start_processes():
    """(rank, world, device) of this process; starts the process group that torchrun asks for."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_world > torch.cuda.device_count():
            raise ValueError(f"{local_world} processes for {torch.cuda.device_count()} GPUs; "
                             f"start with --nproc_per_node={torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=1),
                                device_id=device if gpu else None)
    return rank, world, device


def end_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def half_type(device, precision):
    """The torch dtype that autocast shall use for "auto", "bf16" or "fp16"; None for float32."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if real else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


# --- metrics ------------------------------------------------------------------------------------

def threshold_grid(num_classes, thresholds=None):
    """Confidence thresholds in [1/C, 1], float32, ascending.

    None: midpoints of CELLS equal cells, whose mean is the integral mean. K: K points, both ends included.
    """
    low = 1 / num_classes
    if thresholds is None:
        return (low + (1 - low) * (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS).float()
    if thresholds < 2:
        raise ValueError(f"a grid with both ends has at least 2 thresholds, found {thresholds}")
    return torch.linspace(low, 1, thresholds, dtype=torch.float64).float()


class Metrics:
    """Counts from which IoU, UIoU, AUIoU and ECE of any pooled set of pixels follow.

    All counts are int64, so they add up alike however images are split over updates and processes.
    Per pixel, y is the argmax of the logits, q = max softmax(logits / temperature), and the pixel is
    marked invalid at threshold theta where q < theta. Pixels labelled IGNORE are left out of everything.

    One histogram over q serves every threshold: cell i holds the pixels with exactly i thresholds <= q.
    """

    def __init__(self, num_classes, temperature=1.0, thresholds=None, device="cpu"):
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        self.num_classes, self.temperature = num_classes, temperature
        self.thresholds = threshold_grid(num_classes, thresholds).to(device)
        self.edges = (torch.arange(1, ECE_BINS, dtype=torch.float64) / ECE_BINS).float().to(device)
        cells = len(self.thresholds) + 1
        shapes = {"confusion": (num_classes, num_classes),    # true class, predicted class
                  "correct": (num_classes, cells),            # by class
                  "wrong": (num_classes, cells),              # by predicted class
                  "invalid": (2, num_classes, cells),         # J = 1: correct 0 / wrong 1, by true class
                  "ece": (2, 3, ECE_BINS)}                    # J; pixels, correct, sum of q; by bin of q
        self.counts = {name: torch.zeros(shape, dtype=torch.int64, device=device)
                       for name, shape in shapes.items()}

    def update(self, logits, labels, invalid=None):
        """Add pixels. logits (B, C, H, W) float, labels (B, H, W) integers 0..C-1 or IGNORE,
        invalid (B, H, W) bool or 0/1: J, the pixels that annotators could not recognise."""
        for i in range(len(logits)):          # one by one: a batch must not change how sums are rounded
            pixels = Pixels(logits[i], labels[i], None if invalid is None else invalid[i])
            self.add(pixels)

    def add(self, pixels):
        """Add the pixels of one image, which may be shared between several temperatures."""
        classes, cells = self.num_classes, len(self.thresholds) + 1
        count = self.counts
        confidence = pixels.confidence(self.temperature)                                  # (N,)
        cell = torch.bucketize(confidence, self.thresholds, right=True)
        # Row 2C of each table below collects what does not count and is dropped.
        count["confusion"] += tally(pixels.truth * classes + pixels.prediction, classes + 1, classes)[:classes]
        row = torch.where(pixels.correct, pixels.truth, classes + pixels.prediction)
        row.masked_fill_(pixels.ignored, 2 * classes)
        table = tally(row * cells + cell, 2 * classes + 1, cells)
        count["correct"] += table[:classes]
        count["wrong"] += table[classes:2 * classes]
        if pixels.invalid is not None:
            chosen = pixels.invalid.nonzero().squeeze(1)
            row = pixels.truth[chosen] + classes * ~pixels.correct[chosen]
            count["invalid"] += tally(row * cells + cell[chosen], 2 * classes, cells).view(2, classes, cells)

        bin = torch.bucketize(confidence, self.edges)                    # (lo, hi]: edges below q
        group = torch.where(pixels.ignored, 2, 0)
        if pixels.invalid is not None:
            group += pixels.invalid
        bin += ECE_BINS * group
        fixed = (confidence.double() * FIXED_POINT).round()              # exact in float64, as are its sums
        for i, weights in enumerate((None, pixels.correct.double(), fixed)):
            count["ece"][:, i] += tally(bin, 3, ECE_BINS, weights)[:2].long()

    def merge(self, other):
        """Add the counts of another Metrics with the same classes, temperature and thresholds."""
        for name, count in other.counts.items():
            self.counts[name] += count

    def reduce(self):
        """Sum the counts over all processes, in place."""
        if dist.is_initialized():
            flat = torch.cat([count.flatten() for count in self.counts.values()])
            dist.all_reduce(flat)
            for count, part in zip(self.counts.values(),
                                   flat.split([count.numel() for count in self.counts.values()])):
                count.copy_(part.view_as(count))

    def compute(self):
        """Dict of fractions in 0..1; NaN where nothing was counted.

        "iou" (C,), NaN for a class in neither ground truth nor prediction; "miou", its mean over the
        "classes" others; "uiou" (K,) at "thresholds" (K,); "auiou", its mean; "ece", and "ece_valid"
        without the pixels of J = 1; "pixels"; "class_uiou" (C, K); "confusion" (C, C).
        """
        count = {name: tensor.cpu() for name, tensor in self.counts.items()}
        confusion = count["confusion"]
        truth, predicted, hit = confusion.sum(1), confusion.sum(0), confusion.diagonal()
        present = truth + predicted > 0                 # the class set of every mean below, fixed once
        iou = hit.double() / (truth + predicted - hit)
        # Valid at threshold k: the pixels in cells above k; invalid: those in cells 0..k.
        true_positive = above(count["correct"])                                            # (C, K)
        false_positive = above(count["wrong"])
        true_invalid = count["invalid"].sum(0).cumsum(1)[:, :-1]
        union = truth[:, None] + false_positive
        class_uiou = (true_positive + true_invalid).double() / union.clamp(min=1)
        uiou = class_uiou[present].mean(0)
        return {"miou": iou[present].mean().item(), "iou": iou, "classes": int(present.sum()),
                "auiou": uiou.mean().item(), "uiou": uiou, "thresholds": self.thresholds.cpu(),
                "ece": calibration_error(count["ece"].sum(0)), "ece_valid": calibration_error(count["ece"][0]),
                "pixels": int(confusion.sum()), "class_uiou": class_uiou, "confusion": confusion}


class Pixels:
    """The flat pixels of one image, and what every temperature shares."""

    def __init__(self, logits, labels, invalid=None):
        classes = len(logits)
        logits = logits.float().flatten(1)                                                # (C, N)
        labels = labels.flatten().to(device=logits.device, dtype=torch.int64)
        self.ignored = labels == IGNORE
        self.truth = labels.masked_fill(self.ignored, classes)
        top, self.prediction = logits.max(0)
        self.correct = self.prediction == self.truth
        self.below_top = logits - top                                                     # <= 0
        self.invalid = None
        if invalid is not None:
            self.invalid = invalid.flatten().to(logits.device).bool() & ~self.ignored

    def confidence(self, temperature):
        """max softmax(logits / T) as 1 / sum exp((logits - top) / T), which is never below 1/C rounded."""
        return 1 / (self.below_top / temperature).exp().sum(0)


def tally(index, rows, columns, weights=None):
    """Histogram of flat indices as a (rows, columns) table."""
    return torch.bincount(index, weights, minlength=rows * columns).view(rows, columns)


def above(table):
    """(C, K + 1) histogram -> (C, K): entries in the cells above k, for k = 0..K-1."""
    return table.sum(1, keepdim=True) - table.cumsum(1)[:, :-1]


def calibration_error(table):
    """Expected calibration error of (3, bins): pixels, correct, summed confidence in fixed point."""
    pixels, correct, confidence = table.double()
    gap = (correct - confidence / FIXED_POINT).abs()    # n_b |accuracy - mean confidence|
    return (gap.sum() / pixels.sum()).item()


# --- evaluation ---------------------------------------------------------------------------------

def evaluate(models, samples, num_classes, device, temperatures=(1.0,), thresholds=None, precision="auto",
             workers=0, rank=0, world=1, **prediction):
    """{condition: [Metrics per temperature]} over labelled samples, "all" first, summed over processes.

    Process `rank` reads samples[rank::world], one image per forward, so no image counts twice.
    prediction: scales, flip, tile, as in swiftnet.predict. Raises ValueError for a file it cannot read.
    """
    conditions = sorted({sample.condition for sample in samples})
    results = {condition: [Metrics(num_classes, temperature, thresholds, device) for temperature in temperatures]
               for condition in conditions}
    share = samples[rank::world]
    loader = torch.utils.data.DataLoader(EvalSet(share, num_classes), batch_size=None, num_workers=workers,
                                         worker_init_fn=ignore_sigterm, pin_memory=device.type == "cuda")
    progress = Progress(len(share), "evaluated")
    dtype = half_type(device, precision)
    for index, image, *target in loader:
        if isinstance(image, str):
            raise ValueError(image)
        with autocast(device, dtype):
            logits = predict(models, image, **prediction)
        pixels = Pixels(logits, *target)
        for metrics in results[share[index].condition]:
            metrics.add(pixels)
        progress.update()
    total = [Metrics(num_classes, temperature, thresholds, device) for temperature in temperatures]
    for metrics in (m for group in results.values() for m in group):
        metrics.reduce()
    for group in results.values():
        for sum_, metrics in zip(total, group):
            sum_.merge(metrics)
    return {"all": total, **results}


def summary_table(results, counts):
    """Lines of the table condition x (images, classes, mIoU, AUIoU, ECE) for one temperature.

    results: {condition: dict of Metrics.compute}; counts: {condition: images}. Scores in percent.
    """
    lines = [f"{'condition':<12}{'images':>7}{'classes':>8}{'mIoU':>8}{'AUIoU':>8}{'ECE':>8}{'ECE, J=0':>10}"]
    for condition, r in results.items():
        lines.append(f"{condition:<12}{counts[condition]:>7}{r['classes']:>8}{100 * r['miou']:>8.2f}"
                     f"{100 * r['auiou']:>8.2f}{r['ece']:>8.4f}{r['ece_valid']:>10.4f}")
    return lines


def class_table(results, classes):
    """Lines of the table class x condition: IoU in percent, "-" where the class does not occur."""
    lines = [f"{'IoU':<15}" + "".join(f"{condition:>9}" for condition in results)]
    for i, name in enumerate(classes):
        row = [r["iou"][i].item() for r in results.values()]
        lines.append(f"{name:<15}" + "".join(f"{'-':>9}" if v != v else f"{100 * v:>9.2f}" for v in row))
    return lines


def count_conditions(samples):
    """{condition: images}, "all" first."""
    counts = {"all": len(samples)}
    for condition in sorted({sample.condition for sample in samples}):
        counts[condition] = sum(sample.condition == condition for sample in samples)
    return counts


# --- the script ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    checkpoint: tuple = flag((), "checkpoints of train.py; several are averaged (default: newest run)")
    data: str = flag("", "data root (default: the one the checkpoint was trained with)")
    val: tuple = flag((), "sets to evaluate, NAME or NAME:PART,PART (default: those of the checkpoint)")
    split: str = flag("val", "split to evaluate")
    temperature: tuple = flag((1.0,), "softmax temperatures, all in one pass over the images")
    thresholds: int = flag(0, f"confidence thresholds from 1/C to 1, both included (default: the midpoints of {CELLS} cells)")
    scales: tuple = flag((1.0,), "test-time scales, logits averaged")
    flip: bool = flag(False, "average with the mirrored image")
    tile: int = flag(0, "side of tiles in pixels, a multiple of 512, for images that do not fit (default: whole images)")
    precision: str = flag("auto", "auto is half precision on a GPU, float32 on a CPU", choices=("auto", "bf16", "fp16", "fp32"))
    workers: int = flag(2, "loader processes per process")


def newest_checkpoint(runs="runs"):
    """best.pt of the run that wrote one last."""
    found = sorted(Path(runs).glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no checkpoint: nothing matches {runs}/*/best.pt. Train first "
                                "(torchrun --nproc_per_node=2 train.py) or name one with --checkpoint")
    return str(found[-1])


def load_ensemble(paths, device):
    """([models], state of the first checkpoint); all must share their classes."""
    models, states = zip(*(load_checkpoint(path, device) for path in paths))
    for path, state in zip(paths, states):
        if state["classes"] != states[0]["classes"]:
            raise ValueError(f"{path} has {len(state['classes'])} classes, {paths[0]} "
                             f"{len(states[0]['classes'])}, or other ones; an ensemble needs the same")
    return list(models), states[0]


def main():
    config = Config(**parse_flags(Config, __doc__))
    if min(config.temperature) <= 0 or min(config.scales) <= 0:
        raise ValueError("--temperature and --scales must be above 0")
    paths = config.checkpoint or (newest_checkpoint(),)
    rank, world, device = start_processes()
    models, state = load_ensemble(paths, device)
    root = config.data or state["config"]["data"]
    specs = config.val or tuple(state["config"]["val"])
    samples = gather(root, specs, config.split, labelled=True)
    counts = count_conditions(samples)
    classes = state["classes"]
    if classes_of(root, parse_spec(specs[0])[0]) != tuple(classes):
        raise ValueError(f"{paths[0]} knows {len(classes)} classes ({classes[0]}, ...), which are not those of "
                         f"{specs[0]}; name a matching set with --val or another --checkpoint")
    if rank == 0:
        print(f"{', '.join(paths)}: step {state['step']}; {counts['all']} images of {' '.join(specs)} "
              f"({config.split}) below {root}", flush=True)
    results = evaluate(models, samples, len(classes), device, config.temperature, config.thresholds or None,
                       config.precision, config.workers, rank, world, scales=config.scales,
                       flip=config.flip, tile=config.tile or None)
    if rank == 0:
        print_results(results, config, counts, classes)
    end_processes()


def print_results(results, config, counts, classes):
    computed = {condition: [metrics.compute() for metrics in group] for condition, group in results.items()}
    grid = (f"{config.thresholds} thresholds from 1/{len(classes)} to 1" if config.thresholds else
            f"integral mean over [1/{len(classes)}, 1], {CELLS} cells")
    print("\n".join(["", *class_table({c: r[0] for c, r in computed.items()}, classes)]))
    for i, temperature in enumerate(config.temperature):
        print(f"\nT = {temperature:g}; mIoU and AUIoU in percent; AUIoU: {grid}; ECE: {ECE_BINS} bins")
        print("\n".join(summary_table({c: r[i] for c, r in computed.items()}, counts)))
    if len(config.temperature) > 1:
        print(f"\n{'T':>6}{'ECE':>9}{'AUIoU':>8}")
        for temperature, r in zip(config.temperature, computed["all"]):
            print(f"{temperature:>6g}{r['ece']:>9.4f}{100 * r['auiou']:>8.2f}")


if __name__ == "__main__":
    run_main(main)
