"""What lies on disk: the table of datasets, reading, augmentation, sampling, the demo streets.

    python data.py --data data        lists the sets found, and what is wrong with them
    python data.py --all-files        opens every file, not only up to 100 of each split
    python data.py --show 4           pictures of images, labels and augmented crops
    python data.py --make-demo demo   draws the demo streets, and lists them

A data root holds a folder per set, unpacked as its authors ship it; nothing is renamed."""

import argparse
import contextlib
import csv
import ctypes
import fcntl
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import default_collate, default_convert, get_worker_info

from losses import IGNORE, PADDING
from swiftnet import LARGEST_SHORT_SIDE, PADDING_COLOUR

# --- label spaces -------------------------------------------------------------------------------

CLASSES = tuple(("road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,"
                 "terrain,sky,person,rider,car,truck,bus,train,motorcycle,bicycle").split(","))
PALETTE = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
    (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
    (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32))
CAMVID_CLASSES = tuple(("sky,building,pole,road,pavement,tree,sign symbol,fence,car,pedestrian,"
                        "bicyclist").split(","))
CAMVID_PALETTE = ((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222),
                  (128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0),
                  (0, 128, 192))
ADE20K_CLASSES = tuple(map(str.strip, """
  wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
  person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
  house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
  railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink,
  skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
  screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
  bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade
  machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
  television, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle,
  buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming
  pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step,
  tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture,
  hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin
  board, shower, radiator, glass, clock, flag""".split(",")))
# Label value on disk -> train id, by position. None in a row of DATASETS: train ids already.
# A value beyond its table is an error; train id 255 is ignored. Vistas' table is the lineage's.
CITYSCAPES_TABLE = (*[255] * 7, 0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11,
                    12, 13, 14, 15, 255, 255, 16, 17, 18, 255)               # 34: licence plate
VISTAS_TABLE = (255, 255, 1, 4, 4, 255, 3, 0, 0, 1, 0, 1, 0, 0, 0, 1, 2, 2, 2, 11, 12, 12, 12, 0, 0,
    255, 9, 10, 9, 9, 8, *[255] * 14, 5, 7, 5, 6, 255, 7, 255, 18, 255, 15, 13, 255, 17, 16, 255,
    255, 14, *[255] * 4)
WILDDASH_TABLE = (*CITYSCAPES_TABLE[:34], 14, 13, 255, 255, 0, 255, 255, 0, 255, 0, 255, 5, 5, 12,
    12, 12, 255, 255, 1, 255, 255, 255, 3, 255, 17, 255, 255, 0, 255, 255, 0, 1, *[255] * 4, 0, 255,
    255, 255, 0, 0, 0, 1, 9, 0, 1)
CAMVID_TABLE = (*range(11), 255)
CAMVID_TO_19 = (10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 12, 255)
ADE20K_TABLE = (255, *range(150))


# --- the table of datasets ----------------------------------------------------------------------

class Layout(NamedTuple):
    """Where the files of one unpacking lie, below the set's folder. "{split}" is the split's own
    name on disk, "*" a name or part of one, ".*" at the end .png, .jpg or .jpeg. The stars of an
    image fill those of its label, invalid mask and reference in order: the whole pairing rule."""
    image: str
    label: str = ""
    invalid: str = ""       # 1 where annotators could not recognise the pixel, else 0
    reference: str = ""     # the same place in clear weather, to look at
    segments: str = ""      # COCO panoptic json: label = R + 256 G + 65536 B -> category


class Dataset(NamedTuple):
    """A row of DATASETS. Adding a set is adding a row."""
    folder: str                      # below the data root
    layouts: tuple                   # tried in order
    splits: dict = {"train": "train", "val": "val", "test": "test"}
    unlabelled: tuple = ("test",)    # splits whose labels do not exist or are dummies
    table: tuple | None = None
    classes: tuple = CLASSES         # (): one name per line in classes.txt of the folder
    palette: tuple = PALETTE
    condition: Callable = lambda stars: "all"       # weather, from the stars of an image
    skip: str = r"(?!)"              # of images to leave out, a regular expression; (?!): none
    gaps: float = 0                  # images of a split that may lack a label: left out, aloud
    leaks_into: str = ""             # leave out images whose stem is in train or val of that set


class Sample(NamedTuple):
    """One image and what belongs to it; paths are strings, "" where there is none."""
    image: str
    label: str = ""
    invalid: str = ""
    reference: str = ""
    dataset: str = ""
    condition: str = "all"
    segments: tuple = ()             # (segment id, category) of a panoptic label


ACDC = [Layout(                      # here and below: a zip may lie in a folder of its own name
    f"{images}/*/{{split}}/*/*_rgb_anon.png", f"{labels}/*/{{split}}/*/*_gt_labelTrainIds.png",
    f"{labels}/*/{{split}}/*/*_gt_invIds.png", f"{images}/*/{{split}}_ref/*/*_rgb_ref_anon.png")
    for images in ("rgb_anon", "rgb_anon_trainvaltest/rgb_anon")
    for labels in ("gt", "gt_trainval/gt")]
CAMVID = Dataset("camvid", [Layout("{split}/*.*", "{split}annot/*.png")], unlabelled=(),
                 table=CAMVID_TABLE, classes=CAMVID_CLASSES, palette=CAMVID_PALETTE,
                 condition=lambda stars: "dusk" if stars[0].startswith("0001TP") else "day")
