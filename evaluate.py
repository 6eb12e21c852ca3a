"""Evaluate checkpoints: mIoU, UIoU, AUIoU and ECE per condition, pictures, submissions, scoring.

    python evaluate.py --temperature 0.67
    torchrun --nproc_per_node=8 evaluate.py --checkpoint a.pt b.pt --scales 1 1.5 2 --flip
    python evaluate.py --plots plots --panels 3 --out panels --json numbers.json
    python evaluate.py --images photos --out predicted     any images: ids, confidence, overlay
    python evaluate.py --submit acdc acdc.zip              predicts the test split, for its server
    python evaluate.py --score predicted --val acdc        scores PNGs, whichever system wrote them

Several checkpoints are an ensemble: their logits are averaged. Without --checkpoint the newest run
under runs/ is taken, with the data it was trained with. UIoU, AUIoU: Sakaridis et al., ACDC, ICCV
2021, and "Map-Guided Curriculum", TPAMI 2020; ECE and temperature: Guo et al., ICML 2017."""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data import (CITYSCAPES_TABLE, CLASSES, IGNORE, PRECISIONS, EvalSet, Sample, all_gather,
                  autocast, colour, differences, flag, gather, is_first, make_loader, open_label,
                  opened, palette_of, parse_flags, progress, read_image, read_sample, require,
                  run_main, save_png, say, start_processes, to_json, whole_file)
from swiftnet import load_checkpoint, predict

CELLS = 1000               # midpoints of the integral mean that is AUIoU
ECE_BINS = 15
FIXED_POINT = 2 ** 24      # confidence is summed in units of 2^-24: integers add alike in any order


# --- metrics ------------------------------------------------------------------------------------

