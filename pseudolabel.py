"""Selective pseudolabels: predictions on unlabelled pools, thresholded, chosen, written as labels.

    torchrun --nproc_per_node=8 pseudolabel.py \\
        --pools dark_zurich cadc nightowls nightcity stf bdd100k_100k \\
        --checkpoint runs/driving/best.pt --out pseudo/v1 --select 60000
    python pseudolabel.py --out pseudo/v1 --select 30000 --rule easiest      choose anew, in seconds
    torchrun --nproc_per_node=8 train.py --pseudo pseudo/v1                  train on them too

Writes below --out: a PNG of ids per image in the classes of the checkpoint (255 where the
confidence is below the threshold) in a tree that mirrors the pool, manifest.csv with a row per
label, and settings.json. The same command continues an interrupted run; other settings in the same
folder are refused. The deck, part II.
"""

import csv
import json
import os
import sys
import time
import typing
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import (DATASETS, IGNORE, MANIFEST, SETTINGS, Sample, classes_of, clock, find_samples,
                  flag, hold, is_first, parse_flags, parse_spec, run_main, say, whole_file)
from evaluate import (check_forward_flags, confident_ids, dtype_name, end_processes, forward_flags,
                      gathered, half_type, images_below, load_ensemble, predictions, sha256,
                      start_processes)

CELLS = 4096                # of the confidence histograms behind --class-share
SAMPLE = 200                # images of the pools that those histograms are taken from
STATISTICS = "statistics"   # name of the PNG text chunk that carries a label's row of the manifest
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"      # the last bytes of a whole PNG
WRITERS = 2                 # threads that compress PNGs while the network computes


@dataclass(frozen=True)
class Config:
    """The flags of pseudolabel.py."""
    checkpoint: tuple = flag((), "checkpoints of train.py, averaged (none: only select, "
                             "in a finished folder)")
    pools: tuple = flag((), "pool sets, NAME or NAME:PART,PART, or folders of images below the "
                        "data root")
    data: str = flag("data", "data root")
    out: str = flag("pseudo/v1", "output folder")
    threshold: float = flag(0.99, "confidence that a pixel needs to keep its label")
    class_share: float = flag(0.0, "keep at least this share of the pixels of each predicted "
                              "class, with a lower threshold where --threshold would "
                              "keep less; 0 is off")
    temperature: float = flag(1.0, "softmax temperature")
    scales: tuple = flag((1.0,), "test-time scales, logits averaged")
    flip: bool = flag(False, "average with the mirrored image")
    tile: int = flag(0, "side of tiles in pixels, a multiple of 512 (default: whole images)")
    precision: str = flag("auto", "auto is half precision on a GPU, float32 on a CPU",
                          choices=("auto", "bf16", "fp16", "fp32"))
    workers: int = flag(2, "loader processes per process")
    select: int = flag(0, "images to choose from the manifest (default: all)")
    rule: str = flag("rare", "rare prefers images that carry rare classes, easiest those with most "
                     "kept pixels", choices=("rare", "easiest"))
    min_kept: float = flag(0.2, "share of kept pixels below which an image is never chosen")


LABELLING = {"threshold", "class_share", "temperature", "scales", "flip", "tile", "precision"}


# --- inference ----------------------------------------------------------------------------------

def pool_samples(root, pools, out):
    """Unlabelled samples of all pools, each image once, sorted within a pool. Raises ValueError."""
    samples = []
    for pool in pools:
        if Path(pool).is_dir() and pool not in DATASETS:
            found = [Sample(str(path), None, None, None, pool, "all")
                     for path in images_below(pool, out)]
        else:
            name, only, _ = parse_spec(pool)
            found = find_samples(root, name, "train", only, labelled=False)
        if not found:
            raise ValueError(f"no images in pool {pool!r} outside --out {out}; `python data.py "
                             f"--data {root}` lists what was looked for")
        samples += found
    below, labels = {}, {}                           # path below the root -> sample; label -> image
    for sample in samples:
        name = os.path.relpath(sample.image, root)
        if name.startswith(os.pardir):
            raise ValueError(f"{sample.image} is not below the data root {root}; put or link the "
                             "pool there, and name it there")
        below.setdefault(name, sample)
        other = labels.setdefault(Path(name).with_suffix(".png"), name)
        if other != name:
            raise ValueError(f"{other} and {name} would share one label; rename or remove one")
    return list(below.values())


def check_classes(config, classes):
    """Raise ValueError where a pool is a set with other classes than the checkpoint's."""
    for pool in config.pools:
        name = pool.partition(":")[0]
        if name in DATASETS and (there := classes_of(config.data, name)) != tuple(classes):
            raise ValueError(f"--pools {pool}: {len(there)} classes ({there[0]}, ...), but "
                             f"{config.checkpoint[0]} knows {len(classes)} ({classes[0]}, ...); "
                             "name another checkpoint, or the pool as a folder of images")