TRAINING = {"train": "training", "val": "validation", "test": "testing"}
DATASETS = {
    # annotated, the first five of them the default of train.py
    "cityscapes": Dataset("cityscapes", [Layout(
        f"{images}/{{split}}/*/*_leftImg8bit.png", f"{labels}/{{split}}/*/*_gtFine_labelIds.png")
        for images in ("leftImg8bit", "leftImg8bit_trainvaltest/leftImg8bit")
        for labels in ("gtFine", "gtFine_trainvaltest/gtFine")],
        table=CITYSCAPES_TABLE, condition=lambda stars: "clear"),
    "vistas": Dataset("vistas", [          # v1.2, also inside the v2.0 download
        Layout("{split}/images/*.jpg", f"{{split}}/{version}labels/*.png")
        for version in ("v1.2/", "")], TRAINING, table=VISTAS_TABLE),
    "bdd100k": Dataset("bdd100k", [
        Layout("images/10k/{split}/*.jpg", "labels/sem_seg/masks/{split}/*.png"),
        Layout("seg/images/{split}/*.jpg", "seg/labels/{split}/*_train_id.png")], gaps=6),
    "wilddash": Dataset("wilddash", [      # final and beta; all of it trains
        Layout("images/*.jpg", "panoptic/*.png", segments="panoptic.json"),
        Layout("images/*.jpg", "labels/*.png")], {"train": ""}, (), WILDDASH_TABLE),
    "acdc": Dataset("acdc", ACDC, condition=lambda stars: stars[0]),
    "acdc_ref": Dataset("acdc", [Layout(   # references of the extended release
        layout.reference, layout.label.replace("{split}", "{split}_ref").replace("_gt", "_gt_ref"))
        for layout in ACDC], condition=lambda stars: "clear", gaps=math.inf),
    "cityscapes_coarse": Dataset("cityscapes", [Layout(
        f"{images}/{{split}}/*/*_leftImg8bit.png", "gtCoarse/{split}/*/*_gtCoarse_labelIds.png")
        for images in ("leftImg8bit", "leftImg8bit_trainextra/leftImg8bit")],
        {"train": "train_extra"}, (), CITYSCAPES_TABLE, condition=lambda stars: "clear",
        skip="troisdorf_000000_000073"),
    "camvid": CAMVID,
    "camvid_19": CAMVID._replace(table=CAMVID_TO_19, classes=CLASSES, palette=PALETTE),
    "ade20k": Dataset("ADEChallengeData2016", [Layout(
        "images/{split}/*.jpg", "annotations/{split}/*.png")], TRAINING, ("test",), ADE20K_TABLE,
        ADE20K_CLASSES, ()),
    "custom": Dataset("custom", [Layout("images/{split}/*.*", "labels/{split}/*.png")],
                      classes=(), palette=()),
    # pools of images for pseudolabel.py; their labels serve where train.py is given them by name
    "dark_zurich": Dataset("dark_zurich", [Layout(
        "rgb_anon/{split}/*/*/*_rgb_anon.png", "gt/{split}/*/*/*_gt_labelTrainIds.png",
        "gt/{split}/*/*/*_gt_invIds.png")], unlabelled=("train", "test"),
        condition=lambda stars: stars[0]),
    "cadc": Dataset("cadc", [Layout("cadcd/*/*/labeled/image_00/data/*.png")], {"train": ""},
                    ("train",), condition=lambda stars: "snow"),
    "nightowls": Dataset("nightowls", [Layout("nightowls_{split}/*.png")], TRAINING,
                         ("train", "val", "test"), condition=lambda stars: "night"),
    "nightcity": Dataset("nightcity", [
        Layout(f"{images}images/{{split}}/*.png", f"{labels}label/{{split}}/*_labelIds.png")
        for images, labels in [("NightCity-images/", "NightCity-label/"), ("", "")]],
        table=CITYSCAPES_TABLE, condition=lambda stars: "night"),
    "stf": Dataset("stf", [Layout("cam_stereo_left_lut/*.png")], {"train": ""}, ("train",)),
    "bdd100k_100k": Dataset("bdd100k", [Layout("images/100k/{split}/*.jpg")],
                            unlabelled=("train", "val", "test"), leaks_into="bdd100k"),
}
ANNOTATED = ("cityscapes", "vistas", "bdd100k", "wilddash", "acdc")


def parse_name(name, mark="manifest.csv"):
    """"set@val:a,b*2" -> ("set", "val", ("a", "b"), 2.0): set, split ("" if not given), parts,
    weight. A folder that holds `mark` can stand for the set, without split and parts."""
    def is_folder(text):
        return text not in DATASETS and (Path(text) / mark).exists()
    starred = "*" in name and not is_folder(name)
    rest, _, weight = name.rpartition("*") if starred else (name, "", "1")
    dataset, split, parts = rest, "", ""
    if not is_folder(rest):
        rest, _, parts = rest.partition(":")
        dataset, _, split = rest.partition("@")
    require((not (split or parts) or not is_folder(dataset),
             f"{name}: a folder has no splits or parts; use pseudolabel.py --select"),
            (dataset in DATASETS or is_folder(dataset), f"{dataset!r} is none of the sets "
             f"{', '.join(DATASETS)}, and no folder with {mark or 'images'}"),
            (re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) and 1e-6 <= float(weight) <= 1000,
             f"{name}: a weight is a plain decimal from 0.000001 to 1000"))
    return dataset, split, tuple(filter(None, parts.split(","))), float(weight)


def match(folder, pattern):
    """{stars: path} of the files below `folder` that fit a pattern of Layout, sorted by path."""
    regex = re.escape(pattern.removesuffix(".*")).replace(r"\*", "([^/]+)")
    regex += r"\.(?i:png|jpe?g)" if pattern.endswith(".*") else ""
    found = {}
    for path in sorted(folder.glob(pattern)) if pattern else ():
        hit = re.fullmatch(regex, path.relative_to(folder).as_posix())
        if hit and not path.name.startswith("."):                  # "._a.png": of a foreign system
            other = found.setdefault(hit.groups(), str(path))
            require((other == str(path), f"{other} and {path} are one image; remove one"))
    return found


def scan(root, dataset, split):
    """(layout, [images, labels, masks, references] as {stars: path}) of a split, labelled first."""
    row, found = DATASETS[dataset], []
    for layout in row.layouts if split in row.splits else ():
        patterns = [pattern.format(split=row.splits[split]) for pattern in layout[:4]]
        found.append((layout, [match(Path(root) / row.folder, pattern) for pattern in patterns]))
    return max(found, key=lambda item: bool(item[1][0]) + bool(item[1][1]),
               default=(row.layouts[0], [{}] * 4))


def find_samples(root, name, split, labelled=True):
    """Samples of a name (see parse_name), sorted by path; without labels if not `labelled`. `split`
    is for names without one. A part is a condition, a folder, or the file name's beginning up to
    "_" (a sequence, a city, a drive). ValueError where images or labels are missing."""
    dataset, own_split, parts, _ = parse_name(name)
    split = own_split or split
    if dataset not in DATASETS:
        return pseudo_samples(root, dataset)
    row, folder = DATASETS[dataset], Path(root) / DATASETS[dataset].folder
    usable = [s for s in row.splits if not labelled or s not in row.unlabelled]
    require((split in usable, f"{dataset} has no {'labelled ' * labelled}split {split!r}"
             f"{', only ' * bool(usable)}{', '.join(usable)}"))
    layout, (images, labels, invalid, references) = scan(root, dataset, split)
    leaks = {Path(image).stem for other in ("train", "val") if row.leaks_into
             for image in scan(root, row.leaks_into, other)[1][0].values()}
    panoptic = labelled and labels and layout.segments
    segments = read_segments(folder / layout.segments) if panoptic else {}
    samples, bare, unmatched = [], [], {*parts}
    for stars, image in images.items():
        words = {*stars, row.condition(stars), Path(image).name.split("_")[0]}
        unmatched -= words
        if (re.search(row.skip, image) or Path(image).stem in leaks
                or parts and not words & {*parts}):
            continue
        label = labels.get(stars, "") if labelled else ""
        if labelled and (not label or panoptic and Path(label).name not in segments
                         or invalid and stars not in invalid):
            bare.append(image)
            continue
        samples.append(Sample(image, label, invalid.get(stars, "") if label else "",
                              references.get(stars, ""), dataset, row.condition(stars),
                              segments.get(Path(label).name, ())))
    image, label = (folder / pattern.format(split=row.splits[split]) for pattern in layout[:2])
    lonely = sorted(labels[s] for s in labels.keys() - images.keys()) if labelled else []
    require((samples or bare or images and unmatched, f"no {split} images of {dataset} at {image}; "
             "put the set there, or name another --data"),
            (not unmatched, f"{dataset} {split} has nothing of {', '.join(sorted(unmatched))}"),
            (not lonely, f"{len(lonely)} labels have no image: {', '.join(lonely[:6])}"),
            (not bare or samples and len(bare) <= row.gaps,
             f"{dataset} {split}: {len(bare)} images lack {label}, or what belongs to it: "
             f"{', '.join(bare[:6])}; fetch the labels, or remove the images"))
    if bare:
        say(f"{dataset} {split}: {len(bare)} without a label left out")
    return samples