class Metrics:
    """Counts from which IoU, UIoU, AUIoU and ECE of any pooled set of pixels follow.

    A pixel of class h is predicted as y = argmax of the logits with confidence q = max softmax
    (logits / temperature), and marked invalid at threshold theta where q < theta. Pixels labelled
    IGNORE are left out. All counts are int64: they add up alike however images are split over
    processes. thresholds: None for the midpoints of CELLS equal cells of [1/C, 1], whose mean is
    the integral mean; K for K points, both ends included."""

    def __init__(self, num_classes, temperature=1.0, thresholds=None, device="cpu"):
        self.num_classes, self.temperature, low = num_classes, temperature, 1 / num_classes
        middles = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
        self.thresholds = (torch.linspace(low, 1, thresholds, dtype=torch.float64) if thresholds
                           else low + (1 - low) * middles).float().to(device)              # (K,)
        bins = torch.arange(1, ECE_BINS, dtype=torch.float64) / ECE_BINS
        self.bins = bins.float().to(device)                       # inner edges; (lo, hi]
        shapes = {
            "confusion": (num_classes, num_classes),              # true class, predicted class
            # cell i: exactly i thresholds are <= q. Rows: right; wrong, by predicted class; J = 1
            # and right; J = 1 and wrong, by true class
            "cells": (4, num_classes, len(self.thresholds) + 1),
            "bins": (2, 3, ECE_BINS)}                             # J: pixels, right ones, sum of q
        self.counts = {name: torch.zeros(shape, dtype=torch.int64, device=device)
                       for name, shape in shapes.items()}

    def update(self, logits, labels, invalid=None):
        """Add logits (B, C, H, W), labels (B, H, W) in 0..C-1 or IGNORE, invalid (B, H, W): J."""
        for i in range(len(logits)):      # one by one: a batch must not change how sums are rounded
            prediction, below = top_class(logits[i])
            self.add(prediction, confidence(below, self.temperature), labels[i],
                     None if invalid is None else invalid[i])

    def add(self, prediction, q, labels, invalid=None):
        """Add the pixels of one image: prediction, confidence, label, J, all (H, W)."""
        known, classes = labels != IGNORE, self.num_classes
        j = torch.zeros_like(known) if invalid is None else invalid.bool()
        y, q, h, j = prediction[known].long(), q[known], labels[known].long(), j[known]
        right, cell = y == h, torch.bucketize(q, self.thresholds, right=True)
        self.counts["confusion"] += count(classes * h + y, classes, classes)
        cells = len(self.thresholds) + 1                 # an entry per pixel, and one for J = 1
        row = torch.cat([torch.where(right, h, classes + y),
                         (torch.where(right, 2 * classes, 3 * classes) + h)[j]])
        self.counts["cells"] += count(cells * row + torch.cat([cell, cell[j]]), 4, classes, cells)
        place = ECE_BINS * j + torch.bucketize(q, self.bins)
        fixed = (q.double() * FIXED_POINT).round()       # exact in float64, as are its sums
        for i, weight in enumerate((None, right.double(), fixed)):
            self.counts["bins"][:, i] += count(place, 2, ECE_BINS, weight=weight)

    def reduce(self):
        """Sum the counts over all processes, in place."""
        for counts in self.counts.values():
            counts.copy_(sum(all_gather(counts.cpu())))

    def compute(self):
        """Dict of fractions in 0..1; NaN where nothing was counted.

        "iou" (C,), NaN for a class in neither truth nor prediction; "miou", mean over the "classes"
        others; "uiou" (K,) at "thresholds" (K,); "auiou", its mean; "ece", and "ece_valid" of
        J = 0; "pixels"; "confusion" (C, C); "reliability" (3, 15): pixels, accuracy, mean q by bin.
        Where AUIoU is lost: "oracle" is the UIoU of a confidence that marks exactly what is wrong
        or J = 1; "false_invalid", right pixels of J = 0 that were marked; "missed_invalid", the
        rest: oracle = auiou + false_invalid + missed_invalid. "class_auiou" etc. (C,): by class."""
        confusion, cells, bins = (counts.cpu() for counts in self.counts.values())
        truth, predicted, hit = confusion.sum(1), confusion.sum(0), confusion.diagonal()
        present = truth + predicted > 0              # the class set of every mean below, fixed once
        iou = hit.double() / (truth + predicted - hit)
        right, wrong, right_j, wrong_j = cells.flip(-1).cumsum(-1).flip(-1)[..., 1:]    # q >= theta
        invalid = cells[2:].sum((0, 2))[:, None]                 # (C, 1): pixels with J = 1
        n = truth.clamp(min=1)[:, None].double()
        uiou = ((right + invalid - right_j - wrong_j).double()   # (C, K): (TP + TI) / (n + FP)
                / (truth[:, None] + wrong).clamp(min=1))
        oracle = (invalid + (cells[0] - cells[2]).sum(1, keepdim=True)) / n
        none_missed = (invalid + right - right_j) / n            # (C, K): all wrong ones marked
        by_class = {"auiou": uiou.mean(1), "oracle": oracle[:, 0],
                    "false_invalid": (oracle - none_missed).mean(1),
                    "missed_invalid": (none_missed - uiou).mean(1)}
        both = torch.stack([bins.sum(0), bins[0]]).double()      # all pixels; those of J = 0
        pixels, correct, q = both[:, 0], both[:, 1], both[:, 2] / FIXED_POINT
        ece = ((correct - q).abs().sum(1) / pixels.sum(1)).tolist()
        return {"miou": iou[present].mean().item(), "iou": iou, "classes": int(present.sum()),
                **{name: value[present].mean().item() for name, value in by_class.items()},
                **{f"class_{k}": value.where(present, math.nan) for k, value in by_class.items()},
                "uiou": uiou[present].mean(0), "thresholds": self.thresholds.cpu(),
                "ece": ece[0], "ece_valid": ece[1], "pixels": int(confusion.sum()),
                "confusion": confusion,
                "reliability": torch.stack([pixels[0], correct[0] / pixels[0], q[0] / pixels[0]])}


def count(index, *shape, weight=None):
    """Histogram of flat indices as an int64 table of this shape."""
    return torch.bincount(index, weight, minlength=math.prod(shape)).view(shape).long()


def top_class(logits):
    """Argmax (H, W) of logits (C, H, W), and how far each lies below it, (C, H, W) float32."""
    top, prediction = logits.float().max(0)
    return prediction, logits.float() - top


def confidence(below, temperature):
    """max softmax(logits / T), (H, W) float32, from the second part of top_class."""
    require((temperature > 0, f"a temperature must be above 0, found {temperature}"))
    return 1 / (below / temperature).exp_().sum(0)


# --- evaluation ---------------------------------------------------------------------------------

def predictions(models, samples, rank=0, world=1, precision="auto", workers=0, damaged=None, **how):
    """Yield (index, *top_class, ids, invalid) of samples[rank::world], one image a forward.

    how: scales, flip, tile, as in swiftnet.predict. A damaged file, or too large a photo, ends in
    ValueError; where `damaged` is a list, its message goes there, and the image is passed over."""
    device, share = models[0].mean.device, samples[rank::world]
    loader = make_loader(EvalSet(share, models[0].num_classes), workers)
    for index, image, *target in progress(loader, len(share), "images"):
        message = image if isinstance(image, str) else ""
        try:
            with autocast(device, precision):
                found = message or top_class(predict(models, image, **how))
        except RuntimeError as error:
            asked = re.search(r"(?i)tried to allocate ([\d.]+ \w+)", str(error))
            if not asked:
                raise
            message = (f"{share[index].image}: {asked[1]} of memory were asked for, for its "
                       f"{image.shape[2]} x {image.shape[1]} pixels; try --tile 1024, or shrink it")
        if message:
            require((damaged is not None, message))
            print(f"passed over: {message}", flush=True)
            damaged.append(message)
            continue
        require((found[1].sum().isfinite(), f"logits of {share[index].image} are not finite; try "
                 "--precision fp32, or another checkpoint"))
        yield rank + world * index, *found, *target