def label_path(out, root, image):
    """Where the label of a pool image lies: the image's path below the data root, as .png."""
    return Path(out) / Path(os.path.relpath(image, root)).with_suffix(".png")


def class_thresholds(models, samples, config, classes, device, rank, world):
    """(C,) thresholds: --threshold, or lower where a class would keep less than --class-share of
    its pixels.

    Read from histograms over SAMPLE images spread evenly over the pools.
    """
    thresholds = torch.full((classes,), config.threshold)
    if not config.class_share:
        return thresholds
    chosen = [samples[i]
              for i in sorted(set(np.linspace(0, len(samples) - 1, SAMPLE).astype(int).tolist()))]
    histogram = torch.zeros(classes, CELLS, dtype=torch.int64, device=device)
    for _, logits, *_ in predictions(models, chosen[rank::world], classes, device, what="sampled",
                                     skip=lambda message: None,      # named when its turn comes
                                     **forward_flags(config)):
        ids, q = confident_ids(logits, config.temperature)
        cell = (q * CELLS).long().clamp(max=CELLS - 1)
        histogram += torch.bincount((ids * CELLS + cell).flatten(),
                                    minlength=classes * CELLS).view(classes, CELLS)
    histogram = sum(gathered(histogram.cpu()))
    share_above = (histogram.flip(1).cumsum(1).flip(1).double()
                   / histogram.sum(1, keepdim=True).clamp(min=1))
    # The highest cell edge above which the wanted share lies, for classes that occur.
    edge = (share_above >= config.class_share).sum(1).sub(1).clamp(min=0).double() / CELLS
    lowered = torch.minimum(thresholds, edge.float())
    return torch.where(histogram.sum(1) > 0, lowered, thresholds)


def write_label(path, ids, statistics):
    """Write train ids (H, W) uint8 with the row of the manifest inside, whole or not at all.
    Returns (seconds, bytes)."""
    began, info = time.perf_counter(), PngInfo()
    info.add_text(STATISTICS, json.dumps(statistics))
    with whole_file(path) as temporary:
        Image.fromarray(ids).save(temporary, "PNG", pnginfo=info, compress_level=3)
    return time.perf_counter() - began, os.path.getsize(path)


def label_pool(models, samples, thresholds, config, classes, device):
    """Predict and write the labels of this process's samples, and say how fast that was.
    Returns how many images could not be read."""
    thresholds, bad, pending = thresholds.to(device), [], []
    began, done, cost = time.perf_counter(), 0, np.zeros(2)

    def skip(message):
        print(f"skipped: {message}", flush=True)
        bad.append(message)

    with ThreadPoolExecutor(WRITERS) as pool:
        for index, logits, *_ in predictions(models, samples, classes, device, what="labelled",
                                             skip=skip, **forward_flags(config)):
            sample = samples[index]
            ids, q = confident_ids(logits, config.temperature)
            kept = q >= thresholds[ids]
            count = torch.bincount(ids[kept], minlength=classes).tolist()
            statistics = {"pool": sample.dataset, "kept": round(sum(count) / ids.numel(), 6),
                          "confidence": round(q.double().mean().item(), 6), "pixels": count}
            values = ids.masked_fill(~kept, IGNORE).to(torch.uint8).cpu().numpy()
            pending.append(pool.submit(
                write_label, label_path(config.out, config.data, sample.image), values, statistics))
            done += 1
            if len(pending) > 4 * WRITERS:               # bounds memory, and lets a full disk speak
                cost += pending.pop(0).result()
        for job in pending:
            cost += job.result()
    if done:
        whole, (seconds, size) = time.perf_counter() - began, cost / done
        say(f"{done} labels in {clock(whole)}, {done / whole:.2f} images/s on rank 0; a PNG takes "
            f"{1e3 * seconds:.1f} ms of a thread beside, {size / 1e3:.1f} kB")
    return len(bad)


# --- manifest and selection ---------------------------------------------------------------------

def read_statistics(path):
    """The row that write_label put into a label, or None where there is no whole label.

    The row stands before the pixels, which are not decoded: a quarter of a million of them would
    take a quarter of an hour.
    """
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            if file.read() != PNG_END:
                return None
            file.seek(0)
            with Image.open(file, formats=("PNG",)) as image:
                return json.loads(image.info[STATISTICS])
    except (OSError, SyntaxError, KeyError, ValueError, AttributeError):
        return None


class Rows(typing.NamedTuple):
    """The columns of manifest.csv, as arrays: a quarter of a million rows take some 150 MB."""
    classes: tuple          # names, (C,)
    image: list             # paths below the data root, sorted
    label: list             # paths below the folder
    pool: list
    kept: np.ndarray        # (N,) share of pixels with a label
    confidence: np.ndarray  # (N,) mean over the pixels
    pixels: np.ndarray      # (N, C) int64 of each class
    selected: np.ndarray    # (N,) bool