def pseudo_samples(root, folder):
    """Samples of a folder of pseudolabels: the rows of its manifest that are selected."""
    with open(Path(folder) / "manifest.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("selected") == "1"]
    require((rows, f"{folder}/manifest.csv selects no row; choose with pseudolabel.py --select"))
    return [Sample(str(Path(root) / row["image"]), str(Path(folder) / row["label"]),
                   dataset=folder, condition="pseudo") for row in rows]


def read_segments(path):
    """Panoptic json -> {png name: ((segment id, category), ...)}."""
    return {item["file_name"]: tuple((s["id"], s["category_id"]) for s in item["segments_info"])
            for item in json.loads(Path(path).read_text()).get("annotations", ())}


def classes_of(root, name):
    """Class names of a set, a custom one's classes.txt, or those that pseudolabels are made in."""
    dataset = parse_name(name)[0]
    if dataset not in DATASETS:
        return tuple(json.loads((Path(dataset) / "settings.json").read_text())["classes"])
    path = Path(root) / DATASETS[dataset].folder / "classes.txt"
    classes = DATASETS[dataset].classes or tuple(
        line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip())
    require((2 <= len({*classes}) == len(classes) <= PADDING,
             f"{path}: not 2 to {PADDING} different names"))
    return classes


def misplaced(root, names, *wanted):
    """Messages on folders of these sets that hold no image of any set in the wanted splits."""
    for folder in sorted({DATASETS[name].folder for name in names}):
        rows = {k: v for k, v in DATASETS.items() if v.folder == folder and v.gaps < math.inf}
        splits = ((name, split) for name, row in rows.items() for split in wanted or row.splits)
        if os.path.lexists(Path(root) / folder) and not any(scan(root, *x)[1][0] for x in splits):
            yield (f"{Path(root) / folder} has no {' '.join([*wanted, 'images'])}, as "
                   f"{[*rows.values()][0].layouts[0].image}; move them there, or remove it")


def gather(root, names, split, labelled=True):
    """(samples of several names, their weights (N,), their classes, which must be the same)."""
    groups = [find_samples(root, name, split, labelled) for name in names]
    spaces = {classes_of(root, name): name for name in names}
    samples = sum(groups, [])
    twice = [image for image, n in Counter(s.image for s in samples).items() if n > 1]
    require((len(spaces) == 1, f"{' and '.join(spaces.values())} have different classes"),
            (not twice, f"{twice[:1]} is named twice by {names}; a weight is NAME*WEIGHT"))
    weights = [parse_name(name)[3] for name, group in zip(names, groups) for _ in group]
    return samples, np.array(weights), next(iter(spaces))


# --- reading ------------------------------------------------------------------------------------

Image.MAX_IMAGE_PIXELS = None     # Pillow's own bound, which warns before it refuses; ours is below
IMAGE_MODES = ("RGB", "L", "P", "RGBA", "LA", "CMYK", "YCbCr")       # 8 bits a channel
LABEL_MODES = ("L", "P", "1", "I;16", "I", "RGB", "RGBA")


@contextlib.contextmanager
def opened(path, *modes, size=None, upright=False, formats=("PNG", "JPEG")):
    """A Pillow image of one of these modes and this size, turned as its EXIF says where `upright`.
    Errors are ValueErrors that name it."""
    try:
        with Image.open(path, formats=formats) as image:           # Pillow knows stranger ones
            require((image.mode in modes, f"mode {image.mode}, expected {' or '.join(modes)}"),
                    (image.width * image.height <= 2 ** 26, f"{image.size}: over 2^26 pixels"))
            if upright and is_turned(image):
                image = ImageOps.exif_transpose(image)
            require((size in (None, image.size), f"stored {image.size}, its label or image {size}"))
            yield image
    except Exception as error:         # Pillow raises a dozen kinds: SyntaxError, struct.error, ...
        raise ValueError(f"{path} cannot be read: {error}; replace or remove it") from None


def is_turned(image):
    """Whether a Pillow image has an EXIF orientation that a viewer follows."""
    return "exif" in image.info and image.getexif().get(0x0112) in range(2, 9)


def read_image(sample, zoom=1.0, size=None):
    """RGB Pillow image. Labels of datasets belong to the pixels as stored; predictions, and so
    pseudolabels, to what a viewer shows. With zoom <= 1/2 a JPEG is decoded at the smallest of 1/2,
    1/4, 1/8 that is not below zoom. size: what it must have."""
    upright = not sample.label or sample.dataset not in DATASETS
    with opened(sample.image, *IMAGE_MODES, size=size, upright=upright) as image:
        if image.format == "JPEG" and zoom <= 0.5:
            image.draft("RGB", [max(1, int(side * zoom)) for side in image.size])
        return image.convert("RGB")


def open_label(sample, size=None):
    """Pillow image of label values, 8 bit. size: what it must have."""
    if not sample.segments:
        with opened(sample.label, *LABEL_MODES, size=size, formats=("PNG",)) as image:
            return to_ids(image)
    with opened(sample.label, "RGB", size=size, formats=("PNG",)) as image:
        segment = np.asarray(image).astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    category_of = np.zeros(2 ** 24, np.uint8)                      # outside every segment: 0
    for number, category in sample.segments:
        category_of[number] = category
    return Image.fromarray(category_of[segment])


def to_ids(image):
    """8-bit Pillow image of the ids in a label PNG: its grey values, or its palette's indices."""
    coding, rescaled = image.tile[0][3], ("L;2", "L;4", "LA;16B", "RGB;16B", "RGBA;16B")
    require((coding not in rescaled, f"PNG of {coding}, which Pillow would scale; save the ids as "
             "8-bit grey"))
    values = np.asarray(image)
    if image.mode == "P":
        used = np.flatnonzero(image.histogram())
        colours = np.resize(image.getpalette(), (256, 3))[used]
        grey = (colours == colours[:, :1]).all() and (colours[:, 0] != used).any()
        require((not grey, "its palette is of other greys than its indices, so either may be the "
                 "ids; save the ids as 8-bit grey"))
    elif values.ndim == 3:
        require(((values[..., :3] == values[..., :1]).all(),
                 "labels must hold class ids, not colours"))
        values = values[..., 0]
    require((values.max() < 256, f"{values.max()} is no class id; they have 8 bits"))
    return Image.fromarray(values.astype(np.uint8))


def to_train_ids(values, sample, classes):
    """(H, W) label values of a file -> (H, W) uint8 train ids; ValueError for unknown values."""
    own = sample.dataset in DATASETS and DATASETS[sample.dataset].table
    meaning = own or (*range(classes), *[-1] * (IGNORE - classes), IGNORE)     # train ids already
    table = np.full(256, -1, np.int16)
    table[:len(meaning)] = meaning
    ids = table[values]
    strange = np.unique(values[ids < 0])[:8].tolist()
    require((not strange, f"{sample.label}: {strange} have no meaning in {sample.dataset}"))
    return ids.astype(np.uint8)


def read_sample(sample, classes):
    """Image (3, H, W) uint8, train ids (H, W) uint8, invalid (H, W) bool; or None."""
    pixels, ids, invalid, size = None, None, None, None
    if sample.image:
        image = read_image(sample)
        pixels, size = np.array(image).transpose(2, 0, 1), image.size
    if sample.label:
        ids = to_train_ids(np.asarray(open_label(sample, size)), sample, classes)
    if sample.invalid:
        with opened(sample.invalid, *LABEL_MODES, size=size) as mask:
            invalid = np.asarray(to_ids(mask))
        require((invalid.max() <= 1, f"{sample.invalid} holds {invalid.max()}; expected 0 and 1"))
        invalid = invalid == 1
    return pixels, ids, invalid


# --- augmentation and sampling ------------------------------------------------------------------

CARRIED = 100      # pixels from which on an image carries a class


def augment(sample, classes, rng, crop, zoom=(0.5, 2.0), wanted=-1, jitter=0.0):
    """Random zoom, crop and flip of one sample (deck, appendix): image (crop, crop, 3) uint8 and
    train ids (crop, crop) uint8, padded right and below with PADDING_COLOUR and PADDING, then
    flipped. Only the crop is interpolated: resize(box=...) equals resizing everything and cropping.
    wanted: a train id that the crop shall show, if the image does. jitter: brightness, contrast,
    saturation are scaled by 1 - jitter .. 1 + jitter. All randomness is `rng`'s."""
    label = open_label(sample)
    width, height = label.size
    factor = rng.uniform(*zoom) * min(1.0, LARGEST_SHORT_SIDE / min(width, height))
    scaled = max(1, round(width * factor)), max(1, round(height * factor))
    size = min(crop, scaled[0]), min(crop, scaled[1])
    corner = [rng.integers(whole - part + 1) for whole, part in zip(scaled, size)]
    flip = rng.random() < 0.5
    if wanted >= 0:
        shown = np.flatnonzero(to_train_ids(np.asarray(label), sample, classes) == wanted)
        if len(shown):                                     # a random pixel of it, at a random place
            y, x = divmod(int(shown[rng.integers(len(shown))]), width)
            centre = int((x + 0.5) * scaled[0] / width), int((y + 0.5) * scaled[1] / height)
            corner = [min(max(place - rng.integers(part), 0), whole - part)
                      for place, part, whole in zip(centre, size, scaled)]
    image = read_image(sample, factor, label.size)

    def cut(source, filter):                               # the crop, from a source of any size
        reduced = -(-width // source.size[0])              # 1, 2, 4, 8: by the JPEG decoder
        x, y = width / reduced / scaled[0], height / reduced / scaled[1]
        part = source.resize(size, filter, (corner[0] * x, corner[1] * y,
                                            (corner[0] + size[0]) * x, (corner[1] + size[1]) * y))
        if jitter and part.mode == "RGB":
            for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                part = enhance(part).enhance(rng.uniform(1 - jitter, 1 + jitter))
        return np.asarray(part)
    pixels = np.full((crop, crop, 3), PADDING_COLOUR, np.uint8)
    ids = np.full((crop, crop), PADDING, np.uint8)
    pixels[:size[1], :size[0]] = cut(image, Image.Resampling.BILINEAR)
    values = cut(label, Image.Resampling.NEAREST)
    ids[:size[1], :size[0]] = to_train_ids(values, sample, classes)
    return (pixels[:, ::-1].copy(), ids[:, ::-1].copy()) if flip else (pixels, ids)


class TrainSet(torch.utils.data.Dataset):
    """Augmented (image (H, W, 3) uint8, ids (H, W) uint8), a function of (seed, key) alone. A key
    is (epoch, position in the epoch, index of the sample, class to show or -1)."""

    def __init__(self, samples, classes, crop, zoom, seed, jitter=0.0):
        self.samples, self.classes, self.crop, self.zoom = samples, classes, crop, zoom
        self.seed, self.jitter = seed, jitter

    def __getitem__(self, key):
        epoch, position, index, wanted = key
        rng = np.random.default_rng((self.seed, epoch, position))
        return augment(self.samples[index], self.classes, rng, self.crop, self.zoom, wanted,
                       self.jitter)


class EvalSet(torch.utils.data.Dataset):
    """Whole samples: (index, *read_sample(...)), or (index, message) where a file is damaged."""

    def __init__(self, samples, classes):
        self.samples, self.classes = samples, classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        try:
            return index, *read_sample(self.samples[index], self.classes)
        except ValueError as error:
            return index, str(error)


def make_loader(dataset, workers, batches=None):
    """A DataLoader of the items of a dataset, or of batches of them (lists of keys)."""
    how = {"batch_sampler": batches} if batches else {"batch_size": None}
    how.update(num_workers=workers, collate_fn=to_tensors, worker_init_fn=ignore_sigterm)
    return torch.utils.data.DataLoader(dataset, pin_memory=torch.cuda.is_available(), **how)


def to_tensors(item):
    """An item, or a list of items as a batch, as tensors; in a worker, in shared memory. Else the
    queue's thread puts them there, and where it is full, the main process would wait for ever."""
    try:
        tensors = default_collate(item) if isinstance(item, list) else default_convert(item)
        for tensor in filter(torch.is_tensor, tensors if get_worker_info() else ()):
            tensor.share_memory_()
    except RuntimeError as error:
        require(("shared memory" in str(error), str(error)))
        raise OSError(f"/dev/shm is too small for the loader's workers: {error}; start Docker with "
                      "--shm-size=16g, or give --workers 0") from None
    return tensors


def ignore_sigterm(worker):
    """For loader workers: torchrun ends them too, while the process that they end with saves."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    c_library(*END_WITH_PARENT)


def epoch_keys(weights, length, seed, epoch, counts=None, uniform=0.0):
    """The `length` keys of TrainSet for one epoch. weights: (N,). counts: (N, C) pixels by class.
    Every sample comes as often as its weight says (the fraction is the chance of one more turn),
    shuffled, cut or repeated to the length. Then a share `uniform` is replaced so that classes come
    up evenly; of the images that carry a class, each as often as its weight says."""
    rng = np.random.default_rng((seed, epoch, 2 ** 31))        # a position that no sample has
    turns = np.floor(weights).astype(int) + (rng.random(len(weights)) < weights % 1)
    indices = np.repeat(np.arange(len(weights)), np.maximum(turns, turns.sum() == 0))
    order = np.concatenate([rng.permutation(indices) for _ in range(-(-length // len(indices)))])
    order, wanted = order[:length], np.full(length, -1)
    if uniform:
        rng = np.random.default_rng((seed, epoch, 2 ** 31 + 1))
        carries = counts >= CARRIED
        ends = {c: np.cumsum(weights * carries[:, c])      # running sum of its images' weights
                for c in np.flatnonzero(carries.any(0)).tolist()}
        require((ends, f"no label has {CARRIED} pixels of a class; leave out --uniform-classes"))
        chosen = np.flatnonzero(rng.random(length) < uniform)
        targets = np.resize(rng.permutation(list(ends)), len(chosen))         # as many of each
        for position, c in zip(chosen, rng.permutation(targets)):
            order[position] = np.searchsorted(ends[c], rng.uniform(0, ends[c][-1]), "right")
            wanted[position] = c
    return [*zip([epoch] * length, range(length), order.tolist(), wanted.tolist())]


def step_keys(keys_of, steps_per_epoch, first, last, rank=0, world=1):
    """For every step from `first` to `last`, the keys of process `rank`: its contiguous share of
    the global batch, which is the same for any world. keys_of: epoch -> its keys."""
    for step in range(first, last):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 or step == first:
            keys = keys_of(epoch)
        share = len(keys) // (steps_per_epoch * world)
        start = (place * world + rank) * share
        yield keys[start:start + share]


def count_classes(samples, classes, workers):
    """((N, C) int64 pixels of each class in each label, messages on damaged files, whose are 0)."""
    counts, problems = np.zeros((len(samples), classes), np.int64), []
    loader = make_loader(EvalSet(samples, classes), workers)
    for index, *found in progress(loader, len(samples), "read") if len(samples) > 100 else loader:
        if len(found) == 1:
            problems += found
        elif found[1] is not None:
            counts[index] = torch.bincount(found[1].flatten(), minlength=256)[:classes]
    return counts, problems


def look_through(samples, classes, what, workers, most=100):
    """Messages on what is wrong in at most `most` samples of a split, `what`, spread over it.
    Prints which classes no label shows, and which labelled image has an EXIF orientation."""
    few = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, most).astype(int))]
    counts, problems = count_classes(few, len(classes), workers)
    if problems or not few[0].label:
        return problems
    absent = [name for name, n in zip(classes, counts.sum(0)) if not n]
    too_few = len(absent) > len(classes) - 2
    if too_few and len(few) < len(samples):                        # a rare class may lie between
        return look_through(samples, classes, what, workers, len(samples))
    if absent:
        say(f"{what}: none of {len(few)} labels shows {', '.join(absent)}")
    turned = [s.image for s in few if s.dataset in DATASETS and is_turned(Image.open(s.image))]
    if turned:
        say(f"{what}: EXIF orientation not followed: {turned[0]} and {len(turned) - 1} more")
    return [f"{what}: labels show fewer than two of {len(classes)} classes, first {few[0].label}; "
            f"ids are 0 to {len(classes) - 1}, and 255 is ignored"] if too_few else []


def palette_of(classes):
    """Colours of a label space: the published ones where there are any."""
    known = {row.classes: row.palette for row in DATASETS.values()}
    drawn = np.random.default_rng(3).integers(40, 256, (len(classes), 3))
    return known.get(tuple(classes)) or tuple(map(tuple, drawn.tolist()))


def colour(ids, palette=PALETTE):
    """Train ids (H, W), tensor or array -> RGB Pillow image; IGNORE is black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(palette)] = palette
    return Image.fromarray(table[np.asarray(ids, dtype=np.uint8)])


def save_png(picture, path, **options):
    """Write a Pillow image, whole or not at all."""
    with whole_file(path) as temporary:
        picture.save(temporary, "PNG", **options)


# --- helpers of every script --------------------------------------------------------------------

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


def flag(default, help, **more):
    """A dataclass field that becomes a flag. more: its `least` value, and what argparse takes."""
    return field(default=default, metadata={"help": help, **more})


def parse_flags(config, about):
    """{name: value} of the fields of `config` that are given as flags on the command line."""
    parser = argparse.ArgumentParser(
        description=about, usage="%(prog)s [--flag value ...]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: require(("--local" not in message, f"{message}; use torchrun"),
                                           (False, f"{message}; see --help"))    # no usage text
    least = {}
    for item in fields(config):
        default, more = item.default, dict(item.metadata)
        least[item.name] = more.pop("least", None)
        several, shown = isinstance(default, tuple), default
        if several:
            shown, more["nargs"] = " ".join(map(str, default)), more.get("nargs", "+")
        if isinstance(default, bool):
            more["action"] = "store_true"
        else:
            kind = type(default) if not several else type(default[0]) if default else str
            more = {"type": kind, "metavar": None if "choices" in more else kind.__name__, **more}
        if not (shown is False or shown == "" or "default" in more["help"]):
            more["help"] += f" (default: {shown})"
        parser.add_argument("--" + item.name.replace("_", "-"), **more)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args()).items()}
    require(*((least[name] is None or value >= least[name], f"--{name.replace('_', '-')} must be "
               f"{least[name]} or more, found {value}") for name, value in given.items()))
    return given


