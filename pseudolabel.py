"""Selective pseudolabels: predictions on unlabelled pools, thresholded, chosen, written as labels.

    torchrun --nproc_per_node=8 pseudolabel.py \\
        --pools dark_zurich cadc nightowls nightcity stf bdd100k_100k \\
        --checkpoint runs/driving/best.pt --out pseudo/v1 --select 60000
    python pseudolabel.py --out pseudo/v1 --select 30000 --rule easiest      choose anew, in seconds
    torchrun --nproc_per_node=8 train.py --train cityscapes acdc pseudo/v1   train on them

Writes below --out: a PNG of train ids per image (255 where the confidence is below the threshold)
in a tree that mirrors the pool, manifest.csv with a row per label, and settings.json. The same
command continues an interrupted run; other settings in the same folder are refused. The deck,
part II.
"""

import csv
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import (DATASETS, IGNORE, MANIFEST, Sample, find_samples, flag, is_first, parse_flags,
                  parse_spec, run_main, say, whole_file)
from evaluate import (confidence, end_processes, load_ensemble, predictions, split_logits,
                      start_processes)

CELLS = 4096                # of the confidence histograms behind --class-share
SAMPLE = 200                # images of the pools that those histograms are taken from
STATISTICS = "statistics"   # name of the PNG text chunk that carries a label's row of the manifest
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
                              "class, with a lower threshold where 0.99 would drop the class; "
                              "0 is off")
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


# --- inference ----------------------------------------------------------------------------------

def pool_samples(root, pools):
    """Unlabelled samples of all pools, each image once, sorted within a pool. Raises ValueError."""
    samples = []
    for pool in pools:
        if Path(pool).is_dir() and pool not in DATASETS:
            images = sorted(str(path) for kind in ("png", "jpg", "jpeg")
                            for path in Path(pool).rglob(f"*.{kind}"))
            found = [Sample(image, None, None, None, pool, "all") for image in images]
        else:
            name, only, _ = parse_spec(pool)
            found = find_samples(root, name, "train", only, labelled=False)
        if not found:
            raise ValueError(f"no images in pool {pool!r}; `python data.py --data {root}` lists "
                             "what was looked for")
        samples += found
    outside = [s.image for s in samples
               if not Path(s.image).resolve().is_relative_to(Path(root).resolve())
               and not Path(s.image).is_relative_to(root)]
    if outside:
        raise ValueError(f"{outside[0]} is not below the data root {root}; put or link the pool "
                         "there")
    return list({sample.image: sample for sample in samples}.values())


def label_path(out, root, image):
    """Where the label of a pool image lies: the image's path below the data root, as .png."""
    return Path(out) / Path(os.path.relpath(image, root)).with_suffix(".png")


def confident_ids(logits, temperature):
    """Train ids (H, W) and confidence (H, W) float32 of logits (C, H, W)."""
    ids, below_top = split_logits(logits)
    return ids.view(logits.shape[1:]), confidence(below_top, temperature).view(logits.shape[1:])


def forward_flags(config):
    """The arguments of evaluate.predictions that flags decide."""
    return {"precision": config.precision, "workers": config.workers, "scales": config.scales,
            "flip": config.flip, "tile": config.tile or None}


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
    if world > 1:
        dist.all_reduce(histogram)
    share_above = (histogram.flip(1).cumsum(1).flip(1).double()
                   / histogram.sum(1, keepdim=True).clamp(min=1))
    # The highest cell edge above which the wanted share lies, for classes that occur.
    edge = (share_above >= config.class_share).sum(1).sub(1).clamp(min=0) / CELLS
    lowered = torch.minimum(thresholds.to(device), edge.float())
    return torch.where(histogram.sum(1) > 0, lowered, thresholds.to(device)).cpu()


def write_label(path, ids, statistics):
    """Write train ids (H, W) uint8 with the row of the manifest inside, whole or not at all."""
    info = PngInfo()
    info.add_text(STATISTICS, json.dumps(statistics))
    with whole_file(path) as temporary:
        Image.fromarray(ids).save(temporary, "PNG", pnginfo=info, compress_level=3)