def evaluate(models, samples, temperatures=(1.0,), thresholds=None, watch=None, **how):
    """{condition: [Metrics per temperature]} over labelled samples, "all" first, summed over
    processes. how: as in predictions. watch(index, prediction, q) is called for every image."""
    device = models[0].mean.device
    results = empty_results(samples, models[0].num_classes, temperatures, thresholds, device)
    for index, prediction, below, ids, invalid in predictions(models, samples, **how):
        ids, invalid = (part if part is None else part.to(device) for part in (ids, invalid))
        for metrics in results[samples[index].condition]:
            metrics.add(prediction, confidence(below, metrics.temperature), ids, invalid)
        if watch:
            watch(index, prediction.cpu().numpy(), confidence(below, temperatures[0]).cpu().numpy())
    return pooled(results)


def empty_results(samples, classes, temperatures, thresholds=None, device="cpu"):
    """{condition: [Metrics per temperature]}, "all" first."""
    return {name: [Metrics(classes, t, thresholds, device) for t in temperatures]
            for name in count_conditions(samples)}


def pooled(results):
    """Sum over processes, and over conditions into "all"."""
    for name, group in results.items():
        for metrics, total in zip(group, results["all"]):
            metrics.reduce()
            for key, counts in metrics.counts.items() if name != "all" else ():
                total.counts[key] += counts
    return results


def count_conditions(samples):
    """{condition: images}, "all" first."""
    counts = Counter(sorted(sample.condition for sample in samples))
    return {"all": len(samples), **{name: n for name, n in counts.items() if name != "all"}}


def score(samples, folder, classes, thresholds=None, rank=0, world=1):
    """({condition: [Metrics]}, whether there is a confidence) of PNGs named like the images.

    folder: holds train ids in labelTrainIds/ or in itself, or Cityscapes labelIds in labelIds/;
    confidence/ beside them holds 0..65535 for 0..1, and is 1 where there is none."""
    folder, table = Path(folder), np.full(256, -1)                   # value in the file -> train id
    kinds = [name for name in ("labelTrainIds", "labelIds") if (folder / name).is_dir()][:1]
    table[LABEL_IDS if kinds == ["labelIds"] else np.arange(classes)] = np.arange(classes)
    predicted, confident = named_like(samples, folder.joinpath(*kinds)), folder / "confidence"
    confidences = named_like(samples, confident) if confident.is_dir() else []
    results = empty_results(samples, classes, (1.0,), thresholds)
    share = range(rank, len(samples), world)
    for index in progress(share, len(share), "scored"):
        sample = samples[index]
        _, ids, invalid = read_sample(sample, classes)
        label = open_label(Sample(sample.image, str(predicted[index])), ids.shape[::-1])
        y, q = table[np.asarray(label)], np.ones(ids.shape)
        require(((y[ids != IGNORE] >= 0).all(), f"{predicted[index]}: values that are no class"))
        if confidences:
            with opened(confidences[index], "I;16", "I", size=ids.shape[::-1]) as image:
                q = np.array(image) / 65535
        results[sample.condition][0].add(*(part if part is None else torch.from_numpy(part) for part
                                           in (y, q.astype(np.float32), ids, invalid)))
    sure = pooled(results)["all"][0].counts["cells"][..., 1:].any()
    require((sure or not confidences, f"{confidences[:1]}, ...: nothing above 1/C; 65535 is 1"))
    return results, bool(confidences)


def named_like(samples, folder):
    """Paths of the PNGs below `folder` that are named like the samples' images, one for each."""
    paths = [p for p in folder.rglob("*.png") if folder / "confidence" not in p.parents]
    stems = [Path(sample.image).stem for sample in samples]
    files, images = Counter(path.stem for path in paths), Counter(stems)
    require(*((files[stem] == images[stem] == 1, f"{folder}: {files[stem]} files {stem}.png for "
               f"{images[stem]} images of the set") for stem in stems))
    found = {path.stem: path for path in paths}
    return [found[stem] for stem in stems]


