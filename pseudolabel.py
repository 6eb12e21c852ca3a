"""Selective pseudolabels: predictions on unlabelled pools, thresholded, chosen, written as labels.

    torchrun --nproc_per_node=8 pseudolabel.py --checkpoint runs/driving/best.pt --flip \\
        --pools dark_zurich "nightowls*0.1" nightcity nightcity@val --out pseudo/v1 --select 5000
    python pseudolabel.py --out pseudo/v1 --select 10000 --rule easiest      choose anew, in seconds
    torchrun --nproc_per_node=8 train.py --pseudo pseudo/v1                  train on them too

Writes below --out a PNG of ids per image in the classes of the checkpoint (255: not confident), and
manifest.csv and settings.json. The same command continues an interrupted run. The deck, part II."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import (CARRIED, DATASETS, IGNORE, PRECISIONS, all_gather, flag, gather, is_first,
                  lock_folder, parse_flags, parse_name, require, run_main, save_png, say,
                  start_processes, whole_file)
from evaluate import confidence, count, images_below, keep_settings, load_ensemble, predictions

CELLS, SAMPLE = 4096, 200      # of the histograms behind --class-share; images they are taken from
LOWEST, FEWEST = 0.5, 1000     # threshold it may set; pixels below which it leaves a class alone
COLUMNS = ["image", "label", "pool", "kept", "confidence", "selected"]     # then pixels per class


@dataclass(frozen=True)
class Config:
    """The flags of pseudolabel.py."""
    checkpoint: tuple = flag((), "checkpoints of train.py, averaged (left out: only --select)")
    pools: tuple = flag((), "pools, NAME[@SPLIT][:PART,PART][*SHARE], or folders of images")
    data: str = flag("data", "data root; every pool lies below it")
    out: str = flag("pseudo/v1", "output folder")
    threshold: float = flag(0.99, "confidence that a pixel needs to keep its label")
    class_share: float = flag(0.0, "least share of a class to keep, by thresholds down to 0.5")
    temperature: float = flag(1.0, "softmax temperature")
    scales: tuple = flag((1.0,), "test-time scales, logits averaged")
    flip: bool = flag(False, "average with the mirrored image")
    tile: int = flag(0, "side of tiles, a multiple of 1024 (default: whole images)")
    precision: str = flag("auto", "auto is half on a GPU, fp32 on a CPU", choices=PRECISIONS)
    workers: int = flag(2, "loader processes of each process")
    select: int = flag(0, "images to choose from the manifest (default: all)", least=0)
    rule: str = flag("rare", "rare classes, or most kept pixels first", choices=("rare", "easiest"))
    min_kept: float = flag(0.2, "kept share below which --select leaves an image out")


LABELLING = ("threshold", "class_share", "temperature", "scales", "flip", "tile", "precision")


def pool_samples(config, classes):
    """{label below --out: sample} of all pools, thinned evenly, each image once, by name."""
    samples = {}
    for pool in config.pools:
        name, _, _, share = parse_name(pool, mark="")
        require((share <= 1, f"{pool}: a pool's weight is the share of its images, at most 1"))
        if name in DATASETS:
            found, _, known = gather(config.data, [pool], "train", labelled=False)
            require((known == classes, f"{pool}: not the checkpoint's classes; name the folder"))
        else:
            found = images_below(name, config.out)
        places = (np.arange(len(found)) / share).astype(int)       # 0.1: every tenth image
        for sample in (found[i] for i in places if i < len(found)):
            name = os.path.relpath(sample.image, config.data)
            other = samples.setdefault(str(Path(name).with_suffix(".png")), sample).image
            require((not name.startswith(os.pardir), f"{sample.image} is not below {config.data}"),
                    (other == sample.image, f"{sample.image} would share a label with {other}"))
    return dict(sorted(samples.items()))


def class_thresholds(models, samples, config, how):
    """(C,) thresholds: --threshold, lowered (to LOWEST at least) for classes that would keep less
    than --class-share of their pixels. They are read from histograms over SAMPLE images, spread
    evenly over the pools, for classes with FEWEST pixels there."""
    classes, device = models[0].num_classes, models[0].mean.device
    thresholds = torch.full((classes,), config.threshold)
    if not config.class_share:
        return thresholds
    chosen = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, SAMPLE).astype(int))]
    histogram = torch.zeros(classes, CELLS, dtype=torch.int64, device=device)
    for _, ids, below, *_ in predictions(models, chosen, damaged=[], **how):
        cell = (confidence(below, config.temperature) * CELLS).long().clamp(max=CELLS - 1)
        histogram += count((ids * CELLS + cell).flatten(), classes, CELLS)
    histogram = sum(all_gather(histogram.cpu()))
    pixels = histogram.sum(1, keepdim=True)
    above = histogram.flip(1).cumsum(1).flip(1).double() / pixels.clamp(min=1)
    edge = (above >= config.class_share).sum(1).sub(1).double() / CELLS     # with that share above
    lower = torch.minimum(thresholds, edge.clamp(min=LOWEST).float())
    return torch.where(pixels[:, 0] >= FEWEST, lower, thresholds)


def write_labels(models, samples, thresholds, config, how):
    """Write this process's labels of {label: sample}, and rows of them into a file of its own, so
    that a kill loses nothing. Returns the number of damaged images."""
    names, damaged, thresholds = [*samples], [], thresholds.to(models[0].mean.device)
    rows = Path(config.out) / f"rows-{os.urandom(8).hex()}.csv"              # of this start alone
    with open(rows, "w", newline="") as file:
        for at, ids, below, *_ in predictions(models, [*samples.values()], damaged=damaged, **how):
            name, sample = names[at], samples[names[at]]
            q = confidence(below, config.temperature)
            kept = q >= thresholds[ids]
            pixels = count(ids[kept], len(thresholds)).tolist()
            save_png(Image.fromarray(ids.masked_fill(~kept, IGNORE).byte().cpu().numpy()),
                     Path(config.out) / name, compress_level=3)
            share, mean = round(sum(pixels) / ids.numel(), 6), round(q.double().mean().item(), 6)
            image = os.path.relpath(sample.image, config.data)
            csv.writer(file).writerow([image, name, sample.dataset, share, mean, 1, *pixels])
            file.flush()
    return len(damaged)


def make_labels(config):
    """Write the labels, the settings and the manifest of --out."""
    rank, world, device = start_processes()
    models, state, digests = load_ensemble(config.checkpoint, device)
    out, classes = Path(config.out), state["classes"]
    samples = pool_samples(config, classes)
    look = {name: getattr(config, name) for name in ("precision", "scales", "flip", "tile")}
    how = dict(rank=rank, world=world, workers=config.workers, **look)
    about = {"classes": classes, "checkpoints": digests, "pools": config.pools,
             "images": len(samples), **{name: getattr(config, name) for name in LABELLING}}
    require(((out / "settings.json").exists() or not [*out.glob("[!.]*")],
             f"--out {out} holds other files, on which labels might fall; name a new folder"))
    lock = lock_folder(out, "**/.*.[0-9]*.tmp") if is_first() else None     # until we return
    about = keep_settings(out, about, lambda: {"class_thresholds": class_thresholds(
        models, [*samples.values()], config, how).tolist()})
    done = read_rows(out)
    left = {label: sample for label, sample in samples.items() if label not in done}
    all_gather(None)                                              # all have read before one writes
    say(f"{out}: {len(samples)} images of {' '.join(config.pools)}, {len(left)} to label")
    thresholds = torch.tensor(about["class_thresholds"])
    damaged = sum(all_gather(write_labels(models, left, thresholds, config, how)))
    if is_first():
        rows = read_rows(out)
        require((rows, f"{out}: no image could be labelled"))
        write_manifest(out, [*COLUMNS, *classes], rows.values())
        for path in out.glob("rows-*.csv"):
            path.unlink()
    say(f"{damaged} images were passed over")


# --- manifest and selection ---------------------------------------------------------------------

def read_rows(out):
    """{label: row with selected = 1} of the labels written so far: from the manifest, and from row
    files of starts that did not end. A row cut short by a kill is no row."""
    rows = {}
    for path in sorted(out.glob("rows-*.csv")):
        lines = path.read_text().splitlines(keepends=True)
        rows.update((row[1], row) for row in csv.reader(x for x in lines if x.endswith("\n")))
    if (out / "manifest.csv").exists():
        rows.update((row[1], [*row[:5], "1", *row[6:]]) for row in read_manifest(out)[1])
    return dict(sorted(rows.items()))


def read_manifest(out):
    """(header, rows) of a folder's manifest, all as text."""
    with open(Path(out) / "manifest.csv", newline="") as file:
        header, *rows = [*csv.reader(file)] or [[]]
    require((header[:len(COLUMNS)] == COLUMNS and {*map(len, rows)} == {len(header)},
             f"{out}/manifest.csv is damaged: expected rows of {COLUMNS} and classes"))
    return header, rows