def require(*rules):
    """Raise ValueError with the message of the first of (condition, message) that does not hold."""
    for holds, message in rules:
        if not holds:
            raise ValueError(message)


def differences(there, here):
    """What a reader must know where stored settings differ from those given; "" if they do not."""
    return "; ".join(f"{name} {there.get(name)} there, {value} here"
                     for name, value in here.items() if there.get(name) != value)[:600]


def to_json(value):
    """JSON of tensors and plain values; NaN and infinity, which it does not know, become null."""
    text = json.dumps(value, default=torch.Tensor.tolist)
    return json.dumps(json.loads(text, parse_constant=lambda name: None))


def run_main(main):
    """Run a script's main. A user's mistake ends in one line, rank 0's if all make it; status 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):    # torch.save hides the disk's error behind its own
            error = error.__context__ or error
            ended = re.search(r"by peer|DataLoader worker \(pid", str(error))    # it died
            if not (ended or isinstance(error, OSError)):
                raise
        time.sleep(0 if is_first() else 5)
        # what a loader worker raised arrives as the text of a traceback, the message last
        message = re.sub(r"(?s)Caught .*\n\w+: ", "", str(error).strip())
        if type(error) in (OSError, FileNotFoundError) and error.errno and not error.filename:
            message += "; look at the disk of --out, /dev/shm and ulimit -n, or give --workers 0"
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
        sys.unraisablehook = lambda _: None                # nothing more, of a loader half made
        sys.exit(2)
    finally:                   # loader workers ignore the SIGTERM with which Python would end them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                 # torch's handler would raise
        for child in multiprocessing.active_children():
            child.kill()
    if dist.is_initialized():
        dist.destroy_process_group()


def c_library(function, *arguments):
    """Call a function of the C library, where it knows it (Linux does)."""
    with contextlib.suppress(AttributeError):
        getattr(ctypes.CDLL(None), function)(*arguments)


END_WITH_PARENT = "prctl", 1, signal.SIGKILL         # PR_SET_PDEATHSIG: the kernel kills us then


def start_processes():
    """(rank, world, device) of this process; starts the process group that torchrun asks for."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if "TORCHELASTIC_RUN_ID" in os.environ:          # torchrun, killed, would leave us behind
        c_library(*END_WITH_PARENT)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":   # refused if it ended before that
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, 60).close()
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        require((local < count, f"more processes than GPUs; start {count} (--nproc_per_node)"))
        torch.cuda.set_device(device)
    else:          # glibc returns large freed blocks; cleared pages cost up to half of a forward
        c_library("mallopt", -4, 0)                                  # M_MMAP_MAX
        c_library("mallopt", -1, -1)                                 # M_TRIM_THRESHOLD
    if world > 1:
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=bound)
    return rank, world, device