def fit_temperature(models, samples, **how):
    """T of least negative log-likelihood of the labels (Guo et al.), in [0.05, 20]."""
    kept, limit = [], max(1, min(4096, 2 ** 20 // max(len(samples), 1)))         # pixels an image
    for index, _, logits, ids, _ in predictions(models, samples, **how):   # less their maximum
        at = np.flatnonzero(ids != IGNORE)         # at random: even steps may stay in a few columns
        at = torch.from_numpy(np.random.default_rng(index).permutation(at)[:limit])
        kept.append((index, logits.flatten(1).cpu()[:, at].double(), ids.flatten()[at].long()))
    kept = sorted(sum(all_gather(kept), []), key=lambda part: part[0])
    require((any(len(truth) for *_, truth in kept), "--temperature fit found no labelled pixel"))
    logits, truth = torch.cat([part[1] for part in kept], 1), torch.cat([part[2] for part in kept])
    low, high = 0.05, 20                              # bounds of 1 / T, in which the loss is convex
    for _ in range(40):
        middle = math.sqrt(low * high)
        expected = (torch.softmax(logits * middle, 0) * logits).sum(0)
        slope = (expected - logits.gather(0, truth[None])[0]).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return all_gather(round(1 / middle, 4))[0]


# --- tables and pictures ------------------------------------------------------------------------

def number(value, width=10):
    """A fraction in percent, "-" for NaN."""
    return f"{'-':>{width}}" if math.isnan(value) else f"{100 * value:>{width}.2f}"


def summary_table(results, counts):
    """Lines condition x scores, in percent. results: {condition: dict of Metrics.compute}, counts:
    {condition: images}. AUIoU = oracle - false inv. - missed inv. (see Metrics.compute)."""
    columns = {"mIoU": "miou", "AUIoU": "auiou", "oracle": "oracle", "false inv.": "false_invalid",
               "missed inv.": "missed_invalid", "ECE": "ece", "ECE, J=0": "ece_valid"}
    return [f"{'condition':<12}{'images':>7}{'classes':>8}" + "".join(f"{c:>12}" for c in columns),
            *(f"{name:<12}{counts[name]:>7}{r['classes']:>8}" + "".join(
                number(r[key], 12) for key in columns.values()) for name, r in results.items())]


def class_table(results, classes):
    """Lines class x condition: IoU in percent, "-" where the class does not occur."""
    width = 1 + max(map(len, (*classes, "IoU")))
    return [f"{'IoU':<{width}}" + "".join(f"{name:>10}" for name in results),
            *(f"{name:<{width}}" + "".join(number(r["iou"][i].item()) for r in results.values())
              for i, name in enumerate(classes))]


INK, GREY, FAINT = (45, 45, 45), (130, 130, 130), (222, 222, 222)
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167))     # Okabe and Ito's


def write(draw, at, text, size=40, anchor="lm"):
    """Draw dark text; anchor as Pillow has it, "lm" being left, middle."""
    draw.text(at, text, INK, ImageFont.load_default(size=size), anchor=anchor)


def axes(canvas, box, x_ticks, y_ticks, x_label, y_label):
    """Draw axes into a pixel box, a grid at the ticks {value: text}. Returns (x, y) -> pixel."""
    draw, (left, top, right, bottom) = ImageDraw.Draw(canvas), box
    (x0, *_, x1), (y0, *_, y1) = sorted(x_ticks), sorted(y_ticks)

    def place(x, y):
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))
    for x, text in x_ticks.items():
        draw.line((*place(x, y0), *place(x, y1)), FAINT, 2)
        write(draw, (place(x, y0)[0], bottom + 14), text, anchor="mt")
    for y, text in y_ticks.items():
        draw.line((*place(x0, y), *place(x1, y)), FAINT, 2)
        write(draw, (left - 16, place(x0, y)[1]), text, anchor="rm")
    draw.rectangle(box, outline=INK, width=3)
    write(draw, ((left + right) / 2, bottom + 68), x_label, 44, "mt")
    write(draw, (left, top - 34), y_label, 44)
    return place


