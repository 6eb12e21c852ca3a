"""What lies on disk: the table of datasets, reading, augmentation, sampling, the demo streets.

    python data.py --data data          lists the sets found and looked for; exit status 2 and
                                        a line for each problem where something is wrong
    python data.py --all-files          opens every file
    python data.py --show 4             contact sheets of labelled splits, augmented crops included
    python data.py --make-demo          draws the demo streets into demo/
    python data.py --make-demo demo-2 --seed 2      other streets, into another data root

A data root holds a folder per set, unpacked as its authors ship it; nothing is renamed or
rewritten.
"""

# Here also live the few helpers that every script needs: flags from a dataclass, the one-line
# error, whole-file writing, progress.

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import filecmp
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import typing
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

# --- label spaces -------------------------------------------------------------------------------

IGNORE = 255
CLASSES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
           "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
           "motorcycle", "bicycle")
PALETTE = ((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
           (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
           (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
           (0, 80, 100), (0, 0, 230), (119, 11, 32))
CAMVID_CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence",
                  "car", "pedestrian", "bicyclist")
CAMVID_PALETTE = ((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222),
                  (128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0),
                  (0, 128, 192))
ADE20K_CLASSES = tuple(name.strip() for name in """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
    person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa,
    shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp,
    bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand,
    sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower,
    book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar,
    arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight,
    booth, television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman,
    bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
    swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
    food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen,
    blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen,
    plate, monitor, bulletin board, shower, radiator, glass, clock, flag""".split(","))
MEAN_COLOUR = (124, 116, 104)      # ImageNet mean, rounded: the colour of padding

# Label value on disk -> train id, by position. None in a row of DATASETS: train ids already.
# A value beyond its table is an error; 255 means "ignore" in every set.
CITYSCAPES_TABLE = (255, 255, 255, 255, 255, 255, 255, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5,
                    255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18,
                    255)   # 34: licence plate
VISTAS_TABLE = (255, 255, 1, 4, 4, 255, 3, 0, 0, 1, 0, 1, 0, 0, 0, 1, 2, 2, 2, 11, 12, 12, 12, 0, 0,
                255, 9, 10, 9, 9, 8, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
                255, 255, 5, 7, 5, 6, 255, 7, 255, 18, 255, 15, 13, 255, 17, 16, 255, 255, 14, 255,
                255, 255, 255)
VISTAS_CONSERVATIVE = (255, 255, 1, 4, 255, 255, 3, 255, 255, 255, 255, 255, 255, 0, 255, 1, 255, 2,
                       255, 11, 12, 12, 12, 255, 0, 255, 255, 10, 255, 9, 8, 255, 255, 255, 255,
                       255, 255, 255, 255, 255, 255, 0, 255, 255, 255, 5, 255, 5, 6, 255, 7, 255,
                       18, 255, 15, 13, 255, 17, 16, 255, 255, 14, 255, 255, 255, 255)
WILDDASH_TABLE = (255, 255, 255, 255, 255, 255, 255, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255,
                  6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255, 255, 16, 17, 18, 14, 13, 255, 255, 0,
                  255, 255, 0, 255, 0, 255, 5, 5, 12, 12, 12, 255, 255, 1, 255, 255, 255, 3, 255,
                  17, 255, 255, 0, 255, 255, 0, 1, 255, 255, 255, 255, 0, 255, 255, 255, 0, 0, 0, 1,
                  9, 0, 1)
CAMVID_TABLE = (*range(11), 255)
CAMVID_TO_19 = (10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 12, 255)
ADE20K_TABLE = (255, *range(150))


def generated_palette(count):
    """`count` distinct colours for label spaces that bring none: hues by the golden angle,
    five shades."""
    hue = (np.arange(count) * 0.618034 % 1)[:, None]
    shade = 255 - 35 * (np.arange(count) % 5)[:, None]
    wave = np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1   # red, green, blue over hue
    return tuple(tuple(int(c) for c in row) for row in (0.2 + 0.8 * np.clip(wave, 0, 1)) * shade)


# --- the table of datasets ----------------------------------------------------------------------

@dataclass(frozen=True)
class Layout:
    """Where the files of one unpacking lie, below the set's folder.

    "{split}" is the split's own name on disk. "*" stands for one name or part of one, ".*" at the
    end for .png, .jpg or .jpeg. The stars of an image fill the stars of its label, invalid mask and
    reference in order, which is the whole pairing rule.
    """
    image: str
    label: str | None = None
    invalid: str | None = None      # 255 x (H, W): 1 where annotators could not recognise the pixel
    reference: str | None = None    # same place in clear weather, to look at
    segments: str | None = None     # COCO panoptic json: label = R + 256 G + 65536 B -> category


@dataclass(frozen=True)
class Dataset:
    """A row of DATASETS. Adding a set is adding a row."""
    folder: str                      # below the data root
    layouts: tuple                   # tried in order
    about: str = ""
    splits: dict = field(default_factory=lambda: {"train": "train", "val": "val", "test": "test"})
    unlabelled: tuple = ("test",)    # splits whose labels do not exist or are dummies
    table: tuple | None = None
    classes: tuple | None = CLASSES  # None: one name per line in classes.txt of the folder
    palette: tuple | None = PALETTE
    condition: typing.Callable = lambda stars: "clear"        # from the stars of an image
    skip: str = r"(?!)"             # images to leave out, by regular expression on the path
    stride: int = 1                 # take every n-th image (consecutive video frames)
    leaks_into: str | None = None   # drop images whose stem is in train or val of that set
    role: str = "annotated"         # "annotated": part of the default training mix; "named"; "pool"


def acdc_layout(images, labels):
    """One unpacking of ACDC, by where its images and its labels lie."""
    return Layout(images + "/*/{split}/*/*_rgb_anon.png",
                  labels + "/*/{split}/*/*_gt_labelTrainIds.png",
                  labels + "/*/{split}/*/*_gt_invIds.png",
                  images + "/*/{split}_ref/*/*_rgb_ref_anon.png")


def camvid(table, classes, palette, about):
    """A row for CamVid in the label space of `table`; its drives are day or dusk."""
    drives = {"0001TP": "dusk", "0006R0": "day", "0016E5": "day"}
    return Dataset("camvid", (Layout("{split}/*.*", "{split}annot/*.png"),), about, unlabelled=(),
                   table=table, classes=classes, palette=palette, role="named",
                   condition=lambda stars: drives.get(stars[0].split("_")[0], "day"))


CITYSCAPES = Layout("leftImg8bit/{split}/*/*_leftImg8bit.png",
                    "gtFine/{split}/*/*_gtFine_labelIds.png")
COARSE = Layout("leftImg8bit/{split}/*/*_leftImg8bit.png",
                "gtCoarse/{split}/*/*_gtCoarse_labelIds.png")
VISTAS_LAYOUTS = (Layout("{split}/images/*.jpg", "{split}/v1.2/labels/*.png"),
                  Layout("{split}/images/*.jpg", "{split}/labels/*.png"))
TRAINING = {"train": "training", "val": "validation", "test": "testing"}
DATASETS = {
    "cityscapes": Dataset("cityscapes", (CITYSCAPES,), "fine annotations", table=CITYSCAPES_TABLE),
    "cityscapes_coarse": Dataset(
        "cityscapes", (COARSE,), "coarse annotations of train_extra", {"train": "train_extra"}, (),
        CITYSCAPES_TABLE, skip="troisdorf_000000_000073", role="named"),
    "vistas": Dataset(
        "vistas", VISTAS_LAYOUTS, "Mapillary Vistas v1.2, also inside the v2.0 download", TRAINING,
        table=VISTAS_TABLE),
    "vistas_conservative": Dataset(
        "vistas", VISTAS_LAYOUTS, "the same, mapped as in domain generalisation: stricter",
        TRAINING, table=VISTAS_CONSERVATIVE, role="named"),
    "bdd100k": Dataset(
        "bdd100k", (Layout("images/10k/{split}/*.jpg", "labels/sem_seg/masks/{split}/*.png"),
                    Layout("seg/images/{split}/*.jpg", "seg/labels/{split}/*_train_id.png")),
        "BDD100K 10K"),
    "wilddash": Dataset(
        "wilddash", (Layout("images/*.jpg", "panoptic/*.png", segments="panoptic.json"),
                     Layout("images/*.jpg", "labels/*.png")),
        "WildDash2, beta or final; all of it trains", {"train": ""}, (), WILDDASH_TABLE),
    "acdc": Dataset(
        "acdc", (acdc_layout("rgb_anon", "gt"),
                 acdc_layout("rgb_anon_trainvaltest/rgb_anon", "gt_trainval/gt")),
        "Adverse Conditions Dataset with Correspondences", condition=lambda stars: stars[0]),
    "camvid": camvid(CAMVID_TABLE, CAMVID_CLASSES, CAMVID_PALETTE,
                     "SegNet copy, 11 classes of its own"),
    "camvid_19": camvid(CAMVID_TO_19, CLASSES, PALETTE, "the same, mapped to the 19 classes"),
    # The frames at dusk among CamVid's training images, twice: as a pool, whose labels are never
    # read, and as a set to validate on. Their conditions are the two halves, every second frame.
    "camvid_dusk": dataclasses.replace(
        camvid(CAMVID_TABLE, CAMVID_CLASSES, CAMVID_PALETTE,
               "the drive at dusk in CamVid's train: a pool, and a set to validate on"),
        splits={"train": "train", "val": "train"}, unlabelled=("train",),
        skip=r"/(?!0001TP_f?\d+\.)[^/]*$",
        condition=lambda stars: ("even", "odd")[int(stars[0].split("_")[1].lstrip("f")) // 30 % 2]),
    "ade20k": Dataset(
        "ADEChallengeData2016", (Layout("images/{split}/*.jpg", "annotations/{split}/*.png"),),
        "ADE20K, 150 classes", {"train": "training", "val": "validation"}, (), ADE20K_TABLE,
        ADE20K_CLASSES, generated_palette(150), lambda stars: "all", role="named"),
    "custom": Dataset(
        "custom", (Layout("images/{split}/*.*", "labels/{split}/*.png"),),
        "your own: train ids, class names in classes.txt", classes=None, palette=None,
        condition=lambda stars: "all", role="named"),
    "dark_zurich": Dataset(
        "dark_zurich", (Layout("rgb_anon/{split}/*/*/*_rgb_anon.png",
                               "gt/{split}/*/*/*_gt_labelTrainIds.png",
                               "gt/{split}/*/*/*_gt_invIds.png"),),
        "day, twilight, night; labels for val only", unlabelled=("train", "test"), role="pool",
        condition=lambda stars: stars[0]),
    "cadc": Dataset(
        "cadc", (Layout("cadcd/*/*/labeled/image_00/data/*.png"),), "front camera",
        {"train": ""}, ("train",), role="pool", condition=lambda stars: "snow"),
    "cadc_all": Dataset(
        "cadc", (Layout("cadcd/*/*/labeled/image_0*/data/*.png"),), "all eight cameras",
        {"train": ""}, ("train",), role="pool", condition=lambda stars: "snow"),
    "nightowls": Dataset(
        "nightowls", (Layout("{split}/*.png"),), "every 30th frame",
        {"train": "nightowls_training", "val": "nightowls_validation"}, ("train", "val"),
        role="pool", condition=lambda stars: "night", stride=30),
    "nightcity": Dataset(
        "nightcity", (Layout("NightCity-images/images/{split}/*.png",
                             "NightCity-label/label/{split}/*_labelIds.png"),
                      Layout("images/{split}/*.png", "label/{split}/*_labelIds.png")),
        "a pool in the deck; its labels may be trained on by name", table=CITYSCAPES_TABLE,
        role="pool", condition=lambda stars: "night"),
    "stf": Dataset(
        "stf", (Layout("cam_stereo_left_lut/*.png"),), "Seeing Through Fog", {"train": ""},
        ("train",), role="pool"),
    "bdd100k_100k": Dataset(
        "bdd100k", (Layout("images/100k/{split}/*.jpg"),), "without the images of BDD100K 10K",
        unlabelled=("train", "val", "test"), role="pool", leaks_into="bdd100k"),
}


class Sample(typing.NamedTuple):
    """One image and what belongs to it. Paths are strings or None."""
    image: str
    label: str | None
    invalid: str | None
    reference: str | None
    dataset: str
    condition: str
    segments: tuple | None = None    # ((segment id, category), ...) of a panoptic label


def parse_spec(spec):
    """"name:a,b*2" -> ("name", ("a", "b"), 2.0): a set, the parts of it to keep,
    its weight in the mix.

    A name may also be a folder of pseudolabels (one with a manifest.csv), taken whole.
    """
    name, star, weight = spec.rpartition("*") if "*" in spec else (spec, "", "1")
    name, _, only = name.partition(":")
    if name not in DATASETS and not (Path(name) / MANIFEST).is_file():
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(DATASETS)}, and folders of "
                         f"pseudolabels, which hold a {MANIFEST}")
    if name not in DATASETS and only:
        raise ValueError(f"{spec!r}: a folder of pseudolabels is taken whole; `python "
                         f"pseudolabel.py --out {name} --select N` chooses from it")
    try:
        weight = float(weight)
    except ValueError:
        weight = 0.0
    if not 0 < weight <= 1000:
        raise ValueError(f"{spec!r}: expected a weight between 0 and 1000 behind the star")
    return name, tuple(part for part in only.split(",") if part), weight


def match(folder, pattern):
    """{stars: path} of the files below `folder` that fit a pattern of Layout, sorted."""
    extension = pattern.endswith(".*")
    regex = re.escape(pattern[:-2] if extension else pattern).replace(r"\*", "([^/]+)")
    regex = re.compile(regex + (r"\.(?i:png|jpg|jpeg)" if extension else ""))
    found = {}
    for path in sorted(Path(folder).glob(pattern)) if pattern else ():
        hit = regex.fullmatch(path.relative_to(folder).as_posix())
        if hit and not path.name.startswith("."):
            if hit.groups() in found:
                raise ValueError(f"two files for one image: {found[hit.groups()]} and {path}; "
                                 "remove one")
            found[hit.groups()] = str(path)
    return found


def scan(root, name, split):
    """(layout, {"image" | "label" | "invalid" | "reference": {stars: path}}) of one split on disk.

    The layout is the first with images, one with labels before one without;
    None where nothing is found.
    """
    row = DATASETS[name]
    folder, best = Path(root) / row.folder, (None, {})
    for layout in row.layouts if split in row.splits and folder.is_dir() else ():
        parts = {kind: match(folder, (getattr(layout, kind) or "").format(split=row.splits[split]))
                 for kind in ("image", "label", "invalid", "reference")}
        if parts["image"] and (best[0] is None or parts["label"] and not best[1]["label"]):
            best = layout, parts
    return best


def find_samples(root, name, split, only=(), labelled=None, strict=True):
    """Samples of one split, sorted by path; [] where nothing of the set is there.

    only: keep images with a condition, a folder, or a beginning of the file name up to "_", among
    these (Cityscapes: cities; ACDC: conditions or sequences; CamVid: drives). labelled: True asks
    a label for every image, False takes none, None reads them where the split has them.
    strict=False lets images without label pass. Raises ValueError.
    """
    if name not in DATASETS:
        return pseudo_samples(root, name) if split == "train" else []
    row = DATASETS[name]
    if labelled and split in row.unlabelled:
        raise ValueError(f"{name} has no labels for its split {split!r}")
    layout, parts = scan(root, name, split)
    if layout is None:
        return []
    has_labels = split not in row.unlabelled if labelled is None else labelled
    segments = (read_segments(Path(root) / row.folder / layout.segments)
                if has_labels and layout.segments else None)
    leaks = {Path(image).stem for other in ("train", "val") if row.leaks_into
             for image in scan(root, row.leaks_into, other)[1].get("image", {}).values()}
    images = {stars: image for stars, image in parts["image"].items()
              if not re.search(row.skip, image) and Path(image).stem not in leaks}
    samples = []
    for stars, image in images.items():
        if only and not any(belongs(word, row, stars, image) for word in only):
            continue
        label = parts["label"].get(stars) if has_labels else None
        if label and segments is not None and Path(label).name not in segments:
            raise ValueError(f"{label} is not described in "
                             f"{Path(root) / row.folder / layout.segments}; fetch both anew")
        samples.append(Sample(image, label, parts["invalid"].get(stars) if label else None,
                              parts["reference"].get(stars), name, row.condition(stars),
                              segments[Path(label).name] if label and segments else None))
    missing = [sample.image for sample in samples if sample.label is None]
    if has_labels and strict and missing:
        expected = (layout.label or "").format(split=row.splits[split])
        raise ValueError(f"{len(missing)} of {len(samples)} images of {name} {split} have no "
                         f"label, first {missing[0]}; expected {Path(root) / row.folder / expected}"
                         "; --train and --val name other sets")
    unmatched = [word for word in only
                 if not any(belongs(word, row, stars, image) for stars, image in images.items())]
    if unmatched:
        raise ValueError(f"{name} {split} has nothing of {', '.join(unmatched)}; `python data.py "
                         f"--data {root}` lists what there is")
    return samples[::row.stride]


def belongs(word, row, stars, image):
    """Whether an image is of the part `word` of its set: a folder, a condition,
    or the name's beginning up to "_"."""
    return (word in stars or Path(image).name.startswith(word + "_")
            or word == row.condition(stars))


# Of a folder of pseudolabels: a row per label, first columns image, label; how they were made.
MANIFEST, SETTINGS = "manifest.csv", "settings.json"


def pseudo_samples(root, folder):
    """Samples of a folder of pseudolabels: manifest.csv names images below the data root and
    labels, train ids, below the folder. Where it has a column "selected", rows without a 1 there
    are left out."""
    path = Path(folder) / MANIFEST
    samples = []
    with parsed(path), open(path, newline="", encoding="utf-8-sig",
                            errors="surrogateescape") as file:
        rows = csv.DictReader(file)
        if not {"image", "label"} <= set(rows.fieldnames or ()):
            raise ValueError("expected columns image and label, found "
                             f"{', '.join(rows.fieldnames or ())[:200]!a}")
        for number, row in enumerate(rows, 2):
            names = row["image"], row["label"]
            if None in row or not all(names) or any(
                    Path(n).is_absolute() or ".." in Path(n).parts for n in names):
                raise ValueError(f"line {number}: image and label must be paths below "
                                 f"{root} and {folder}")
            if row.get("selected", "1") == "1":
                samples.append(Sample(str(Path(root) / names[0]), str(Path(folder) / names[1]),
                                      None, None, str(folder), "pseudo"))
    return samples


def pseudo_classes(folder):
    """Class names that settings.json of a folder of pseudolabels states. Raises
    FileNotFoundError or ValueError."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it says which classes the labels have; "
                                "pseudolabel.py writes it")
    with parsed(path):
        content = json.loads(path.read_text())
        classes = content.get("classes") if isinstance(content, dict) else None
        if not classes or not all(isinstance(name, str) for name in classes):
            raise ValueError("it does not say which classes the labels have")
    return tuple(classes)


def gather(root, specs, split, labelled=None):
    """Samples of several specs (see parse_spec), which must exist and share their classes."""
    return [sample for group in gather_groups(root, specs, split, labelled) for sample in group]


def gather_groups(root, specs, split, labelled=None):
    """The samples of each spec."""
    groups, spaces = [], {}
    for spec in specs:
        name, only, _ = parse_spec(spec)
        row = DATASETS.get(name)
        if row and split not in row.splits:
            raise ValueError(f"{name} has no split {split!r}; there is {', '.join(row.splits)}")
        groups.append(find_samples(root, name, split, only, labelled))
        if not groups[-1]:
            if not row:
                raise ValueError(f"{name}/{MANIFEST} has no selected row; `python pseudolabel.py "
                                 f"--out {name} --select N` chooses some")
            looked = Path(root) / row.folder / row.layouts[0].image.format(split=row.splits[split])
            raise ValueError(f"no {split} images of {name}: looked for {looked}. Put the set "
                             "there, or name the data root with --data")
        spaces.setdefault(classes_of(root, name), name)
    twice = [image for image, count in Counter(s.image for group in groups for s in group).items()
             if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} and {len(twice) - 1} more images are named twice in "
                         f"{' '.join(specs)}; to weigh a set write NAME*WEIGHT")
    if len(spaces) > 1:
        raise ValueError(f"{' and '.join(spaces.values())} have different classes and cannot be "
                         "mixed; camvid_19 is CamVid in the 19 classes")
    return groups


def classes_of(root, name):
    """Class names of a set. For custom sets: the lines of classes.txt; for a folder of
    pseudolabels: those of the network that made them."""
    if name not in DATASETS:
        return pseudo_classes(name)
    row = DATASETS[name]
    if row.classes is not None:
        return row.classes
    path = Path(root) / row.folder / "classes.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: write one class name per line, in the order "
                                "of the ids")
    with parsed(path):
        lines = path.read_text("utf-8-sig").splitlines()
        classes = tuple(line.strip() for line in lines if line.strip())
        if not 2 <= len(classes) <= 255:
            raise ValueError(f"it has {len(classes)} class names; expected 2 to 255")
        if len(set(classes)) < len(classes):
            raise ValueError("a class name stands in it twice")
    return classes


def palette_of(classes):
    """Colours of a label space: the published ones where there are any."""
    known = {row.classes: row.palette for row in DATASETS.values()}
    return known.get(tuple(classes)) or generated_palette(len(classes))


def annotated(root, split):
    """Names of the sets of the default mix that have images of this split below `root`; whoever
    gathers them finds out where their labels lack."""
    return [name for name, row in DATASETS.items()
            if row.role == "annotated" and split not in row.unlabelled
            and scan(root, name, split)[0]]


def read_segments(path):
    """Panoptic json -> {png name: ((segment id, category), ...)}."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; it belongs to the panoptic labels beside it")
    with parsed(path):
        content = json.loads(Path(path).read_text())
        segments = {item["file_name"]: tuple((s["id"], s["category_id"])
                                             for s in item["segments_info"])
                    for item in content["annotations"]}
        for number, category in (pair for pairs in segments.values() for pair in pairs):
            if not (isinstance(number, int) and 0 <= number < 2 ** 24
                    and isinstance(category, int) and 0 <= category <= 255):
                raise ValueError(f"segment {number!r} of category {category!r}; expected an id "
                                 "below 2^24 and a category in 0..255")
    return segments


# --- reading ------------------------------------------------------------------------------------

MOST_PIXELS = 2 ** 26            # no set's photo has above 24 million; this many fit into 1 GB
Image.MAX_IMAGE_PIXELS = None    # Pillow's own bound, which warns before it refuses


@contextlib.contextmanager
def opened(path, modes):
    """A Pillow image of one of these modes. Whatever is wrong becomes a ValueError that names
    the file."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):     # a pipe would be waited for
            raise ValueError("it is no file")
        with Image.open(path, formats=("PNG", "JPEG")) as image:   # Pillow knows stranger ones
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is more than "
                                 f"{MOST_PIXELS / 1e6:.0f} megapixels")
            if image.mode not in modes:
                raise ValueError(f"mode {image.mode}, expected {' or '.join(modes)}")
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing (a dangling link?)") from None
    except (OSError, SyntaxError, ValueError) as error:   # SyntaxError: of a broken PNG chunk
        raise ValueError(f"{path} cannot be read: {error}; replace or remove it") from None


# 8 bits a channel: all of them to RGB
IMAGE_MODES = ("RGB", "L", "P", "RGBA", "LA", "CMYK", "YCbCr")
LABEL_MODES = ("L", "P")                                        # P: the index is the label


def read_image(path, zoom=1.0):
    """RGB Pillow image in raw pixel order (EXIF rotation is left alone, as labels know none),
    native size.

    With zoom <= 1/2 a JPEG is decoded at the smallest of 1/2, 1/4, 1/8 that is not below zoom:
    returns (image, (native width, native height)).
    """
    with opened(path, IMAGE_MODES) as image:
        native = image.size
        if image.format == "JPEG" and zoom <= 0.5:
            image.draft("RGB", (max(1, int(native[0] * zoom)), max(1, int(native[1] * zoom))))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB"), native


@functools.lru_cache
def lookup(dataset, classes):
    """(table, known): 256 bytes that translate a label value to a train id;
    the values that have a meaning."""
    values = dataset in DATASETS and DATASETS[dataset].table or range(classes)
    return bytes(values).ljust(256, bytes([IGNORE])), bytes({*range(len(values)), IGNORE})


def to_train_ids(values, sample, classes):
    """(H, W) uint8 label values of a file -> (H, W) uint8 train ids.
    Raises ValueError for unknown values."""
    table, known = lookup(sample.dataset, classes)
    raw = values.tobytes()                                   # bytes.translate: a byte a step, in C
    if strange := raw.translate(None, known):
        raise ValueError(f"{sample.label}: label values {sorted(set(strange))[:8]} have no meaning "
                         f"in {sample.dataset}; expected 0..{len(known) - 2} or {IGNORE}")
    return np.frombuffer(bytearray(raw.translate(table)), np.uint8).reshape(values.shape)


def open_label(sample):
    """Pillow image of label values, 8 bit, native size."""
    if sample.segments is None:
        with opened(sample.label, LABEL_MODES) as image:
            image.load()
            return image
    with opened(sample.label, ("RGB",)) as image:
        segment = np.asarray(image).astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    category_of = np.zeros(2 ** 24, np.uint8)             # outside every segment: 0, unlabelled
    for number, category in sample.segments:
        category_of[number] = category
    return Image.fromarray(category_of[segment])


def check_size(sample, native, other, path):
    """Raise ValueError unless the file at `path` is as large as its image."""
    if other != native:
        raise ValueError(f"{path} is {other[0]}x{other[1]}, its image {sample.image} "
                         f"{native[0]}x{native[1]}; they do not belong together")


def read_sample(sample, classes):
    """Image (3, H, W) uint8, train ids (H, W) uint8 or None, invalid (H, W) bool or None; numpy."""
    image, native = read_image(sample.image)
    pixels = np.asarray(image).transpose(2, 0, 1)
    if sample.label is None:
        return pixels, None, None
    label = open_label(sample)
    check_size(sample, native, label.size, sample.label)
    ids = to_train_ids(np.asarray(label), sample, classes)
    if sample.invalid is None:
        return pixels, ids, None
    with opened(sample.invalid, LABEL_MODES) as mask:
        invalid = np.asarray(mask)
    check_size(sample, native, invalid.shape[::-1], sample.invalid)
    if invalid.max() > 1:
        raise ValueError(f"{sample.invalid}: values up to {invalid.max()}; expected 0 (valid) "
                         "and 1 (invalid)")
    return pixels, ids, invalid.astype(bool)


# --- augmentation -------------------------------------------------------------------------------

LARGEST_SHORT_SIDE = 1080    # larger photos are brought to this first (Vistas: up to 24 megapixels)


def augment(sample, classes, rng, crop, zoom=(0.5, 2.0), wanted=None, jitter=0.0):
    """Random zoom, crop and flip of one sample (deck, appendix).

    Returns image (crop, crop, 3) uint8 and train ids (crop, crop) uint8, padded right and below,
    before the flip, with the mean colour and IGNORE. Only the crop is interpolated: resize(box=...)
    equals resizing everything and cropping. wanted: a train id that the crop shall contain, if the
    image does.
    jitter: brightness, contrast and saturation are scaled by factors in [1 - jitter, 1 + jitter].
    All randomness is `rng`'s.
    """
    label = open_label(sample)
    width, height = label.size
    factor = rng.uniform(*zoom) * min(1.0, LARGEST_SHORT_SIDE / min(width, height))
    scaled = max(1, round(width * factor)), max(1, round(height * factor))
    size = min(crop, scaled[0]), min(crop, scaled[1])
    room = scaled[0] - size[0], scaled[1] - size[1]        # where the crop's corner may lie
    corner = rng.integers(room[0] + 1), rng.integers(room[1] + 1)
    flip = rng.random() < 0.5
    if wanted is not None:
        corner = corner_near(wanted, label, sample, classes, rng, scaled, size, room) or corner

    image, native = read_image(sample.image, factor)
    check_size(sample, native, label.size, sample.label)

    def cut(source, filter, padding):                      # the crop, from a source of any size
        reduced = -(-width // source.size[0])    # its last pixel may cover less than this many
        x, y = width / reduced / scaled[0], height / reduced / scaled[1]
        part = source.resize(size, filter, (corner[0] * x, corner[1] * y,
                                            (corner[0] + size[0]) * x, (corner[1] + size[1]) * y))
        if jitter and part.mode == "RGB":
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                part = enhance(part).enhance(rng.uniform(1 - jitter, 1 + jitter))
        if size != (crop, crop):
            whole = Image.new(part.mode, (crop, crop), padding)
            whole.paste(part)
            part = whole
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part

    pixels = cut(image, Image.Resampling.BILINEAR, MEAN_COLOUR)
    values = cut(label, Image.Resampling.NEAREST, IGNORE)
    return np.array(pixels), to_train_ids(np.asarray(values), sample, classes)


def blank(crop):
    """A crop of nothing: mean colour (crop, crop, 3) and IGNORE (crop, crop), uint8."""
    return np.full((crop, crop, 3), MEAN_COLOUR, np.uint8), np.full((crop, crop), IGNORE, np.uint8)


def corner_near(wanted, label, sample, classes, rng, scaled, size, room):
    """Corner of a crop that holds a random pixel of class `wanted`;
    None where the label has none."""
    found = np.flatnonzero(to_train_ids(np.asarray(label), sample, classes) == wanted)
    if not len(found):
        return None
    y, x = divmod(int(found[rng.integers(len(found))]), label.size[0])
    centre = int((x + 0.5) * scaled[0] / label.size[0]), int((y + 0.5) * scaled[1] / label.size[1])
    return tuple(int(np.clip(c - rng.integers(s), 0, most))
                 for c, s, most in zip(centre, size, room))


# --- sampling -----------------------------------------------------------------------------------

class TrainSet(torch.utils.data.Dataset):
    """Augmented samples. A key is (epoch, position in the epoch, index of the sample, class to show
    or -1), so an item is a function of (seed, key) alone, whichever worker makes it.

    Items are (image (H, W, 3) uint8, ids (H, W) uint8, None or (path, error)). A file that cannot
    be read gives a blank crop and the message, for the training loop to raise or to count: an
    exception inside a worker would come out wrapped in a traceback.
    """

    def __init__(self, samples, classes, crop, zoom, seed, jitter=0.0):
        self.samples, self.classes, self.crop, self.zoom = samples, classes, crop, zoom
        self.seed, self.jitter = seed, jitter

    def __getitem__(self, key):
        epoch, position, index, wanted = key
        rng = np.random.default_rng((self.seed, epoch, position))
        try:
            item = augment(self.samples[index], self.classes, rng, self.crop, self.zoom,
                           None if wanted < 0 else wanted, self.jitter)
            error = None
        except (ValueError, OSError) as problem:
            item, error = blank(self.crop), (self.samples[index].image, str(problem))
        return *map(torch.from_numpy, item), error


class EvalSet(torch.utils.data.Dataset):
    """Whole samples: (index, image uint8, ids uint8 or None, invalid bool or None),
    or (index, error)."""

    def __init__(self, samples, classes):
        self.samples, self.classes = samples, classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        try:
            parts = read_sample(self.samples[index], self.classes)
        except (ValueError, OSError) as error:
            return index, str(error)
        return index, *(None if part is None else torch.from_numpy(np.array(part))
                        for part in parts)


def ignore_sigterm(worker):
    """For loader workers: torchrun sends SIGTERM to them too,
    while their process still has a step to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def collate(items):
    """Batch of TrainSet items: images (B, 3, H, W) in channels-last memory,
    ids (B, H, W), [(path, error)]."""
    images, ids, errors = zip(*items)
    return torch.stack(images).permute(0, 3, 1, 2), torch.stack(ids), [
        e for e in errors if e is not None]


def epoch_order(weights, length, seed, epoch):
    """`length` indices for one epoch: every sample as often as its weight says, shuffled,
    cut or repeated.

    weights: (N,) float; the fraction of a weight is the chance of one more turn.
    """
    rng = np.random.default_rng((seed, epoch, 2 ** 31))   # no sample of the epoch has this position
    weights = np.asarray(weights, float)
    turns = np.floor(weights).astype(int) + (rng.random(len(weights)) < weights % 1)
    indices = np.repeat(np.arange(len(weights)), turns)
    if not len(indices):
        indices = np.arange(len(weights))
    rounds = [rng.permutation(indices) for _ in range(-(-length // len(indices)))]
    return np.concatenate(rounds)[:length]


def even_classes(order, weights, counts, share, seed, epoch):
    """Replace a share of an epoch's indices so that classes come up evenly there; among the images
    that show a class, one comes as often as its weight says.

    weights: (N,). counts: (N, C) pixels of each class in each image, not all 0. Returns (indices,
    class to show or -1).
    """
    rng = np.random.default_rng((seed, epoch, 2 ** 31 + 1))
    order, wanted = order.copy(), np.full(len(order), -1)
    # Of each class: the weight of its images up to and with each one.
    ends = {c: np.cumsum(weights * (counts[:, c] > 0)) for c in range(counts.shape[1])
            if counts[:, c].any()}
    chosen = np.flatnonzero(rng.random(len(order)) < share)
    kinds = np.resize(rng.permutation(list(ends)), len(chosen))           # as many of each
    for position, c in zip(chosen, rng.permutation(kinds)):
        order[position] = np.searchsorted(ends[c], rng.uniform(0, ends[c][-1]), "right")
        wanted[position] = c
    return order, wanted


class CountSet(EvalSet):
    """(index, pixels of each class (C,) int64) or (index, error), for class_counts."""

    def __getitem__(self, index):
        sample = self.samples[index]
        try:
            ids = to_train_ids(np.asarray(open_label(sample)), sample, self.classes)
        except (ValueError, OSError) as error:
            return index, str(error)
        return index, np.bincount(ids.ravel(), minlength=256)[:self.classes]


def class_counts(samples, classes, workers=0, folder="runs"):
    """(N, C) int64 pixels of each class in each label, counted once and kept in `folder`.

    The file's name is a digest of every label's path, size, time and meaning, so changed labels are
    counted anew. A label that cannot be read counts nothing here; training names it when it meets
    it. Raises ValueError where nothing could be counted.
    """
    digest = hashlib.blake2b(str(classes).encode(), digest_size=8)
    for sample in samples:
        with contextlib.suppress(OSError):
            status = os.stat(sample.label)
            digest.update(f"{sample.label}|{status.st_size}|{status.st_mtime_ns}|{sample.segments}|"
                          f"{lookup(sample.dataset, classes)[0].hex()}\n".encode())
    path = Path(folder) / f".class-counts-{digest.hexdigest()}.npy"
    with contextlib.suppress(Exception):       # whatever is wrong with it, it is made anew below
        counts = np.load(path, mmap_mode="r", allow_pickle=False)    # allocates what is there
        if counts.shape == (len(samples), classes) and counts.dtype == np.int64:
            return np.array(counts)
    counts, errors = np.zeros((len(samples), classes), np.int64), []
    progress = Progress(len(samples), "classes counted in label")
    for index, row in torch.utils.data.DataLoader(CountSet(samples, classes), batch_size=None,
                                                  num_workers=workers):
        if isinstance(row, str):
            errors.append(row)
        else:
            counts[index] = row
        progress.update()
    if not counts.any():
        raise ValueError(errors[0] if errors else f"not one labelled pixel in {len(samples)} "
                         f"labels, first {samples[0].label}")
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, counts)
    return counts


def step_keys(weights, batch, steps_per_epoch, first, last, seed, rank=0, world=1, counts=None,
                uniform=0.0):
    """Keys of TrainSet, one list per optimizer step, for one process of `world`.

    The global batch of a step is the same for any world; process `rank` takes its contiguous share.
    weights: (N,), see epoch_order. counts, uniform: see even_classes; counts None leaves them out.
    """
    share, epoch = batch // world, None
    for step in range(first, last):
        if epoch != step // steps_per_epoch:
            epoch = step // steps_per_epoch
            order = epoch_order(weights, steps_per_epoch * batch, seed, epoch)
            wanted = np.full(len(order), -1)
            if counts is not None:
                order, wanted = even_classes(order, weights, counts, uniform, seed, epoch)
        start = step % steps_per_epoch * batch + rank * share
        yield [(epoch, position, int(order[position]), int(wanted[position]))
               for position in range(start, start + share)]


# --- pictures -----------------------------------------------------------------------------------

def colour(ids, palette=PALETTE):
    """Train ids (H, W), tensor or array -> RGB Pillow image; IGNORE is black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(palette)] = palette
    return Image.fromarray(table[np.asarray(ids, dtype=np.uint8)])


# --- helpers of every script --------------------------------------------------------------------

def flag(default, help, **more):
    """A dataclass field that becomes a flag: `more` goes to argparse (choices, metavar, type)."""
    return field(default=default, metadata={"help": help, **more})


class Parser(argparse.ArgumentParser):
    """argparse, with our one-line error instead of the usage text."""

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def parse_flags(config, about, argv=None):
    """{name: value} of the flags given on the command line;
    the fields of dataclass `config` are the flags.

    Flags that were not given are absent, so that a caller can lay them over other defaults.
    """
    parser = Parser(description=about, usage="%(prog)s [--flag value ...]", allow_abbrev=False,
                    argument_default=argparse.SUPPRESS,
                    formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                        prog, max_help_position=30, width=110))
    for item in dataclasses.fields(config):
        more = dict(item.metadata)
        shown = item.default
        if isinstance(item.default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif isinstance(item.default, tuple):
            more.setdefault("nargs", "+")
            more.setdefault("type", type(item.default[0]) if item.default else str)
            shown = " ".join(map(str, item.default)) or None
        else:
            more.setdefault("type", str if item.default is None else type(item.default))
        if "choices" in more:
            more.setdefault("metavar", "NAME")
            more["help"] += f": {', '.join(more['choices'])}"
        elif "action" not in more:
            more.setdefault("metavar", {int: "N", float: "X"}.get(more["type"], "NAME"))
        if not (shown is None or shown is False or shown == "") and "default" not in more["help"]:
            more["help"] += f" (default: {shown})"
        parser.add_argument("--" + item.name.replace("_", "-"), **more)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"--{name.replace('_', '-')} must be a finite number, "
                                 f"found {number}")
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()}


def is_first():
    """Whether this process is rank 0, or alone."""
    return os.environ.get("RANK", "0") == "0"


def say(text):
    """Print on rank 0."""
    if is_first():
        print(text, flush=True)


def run_main(main):
    """Run a script's main. A user's mistake (ValueError, OSError) ends in
    one line and exit status 2.

    Under torchrun every process usually finds the same mistake: rank 0 speaks first and torchrun
    ends the others; a process that alone found one speaks after two seconds.
    """
    name, rank = Path(sys.argv[0]).name, os.environ.get("RANK", "0")
    memory = "Where memory ran out, lower --workers. The same command continues"
    def unread(text=""):
        """Whether nobody reads our output any more; the rest of it then goes nowhere."""
        try:
            print(text, end="", flush=True)
            return False
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return True
    try:
        main()
        unread()
    except (ConnectionError, EOFError) as error:     # a loader worker ended while it handed over
        if unread("\n"):
            sys.exit(1)
        sys.exit(f"{name}: rank {rank} stops: a process that it read from ended ({error!r}), "
                 f"a DataLoader worker most likely. {memory}")
    except (ValueError, OSError) as error:
        if not is_first():
            time.sleep(2)
        unread()
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except RuntimeError as error:
        if "by peer" in str(error):                  # gloo's words when another process has ended
            message = f"rank {rank} stops, as another process ended"
        elif re.search("DataLoader worker|process pool", str(error)):   # torch's, and Python's
            message = f"rank {rank} stops: {str(error).splitlines()[0]} {memory}"
        else:
            raise
        print(f"{name}: {message}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def parsed(path):
    """Whatever is wrong with a file of text that is parsed inside becomes a ValueError that
    names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
            csv.Error) as error:
        found = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} cannot be used: {found}; mend or remove it") from None


@contextlib.contextmanager
def writing(path):
    """Whatever goes wrong inside becomes one OSError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save hides the disk's error behind a RuntimeError of its own
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"{path} cannot be written: {cause.strerror or cause}; the same command goes "
                      "on once it can, or name another folder. What was written before is whole"
                      ) from None


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path beside `path` and rename it there at the end: whole, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def hold(folder, rank):
    """Lock an output folder for rank 0, or raise ValueError; remove what a killed process left.

    A POSIX record lock ends with the process and is not inherited, so neither a dead process nor
    its orphaned loader workers keep it.
    """
    if rank != 0:
        yield
        return
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another process; "
                             "choose another --out") from None
        except OSError:                            # file systems without locks
            say(f"{folder} cannot be locked here; see that no second run writes to it")
        for left in folder.rglob(".*.tmp"):
            theirs = any((inner / ".lock").exists() for inner in left.parents
                         if folder in inner.parents)                 # another run's folder
            if re.fullmatch(r"\..+\.\d+\.tmp", left.name) and left.is_file() and not theirs:
                left.unlink(missing_ok=True)                         # of whole_file
        yield


class Progress:
    """Rate and time left of a long loop, on rank 0: one moving line on a terminal,
    else a line now and then."""

    def __init__(self, total, what, start=0, every=20.0):
        self.total, self.what, self.start, self.done = total, what, start, start
        self.began = self.last = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.every = 0.5 if self.terminal else every
        self.silent = not is_first()

    def update(self, count=1, note=""):
        self.done += count
        now = time.monotonic()
        if self.silent or now - self.last < self.every and self.done < self.total:
            return
        self.last = now
        rate = (self.done - self.start) / max(now - self.began, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        text = f"{self.what} {self.done}/{self.total}  {note}  {rate:.2f}/s  {clock(left)} left"
        end = "\n" if self.done >= self.total or not self.terminal else ""
        print(("\r\033[K" if self.terminal else "") + text, end=end, flush=True)


def clock(seconds):
    """Seconds as h:mm:ss."""
    seconds = int(min(seconds, 359999))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


# --- demo streets -------------------------------------------------------------------------------
#
# A scene is a list of flat polygons in metres (x right, y up, z ahead of the camera), painted from
# far to near as polygon numbers at twice the resolution. Colour, label and depth of a pixel are all
# read from the polygon it shows, so they cannot disagree; the weather comes after, from the depth.

def draw_demo(root="demo", seed=0, scale=1.0):
    """Draw the demo streets into folder `root`, whole or not at all, unless they are there.
    Raises ValueError where those of another seed are."""
    root, about = Path(root), f"demo streets of seed {seed}"

    def there():
        """Whether they are drawn; ValueError where the folder holds anything else."""
        if not root.exists():
            return False
        found = (root / DRAWN).read_text().strip() if (root / DRAWN).is_file() else "other files"
        if found != about:
            raise ValueError(f"{root} holds {found}, asked for are {about}; name another folder, "
                             "or remove this one")
        return True
    if there():
        return
    temporary = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    # ends the pool's processes too, which would wait for ever
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        write_demo(temporary, seed, scale)
        (temporary / DRAWN).write_text(about + "\n")
        if not there():                                    # another process may have been faster
            os.replace(temporary, root)
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(temporary, ignore_errors=True)


DRAWN = "drawn.txt"       # of a root of demo streets: says their seed
LABELS = (ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY,
          PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE) = (
              7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
EGO, STATIC = 1, 4  # void: our own bonnet, street furniture
CONDITIONS = ("fog", "night", "rain", "snow")
FAR = 130.0  # metres, where the street ends

# A channel of 255 means a lamp: it needs no sun, and it is what shines at night.
LAMP, RED, AMBER = (255, 255, 235), (255, 40, 30), (255, 170, 40)
GLASS, TYRE, STEEL = (62, 78, 92), (28, 28, 30), (150, 150, 155)
PAINTS = "aa1e23 233c82 cdcdd0 282a2e 787c82 bea028 28694b 96552d 5a82aa"
CLOTHES = "325ac8 963ca0 8250be 3c78d2 be3c82 503c8c"
VESTS = "e6dc1e f08214 f05a1e d2e628"
FACADES = "c8b48c c8a090 aaaaaa cdc3af a5968c a8b2a5 d2be96 9696a0"
# Metres long, high, wide; side views front first [(share of length, share of height)], farthest
# last; share of height of the sill; side panes; wheels (share of length), radius; paint per view.
VEHICLES = {
    CAR: (4.3, 1.55, 1.8, [[(0, .14), (0, .5), (.2, .62), (.36, 1), (.78, 1), (.95, .62), (1, .5),
                            (1, .14)]], .6, 2, (.18, .8), .34, [PAINTS]),
    BUS: (11, 3.1, 2.5, [[(0, .1), (0, .4), (0, .85), (0, 1), (1, 1), (1, .85), (1, .5), (1, .1)]],
          .4, 6, (.2, .75), .5, ["dca01e d2321e e6b428"]),
    TRAIN: (26, 3.5, 2.5, [[(0, .1), (0, .35), (.04, .85), (.04, 1), (1, 1), (1, .1)]],
            .35, 13, (), .4, ["d7e1e6 50aac8 a0d2dc"]),
    TRUCK: (8, 3.5, 2.5, [[(0, .15), (0, .45), (.04, .75), (.26, .78), (.26, .15)],
                          [(.05, .15), (.05, .3), (1, .3), (1, .15)],
                          [(.3, .3), (.3, 1), (1, 1), (1, .3)]],
            .45, 1, (.13, .6, .85), .52, [PAINTS, "303034", "c8be96 b47846 966e50 d2c8b4"])}


def pick(rng, palette, spread=12):
    """One RGB triple of a palette such as "aa1e23 233c82", each channel moved by <= spread."""
    words = palette.split()
    colour = list(bytes.fromhex(words[rng.integers(len(words))]))
    return tuple(np.clip(colour + rng.integers(-spread, spread + 1, 3), 0, 240).tolist())


def disc(x, y, radius, tall=None, corners=14):
    """Polygon [(x, y)] of an ellipse."""
    angles = [2 * math.pi * k / corners for k in range(corners)]
    return [(x + radius * math.cos(a), y + (tall or radius) * math.sin(a)) for a in angles]


def bar(x0, y0, x1, y1, thick):
    """Polygon [(x, y)] of a straight bar."""
    scale = thick / 2 / math.hypot(x1 - x0, y1 - y0)
    dx, dy = (y0 - y1) * scale, (x1 - x0) * scale
    return [(x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)]


def clouds(rng, shape, cells=4, octaves=4):
    """Smooth noise (H, W) float32 around 0.5, its coarsest octave `cells` blobs across."""
    total = np.zeros(shape, np.float32)
    for k in range(octaves):
        grid = rng.random((cells * 2 ** k + 1, cells * 2 ** k + 1), dtype=np.float32)
        layer = Image.fromarray(grid).resize(shape[::-1], Image.BILINEAR)
        total += np.asarray(layer) / 2 ** (k + 1)
    return total / (1 - 0.5 ** octaves)


def blur(array, radius):
    """Gaussian blur of a float array (H, W) or (H, W, 3) with values in [0, 1]."""
    image = Image.fromarray(np.uint8(np.clip(array, 0, 1) * 255 + 0.5))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


class Stage:
    """Camera, sun, street plan and painted polygons of one scene, at twice the resolution."""

    def __init__(self, rng, width, height):
        self.rng, self.width, self.height = rng, 2 * width, 2 * height
        self.focal = self.width * rng.uniform(0.75, 0.95)
        self.centre = self.width * rng.uniform(0.42, 0.58)
        self.horizon = self.height * rng.uniform(0.40, 0.50)
        self.eye = rng.uniform(1.6, 2.2)  # metres above the road
        self.shift = rng.uniform(0.5, 2.5)  # metres right of the middle of the road
        self.bend = rng.uniform(-8e-4, 8e-4)  # x += bend z^2: the street curves
        self.half = rng.uniform(5, 6.5)  # metres from the middle of the road to the curb
        self.border = self.half + rng.uniform(2.6, 4.6)  # and to the houses
        sun = rng.normal(0, 1, 3)
        sun = np.array([sun[0], abs(sun[1]) + 0.6, -abs(sun[2])]) / np.linalg.norm(sun)
        self.sun = (sun * rng.uniform(0.25, 0.45)).tolist()
        self.ambient, self.tracks = rng.uniform(0.62, 0.8), None
        self.ids = Image.new("I", (self.width, self.height))
        self.shade = Image.new("L", (self.width, self.height))
        self.draw, self.draw_shade = ImageDraw.Draw(self.ids), ImageDraw.Draw(self.shade)
        self.faces = []

    def project(self, points):
        """Camera coordinates and pixels of points [(x, y, z)], z > 0."""
        bent = [(x - self.shift + self.bend * z * z, y - self.eye, z) for x, y, z in points]
        return bent, [(self.centre + self.focal * x / z, self.horizon - self.focal * y / z)
                      for x, y, z in bent]

    def face(self, points, label, colour, step=0.0, floor=0.0):
        """Paint a flat polygon [(x, y, z)] in the sun's light.

        Its number goes into `ids`; label, colour and inverse depth, which is linear in the image
        for a plane, go into `faces`. step, floor: metres between windows, bricks or pickets.
        """
        bent, pixels = self.project(points)
        (ax, ay, az), (bx, by, bz), (cx, cy, cz) = bent[::max(1, len(bent) // 3)][:3]
        nx = (by - ay) * (cz - az) - (bz - az) * (cy - ay)
        ny = (bz - az) * (cx - ax) - (bx - ax) * (cz - az)
        nz = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        distance, norm = nx * ax + ny * ay + nz * az, math.sqrt(nx * nx + ny * ny + nz * nz)
        if abs(distance) <= 1e-3 * norm:
            return  # seen edge-on
        cosine = (nx * self.sun[0] + ny * self.sun[1] + nz * self.sun[2]) / norm
        light = self.ambient + max(0, -cosine if distance > 0 else cosine)  # of the seen side
        light = 1 if max(colour) == 255 else light
        inverse = [1 / z for _, _, z in bent]
        self.faces.append((label, *(c * light for c in colour), nx / distance, ny / distance,
                           nz / distance, min(inverse), max(inverse), step, floor))
        self.draw.polygon(pixels, fill=len(self.faces))

    def flat(self, parts, x, z, squeeze=1.0):
        """Paint upright parts [(label, colour, [(dx, y)])] that stand at (x, z)."""
        for label, colour, polygon in parts:
            self.face([(x + squeeze * dx, y, z) for dx, y in polygon], label, colour)

    def shadow(self, left, right, near, far):
        """Darken a patch of ground."""
        corners = ((left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far))
        self.draw_shade.polygon(self.project(corners)[1], fill=255)


def vehicle(stage, x, z, towards, kind):
    """A car, bus, tram or lorry with its near end at z; `towards` shows its front."""
    rng = stage.rng
    length, height, wide, views, sill, panes, wheels, radius, palettes = VEHICLES[kind]
    height, half = height * rng.uniform(.93, 1.1), wide / 2
    views = [[(z + length * (t if towards else 1 - t), y * height) for t, y in v] for v in views]
    here, sill = stage.shift - stage.bend * z * z, sill * height  # we stand at x = here
    side = x + half if x + half < here else x - half if x - half > here else None

    def flank(points, colour):
        if side is not None:
            stage.face([(side, y, a) for a, y in points], kind, colour)

    stage.shadow(x - half - .2, x + half + .2, z - .3, z + length + .2)
    for k in range(len(views))[::-1 if towards else 1]:
        paint = pick(rng, palettes[k])
        for a, b in sorted(zip(views[k], views[k][1:]), key=lambda edge: -edge[0][0] - edge[1][0]):
            glass = min(a[1], b[1]) >= sill and a[1] != b[1]
            stage.face([(x - half, *a[::-1]), (x + half, *a[::-1]), (x + half, *b[::-1]),
                        (x - half, *b[::-1])], kind, GLASS if glass else paint)
        flank(views[k], paint)
        if k == 0:  # side windows and their pillars
            top = np.array([point for point in views[0] if point[1] >= sill])
            top = top.mean(0) + (top - top.mean(0)) * (.92, .8)
            flank(top.tolist(), GLASS)
            for a in np.linspace(top[:, 0].min(), top[:, 0].max(), panes + 1)[1:-1].tolist():
                flank(bar(a, sill, a, height * .95, .14), paint)
    for t in wheels:
        for size, tone in ((radius, TYRE), (radius * .55, STEEL)):
            flank(disc(z + length * (t if towards else 1 - t), radius, size), tone)
    low, edge = sill * (.85 if kind == CAR else .6), half - .12
    parts = [(kind, TYRE, bar(s * (half - .25), 0, s * (half - .25), .5, .28)) for s in (-1, 1)]
    parts += [(kind, (45, 45, 48), bar(-half + .1, .4, half - .1, .4, .2)),
              (kind, (215, 215, 205), bar(-.25, .42, .25, .42, .12))]
    if kind == TRAIN:  # stripe and pantograph
        stripe = pick(rng, "1e5a96 a01e3c 1e785a")
        flank(bar(z, 1, z + length, 1, .4), stripe)
        parts.append((kind, stripe, bar(-half, 1, half, 1, .4)))
        stage.flat([(kind, TYRE, bar(-.6, height, .3, height + 1.1, .1)),
                    (kind, TYRE, bar(-.7, height + 1.1, .9, height + 1.1, .12))], x, z + 3)
    elif kind == BUS:  # line and destination
        parts.append((kind, AMBER, bar(-.8, height - .25, .8, height - .25, .28)))
    elif kind == TRUCK and not towards:  # doors
        parts.append((kind, (70, 66, 62), bar(0, 1.1, 0, height, .08)))
    parts += [(kind, LAMP if towards else RED, bar(s * edge, low, s * (edge - .3), low, .18))
              for s in (-1, 1)]
    stage.flat(parts, x, z - .01)


def person(stage, x, z):
    """A pedestrian, 1.6 to 1.9 m, in a random stride."""
    rng = stage.rng
    size, stride, hem = rng.uniform((.92, .05, .6), (1.1, .38, .9)).tolist()
    coat, trousers = pick(rng, CLOTHES), pick(rng, "2d3246 3c3732 6e645a")
    sleeve = tuple(c * .8 for c in coat)
    parts = [(trousers, bar(s * .08, .9, s * stride, .02, .18)) for s in (-1, 1)]
    parts += [(coat, [(-.25, 1.42), (.25, 1.42), (.2, hem), (-.2, hem)])]
    parts += [(sleeve, bar(s * .27, 1.4, s * (.3 + stride / 3), .85, .12)) for s in (-1, 1)]
    parts += [(pick(rng, "cda082 78503c"), disc(0, 1.6, .13, .16)),
              (pick(rng, "322319 966e3c 1e1e1e"), disc(0, 1.69, .13, .09))]
    stage.shadow(x - .35, x + .35, z - .2, z + .3)
    stage.flat([(PERSON, c, [(size * a, size * b) for a, b in p]) for c, p in parts], x, z)


def cycle(stage, x, z, kind, ridden):
    """A bicycle or motorcycle seen more or less from the side, with or without its rider."""
    rng, heavy = stage.rng, kind == MOTORCYCLE
    paint, coat, trousers = pick(rng, PAINTS), pick(rng, VESTS), pick(rng, "2d3246 3c3732 6e645a")
    radius, base, rim = (.33, .7, .5) if heavy else (.36, .55, .78)
    parts = [(kind, tone, disc(s * base, radius, radius * share)) for s in (-1, 1)
             for tone, share in ((TYRE, 1), ((100, 100, 100), rim))]
    if heavy:
        parts += [(kind, (52, 52, 56), [(-.5, .3), (.4, .3), (.45, .75), (-.45, .75)]),
                  (kind, paint, [(-.1, .7), (.5, .72), (.45, 1.0), (.05, .95)]),
                  (kind, paint, [(-.95, .78), (-.4, .62), (-.3, .85), (-.9, .92)]),
                  (kind, TYRE, bar(-.75, .9, 0, .84, .13)), (kind, LAMP, disc(.62, .88, .13)),
                  (kind, STEEL, bar(-.8, .3, .1, .26, .12)),
                  (kind, STEEL, bar(.7, .35, .42, 1.1, .09))]
    else:
        parts += [(kind, paint, bar(*ends, .09)) for ends in
                  ((-.55, .36, -.2, .85), (-.2, .8, .38, .78), (-.05, .34, .38, .78),
                   (-.2, .8, -.05, .34), (.55, .36, .36, 1), (-.55, .36, -.05, .34))]
        parts += [(kind, TYRE, bar(a, .98, a + .25, .98, .09)) for a in (-.35, .27)]
    if ridden:
        parts += [(RIDER, trousers, bar(-.22, .95, .18, .68, .19)),
                  (RIDER, trousers, bar(.18, .7, 0, .22, .15)),
                  (RIDER, coat, [(-.34, .9), (-.1, .86), (.26, 1.4), (.02, 1.52)]),
                  (RIDER, tuple(c * .8 for c in coat), bar(.12, 1.4, .42, 1.05, .12)),
                  (RIDER, (200, 155, 125), disc(.24, 1.6, .13, .15)),
                  (RIDER, pick(rng, "d7d7d7 28282c be2828 c8be3c"), disc(.22, 1.66, .18, .14))]
    squeeze = rng.uniform(.65, 1) * (-1) ** rng.integers(2)
    stage.shadow(x - .8 * abs(squeeze), x + .8 * abs(squeeze), z - .15, z + .2)
    stage.flat(parts, x, z, squeeze)


def tree(stage, x, z, size):
    """A crown of blobs with a radius of `size` metres, lit from above, on a trunk; or a bush."""
    rng, green = stage.rng, np.array(pick(stage.rng, "62622a 526232 305432 7a702c", 14))
    base = size * (.5 if size < 1.1 else rng.uniform(1.2, 1.9))
    stage.shadow(x - size * .8, x + size * .8, z - size * .5, z + size * .5)
    stage.flat([(VEGETATION, (84, 66, 50), bar(0, 0, 0, base, .12 * size + .05))], x, z)
    count = int(np.clip(200 * size / z, 5, 16))
    for a, b, bright, radius in rng.uniform((0, 0, -.12, .25), (1, 1, .12, .42), (count, 4)):
        reach = size * .72 * math.sqrt(b)
        dx, dy = reach * math.cos(2 * math.pi * a), reach * math.sin(2 * math.pi * a)
        tone = (green * (.85 + .28 * dy / size + bright)).tolist()
        stage.flat([(VEGETATION, tone, disc(dx, base + dy, size * radius, corners=9))], x, z)


def post(stage, x, z, kind):
    """A pole at (x, z) that carries a street lamp, a traffic light or a sign."""
    rng, inward = stage.rng, -math.copysign(1, x)
    top = rng.uniform(5.5, 8) if kind == "lamp" else rng.uniform(2.5, 3.6)
    grey, lit, shape = pick(rng, "5f6264 7a7c78 424a46"), rng.integers(3), rng.integers(4)
    parts = [(POLE, grey, bar(0, 0, 0, top, rng.uniform(.15, .22)))]
    if kind == "lamp":
        parts += [(POLE, grey, bar(0, top, inward * 1.6, top + .2, .12)),
                  (POLE, (255, 240, 200), bar(inward * 1.2, top + .1, inward * 2, top + .1, .16))]
    elif kind == "light":
        bulbs = [tuple(c if k == lit else c // 3 for c in colour)
                 for k, colour in enumerate((RED, AMBER, (60, 255, 140)))]
        parts += [(LIGHT, (34, 36, 34), bar(0, top - .6, 0, top + .9, .6))]
        parts += [(LIGHT, bulbs[k], disc(0, top + .6 - k * .45, .2, corners=10)) for k in range(3)]
    else:
        outline = [disc(0, top, .45), [(-.5, top - .4), (.5, top - .4), (0, top + .5)],
                   bar(-.42, top, .42, top, .84), bar(-.2, top, inward * .9, top, .45)][shape]
        rim, core = (("c81e23", "e1e1de"), ("cd2323", "e4e2d7"), ("1e50af", "e1e4e6"),
                     ("e4be28", "322d1e"))[shape]
        inner = [(.66 * dx, top + .66 * (y - top)) for dx, y in outline]
        parts += [(SIGN, pick(rng, rim), outline), (SIGN, pick(rng, core), inner)]
    stage.flat(parts, x, z)


def house(stage, x, near, far, height):
    """A building whose facade stands at x: gable, roof and front."""
    rng, out = stage.rng, math.copysign(1, x)
    paint, roof = pick(rng, FACADES, 14), pick(rng, "6e3e32 4e4e54 5c544c")
    windows = rng.uniform((1.8, 2.8), (3.2, 3.6))
    deep, top = x + out * 14, height + 2.2
    stage.face([(x, 0, near), (deep, 0, near), (deep, height, near), (deep - out, top, near),
                (x + out, top, near), (x, height, near)], BUILDING, paint, *windows)
    stage.face([(x, height, near), (x, height, far), (x + out, top, far), (x + out, top, near)],
               BUILDING, roof)
    stage.face([(x, 0, near), (x, 0, far), (x, height, far), (x, height, near)],
               BUILDING, paint, *windows)
    if stage.sun[0] * out > .05:
        stage.shadow(x - out * height * min(.6, stage.sun[0] * out / stage.sun[1]), x, near, far)


def plots(stage):
    """What lies beyond the sidewalks, from far to near: houses, gardens, walls and fences."""
    rng = stage.rng
    for x in range(-70, 71, 14):  # closes the view
        if rng.random() < .6:
            shape = bar(0, 0, 0, rng.uniform(5, 16), 15)
            stage.flat([(BUILDING, pick(rng, FACADES), shape)], x, FAR)
        else:
            tree(stage, x, FAR, rng.uniform(4, 7))
    for side in (-1, 1):
        ends = 2 + np.cumsum([0, *rng.uniform(7, 15, 12)])
        kinds = [*rng.permutation(["wall", "fence", "house", "park"]),
                 *rng.choice(["wall", "fence", "park", "house", "house", "house"], 8)]
        for near, far, kind in reversed(list(zip(ends.tolist(), ends[1:].tolist(), kinds))):
            x = side * stage.border
            if kind == "house":
                house(stage, x, near, far, rng.uniform(6, 16))
                continue
            if rng.random() < .7:
                house(stage, x + side * rng.uniform(7, 12), near, far, rng.uniform(5, 12))
            for z in sorted(rng.uniform(near + 1, far, 2), reverse=True):
                tree(stage, x + side * rng.uniform(1.5, 6), z, rng.uniform(.7, 2.6))
            if kind == "park":
                continue
            label, palette = ((WALL, "8c4632 96523c 7d503c") if kind == "wall" else
                              (FENCE, "e6e6e6 aac3d2 d7cdaa"))
            top = rng.uniform(1.2, 2.4)
            stage.face([(x, 0, near), (x, 0, far), (x, top, far), (x, top, near)],
                       label, pick(rng, palette, 14), rng.uniform(.5, .9), .3)


def traffic(stage):
    """Everything that stands on the road and the sidewalks, from far to near."""
    rng, half, things, taken = stage.rng, stage.half, [], []
    lanes = (-half + 1.3, -half * .36, half * .36, half - 1.3)

    def drive(kind, last):
        for _ in range(8):  # tries to find a free place
            lane, z, length = rng.integers(last), rng.uniform(8, 30), VEHICLES[kind][0]
            if all(lane != a or z > c + 1.5 or z + length < b - 1.5 for a, b, c in taken):
                taken.append((lane, z, z + length))
                things.append((z, vehicle, (lanes[lane], z, lane < 2, kind)))
                return lanes[lane]

    def stand(paint, x, low, high, *more):
        z = low * (high / low) ** rng.random()  # more of them near than far
        things.append((z, paint, (x, z, *more)))

    def sidewalk():
        return (-1) ** rng.integers(2) * rng.uniform(half + .4, stage.border - .4)

    stage.tracks = drive(TRAIN, 3) if rng.random() < .65 else None
    for kind in (BUS, TRUCK):
        if rng.random() < .68:
            drive(kind, 4)
    for _ in range(rng.integers(3, 8)):
        drive(CAR, 4)
    for _ in range(rng.integers(4, 9)):
        stand(person, sidewalk() if rng.random() < .9 else rng.uniform(-half, half), 5, 20)
    for kind, most in ((BICYCLE, 4), (MOTORCYCLE, 4)):
        for _ in range(rng.integers(1, most)):
            x = sidewalk() if rng.random() < .4 else rng.uniform(-half, half)
            stand(cycle, x, 5, 14, kind, rng.random() < .65)
    for z in np.arange(rng.uniform(6, 14), 70, rng.uniform(12, 20)):
        for curb in (-half - .45, half + .45):
            stand(post, curb, z, z + 4, "lamp")
            if rng.random() < .3:
                stand(tree, curb * 1.1, z + 2, z + 8, rng.uniform(1.2, 2.2))
    for kind in ("light", "light", "sign", "sign", "sign")[rng.integers(2):]:
        stand(post, (-1) ** rng.integers(2) * (half + rng.uniform(.4, 1.3)), 6, 20, kind)
    litter = (STATIC, pick(rng, "5a5f5a 3c503c"), bar(0, 0, 0, 1.1, rng.uniform(.3, .7)))
    stand(lambda stage, x, z: stage.flat([litter], x, z), sidewalk(), 6, 20)  # a bin
    for _, paint, more in sorted(things, key=lambda thing: -thing[0]):
        paint(stage, *more)


def ground(stage, lateral, depth, grain):
    """Colours (H, W, 3) and labels (H, W) of the ground `lateral` and `depth` metres away."""
    rng, half, away = stage.rng, stage.half, np.abs(lateral)
    verge = rng.random(2) < .5  # a strip of grass between road and sidewalk, left and right
    green = np.where(lateral < 0, *verge) & (away < half + 1.2) | (away > stage.border)
    labels = np.where(away < half, ROAD, np.where(green, TERRAIN, SIDEWALK))
    fade = np.clip(30 / depth, 0, 1)  # far texture would only alias
    grain = fade * (grain - .5)
    slab = fade * ((lateral % .9 < .09) | (depth % .9 < .09))
    bright = np.select([labels == ROAD, labels == TERRAIN], [.35 * grain, 1.1 * grain],
                       .2 * grain - .16 * slab)
    base = np.zeros((256, 3), np.float32)
    base[ROAD] = rng.uniform(72, 112) * np.array([1, 1, 1.03])
    base[SIDEWALK] = pick(rng, "beaa96 bea596 c3ac96")
    base[TERRAIN] = pick(rng, "5a8c32 788c3c 8c8c46")
    colours = base[labels] * np.float32(1 + bright)[..., None]
    mark = (away < .08) & (depth % 8 < 3.5) | (np.abs(away - half + .25) < .07)
    zebra = rng.uniform(8, 50)
    mark |= (np.abs(depth - zebra) < 1.5) & (lateral % 1.2 < .6) & (away < half)
    colours[mark] = rng.uniform(175, 215)
    if stage.tracks is not None:
        colours[np.abs(np.abs(lateral - stage.tracks) - .72) < .08] = (58, 54, 52)
    colours[np.abs(away - half - .1) < .1] = base[SIDEWALK] * 1.15  # the curb
    return colours, labels


def texture(rng, colours, labels, step, floor, along, tall, grain):
    """Lay windows, bricks, pickets and leaves over `colours`, in place."""
    strength = np.zeros(256, np.float32)
    strength[[BUILDING, WALL, FENCE, VEGETATION, POLE]] = .22, .5, .2, .9, .15
    colours *= (1 + strength[labels] * (grain - .5))[..., None]
    here = (labels == BUILDING) & (step > 0)
    a, b = along[here] / step[here], tall[here] / floor[here]
    shop = b < 1
    window = (np.abs(a % 1 - .5) < np.where(shop, .4, .25)) & (b % 1 > .28 * ~shop) & (b % 1 < .8)
    tone = rng.random((64, 64), dtype=np.float32)[a.astype(int) & 63, b.astype(int) & 63]
    pane = np.array([48, 58, 72]) + 110 * (tone * tone)[:, None]
    ledge = np.where(b % 1 < .06, .8, 1)[:, None]
    colours[here] = np.where(window[:, None], pane, colours[here] * ledge)
    here = labels == WALL
    course = tall[here] / floor[here]
    joint = (along[here] / step[here] + .5 * (course.astype(int) & 1)) % 1 < .08
    colours[here] *= np.where(joint | (course % 1 < .14), .72, 1)[:, None]
    here = labels == FENCE
    gap = (along[here] / step[here] * 2.5 % 1 > .5) & (tall[here] % .8 > .12)
    colours[here] = np.where(gap[:, None], colours[here] * .25 + (30, 38, 26), colours[here])


def draw_street(rng, width, height, bonnet=False):
    """One street in clear weather: image, label ids and depth.

    Returns image (H, W, 3) uint8, labels (H, W) uint8 of Cityscapes labelIds (void among them) and
    depth (H, W) float32 in metres, inf in the sky. bonnet: the car's own bonnet is in the picture.
    """
    stage = Stage(rng, width, height)
    plots(stage)
    traffic(stage)
    if bonnet:
        low = stage.eye - 1.6 * (stage.height - stage.horizon) / stage.focal
        shape = disc(stage.shift, low, rng.uniform(1.1, 1.4), .13, 24)
        stage.flat([(EGO, pick(rng, PAINTS), shape)], 0, 1.6)
    ids = np.asarray(stage.ids)
    table = np.array([(SKY,) + (0,) * 10] + stage.faces, np.float32)
    across = ((np.arange(stage.width, dtype=np.float32) - stage.centre) / stage.focal)[None, :]
    up = ((stage.horizon - np.arange(stage.height, dtype=np.float32)) / stage.focal)[:, None]
    label, _, _, _, a, b, c, least, most, step, floor = (column[ids] for column in table.T.copy())
    inverse = np.clip(a * across + b * up + c, least, most)
    flat = (ids == 0) & (up < -stage.eye / 400)
    inverse = np.where(flat, -up / stage.eye, inverse)
    solid = inverse > 0
    depth = 1 / np.maximum(inverse, 1e-4)
    lateral = across * depth + stage.shift - stage.bend * depth ** 2
    tall, labels, colours = up * depth + stage.eye, label.astype(np.uint8), table[:, 1:4][ids]
    lamp = (table[:, 1:4].max(1) >= 255)[ids]

    noise = clouds(rng, (256, 256), 16)
    noise = np.block([[noise, noise[:, ::-1]], [noise[::-1], noise[::-1, ::-1]]])  # tiles
    first, second = np.where(flat, (lateral, depth), (tall, lateral + depth)) * 14
    grain = noise[first.astype(np.int32) & 511, second.astype(np.int32) & 511]
    texture(rng, colours, labels, step, floor, lateral + depth, tall, grain)
    rows = slice(int(stage.horizon), None)
    paint, kind = ground(stage, lateral[rows], depth[rows], grain[rows])
    shade = np.asarray(stage.shade.filter(ImageFilter.BoxBlur(3)), np.float32)[rows] / 255
    sunlit = (stage.ambient + stage.sun[1]) * (1 - rng.uniform(.35, .6) * shade)
    np.copyto(colours[rows], paint * sunlit[..., None], where=flat[rows][..., None])
    np.copyto(labels[rows], kind.astype(np.uint8), where=flat[rows])
    zenith, low = np.float32([pick(rng, "5a8ccd 78a0d2 96a5b9"), (205, 215, 225)])
    top = slice(0, rows.start + 3)
    cover = clouds(rng, ids[top].shape, 3)[..., None] * 5 - rng.uniform(2, 3.2)
    heaven = zenith + (low - zenith) * np.clip(1 - up[top, :, None] / up[0, 0], 0, 1)
    heaven = heaven + cover.clip(0, 1) * (rng.uniform(205, 235) - heaven)
    np.copyto(colours[top], heaven, where=~solid[top][..., None])
    exposure = np.float32(rng.uniform(.8, 1.15) * rng.uniform(.94, 1.06, 3))
    colours = np.where(lamp[..., None], colours, np.minimum(colours * exposure, 232))
    image = np.asarray(Image.fromarray(np.uint8(colours.clip(0, 255))).reduce(2))
    depth = np.where(solid, depth, np.inf).astype(np.float32)
    return image, labels[::2, ::2].copy(), depth[::2, ::2].copy()


def veil(picture, depth, visibility, air):
    """Koschmieder's law: `picture` (H, W, 3) behind air light; also the transmission (H, W).

    visibility: metres at which contrast falls to 5 %, a number or one per pixel.
    """
    transmission = np.exp(-math.log(20) / visibility * depth)
    return picture * transmission[..., None] + air * (1 - transmission[..., None]), transmission


def spots(rng, shape, count, small, large):
    """Opacity (H, W) in [0, 1] of `count` soft round spots with radii in [small, large] pixels."""
    image = Image.new("L", shape[::-1])
    draw = ImageDraw.Draw(image)
    for x, y, r, tone in rng.uniform((0, 0, small, 170), (*shape[::-1], large, 256), (count, 4)):
        draw.ellipse((x - r, y - 1.1 * r, x + r, y + 1.1 * r), fill=int(tone))
    return blur(np.asarray(image) / 255, max(1, small / 3))


def night(rng, image, labels, depth, dusk=0.0):
    """The scene by its own lamps and with its noise; invalid where too few photons arrive."""
    albedo, grey, (height, width) = (image / 255.0) ** 2.2, image.mean(-1) / 255, labels.shape
    carriers = (POLE, LIGHT, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE)
    lamps = (image.max(-1) > 236) & np.isin(labels, carriers)
    rooms = rng.random((64, 64))[np.arange(height)[:, None] // 9, np.arange(width) // 8]
    lit = (labels == BUILDING) & (grey < blur(grey, 4) - .03) & (rooms > rng.uniform(.65, .85))
    source = lamps[..., None] * albedo + lit[..., None] * np.array([.45, .3, .1])
    street = blur((lamps & (labels == POLE))[..., None] * np.array([1, .8, .5]), 20)
    halo = sum(gain * blur(source, radius) for radius, gain in ((2, .9), (7, 1.1), (22, 2.0)))
    solid = np.isfinite(depth)[..., None]
    beam = 1 / (1 + (depth / rng.uniform(9, 16)) ** 2)  # our own headlights
    beam = beam * np.exp(-((np.arange(width) / width - .5) / .38) ** 2)
    light = (rng.uniform(.04, .09) + dusk * .3) * rng.uniform((.7, .7, .8), (1.1, 1.0, 1.2))
    light = light + beam[..., None] * rng.uniform(.2, .45) + 12 * street + halo
    glow = (rng.uniform(.01, .025) + dusk * .2) * np.array([1.1, .95, 1.0])
    light = light * np.where(labels == SIGN, 3, 1)[..., None]  # retroreflective
    linear = np.where(solid, albedo * light, glow) + .25 * halo + source
    photons = rng.uniform(900, 1900) * (1 + 6 * dusk) * linear
    noise = np.sqrt(photons + 9)  # of the photons themselves, and 3 electrons of the sensor
    noisy = np.maximum(photons + rng.normal(0, 1, photons.shape) * noise, 0) / photons.max()
    picture = 255 * (noisy * linear.max() * rng.uniform(1.3, 2.3)) ** (1 / 2.2)
    return picture, blur((photons / noise).mean(-1) / 20, 1.5) * 20 < 2.3


def rain(rng, image, labels, depth):
    """Wet ground that mirrors, a grey sky, streaks, and drops on the lens (invalid)."""
    shape, rows = labels.shape, np.arange(len(labels))[:, None]
    air = rng.uniform(135, 190) * np.array([.97, 1.0, 1.03])
    picture, _ = veil(image * rng.uniform(.7, .9), depth, rng.uniform(150, 400), air)
    flat = np.isin(labels, (ROAD, SIDEWALK))
    contact = np.maximum.accumulate(np.where(flat, -1, rows), 0)  # nearest row above that stands
    mirror = picture[np.clip(2 * contact + 1 - rows, 0, len(rows) - 1), np.arange(shape[1])]
    mirror = np.asarray(Image.fromarray(np.uint8(mirror)).filter(ImageFilter.BoxBlur((1, 5))))
    wet = np.clip(clouds(rng, shape, 6) * 1.6 - .45, .05, .6) * flat * rng.uniform(.6, 1)
    picture = picture * (1 - np.maximum(.3 * flat, wet))[..., None] + mirror * wet[..., None]
    streaks = Image.new("L", shape[::-1])
    draw, slant = ImageDraw.Draw(streaks), rng.uniform(-.3, .3)
    for x, y, length, tone in rng.uniform((0, -10, 4, 20), (*shape[::-1], 18, 65), (190, 4)):
        draw.line((x, y, x + slant * length, y + length), fill=int(tone))
    picture += np.asarray(streaks, np.float32)[..., None]
    drops = spots(rng, shape, rng.integers(7, 16), 4, 15)[..., None]
    upside_down = blur(picture[::-1, ::-1] / 255, 6) * 180 + 50  # a drop is a strong lens
    return picture * (1 - drops) + upside_down * drops, drops[..., 0] > .6


def snow(rng, image, labels, depth):
    """Snow on what faces up, a white veil, and flakes, some close to the lens (invalid)."""
    shape = labels.shape
    amount = np.full(256, -9, np.float32)
    amount[[ROAD, SIDEWALK, TERRAIN, VEGETATION]] = .1, .45, .5, .1
    cover = 4 * (clouds(rng, shape, 12) - .5) + amount[labels] + rng.uniform(-.1, .15)
    cover = cover.clip(0, .85)
    ledge = (depth[:-1] > depth[1:] * 1.15) & (depth[1:] < 60)  # farther away just above
    cover[1:][ledge] = .75
    white, air = rng.uniform((205, 165), (240, 215))[:, None] * np.array([.98, 1, 1.02])
    picture = image * rng.uniform(.75, .95) * (1 - cover[..., None]) + white * cover[..., None]
    picture, transmission = veil(picture, depth, rng.uniform(100, 240), air)
    fine = spots(rng, shape, rng.integers(200, 450), .4, 1.2) * .8
    near = spots(rng, shape, rng.integers(15, 40), 2, 7)
    flakes = (1 - (1 - fine) * (1 - near))[..., None]
    picture = picture * (1 - flakes) + 242 * flakes
    return picture, (near > .5) | (transmission < .05) & np.isfinite(depth)


def weather(rng, image, labels, depth, condition):
    """The scene in `condition` (clear, fog, night, rain, snow, twilight) and the destroyed pixels.

    Returns image (H, W, 3) uint8 and invalid (H, W) bool: where too little of the signal arrives.
    Fog: transmission below 13 %; night: signal to noise below 2.3; rain and snow: drops and flakes
    more opaque than 0.6 and 0.5. The sky has no distance, so fog cannot hide it.
    """
    picture, invalid = image, np.zeros(labels.shape, bool)
    if condition == "fog":
        air = rng.uniform(150, 215) * rng.uniform(.96, 1.04, 3)
        visibility = rng.uniform(60, 125) / (.6 + .8 * clouds(rng, labels.shape, 3))
        picture, transmission = veil(image * .9, depth, visibility, air)
        invalid = (transmission < .13) & np.isfinite(depth)
    elif condition in ("night", "twilight"):
        dusk = rng.uniform(.4, 1) if condition == "twilight" else 0.0
        picture, invalid = night(rng, image, labels, depth, dusk)
    elif condition in ("rain", "snow"):
        picture, invalid = (rain if condition == "rain" else snow)(rng, image, labels, depth)
    return np.uint8(np.clip(picture + rng.normal(0, 2, image.shape), 0, 255)), invalid


def write_sample(root, seed, dataset, split, condition, k):
    """Draw and save picture k of a split: it depends on these words and numbers alone."""
    def save(array, *path):
        path = root.joinpath(dataset, *path)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path, compress_level=4)

    words = [zlib.crc32(word.encode()) for word in (dataset, split, condition)]
    rng, city = np.random.default_rng([seed, *words, k]), dataset == "cityscapes"
    image, labels, depth = draw_street(rng, 320, 160 if city else 180, bonnet=city)
    name = "clear" if condition == "day" else condition
    picture, invalid = weather(rng, image, labels, depth, name)
    if dataset == "stf":                      # one date per condition: stf:2018-02-01 is fog
        save(picture, "cam_stereo_left_lut",
             f"2018-02-{CONDITIONS.index(condition) + 1:02d}_12-00-00_{k:05d}.png")
        return
    if city:
        town = {"train": ("ahausen", "bedorf"), "val": ("cestadt", "dorfingen")}[split][k % 2]
        stem = f"{town}_{k // 2:06d}_000019"
        save(picture, "leftImg8bit", split, town, f"{stem}_leftImg8bit.png")
        save(labels, "gtFine", split, town, f"{stem}_gtFine_labelIds.png")
        return
    acdc = dataset == "acdc"
    ride = "GOPR0356" if split == "val" else "GOPR0345"
    if acdc:             # no two of its images share a name: a submission is one flat folder
        ride = (f"GP{CONDITIONS.index(condition)}{('train', 'val', 'test').index(split)}"
                f"{k // 20 + 1:04d}")
    folders, stem = (condition, split) if acdc else (split, condition), f"{ride}_frame_{k + 1:06d}"
    save(picture, "rgb_anon", *folders, ride, f"{stem}_rgb_anon.png")
    if split == "val" or acdc and split == "train":
        classes = np.array(CITYSCAPES_TABLE, np.uint8)[labels]
        classes[invalid & (clouds(rng, labels.shape, 10) > .5)] = 255  # where annotators gave up
        save(classes, "gt", *folders, ride, f"{stem}_gt_labelTrainIds.png")
        save(np.uint8(invalid), "gt", *folders, ride, f"{stem}_gt_invIds.png")
        if acdc and (split == "val" or k < 4):
            clear, _ = weather(rng, image, labels, depth, "clear")
            save(clear, "rgb_anon", condition, f"{split}_ref", ride, f"{stem}_rgb_ref_anon.png")


def write_demo(root, seed=0, scale=1.0):
    """Draw cityscapes/, acdc/ and the pools dark_zurich/ and stf/ below `root`, on all cores;
    scale multiplies the counts."""
    jobs = [("cityscapes", "train", "clear", 200), ("cityscapes", "val", "clear", 24)]
    jobs += [("acdc", split, condition, count) for condition in CONDITIONS
             for split, count in (("train", 40), ("val", 16), ("test", 4))]
    jobs += [("dark_zurich", "train", light, 40) for light in ("day", "twilight", "night")]
    jobs += [("stf", "train", condition, 75) for condition in CONDITIONS]
    jobs = [(Path(root), seed, *words, k)
            for *words, count in jobs + [("dark_zurich", "val", "night", 8)]
            for k in range(max(2, round(count * scale)))]
    progress = Progress(len(jobs), "demo street")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(write_sample, *zip(*jobs), chunksize=4):
            progress.update()


# --- the script: what is there, is it right, how fast is it read --------------------------------

@dataclass(frozen=True)
class Config:
    """The flags of data.py."""
    data: str = flag("data", "data root, a folder per set")
    make_demo: str = flag("", "draw the demo streets into this folder first (no name: demo), "
                          "and list them", nargs="?", const="demo", metavar="DIR")
    seed: int = flag(0, "seed of --make-demo")
    all_files: bool = flag(False, "open every image and label, instead of three of each split")
    show: int = flag(0, "write contact sheets of this many samples of each labelled split, as read "
                     "and as augmented")
    out: str = flag("runs/sheets", "folder for the contact sheets")
    benchmark: bool = flag(False, "print the speed of the training input per core, beside the "
                           "usual pipeline")
    workers: int = flag(2, "processes that open files with --all-files")


def check(root, all_files=False, workers=0):
    """Print what lies below `root`. Returns the list of problems, one line each."""
    problems, absent = [], []
    print(f"{'set':<20}{'split':<7}{'images':>8}{'labels':>8}{'masks':>8}  "
          "conditions; size of the first image")
    for name, row in DATASETS.items():
        found = [split for split in row.splits
                 if check_split(root, name, split, all_files, workers, problems)]
        if not found:
            absent.append(f"  {name:<20}{Path(root) / row.folder / row.layouts[0].image}"
                          + f"  ({row.about})" * bool(row.about))
        elif {"train", "val"} <= set(found):
            with contextlib.suppress(ValueError):          # of scan, which check_split named
                problems += shared_images(root, name)
    if len(absent) == len(DATASETS):
        problems.append(f"{root} holds none of the sets")
    print("\nnot found, and looked for (any {split} of the set):\n" + "\n".join(absent))
    return problems


def check_split(root, name, split, all_files, workers, problems):
    """Print the line of one split and append what is wrong with it.
    False where nothing is there."""
    try:
        layout, parts = scan(root, name, split)
        if layout is None:
            return False
        samples = find_samples(root, name, split, strict=False)
        classes = len(classes_of(root, name))
    except (ValueError, OSError) as error:
        problems.append(f"{name} {split}: {error}")
        return True
    labelled = split not in DATASETS[name].unlabelled
    pairs = [("label", "image")] + [("label", "invalid")] * bool(parts["invalid"])
    if labelled and (parts["label"] or DATASETS[name].role != "pool"):     # pools need none
        pairs.append(("image", "label"))
    for owner, kind in pairs:
        if stars := parts[owner].keys() - parts[kind].keys():
            problems.append(f"{name} {split}: {len(stars)} {owner}s without {kind}, "
                            f"first {parts[owner][min(stars)]}")
    spots = sorted({0, len(samples) // 2, len(samples) - 1}) if samples else ()
    chosen = samples if all_files else [samples[i] for i in spots]
    progress = Progress(len(chosen), f"{name} {split}, opened")
    size = "unreadable" if chosen else "no images"
    loader = torch.utils.data.DataLoader(EvalSet(chosen, classes), batch_size=None,
                                         num_workers=workers if all_files else 0)
    for index, image, *_ in loader:
        if isinstance(image, str):
            problems.append(f"{name} {split}: {image}")
        elif index == 0:
            size = f"{image.shape[2]}x{image.shape[1]}"
        if all_files:
            progress.update()
    conditions = Counter(sample.condition for sample in samples)
    print(f"{name:<20}{split:<7}{len(samples):>8}{sum(bool(s.label) for s in samples):>8}"
          f"{sum(bool(s.invalid) for s in samples):>8}  "
          + ", ".join(f"{condition} {count}" for condition, count in sorted(conditions.items()))
          + f"; {size}")
    return True


def shared_images(root, name):
    """Problems: images of the training split whose very content is in val too."""
    by_size, problems = {}, []
    for split in ("train", "val"):
        for image in scan(root, name, split)[1]["image"].values():
            if not Path(image).exists():                   # dangling links are named by check_split
                continue
            alike = by_size.setdefault(os.path.getsize(image), [])
            same = split == "val" and next(         # a row that names a file twice means to
                (other for other in alike
                 if other != image and filecmp.cmp(other, image, False)), None)
            if same:
                problems.append(f"{name}: {same} and {image} are the same file, "
                                "in train and in val")
            elif split == "train":
                alike.append(image)
    return problems


def contact_sheets(root, count, out):
    """Write a sheet per labelled split: image | label | two augmented crops with their labels,
    row by row."""
    def padded(image, below, right):
        return np.pad(image, ((0, below), (0, right), (0, 0)), constant_values=255)
    for name, row in DATASETS.items():
        for split in row.splits:
            samples = []
            with contextlib.suppress(ValueError, OSError):               # which check has named
                samples = [s for s in find_samples(root, name, split, strict=False) if s.label]
            if not samples:
                continue
            classes, palette = len(classes_of(root, name)), palette_of(classes_of(root, name))
            chosen = [samples[i] for i in np.linspace(
                0, len(samples) - 1, min(count, len(samples))).astype(int)]
            rows = []
            for number, sample in enumerate(chosen):
                pixels, ids, _ = read_sample(sample, classes)
                tiles = [Image.fromarray(pixels.transpose(1, 2, 0)), colour(ids, palette)]
                for draw in range(2):
                    crop = min(1024, *ids.shape)
                    pair = augment(sample, classes, np.random.default_rng((number, draw)), crop)
                    tiles += [Image.fromarray(pair[0]), colour(pair[1], palette)]
                rows.append(np.hstack([padded(
                    tile.resize((round(tile.width * 240 / tile.height), 240)), 8, 8)
                    for tile in tiles]))
            width = max(row.shape[1] for row in rows)
            sheet = np.vstack([padded(row, 0, width - row.shape[1]) for row in rows])
            path = Path(out) / f"{name}_{split}.png"
            with whole_file(path) as temporary:
                Image.fromarray(sheet).save(temporary, "PNG")
            print(path)


# --- benchmark ----------------------------------------------------------------------------------

def usual_pipeline(sample, classes, seed, crop, largest=LARGEST_SHORT_SIDE):
    """What training code usually does, timed stage by stage: decode all, resize all, crop,
    float32, normalise.

    Draws the same zoom as `augment`. largest: photos are brought to this short side first, as ours
    are; usual code knows no such rule (inf). Returns (3, crop, crop) float32, (crop, crop) int64,
    CPU seconds.
    """
    clock, rng = [time.process_time()], np.random.default_rng(seed)

    def lap():
        clock.append(time.process_time())
    raw = [Path(path).read_bytes() for path in (sample.image, sample.label)]
    lap()
    image, label = (Image.open(io.BytesIO(content)) for content in raw)
    image, label = image.convert("RGB"), label.convert("L")
    lap()
    factor = rng.uniform(0.5, 2.0) * min(1.0, largest / min(image.size))
    size = round(image.width * factor), round(image.height * factor)
    image, label = (image.resize(size, Image.Resampling.BILINEAR),
                    label.resize(size, Image.Resampling.NEAREST))
    corner = rng.integers(max(size[0] - crop, 0) + 1), rng.integers(max(size[1] - crop, 0) + 1)
    box = (*corner, corner[0] + crop, corner[1] + crop)
    image, label = image.crop(box), label.crop(box)
    lap()
    mean, deviation = (np.array(v, np.float32) for v in ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)))
    pixels = torch.from_numpy(((np.asarray(image, np.float32) - mean)
                               / deviation).transpose(2, 0, 1).copy())
    ids = torch.from_numpy(to_train_ids(np.asarray(label), sample, classes).astype(np.int64))
    lap()
    return pixels, ids, np.diff(clock)


def our_pipeline(sample, classes, seed, crop):
    """`augment`, timed in the same stages: its decoding is timed once more alone and taken
    off the whole."""
    clock = [time.process_time()]
    for path in (sample.image, sample.label):
        Path(path).read_bytes()
    clock.append(time.process_time())
    label = open_label(sample)
    zoom = np.random.default_rng(seed).uniform(0.5, 2.0)          # as augment draws it
    read_image(sample.image, zoom * min(1.0, LARGEST_SHORT_SIDE / min(label.size)))
    clock.append(time.process_time())
    image, ids = augment(sample, classes, np.random.default_rng(seed), crop)
    clock.append(time.process_time())
    torch.from_numpy(image), torch.from_numpy(ids)
    read, decode, whole, tensor = np.diff([*clock, time.process_time()])
    return np.array([read, decode - read, whole - decode, tensor])


def benchmark(repeats=24, crop=1024):
    """Print images per second of CPU time on generated files of real size and weight,
    labels included.

    The mean over the same fixed zooms, uniform in [0.5, 2], for every pipeline, in turn.
    """
    torch.set_num_threads(1)
    print(f"CPU time, means over {repeats} zooms uniform in [0.5, 2], crop {crop}, image and label")
    print(f"{'':<25}{'pipeline':<19}" + "".join(f"{stage:>13}" for stage in (
        "read", "decode", "zoom + crop", "to tensor", "whole")) + f"{'images/s':>10}{'ours is':>9}")
    pipelines = {"usual": lambda *a: usual_pipeline(*a, largest=math.inf)[2],
                 "usual, 1080 first": lambda *a: usual_pipeline(*a)[2], "ours": our_pipeline}
    with tempfile.TemporaryDirectory() as folder:
        for title, size, kind in (("2048x1024 PNG", (2048, 1024), "png"),
                                  ("4000x3000 JPEG", (4000, 3000), "jpg")):
            sample = benchmark_files(Path(folder), size, kind)
            runs = {name: [] for name in pipelines if kind == "jpg" or name != "usual, 1080 first"}
            for seed in range(repeats + 1):
                for name, seconds in runs.items():
                    seconds.append(pipelines[name](sample, 19, seed, crop))
            # the first warms up
            means = {name: np.array(seconds[1:]).mean(0) for name, seconds in runs.items()}
            for name, stages in means.items():
                ratio = f"{stages.sum() / means['ours'].sum():>8.2f}x"
                print(f"{title}, {os.path.getsize(sample.image) / 2 ** 20:.1f} MB".ljust(25)
                      + f"{name:<19}"
                      + "".join(f"{1e3 * v:>10.1f} ms" for v in (*stages, stages.sum()))
                      + f"{1 / stages.sum():>10.2f}{ratio if name != 'ours' else '':>9}")


def benchmark_files(folder, size, kind):
    """A demo street enlarged to `size`, with noise that gives it a photo's weight,
    and its label."""
    image, labels, _ = draw_street(np.random.default_rng(0), 512, 512 * size[1] // size[0])
    grain = np.random.default_rng(1).normal(0, 2.5, (size[1], size[0], 1))
    pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) + grain
    paths = [str(folder / f"{kind}_image.{kind}"), str(folder / f"{kind}_label.png")]
    Image.fromarray(np.uint8(pixels.clip(0, 255))).save(
        paths[0], **({"quality": 92} if kind == "jpg" else {}))
    Image.fromarray(labels).resize(size, Image.Resampling.NEAREST).save(paths[1])
    return Sample(*paths, None, None, "cityscapes", "clear")


def main():
    config = Config(**parse_flags(Config, __doc__))
    if config.workers < 0 or config.show < 0:
        raise ValueError("--workers and --show must not be negative, found "
                         f"{config.workers} and {config.show}")
    if config.benchmark:
        return benchmark()
    root = config.make_demo or config.data
    if not 0 <= config.seed < 2 ** 32:
        raise ValueError(f"--seed must lie in 0..{2 ** 32 - 1}, found {config.seed}")
    if config.make_demo:
        draw_demo(root, config.seed)
    if not Path(root).is_dir():
        raise FileNotFoundError(f"--data {root}: no such folder; expected a folder per set in it")
    problems = check(root, config.all_files, config.workers)
    for problem in problems:
        print("wrong: " + problem)
    if config.show:
        contact_sheets(root, config.show, config.out)
    if problems:
        raise ValueError(f"{len(problems)} problem{'s' * (len(problems) > 1)} below {root}, listed "
                         "above")


if __name__ == "__main__":
    run_main(main)