FIXED = ("image", "label", "pool", "kept", "confidence", "selected")


def gather_rows(out, root, samples, classes):
    """The Rows of the labels on disk, all of them selected."""
    found = []
    for sample in sorted(samples):
        label = label_path(out, root, sample.image)
        if (row := read_statistics(label)) is not None:
            found.append((os.path.relpath(sample.image, root), str(label.relative_to(out)),
                          row["pool"], row["kept"], row["confidence"], row["pixels"]))
    image, label, pool, kept, confidence, pixels = zip(*found) if found else [()] * 6
    return Rows(tuple(classes), list(image), list(label), list(pool), np.array(kept, float),
                np.array(confidence, float), np.array(pixels, np.int64).reshape(-1, len(classes)),
                np.ones(len(found), bool))


def save_rows(out, rows):
    """Write the manifest of a folder, whole or not at all."""
    with (whole_file(Path(out) / MANIFEST) as temporary,
          open(temporary, "w", newline="", errors="surrogateescape") as file):
        writer = csv.writer(file)
        writer.writerow((*FIXED, *rows.classes))
        for i, (image, label, pool) in enumerate(zip(rows.image, rows.label, rows.pool)):
            writer.writerow((image, label, pool, rows.kept[i].item(), rows.confidence[i].item(),
                             int(rows.selected[i]), *rows.pixels[i].tolist()))


def load_rows(out):
    """Rows of a folder's manifest. Raises FileNotFoundError or ValueError."""
    path = Path(out) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give --checkpoint and --pools to make it")
    names, numbers, pixels = [], array("d"), array("q")
    try:
        with open(path, newline="", errors="surrogateescape") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if tuple(header[:len(FIXED)]) != FIXED:
                raise ValueError(f"columns {', '.join(header[:len(FIXED)])}")
            for image, label, pool, *rest in reader:
                if len(rest) != len(header) - 3:
                    raise ValueError(f"line {reader.line_num} has {len(rest) + 3} columns")
                names.append((image, label, sys.intern(pool)))
                numbers.extend(map(float, rest[:3]))
                pixels.extend(map(int, rest[3:]))
        if not names:
            raise ValueError("no rows")
    except (ValueError, OverflowError, csv.Error) as error:
        raise ValueError(f"{path} is no manifest of this script ({error}); remove the folder and "
                         "make it anew") from None
    numbers = np.array(numbers).reshape(-1, 3)
    return Rows(tuple(header[len(FIXED):]), *map(list, zip(*names)), numbers[:, 0], numbers[:, 1],
                np.array(pixels).reshape(len(names), -1), numbers[:, 2] == 1)


def select(rows, budget, rule, min_kept):
    """Set rows.selected: `budget` images, shared over the pools in proportion to what is eligible,
    by score within a pool. Returns how many were chosen of each pool.

    rare: an image scores 1 / (images that carry the class) for every class it carries, so the last
    place goes to the image whose classes are hardest to find elsewhere. Images that are merely easy
    (road and sky, all kept) teach what the network knows; the deck wants recognition of what is
    rare. easiest: the kept share. Ties fall to the image's name.
    """
    carries = rows.pixels > 0
    score = (rows.kept if rule == "easiest"
             else (carries / np.maximum(carries.sum(0), 1)).sum(1))
    pools, pool = np.unique(rows.pool, return_inverse=True)
    rank = np.argsort(-score, kind="stable")              # best first; the manifest is by name
    members = [rank[(pool[rank] == p) & (rows.kept[rank] >= min_kept)] for p in range(len(pools))]
    total = sum(map(len, members))
    budget = min(budget, total)
    exact = [budget * len(m) / max(total, 1) for m in members]
    quota = [int(share) for share in exact]
    for p in sorted(range(len(pools)), key=lambda p: quota[p] - exact[p])[:budget - sum(quota)]:
        quota[p] += 1                                         # largest remainders
    rows.selected[:] = False
    for count, best in zip(quota, members):
        rows.selected[best[:count]] = True
    return dict(zip(pools.tolist(), quota))


# --- the script ---------------------------------------------------------------------------------

def settings_of(config, count, classes, device):
    """What decides the labels in a folder, for settings.json."""
    return {"classes": list(classes), "checkpoints": sha256(config.checkpoint),
            "pools": list(config.pools), "images": count, "threshold": config.threshold,
            "class_share": config.class_share, "temperature": config.temperature,
            "scales": list(config.scales), "flip": config.flip, "tile": config.tile,
            "precision": dtype_name(half_type(device, config.precision)),
            "torch": str(torch.__version__)}