def plot(title, rows, temperatures):
    """Pillow image: UIoU against theta, accuracy and pixels by confidence. rows: one per T."""
    canvas = Image.new("RGB", (3200, 1360 + 70 * max(2, len(rows))), "white")   # reduced at the end
    draw = ImageDraw.Draw(canvas)
    write(draw, (80, 50), title, 64)
    theta, miou, oracle = rows[0]["thresholds"].tolist(), rows[0]["miou"], rows[0]["oracle"]
    low = math.floor(10 * min(0.99, miou, *(row["uiou"].min().item() for row in rows)))
    high = min(10, math.ceil(10 * oracle + 0.2))
    ticks = {i / 10: f"{10 * i}" for i in range(11)}                                # percent
    x_ticks = {theta[0]: "", **{t: text for t, text in ticks.items() if t > theta[0]}}
    y_ticks = {i / 10: ticks[i / 10] for i in range(low, high + 1)}
    curve = axes(canvas, (220, 160, 1640, 1160), x_ticks, y_ticks, "threshold, %", "UIoU, %")
    accuracy = axes(canvas, (1960, 160, 3120, 1160), ticks, ticks, "confidence, %", "accuracy, %")
    for y, level, fill, name in ((1340, oracle, GREY, "oracle: UIoU"),
                                 (1410, miou, INK, "nothing marked invalid: mIoU")):
        draw.line((*curve(theta[0], level), *curve(1, level)), fill, 4)
        draw.line((220, y, 330, y), fill, 4)
        write(draw, (360, y), f"{name} {100 * level:.1f}", 44)
    width = 0.84 / ECE_BINS / len(rows)
    for i, (row, temperature) in enumerate(zip(rows, temperatures)):
        fill, y = COLOURS[i % len(COLOURS)], 1340 + 70 * i
        draw.line([curve(*point) for point in zip(theta, row["uiou"].tolist())], fill, 9, "curve")
        for bin, (pixels, right, _) in enumerate(row["reliability"].T.tolist()):
            if pixels > 0:
                left, top = (bin + 0.08) / ECE_BINS + i * width, max(right, 0.004)
                draw.rectangle((*accuracy(left, top), *accuracy(left + width, 0)), fill)
        draw.line((1960, y, 2070, y), fill, 10)
        write(draw, (2100, y), f"T = {temperature:g}: AUIoU {100 * row['auiou']:.1f}, ECE "
              f"{row['ece']:.3f}", 44)
    draw.line((*accuracy(0, 0), *accuracy(1, 1)), INK, 4)
    return canvas.reduce(2)