def half_type(device, precision):
    """The dtype of "auto", "bf16" or "fp16" for autocast; None for float32, and "auto" on a CPU."""
    if precision == "auto" and device.type == "cuda":
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if real else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def autocast(device, precision):
    """torch.autocast to that dtype; a context that does nothing for None."""
    half = half_type(device, precision)
    return torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)


def all_gather(item):
    """[item of every process], in the order of their ranks; also a meeting point."""
    items = [item] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(items, item)
    return items


def is_first():
    """Whether this process is rank 0, or alone."""
    return os.environ.get("RANK", "0") == "0"


def say(text, end="\n"):
    """Print on rank 0."""
    if is_first():
        print(text, end=end, flush=True)


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path beside `path` and rename it there at the end: whole or not at all."""
    path = Path(path)
    require((path.is_file() or not path.exists(), f"{path} is no file that could be replaced"))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def lock_folder(folder, left=".*.[0-9]*.tmp"):
    """Lock a folder while the returned file and its process live; remove what a killed one left."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = open(Path(folder) / ".lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:                              # others: a file system without locks
        require((not isinstance(error, BlockingIOError), f"another process writes to {folder}"))
    for path in Path(folder).glob(left):                  # of whole_file
        path.unlink(missing_ok=True)
    return lock


def progress(items, total, what):
    """Pass items on; rate and time left on rank 0: one moving line on a terminal, else rarely."""
    terminal, began, last = sys.stdout.isatty(), time.monotonic(), time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > (0.5 if terminal else 20) or done == total:
            last, rate = now, done / (now - began)
            left = timedelta(seconds=round((total - done) / rate))
            say("\r\033[K" * terminal + f"{what} {done}/{total}  {rate:.2f}/s  {left} left",
                end="" if terminal and done < total else "\n")


