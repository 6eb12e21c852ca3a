"""Evaluate checkpoints: mIoU, UIoU, AUIoU and ECE per condition, pictures, submissions, scoring.

    python evaluate.py --temperature 0.67
    python evaluate.py --checkpoint runs/driving/best.pt --val acdc \\
        --temperature 0.67 1.0 1.5 fit best
    torchrun --nproc_per_node=8 evaluate.py --checkpoint a.pt b.pt --scales 1 1.5 2 --flip
    python evaluate.py --temperature 0.67 1.0 1.5 --plots plots --panels 3 --out panels \\
        --json numbers.json
    python evaluate.py --images photos --out predicted   any images: overlays, train ids, confidence
    python evaluate.py --submit acdc acdc.zip            predicts the test split and checks the zip
    python evaluate.py --score predicted --val acdc      scores PNGs, whichever system wrote them
    python evaluate.py --ladder runs/ladder-demo-2       the table of .ladder's runs
    python evaluate.py --benchmark                       what the metrics cost beside the network

Several checkpoints are an ensemble: their logits are averaged. Without --checkpoint the newest run
under runs/ is taken, with the data it was trained with. Every image goes through the network once.

IoU: Everingham et al., IJCV 2010, as Cityscapes uses it. UIoU and AUIoU: Sakaridis et al., ACDC,
ICCV 2021 and "Map-Guided Curriculum", TPAMI 2020; ECE and temperature scaling: Guo et al.,
ICML 2017.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import socket
import statistics
import sys
import threading
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from data import (CITYSCAPES_TABLE, CLASSES, IGNORE, IMAGE_MODES, EvalSet, Progress, Sample,
                  classes_of, colour, flag, gather, ignore_sigterm, is_first, opened, palette_of,
                  parse_flags, parse_spec, read_image, read_sample, run_main, say, whole_file)
from swiftnet import build, load_checkpoint, predict

CELLS = 1000               # midpoints of the integral mean that is AUIoU
ECE_BINS = 15
FIXED_POINT = 2 ** 24      # confidence is summed in units of 2^-24: integers add alike in any order
SWEEP = tuple(round(4 ** (i / 16 - 1), 4) for i in range(33))     # temperatures of "best": 1/4 to 4
FIT_PER_IMAGE, FIT_PIXELS = 4096, 2 ** 20    # labelled pixels that "fit" takes: of an image, in all


# --- processes ----------------------------------------------------------------------------------

def end_with_launcher():
    """Under torchrun: end this process within a second of torchrun's end, whatever it does then.

    torchrun, killed alone, leaves its processes behind, to write beside those of the next start.
    A thread watches, since the main one may wait in a collective for ever. Files appear whole, so
    ending anywhere is safe.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps the store. If nobody answers there, it ended while torch was imported.
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(address, 60).close()
        except OSError as error:
            raise ValueError(f"torchrun is gone ({error}); start the same command again") from None

    def watch():
        while os.getppid() == launcher:
            time.sleep(0.5)
        with contextlib.suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: torchrun is gone; this process stops too. The same "
                  "command continues the run", file=sys.stderr, flush=True)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def glibc(function, *arguments):
    """Call mallopt or malloc_trim, where this process has the C library that knows them."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(*arguments)


def start_processes():
    """(rank, world, device) of this process; starts the process group that torchrun asks for."""
    end_with_launcher()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local, local_world = (int(os.environ.get("LOCAL_RANK", 0)),
                          int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_world > torch.cuda.device_count():
            raise ValueError(f"{local_world} processes for {torch.cuda.device_count()} GPUs; "
                             f"start with --nproc_per_node={torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        # glibc's default gives large blocks back to the kernel, which clears every page anew for
        # the next tensor: up to half the time of a forward (README, "Speed").
        glibc("mallopt", -4, 0)                 # M_MMAP_MAX: every block comes from the heap,
        glibc("mallopt", -1, -1)                # M_TRIM_THRESHOLD: which does not shrink
    if world > 1:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=1),
                                device_id=device if gpu else None)
    return rank, world, device


def end_processes():
    """Leave the process group, where there is one."""
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


def dtype_name(dtype):
    """"float32" for None, "bfloat16", "float16"."""
    return str(dtype or torch.float32).removeprefix("torch.")


def autocast(device, dtype):
    """torch.autocast to `dtype`; a context that does nothing for None."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def gathered(item):
    """[item of every process], in the order of their ranks; also a meeting point."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


# --- metrics ------------------------------------------------------------------------------------

def threshold_grid(num_classes, thresholds=None):
    """Confidence thresholds in [1/C, 1], float32, ascending.

    None: midpoints of CELLS equal cells, whose mean is the integral mean.
    K: K points, both ends included.
    """
    low = 1 / num_classes
    if not thresholds:
        return (low + (1 - low) * (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS).float()
    if thresholds < 2:
        raise ValueError(f"a grid with both ends has at least 2 thresholds, found {thresholds}")
    return torch.linspace(low, 1, thresholds, dtype=torch.float64).float()


class Pixels:
    """The flat pixels of one predicted image, and what every temperature shares.

    prediction, labels: (H, W) or (N,) integers 0..C-1, labels also IGNORE; invalid: J, bool or 0/1,
    or None.
    confidence: function of the temperature that gives (N,) float32, the confidence of the
    prediction.
    """

    def __init__(self, prediction, labels, invalid, classes, confidence):
        self.confidence = confidence
        self.prediction = prediction.flatten()
        labels = labels.flatten().to(device=prediction.device, dtype=torch.int64)
        self.ignored = labels == IGNORE
        self.truth = labels.masked_fill(self.ignored, classes)
        correct = self.prediction == self.truth
        # (true class, predicted class); the row of the ignored pixels is dropped.
        self.confusion = tally(self.truth * classes + self.prediction, classes + 1,
                               classes)[:classes]
        # Row in the histograms: the true class where correct, C + the predicted one where wrong,
        # 2C ignored.
        self.row = torch.where(correct, self.truth, classes + self.prediction)
        self.row.masked_fill_(self.ignored, 2 * classes)
        self.invalid_at = None                      # indices of J = 1, and their rows by true class
        if invalid is not None:
            invalid = invalid.flatten().to(prediction.device).bool() & ~self.ignored
            self.invalid_at = invalid.nonzero().squeeze(1)
            self.invalid_row = (self.truth + classes * ~correct)[self.invalid_at]

    @classmethod
    def of(cls, logits, labels, invalid=None):
        """Pixels of logits (C, H, W); their confidence is max softmax(logits / T)."""
        prediction, below_top = split_logits(logits)
        pixels = cls(prediction, labels, invalid, len(logits), lambda t: confidence(below_top, t))
        pixels.below_top = below_top
        return pixels


def split_logits(logits):
    """Logits (C, H, W) -> their argmax (N,), and how far each lies below the top one (C, N)
    float32, <= 0."""
    logits = logits.float().flatten(1)
    top, prediction = logits.max(0)
    return prediction, logits - top


def confident_ids(logits, temperature):
    """Train ids (H, W) and confidence (H, W) float32 of logits (C, H, W)."""
    ids, below_top = split_logits(logits)
    return ids.view(logits.shape[1:]), confidence(below_top, temperature).view(logits.shape[1:])


def confidence(below_top, temperature):
    """max softmax(logits / T) as 1 / sum exp((logits - top) / T), (N,), never below 1/C rounded."""
    # In pieces that stay in the cache of a CPU: three times as fast there.
    pieces = below_top.split(4096, 1) if below_top.device.type == "cpu" else (below_top,)
    return torch.cat([1 / (piece / temperature).exp_().sum(0) for piece in pieces])


class Metrics:
    """Counts from which IoU, UIoU, AUIoU and ECE of any pooled set of pixels follow.

    All counts are int64, so they add up alike however images are split over updates and processes.
    Per pixel, y is the argmax of the logits, q = max softmax(logits / temperature), and the pixel
    is marked invalid at threshold theta where q < theta. Pixels labelled IGNORE are left out of
    everything.

    One histogram over q serves every threshold and every bin of the ECE. Its edges are both
    together; cell i holds the pixels with exactly i edges <= q, so a pixel is valid at theta in the
    cells above the number of edges below theta.
    """

    def __init__(self, num_classes, temperature=1.0, thresholds=None, device="cpu"):
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        self.num_classes, self.temperature = num_classes, temperature
        self.thresholds = threshold_grid(num_classes, thresholds)
        bins = (torch.arange(1, ECE_BINS, dtype=torch.float64) / ECE_BINS).float()
        bins = torch.nextafter(bins, torch.tensor(2.0))      # (lo, hi]: the float above lo is in it
        edges = torch.cat([self.thresholds, bins]).sort().values
        # (K,) valid at k: the cells above at[k]
        self.at = torch.searchsorted(edges, self.thresholds)
        cells = len(edges) + 1
        bin = torch.searchsorted(torch.searchsorted(edges, bins), torch.arange(cells))
        self.edges, self.bin = edges.to(device), bin.to(device)    # bin: (cells,) ECE bin of a cell
        shapes = {
            "confusion": (num_classes, num_classes),  # true class, predicted class
            "correct": (num_classes, cells),          # by class
            "wrong": (num_classes, cells),            # by predicted class
            "invalid": (2, num_classes, cells),       # J = 1: correct 0 / wrong 1, by true class
            "confidence": (2, ECE_BINS)}              # sum of q by bin: all, J = 1
        self.counts = {name: torch.zeros(shape, dtype=torch.int64, device=device)
                       for name, shape in shapes.items()}

    def update(self, logits, labels, invalid=None):
        """Add pixels. logits (B, C, H, W) float, labels (B, H, W) integers 0..C-1 or IGNORE,
        invalid (B, H, W) bool or 0/1: J, the pixels that annotators could not recognise."""
        for i in range(len(logits)):      # one by one: a batch must not change how sums are rounded
            self.add(Pixels.of(logits[i], labels[i], None if invalid is None else invalid[i]))

    def add(self, pixels):
        """Add the pixels of one image, which may be shared between several temperatures."""
        classes, cells, count = self.num_classes, len(self.edges) + 1, self.counts
        confidence = pixels.confidence(self.temperature)                                  # (N,)
        cell = torch.bucketize(confidence, self.edges, right=True)
        count["confusion"] += pixels.confusion
        table = tally(pixels.row * cells + cell, 2 * classes + 1, cells)
        count["correct"] += table[:classes]
        count["wrong"] += table[classes:2 * classes]
        bin = self.bin[cell] + ECE_BINS * pixels.ignored         # a second row, dropped
        fixed = (confidence.double() * FIXED_POINT).round()      # exact in float64, as are its sums
        count["confidence"][0] += tally(bin, 2, ECE_BINS, fixed)[0].long()
        if pixels.invalid_at is not None:
            at = pixels.invalid_at
            table = tally(pixels.invalid_row * cells + cell[at], 2 * classes, cells)
            count["invalid"] += table.view(2, classes, cells)
            count["confidence"][1] += tally(bin[at], 1, ECE_BINS, fixed[at])[0].long()

    def merge(self, other):
        """Add the counts of another Metrics with the same classes, temperature and thresholds."""
        for name, count in other.counts.items():
            self.counts[name] += count

    def reduce(self):
        """Sum the counts over all processes, in place."""
        if dist.is_initialized():
            for count in self.counts.values():
                dist.all_reduce(count)

    def valid(self, table):
        """(..., cells) histogram -> (..., K): entries that are valid at each threshold."""
        return (table.sum(-1, keepdim=True) - table.cumsum(-1))[..., self.at]

    def compute(self):
        """Dict of fractions in 0..1; NaN where nothing was counted.

        "iou" (C,), NaN for a class in neither ground truth nor prediction; "miou", its mean over
        the "classes" others; "uiou" (K,) at "thresholds" (K,); "auiou", its mean; "ece", and
        "ece_valid" without the pixels of J = 1; "pixels"; "class_uiou" (C, K); "confusion" (C, C);
        "reliability" (3, 15): pixels, accuracy and mean confidence by bin of confidence.
        """
        count = {name: tensor.cpu() for name, tensor in self.counts.items()}
        confusion = count["confusion"]
        truth, predicted, hit = confusion.sum(1), confusion.sum(0), confusion.diagonal()
        present = truth + predicted > 0              # the class set of every mean below, fixed once
        iou = hit.double() / (truth + predicted - hit)
        true_positive = self.valid(count["correct"])                                      # (C, K)
        false_positive = self.valid(count["wrong"])
        marked = count["invalid"].sum(0)
        true_invalid = marked.sum(1, keepdim=True) - self.valid(marked)
        union = truth[:, None] + false_positive
        class_uiou = (true_positive + true_invalid).double() / union.clamp(min=1)
        uiou = class_uiou[present].mean(0)

        hits = self.by_bin(count["correct"].sum(0))
        pixels = hits + self.by_bin(count["wrong"].sum(0))
        error, reliability = calibration(pixels, hits, count["confidence"][0])
        valid_hits = hits - self.by_bin(count["invalid"][0].sum(0))
        valid_error, _ = calibration(pixels - self.by_bin(marked.sum(0)), valid_hits,
                                     count["confidence"][0] - count["confidence"][1])
        return {"miou": iou[present].mean().item(), "iou": iou, "classes": int(present.sum()),
                "auiou": uiou.mean().item(), "uiou": uiou, "thresholds": self.thresholds,
                "ece": error, "ece_valid": valid_error, "pixels": int(confusion.sum()),
                "class_uiou": class_uiou, "confusion": confusion, "reliability": reliability}

    def by_bin(self, histogram):
        """(cells,) -> (15,): entries in each bin of the ECE."""
        return torch.zeros(ECE_BINS, dtype=torch.int64).index_add_(0, self.bin.cpu(), histogram)


def tally(index, rows, columns, weights=None):
    """Histogram of flat indices as a (rows, columns) table."""
    return torch.bincount(index, weights, minlength=rows * columns).view(rows, columns)


def calibration(pixels, correct, confidence):
    """Expected calibration error of (15,) counts, confidence in fixed point; and (3, 15): pixels,
    accuracy, mean confidence."""
    pixels, correct, confidence = (pixels.double(), correct.double(),
                                   confidence.double() / FIXED_POINT)
    gap = (correct - confidence).abs()                  # n_b |accuracy - mean confidence|
    error = (gap.sum() / pixels.sum()).item()
    return error, torch.stack([pixels, correct / pixels, confidence / pixels])


def budget(metrics):
    """Where AUIoU is lost: fractions, each as a mean over classes and, after "class_", as (C,).

    "oracle": UIoU of a confidence that marks exactly the pixels that are wrong or J = 1; without
    false positives, it is (n - wrong pixels of J = 0) / n with n = #{H = c}.
    "missed_invalid": lost since wrong pixels are left valid: UIoU with those of J = 1 as true
    invalids and none as false positive, minus UIoU. "false_invalid": lost since correct pixels of
    J = 0 are marked: their number / n. Both are integrated over theta like "auiou", and for every
    class oracle = auiou + false_invalid + missed_invalid. A class that is predicted only has 0
    everywhere.
    """
    count, result = ({name: tensor.cpu() for name, tensor in metrics.counts.items()},
                     metrics.compute())
    n = count["confusion"].sum(1).clamp(min=1)[:, None].double()                    # (C, 1)
    marked = count["invalid"].sum((0, 2))[:, None]                                  # J = 1
    kept = count["correct"] - count["invalid"][0]                                   # correct, J = 0
    oracle = (marked + kept.sum(1, keepdim=True)) / n
    none_missed = (marked + metrics.valid(kept)) / n                                # (C, K)
    terms = {"oracle": oracle[:, 0], "auiou": result["class_uiou"].mean(1),
             "false_invalid": (oracle - none_missed).mean(1),
             "missed_invalid": (none_missed - result["class_uiou"]).mean(1)}
    present = ~result["iou"].isnan()
    return {**{name: term[present].mean().item() for name, term in terms.items()},
            **{f"class_{name}": term.where(present, math.nan) for name, term in terms.items()}}


# --- evaluation ---------------------------------------------------------------------------------

def predictions(models, samples, num_classes, device, precision="auto", workers=0, rank=0, world=1,
                what="evaluated", skip=None, **prediction):
    """Yield (index, logits, ids, invalid) of samples[rank::world], one image a forward, each once.

    prediction: scales, flip, tile, as in swiftnet.predict. A file that cannot be read is passed
    over after skip(message), or ends in ValueError where skip is None.
    """
    share = samples[rank::world]
    loader = torch.utils.data.DataLoader(EvalSet(share, num_classes), batch_size=None,
                                         num_workers=workers, worker_init_fn=ignore_sigterm,
                                         pin_memory=device.type == "cuda")
    progress = Progress(len(share), what)
    dtype, shape = half_type(device, precision), None
    for i, image, *target in loader:
        if isinstance(image, str):
            if skip is None:
                raise ValueError(image)
            skip(image)
            progress.update()
            continue
        if device.type == "cpu" and image.shape != shape:
            shape = image.shape
            glibc("malloc_trim", 0)             # the pieces that images of another size left
        with autocast(device, dtype):
            logits = predict(models, image, **prediction)
        if not logits.sum().isfinite():
            raise ValueError(f"the logits of {share[i].image} are not finite; a broken checkpoint, "
                             "or a number beyond half precision (try --precision fp32)")
        yield rank + world * i, logits, *target
        progress.update()


def evaluate(models, samples, num_classes, device, temperatures=(1.0,), thresholds=None,
             precision="auto", workers=0, rank=0, world=1, watch=None, **prediction):
    """{condition: [Metrics per temperature]} over labelled samples, "all" first,
    summed over processes.

    Process `rank` reads samples[rank::world]. watch: as in pool.
    prediction: as in swiftnet.predict.
    """
    stream = predictions(models, samples, num_classes, device, precision, workers, rank, world,
                         **prediction)
    pixels = ((index, Pixels.of(*parts)) for index, *parts in stream)
    return pool(pixels, samples, num_classes, device, temperatures, thresholds, watch)


def pool(stream, samples, num_classes, device, temperatures=(1.0,), thresholds=None, watch=None):
    """{condition: [Metrics per temperature]} of a stream of (index of the sample, Pixels),
    "all" first.

    watch(index, pixels) is called for every image: the panels look on.
    """
    conditions = sorted({sample.condition for sample in samples})
    results = {condition: [Metrics(num_classes, temperature, thresholds, device)
                           for temperature in temperatures] for condition in conditions}
    for index, pixels in stream:
        for metrics in results[samples[index].condition]:
            metrics.add(pixels)
        if watch:
            watch(index, pixels)
    total = [Metrics(num_classes, temperature, thresholds, device) for temperature in temperatures]
    for group in results.values():
        for sum_, metrics in zip(total, group):
            metrics.reduce()
            sum_.merge(metrics)
    results.pop("all", None)               # of sets without conditions: in the total, with the rest
    return {"all": total, **results}


def stored_predictions(samples, folder, num_classes, label_ids, device, rank=0, world=1):
    """(index, Pixels) of samples[rank::world] from PNGs below `folder`,
    named like the input images.

    Train ids lie in labelTrainIds/, Cityscapes labelIds in labelIds/, or either (label_ids) in the
    folder itself. confidence/ beside them holds 0..65535 for 0..1; without it confidence is 1. The
    temperature is the one they were written with. Raises ValueError where one is missing or does
    not fit.
    """
    folder = Path(folder)
    labels = next((folder / name for name in ("labelTrainIds", "labelIds")
                   if (folder / name).is_dir()),
                  folder)
    values = np.arange(num_classes)
    if label_ids or labels.name == "labelIds":
        if num_classes != len(CLASSES):
            raise ValueError(f"Cityscapes labelIds are of 19 classes, --val has {num_classes}; "
                             "score train ids")
        values = label_id_table()
    table = np.full(256, -1)                                         # value in the file -> train id
    table[values] = np.arange(len(values))
    stems = [Path(sample.image).stem for sample in samples]
    paths = find_pngs(labels, stems)
    confidence_paths = (find_pngs(folder / "confidence", stems)
                        if (folder / "confidence").is_dir() else {})
    progress = Progress(len(samples[rank::world]), "scored")
    for index in range(rank, len(samples), world):
        _, ids, invalid = read_sample(samples[index], num_classes)
        path, q = paths[stems[index]], np.ones(ids.shape)
        prediction = table[read_png(path, ids.shape, ("L", "P"))]
        unknown = np.count_nonzero((prediction < 0) & (ids != IGNORE))
        if unknown:
            raise ValueError(f"{path}: values that name no class on {unknown} labelled pixels; "
                             f"expected train ids 0..{num_classes - 1}, or Cityscapes labelIds and "
                             "the flag --label-ids")
        if confidence_paths:
            q = read_png(confidence_paths[stems[index]], ids.shape, ("I;16", "I")) / 65535
        prediction, ids, invalid, q = (
            None if part is None else torch.tensor(part, device=device)
            for part in (prediction.clip(0), ids, invalid, q.astype(np.float32).ravel()))
        yield index, Pixels(prediction, ids, invalid, num_classes, lambda temperature, q=q: q)
        progress.update()


def find_pngs(folder, stems):
    """{stem: path} of the PNGs below a folder that bear these names; each must be there once. A
    folder confidence/ in it is passed over."""
    wanted = set(stems)
    paths = [path for path in sorted(folder.rglob("*.png"))
             if path.stem in wanted and folder / "confidence" not in path.parents]
    found = {path.stem: path for path in paths}
    missing = [stem for stem in stems if stem not in found]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(stems)} predictions, first "
                         f"{missing[0]}.png; expected PNGs named like the input images")
    double = repeated(stems) or repeated(path.stem for path in paths)
    if double:
        raise ValueError(f"{folder}: {double}.png stands for two images or files; score a set "
                         "where names are unique")
    return found


def repeated(names):
    """The first name that occurs twice, or None."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def read_png(path, shape, modes):
    """Values (H, W) of a PNG of one of these Pillow modes, which must have this shape."""
    with opened(path, modes) as image:
        if image.size != (shape[1], shape[0]):
            raise ValueError(f"it is {image.size[0]}x{image.size[1]}, "
                             f"expected {shape[1]}x{shape[0]}")
        return np.array(image)