def panel_writer(samples, per_condition, out, classes, temperature):
    """A `watch` for evaluate: writes OUT/<condition>-<k>-<name>.png, spread over the set."""
    chosen = {}
    for condition in {sample.condition for sample in samples}:
        at = [i for i, sample in enumerate(samples) if sample.condition == condition]
        for k in range(per_condition):
            chosen[at[(2 * k + 1) * len(at) // (2 * per_condition)]] = f"{condition}-{k + 1:02d}"

    def watch(index, prediction, q):
        if index in chosen:
            name = f"{chosen[index]}-{Path(samples[index].image).stem}.png"
            save_png(sheet(samples[index], classes, prediction, q, temperature), Path(out) / name)
    return watch


def sheet(sample, classes, prediction, q, temperature, width=600):
    """Pillow image: input, ground truth, invalid, reference; prediction, twice thresholded, legend.
    prediction, q: (H, W). Without invalid masks the wrong pixels stand in their place."""
    image, ids, invalid = read_sample(sample, len(classes))
    palette, wrong = palette_of(classes), (prediction != ids) & (ids != IGNORE)
    black, name = (wrong, "wrong") if invalid is None else (invalid, "invalid to annotators")
    cells = {(0, 0): ("input", Image.fromarray(image.transpose(1, 2, 0))),
             (1, 0): ("ground truth", colour(ids, palette)),
             (2, 0): (f"{name}: black", Image.fromarray(np.uint8(255 * ~black)))}
    if sample.reference:
        reference = sample._replace(image=sample.reference)
        cells[3, 0] = "reference in clear weather", read_image(reference)
    for column, threshold in enumerate((0, 0.75, 0.95)):
        shown, withheld = np.where(q > threshold, prediction, IGNORE), (q <= threshold).mean()
        title = f"confidence > {threshold:.0%}, {withheld:.0%} withheld"
        cells[column, 1] = title if column else "prediction", colour(shown, palette)
    size, gap, band = (width, round(width * ids.shape[0] / ids.shape[1])), 16, 44
    canvas = Image.new("RGB", (4 * (width + gap) + gap, 60 + 2 * (size[1] + band) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    error = f"{wrong.sum() / max(1, (ids != IGNORE).sum()):.1%} wrong, T = {temperature:g}"
    write(draw, (gap, 34), f"{sample.condition}: {Path(sample.image).stem}, {error}", 30)
    for (column, row), (title, cell) in cells.items():
        x, y = gap + column * (width + gap), 60 + row * (size[1] + band)
        write(draw, (x, y + band / 2), title, 26)
        photo = column in (0, 3) and row == 0
        filter = Image.Resampling.LANCZOS if photo else Image.Resampling.BOX
        canvas.paste(cell.convert("RGB").resize(size, filter), (x, y + band))
        draw.rectangle((x, y + band, x + width - 1, y + band + size[1] - 1), outline=FAINT)
    names = [(palette[i], classes[i]) for i in np.union1d(ids[ids != IGNORE], prediction)]
    names.append(((0, 0, 0), "no class"))
    left, top = gap + 3 * (width + gap), 60 + band + (size[1] + band) * bool(sample.reference)
    pitch = max(18, min(40, (canvas.height - gap - top) // -(-len(names) // 2)))
    rows = (canvas.height - gap - top) // pitch                # of many classes, those that fit
    for i, (fill, name) in enumerate(names[:2 * rows]):
        x, y = left + i // rows * width // 2, top + i % rows * pitch
        draw.rectangle((x, y + 3, x + 50, y + pitch - 3), fill)
        write(draw, (x + 60, y + pitch / 2), name, min(26, 0.8 * pitch))
    return canvas


# --- predictions as files, and submissions ------------------------------------------------------

# Kind of submission: set, images and size of its test split, folders of the zip.
UNCERTAINTY = ["labelTrainIds", "confidence", "labelTrainIds_invalid"]
SUBMISSIONS = {
    "acdc": ("acdc", 2000, (1920, 1080), ["labelTrainIds"]),
    "acdc-uncertainty": ("acdc", 2000, (1920, 1080), UNCERTAINTY),
    "cityscapes": ("cityscapes", 1525, (2048, 1024), ["labelIds"]),
    "darkzurich": ("dark_zurich", 151, (1920, 1080), UNCERTAINTY)}
LABEL_IDS = np.array([CITYSCAPES_TABLE.index(i) for i in range(len(CLASSES))], np.uint8)


def keep_settings(out, settings, more=dict):
    """settings.json of a folder, read, or made of `settings` and `more()`; others are refused."""
    note, there = Path(out) / "settings.json", {}
    if note.exists():
        there = json.loads(note.read_text())
        other = differences(there, json.loads(json.dumps(settings)))
        require((not other, f"{out} has other settings, {other}; remove it, or use another --out"))
    all_gather(None)                                             # all have looked before one writes
    if not there:
        there = {**settings, **more()}
        if is_first():
            with whole_file(note) as temporary:
                temporary.write_text(json.dumps(there, indent=1) + "\n")
    all_gather(None)                                             # no file before its settings
    return there


def write_predictions(models, samples, names, out, folders, settings, how):
    """Write OUT/<folder>/<name> for every sample and folder; finished samples are skipped."""
    keep_settings(out, settings)
    left = [i for i, name in enumerate(names)
            if not all((Path(out) / folder / name).exists() for folder in folders)]
    all_gather(None)                                             # all have looked before one writes
    for at, prediction, below, *_ in predictions(models, [samples[i] for i in left], **how):
        y = prediction.byte().cpu().numpy()
        q = confidence(below, settings["temperature"]).cpu().numpy()
        for folder in folders:
            if folder == "overlay":
                photo = read_image(samples[left[at]])
                picture = Image.blend(photo, colour(y, palette_of(settings["classes"])), 0.5)
            elif folder == "confidence":
                picture = Image.fromarray(np.uint16(np.round(np.float64(q) * 65535)))
            else:
                ids = LABEL_IDS[y] if folder == "labelIds" else y
                unsure = folder == "labelTrainIds_invalid" and q < np.float32(settings["theta"])
                picture = Image.fromarray(np.where(unsure, np.uint8(IGNORE), ids))
            save_png(picture, Path(out) / folder / names[left[at]])
    all_gather(None)                                             # all have written


def images_below(folder, out):
    """[Sample] of all PNG and JPEG images below a folder but not below `out`, links followed."""
    paths = []
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) == os.path.realpath(out):
            folders[:] = names[:] = []
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(place, name) for name in names
                  if re.fullmatch(r"(?is)[^.].*\.(png|jpe?g)", name)]
    require((paths, f"no .png, .jpg or .jpeg below {folder} and outside {out}"))
    return [Sample(path, dataset=str(folder)) for path in sorted(paths)]


def write_submission(path, kind, names, parts, size):
    """Zip what write_predictions left in folder `parts`, each file checked."""
    ids = np.arange(len(CLASSES))
    allowed = {"labelIds": LABEL_IDS, "labelTrainIds": ids, "confidence": np.arange(2 ** 16),
               "labelTrainIds_invalid": np.append(ids, IGNORE)}
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, folder in itertools.product(sorted(names), SUBMISSIONS[kind][3]):
            file = Path(parts) / folder / name
            with opened(file, "I;16" if folder == "confidence" else "L", size=size) as image:
                values = np.array(image)
            require((np.isin(values, allowed[folder]).all(), f"{file} is damaged; remove it"))
            inside = name if kind == "cityscapes" else f"{folder}/{name}"
            archive.writestr(zipfile.ZipInfo(inside), file.read_bytes())


@dataclass(frozen=True)
class Config:
    """The flags of evaluate.py."""
    checkpoint: tuple = flag((), "checkpoints of train.py, averaged (default: the newest run)")
    data: str = flag("", "data root (default: the checkpoint's, data for --score)")
    val: tuple = flag((), "sets, NAME[@SPLIT][:PART,PART] (default: the checkpoint's)")
    split: str = flag("", "split to evaluate (default: val, or test for --submit)")
    temperature: tuple = flag(
        (1.0,), "softmax temperatures (files take the first); fit: the likeliest on half of the "
        "images, every other one, tables of the rest", type=lambda t: t if t == "fit" else float(t))
    thresholds: int = flag(0, f"points of [1/C, 1] in AUIoU (default: {CELLS} cells)", least=2)
    scales: tuple = flag((1.0,), "test-time scales, logits averaged")
    flip: bool = flag(False, "average with the mirrored image")
    tile: int = flag(0, "side of tiles, a multiple of 1024 (default: whole images)")
    precision: str = flag("auto", "auto is half on a GPU, fp32 on a CPU", choices=PRECISIONS)
    workers: int = flag(2, "loader processes of each process")
    json: str = flag("", "file for every number: per class, condition, temperature")
    plots: str = flag("", "folder for plots of UIoU and calibration")
    panels: int = flag(0, "sheets of pictures of each condition, spread over the set, below --out")
    out: str = flag("pictures", "folder for --panels and --images")
    images: str = flag("", "predict every PNG and JPEG below this folder; skips those done")
    submit: tuple = flag((), f"KIND ZIP: predict a test split ({', '.join(SUBMISSIONS)})", nargs=2)
    theta: float = flag(0.5, "confidence below which a pixel of a submission is invalid")
    score: str = flag("", "score PNGs of train ids below this folder, named like --val's images")


def check_flags(config):
    """Raise ValueError for flags that exclude each other."""
    modes = [name for name in ("images", "submit", "score") if getattr(config, name)]
    files = (config.images or config.submit) and (config.json or config.plots or config.panels)
    scorable = not config.score or config.temperature == (1.0,) and not config.panels
    require((len(modes) < 2, f"--{' and --'.join(modes)} exclude each other"),
            (not modes or "fit" not in config.temperature, "--temperature fit needs labels"),
            (not files, "--images and --submit score nothing: no --json, --plots or --panels"),
            (scorable, "--score has no logits, so neither --temperature nor --panels"),
            (config.val or not config.score, "--score needs --val, the set that its PNGs are of"))


def load_ensemble(paths, device):
    """([models], state of the first checkpoint, digests of all), which must share their classes."""
    models, states = zip(*(load_checkpoint(path, device) for path in paths))
    require((len({state["classes"] for state in states}) == 1, f"{paths} differ in classes"))
    return models, states[0], [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths]


def report(config, results, samples, classes, about):
    """Print the tables and write the JSON and the plots, on rank 0. results: as of evaluate."""
    if not is_first():
        return
    temperatures, counts = [m.temperature for m in results["all"]], count_conditions(samples)
    rows = {name: [metrics.compute() for metrics in group] for name, group in results.items()}
    if not about["confidence"]:
        known = ("miou", "iou", "classes", "pixels", "confusion")
        rows = {name: [{key: r[key] if key in known else math.nan for key in r} for r in group]
                for name, group in rows.items()}
    lines = ["", *class_table({name: group[0] for name, group in rows.items()}, classes)]
    grid = f"{config.thresholds} points" if config.thresholds else f"integral mean, {CELLS} cells"
    for i, temperature in enumerate(temperatures):
        lines += ["", f"T = {temperature:g}, percent; AUIoU over [1/{len(classes)}, 1]: {grid}; "
                  f"ECE: {ECE_BINS} bins"]
        lines += summary_table({name: group[i] for name, group in rows.items()}, counts)
    print("\n".join(lines), flush=True)
    if config.json:
        content = {**about, "classes": classes, "images": counts, "temperatures": temperatures,
                   "results": rows}
        with whole_file(config.json) as temporary:
            temporary.write_text(to_json(content) + "\n")
    for name, group in rows.items() if config.plots and about["confidence"] else ():
        if group[0]["pixels"]:
            save_png(plot(f"{name}, {counts[name]} images", group, temperatures),
                     Path(config.plots) / f"{name}.png")


def predict_files(config, models, state, about, how):
    """--images and --submit: write PNGs, and the zip of a submission."""
    if config.images:
        out, folders, damaged = config.out, ["labelTrainIds", "confidence", "overlay"], []
        samples = images_below(config.images, out)
        names = [str(Path(s.image).relative_to(config.images).with_suffix(".png")) for s in samples]
        about["images"] = str(Path(config.images).resolve())
    else:
        kind, path = config.submit
        require((kind in SUBMISSIONS, f"--submit knows {', '.join(SUBMISSIONS)}, found {kind}"),
                (state["classes"] == CLASSES, "--submit needs a checkpoint of the 19 classes"))
        dataset, expected, size, folders = SUBMISSIONS[kind]
        root, out, damaged = config.data or state["config"]["data"], f"{path}.parts", None
        samples = gather(root, [dataset], config.split or "test", labelled=False)[0]
        names = [Path(sample.image).stem + ".png" for sample in samples]
        about.update(kind=kind, theta=config.theta, data=str(Path(root).resolve()))
        sizes = {Image.open(sample.image).size for sample in samples}
        require((config.split or (len(samples), sizes) == (expected, {size}), f"{kind}: expected "
                 f"{expected} images of {size}, found {len(samples)} of {sizes}"))
    twice = [name for name, n in Counter(names).items() if n > 1]
    require((not twice, f"two images would be written as {twice}; rename or remove one"))
    write_predictions(models, samples, names, out, folders, about, {**how, "damaged": damaged})
    damaged = sum(map(len, all_gather(damaged or [])))
    require((damaged < len(samples), "none of the images could be predicted"))
    if config.submit and is_first():
        write_submission(path, kind, names, out, sizes.pop())
        shutil.rmtree(out)
    say(f"{path if config.submit else out}: {', '.join(folders)} of {len(samples) - damaged} images"
        + f", {damaged} passed over" * bool(damaged))


def main():
    config = Config(**parse_flags(Config, __doc__))
    check_flags(config)
    rank, world, device = start_processes()
    if config.score:
        samples, _, classes = gather(config.data or "data", config.val, config.split or "val")
        results, sure = score(samples, config.score, len(classes), config.thresholds, rank, world)
        return report(config, results, samples, classes,
                      {"score": config.score, "sets": config.val, "confidence": sure})
    newest = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)[-1:]
    paths = config.checkpoint or tuple(map(str, newest))
    require((paths, "no runs/*/best.pt: run train.py first, or name one with --checkpoint"))
    models, state, digests = load_ensemble(paths, device)
    say(f"{' '.join(paths)}: step {state['step']}")
    look = {name: getattr(config, name) for name in ("precision", "scales", "flip", "tile")}
    how = dict(rank=rank, world=world, workers=config.workers, **look)
    about = {"checkpoints": digests, "step": state["step"], "classes": state["classes"],
             "temperature": config.temperature[0], **look}
    if config.images or config.submit:
        return predict_files(config, models, state, about, how)
    root, sets = config.data or state["config"]["data"], config.val or state["config"]["val"]
    samples, _, classes = gather(root, sets, config.split or "val")
    require((classes == state["classes"], f"{sets} have other classes than the checkpoint's "
             f"{len(state['classes'])} ({state['classes'][0]}, ...); name others with --val"))
    say(f"{len(samples)} images of {' '.join(sets)} in {root}, {config.split or 'val'} or as named")
    temperatures = config.temperature
    if "fit" in temperatures:
        samples.sort(key=lambda sample: sample.condition)
        choosing, samples = samples[1::2], samples[::2]
        fitted = fit_temperature(models, choosing, **how)
        say(f"fit: T = {fitted:g} by every other image, {len(choosing)}; tables of {len(samples)}")
        temperatures = tuple(fitted if t == "fit" else t for t in temperatures)
    panels = panel_writer(samples, config.panels, config.out, classes, temperatures[0])
    results = evaluate(models, samples, temperatures, config.thresholds,
                       panels if config.panels else None, **how)
    about.update(temperature=temperatures[0], sets=sets, confidence=True)
    report(config, results, samples, classes, about)


if __name__ == "__main__":
    run_main(main)