# --- demo streets -------------------------------------------------------------------------------

# A street is a list of flat faces in metres (x right, y up, z ahead), painted from far to near. A
# pixel has the colour, label and depth of the face it shows; the weather follows from the depth.

SHAPES = {"box": "0 0 1 0 1 1 0 1", "cabin": "0 0 1 0 .85 1 .15 1", "cone": "0 0 1 0 .5 1",
          "pair": "0 0 .25 0 .25 1 0 1 0 0 .75 0 1 0 1 1 .75 1 .75 0",   # x y of corners in a unit
          "disc": ".63 0 .85 .15 1 .37 1 .63 .85 .85 .63 1 .37 1 .15 .85 0 .63 0 .37 .15 .15 .37 0"}
COLOURS = {name: tones for name, *tones in map(str.split, """asphalt 48484c 5c5c60 6a6a6c,
    facade c8b48c c8a090 aaaaaa a5968c d2be96, roof 6e3e32 5c4438 8c4632, leaf 4e5424 3a4c28,
    sun 6e7434 526c38, signal ff281e 3cff8c, rim c81e23 1e50af e4be28, paving beaa96 c3ac96,
    skin cda082 78503c, coat 325ac8 963ca0 be3c82, vest e6dc1e f08214, jeans 2d3246 6e645a,
    paint aa1e23 233c82 cdcdd0 282a2e 787c82 bea028 28694b, tram d7e1e6 50aac8 a0d2dc, steel 5f6264,
    load c8be96 b47846 966e50, grass 5a8c32 788c3c, bus dca01e d2321e, white dcdcd2, dark 1c1c1e,
    glass 3e4e5c, lamp fff0c8, front ffffeb, rear ff281e""".split(","))}   # ff: it shines at night
FIGURES = {  # class (if not the name): shape colour left bottom right top [near far], ... as they
    # are painted, in decimetres; left is towards the middle of the road, near and far along it
    "ground": """road: box asphalt -60 -10 60 0 10 4000; sidewalk: box paving 60 -10 90 1 10 4000;
        terrain: box grass 90 -10 900 1 10 4000""", "wall": "box roof 0 0 4 19 0 110",
    "building": "box facade 0 0 90 80 0 110, cone roof 0 80 90 120 0 110, cone white 9 80 81 112",
    "tower": "building: box facade 0 0 90 150 0 110, box roof 0 150 90 160 0 110",
    "fence": "box white 0 0 1 4 0 110, box white 0 6 1 10 0 110, box white 0 12 1 16 0 110",
    "tree": """vegetation: box roof -2 0 2 25, disc leaf -20 20 4 44, disc leaf -5 18 18 40,
        disc sun -15 30 4 50, disc sun 1 30 17 46, disc sun -8 36 11 56""",
    "bush": "vegetation: disc leaf -13 -2 3 12, disc sun -4 -1 12 11",
    "lamp": "pole: box steel -1 0 1 70, box steel -16 69 0 70, box lamp -20 68 -10 70",
    "light": """pole: box steel -1 0 1 30; traffic light: box dark -3 26 3 40,
        disc signal -2 27 2 31, disc steel -2 32 2 35, disc steel -2 36 2 39""",
    "sign": "pole: box steel 0 0 1 20; traffic sign: disc rim -5 20 5 30, disc white -3 22 3 28",
    "bin": "static: cabin dark -3 0 3 10",
    "person": "pair jeans -3 0 3 9, cabin coat -3 8 3 15, disc skin -1 14 1 18",
    "rider": "box jeans -2 5 1 10, cabin vest -3 8 3 15, disc skin -1 14 2 18, disc rim -2 16 2 19",
    "bicycle": """disc dark -9 0 -2 7, disc steel -8 1 -3 6, disc dark 2 0 9 7, disc steel 3 1 8 6,
        box paint -5 5 5 6, box paint -3 3 -2 10, box paint 4 4 5 10""",
    "motorcycle": """disc dark -10 0 -3 7, disc dark 3 0 10 7, box steel -4 3 4 6,
        cabin paint -5 5 6 10, box dark -8 8 0 9, disc lights 5 7 8 10""",
    "car": """box dark -8 0 8 4 5 38, box paint -9 2 9 9 0 43, cabin paint -9 9 9 15 5 38,
        cabin glass -9 9 9 14 5 35, box white -3 4 3 6, pair lights -9 6 9 8""",
    "truck": """box dark -12 0 12 9 0 80, box load -12 9 12 35 0 80, box dark 0 10 1 34,
        pair lights -12 5 12 8""",
    "bus": """box dark -11 0 11 5 5 100, box bus -12 3 12 30 0 110, box glass -12 13 12 25 0 110,
        box lamp -7 26 7 29, pair lights -12 6 12 9""",
    "train": """box dark -11 0 11 4 5 130, box tram -13 3 13 35 0 140, box glass -13 15 13 28 0 140,
        box rim -13 9 13 12, pair lights -12 4 12 8"""}
# On each side of the road: figures to choose from, layer (high ones are painted first), how many on
# average, from and to how many metres off the middle, from and to how many metres away.
ROWS = """ground 4 1 0 0 0 0, building/tower/tree 3 5 0 50 80 81, tower/building 2 6 16 16 8 80,
    building/building/building/tower/wall/fence/bush/bush 1 8 9.5 9.5 2 90, tree 1 2 11 13 8 50,
    car/car/car/bus/truck/train 0 2.5 1.7 1.7 8 70, car/car/car/truck/bus 0 2 4.6 4.6 8 60, lamp 0 3
    6.4 6.6 10 60, light/sign/sign/bin 0 2 6.4 7 7 24, tree 0 1 6.8 7.4 9 50, person 0 3.5 5.5 9 6
    26, bicycle/bicycle+rider 0 .8 5 8.5 5 16, motorcycle/motorcycle+rider 0 .8 2.8 6 5 16"""
PICTURES = """cityscapes train clear 200, cityscapes val clear 24, stf train fog/night/rain/snow 75,
    acdc train fog/night/rain/snow 40, acdc val fog/night/rain/snow 16, dark_zurich val night 8,
    acdc test fog/night/rain/snow 4, dark_zurich train day/twilight/night 40"""     # of each
IDS = {**{name: CITYSCAPES_TABLE.index(k) for k, name in enumerate(CLASSES)}, "static": 4}