# --- choosing a temperature ---------------------------------------------------------------------

def split_halves(samples):
    """(choosing, reporting): of each condition every second image goes to the choosing half."""
    seen, halves = {}, ([], [])
    for sample in samples:
        seen[sample.condition] = seen.get(sample.condition, 0) + 1
        halves[seen[sample.condition] % 2].append(sample)
    if not halves[0]:
        raise ValueError("--temperature fit and best need two images of a condition: one to choose "
                         "on, one to report; name a larger set with --val")
    return halves


UNLABELLED = "--temperature fit and best found no labelled pixel in their half of the images"


def choose_temperatures(words, stream, images, num_classes, device, thresholds=None):
    """({"fit" | "best": T}, [(T, AUIoU) of the sweep]) from predictions() on `images` images.

    "fit": least negative log-likelihood (Guo et al.) on a fixed subset of the labelled pixels.
    "best": highest AUIoU among SWEEP. Both are the same for any number of processes.
    """
    sweep = [Metrics(num_classes, t, thresholds, device) for t in SWEEP if "best" in words]
    kept, limit = [], max(1, min(FIT_PER_IMAGE, FIT_PIXELS // images))
    for index, *parts in stream:
        pixels = Pixels.of(*parts)
        for metrics in sweep:
            metrics.add(pixels)
        if "fit" in words:
            at = (~pixels.ignored).nonzero().squeeze(1)
            at = at[::max(1, -(-len(at) // limit))]
            kept.append((index, pixels.below_top[:, at].cpu(), pixels.truth[at].cpu()))
    chosen, curve = {}, []
    if "fit" in words:
        kept = sorted((part for share in gathered(kept) for part in share),
                      key=lambda part: part[0])
        logits, truth = (torch.cat([part[1] for part in kept], 1),
                         torch.cat([part[2] for part in kept]))
        chosen["fit"] = gathered(fit_temperature(logits, truth))[0]       # rank 0 speaks for all
    if "best" in words:
        for metrics in sweep:
            metrics.reduce()
        if not sweep[0].counts["confusion"].any():
            raise ValueError(UNLABELLED)
        curve = [(metrics.temperature, metrics.compute()["auiou"]) for metrics in sweep]
        chosen["best"] = max(curve, key=lambda point: (point[1], -point[0]))[0]
    return chosen, curve


def fit_temperature(logits, truth):
    """T of least negative log-likelihood of logits / T, (C, N) and (N,), within [0.05, 20],
    to 4 digits."""
    if not len(truth):
        raise ValueError(UNLABELLED)
    logits = logits.double()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, tolerance_grad=1e-9,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        bounded = log_t.clamp(math.log(0.05), math.log(20))    # no minimum where all is right
        scaled = logits / bounded.exp()
        loss = (scaled.logsumexp(0) - scaled.gather(0, truth[None])[0]).mean()
        loss = loss + (log_t - bounded) ** 2                   # leads a long step back
        loss.backward()
        return loss
    optimizer.step(closure)
    return round(min(max(math.exp(log_t.item()), 0.05), 20.0), 4)


# --- tables -------------------------------------------------------------------------------------

def percent(value, width=8):
    """A fraction in percent, "-" for NaN."""
    return f"{'-':>{width}}" if math.isnan(value) else f"{100 * value:>{width}.2f}"


def error_cell(value, width):
    """A calibration error, "-" for NaN."""
    return f"{'-':>{width}}" if math.isnan(value) else f"{value:>{width}.4f}"


def summary_table(results, counts, title="condition"):
    """Lines of the table condition x (images, classes, mIoU, AUIoU, ECE, and the budget)
    for one temperature.

    results: {condition: dict of Metrics.compute, with or without that of budget};
    counts: {condition: images}. Scores in percent; the last two columns, what false and missed
    invalids cost, sum to AUIoU - oracle.
    """
    lines = [f"{title:<13}{'images':>7}{'classes':>8}{'mIoU':>8}{'AUIoU':>8}{'ECE':>8}"
             f"{'ECE, J=0':>10}"]
    for condition, r in results.items():
        lines.append(f"{condition:<13}{counts[condition]:>7}{r['classes']:>8}{percent(r['miou'])}"
                     f"{percent(r['auiou'])}{error_cell(r['ece'], 8)}"
                     f"{error_cell(r['ece_valid'], 10)}")
        if "oracle" in r:
            lines[-1] += (percent(r["oracle"]) + percent(-r["false_invalid"], 12)
                          + percent(-r["missed_invalid"], 12))
    if "oracle" in r:
        lines[0] += f"{'oracle':>8}{'false inv.':>12}{'missed inv.':>12}"
    return lines


def iou_cell(r, i):
    """IoU of class i in percent."""
    return percent(r["iou"][i].item(), 9)


def budget_cell(r, i):
    """AUIoU of class i lost to "false / missed" invalids."""
    false, missed = r["class_false_invalid"][i].item(), r["class_missed_invalid"][i].item()
    return percent(false) + " /" + percent(missed, 6)


def class_table(results, classes, title="IoU", cell=iou_cell):
    """Lines of the table class x condition, in percent, "-" where the class does not occur."""
    width = max(15, 1 + max(map(len, classes)))
    lines = [f"{title:<{width}}" + "".join(f"{condition:>{len(cell(r, 0))}}"
                                           for condition, r in results.items())]
    return lines + [f"{name:<{width}}" + "".join(cell(r, i) for r in results.values())
                    for i, name in enumerate(classes)]


def count_conditions(samples):
    """{condition: images}, "all" first."""
    return {"all": len(samples), **dict(sorted(Counter(
        sample.condition for sample in samples if sample.condition != "all").items()))}


def print_results(results, temperatures, counts, classes, thresholds):
    """All tables. results: {condition: [dict per temperature]};
    temperatures: [(T, how it was found)]."""
    grid = (f"{thresholds} thresholds from 1/{len(classes)} to 1" if thresholds else
            f"integral mean over [1/{len(classes)}, 1], {CELLS} cells")
    first = {condition: rows[0] for condition, rows in results.items()}
    print("\n".join(["", *class_table(first, classes)]))
    for i, (temperature, how) in enumerate(temperatures):
        shown = "confidence as stored" if how == "stored" else f"T = {temperature:g} ({how})"
        print(f"\n{shown}; IoU in percent; AUIoU: {grid}; ECE: {ECE_BINS} bins")
        print("\n".join(summary_table({condition: rows[i] for condition, rows in results.items()},
                                      counts)))
    if math.isnan(first["all"]["auiou"]):
        return
    print(f"\nAUIoU lost to false / missed invalids at T = {temperatures[0][0]:g} (others: --json)")
    print("\n".join(class_table(first, classes, "lost", budget_cell)))
    if len(temperatures) > 1:
        print("\nall images; marking nothing invalid gives the mIoU, marking what is wrong or "
              "invalid the oracle")
        rows = {f"{t:.9g}" + (how != "given") * f" {how}": r
                for (t, how), r in zip(temperatures, results["all"])}
        print("\n".join(summary_table(rows, dict.fromkeys(rows, counts["all"]), "T")))


def plain(value):
    """What json can write: tensors become lists, NaN null.
    UIoU by class and threshold is left out."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()
                if key not in ("class_uiou", "thresholds")}
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_json(path, results, temperatures, counts, about):
    """Every number in one file; nothing in it depends on the time or the number of processes."""
    grid = results["all"][0]["thresholds"]
    content = {**about, "ece_bins": ECE_BINS, "grid": plain(grid), "temperatures": [
        {"temperature": temperature, "how": how, "conditions": {
            condition: {"images": counts[condition], **plain(rows[i])}
            for condition, rows in results.items()}}
        for i, (temperature, how) in enumerate(temperatures)]}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


# --- pictures -----------------------------------------------------------------------------------

INK, GREY, FAINT = (45, 45, 45), (130, 130, 130), (222, 222, 222)
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0),
           (86, 180, 233))                     # Okabe and Ito: told apart by the colour-blind too


def write(draw, at, text, size=40, anchor="lm"):
    """Draw dark text; anchor as Pillow has it, "lm" being left, middle."""
    draw.text(at, text, INK, ImageFont.load_default(size=size), anchor=anchor)


def dashed(draw, start, end, fill, on=18, off=12):
    """A dashed straight line."""
    length = math.dist(start, end)
    for at in np.arange(0, length, on + off):
        ends = at / length, min(at + on, length) / length
        draw.line([tuple(p + t * (q - p) for p, q in zip(start, end)) for t in ends], fill, 6)


def axes(canvas, box, x_range, y_range, x_ticks, y_ticks, x_label, y_label):
    """Draw a frame into pixel box (left, top, right, bottom),
    with a grid at the ticks {value: text}.

    Returns the function (x, y) -> pixel.
    """
    draw, (left, top, right, bottom) = ImageDraw.Draw(canvas), box

    def place(x, y):
        return (left + (x - x_range[0]) / (x_range[1] - x_range[0]) * (right - left),
                bottom - (y - y_range[0]) / (y_range[1] - y_range[0]) * (bottom - top))
    for value, text in x_ticks.items():
        x = place(value, 0)[0]
        draw.line((x, top, x, bottom), FAINT, 2)
        write(draw, (x, bottom + 14), text, anchor="mt")
    for value, text in y_ticks.items():
        y = place(0, value)[1]
        draw.line((left, y, right, y), FAINT, 2)
        write(draw, (left - 16, y), text, anchor="rm")
    draw.rectangle(box, outline=INK, width=3)
    write(draw, ((left + right) / 2, bottom + 68), x_label, 44, "mt")
    turned = Image.new("RGB", (bottom - top, 60), "white")
    write(ImageDraw.Draw(turned), ((bottom - top) / 2, 30), y_label, 44, "mm")
    canvas.paste(turned.rotate(90, expand=True), (left - 170, top))
    return place


def plot(title, rows, temperatures):
    """Pillow image for one condition: UIoU against theta;
    accuracy and share of pixels by bin of confidence.

    rows: dict of Metrics.compute and budget per temperature. Drawn at twice the size and reduced.
    """
    legend = 1320 + 70 * max(2, len(rows))
    canvas = Image.new("RGB", (3200, legend + 40), "white")
    draw = ImageDraw.Draw(canvas)
    write(draw, (80, 80), title, 64)
    theta, miou, oracle = rows[0]["thresholds"].tolist(), rows[0]["miou"], rows[0]["oracle"]
    low = math.floor(10 * min(0.99, miou, *(row["uiou"].min().item() for row in rows))) / 10
    high = min(1, math.ceil(10 * oracle + 0.2) / 10)
    percents = {i / 10: f"{10 * i}" for i in range(11)}
    fifths = {i / 5: f"{i / 5:g}" for i in range(6)}
    curve = axes(canvas, (220, 160, 1640, 1160), (theta[0], 1), (low, high),
                 {t: f"{t:g}" for t in percents if t >= theta[0]},
                 {t: text for t, text in percents.items() if low <= t <= high},
                 "confidence threshold", "UIoU, %")
    accuracy = axes(canvas, (1960, 160, 3120, 790), (0, 1), (0, 1), fifths,
                    {t: percents[t] for t in fifths}, "", "accuracy, %")
    share = axes(canvas, (1960, 880, 3120, 1160), (0, 1), (-4, 0), fifths,          # decades
                 {-4: "0.01", -3: "0.1", -2: "1", -1: "10", 0: "100"}, "confidence", "pixels, %")
    for k, (level, fill, name) in enumerate(((oracle, GREY, "oracle: UIoU"),
                                             (miou, INK, "nothing marked invalid: mIoU"))):
        dashed(draw, curve(theta[0], level), curve(1, level), fill)
        dashed(draw, (220, 1340 + 70 * k), (330, 1340 + 70 * k), fill)
        write(draw, (360, 1340 + 70 * k), f"{name} {100 * level:.1f}", 44)
    thickness = 0.84 / ECE_BINS / len(rows)
    for i, (row, (temperature, how)) in enumerate(zip(rows, temperatures)):
        fill = COLOURS[i % len(COLOURS)]
        draw.line([curve(t, u) for t, u in zip(theta, row["uiou"].tolist())], fill, 9, "curve")
        for bin, (pixels, right, _) in enumerate(row["reliability"].T.tolist()):
            left = (bin + 0.08) / ECE_BINS + i * thickness
            if pixels > 0:
                draw.rectangle((accuracy(left, max(right, 0.004)), accuracy(left + thickness, 0)),
                               fill)
            if pixels / row["pixels"] > 1e-4:
                decade = math.log10(pixels / row["pixels"])
                draw.rectangle((share(left, decade), share(left + thickness, -4)), fill)
        name = f"T = {temperature:g}" + (f" ({how})" if how in ("fit", "best") else "")
        draw.line((1960, 1340 + 70 * i, 2070, 1340 + 70 * i), fill, 10)
        write(draw, (2100, 1340 + 70 * i),
              f"{name}: AUIoU {100 * row['auiou']:.1f}, ECE {row['ece']:.3f}", 44)
    dashed(draw, accuracy(0, 0), accuracy(1, 1), INK)
    return canvas.reduce(2)


class Panels:
    """Keeps what the sheets show while the images go by: `count` label maps per condition, no more.

    The sheets are spread over the set, or are of the images with the lowest mIoU (worst).
    """

    def __init__(self, samples, count, worst, temperature, classes):
        self.samples, self.count, self.temperature, self.classes = (
            samples, count, temperature, classes)
        self.wanted, self.kept = None if worst else set(), {}
        for condition in () if worst else {sample.condition for sample in samples}:
            at = [i for i, sample in enumerate(samples) if sample.condition == condition]
            self.wanted |= {at[(2 * k + 1) * len(at) // (2 * count)] for k in range(count)}

    def __call__(self, index, pixels):
        """Keep (rank, index, mIoU of the image, prediction, confidence level 0..2)
        if a sheet may want it."""
        if self.wanted is not None and index not in self.wanted:
            return
        union = pixels.confusion.sum(0) + pixels.confusion.sum(1) - pixels.confusion.diagonal()
        iou = (pixels.confusion.diagonal()[union > 0].double() / union[union > 0]).mean().item()
        q = pixels.confidence(self.temperature)
        level = (q > 0.75).byte() + (q > 0.95).byte()
        rank = iou if self.wanted is None else index
        rank = 1.0 if math.isnan(rank) else rank                   # nothing labelled: nothing wrong
        kept = self.kept.setdefault(self.samples[index].condition, [])
        kept.append((rank, index, iou, pixels.prediction.byte().cpu(), level.cpu()))
        kept.sort(key=lambda item: item[:2])
        del kept[self.count:]

    def write(self, folder):
        """FOLDER/<condition>-<k>-<name>.png, each drawn by the process that saw the image."""
        every = gathered({condition: [item[:2] for item in kept]
                          for condition, kept in self.kept.items()})
        for condition, kept in self.kept.items():
            ranked = sorted(item for share in every
                            for item in share.get(condition, ()))[:self.count]
            for rank, index, *shown in kept:
                if (rank, index) in ranked:
                    sample, place = self.samples[index], ranked.index((rank, index)) + 1
                    save(sheet(sample, self.classes, *shown, self.temperature),
                         Path(folder) / f"{condition}-{place:02d}-{Path(sample.image).stem}.png")


def save(picture, path):
    """Write a Pillow image as PNG, whole or not at all."""
    with whole_file(path) as temporary:
        picture.save(temporary, "PNG")


def sheet(sample, classes, iou, prediction, level, temperature, width=600):
    """Pillow image: input, ground truth, invalid, reference; prediction, twice thresholded, legend.

    prediction, level: flat maps; level counts which of confidence > 0.75 and > 0.95 hold. width: of
    a cell. Where a set has no invalid masks, the wrong pixels stand in their place.
    """
    image, ids, invalid = read_sample(sample, len(classes))
    palette, size = palette_of(classes), (width, round(width * ids.shape[0] / ids.shape[1]))
    prediction, level = (part.view(ids.shape).numpy() for part in (prediction, level))
    photo = Image.fromarray(image.transpose(1, 2, 0)).resize(size, Image.Resampling.LANCZOS)
    cells = {(0, 0): ("input", photo), (1, 0): ("ground truth", colour(ids, palette))}
    black, name = invalid, "invalid to annotators: black"
    if invalid is None:
        black, name = (prediction != ids) & (ids != IGNORE), "wrong: black"
    cells[2, 0] = name, Image.fromarray(np.uint8(255 * ~black)).convert("RGB")
    if sample.reference:
        with opened(sample.reference, ("RGB",)) as reference:
            cells[3, 0] = ("reference in clear weather",
                           reference.resize(size, Image.Resampling.LANCZOS))
    for column, name in enumerate(("prediction", "confidence > 75 %", "confidence > 95 %")):
        withheld = f", {(level < column).mean():.0%} withheld" if column else ""
        cells[column, 1] = (name + withheld,
                            colour(np.where(level >= column, prediction, IGNORE), palette))

    gap, band = 16, 44
    canvas = Image.new("RGB", (4 * (width + gap) + gap, 60 + 2 * (size[1] + band) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    score = "" if math.isnan(iou) else f", mIoU of this image {100 * iou:.1f}"
    write(draw, (gap, 34),
          f"{sample.condition}: {Path(sample.image).stem}{score}, T = {temperature:g}", 30)
    for (column, row), (title, cell) in cells.items():
        x, y = gap + column * (width + gap), 60 + row * (size[1] + band)
        write(draw, (x, y + band / 2), title, 26)
        # no effect on photographs
        canvas.paste(cell.resize(size, Image.Resampling.BOX), (x, y + band))
        draw.rectangle((x, y + band, x + width - 1, y + band + size[1] - 1), outline=FAINT)

    names = [(palette[i], classes[i]) for i in np.union1d(ids[ids != IGNORE], prediction)]
    names.append(((0, 0, 0), "no class"))
    left, top = gap + 3 * (width + gap), 60 + band + (size[1] + band) * bool(sample.reference)
    room = canvas.height - gap - top
    pitch = max(18, min(40, room // -(-len(names) // 2)))
    rows = room // pitch                                           # of many classes, those that fit
    for i, (fill, name) in enumerate(names[:2 * rows]):
        x, y = left + i // rows * width // 2, top + i % rows * pitch
        draw.rectangle((x, y + 3, x + 50, y + pitch - 3), fill)
        write(draw, (x + 60, y + pitch / 2), name, min(26, 0.8 * pitch))
    return canvas


# --- predictions as files, and submissions ------------------------------------------------------

# Kind of submission: set, images and size of its test split (datasets.md of the authors),
# folders of the zip.
SUBMISSIONS = {"acdc": ("acdc", 2000, (1920, 1080), ("labelTrainIds",)),
               "cityscapes": ("cityscapes", 1525, (2048, 1024), ("labelIds",)),
               "darkzurich": ("dark_zurich", 151, (1920, 1080),
                              ("labelTrainIds", "confidence", "labelTrainIds_invalid"))}
IMAGE_FOLDERS = ("confidence", "overlay", "labelTrainIds")     # what --images writes of every image


def label_id_table():
    """(19,) Cityscapes labelId of each train id."""
    return np.array([CITYSCAPES_TABLE.index(i) for i in range(len(CLASSES))], np.uint8)


def rendered(folder, prediction, q, image_path, palette, theta):
    """What a folder holds of one image, as a Pillow image.
    prediction (H, W) uint8, q (H, W) float32."""
    if folder == "labelTrainIds":
        return Image.fromarray(prediction)
    if folder == "labelIds":
        return Image.fromarray(label_id_table()[prediction])
    if folder == "labelTrainIds_invalid":
        return Image.fromarray(np.where(q < np.float32(theta), IGNORE, prediction).astype(np.uint8))
    if folder == "confidence":                                      # 16 bits: 8 move AUIoU by 0.002
        return Image.fromarray(np.round(q.astype(np.float64) * 65535).astype(np.uint16))
    return Image.blend(read_image(image_path)[0], colour(prediction, palette), 0.5)      # "overlay"


def write_predictions(models, samples, names, out, folders, settings, palette, temperature, theta,
                      device, rank, world, **forward):
    """Write OUT/<folder>/<name> for every sample and folder; what is there already is skipped.

    settings: plain dict of all that the files depend on, kept in OUT/settings.json (but for the
    paths of checkpoints, whose sums are in it): files of other settings are not mixed, ValueError.
    forward: as in predictions.
    """
    settings = {name: value for name, value in settings.items() if name != "checkpoints"}
    out, text = Path(out), json.dumps(settings, indent=1)
    note = out / "settings.json"
    if note.is_file() and (there := note.read_text(errors="replace")) != text:
        raise ValueError(f"{out} holds predictions of other settings, "
                         f"{' '.join(there.split())[:600]}; give the same ones, "
                         "another --out, or remove the folder")
    gathered(None)                                  # all have looked before one writes
    if rank == 0:
        with whole_file(note) as temporary:
            temporary.write_text(text)
    todo = [i for i in range(rank, len(samples), world)
            if not all((out / folder / names[i]).is_file() for folder in folders)]
    stream = predictions(models, [samples[i] for i in todo], len(palette), device, what="predicted",
                         **forward)
    for i, logits, *_ in stream:
        ids, q = confident_ids(logits, temperature)
        prediction, q = ids.byte().cpu().numpy(), q.cpu().numpy()
        for folder in folders:
            picture = rendered(folder, prediction, q, samples[todo[i]].image, palette, theta)
            save(picture, out / folder / names[todo[i]])
    gathered(None)                                  # all have written


def images_below(folder, out):
    """Paths of the PNG and JPEG images below a folder, links followed, sorted, without hidden ones
    and those below `out`."""
    paths, seen = [], {os.path.realpath(out)}         # a folder comes up once, whatever links to it
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders[:] = names[:] = []
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(place, name) for name in names if not name.startswith(".")
                  and name.lower().endswith((".png", ".jpg", ".jpeg"))]
    return sorted(paths)


def find_images(folder, out):
    """([Sample], [output name]) of all PNG and JPEG images below a folder,
    without those below `out`."""
    paths = images_below(folder, out)
    names = [str(path.relative_to(folder).with_suffix(".png")) for path in paths]
    if not paths:
        raise ValueError(f"--images {folder}: no such folder, or no .png, .jpg or .jpeg below it "
                         f"and outside --out {out}")
    if repeated(names):
        raise ValueError(f"--images {folder}: two images would be written as {repeated(names)}; "
                         "rename one")
    return [Sample(str(path), None, None, None, "images", "all") for path in paths], names


def submission_samples(kind, root, split):
    """([Sample], [name in the zip]) of a submission; ValueError where images lack,
    collide or misfit."""
    if kind not in SUBMISSIONS:
        raise ValueError(f"--submit knows {', '.join(SUBMISSIONS)}, found {kind!r}")
    dataset, expected, size, _ = SUBMISSIONS[kind]
    samples = gather(root, (dataset,), split, labelled=False)
    names = [Path(sample.image).stem + ".png" for sample in samples]
    if repeated(names):
        raise ValueError(f"two {split} images of {dataset} would be {repeated(names)} in the flat "
                         "zip; remove one")
    if split == "test" and len(samples) != expected:
        raise ValueError(f"{kind}: the server expects {expected} test images, found {len(samples)} "
                         f"below {root}; complete the set (or rehearse with --split val)")
    for sample in samples if split == "test" else ():
        with opened(sample.image, IMAGE_MODES) as image:
            if image.size != size:
                raise ValueError(f"it is {image.size[0]}x{image.size[1]}, "
                                 f"expected {size[0]}x{size[1]}")
    return samples, names


def write_submission(path, kind, samples, names, parts):
    """Zip what write_predictions left in folder `parts`, each file checked.
    Always the same bytes."""
    folders = SUBMISSIONS[kind][3]
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, sample in sorted(zip(names, samples)):
            with opened(sample.image, IMAGE_MODES) as image:
                check_parts(Path(parts), folders, name, image.size[::-1])
            for folder in folders:
                inside = name if kind == "cityscapes" else f"{folder}/{name}"
                archive.writestr(zipfile.ZipInfo(inside),
                                 (Path(parts) / folder / name).read_bytes())


def check_parts(parts, folders, name, shape):
    """Raise ValueError unless all files of one image are there with the right size,
    bit depth and values."""
    for folder in folders:
        values = read_png(parts / folder / name, shape,
                          ("I;16", "I") if folder == "confidence" else ("L",))
        allowed = {"labelIds": label_id_table(), "labelTrainIds": np.arange(len(CLASSES)),
                   "confidence": None,
                   "labelTrainIds_invalid": (*range(len(CLASSES)), IGNORE)}[folder]
        strange = [] if allowed is None else values[~np.isin(values, allowed)]
        if len(strange):
            raise ValueError(f"{parts / folder / name} holds values that the server does not take, "
                             f"such as {strange[0]}; remove the file and run again")


# --- benchmark ----------------------------------------------------------------------------------

def benchmark(device, precision, height=1080, width=1920, repeats=5):
    """Print the time of the metrics of one image beside that of ConvNeXt-T's forward, medians,
    on `device`."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def seconds(function):
        times = []
        for _ in range(repeats + 1):
            wait()
            start = time.perf_counter()
            function()
            wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])                           # the first one warmed up

    def forward():
        with autocast(device, half_type(device, precision)):
            predict(model, image)

    def metrics(group):
        pixels = Pixels.of(logits, labels, invalid)
        for member in group:
            member.add(pixels)
    torch.manual_seed(0)
    model = build("convnext_tiny").to(device).eval()
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    # As a trained network would have it: confident and right on most pixels, some unlabelled,
    # some invalid.
    labels = torch.arange(height * width, device=device).view(height, width) // 1000 % 19
    logits = 2 * torch.randn(19, height, width, device=device)
    logits.scatter_add_(0, labels[None], torch.full_like(logits[:1], 9.0))
    labels[:height // 20], invalid = IGNORE, labels % 10 == 0
    network = seconds(forward)
    name = (f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu"
            else torch.cuda.get_device_name())
    print(f"{name}; {width}x{height}, 19 classes, median of {repeats}\n"
          f"ConvNeXt-T forward: {1000 * network:.1f} ms")
    for temperatures in ((1.0,), (0.67, 1.0, 1.5), SWEEP):
        took = seconds(lambda: metrics([Metrics(19, t, device=device) for t in temperatures]))
        print(f"metrics at {len(temperatures):2} temperatures: {1000 * took:.1f} ms, "
              f"{took / network:.1%} of it", flush=True)


# --- the script ---------------------------------------------------------------------------------

def temperature(word):
    """Type of --temperature."""
    return word if word in ("fit", "best") else float(word)


@dataclass(frozen=True)
class Config:
    """The flags of evaluate.py."""
    checkpoint: tuple = flag((), "checkpoints of train.py; several are averaged "
                             "(default: newest run)")
    data: str = flag("", "data root (default: the one the checkpoint was trained with; for "
                     "--score, data)")
    val: tuple = flag((), "sets to evaluate, NAME or NAME:PART,PART "
                      "(default: those of the checkpoint)")
    split: str = flag("", "split to evaluate (default: val; test for --submit)")
    temperature: tuple = flag(
        (1.0,), "softmax temperatures, in one pass over the images: numbers, and fit (least "
        "negative log-likelihood) or best (highest AUIoU), which choose on every second image of a "
        "condition and report on the others. Pictures and files take the first one",
        type=temperature, metavar="T")
    thresholds: int = flag(0, "confidence thresholds from 1/C to 1, both included "
                           f"(default: the midpoints of {CELLS} cells)")
    scales: tuple = flag((1.0,), "test-time scales, logits averaged")
    flip: bool = flag(False, "average with the mirrored image")
    tile: int = flag(0, "side of tiles in pixels, a multiple of 512, for images that do not fit "
                     "(default: whole images); the same logits where the network looks no further "
                     "than a quarter of a tile")
    precision: str = flag("auto", "auto is half precision on a GPU, float32 on a CPU",
                          choices=("auto", "bf16", "fp16", "fp32"))
    workers: int = flag(2, "loader processes per process")
    json: str = flag("", "file for every number: per class, condition, temperature (default: none)",
                     metavar="FILE")
    plots: str = flag("", "folder for plots of UIoU and calibration (default: none)", metavar="DIR")
    panels: int = flag(0, "sheets of pictures per condition, spread over the set, written to --out",
                       metavar="N")
    panels_worst: bool = flag(False, "sheets show the images of the lowest mIoU")
    out: str = flag("pictures", "folder for --panels and --images", metavar="DIR")
    images: str = flag("", "predict every PNG and JPEG below this folder; finished files are left "
                       "as they are (default: none)", metavar="DIR")
    submit: tuple = flag((), "predict a test split and zip it for its server: "
                         f"{', '.join(SUBMISSIONS)}", nargs=2, metavar=("KIND", "ZIP"))
    theta: float = flag(0.5, "confidence below which a pixel is invalid in the submission to "
                        "darkzurich")
    score: str = flag("", "score the PNGs below this folder, named like the images of --val "
                      "(default: none)", metavar="DIR")
    label_ids: bool = flag(False, "the PNGs of --score are Cityscapes labelIds, not train ids")
    ladder: str = flag("", "print the table of a ladder: the folder that holds its runs, "
                       "SEED/ROW", metavar="DIR")
    benchmark: bool = flag(False, "time the metrics beside the forward of ConvNeXt-T on this "
                           "device")


def check_flags(config):
    """Raise ValueError for flags out of range, or that exclude each other."""
    numbers = [t for t in config.temperature if not isinstance(t, str)]
    check_forward_flags(config, numbers)
    if config.thresholds and not 2 <= config.thresholds <= 100_000:
        raise ValueError(f"--thresholds must lie in 2..100000, found {config.thresholds}")
    modes = [name for name in ("images", "submit", "score", "ladder", "benchmark")
             if getattr(config, name)]
    asked = [name for name in ("json", "plots", "panels") if getattr(config, name)]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]} exclude each other")
    if modes and len(numbers) < len(config.temperature):
        raise ValueError(f"--temperature fit and best need logits and labels; --{modes[0]} has not "
                         "both")
    if modes and modes != ["score"] and asked:
        raise ValueError(f"--{asked[0]} needs labelled images; --{modes[0]} has none")
    if config.panels < 0 or config.panels_worst and not config.panels:
        raise ValueError("--panels takes the number of sheets per condition, and --panels-worst "
                         "needs it")
    if config.score and config.temperature != (1.0,):
        raise ValueError("--temperature needs logits; --score takes the confidence as it is stored")
    if not 0 <= config.theta <= 1:
        raise ValueError(f"--theta must lie in [0, 1], found {config.theta}")
    if config.score and not config.val:
        raise ValueError("--score needs the set that the PNGs belong to: --val NAME")


# What may differ between the runs of a ladder. `train` and `pseudo` are alike within a row.
LADDER_FREE = {"seed", "train", "pseudo", "out", "resume", "once", "demo", "compile",
               "checkpoint_blocks", "save_every", "log_every", "workers", "skip_bad", "benchmark"}


def finished_run(folder):
    """(header of log.jsonl, last record of a validation, seconds of all its parts) of a finished
    run. Raises ValueError."""
    try:
        records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text()
                   .splitlines()]
        header, last, seconds, part = records[0], records[-1], 0.0, 0.0
        header["config"]["train"], header["config"]["val"]            # KeyError: no log of train.py
        for record in records:
            if "config" in record:               # the first line, and one for each restart
                seconds, part = seconds + part, 0.0
            part = record.get("seconds", part)
        if "miou" not in last or last["step"] != header["total"]:
            raise ValueError(f"its log ends at step {last.get('step', 0)} of {header['total']}")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is no finished run: {error}; start `bash .ladder` again to "
                         "continue") from None
    return header, last, seconds + part