def label_pool(models, samples, thresholds, config, classes, device):
    """Predict and write the labels of this process's samples.
    Returns the images that could not be read."""
    thresholds, bad, pending = thresholds.to(device), [], []

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
            if len(pending) > 4 * WRITERS:               # bounds memory, and lets a full disk speak
                pending.pop(0).result()
        for job in pending:
            job.result()
    return bad


# --- manifest and selection ---------------------------------------------------------------------

def read_statistics(path):
    """The row that write_label put into a label, or None where there is no whole label."""
    try:
        with Image.open(path) as image:
            return json.loads(image.text[STATISTICS])
    except (OSError, SyntaxError, KeyError, ValueError, AttributeError):
        return None


def write_manifest(out, root, samples, classes):
    """Write manifest.csv from the labels on disk, rows sorted by image. Returns its rows."""
    rows = []
    for sample in sorted(samples):
        label = label_path(out, root, sample.image)
        if (statistics := read_statistics(label)) is not None:
            rows.append({"image": os.path.relpath(sample.image, root),
                         "label": str(label.relative_to(out)),
                         "pool": statistics["pool"], "kept": statistics["kept"],
                         "confidence": statistics["confidence"],
                         "selected": 1, **dict(zip(classes, statistics["pixels"]))})
    save_rows(out, rows)
    return rows


def save_rows(out, rows):
    """Write the manifest of a folder, whole or not at all."""
    with whole_file(Path(out) / MANIFEST) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys() if rows else ("image", "label"))
        writer.writeheader()
        writer.writerows(rows)


def load_rows(out):
    """Rows of a folder's manifest, all values strings. Raises FileNotFoundError or ValueError."""
    path = Path(out) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give --checkpoint and --pools to make it")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if (not rows
            or not {"image", "label", "pool", "kept", "confidence", "selected"} <= rows[0].keys()):
        raise ValueError(f"{path} holds no rows of this script; remove the folder and make it anew")
    return rows


def select(rows, budget, rule, min_kept):
    """Set "selected" in the rows of a manifest: `budget` images, shared over the pools in
    proportion to what is eligible, by score within a pool. Returns how many were chosen of
    each pool.

    rare: an image scores 1 / (images that carry the class) for every class it carries, so the last
    place goes to the image whose classes are hardest to find elsewhere. Images that are merely easy
    (road and sky, all kept) teach what the network knows; the deck wants recognition of what is
    rare. easiest: the kept share. Ties fall to the image's name.
    """
    fixed = ("image", "label", "pool", "kept", "confidence", "selected")
    classes = [name for name in rows[0] if name not in fixed]
    carries = np.array([[float(row[name]) > 0 for name in classes] for row in rows],
                       bool).reshape(len(rows), -1)
    kept = np.array([float(row["kept"]) for row in rows])
    score = kept if rule == "easiest" else (carries / np.maximum(carries.sum(0), 1)).sum(1)
    eligible = kept >= min_kept
    pools = sorted({row["pool"] for row in rows})
    members = {pool: [i for i, row in enumerate(rows) if row["pool"] == pool and eligible[i]]
               for pool in pools}
    total = sum(map(len, members.values()))
    exact = {pool: min(budget, total) * len(m) / max(total, 1) for pool, m in members.items()}
    quota = {pool: int(share) for pool, share in exact.items()}
    for pool in sorted(pools, key=lambda p: quota[p] - exact[p])[
            :min(budget, total) - sum(quota.values())]:
        quota[pool] += 1                                    # largest remainders
    chosen = {i for pool, m in members.items()
              for i in sorted(m, key=lambda i: (-score[i], rows[i]["image"]))[:quota[pool]]}
    for i, row in enumerate(rows):
        row["selected"] = int(i in chosen)
    return quota


# --- the script ---------------------------------------------------------------------------------