def clouds(rng, shape, cells, power=1):
    """Smooth noise (H, W) in 0..1, `cells` blobs wide; a high power leaves a few bright spots."""
    noise = rng.random((cells * shape[0] // shape[1] + 1, cells), dtype=np.float32) ** power
    return np.asarray(Image.fromarray(noise).resize(shape[::-1], Image.BICUBIC)).clip(0, 1)


def blur(array, radius):
    """Gaussian blur of (H, W) or (H, W, 3), values in 0..1."""
    image = Image.fromarray(np.uint8(array.clip(0, 1) * 255))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def mix(image, other, share):
    """(H, W, 3): image where share (H, W) is 0, other where it is 1."""
    return image + (other - image) * share[..., None]


def figure(rng, kind, side, offset, z):
    """Faces [(label, colour, points (N, 3) in metres)] of a figure, left (-1) or right (1)."""
    faces, height, luck = [], rng.uniform(.85, 1.15), rng.integers(1000)
    for group in FIGURES[kind].replace("lights", "front" if side < 0 else "rear").split(";"):
        label, _, parts = group.strip().rpartition(": ")
        for part in parts.split(","):
            shape, tone, *box = part.split()
            colour = np.array([*bytes.fromhex(COLOURS[tone][luck % len(COLOURS[tone])])])
            left, bottom, right, top, near, far = np.array([*box, 0, 0][:6], float) / 10
            left, right = sorted((side * (offset + left), side * (offset + right)))
            corners = np.array(SHAPES[shape].split(), float).reshape(-1, 2)
            corners = corners * (right - left, height * (top - bottom)) + (left, height * bottom)
            front, back = (np.insert(corners, 2, z + end, axis=1) for end in (near, far))
            flanks = np.stack([np.roll(back, 1, 0), back, front, np.roll(front, 1, 0)], axis=1)
            points = [*flanks, front] if far > near else [front]
            faces += [(IDS[label or kind], colour, face) for face in points]
    return faces


def furnish(rng):
    """All faces of a street, from far to near, as of `figure`."""
    plan = []
    for row in ROWS.split(","):
        kinds, *numbers = row.split()
        layer, mean, low, high, near, far = map(float, numbers)
        for side in (-1, 1):
            count = int(mean + rng.random())
            for k in range(count):
                z = near + (far - near) * (k + .6 * rng.random()) / count
                plan.append((layer, z, side, rng.uniform(low, high), rng.choice(kinds.split("/"))))
    return [face for _, z, side, offset, kinds in sorted(plan, reverse=True)
            for kind in kinds.split("+") for face in figure(rng, kind, side, offset, z)]


def draw_street(rng, width, height):
    """One street in clear weather: image (H, W, 3) in 0..255, labels (H, W) as Cityscapes' label
    ids, depth (H, W) in metres, 10,000 in the sky, and shine (H, W) in 0..1, of what is a lamp."""
    size = width, height = 2 * width, 2 * height           # reduced at the end
    focal, middle = width * rng.uniform(.75, .95), rng.uniform((.42, .4), (.58, .5)) * size
    eye = np.array([rng.uniform(.5, 2.5), rng.uniform(1.6, 2.2), 0])
    sun = rng.choice((-1, 1)) * rng.uniform(.2, .6)        # metres of shadow per metre of height
    numbers, shadow = Image.new("I", size), Image.new("L", size)
    draw_number, draw_shadow = ImageDraw.Draw(numbers).polygon, ImageDraw.Draw(shadow).polygon
    painted = [(IDS["sky"], 0, 0, 0, 0, 0, 0, 0)]          # label, plane, whether a lamp, colour
    for label, colour, points in furnish(rng):
        seen = np.stack([points, points + points[:, 1:2] * (sun, -1, 0)]) - eye    # it, its shadow
        pixels = (seen[..., :2] / seen[..., 2:] * (focal, -focal) + middle).reshape(2, -1).tolist()
        if points[0, 2] < 50 and points[2, 1] > .2:        # farther shadows are too thin to be seen
            draw_shadow(pixels[1], fill=255)
        if np.linalg.det(seen[0, :3]) > 1e-3:              # else we look at its back
            draw_number(pixels[0], fill=len(painted))
            plane = np.linalg.solve(seen[0, :3], np.ones(3))       # its normal; plane @ point = 1
            light = 1 + plane @ (.6 * sun, -.2, 0) / np.linalg.norm(plane)
            painted.append((label, *plane, colour.max() == 255, *colour * light))

    label, a, b, c, shine, *colour = np.float32(painted).T[:, np.asarray(numbers)]
    across = (np.arange(width, dtype=np.float32) - middle[0]) / focal
    up = (middle[1] - np.arange(height, dtype=np.float32)[:, None]) / focal
    depth = 1 / np.maximum(a * across + b * up + c, 1e-4)  # as point = depth * (across, up, 1)
    x, y = across * depth + eye[0], up * depth + eye[1]
    lines = (abs(x) < .08) & (depth % 8 < 3.5) | (abs(abs(x) - 5.7) < .07)
    column, floor = (x + depth) / 2.4, y / 3 + .3
    panes = (label == IDS["building"]) & (abs(b) < 1e-6) & (column % 1 < .45) & (floor % 1 < .55)
    lit = panes & (rng.random((64, 64)) > .75)[column.astype(int) % 64, floor.astype(int) % 64]
    tone = np.select([lines & (label == IDS["road"]), lit, panes], [2.3, 1.2, .4], 1)
    shade = .15 + .4 * blur(np.asarray(shadow) / 255, 3)
    tone *= 1 + (y < .2) * (.3 * clouds(rng, label.shape, 200) - shade)       # on the ground
    cover = clouds(rng, label.shape, 4) * 3 + clouds(rng, label.shape, 16) - rng.uniform(1.4, 2.4)
    sky = mix(np.array([90, 140, 205]), 215, cover.clip(1 - up / up[0], 1))
    image = np.where((label == IDS["sky"])[..., None], sky, np.stack(colour, 2) * tone[..., None])
    image = Image.fromarray(np.uint8(image.clip(0, 255))).reduce(2)
    shine = np.maximum(shine, .4 * lit)
    return np.float32(image), np.uint8(label)[::2, ::2], depth[::2, ::2], shine[::2, ::2]


def weather(rng, street, condition):
    """The street in `condition`: picture (H, W, 3) uint8, and where too little signal arrives."""
    image, labels, depth, shine = street
    shape, invalid, solid = labels.shape, np.zeros(labels.shape, bool), labels != IDS["sky"]
    flat = np.isin(labels, (IDS["road"], IDS["sidewalk"]))
    if condition == "fog":                                 # Koschmieder's law, as in rain and snow
        veil = 1 - np.exp(-depth * (.6 + .8 * clouds(rng, shape, 4)) / rng.uniform(17, 37))
        image, invalid = mix(image * .9, rng.uniform(150, 215), veil), solid & (veil > .87)
    elif condition in ("night", "twilight"):
        halo = sum(blur(image / 255 * shine[..., None], radius) for radius in (2, 8, 24, 24))
        beam = solid / (1 + (depth / rng.uniform(9, 16)) ** 2)                # our headlights
        light = (rng.uniform(.02, .05) + .3 * beam) * (.3 + .7 * solid) + shine
        light += rng.uniform(.15, .4) * (condition == "twilight")
        light = light[..., None] * rng.uniform((.9, .7, .4), (1.1, .9, 1)) + 2 * halo
        photons = 450 * ((image / 255) ** 2.2 * light + .1 * halo)
        noisy = rng.normal(photons, np.sqrt(photons + 9))
        image, invalid = 255 * (noisy.clip(0) / 200) ** (1 / 2.2), solid & (photons.mean(-1) < 4)
    elif condition == "rain":
        image = mix(image * .75, rng.uniform(130, 180), 1 - np.exp(-depth / rng.uniform(40, 100)))
        wet = flat * (clouds(rng, shape, 8) * 1.2 - .3).clip(.05, .7)         # mirrors the sky
        image = mix(image * (1 - .3 * flat[..., None]), blur(image[::-1] / 255, 4) * 255, wet)
        drops = (3 * clouds(rng, shape, 16, 20) - .6).clip(0, 1)              # on the lens
        image, invalid = mix(image, 255 * blur(image[::-1] / 255, 6), drops), drops > .6
    elif condition == "snow":
        lying = flat * .9 + (labels == IDS["terrain"]) * 1.2 + (labels == IDS["vegetation"]) * .7
        image = mix(image, 225, (lying * (clouds(rng, shape, 16) * 1.6 - .2)).clip(0, .85))
        image = mix(image, 210, 1 - np.exp(-depth / rng.uniform(27, 67)))
        near = (3 * clouds(rng, shape, 36, 25) - .6).clip(0, 1)               # flakes
        image, invalid = mix(image, 240, np.maximum(near, rng.random(shape) > .99)), near > .5
    return np.uint8((image + rng.normal(0, 2, image.shape)).clip(0, 255)), invalid


def write_sample(root, seed, dataset, split, condition, k):
    """Draw and save picture k of a split where the set's authors would put it."""
    rng = np.random.default_rng([*f"{seed} {dataset} {split} {condition} {k}".encode()])
    street = draw_street(rng, 320, 160 if dataset == "cityscapes" else 180)
    picture, invalid = weather(rng, street, condition)
    ids = np.array(CITYSCAPES_TABLE)[street[1]]
    ids[invalid & (clouds(rng, ids.shape, 10) > .5)] = IGNORE                 # annotators gave up
    weathers, splits = ("fog", "night", "rain", "snow", condition), ("train", "val", "test")
    number = weathers.index(condition)
    drive = f"GP{number}{splits.index(split)}{k // 20 + 1:04d}"       # no two images share a name
    folder = f"{condition}/{split}" if dataset == "acdc" else f"{split}/{condition}"
    name = f"{drive}/{drive}_frame_{k + 1:06d}"
    town = (("ahausen", "bedorf"), ("cestadt", "dorfingen"))[split == "val"][k % 2]
    city = f"{split}/{town}/{town}_{k // 2:06d}_000019"
    files = {"cityscapes": {f"leftImg8bit/{city}_leftImg8bit.png": picture,
                            f"gtFine/{city}_gtFine_labelIds.png": street[1]},
             "stf": {f"cam_stereo_left_lut/2018-02-0{number + 1}_12-00-00_{k:05d}.png": picture}}
    files = files.get(dataset, {f"rgb_anon/{folder}/{name}_rgb_anon.png": picture})
    if f"{dataset} {split}" in ("acdc train", "acdc val", "dark_zurich val"):
        files[f"gt/{folder}/{name}_gt_labelTrainIds.png"] = ids
        files[f"gt/{folder}/{name}_gt_invIds.png"] = invalid
        if dataset == "acdc" and (split == "val" or k < 4):
            files[f"rgb_anon/{folder}_ref/{name}_rgb_ref_anon.png"] = street[0]
    for name, array in files.items():
        save_png(Image.fromarray(np.uint8(array)), Path(root, dataset, name), compress_level=4)


def draw_demo(root="demo", seed=0, scale=1.0):
    """Draw the demo streets, `scale` times as many, whole or not at all, unless they are there."""
    root, about = Path(root), f"demo streets, second edition, seed {seed}\n"
    temporary, note = root.with_name(f".{root.name}.{os.getpid()}.tmp"), root / "drawn.txt"
    jobs = [(temporary, seed, dataset, split, condition, k)
            for dataset, split, weathers, count in map(str.split, PICTURES.split(","))
            for condition in weathers.split("/") for k in range(max(2, round(scale * int(count))))]
    if not root.exists():
        try:
            with ProcessPoolExecutor(initializer=c_library, initargs=END_WITH_PARENT) as pool:
                done = pool.map(write_sample, *zip(*jobs), chunksize=4)
                list(progress(done, len(jobs), "street"))
            (temporary / "drawn.txt").write_text(about)
            root.exists() or os.replace(temporary, root)    # another may have been faster
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    found = note.read_text() if note.is_file() else "other things"
    require((found == about, f"{root} holds {found.strip()}; name another folder, or remove it"))


# --- the script ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """The flags of data.py."""
    data: str = flag("data", "data root, a folder per set")
    make_demo: str = flag("", "draw the demo streets into this folder, and list them")
    seed: int = flag(0, "seed of --make-demo", least=0)
    all_files: bool = flag(False, "open every file, not only up to 100 of each split, 3 of a pool")
    show: int = flag(0, "pictures of so many samples of each labelled split, below runs/sheets")


def check_split(root, name, split, config):
    """Print the line of one split. Returns the problems found in it, None where it is not there."""
    try:
        images, labels, *_ = scan(root, name, split)[1]
        if not images or not labels and DATASETS[name].gaps == math.inf:
            return None
        pool = not labels and name in ("dark_zurich", "nightcity")
        labelled = not pool and split not in DATASETS[name].unlabelled
        samples, classes = find_samples(root, name, split, labelled), classes_of(root, name)
    except (ValueError, OSError) as error:
        return [str(error)]
    counts = [sum(bool(sample[k]) for sample in samples) for k in range(3)]    # label, invalid too
    print(f"{name:<20}{split:<7}" + "".join(f"{n:>8}" for n in counts) + "  " + ", ".join(
        f"{c} {n}" for c, n in sorted(Counter(s.condition for s in samples).items())))
    most = len(samples) if config.all_files else 100 if labelled else 3
    problems = look_through(samples, classes, f"{name} {split}", 2 * config.all_files, most)
    spread = np.linspace(0, len(samples) - 1, config.show).astype(int)
    for k, i in enumerate(np.unique(spread) if labelled and not problems else ()):
        save_png(show(samples[i], classes), f"runs/sheets/{name}-{split}-{k}.png")
    return problems


def show(sample, classes):
    """Pillow image: a sample's image and label, and an augmented crop of both."""
    pixels, ids, _ = read_sample(sample, len(classes))
    crop = augment(sample, len(classes), np.random.default_rng(0), min(1024, *ids.shape))
    pictures = [picture for image, label in ((pixels.transpose(1, 2, 0), ids), crop)
                for picture in (Image.fromarray(image), colour(label, palette_of(classes)))]
    return Image.fromarray(np.hstack([
        p.resize((p.width * 300 // p.height, 300)) for p in pictures]))


def main():
    config = Config(**parse_flags(Config, __doc__))
    if config.make_demo:
        draw_demo(config.make_demo, config.seed)
    root = config.make_demo or config.data
    print(f"{'set':<20}{'split':<7}{'images':>8}{'labels':>8}{'masks':>8}  conditions")
    found = {name: [check_split(root, name, split, config) for split in row.splits]
             for name, row in DATASETS.items()}
    absent = [name for name, splits in found.items() if splits.count(None) == len(splits)]
    print(f"\nnot found: {', '.join(absent)}")
    problems = [problem for splits in found.values() for split in splits for problem in split or ()]
    problems += misplaced(root, absent)
    for problem in problems:
        print(f"wrong: {problem}")
    require((len(absent) < len(DATASETS), f"none of the sets is below {root}; give --data"),
            (not problems, f"{len(problems)} problems below {root}, listed above"))


if __name__ == "__main__":
    run_main(main)