def ladder_table(folder):
    """Lines of a ladder's table: mean and standard deviation of the mIoU over seeds, in percent.

    folder: holds SEED/ROW, each a run of train.py; rows are named NUMBER-NAME and come in the order
    of their numbers. Reads log.jsonl alone. The deviation is that of a sample (n - 1). Raises
    ValueError unless every seed has the same finished rows, trained for as many steps and measured
    on the same sets.
    """
    def folders(path):
        """Names of the folders in `path`, by the numbers in them."""
        return sorted((item.name for item in path.glob("*") if item.is_dir()), key=lambda name: [
            int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    seeds = [Path(folder) / name for name in folders(Path(folder))]
    names = {seed: folders(seed) for seed in seeds}
    rows = names[seeds[0]] if seeds else []
    if not rows:
        raise ValueError(f"--ladder {folder}: no runs SEED/ROW in it; `bash .ladder` makes them")
    if odd := [seed for seed in seeds if names[seed] != rows]:
        raise ValueError(f"{odd[0]} has the rows {' '.join(names[odd[0]]) or '(none)'}, {seeds[0]} "
                         f"{' '.join(rows)}; start `bash .ladder` again to continue")
    runs = {(row, seed): finished_run(seed / row) for row in rows for seed in seeds}
    first, _, _ = runs[rows[0], seeds[0]]
    for (row, seed), (header, _, _) in runs.items():
        alike = {"steps": (header["total"], first["total"])}
        alike |= {name: (header["config"].get(name), first["config"].get(name))
                  for name in (header["config"].keys() | first["config"].keys()) - LADDER_FREE}
        same_row = runs[row, seeds[0]][0]["config"]
        alike |= {name: tuple([spec.replace(f"/{own.name}/", "/") for spec in config.get(name, ())]
                              for own, config in ((seed, header["config"]), (seeds[0], same_row)))
                  for name in ("train", "pseudo")}
        for name, (here, there) in sorted(alike.items()):
            if here != there:
                raise ValueError(f"{seed / row} and {seeds[0]} cannot stand in one "
                                 f"table: {name} {here} and {there}")
    found = runs[rows[0], seeds[0]][1]["miou"]
    order = ("all", "clear", "snow", "fog", "rain", "night")          # the deck's
    columns = sorted(found, key=lambda c: (order.index(c) if c in order else len(order), c))
    lines = ["| mIoU, % | " + " | ".join(columns) + " | minutes a run |",
             "|---" * (len(columns) + 2) + "|"]
    for row in rows:
        scores = 100 * np.array([[runs[row, seed][1]["miou"][c] for c in columns]
                                 for seed in seeds])                  # (seeds, columns)
        cells = [f"{mean:.2f}" for mean in scores.mean(0)]
        if len(seeds) > 1:
            cells = [f"{cell} ± {spread:.2f}"
                     for cell, spread in zip(cells, scores.std(0, ddof=1))]
        minutes = np.mean([runs[row, seed][2] for seed in seeds]) / 60
        lines.append(f"| {row.partition('-')[2] or row} | {' | '.join(cells)} | {minutes:.1f} |")
    return [*lines, f"{len(seeds)} seeds ({', '.join(seed.name for seed in seeds)}), "
            f"{first['total']} steps a run; mean ± standard deviation over seeds"]


def newest_checkpoint(runs="runs"):
    """best.pt of the run that wrote one last."""
    found = sorted(Path(runs).glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no checkpoint: nothing matches {runs}/*/best.pt. Train first "
                                "(torchrun --nproc_per_node=2 train.py) or name one with "
                                "--checkpoint")
    return str(found[-1])


def load_ensemble(paths, device):
    """([models], state of the first checkpoint); all must share their classes."""
    models, states = zip(*(load_checkpoint(path, device) for path in paths))
    for path, state in zip(paths, states):
        if state["classes"] != states[0]["classes"]:
            raise ValueError(f"{path} has {len(state['classes'])} classes, {paths[0]} "
                             f"{len(states[0]['classes'])}, or other ones; an ensemble needs the "
                             "same")
    return list(models), states[0]


def main():
    config = Config(**parse_flags(Config, __doc__))
    check_flags(config)
    if config.ladder:
        return say("\n".join(ladder_table(config.ladder)))
    paths = () if config.score or config.benchmark else config.checkpoint or (newest_checkpoint(),)
    rank, world, device = start_processes()
    if config.benchmark:
        if rank == 0:
            benchmark(device, config.precision)
    elif config.score:
        score(config, device, rank, world)
    else:
        models, state = load_ensemble(paths, device)
        about = {"checkpoints": list(paths), "sha256": sha256(paths), "step": state["step"],
                 "scales": list(config.scales), "flip": config.flip, "tile": config.tile,
                 "precision": dtype_name(half_type(device, config.precision))}
        forward = {**forward_flags(config), "rank": rank, "world": world}
        say(f"{', '.join(paths)}: step {state['step']}")
        run = predict_files if config.images or config.submit else evaluate_checkpoints
        run(config, models, state, about, device, forward)
    end_processes()


def sha256(paths):
    """Digests of files."""
    digests = []
    for path in paths:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests


def forward_flags(config):
    """The arguments of predictions that flags decide."""
    return {name: getattr(config, name)
            for name in ("precision", "workers", "scales", "flip", "tile")}


def check_forward_flags(config, temperatures):
    """Raise ValueError where one of them, or a temperature, is out of range."""
    if not all(t >= 1e-6 for t in temperatures):
        raise ValueError("--temperature must be at least 1e-6, found "
                         f"{' '.join(map(str, temperatures))}")
    if not all(0 < scale <= 16 for scale in config.scales):
        raise ValueError(f"--scales must lie in (0, 16], found {' '.join(map(str, config.scales))}")
    if not 0 <= config.workers <= 256:
        raise ValueError(f"--workers must lie in 0..256, found {config.workers}")
    if config.tile < 0 or config.tile % 512:
        raise ValueError(f"--tile must be a multiple of 512 pixels, found {config.tile}")


def labelled_samples(root, specs, split):
    """(samples, classes) of the sets to evaluate, which rank 0 prints."""
    samples = gather(root, specs, split, labelled=True)
    say(f"{len(samples)} images of {' '.join(specs)} ({split}) below {root}")
    return samples, classes_of(root, parse_spec(specs[0])[0])


def score(config, device, rank, world):
    """--score: the tables of stored predictions; without confidence the mIoU alone."""
    samples, classes = labelled_samples(config.data or "data", config.val, config.split or "val")
    stream = stored_predictions(samples, config.score, len(classes), config.label_ids, device, rank,
                                world)

    def run(watch):
        return pool(stream, samples, len(classes), device, (1.0,), config.thresholds, watch)
    report(config, samples, classes, [(1.0, "stored")],
           {"score": config.score, "sets": list(config.val)}, run,
           (Path(config.score) / "confidence").is_dir())


def evaluate_checkpoints(config, models, state, about, device, forward):
    """Evaluate on the labelled images that the flags name. forward: as in predictions."""
    root, specs = (config.data or state["config"]["data"],
                   config.val or tuple(state["config"]["val"]))
    samples, classes = labelled_samples(root, specs, config.split or "val")
    about.update(sets=list(specs), split=config.split or "val")
    if classes != tuple(state["classes"]):
        raise ValueError(f"{about['checkpoints'][0]} knows {len(state['classes'])} classes "
                         f"({state['classes'][0]}, ...), which are not those of {specs[0]}; "
                         "name a matching set with --val or another --checkpoint")
    temperatures = [(t, t if isinstance(t, str) else "given") for t in config.temperature]
    words, thresholds = {how for _, how in temperatures} - {"given"}, config.thresholds
    if words:
        choosing, samples = split_halves(samples)
        say(f"{' and '.join(sorted(words))} on {len(choosing)} images, every second one of each "
            f"condition; all tables are of the other {len(samples)}")
        stream = predictions(models, choosing, len(classes), device, what="choosing on", **forward)
        chosen, curve = choose_temperatures(words, stream, len(choosing), len(classes), device,
                                            thresholds)
        temperatures = [(chosen.get(how, t), how) for t, how in temperatures]
        about["choice"] = {"images": len(choosing), "chosen": chosen, "sweep": curve}
        if chosen.get("best") in (SWEEP[0], SWEEP[-1]):
            say(f"best T = {chosen['best']:g} lies at the end of its sweep, {SWEEP[0]:g} to "
                f"{SWEEP[-1]:g}")

    def run(watch):
        return evaluate(models, samples, len(classes), device, [t for t, _ in temperatures],
                        thresholds, watch=watch, **forward)
    report(config, samples, classes, temperatures, about, run)


def report(config, samples, classes, temperatures, about, run, with_confidence=True):
    """Run the evaluation `run(watch)` and write what the flags ask for."""
    panels = None
    if config.panels:
        panels = Panels(samples, config.panels, config.panels_worst, temperatures[0][0], classes)
    results, counts = run(panels), count_conditions(samples)
    rows = {condition: [{**budget(metrics), **metrics.compute()} for metrics in group]
            for condition, group in results.items()}
    if not with_confidence:
        say("\nno confidence/ beside the labels: mIoU only, no plots")
        known = ("miou", "iou", "classes", "pixels", "confusion", "thresholds")
        rows = {condition: [{key: r[key] if key in known else math.nan for key in r} for r in group]
                for condition, group in rows.items()}
    if is_first():                          # first of all, whatever becomes of the files
        print_results(rows, temperatures, counts, classes, config.thresholds)
    if config.json and is_first():
        write_json(config.json, rows, temperatures, counts, {**about, "classes": list(classes)})
    if panels:
        panels.write(config.out)
        say(f"\nsheets of pictures: {config.out}")
    if not is_first():
        return
    for condition, group in rows.items() if config.plots and with_confidence else ():
        if group[0]["pixels"]:
            picture = plot(f"{condition}, {counts[condition]} images", group, temperatures)
            save(picture, Path(config.plots) / f"{condition}.png")


def predict_files(config, models, state, about, device, forward):
    """--images and --submit: write PNGs, and the zip of a submission."""
    classes, about["temperature"] = tuple(state["classes"]), config.temperature[0]
    if config.images:
        out, folders, about["images"] = (config.out, IMAGE_FOLDERS,
                                         str(Path(config.images).resolve()))
        samples, names = find_images(config.images, out)
    else:
        kind, path = config.submit
        root, out = config.data or state["config"]["data"], f"{path}.parts"
        samples, names = submission_samples(kind, root, config.split or "test")
        folders = SUBMISSIONS[kind][3]
        about.update(kind=kind, theta=config.theta, data=str(Path(root).resolve()))
        if classes != CLASSES:
            raise ValueError(f"{about['checkpoints'][0]} has {len(classes)} classes; --submit "
                             "needs the 19 of Cityscapes")
    bad = []

    def skip(message):
        print(f"skipped: {message}", flush=True)
        bad.append(message)
    write_predictions(models, samples, names, out, folders, about, palette_of(classes),
                      config.temperature[0], config.theta, device,
                      skip=skip if config.images else None, **forward)
    if config.submit and is_first():
        write_submission(path, kind, samples, names, out)
        shutil.rmtree(out)
        print(f"{path}: {len(samples)} images, {len(samples) * len(folders)} files, all checked")
    elif config.images:
        bad = sum(map(len, gathered(bad)))
        say(f"{out}: {', '.join(folders)} of {len(samples) - bad} images"
            + f", {bad} skipped as unreadable" * bool(bad))


if __name__ == "__main__":
    run_main(main)