def settings_of(config, thresholds, count):
    """What decides the labels in a folder, for settings.json."""
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in config.checkpoint]
    return {"checkpoints": digests, "pools": list(config.pools), "images": count,
            "threshold": config.threshold, "class_share": config.class_share,
            "class_thresholds": [round(t, 6) for t in thresholds.tolist()],
            "temperature": config.temperature,
            "scales": list(config.scales), "flip": config.flip, "tile": config.tile,
            "precision": config.precision, "torch": str(torch.__version__)}


def refuse_changes(out, settings):
    """Raise ValueError where the folder holds labels that were made with other settings."""
    path = Path(out) / "settings.json"
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text())
        differing = [f"{name}: {there.get(name)} there, {value} here"
                     for name, value in settings.items()
                     if there.get(name) != value and name != "class_thresholds"]
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is damaged; remove {out} and start anew") from None
    if differing:
        raise ValueError(f"{out} holds labels made with other settings: "
                         f"{'; '.join(differing)[:600]}. "
                         "Use those, another --out, or remove the folder")


def check(config):
    """Raise ValueError for flags out of range or without their partners."""
    for name, low, high in (("threshold", 0, 1), ("class_share", 0, 1), ("min_kept", 0, 1)):
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"--{name.replace('_', '-')} must lie in [{low}, {high}], "
                             f"found {getattr(config, name)}")
    if (not config.temperature > 0 or not all(scale > 0 for scale in config.scales)
            or config.select < 0):
        raise ValueError("--temperature and --scales must be above 0, --select not negative")
    if bool(config.checkpoint) != bool(config.pools):
        raise ValueError("--checkpoint and --pools belong together; without both, only --select "
                         "works")
    if not config.checkpoint and not config.select:
        raise ValueError("nothing to do: give --checkpoint and --pools, or --select for a finished "
                         "folder")


def make_labels(config):
    """Write the labels, settings and manifest of --out.
    Returns the rows of the manifest on rank 0."""
    rank, world, device = start_processes()
    models, state = load_ensemble(config.checkpoint, device)
    samples = pool_samples(config.data, config.pools)
    classes = len(state["classes"])
    refuse_changes(config.out,
                   settings_of(config, torch.full((classes,), config.threshold), len(samples)))
    thresholds = class_thresholds(models, samples, config, classes, device, rank, world)
    if rank == 0:
        with whole_file(Path(config.out) / "settings.json") as temporary:
            temporary.write_text(json.dumps(settings_of(config, thresholds, len(samples)), indent=1)
                                 + "\n")
    if world > 1:
        dist.barrier()                       # labels only in a folder that says how they were made
    left = [s for s in samples[rank::world]
            if read_statistics(label_path(config.out, config.data, s.image)) is None]
    say(f"{config.out}: {len(samples)} images of {' '.join(config.pools)}, {len(left)} to label on "
        f"rank 0 of {world}")
    bad = torch.tensor(len(label_pool(models, left, thresholds, config, classes, device)),
                       device=device)
    if world > 1:
        dist.all_reduce(bad)
    rows = write_manifest(config.out, config.data, samples, state["classes"]) if rank == 0 else None
    say(f"{len(samples) - int(bad)} labels written, {int(bad)} images skipped as unreadable")
    end_processes()
    return rows


def main():
    config = Config(**parse_flags(Config, __doc__))
    check(config)
    rows = make_labels(config) if config.checkpoint else load_rows(config.out)
    if not is_first():
        return
    kept = np.array([float(row["kept"]) for row in rows])
    if not len(rows):
        raise ValueError(f"{config.out}: no image could be labelled")
    print(f"{config.out}: {len(rows)} labels, {100 * kept.mean():.1f} % of the pixels kept")
    if config.select:
        quota = select(rows, config.select, config.rule, config.min_kept)
        save_rows(config.out, rows)
        print(f"selected {sum(quota.values())} by rule {config.rule}: "
              + ", ".join(f"{pool} {count}" for pool, count in quota.items()))


if __name__ == "__main__":
    run_main(main)