def stored_thresholds(out, settings):
    """The class thresholds of the labels in a folder, None where it is new. Raises ValueError where
    they were made with other settings, or the folder holds other things."""
    path = Path(out) / SETTINGS
    if not path.is_file():
        others = [item for item in Path(out).glob("[!.]*") if item != path]
        if others:                                       # images, where labels might fall on them
            raise ValueError(f"--out {out} holds other files, such as {others[0].name}; name a new "
                             "folder")
        return None
    try:
        there = json.loads(path.read_text())
        differing = [f"{name}: {there.get(name)} there, {value} here"
                     for name, value in settings.items() if there.get(name) != value]
        thresholds = torch.tensor(there["class_thresholds"])
        if thresholds.shape != (len(there["classes"]),):
            raise ValueError("a threshold per class")
    except (ValueError, AttributeError, RecursionError, KeyError, TypeError, RuntimeError):
        raise ValueError(f"{path} is damaged; remove {out} and start anew") from None
    if differing:
        raise ValueError(f"{out} holds labels made with other settings: "
                         f"{'; '.join(differing)[:600]}. "
                         "Use those, another --out, or remove the folder")
    return thresholds


def check(config):
    """Raise ValueError for flags out of range or without their partners."""
    for name, low, high in (("threshold", 0, 1), ("class_share", 0, 1), ("min_kept", 0, 1)):
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} must lie in [{low}, {high}], "
                             f"found {getattr(config, name)}")
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise ValueError(f"--out {config.out} is a file; expected a folder")
    check_forward_flags(config, [config.temperature])
    if config.select < 0:
        raise ValueError(f"--select must not be negative, found {config.select}")
    if bool(config.checkpoint) != bool(config.pools):
        raise ValueError("--checkpoint and --pools belong together; without both, only --select "
                         "works")
    if not config.checkpoint and not config.select:
        raise ValueError("nothing to do: give --checkpoint and --pools, or --select for a finished "
                         "folder")


def make_labels(config):
    """Write the labels and settings of --out. Returns the Rows of the manifest on rank 0."""
    rank, world, device = start_processes()
    models, state = load_ensemble(config.checkpoint, device)
    classes = state["classes"]
    check_classes(config, classes)
    samples = pool_samples(config.data, config.pools, config.out)
    settings = settings_of(config, len(samples), classes, device)
    thresholds = stored_thresholds(config.out, settings)
    if thresholds is None:
        thresholds = class_thresholds(models, samples, config, len(classes), device, rank, world)
    with hold(config.out, rank):
        # Again, since another start may have been here while the thresholds were read off.
        if rank == 0 and stored_thresholds(config.out, settings) is None:
            with whole_file(Path(config.out) / SETTINGS) as temporary:
                settings["class_thresholds"] = thresholds.tolist()
                temporary.write_text(json.dumps(settings, indent=1) + "\n")
        gathered(None)                       # labels only in a folder that says how they were made
        left = [s for s in samples[rank::world]
                if read_statistics(label_path(config.out, config.data, s.image)) is None]
        say(f"{config.out}: {len(samples)} images of {' '.join(config.pools)}, {len(left)} to "
            f"label on rank 0 of {world}")
        bad = sum(gathered(label_pool(models, left, thresholds, config, len(classes), device)))
        rows = gather_rows(config.out, config.data, samples, classes) if rank == 0 else None
    say(f"{len(samples) - bad} labels are there, {bad} images were skipped as unreadable")
    end_processes()
    return rows


def main():
    given = parse_flags(Config, __doc__)
    config = Config(**given)
    check(config)
    if not config.checkpoint and (late := given.keys() & LABELLING):
        raise ValueError(f"--{min(late).replace('_', '-')} is settled in a finished folder; "
                         "without --checkpoint only --select, --rule and --min-kept count")
    rows = make_labels(config) if config.checkpoint else load_rows(config.out)
    if not is_first():
        return
    if not rows.image:
        raise ValueError(f"{config.out}: no image could be labelled")
    if config.checkpoint:
        save_rows(config.out, rows)                      # all of them, whatever the choice comes to
    if config.select:
        quota = select(rows, config.select, config.rule, config.min_kept)
        if not sum(quota.values()):
            raise ValueError(f"{config.out}: no image has --min-kept {config.min_kept} of its "
                             "pixels kept; lower it, or label anew with --class-share 0.5 or a "
                             "lower --threshold")
        save_rows(config.out, rows)
    print(f"{config.out}: {len(rows.image)} labels, {100 * rows.kept.mean():.1f} % of the pixels "
          "kept")
    if config.select:
        print(f"selected {sum(quota.values())} by rule {config.rule}: "
              + ", ".join(f"{pool} {count}" for pool, count in quota.items()))


if __name__ == "__main__":
    run_main(main)