def write_manifest(out, header, rows):
    """Write manifest.csv, whole or not at all."""
    with (whole_file(Path(out) / "manifest.csv") as temporary,
          open(temporary, "w", newline="") as file):
        csv.writer(file).writerows([header, *rows])


def select(rows, budget, rule, min_kept):
    """Set the column "selected" of the manifest's rows: `budget` images, shared over the pools in
    proportion to what is eligible, by score within a pool. Returns {pool: images chosen}.

    rare: for every class an image carries, with CARRIED pixels or more, it scores 1 / (images that
    carry the class), so what is hard to find elsewhere counts. easiest: the kept share. Ties go
    by the image's name."""
    kept = np.array([float(row[3]) for row in rows])
    carries = np.array([row[len(COLUMNS):] for row in rows], np.int64) >= CARRIED
    score = kept if rule == "easiest" else (carries / np.maximum(carries.sum(0), 1)).sum(1)
    eligible = [i for i in np.argsort(-score, kind="stable") if kept[i] >= min_kept]   # best first
    members = {pool: [] for pool in sorted({row[2] for row in rows})}
    for i in eligible:
        members[rows[i][2]].append(i)
    budget = min(budget, len(eligible))
    exact = {pool: budget * len(m) / max(len(eligible), 1) for pool, m in members.items()}
    quota = {pool: int(share) for pool, share in exact.items()}
    for pool in sorted(quota, key=lambda p: quota[p] - exact[p])[:budget - sum(quota.values())]:
        quota[pool] += 1                                          # largest remainders
    chosen = {i for pool, m in members.items() for i in m[:quota[pool]]}
    for i, row in enumerate(rows):
        row[5] = int(i in chosen)
    return quota


def main():
    given = parse_flags(Config, __doc__)
    config = Config(**given)
    late = [name for name in given if name in LABELLING and not config.checkpoint]
    shares = config.threshold, config.class_share, config.min_kept
    require((0 <= min(shares) <= max(shares) <= 1, f"shares lie in [0, 1], found {shares}"),
            (bool(config.checkpoint) == bool(config.pools) and (config.pools or config.select),
             "give --checkpoint and --pools to make labels, or --select alone to choose from them"),
            (not late, f"{late}: without --checkpoint only --select, --rule, --min-kept count"))
    if config.checkpoint:
        make_labels(config)
    if not is_first():
        return
    header, rows = read_manifest(config.out)
    kept = np.mean([float(row[3]) for row in rows])
    print(f"{config.out}: {len(rows)} labels, {100 * kept:.1f} % of an image kept on average")
    if config.select:
        quota = select(rows, config.select, config.rule, config.min_kept)
        require((any(quota.values()), "no image has --min-kept; lower it, or use --class-share"))
        write_manifest(config.out, header, rows)
        print(f"selected {sum(quota.values())} by rule {config.rule}: {quota}")


if __name__ == "__main__":
    run_main(main)
