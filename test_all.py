"""Tests of everything, against hand-worked numbers and slow obvious forms.

    python test_all.py                        all quick tests
    python test_all.py LossTest.test_pixel    one of them
    python test_all.py --slow                 the long ones too: the whole demo, many kills

Needs torch, numpy and pillow, two CPU cores, no data and no network."""

import argparse
import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

import convnext
import data
import evaluate
import losses
import pseudolabel
import swiftnet
import train

HERE = Path(__file__).resolve().parent
SLOW = "--slow" in sys.argv


class Case(unittest.TestCase):
    """A test case with an empty folder in self.folder."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="swiftnet-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)


def run(script, *arguments, processes=1, cwd, seconds=300, start=False, before=()):
    """(exit status, output) of a script, or of torchrun with it where processes > 1; with `start`
    the running Popen, in a session of its own. before: words of the command before it."""
    launcher = [*before, sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    process = subprocess.Popen([*launcher, str(HERE / script), *map(str, arguments)], cwd=cwd,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if start:
        return process
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0] + "\n(took too long)"
    return process.returncode, output


@functools.cache
def streets():
    """Data root of a few demo streets, drawn once; tests only read it."""
    folder = Path(tempfile.mkdtemp(prefix="swiftnet-streets-"))
    with contextlib.redirect_stdout(io.StringIO()):
        data.draw_demo(folder / "demo", scale=0.02)
    return folder / "demo"


def tiny_model(num_classes=5, levels=3, seed=0, layer_scale=1.0):
    """A SwiftNet of four blocks, with norm statistics that are not the trivial ones."""
    torch.manual_seed(seed)
    backbone = convnext.ConvNeXt((1, 1, 1, 1), (8, 16, 24, 32), layer_scale=layer_scale)
    model = swiftnet.SwiftNet(backbone, num_classes, width=16, levels=levels)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 3                  # so that logits differ visibly between pixels
    return model


def write_checkpoint(path, **changes):
    """A checkpoint as train.py writes it, of a small network with the 19 classes; its path."""
    torch.manual_seed(0)
    network = swiftnet.build("convnext_atto", width=16, layer_scale=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": network.state_dict(), "classes": data.CLASSES, "step": 1, "architecture":
                {"backbone": "convnext_atto", "width": 16, "num_classes": 19},
                "config": {"data": str(streets()), "val": ("acdc",)}, **changes}, path)
    return path


def picture(seed=0, width=24, height=16):
    """Random RGB array (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def put(path, content):
    """Write an array or Pillow image to a file, with the folders above it; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = content if isinstance(content, Image.Image) else Image.fromarray(content)
    picture.save(path)
    return path


# --- convnext.py --------------------------------------------------------------------------------

LAYOUTS = {   # names of the classifier; replacements of our names by theirs, done in turn
    "facebook": ("norm head", ""),
    "torchvision": ("classifier.0 classifier.2", r"""stages.0 features.1 stages.1 features.3
        stages.2 features.5 stages.3 features.7 down\w+.0 features.0 down\w+.1 features.2 gamma
        layer_scale down\w+.2 features.4 down\w+.3 features.6 dwconv block.0 [.]norm .block.2
        pwconv1 block.3 pwconv2 block.5"""),
    "timm": ("head.norm head.fc", r"""stages.(\d) stages.\1.blocks down\w+.0 stem
        down\w+.(\d) stages.\1.downsample dwconv conv_dw pwconv mlp.fc"""),
    "huggingface": ("convnext.layernorm classifier", r"""[.]norm .layernorm
        stages.(\d) convnext.encoder.stages.\1.layers down\w+.0.1 convnext.embeddings.layernorm
        down\w+.0.0 convnext.embeddings.patch_embeddings gamma layer_scale_parameter
        down\w+.(\d) convnext.encoder.stages.\1.downsampling_layer""")}


def foreign(state, layout):
    """Our state dict under the names, and in the shapes, of another code, with its classifier."""
    head, replacements = LAYOUTS[layout]
    out = {f"{name}.{leaf}": torch.ones(7) for name in head.split() for leaf in ("weight", "bias")}
    for name, tensor in state.items():
        if (layout, name[-5:]) == ("torchvision", "gamma") or (layout, tensor.ndim) == ("timm", 2):
            tensor = tensor[..., None, None]          # (C, 1, 1); 1x1 convolutions, of small sizes
        for ours, theirs in re.findall(r"(\S+)\s+(\S+)", replacements):
            name = re.sub(ours, theirs, name)
        out[name] = tensor
    return out


def write_safetensors(path, tensors):
    """A safetensors file by the letter of the format."""
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        ends = len(blob), len(blob) + tensor.nbytes
        kind = f"F{8 * tensor.itemsize}"
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": ends}
        blob += tensor.numpy().tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob)


def slow_convnext(model, x):
    """The forward pass of Liu et al. (figure 4), in plain tensor algebra on (B, C, H, W)."""
    state, features = dict(model.named_parameters()), []

    def norm(x, name):
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-6).sqrt()
        return x * state[name + ".weight"][:, None, None] + state[name + ".bias"][:, None, None]

    def conv(x, name, **how):
        weight, bias = state[name + ".weight"], state[name + ".bias"]
        return F.conv2d(x, weight.view(*weight.shape, *(1,) * (4 - weight.ndim)), bias, **how)
    for i, depth in enumerate(model.depths):
        one, two = f"downsample_layers.{i}.0", f"downsample_layers.{i}.1"
        x = norm(conv(x, one, stride=4), two) if i == 0 else conv(norm(x, one), two, stride=2)
        for name in (f"stages.{i}.{j}." for j in range(depth)):
            y = norm(conv(x, name + "dwconv", padding=3, groups=x.shape[1]), name + "norm")
            y = conv(y, name + "pwconv1")
            y = conv(y * (1 + torch.erf(y / math.sqrt(2))) / 2, name + "pwconv2")     # GELU
            x = x + state[name + "gamma"][:, None, None] * y
        features.append(x)
    return features


class BackboneTest(Case):
    def filled(self, seed=0, drop_path=0.0):
        torch.manual_seed(seed)
        model = convnext.ConvNeXt((1, 1, 2, 1), (8, 12, 16, 20), drop_path)
        for p in model.parameters():
            p.data.normal_(0, 0.3)
        return model

    def test_parameter_counts(self):
        """Of the published classifiers with 1000 classes, as torchvision and timm print them."""
        for size, count in {"atto": 3695520, "femto": 5217784, "pico": 9045672, "nano": 15593560,
                            "tiny": 28589128, "small": 50223688, "base": 88591464,
                            "large": 197767336, "xlarge": 350196968}.items():
            with torch.device("meta"):
                backbone = convnext.convnext(f"convnext_{size}")
            count -= 1000 * (backbone.dims[-1] + 1) + 2 * backbone.dims[-1]    # classifier, norm
            self.assertEqual(sum(p.numel() for p in backbone.parameters()), count, size)

    def test_equals_slow_form(self):
        model, x = self.filled().double(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
        ours, slow = model(x), slow_convnext(model, x)
        for features in (ours, slow):
            features += torch.autograd.grad(sum(map(torch.norm, features)), model.parameters())
        torch.testing.assert_close(ours, slow)

    def test_drop_path(self):
        model = self.filled(drop_path=0.5)
        self.assertEqual([stage[-1].drop_path for stage in model.stages], [0, 0.125, 0.375, 0.5])
        built = swiftnet.build("convnext_atto", drop_path=0.5)
        self.assertEqual(built.backbone.stages[3][-1].drop_path, 0.5)
        block, x = model.stages[2][1], torch.randn(1, 16, 7, 7)
        residual = (block(x.expand(4000, -1, -1, -1)) - x).detach()
        kept = residual.flatten(1).abs().amax(1) > 0                # a sample whole or not at all
        self.assertAlmostEqual(kept.float().mean().item(), 0.625, delta=0.03)
        whole = (block.eval()(x) - x).detach() / 0.625
        self.assertLess((residual[kept] - whole).abs().max(), 1e-4)

    def test_reads_all_layouts(self):
        expected, files = self.filled().state_dict(), (self.folder / "torch", self.folder / "safe")
        for layout in LAYOUTS:
            state = foreign(expected, layout)
            of_ddp = {f"module.{name}": tensor for name, tensor in state.items()}
            torch.save({"model": state, "epoch": 3}, files[0])
            write_safetensors(files[1], {name: tensor.double() if tensor.ndim == 1 else tensor
                                         for name, tensor in of_ddp.items()})
            for source in (state, {"state_dict": of_ddp}, *files):
                model = self.filled(seed=1)
                convnext.load_pretrained(model, source)
                torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)

    def test_reads_checkpoints_of_other_programs(self):
        def below(prefix, state, old="", new=""):
            return {prefix + re.sub(old, new, name): tensor for name, tensor in state.items()}
        expected, other = self.filled().state_dict(), self.filled(seed=2).state_dict()
        timm, more = foreign(expected, "timm"), {"norm3.weight": torch.ones(20), "epoch": 3}
        for kind, source in {
                "detector": below("backbone.", {**expected, **more}),
                "compiled": below("_orig_mod.module.model.backbone.", timm),
                "compiled stages": below("", expected, "^stages.", "stages._orig_mod."),
                "features": below("encoder.model.", timm, r"^(st\w+)\.", r"\1_"),
                "lightning": {"state_dict": below("net.", foreign(expected, "huggingface"))},
                "mmpretrain": below("", below("backbone.", expected, "dwconv", "depthwise_conv"),
                                    "pwconv", "pointwise_conv"),
                "average": {"model": other, "optimizer": {"state": {0: {"step": torch.ones(1)}}},
                            "model_ema": below("module.", expected)},
                "average beside": {**below("model.", other), **below("ema_model.", expected)},
                "ours": {"model": {**below("backbone.", expected), **below("head.", more)}},
                }.items():
            model, output = self.filled(seed=1), io.StringIO()
            with self.subTest(kind), contextlib.redirect_stdout(output):
                convnext.load_pretrained(model, source)
                torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
            self.assertEqual("average" in output.getvalue(), "average" in kind, kind)

    def test_bad_files_are_refused(self):
        model, path, tensor = self.filled(), self.folder / "file.pth", torch.arange(1000.0)

        def saved(content):
            torch.save(content, path)
            return path.read_bytes()
        write_safetensors(path, {"a": tensor})
        safe, good = path.read_bytes(), saved({"a": tensor})
        timm, at = foreign(model.state_dict(), "timm"), good.index(tensor.numpy().tobytes()) + 9
        for content, words in (
                (good[:at] + bytes([good[at] ^ 4]) + good[at + 1:], "checksum"),     # a flipped bit
                (good[:-100], "damaged"), (safe[:-4], "damaged"), (saved([tensor]), "dict"),
                (saved({"a": argparse.Namespace()}), "argparse.Namespace.*save.*state_dict"),
                (b"", "damaged"),
                (saved(dict([*timm.items()][:-1])), r"issing.*stages\.3\.0\.pwconv2\.bias"),
                (saved({"conv1.weight": tensor}), "one ConvNeXt.*no name"),
                (saved({"a": model.state_dict(), "b": model.state_dict()}), r"'a\.', 'b\.'"),
                (saved({**timm, "stages.0.blocks.0.mlp.grn.weight": tensor}), "ConvNeXt V2"),
                (saved({**timm, "stem.0.bias": tensor}), r"layers\.0\.0\.bias.*1000")):
            path.write_bytes(content)
            with self.subTest(words), self.assertRaisesRegex(ValueError, f"{path}.*{words}"):
                convnext.load_pretrained(model, path)

    def test_published_weights(self):
        large = "in1k in22k in22k_1k_384"
        for name, sources in zip(convnext.SIZES, 4 * ["in1k"] + 4 * [large] + [large[5:]]):
            self.assertEqual(" ".join(convnext.WEIGHTS[name]), sources)
        with self.assertRaisesRegex(ValueError, "in22k .*in1k"):
            convnext.convnext("convnext_pico", "in22k")

    def test_download(self):
        path = self.folder / "checkpoints" / "convnext_atto_d2-01bb0f51.pth"
        with mock.patch("torch.hub.get_dir", return_value=str(self.folder)), \
                mock.patch("torch.hub.download_url_to_file", side_effect=OSError("no network")):
            with self.assertRaisesRegex(OSError, f"{path.name}.*no network.*{path.parent}"):
                convnext.convnext("convnext_atto", "in1k")
            torch.save(convnext.convnext("convnext_atto", layer_scale=0.5).state_dict(), path)
            self.assertEqual(convnext.convnext("convnext_atto", "in1k").stages[0][0].gamma[0], 0.5)
            path.write_bytes(b"<html>")                                           # a proxy's page
            with self.assertRaisesRegex(ValueError, f"{path} is damaged"):
                convnext.convnext("convnext_atto", "in1k")


# --- swiftnet.py --------------------------------------------------------------------------------

def images_of(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


class SwiftNetTest(Case):
    def test_size_table(self):
        output = run("swiftnet.py", cwd=self.folder)[1]
        rows = [line.split() for line in output.splitlines() if line.startswith("convnext_")]
        self.assertEqual([int(row[1]) for row in rows], 4 * [128] + 3 * [256] + 2 * [320])
        self.assertEqual([row[3] for row in rows[6:8]], ["956.45", "2066.40"])     # base, large
        self.assertRegex(output, r"(?s)957\.1.*2067\.3")                            # the deck's

    def test_equals_slow_form(self):
        """The pyramid written out stride by stride, on an image that needs no padding."""
        model, image, at = tiny_model().eval(), images_of(1, 3, 128, 256), [0] * 6  # stride 4..128

        def unit(x, modules):
            norm, _, conv = modules
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
            return F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)
        larger = functools.partial(F.interpolate, mode="bilinear", align_corners=False)
        x = image - torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
        x = x / torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
        for level in range(3):
            for i, feature in enumerate(slow_convnext(model.backbone, x)):
                at[i + level] += unit(feature, model.lateral[level][i])
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        y = at[5]
        for i, blend in zip((4, 3, 2, 1, 0), model.ladder):
            y = unit(larger(y, None, 2) + at[i], blend)
        self.assertLess((model(image) - larger(unit(y, model.head), None, 4)).abs().max(), 1e-4)

    def test_any_size(self):
        model, image = tiny_model().eval(), images_of(2, 3, 100, 90)
        for size in ((1, 1), (3, 200), (127, 129), (129, 1)):
            self.assertEqual(model(images_of(2, 3, *size)).shape, (2, 5, *size))
        padded = torch.tensor([[[124]], [[116]], [[104]]]).byte().repeat(2, 1, 128, 128)
        padded[..., :100, :90] = image                                         # as crops are padded
        self.assertTrue(torch.equal(model(image), model(padded)[..., :100, :90]))
        torch.testing.assert_close(model(image.float()), model(image))
        self.assertTrue(torch.equal(image, images_of(2, 3, 100, 90)))         # input not modified

    def test_predict(self):
        models, image, total = [tiny_model(seed=i).eval() for i in (0, 1)], images_of(3, 70, 90), 0
        for (scale, size), model, mirrored in itertools.product(
                ((0.5, (35, 45)), (1, (70, 90)), (1.5, (105, 135))), models, (False, True)):
            x = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=scale < 1)
            y = model(x.flip(3)).flip(3) if mirrored else model(x)
            total = total + F.interpolate(y, size=(70, 90), mode="bilinear")[0].detach()
        ours = swiftnet.predict(models, image, scales=(0.5, 1.0, 1.5), flip=True)
        self.assertLess((ours - total / 12).abs().max(), 1e-4)
        self.assertTrue(torch.equal(swiftnet.predict(models[0], image), models[0](image[None])[0]))

    def test_large_photos_are_predicted_at_the_scale_of_training(self):
        """Of a network that gives back what it sees: ramps come back where they were."""
        seen, network = [], nn.Identity()
        network.mean, network.levels = torch.zeros(1), 1
        network.forward = lambda x: seen.append(tuple(x.shape[2:])) or x.float()
        for size, sizes in (((2160, 1300), [(1794, 1080), (2692, 1620)]),
                            ((1080, 1500), [(1080, 1500), (1620, 2250)])):
            y, x = (255 * (torch.arange(n) + 0.5) / n for n in size)
            photo = torch.stack([y[:, None].expand(size), x.expand(size), x.expand(size)])
            found = swiftnet.predict(network, photo.byte(), scales=(1, 1.5))
            self.assertEqual((seen, found.shape), (sizes, photo.shape))
            self.assertLess((found - photo.byte()).abs().max(), 1.5)
            seen.clear()

    def test_tiles(self):
        """Where the receptive field ends inside the thrown-away margin, tiles change nothing."""
        model, sizes = tiny_model(levels=1).eval(), []
        model.backbone.stages[3] = model.backbone.stages[2] = nn.Sequential()         # short reach
        model.register_forward_pre_hook(lambda module, args: sizes.append(max(args[0].shape)))
        for image in (images_of(3, 600, 1100), images_of(3, 90, 700)):   # lower than half a tile
            tiled, whole = swiftnet.predict(model, image, tile=512), model.forward(image[None])[0]
            self.assertLess((tiled - whole).abs().max(), 1e-4)
        self.assertEqual(max(sizes), 512)
        for network, tile, least in ((model, 500, "512"), (tiny_model(), 512, "1024")):
            with self.assertRaisesRegex(ValueError, f"multiple of {least}"):
                swiftnet.predict(network, image, tile=tile)

    def test_load_checkpoint(self):
        path, built = self.folder / "a.pt", {"backbone": "convnext_atto", "width": 16}
        model, classes = swiftnet.build(**built), data.CLASSES
        good = {"model": model.state_dict(), "architecture": built, "classes": classes}
        torch.save({**good, "architecture": {**built, "pretrained": "https://a.org/a.pth"}}, path)
        with mock.patch("torch.hub.download_url_to_file", side_effect=AssertionError):
            model, state = swiftnet.load_checkpoint(path)
        self.assertEqual((model.training, model.width, {*state}), (False, 16, {*good} - {"model"}))
        with torch.autocast("cpu", torch.bfloat16):
            self.assertEqual(model(images_of(1, 3, 64, 64)).dtype, torch.float32)
        torch.testing.assert_close(model.state_dict(), good["model"], rtol=0, atol=0)
        for bad, word in (({**good, "architecture": {**built, "width": 24}}, "lateral"),
                          ({**good, "architecture": {"backbone": "resnet18"}}, "resnet18"),
                          (good["model"], "architecture"), ({**good, "classes": "ab"}, "class")):
            torch.save(bad, path)
            with self.subTest(word), self.assertRaisesRegex(ValueError, f"{path}.*{word}"):
                swiftnet.load_checkpoint(path)


class SpeedTest(Case):
    def results(self, network, images=images_of(2, 3, 160, 192)):
        torch.manual_seed(1)                                                        # drop path's
        logits = network(images)
        return [logits, *torch.autograd.grad(logits.square().mean(), [*network.parameters()])]

    def test_recomputed_blocks_are_bit_equal(self):
        model, calls = tiny_model(), []
        model.backbone.stages[3][0].drop_path = 0.5
        model.backbone.stages[0][0].norm.register_forward_hook(lambda *_: calls.append(0))
        plain = self.results(model)
        model.backbone.checkpoint_blocks = True
        self.assertTrue(all(map(torch.equal, plain, self.results(model))))
        self.assertEqual(len(calls), 3 + 3 * 2)                   # three levels; recomputed: twice

    @unittest.skipUnless(any(map(shutil.which, ("c++", "g++", "clang++"))), "needs a C++ compiler")
    @mock.patch.object(swiftnet, "resize", swiftnet.resize)                  # as it was, afterwards
    def test_compiled_equals_eager(self):
        """Where torch 2.13 compiles `resize` too, most gradients are wrong on a CPU."""
        torch.manual_seed(0)
        backbone = convnext.ConvNeXt((0, 0, 0, 1), (8, 8, 8, 8), layer_scale=0.5)
        model, images = swiftnet.SwiftNet(backbone, 5, width=8, levels=1), images_of(2, 3, 64, 64)
        with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(self.folder)):
            fast = self.results(swiftnet.compiled(model), images)
        for a, b in zip(fast, self.results(model, images)):               # BatchNorm makes one 0
            self.assertLess((a - b).norm(), 1e-3 * b.norm() + 1e-8)


# --- losses.py ----------------------------------------------------------------------------------

def brute_distance(labels):
    """Distance to the nearest other label, 254 apart, by looking at every pair of pixels."""
    out = torch.empty(labels.shape)
    ys, xs = torch.meshgrid(*map(torch.arange, labels.shape[1:]), indexing="ij")
    for b, y, x in np.ndindex(*labels.shape):
        squared = ((ys - y) ** 2 + (xs - x) ** 2).double()
        others = (labels[b] != labels[b, y, x]) & (labels[b] != 254)
        out[b, y, x] = squared.where(others, math.inf).min().sqrt()
    return out


class LossTest(unittest.TestCase):
    def test_distance_is_exact(self):
        random = np.random.default_rng(0)
        for height, width in ((1, 1), (1, 23), (19, 1), (9, 31), (24, 24), (33, 20)):
            blocks = np.kron(random.integers(0, 4, (2, 5, 4)), np.ones((8, 8), int))
            thin = np.where(random.random((9, height, width)) < 0.01, 255, 7)    # some of 7 alone
            few = random.integers(0, 3, (2, height, width))
            for labels in map(torch.from_numpy, (few, thin, blocks[:, :height, :width])):
                labels[0, height * 2 // 3:] = labels[0, :, width * 3 // 4:] = 254       # padding
                labels[-1, :, :width // 5] = 254
                expected, inside = brute_distance(labels), labels != 254
                turned = losses.boundary_distance(labels.byte().flip(1, 2)).flip(1, 2)
                self.assertTrue(torch.equal(turned[inside], expected[inside]))
                weights = losses.boundary_weights(labels, bins=(2, 5), alphas=(7, 3, 1))
                table = torch.where(expected < 2, 7.0, torch.where(expected < 5, 3, 1))
                self.assertTrue(torch.equal(weights, table * (labels < 254)))

    def test_distance_far_away(self):
        far = torch.zeros(1, 40, 6000, dtype=torch.uint8)                     # squares above 2^24
        far[0, 39, 5999] = 1
        self.assertEqual(losses.boundary_distance(far)[0, 0, 0], np.float32(math.hypot(39, 5999)))
        far = (torch.arange(50_000) == 0).view(1, 1, -1)                      # squares above 2^31
        self.assertEqual(losses.boundary_distance(far)[0, 0].tolist(), [1, *range(1, 50_000)])

    def test_weights_table(self):
        labels = torch.zeros(1, 3, 400, dtype=torch.uint8)
        labels[..., 200:], labels[..., 399] = 1, 255
        near = [8] * 3 + [6] * 12 + [4] * 48 + [2] * 64     # at 1..3, 4..15, 16..63, 64..127 pixels
        expected = [1] * 73 + near[::-1] + near[:100] + near[:99][::-1] + [0]   # no left boundary
        self.assertEqual(losses.boundary_weights(labels)[0].tolist(), [expected] * 3)
        self.assertEqual(losses.boundary_weights(labels.mT)[0].T.tolist(), [expected] * 3)
        with self.assertRaisesRegex(ValueError, "alphas"):
            losses.boundary_weights(labels, alphas=(8, 6, 4, 2))
        crop = torch.tensor([[[0] * 3 + [1] * 5 + [254] * 2, [254] * 10]])
        self.assertEqual(losses.boundary_weights(crop)[0].tolist(),    # 1 and 2 to 3: one boundary
                         [[8] * 6 + [6] * 2 + [0] * 2, [0] * 10])

    def test_pixel(self):
        """p = softmax([ln 3, 0])[0] = 3/4: loss = 8 exp(0.5 / 4) (-ln 0.75) = 2.607892."""
        logits, weights = torch.tensor([[[[math.log(3)]], [[0.0]]]]), torch.full((1, 1, 1), 8.0)
        loss = losses.boundary_aware_focal_loss(logits, torch.zeros(1, 1, 1).long(), weights)
        self.assertAlmostEqual(loss.item(), 2.607892, places=5)

    def test_slow_form_and_gradient(self):
        """The gradient, in float64 and by finite differences, is that at a fixed focal factor."""
        logits = (images_of(2, 5, 4, 6) / 64).requires_grad_()
        labels = torch.where(images_of(2, 4, 6) < 50, 255, images_of(2, 4, 6, seed=1) % 5).long()
        weights, exact = losses.boundary_weights(labels), logits.detach().double()
        true = torch.stack([labels == c for c in range(5)], 1) * weights[:, None]    # (B, C, H, W)

        def slow(x, gamma, normalizer):
            p, fixed = (z.exp() / z.exp().sum(1, keepdim=True) for z in (x, exact))
            return (true * torch.exp(gamma * (1 - fixed)) * -p.log()).sum().item() / normalizer
        for gamma, normalizer in ((0.5, None), (2.0, 1234), (0.0, torch.tensor(7))):
            how = gamma, int(normalizer or (labels != 255).sum())
            loss = losses.boundary_aware_focal_loss(logits, labels, weights, gamma, normalizer)
            grad, = torch.autograd.grad(loss, logits)
            self.assertAlmostEqual(loss.item() / slow(exact, *how), 1, places=5)
            for index, step in zip(np.ndindex(2, 5, 4, 6), 1e-4 * torch.eye(240).double()):
                up, down = (slow(exact + sign * step.view(2, 5, 4, 6), *how) for sign in (1, -1))
                self.assertAlmostEqual(grad[index].item(), (up - down) / 2e-4, places=5)

    def test_all_ignored(self):
        logits, labels = torch.randn(2, 5, 4, 6, requires_grad=True), torch.full((2, 4, 6), 255)
        loss = losses.boundary_aware_focal_loss(logits, labels, losses.boundary_weights(labels))
        grad, = torch.autograd.grad(loss, logits)                         # attached: does not raise
        self.assertEqual((loss.item(), grad.abs().max().item()), (0, 0))
        labels[0, :2] = 1                                         # padding changes nothing
        padded, alone = (losses.boundary_aware_focal_loss(x, y, losses.boundary_weights(y)) for x, y
                         in ((logits, labels.clamp(max=254)), (logits[:1, :, :2], labels[:1, :2])))
        self.assertAlmostEqual(padded.item(), alone.item(), places=5)


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class GpuTest(Case):
    device = torch.device("cuda")

    @mock.patch.object(swiftnet, "resize", swiftnet.resize)
    def test_steps_in_half_precision_and_compiled(self):
        images, labels, steps = images_of(4, 3, 256, 256), images_of(4, 8, 8) % 6, {}
        labels = torch.where(labels == 5, 255, labels).kron(torch.ones(1, 32, 32)).byte()
        for how, tolerance in (("fp32", 1e-6), ("bf16", 0.2), ("fp16", 0.05), ("compiled", 0.05)):
            config = train.Config(precision=how.replace("compiled", "fp32"), batch_per_process=2)
            model, start = (tiny_model().to(self.device) for _ in range(2))
            network = swiftnet.compiled(model) if how == "compiled" else model
            scaler = torch.amp.GradScaler(self.device.type, 64.0, enabled=how == "fp16")
            loss = train.take_step(network, torch.optim.SGD(model.parameters(), lr=1.0), scaler,
                                   images.to(self.device), labels.to(self.device), config, world=1)
            moved = [(p - q).flatten() for p, q in zip(model.parameters(), start.parameters())]
            steps[how] = loss, torch.cat(moved).detach()
            for ours, exact in zip(steps[how], steps["fp32"]):
                self.assertLess((ours - exact).norm() / exact.norm(), tolerance, how)

    def test_distances_and_metrics_equal_the_cpu(self):
        areas = (images_of(2, 40, 60) % 4).kron(torch.ones(1, 5, 5)).byte()
        far = torch.zeros(2, 300, 300, dtype=torch.uint8)             # the answer lies rows away
        far[0, 150, 150], far[1, 0, 0], far[1, 299, 299] = 1, 1, 2
        for labels in (areas, far):
            for of in (losses.boundary_distance, losses.boundary_weights):
                self.assertTrue(torch.equal(of(labels.to(self.device)).cpu(), of(labels)))
        logits, results = torch.randn(2, 4, 200, 300), []
        for device in ("cpu", self.device):
            metrics = evaluate.Metrics(4, device=device)
            metrics.update(*(tensor.to(device) for tensor in (logits, areas, areas == 2)))
            results.append(metrics.compute())
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5, equal_nan=True)


# --- evaluate.py --------------------------------------------------------------------------------

LABEL_ID = np.uint8([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])
BUDGET = "auiou", "false_invalid", "missed_invalid", "oracle"


def brute_metrics(logits, labels, invalid, temperature, thetas):
    """metrics.md by loops over classes, thresholds and bins: {name: (classes that occur, K)}, and
    (15, 3) pixels, right ones and sum of q by bin, of all pixels and of J = 0."""
    q, y = torch.softmax(logits.double() / temperature, 1).max(1)
    q, known, j = q.float(), labels != 255, invalid == 1
    should = (y != labels) | j                                       # what an oracle marks

    def uiou(c, marked):
        tp = (known & (labels == c) & (y == c) & ~marked).sum().item()
        fp = (known & (labels != c) & (y == c) & ~marked).sum().item()
        fn = (known & (labels == c) & (y != c) & ~marked).sum().item()
        ti = (known & (labels == c) & j & marked).sum().item()
        fi = (known & (labels == c) & ~j & marked).sum().item()
        return (tp + ti) / (tp + ti + fp + fn + fi) if tp + ti + fp + fn + fi else 0.0
    present = [c for c in range(logits.shape[1]) if (known & ((labels == c) | (y == c))).any()]
    rows = []
    for c, theta in itertools.product(present, thetas):
        own, marked = known & (labels == c), q < theta
        lost = (own & (y == c) & ~j & marked).sum().item() / max(1, own.sum().item())
        rows.append((uiou(c, marked), lost, uiou(c, marked | should) - uiou(c, marked),
                     uiou(c, should), uiou(c, q < 0)))
    found = np.array(rows).reshape(len(present), len(thetas), 5).transpose(2, 0, 1)
    inside = [(q > np.float32(b / 15)) & (q <= np.float32((b + 1) / 15)) for b in range(15)]
    bins = [np.array([((chosen & part).sum(), (chosen & part & (y == labels)).sum(),
                       q[chosen & part].double().sum()) for part in inside])
            for chosen in (known, known & ~j)]
    return dict(zip((*BUDGET, "iou"), found)), *bins


def random_scene(seed=0, classes=6):
    """Logits, labels, invalid of four images. Class 5 is nowhere, class 4 is predicted but never
    true, image 1 is all ignored, image 2 of one class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (4, 11, 13), generator=generator)
    logits = 1.5 * torch.randn(4, classes, 11, 13, generator=generator)
    logits += (3 * F.one_hot(labels, classes).permute(0, 3, 1, 2)
               * torch.rand(4, 1, 11, 13, generator=generator))
    logits[:, 5] -= 50
    logits[0, 2, :3] += 500                                          # confidence exactly 1
    logits[3, :, :2], labels[0, 5:7], labels[1], labels[2] = 0, 255, 255, 3      # exactly 1/C
    return logits, labels, torch.rand(labels.shape, generator=generator) < 0.3


def counted(scene, temperature=1.0, thresholds=None):
    """Metrics of (logits, labels, invalid)."""
    metrics = evaluate.Metrics(scene[0].shape[1], temperature, thresholds)
    metrics.update(*scene)
    return metrics


def computed(*arguments, **options):
    return counted(*arguments, **options).compute()


class MetricsTest(unittest.TestCase):
    def test_worked_example(self):
        q, y = torch.tensor([[.9, .6], [.7, .8]]).double(), torch.tensor([[0, 1], [1, 0]])
        p = torch.stack([q.where(y == 0, 1 - q), q.where(y == 1, 1 - q)])
        scene = (p.log()[None].float(), torch.tensor([[[0, 0], [1, 255]]]),
                 torch.tensor([[[0, 1], [0, 0]]]))
        coarse, result = computed(scene, thresholds=11), computed(scene)
        np.testing.assert_allclose(coarse["thresholds"], np.linspace(.5, 1, 11), rtol=1e-6)
        self.assertEqual(coarse["uiou"][[0, 3, 5, 9]].tolist(), [.5, 1, .5, .25])
        self.assertEqual((result["miou"], result["pixels"], result["oracle"]), (.5, 3, 1))
        self.assertAlmostEqual(result["auiou"], .55, delta=2e-3)
        np.testing.assert_allclose(result["ece"], 1 / 3, atol=1e-6)          # J = 0: (.1 + .3) / 2
        np.testing.assert_allclose(result["ece_valid"], .2, atol=1e-6)
        # above .9 class 0 loses one of its two pixels, above .7 class 1 its only one
        np.testing.assert_allclose(result["class_false_invalid"], [.1, .6], atol=2e-3)
        # below .6 pixel 2 costs class 0 a half, and class 1, as a false positive, a half
        np.testing.assert_allclose(result["class_missed_invalid"], [.1, .1], atol=2e-3)

    def test_brute_force(self):
        scene = random_scene()
        for temperature in (0.3, 1.0, 2.5):
            result = computed(scene, temperature, 19)
            found, bins, valid = brute_metrics(*scene, temperature, result["thresholds"])
            for name in BUDGET:
                of_class = found[name].mean(1)
                np.testing.assert_allclose(result["class_" + name][:5], of_class, atol=1e-12)
                self.assertTrue(result["class_" + name][5].isnan())
                self.assertAlmostEqual(result[name], of_class.mean(), places=12)
            np.testing.assert_allclose(result["uiou"], found["auiou"].mean(0), atol=1e-12)
            np.testing.assert_allclose(result["iou"][:5], found["iou"][:, 0], atol=1e-12)
            self.assertAlmostEqual(result["miou"], found["iou"][:, 0].mean(), places=12)
            self.assertAlmostEqual(result["uiou"][0].item(), result["miou"], places=12)   # at 1/C
            self.assertEqual((result["classes"], result["iou"][5].isnan()), (5, True))
            for name, (n, right, q) in (("ece", bins.T), ("ece_valid", valid.T)):
                self.assertAlmostEqual(result[name], sum(abs(right - q)) / sum(n), places=6)
            n, right, q = bins.T
            share = np.where(n, (right, q) / np.maximum(n, 1), math.nan)
            np.testing.assert_allclose(result["reliability"], [n, *share], atol=1e-6)

    def test_consequences(self):
        scene = random_scene(2)
        scene[0][3, 0, :2] = 1                                       # no ties
        at_one = computed((scene[0] * 1e6, *scene[1:]))              # confidence 1
        self.assertAlmostEqual(at_one["auiou"], at_one["miou"], places=12)
        for classes in (2, 3, 7, 11, 19, 150):                       # q = 1/C in floats as well
            result = computed((torch.zeros(1, classes, 2, 2), torch.zeros(1, 2, 2)), thresholds=5)
            self.assertEqual(result["uiou"][0].item(), result["miou"])

    def test_confidence_on_thresholds_and_on_edges_of_bins(self):
        metrics = evaluate.Metrics(2, thresholds=16)                 # 1/2, 1/2 + 1/30, ..., 1
        q = torch.cat([metrics.thresholds, torch.arange(8, 16) / 15]).unique()
        metrics.add(torch.zeros(len(q), dtype=torch.int64), q, torch.zeros(len(q)))
        result = metrics.compute()
        self.assertEqual(result["uiou"].tolist(),                    # q < theta is strict
                         [(q >= theta).sum().item() / len(q) for theta in metrics.thresholds])
        inside = [(q > np.float32(b / 15)) & (q <= np.float32((b + 1) / 15)) for b in range(15)]
        self.assertEqual(result["reliability"][0].tolist(), [part.sum().item() for part in inside])

    def test_nothing_and_one_class(self):
        result = computed((torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 255)))
        self.assertTrue(all(math.isnan(result[name]) for name in (*BUDGET, "miou", "ece")))
        result = computed((torch.tensor([0., 0, 50]).view(1, 3, 1, 1), torch.full((1, 1, 1), 2)))
        self.assertEqual((result["miou"], result["auiou"], result["classes"]), (1, 1, 1))

    def test_images_without_condition_count_once_in_all(self):
        samples = [data.Sample("", condition=condition) for condition in ("fog", "all", "all")]
        zeros = torch.zeros(2, 2)
        stream = [(i, zeros, torch.zeros(2, 2, 2), zeros, None) for i in range(3)]
        with mock.patch.object(evaluate, "predictions", lambda *_, **how: stream):
            results = evaluate.evaluate([tiny_model(2)], samples)
        self.assertEqual({name: group[0].compute()["pixels"] for name, group in results.items()},
                         {"all": 12, "fog": 4})


class FitTest(unittest.TestCase):
    def fit(self, logits, truth):
        """fit_temperature of predictions (C, N) in two images, ignored pixels below them."""
        logits, truth = logits.view(len(logits), 2, 10, -1), truth.view(2, 10, -1)
        stream = [(i, *evaluate.top_class(torch.cat([logits[:, i], -50 * logits[:, i]], 1)),
                   torch.cat([truth[i], truth[i] * 0 + 255]).byte(), None) for i in (1, 0)]
        with mock.patch.object(evaluate, "predictions", lambda *_, **how: stream):
            return evaluate.fit_temperature([], range(2))

    def test_finds_the_temperature(self):
        generator = torch.Generator().manual_seed(0)
        for wanted, spread in ((2.5, 4), (0.06, 0.05), (12.0, 4)):
            logits = spread * torch.randn(5, 8000, generator=generator)
            truth = torch.multinomial(torch.softmax(logits.T / wanted, 1), 1, generator=generator)
            found = self.fit(logits, truth[:, 0])
            self.assertAlmostEqual(found / wanted, 1, delta=0.15)
            grid = found * np.linspace(0.9, 1.1, 201)                # the slow form
            nll = [F.cross_entropy(logits.T.double() / t, truth[:, 0]).item() for t in grid]
            self.assertAlmostEqual(found, grid[np.argmin(nll)], delta=0.0021 * found)

    def test_sampled_pixels_are_no_grid(self):
        """Every tenth column is wrong. A tenth of the pixels, in raster order, would be those."""
        logits = 4 * torch.randn(5, 80_000, generator=torch.Generator().manual_seed(0))
        truth, column = logits.argmax(0), torch.arange(80_000) % 4000
        truth = truth.where(column % 10 > 0, logits.argmin(0))
        grid = np.linspace(2, 8, 61)                                     # all pixels
        nll = [F.cross_entropy(logits.T.double() / t, truth).item() for t in grid]
        self.assertAlmostEqual(self.fit(logits, truth) / grid[np.argmin(nll)], 1, delta=0.1)

    def test_no_minimum_and_no_pixel(self):
        truth = torch.arange(40) % 5
        for last in 4, 255:                                       # in an image, or no label there
            truth[20:] = last
            self.assertTrue(0.05 <= self.fit(10. * F.one_hot(truth % 5, 5).T, truth) < 0.5)
        with self.assertRaisesRegex(ValueError, "labelled"):
            self.fit(torch.randn(5, 40), torch.full((40,), 255))


def find(picture, part):
    """(row, column) at which an array of colours (h, w, 3) lies in a picture (H, W, 3)."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, part.shape)[:, :, 0]
    rows, columns = np.nonzero((windows[:, :, :1] == part[:1]).all((2, 3, 4)))
    return next((r, c) for r, c in zip(rows, columns) if (windows[r, c] == part).all())


class PicturesTest(Case):
    def test_sheet(self):
        rng, shape = np.random.default_rng(0), (40, 60)
        image, clear = (picture(seed, 60, 40) for seed in (1, 2))
        ids, prediction, invalid = np.uint8([rng.integers(0, n, shape) for n in (19, 19, 2)])
        ids[:9], q = 255, rng.choice(np.float32([.5, .75, .76, .95, .96]), shape)
        sample = data.Sample(*(str(put(self.folder / f"{i}.png", content)) for i, content in
                               enumerate((image, ids, invalid, clear))), "acdc", "fog")
        palette, grey = np.uint8([*data.PALETTE, *[[0] * 3] * 237]), np.uint8([[0], [255]])
        wrong = (prediction != ids) & (ids != 255)           # stand in for a mask
        for mask, black in ((sample.invalid, invalid), ("", wrong)):
            sheet = np.array(evaluate.sheet(sample._replace(invalid=mask), data.CLASSES, prediction,
                                            q, 1.0, width=60))
            cells = (image, palette[ids], grey[1 - black].repeat(3, 2), clear, *(
                palette[np.where(q > threshold, prediction, 255)] for threshold in (0, .75, .95)))
            y, x = zip(*(find(sheet, cell[1:-1, 1:-1]) for cell in cells))
            self.assertEqual((len({*y[:4]}), len({*y[4:]}), x[:3]), (1, 1, x[4:]))   # two rows
            self.assertTrue(y[0] < y[4] and x[0] < x[1] < x[2] < x[3])

    def test_panels_are_spread_over_the_set(self):
        samples = [data.Sample(f"{i}.png") for i in range(5)]
        watch = evaluate.panel_writer(samples, 2, self.folder, data.CLASSES, 1.0)
        with mock.patch.object(evaluate, "sheet", lambda *_: Image.new("L", (1, 1))):
            for i in range(5):
                watch(i, None, None)
        self.assertEqual(sorted(os.listdir(self.folder)), ["all-01-1.png", "all-02-3.png"])

    def test_plot_of_a_perfect_prediction(self):
        labels = torch.arange(3).repeat(4, 5)[None]
        row = computed((100. * F.one_hot(labels, 3).permute(0, 3, 1, 2), labels))
        self.assertEqual((row["auiou"], evaluate.plot("", [row], [1.0]).width), (1, 1600))


def sharp_checkpoint(path, seed=0, **changes):
    """A checkpoint whose predictions and confidences differ between pixels, and are often right."""
    torch.manual_seed(seed)
    network = swiftnet.build("convnext_atto", width=16, layer_scale=0.1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 2.5
    network.head[2].bias.data[[0, 2, 8, 9, 10]] += 3                 # what streets show most of
    return write_checkpoint(path, **{"model": network.state_dict(), **changes})


def read(path):
    with Image.open(path) as image:
        return np.array(image), image.mode.replace("I;16", "I")      # as older Pillows call it


class EvaluateScriptTest(Case):
    @classmethod
    def setUpClass(cls):
        cls.home = Path(tempfile.mkdtemp(prefix="swiftnet-"))
        cls.addClassCleanup(shutil.rmtree, cls.home, ignore_errors=True)
        cls.older = sharp_checkpoint(cls.home / "runs/b/best.pt", 1, step=7)
        cls.newer = sharp_checkpoint(cls.home / "runs/a/best.pt", step=7)
        os.utime(cls.older, (1, 1))
        cls.model = swiftnet.load_checkpoint(cls.newer)[0]
        cls.use = "--checkpoint", cls.newer

    def here(self, *arguments):
        """evaluate.py, run inside this process in the empty folder."""
        words = ["evaluate.py", "--workers", "0", *map(str, arguments)]
        with (open(self.home / "said", "w") as file, contextlib.redirect_stdout(file),
              contextlib.chdir(self.folder), mock.patch.object(sys, "argv", words)):
            evaluate.main()

    def refused(self, words, *arguments):
        with self.assertRaisesRegex((ValueError, OSError), words):
            self.here(*arguments)

    def direct(self, function, *arguments):
        """What a function of evaluate.py gives for the network, without its progress lines."""
        with open(self.home / "said", "w") as file, contextlib.redirect_stdout(file):
            return function([self.model], *arguments)

    def pooled(self, val, temperature=1.0):
        """Metrics.compute of evaluate() on all of a set."""
        samples = data.gather(streets(), [val], "val")[0]
        return self.direct(evaluate.evaluate, samples, (temperature,))["all"][0].compute()

    def told(self, *arguments):
        """The numbers in the JSON of all conditions at the first temperature."""
        self.here(*arguments, "--json", self.home / "n.json")
        numbers = json.loads((self.home / "n.json").read_text(), parse_constant=self.fail)
        return numbers["results"]["all"][0]

    def test_numbers_pictures_and_two_processes(self):
        given = "--temperature", 1.0, 0.67, "fit", "--json"
        _, text = run("evaluate.py", *given, "1.json", "--plots", "plots", "--panels", 1, "--out",
                      "sheets", cwd=self.home)
        self.assertRegex(text, f"(?s)runs/a/best.pt: step 7.*{streets()}")   # the newest, its data
        numbers = json.loads((self.home / "1.json").read_text(), parse_constant=self.fail)
        samples = sorted(data.gather(streets(), ["acdc"], "val")[0], key=lambda s: s.condition)
        fitted = self.direct(evaluate.fit_temperature, samples[1::2])
        self.assertEqual(numbers["temperatures"], [1, 0.67, fitted])
        expected = self.direct(evaluate.evaluate, samples[::2], (1, 0.67, fitted))
        for name, group in expected.items():
            for row, metrics in zip(numbers["results"][name], group, strict=True):
                for key, value in metrics.compute().items():
                    np.testing.assert_array_equal(np.array(row[key], float), np.asarray(value))
        row = expected["night"][1].compute()
        keys = "miou", "auiou", "oracle", *BUDGET[1:3], "ece", "ece_valid"
        scores = " +".join(f"{100 * row[key]:.2f}" for key in keys)
        table = text.split("\nT = 0.67,")[1].split("\nT = ")[0]
        self.assertRegex(table, rf"\nnight +1 +{row['classes']} +{scores}\n")
        self.assertRegex(text, rf"(?s)\nIoU .*\nsky( +\S+){{2}} +{100 * row['iou'][10]:.2f} ")
        for name in expected:
            plot = read(self.home / f"plots/{name}.png")[0]
            self.assertEqual(plot.shape, (785, 1600, 3))
            for half in plot[:600, :900], plot[:600, 900:]:  # curves, bars
                colours = {*map(tuple, half.reshape(-1, 3).tolist())}
                self.assertLess({*evaluate.COLOURS[:3], evaluate.INK}, colours)
        names = [f"{s.condition}-01-{Path(s.image).name}" for s in samples[::2]]
        self.assertEqual(sorted(os.listdir(self.home / "sheets")), sorted(names))
        self.assertEqual(read(self.home / "sheets" / names[0])[0].shape, (840, 2480, 3))
        self.assertEqual(0, run("evaluate.py", *given, "2.json", "--panels", 1, "--out", "two",
                                processes=2, cwd=self.home)[0])
        self.assertTrue(files(self.home / "two") == files(self.home / "sheets"))
        self.assertEqual(*((self.home / f"{world}.json").read_bytes() for world in (1, 2)))

    def test_ensemble(self):
        metrics, other = evaluate.Metrics(19), swiftnet.load_checkpoint(self.older)[0]
        for sample in data.gather(streets(), ["cityscapes"], "val")[0]:
            image, ids = map(torch.from_numpy, data.read_sample(sample, 19)[:2])
            logits = (swiftnet.predict(self.model, image) + swiftnet.predict(other, image)) / 2
            metrics.update(logits[None], ids[None])
        row = self.told(*self.use, self.older, "--val", "cityscapes")
        self.assertEqual(row["confusion"], metrics.compute()["confusion"].tolist())
        self.assertEqual(row["ece"], metrics.compute()["ece"])

    def test_images(self):
        photos, night = self.folder / "photos", streets() / "acdc/rgb_anon/night"
        for i, name in enumerate(("a.png", "in/b.jpg", "c\n.JPEG", ".h/d.png", ".e.png", "f.tif")):
            put(photos / name, picture(i, 90 + i, 60))
        turn(photos / "in/b.jpg")
        (photos / "broken.png").write_bytes(b"nothing")
        (photos / "linked").symlink_to(night)
        names = ["a.png", "in/b.png", "c\n.png",
                 *(f"linked/{path.relative_to(night)}" for path in night.rglob("*.png"))]
        out, kinds = photos / "out", ("labelTrainIds", "confidence", "overlay")
        given = *self.use, "--images", photos, "--out", out, "--temperature"
        _, text = run("evaluate.py", *given, 0.67, cwd=self.folder)
        self.assertRegex(text, f"(?s)broken.png.*of {len(names)} images.* 1 passed over")
        self.assertEqual({str(path.relative_to(out)) for path in out.rglob("*.png")},
                         {f"{kind}/{name}" for kind in kinds for name in names})
        photo = np.rot90(np.array(Image.open(photos / "in/b.jpg")), -1).copy()
        logits = swiftnet.predict(self.model, torch.from_numpy(photo).permute(2, 0, 1))
        q, y = torch.softmax(logits / 0.67, 0).max(0)
        blend = photo / 2 + np.array(data.PALETTE)[y] / 2
        for kind, mode, values in zip(kinds, ("L", "I", "RGB"), (y, 65535 * q, blend)):
            found, its_mode = read(out / kind / "in/b.png")
            self.assertEqual(its_mode, mode)
            np.testing.assert_allclose(found, values, atol=mode != "L")
        row = self.told("--score", out, "--data", streets(), "--val", "acdc:night")
        expected = self.pooled("acdc:night", 0.67)           # as in memory, but for 16 bits
        self.assertEqual(row["confusion"], expected["confusion"].tolist())
        for key in ("miou", "ece", "ece_valid", *BUDGET):
            self.assertAlmostEqual(row[key], expected[key], delta=1e-4)
        marked = put(out / "overlay/in/b.png", picture()).read_bytes()
        (out / "confidence/a.png").unlink()                  # so that a alone is made again
        self.here(*given, 0.67)
        self.assertEqual((out / "overlay/in/b.png").read_bytes(), marked)
        self.assertEqual((read(out / "confidence/a.png")[0].shape, (out / "overlay/out").exists()),
                         ((60, 90), False))
        self.refused("other settings", *given, 1.0)
        self.refused("other settings", *given, 0.67, "--checkpoint", self.older)
        self.refused("outside", *self.use, "--images", photos, "--out", photos)
        def predict(models, image, **how):                    # 2^50 bytes for one of the photos
            return torch.empty(2 ** 50) if image.shape[2] == 92 else real(models, image, **how)
        real, out = swiftnet.predict, shutil.copytree(photos / "in", self.folder / "in") / "out"
        shutil.copy(photos / "c\n.JPEG", self.folder / "in")
        with mock.patch.object(evaluate, "predict", predict):
            self.here(*self.use, "--images", self.folder / "in", "--out", out)
        self.assertRegex((self.home / "said").read_text(), r"over: \S+c\n.JPEG: \d+ bytes of memory"
                         r" .* 92 x 60 .*--tile(.|\n)* of 1 images, 1 passed over")
        self.assertEqual(os.listdir(out / "overlay"), ["b.png"])
        put(self.folder / "bad/a.png", picture()).write_bytes(b"nothing")
        self.refused("none of", *self.use, "--images", self.folder / "bad", "--out", "new")
        put(photos / "a.jpg", picture())
        self.refused("a.png", *given, 0.67)

    def test_submissions(self):
        self.refused("2000", *self.use, "--submit", "acdc", "a.zip")
        n = len(data.gather(streets(), ["acdc"], "test", False)[0])
        with mock.patch.dict(evaluate.SUBMISSIONS,           # as if the servers took so few
                             acdc=("acdc", n, (320, 180), ["labelTrainIds"]),
                             darkzurich=("acdc", n, (1920, 1080), ["labelTrainIds"]),
                             cityscapes=("acdc", n + 1, (320, 180), ["labelIds"])):
            self.here(*self.use, "--submit", "acdc", "b.zip")
            for kind in "darkzurich", "cityscapes":
                self.refused("expected", *self.use, "--submit", kind, "c.zip")
        self.assertEqual(os.listdir(self.folder), ["b.zip"])         # the parts are gone
        three = "labelTrainIds", "confidence", "labelTrainIds_invalid"
        for kind, name, *folders in (
                ("acdc", "acdc", "labelTrainIds"), ("acdc-uncertainty", "acdc", *three),
                ("cityscapes", "cityscapes", ""), ("darkzurich", "dark_zurich", *three)):
            self.here(*self.use, "--submit", kind, f"{kind}.zip", "--split", "val", "--theta", 0.5,
                      "--temperature", 0.67)
            samples = data.gather(streets(), [name], "val", False)[0]
            files = [str(Path(folder, Path(sample.image).stem + ".png"))
                     for folder in folders for sample in samples]
            out = self.folder / kind / ("" if all(folders) else "labelIds")
            with zipfile.ZipFile(self.folder / f"{kind}.zip") as archive:
                self.assertEqual(sorted(archive.namelist()), sorted(files))
                archive.extractall(out)
            image = torch.from_numpy(data.read_sample(samples[0], 19)[0])
            q, y = torch.softmax(swiftnet.predict(self.model, image) / 0.67, 0).max(0)
            expected = {"": LABEL_ID[y], "labelTrainIds": y, "confidence": 65535 * q,
                        "labelTrainIds_invalid": y.masked_fill(q < 0.5, 255)}
            for folder, file in zip(folders, files[::len(samples)]):
                values, mode = read(out / file)
                self.assertEqual(mode, "I" if folder == "confidence" else "L")
                np.testing.assert_allclose(values, expected[folder], atol=mode != "L")
            row = self.told("--score", kind, "--data", streets(), "--val", name)
            self.assertEqual(row["confusion"], self.pooled(name)["confusion"].tolist())

    def test_damaged_part_of_a_submission(self):
        for kind, folder, *bad in (
                ("cityscapes", "labelIds", np.uint8(9)),
                ("darkzurich", "labelTrainIds", *np.uint8([19, 255]), np.uint16(0)),
                ("darkzurich", "labelTrainIds_invalid", np.uint8(19)),
                ("darkzurich", "confidence", np.uint8(0))):
            submit = *self.use, "--submit", kind, "a.zip", "--split", "val"
            with mock.patch.object(evaluate, "write_submission", side_effect=OSError("cut off")):
                self.refused("cut off", *submit)             # the parts are left
            path = max((self.folder / "a.zip.parts" / folder).iterdir())
            good = read(path)[0]
            for values in (*(np.append(good, value)[1:].reshape(good.shape).astype(value.dtype)
                             for value in bad), good[1:]):
                put(path, values)
                self.refused(path.name, *submit)
            self.assertEqual(os.listdir(self.folder), ["a.zip.parts"])
            path.unlink()                                    # the one is made again
            self.here(*submit)
            (self.folder / "a.zip").unlink()

    def test_score_of_the_worked_example(self):
        gt = self.folder / "root/acdc/gt/fog/val/d"
        put(self.folder / "root/acdc/rgb_anon/fog/val/d/a_rgb_anon.png", picture(0, 2, 2))
        put(gt / "a_gt_labelTrainIds.png", np.uint8([[0, 0], [1, 255]]))
        put(gt / "a_gt_invIds.png", np.uint8([[0, 1], [0, 0]]))
        y, q = np.uint8([[0, 1], [1, 0]]), 65535 * np.array([[.9, .6], [.7, .8]])
        score, made = ("--score", "made", "--data", "root", "--val", "acdc"), self.folder / "made"

        def make(changes):
            shutil.rmtree(made, ignore_errors=True)
            good = {"labelTrainIds": y, "confidence": np.uint16(q),
                    "labelIds": LABEL_ID[1 - y]}             # these are not to be looked at
            for folder, values in {**good, **changes}.items():
                if values is not None:
                    put(made / folder / "a_rgb_anon.png", values)
        neither = {"labelTrainIds": None, "labelIds": None}
        integral = (.6 - 1 / 19) * .5 + .1 * 1 + .2 * .5 + .1 * .25
        for labels in {}, {**neither, "labelIds": LABEL_ID[y]}, {**neither, ".": y}:
            make(labels)
            row = self.told(*score)
            self.assertEqual((row["miou"], row["oracle"], row["pixels"]), (.5, 1, 3))
            self.assertAlmostEqual(row["auiou"], integral / (1 - 1 / 19), delta=2e-3)
            self.assertAlmostEqual(row["ece"], 1 / 3, places=4)
            make({**labels, "confidence": None})
            row, text = self.told(*score), (self.home / "said").read_text()
            self.assertRegex(text, r"\nall +1 +2 +50\.00( +-){6}\n")
            self.assertEqual({key for key in row if row[key] is not None},
                             {"miou", "iou", "classes", "pixels", "confusion"})
        for changes in (neither, {"labelTrainIds/twice": y}, {"labelTrainIds": y[:1]},
                        {"labelTrainIds": y + 19}, {**neither, "labelIds": y + 9}, *(
                            {"confidence": values} for values in
                            (np.uint8(q / 257), np.uint16(q)[:1], np.uint16(q / 257)))):
            make(changes)
            self.refused("a_rgb_anon.png", *score)
        self.refused("no train images", *score, "--split", "train")

    def test_little_shared_memory(self):
        """64 kB where mounting is allowed, else as if the memory were full."""
        mounted = ("unshare", "-m", "sh", "-c",
                   'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh")
        words, use = r"/dev/shm.*shared memory.*--shm-size.*--workers 0", ("--workers", 1)
        if shutil.which("unshare") and subprocess.run([*mounted, "true"]).returncode == 0:
            for given in ("train.py", *SMALL), ("evaluate.py", *self.use):
                status, output = run(*given, *use, "--data", streets(), seconds=60, before=mounted,
                                     cwd=self.folder)
                self.assertRegex(f"{status} {output}", rf"^2 (.*\n)*{given[0]}: {words}\n$")
        with mock.patch("torch.Tensor.share_memory_", side_effect=RuntimeError("shared memory")):
            self.refused(words, *self.use, *use)

    def test_refused_checkpoints_and_images(self):
        status, text = run("evaluate.py", cwd=self.folder)
        self.assertEqual((status, "train.py" in text, "Traceback" in text), (2, True, False), text)
        other = sharp_checkpoint(self.folder / "other.pt", classes=data.CLASSES[::-1])
        for checkpoint in ([other], [self.newer, other], [other, "--submit", "acdc", "a.zip"]):
            self.refused("classes", "--checkpoint", *checkpoint)
        weights = {**self.model.state_dict(), "head.2.bias": torch.full((19,), math.nan)}
        broken = sharp_checkpoint(self.folder / "broken.pt", model=weights)
        self.refused("png are not finite", "--checkpoint", broken)
        for name in "rgb_anon/fog/val/d/a_rgb_anon.png", "gt/fog/val/d/a_gt_labelTrainIds.png":
            put(self.folder / "acdc" / name, picture()).write_bytes(b"damaged")
        self.refused("a_rgb_anon.png", *self.use, "--data", self.folder)


# --- data.py ------------------------------------------------------------------------------------

# Tiny trees in the official layouts: fixture (its set, after a dash its layout) | folder | label
# value:train id | a sample's image, label, invalid mask, reference | samples, split/condition/words
# that fill {0}, {1}, {2} ... (a+b: both, !: without a label, ~: to be left out) | other traps.
SETS = """\
cityscapes | | 0:255 1:255 2:255 3:255 7:0 8:1 11:2 14:255 23:10 26:13 29:255 33:18 |
  leftImg8bit/{0}/{2}/{2}_1_leftImg8bit.png gtFine/{0}/{2}/{2}_1_gtFine_labelIds.png |
  train/clear/a+b, val/clear/c, !test/clear/d | gtFine/test/d/d_1_gtFine_labelIds.png

cityscapes_coarse | cityscapes | 7:0 26:13 | leftImg8bit/train_extra/x/{2}_leftImg8bit.png
  gtCoarse/train_extra/x/{2}_gtCoarse_labelIds.png | train/clear/x_74,
  ~train/clear/troisdorf_000000_000073 |

vistas | | 0:255 2:1 4:4 13:0 27:10 41:255 55:13 64:255 65:255 | {2}/images/{3}.jpg
  {2}/labels/{3}.png | train/all/training/-AAAAAAAAAAAAAAAAAAAAA, val/all/validation/zB |

vistas-v2 | | 64:255 65:255 2:1 | {2}/images/{3}.jpg {2}/v1.2/labels/{3}.png |
  train/all/training/-A | training/v2.0/labels/-A.png

bdd100k | | 0:0 5:5 18:18 255:255 | images/10k/{0}/{2}.jpg labels/sem_seg/masks/{0}/{2}.png |
  train/all/a+b, val/all/c | images/100k/train/a.jpg

bdd100k-old | | 9:9 255:255 | seg/images/{0}/{2}.jpg seg/labels/{0}/{2}_train_id.png | val/all/b |

bdd100k_100k | bdd100k | | images/100k/{0}/{2}.jpg | !train/all/z, !val/all/y, !test/all/x,
  ~train+~val/all/a+c | images/10k/train/a.jpg images/10k/val/c.jpg

wilddash | | 7:0 34:14 35:13 36:255 37:255 38:0 | images/{2}.jpg labels/{2}.png | train/all/at1 |

wilddash-final | | 0:255 7:0 26:13 45:5 80:1 | images/{2}.jpg panoptic/{2}.png | train/all/at2 |

acdc | | 0:0 10:10 18:18 255:255 | rgb_anon/{1}/{0}/{2}/{2}_1_rgb_anon.png
  gt/{1}/{0}/{2}/{2}_1_gt_labelTrainIds.png gt/{1}/{0}/{2}/{2}_1_gt_invIds.png
  rgb_anon/{1}/{0}_ref/{2}/{2}_1_rgb_ref_anon.png | train+val+!test/fog+night+rain+snow/G1 |
  rgb_anon/fog/train_ref/G2/G2_1_rgb_ref_anon.png gt/fog/train/G1/G1_1_gt_labelIds.png

acdc_ref | acdc | 0:0 18:18 255:255 | rgb_anon/{3}/{0}_ref/{2}/{2}_1_rgb_ref_anon.png
  gt/{3}/{0}_ref/{2}/{2}_1_gt_ref_labelTrainIds.png | train+val/clear/G1/fog+night |
  rgb_anon/fog/train_ref/G2/G2_1_rgb_ref_anon.png rgb_anon/fog/test_ref/G/G_1_rgb_ref_anon.png

camvid | | 0:0 1:1 2:2 3:3 4:4 5:5 6:6 7:7 8:8 9:9 10:10 11:255 | {0}/{2}.{3} {0}annot/{2}.png |
  train/dusk/0001TP_006690/jpg, train/day/0016E5_00390/png, val/day/0016E5_07959/png |

ade20k | ADEChallengeData2016 | 0:255 1:0 150:149 | images/{2}/{3}.jpg annotations/{2}/{3}.png |
  train/all/training/ADE_train_00000001, val/all/validation/ADE_val_00000001 |

custom | | 0:0 1:1 2:2 255:255 | images/{0}/{2}.{3} labels/{0}/{2}.png | train/all/frame 1 of
  mine/png, train/all/frame 2/JPG, val/all/x/jpeg | images/train/notes.gif

dark_zurich | | 0:0 255:255 | rgb_anon/{0}/{1}/{2}/{2}_rgb_anon.png
  gt/{0}/{1}/{2}/{2}_gt_labelTrainIds.png gt/{0}/{1}/{2}/{2}_gt_invIds.png | val/night/G1,
  !train/day+night+twilight/G2 | rgb_anon/val_ref/day/G_ref/G_ref_rgb_anon.png
  rgb_anon/train_ref/day/G_ref/G_ref_rgb_anon.png

nightcity | | 7:0 23:10 34:255 | NightCity-images/images/{0}/{2}.png
  NightCity-label/label/{0}/{2}_labelIds.png | train/night/Chicago_0001 |

nightcity-flat | | 7:0 | images/{0}/{2}.png label/{0}/{2}_labelIds.png | val/night/C |

cadc | | | cadcd/{2}/0001/labeled/image_{3}/data/0000000000.png |
  !train/snow/2018_03_06+2019_02_27/00, ~train/snow/2018_03_06/03 |

nightowls | | | nightowls_training/{2}.png | !train/night/00+01+30 |

stf | | | cam_stereo_left_lut/{2}.png | !train/all/2018-02-03_20-48-35_00400 |
"""
SETS = {fixture: row for fixture, *row in (
    [" ".join(field.split()) for field in row.split("|")] for row in SETS.split("\n\n"))}
SETS["acdc-other"] = [field.replace("rgb_anon/", "rgb_anon_trainvaltest/rgb_anon/").replace(
    " gt/", " gt_trainval/gt/") for field in SETS["acdc"]]


def pattern(values, width=24, height=16):
    return np.resize(np.array(values, np.uint8), (height, width))


def tree(root, fixture):
    """Write a fixture below `root`. Returns its set, {split: sorted samples}, {value: train id}."""
    folder, ids, files, names, traps = SETS[fixture]
    name, expected = fixture.split("-")[0], {}
    base, ids = root / (folder or name), dict(map(int, pair.split(":")) for pair in ids.split())
    for i, (split, condition, *more) in enumerate(
            words for name in names.split(", ")
            for words in itertools.product(*(word.split("+") for word in name.split("/")))):
        mark, split = re.fullmatch("([!~]?)(.*)", split).groups()
        size, paths = ((24, 16), (16, 24))[i % 2], [""] * 4
        image, label = picture(i, *size), Image.fromarray(pattern([*ids] or [0], *size))
        if name == "vistas":
            label.putpalette([7 * k % 256 for k in range(768)])
        elif fixture == "wilddash-final":                   # segments 1000, 2000, ... of 0, 1, ...
            number = 1000 * np.asarray(label, int)
            label = np.uint8(np.stack([number % 256, number // 256 % 256, number >> 16], 2))
        modes = {"ade20k": image[..., 0], "stf": Image.fromarray(image).quantize(16)}
        contents = modes.get(name, image), label, pattern([0, 1, 1], *size), picture(i + 99)
        for kind, file in enumerate(files.split()):
            if mark != "!" or kind in (0, 3):
                path = put(base / file.format(split, condition, *more), contents[kind])
                path.with_name(f"._{path.name}").write_bytes(b"a Mac's")
                paths[kind] = str(path)
        if mark != "~":
            expected.setdefault(split, []).append(data.Sample(*paths, name, condition))
    for trap in traps.split():
        put(base / trap, picture(7))
    (base / "classes.txt").write_text("kind 0\nkind 1\nkind 2\n")
    (base / "panoptic.json").write_text(json.dumps({"annotations": [
        {"file_name": "at2.png", "segments_info": [
            {"id": 1000 * value, "category_id": value} for value in ids if value]}]}))
    return name, {split: sorted(samples) for split, samples in expected.items()}, ids


def custom(root, images, labels, classes="abcdefg", split="train"):
    """Write a set of one's own. Returns its samples."""
    for i, (image, label) in enumerate(zip(images, labels)):
        put(root / f"custom/images/{split}/{i:03}.png", image)
        put(root / f"custom/labels/{split}/{i:03}.png", label)
    (root / "custom/classes.txt").write_text("\n".join(classes))
    return data.find_samples(root, "custom", split)


def turn(path):
    """Give an image file the EXIF orientation "turn by 90 degrees"."""
    photo = Image.open(path)
    photo.getexif()[0x0112] = 6
    photo.save(path, exif=photo.getexif(), quality=95)


def printed(main, *arguments):
    """(what main returns, or the status that run_main exits with; what is printed)."""
    done = []
    with mock.patch("builtins.print") as calls, mock.patch("sys.exit", done.append), \
            mock.patch("sys.argv", ["data.py", *map(str, arguments)]):
        data.run_main(lambda: done.append(main()))
    return done[0], "\n".join(" ".join(call.args) for call in calls.call_args_list)


class SetsTest(Case):
    def test_every_set_is_read_back_and_no_trap(self):
        for fixture in SETS:
            name, expected, ids = tree(self.folder / fixture, fixture)
            classes = len(data.classes_of(self.folder / fixture, name))
            for split, samples in expected.items():
                place, labelled = (self.folder / fixture, name, split), bool(samples[0].label)
                found = data.find_samples(*place, labelled)
                self.assertEqual([s._replace(segments=()) for s in found], samples)
                self.assertEqual({s.label for s in data.find_samples(*place, False)}, {""})
                if not labelled:
                    self.assertRaises(ValueError, data.find_samples, *place)
                for sample in found:
                    image, train_ids, invalid = data.read_sample(sample, classes)
                    raw = Image.open(sample.image).convert("RGB")
                    np.testing.assert_array_equal(image, np.asarray(raw).transpose(2, 0, 1))
                    truth = np.vectorize(ids.get)(pattern([*ids], *raw.size)) if labelled else None
                    np.testing.assert_array_equal(train_ids, truth, fixture)
                    truth = pattern([0, 1, 1], *raw.size) if sample.invalid else None
                    np.testing.assert_array_equal(invalid, truth, fixture)

    def test_label_tables_and_colours(self):
        for name, size, text in (
                ("cityscapes", 35, "7/8/11/12/13/17/19/20/21/22/23/24/25/26/27/28/31/32/33"),
                ("vistas", 66, "7 8 10 12 13 14 23 24/2 9 11 15/16 17 18/6/3 4/45 47/48/46 50/30/"
                 "26 28 29/27/19/20 21 22/55/61/54/58/57/52"),
                ("wilddash", 81, "7 38 41 43 61 64 70 74 75 76 79/8 52 65 77 80/11/12 56/13/"
                 "17 45 46/19/20/21/22 78/23/24/25 47 48 49/26 35/27 34/28/31/32 58/33"),
                ("camvid_19", 12, "3/4/1//7/2//6/5//0/9/10/8"),
                ("ade20k", 151, "/".join(map(str, range(1, 151))))):
            train_ids = {int(value): i for i, values in enumerate(text.split("/"))
                         for value in values.split()}
            self.assertEqual(data.DATASETS[name].table,
                             tuple(train_ids.get(value, 255) for value in range(size)), name)
        self.assertEqual(data.ADE20K_CLASSES[::149], ("wall", "flag"))
        self.assertEqual(len({*data.palette_of(data.ADE20K_CLASSES)}), 150)
        image = data.colour(torch.tensor([[*range(19), 255]]), data.palette_of(data.CLASSES))
        self.assertEqual(image.tobytes().hex(), "804080f423e846464666669cbe9999999999faaa1edcdc00"
                         "6b8e2398fb984682b4dc143cff000000008e000046003c640050640000e6770b20000000")

    def test_parts_weights_and_refused_names(self):
        for fixture in ("acdc", "camvid", "cityscapes", "wilddash"):
            tree(self.folder, fixture)
        names = ("acdc:night,fog*2.5", "camvid_19:day", "camvid_19:0001TP*.5", "cityscapes:b",
                 "camvid_19@val", "acdc@val:rain*3")
        samples, weights, classes = data.gather(self.folder, names, "train")
        self.assertEqual([s.condition for s in samples],
                         ["fog", "night", "day", "dusk", "clear", "day", "rain"])
        self.assertEqual(["val" in Path(s.image).parts for s in samples], [False] * 5 + [True] * 2)
        self.assertEqual((weights.tolist(), classes), ([2.5, 2.5, 1, 0.5, 1, 1, 3], data.CLASSES))
        for split, words, *names in (
                ("train", "nonsense.*camvid", "nonsense"), ("train", "nigth", "acdc:fog,nigth"),
                ("train", "0016E5_00390.*twice", "camvid:day", "camvid"),
                ("train", "different classes", "acdc", "camvid"), ("train", "vistas/tr", "vistas"),
                ("val", "wilddash.*train", "wilddash"), ("train", "acdc.*train", "acdc@test"),
                *(("train", "weight", f"acdc*{weight}")
                  for weight in ("0", "0.0", "-1", "nan", "inf", "abc", ""))):
            with self.assertRaisesRegex(ValueError, words, msg=names):
                data.gather(self.folder, names, split)

    def test_folder_of_pseudolabels(self):
        root, folder = self.folder / "data", self.folder / "pseudo/v1"
        tree(root, "cityscapes")
        photo = os.path.relpath(tree(root, "cadc")[1]["train"][0].image, root)
        put(folder / "cadc/0.png", pattern([0, 13, 255]))
        rows = f"image,label,selected\n{photo},cadc/0.png,1\ncadc/other.png,cadc/1.png,0\n"
        (folder / "manifest.csv").write_text(rows)
        (folder / "settings.json").write_text(json.dumps({"classes": data.CLASSES}))
        with contextlib.chdir(self.folder):
            samples, weights, _ = data.gather("data", ("cityscapes", "pseudo/v1*3"), "train")
            found = samples[-1].dataset, {*data.read_sample(samples[-1], 19)[1].flat}
            self.assertEqual((weights.tolist(), *found), ([1, 1, 3], "pseudo/v1", {0, 13, 255}))
            (folder / "settings.json").write_text(json.dumps({"classes": data.CAMVID_CLASSES}))
            for words, text, *names in (("--select", rows, "pseudo/v1:cadc"),
                                        ("different", rows, "cityscapes", "pseudo/v1"),
                                        ("--select", rows.replace(",1\n", ",0\n"), "pseudo/v1")):
                (folder / "manifest.csv").write_text(text)
                with self.assertRaisesRegex(ValueError, f"pseudo/v1.*{words}"):
                    data.gather("data", names, "train")

    def test_listing_and_sheets(self):
        for fixture in ("acdc", "acdc_ref", "camvid", "cadc"):
            tree(self.folder / "data", fixture)
        with contextlib.chdir(self.folder):
            status, output = printed(data.main, "--show", 1)
        self.assertIsNone(status, output)
        for line in ("acdc +val +4 +4 +4 +fog 1,? night 1,? rain 1,? snow 1", "acdc +test +4 +0 +0",
                     "cadc +train +2 +0 +0 +snow 2", "acdc_ref train: 3 .* left out\nacdc_ref "
                     "+train +2 +2 +0 +clear 2\n(.*\n){2}acdc_ref +val +2 +2 +0 +clear 2\n.*\ncam",
                     "(.*\\n)*.*not found.*(\\n.*)*cityscapes"):
            self.assertRegex(output, "\n" + line)
        sheets = [*(self.folder / "runs/sheets").glob("*.png")]
        self.assertEqual([Image.open(sheet).size for sheet in sheets], [(1500, 300)] * 8)
        self.assertGreater(min(np.unique(Image.open(sheet)).size for sheet in sheets), 50)

    def test_all_problems_are_listed(self):
        for fixture in ("bdd100k", "camvid", "custom", "wilddash-final", "acdc", "nightcity"):
            tree(self.folder, fixture)
        (self.folder / "bdd100k/labels/sem_seg/masks/train/a.png").unlink()
        for i in range(7):
            put(self.folder / f"bdd100k/images/10k/val/{i}.jpg", picture())
        put(self.folder / "camvid/val/0016E5_07959.jpg", picture())
        put(self.folder / "nightcity/NightCity-label/label/train/lonely_labelIds.png", pattern([7]))
        (self.folder / "custom/classes.txt").write_text("a\nb\na\n")
        (self.folder / "wilddash/panoptic.json").write_text('{"annotations": []}')
        shutil.rmtree(self.folder / "acdc/gt")
        status, output = run("data.py", "--data", self.folder, cwd=self.folder)
        self.assertEqual((status, "bdd100k train: 1 without a label left out" in output), (2, True))
        for words in (r"\b7 images.*/val/.*/val/0.jpg, .*/val/1.jpg.*labels", r"\b1 im.*at2",
                      r"07959\S+ and .*07959", "1 labels have no image: .*lonely", "classes.txt",
                      r"\b4 image.*acdc/.*/train/", r"\b4 .*/val/"):
            self.assertRegex(output, f"\nwrong: .*{words}")
        tree(self.folder / "bare", "bdd100k")
        shutil.rmtree(self.folder / "bare/bdd100k/labels")
        self.assertIn("val: 1 images lack", printed(data.main, "--data", self.folder / "bare")[1])
        for root in (self.folder / "acdc", self.folder / "nowhere"):
            status, output = printed(data.main, "--data", root)
            self.assertRegex(f"{status} {output}", f"^2 (.*\\n)*.*vistas(.*\\n)+.*none .*{root}")

    def test_damaged_files(self):
        """Named with what is wrong, if among the 100 of a split, or with --all-files."""
        whole = put(self.folder / "whole.png", picture()).read_bytes()
        cases = (("images", b"no image", ""), ("images", b"", ""), ("images", whole[:40], ""),
                 ("images", whole[:-200], "truncated"), ("images", "nowhere", "No such file"),
                 ("images", Image.new("I;16", (24, 16)), "I;16"),
                 ("images", Image.new("L", (2 ** 13, 2 ** 13 + 1)), "over"),
                 ("labels", picture(), "not colours"), ("labels", "nowhere", "No such file"),
                 ("labels", pattern([0, 77]), "77"), ("labels", pattern([0], 20, 16), "20"))
        samples = custom(self.folder, [picture()] * 226, [pattern([0, 1])] * 226)
        passed = sorted({*range(226)} - {*np.linspace(0, 225, 100).astype(int)})
        for i, (kind, content, words) in zip(passed, cases):
            sample = samples[i]
            path = Path(sample.image if kind == "images" else sample.label)
            path.unlink()
            {bytes: Path.write_bytes, str: Path.symlink_to}.get(type(content), put)(path, content)
            with self.assertRaisesRegex(ValueError, rf"/{path.name}.*{words}"):     # in training
                data.augment(sample, 7, np.random.default_rng(0), 32)
        masks = tree(self.folder, "acdc")[1]
        for split, mask in (("train", pattern([0, 255])), ("val", pattern([0], 24, 9))):
            put(Path(masks[split][2].invalid), mask)
        self.assertRegex(printed(data.main, "--data", self.folder)[1], "\ndata.py: 2 problems")
        status, output = printed(data.main, "--data", self.folder, "--all-files")
        self.assertEqual(status, 2)
        for name, words in (("rain/train/.*invIds", "255"), ("rain/val/.*invIds", "9"),
                            *((f"{i:03}", words) for i, (_, _, words) in zip(passed, cases))):
            self.assertRegex(output, rf"\nwrong: .*{name}\.png.*{words}")

    def test_exif_orientation(self):
        """Followed where there is no label; else not, but said."""
        samples = custom(self.folder, [picture()] * 2, [pattern([0, 1])] * 2)
        turn(samples[1].image)
        unlabelled = data.read_sample(data.Sample(samples[1].image), 19)[0]
        np.testing.assert_array_equal(unlabelled, np.rot90(picture(), -1).transpose(2, 0, 1))
        labelled = data.read_sample(samples[1], 19)[0]
        np.testing.assert_array_equal(labelled, picture().transpose(2, 0, 1))
        _, output = printed(data.main, "--data", self.folder)
        self.assertRegex(output, "\ncustom train: EXIF orientation not .*001.png and 0 more\n")

    def test_labels_that_are_not_what_the_table_says(self):
        """Read as what they mean, or refused in a line; never read otherwise in silence."""
        ids, train_ids = pattern([0, 7, 26]), pattern([255, 0, 13])
        grey, wide, coded, photo = map(Image.fromarray, (
            ids, np.uint16(ids), pattern([0, 1, 2]), picture()))
        ramp = grey.copy()
        ramp.putpalette([value for value in range(256) for _ in range(3)])
        coded.putpalette([value for value in (0, 7, 26) for _ in range(3)])     # by an optimiser
        sample = tree(self.folder, "cityscapes")[1]["train"][0]
        for content in grey, ramp, wide, Image.merge("RGB", [grey] * 3):
            put(Path(sample.label), content)
            np.testing.assert_array_equal(data.read_sample(sample, 19)[1], train_ids)
        for content, words in ((coded, "palette"), (photo, "not colours"),
                               (Image.fromarray(np.uint16(ids) + 300), "326"),
                               (pattern([0, 18, 255]), "255.* no meaning in cityscapes")):
            put(Path(sample.label), content)
            with self.assertRaisesRegex(ValueError, f"{sample.label}.*{words}"):
                data.read_sample(sample, 19)
        for content, seen in ((Image.fromarray(pattern([0, 1]) > 0), [0, 1]),
                              (pattern([0, 255]), [0, 255])):
            sample, = custom(self.folder, [picture()], [content], "ab")
            self.assertEqual(np.unique(data.read_sample(sample, 2)[1]).tolist(), seen)
        output = "{} {}".format(*printed(data.main, "--data", self.folder))
        self.assertRegex(output, "^2(.|\n)*none of 1 labels shows b\n(.|\n)*\nwrong: custom train: "
                         "labels show fewer than two of 2 classes.*000.png")

    def test_folders_that_match_no_layout(self):
        tree(self.folder / "right", "cityscapes")
        tree(self.folder, "acdc")
        for place, found, words in (
                ("leftImg8bit_trainvaltest gtFine_trainvaltest", None, "\ncityscapes +train +2 +2"),
                ("cityscapes cityscapes", 2, "wrong: .*/cityscapes has no images, as leftImg8bit")):
            for zipped, deeper in zip(("leftImg8bit", "gtFine"), place.split()):
                shutil.copytree(self.folder / "right/cityscapes" / zipped,
                                self.folder / "cityscapes" / deeper / zipped)
            status, output = printed(data.main, "--data", self.folder)
            self.assertEqual(status, found, output)
            self.assertRegex(output, words)
            shutil.rmtree(self.folder / "cityscapes")


class TrainingSamplesTest(Case):
    def test_resize_then_crop(self):
        """Against the usual order (resize everything, crop, pad, flip), to one grey level."""
        smooth = Image.fromarray(picture(5, 12, 9)).resize((121, 87), Image.Resampling.BICUBIC)
        label = Image.fromarray(pattern(range(7), 121, 87))
        sample, = custom(self.folder, [smooth], [label])
        for seed in range(30):
            image, ids = data.augment(sample, 7, np.random.default_rng(seed), 64)
            rng = np.random.default_rng(seed)
            zoom = rng.uniform(0.5, 2.0)                       # in the order in which augment draws
            size = round(121 * zoom), round(87 * zoom)
            left, top = (rng.integers(max(side - 64, 0) + 1) for side in size)
            box = left, top, min(left + 64, size[0]), min(top + 64, size[1])
            usual = Image.new("RGB", (64, 64), (124, 116, 104)), Image.new("L", (64, 64), 254)
            usual[0].paste(smooth.resize(size, Image.Resampling.BILINEAR).crop(box))
            usual[1].paste(label.resize(size, Image.Resampling.NEAREST).crop(box))
            flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
            self.assertLessEqual(abs(image - np.asarray(usual[0], int)[:, flip]).max(), 1)
            np.testing.assert_array_equal(ids, np.asarray(usual[1])[:, flip])

    def test_large_photos(self):
        """A short side of at most 1080 is zoomed; JPEGs decoded at 1/2, 1/4, 1/8 stay in place."""
        x, y = np.meshgrid(*((np.arange(side) + 0.5) / side * 255 for side in (1201, 1097)))
        sample, = custom(self.folder, [np.uint8(x)], [np.uint8(x // 16)], "abcdefghijklmnop")
        sample = sample._replace(image=str(self.folder / "ramps.jpg"))
        Image.fromarray(np.uint8(np.stack([x, y, y], 2).round())).save(sample.image, quality=98)
        for zoom, reduced in ((0.9, 1201), (0.5, 601), (0.25, 301), (0.125, 151)):
            self.assertEqual(np.shape(data.read_image(sample, zoom))[1], reduced)
            image, ids = data.augment(sample, 16, np.random.default_rng(0), 1100, (zoom, zoom))
            flip = slice(None, None, -1 if ids[0, 0] == 254 else 1)
            size = round(1201 * zoom * 1080 / 1097), round(1080 * zoom)
            self.assertEqual(((ids != 254).sum(1).max(), (ids != 254).sum(0).max()), size)
            image, ids = (part[:size[1], flip][:, :size[0]] for part in (image, ids))
            x, y = ((np.arange(side) + 0.5) / side * 255 for side in size)
            self.assertLess(abs(image[..., 0].mean(0) - x)[1:-1].max(), 0.9)
            self.assertLess(abs(image[..., 1].mean(1) - y)[1:-1].max(), 0.9)
            self.assertLess(abs(x - 16.0 * ids - 8).max(), 9)

    def test_wanted_class_is_shown_and_label_falls_on_image(self):
        for seed in range(20):
            rng = np.random.default_rng(seed)
            blocks = np.kron(rng.integers(0, 7, (4, 5)), np.ones((20, 30))).astype(np.uint8)
            sample, = custom(self.folder, [30 * blocks], [blocks])
            wanted = blocks[rng.integers(80), rng.integers(150)]
            pixels, ids = data.augment(sample, 7, rng, int(rng.integers(20, 200)), wanted=wanted)
            agree = abs(pixels[..., 0] - 30.0 * ids)[ids != 254] <= 1         # but along borders
            self.assertTrue(wanted in ids and agree.mean() > 0.8, (wanted, agree.mean()))

    def test_jitter_of_an_even_grey(self):
        sample, = custom(self.folder, [pattern([100])], [pattern([6])])
        rng = np.random.default_rng(0)
        crops = [data.augment(sample, 7, rng, 20, jitter=0.2) for _ in range(60)]
        levels = [image[ids == 6].mean() for image, ids in crops]
        self.assertTrue(79 <= min(levels) < 85 and 115 < max(levels) <= 121, levels)
        self.assertEqual({value for _, ids in crops for value in ids.flat}, {6, 254})

    def test_samples_depend_on_seed_epoch_position_alone(self):
        samples = custom(self.folder, [picture(0, 90, 70)], [pattern([0, 6], 90, 70)])
        keys = [[(epoch, position, 0, -1) for position in range(3)] for epoch in range(3)]

        def images(seed, workers):
            dataset = data.TrainSet(samples, 7, 64, (0.5, 2.0), seed)
            loader = torch.utils.data.DataLoader(dataset, batch_sampler=keys, num_workers=workers)
            return [image.numpy().tobytes() for batch, _ in loader for image in batch]
        self.assertEqual(images(3, 0), images(3, 2))
        self.assertEqual(len({*images(3, 0), *images(4, 0)}), 18)
        Path(samples[0].image).write_bytes(b"no image")
        self.assertRegex("{} {}".format(*printed(lambda: images(3, 1))), r"^2 \S+: \S+/000\.png ")

    def test_turns_by_weight_and_shares_of_a_step(self):
        def order(weights, length, epoch=0, seed=0):
            epochs, positions, indices, _ = zip(*data.epoch_keys(weights, length, seed, epoch))
            self.assertEqual((positions, {*epochs}), ((*range(length),), {epoch}))
            return indices
        ones, mixed = np.ones(10), np.repeat([1, 2.5], 10)
        turns = sum(np.bincount(order(mixed, 30, epoch), minlength=20) for epoch in range(40))
        self.assertAlmostEqual(turns[10:].sum() / turns[:10].sum(), 2.5, delta=0.2)
        quarter = [order(np.full(400, 0.25), 80, epoch) for epoch in range(20)]
        self.assertEqual(len({*quarter[0]}), 80)                # no image twice before it must
        self.assertGreater(len({*sum(quarter, ())}), 380)       # and all in their turn
        repeated = order(ones, 14)
        self.assertEqual((sorted(repeated[:10]), len({*repeated[10:]})), ([*range(10)], 4))
        self.assertNotIn(repeated, (order(ones, 14, epoch=1), order(ones, 14, seed=1)))
        self.assertEqual(len(order(ones * 1e-9, 3)), 3)
        keys = functools.partial(data.epoch_keys, ones, 12, 1)
        whole = [*data.step_keys(keys, 3, 0, 7)]
        self.assertEqual(sum(whole, []), keys(0) + keys(1) + keys(2)[:4])
        halves = [data.step_keys(keys, 3, 0, 7, rank, 2) for rank in (0, 1)]
        self.assertEqual(whole, [a + b for a, b in zip(*halves)])
        self.assertEqual(whole[5:], [*data.step_keys(keys, 3, 5, 7)])           # a later start

    def test_classes_come_up_evenly(self):
        """Counted from labels alone; of images with 100 pixels of a class, each by its weight."""
        labels = np.zeros((9, 60, 60), np.uint8)
        labels[:3, 40:50, 4:14], labels[7, 50:], labels[8, :3, :33] = 1, 2, 1
        samples = custom(self.folder, [picture()] * 9, labels, "abc")
        shutil.rmtree(self.folder / "custom/images")
        Path(samples[5].label).write_bytes(b"cut")
        labels = [sample._replace(image="") for sample in samples]
        counts, (damaged,) = data.count_classes(labels, 3, 2)
        self.assertIn("005.png", damaged)
        self.assertEqual(counts[2::3].tolist() + [counts[7].tolist()],
                         [[3500, 100, 0], [0, 0, 0], [3501, 99, 0], [3000, 0, 600]])
        weights = np.array([1, 1, 9] + [0.5] * 6)
        keys = data.epoch_keys(weights, 60, 0, 0, counts, 1.0)
        self.assertEqual(np.bincount([key[3] for key in keys]).tolist(), [20, 20, 20])
        self.assertTrue(all(counts[index, wanted] >= 100 for _, _, index, wanted in keys))
        self.assertIn(sum(key[2:] == (2, 1) for key in keys), range(12, 20))     # expected: 9/11
        half = data.epoch_keys(weights, 60, 0, 0, counts, 0.5)
        self.assertTrue(15 < sum(key[3] >= 0 for key in half) < 45)


class FilesTest(Case):
    def test_json(self):
        text = data.to_json({"a": torch.tensor([1, math.nan]), "b": -math.inf})
        self.assertEqual(text, '{"a": [1.0, null], "b": null}')

    def test_a_file_is_whole_or_not_there(self):
        path = self.folder / "a/file.txt"
        with data.whole_file(path) as temporary:
            temporary.write_text("one")
            inode = temporary.stat().st_ino
        with self.assertRaises(KeyError), data.whole_file(path) as temporary:
            temporary.write_text("two, cut")
            raise KeyError
        self.assertEqual((os.listdir(path.parent), path.stat().st_ino, path.read_text()),
                         ([path.name], inode, "one"))
        os.mkfifo(pipe := path.parent / "pipe")
        self.assertRaisesRegex(ValueError, "pipe", data.whole_file(pipe).__enter__)

    def test_a_locked_folder_is_refused_and_untouched(self):
        left = put(self.folder / "a/a.png", picture()).with_name(".b.pt.123.tmp")
        code = ("import data; data.run_main(lambda: data.lock_folder("
                f"{str(self.folder)!r}, '**/.*.[0-9]*.tmp'))")
        other = functools.partial(subprocess.run, [sys.executable, "-c", code], cwd=HERE,
                                  capture_output=True)
        with data.lock_folder(self.folder):
            left.touch()
            refused = other()
            self.assertEqual((refused.returncode, left.exists(), bytes(self.folder)
                              in refused.stderr), (2, True, True), refused.stderr)
        self.assertEqual((other().returncode, left.exists()), (0, False))

    def test_demo_has_every_class_and_condition(self):
        seen, shares = set(), []
        for name, split, count, conditions in (
                ("cityscapes", "train", 4, "clear"), ("cityscapes", "val", 2, "clear"),
                *(("acdc", split, 8, "fog night rain snow") for split in ("train", "val", "test")),
                ("dark_zurich", "train", 6, "day night twilight"), ("stf", "train", 8, "all"),
                ("dark_zurich", "val", 2, "night")):
            labelled = split not in data.DATASETS[name].unlabelled
            samples = data.find_samples(streets(), name, split, labelled)
            files = {Path(s.image).name if name == "acdc" else s.image for s in samples}
            self.assertEqual(len(files), count, (name, split))     # ACDC's server wants one folder
            self.assertEqual({sample.condition for sample in samples}, {*conditions.split()})
            for sample in samples if labelled else ():
                _, ids, invalid = data.read_sample(sample, 19)
                seen |= {*ids.flat}
                self.assertEqual((bool(sample.reference), invalid is None),
                                 (name == "acdc", name == "cityscapes"))
                if invalid is not None:
                    shares.append((invalid.mean(), (invalid & (ids != 255)).mean()))
        invalid, both = np.mean(shares, 0)
        self.assertTrue(0.005 < invalid < 0.25 and both > 0, (invalid, both))
        self.assertEqual(seen, {*range(19), 255})

    def test_demo_shows_no_back_of_a_face(self):
        rng, face = np.random.default_rng(0), np.array([[-9., 0, 9], [9, 0, 9], [9, 9, 9]])
        for points, shown in ((face, True), (face[::-1], False)):
            with mock.patch.object(data, "furnish", lambda rng: [(7, np.ones(3), points)]):
                self.assertEqual(7 in data.draw_street(rng, 64, 32)[1], shown)

    def test_demo_follows_its_seed_and_overwrites_nothing(self):
        def contents(root):
            return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.[pt]*")}
        code = f"import data; data.draw_demo({str(self.folder / 'a')!r}, 0, 0.02)"
        subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=HERE,
                       capture_output=True, check=True)
        with mock.patch.object(data.draw_demo, "__defaults__", ("demo", 0, 0.02)):      # the scale
            status, output = printed(data.main, "--make-demo", self.folder / "b", "--seed", 1)
        self.assertRegex(output, "acdc +val +8 +8 +8 ")
        a, b = contents(self.folder / "a"), contents(self.folder / "b")
        self.assertEqual((a, a.keys()), (contents(streets()), b.keys()))
        self.assertFalse([path for path in a if a[path] == b[path] and "gt" not in path.parts])
        put(self.folder / "mine/photo.png", picture())
        data.draw_demo(self.folder / "b", 1)                              # there already
        before = contents(self.folder)
        for name, words in (("b", "seed 1"), ("mine", "mine")):
            with self.assertRaisesRegex(ValueError, words):
                data.draw_demo(self.folder / name, 0)
        self.assertEqual(contents(self.folder), before)


# --- train.py -----------------------------------------------------------------------------------

TINY = {"convnext_atto": ((1, 1, 1, 1), (8, 16, 24, 32))}
SMALL = ("--recipe", "demo", "--levels", 2, "--crop", 96, "--width", 16, "--batch", 4,
         "--batch-per-process", 2, "--val", "cityscapes", "--log-every", 1)    # 3 steps an epoch
WRITTEN = {"last.pt", "best.pt", "log.jsonl"}
state_of = functools.partial(torch.load, weights_only=True)


class ScriptCase(Case):
    def ends(self, status, words, script, *arguments):
        """Run a script's main in this process: it must end with this status, and say `words`."""
        self.addCleanup(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        output, found = io.StringIO(), 0
        with (contextlib.redirect_stdout(output), contextlib.redirect_stderr(output),
              mock.patch.object(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])):
            try:
                data.run_main(script.main)
            except SystemExit as end:
                found = end.code
        self.assertEqual(found, status, output.getvalue())
        self.assertRegex(output.getvalue(), words)

    def kill(self, start, folder, rounds=20 if SLOW else 1):
        """Start and kill what writes to a folder, also within a file; all processes must end."""
        for i in range(rounds):
            process = start(start=True)
            self.addCleanup(process.kill)
            wait_for(lambda: [*folder.rglob(".*.tmp")] or process.poll() is not None)
            time.sleep(np.random.default_rng().uniform(0, 0.5) if i % 2 else 0)
            process.kill()
            process.communicate(timeout=30)


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def leaves(value):
    return [leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf
            for leaf in torch.utils._pytree.tree_leaves(value)]


def log_of(run, *keys):
    """Values of the log's lines that have these keys; its last line may be cut short."""
    path = run / "log.jsonl"
    lines = map(json.loads, path.read_text().split("\n")[:-1] if path.exists() else [])
    return [[line[key] for key in keys] for line in lines if {*keys} <= {*line}]


def uneven_batch():
    """Images, labels ignored unevenly, and a network whose BatchNorm does not see the batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 96, 64), dtype=torch.uint8, generator=generator)
    ids = torch.randint(0, 5, (4, 12, 8), dtype=torch.uint8, generator=generator)
    ids[1, 3:], ids[3] = 254, 255
    return images, ids.repeat_interleave(8, 1).repeat_interleave(8, 2), tiny_model().eval()


def split_step(rank, world, per_process):
    images, ids, model = uneven_batch()
    network = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    loss = train.take_step(network, mock.Mock(), torch.amp.GradScaler("cpu", enabled=False),
                           images.chunk(world)[rank], ids.chunk(world)[rank],
                           train.Config(batch_per_process=per_process), world)
    return loss, [p.grad for p in model.parameters()]


def in_processes(rank, folder, root):
    """Files of what process `rank` of 4, of 2, and alone makes of a step, of a validation where
    statistics differ, and of a run whose last process meets a loss of NaN at step 3."""
    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method("fork", force=True)    # of loader workers, as in scripts
    os.environ["RANK"], convnext.SIZES["convnext_atto"] = str(rank), TINY["convnext_atto"]
    take, model = train.take_step, tiny_model(num_classes=19)
    samples = data.gather(root, ["cityscapes"], "val")[0]
    model.head[0].running_mean += 3 * rank
    for world in [world for world in (4, 2, 1) if rank < world]:
        if world > 1:
            dist.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world)
        found = {per: split_step(rank, world, per) for per in {4 // world, 1}}
        factor = iter((1, 1, math.nan if rank == world - 1 else 1))
        argv = ["", *map(str, SMALL), "--data", root, "--steps", "4", "--workers", str(world // 2),
                "--out", f"{folder}/run{world}"]
        with (contextlib.redirect_stdout(io.StringIO()), mock.patch.object(sys, "argv", argv),
              mock.patch.object(train, "take_step", lambda *given: take(*given) * next(factor))):
            config = train.read_config()
            found["scores"] = train.validate(mock.Mock(config=config), model, samples, rank, world)
            try:
                train.train(config, rank, world, torch.device("cpu"))
            except ValueError as error:
                found["error"] = str(error)
        torch.save(found, folder / f"{world}-{rank}.pt")
        if world > 1:
            dist.destroy_process_group()


class StepTest(Case):
    def test_processes_and_accumulation_change_nothing(self):
        torch.multiprocessing.set_forkserver_preload(["torch._dynamo"])    # once, not in each of 4
        children = torch.multiprocessing.start_processes(
            in_processes, (self.folder, str(streets())), 4, False, start_method="forkserver")
        self.addCleanup(lambda: [child.kill() for child in children.processes])
        wait_for(lambda: children.join(1))
        found = {(world, rank): state_of(self.folder / f"{world}-{rank}.pt")
                 for world in (1, 2, 4) for rank in range(world)}
        images, ids, model = uneven_batch()
        loss = losses.boundary_aware_focal_loss(model(images), ids.long(),
                                                losses.boundary_weights(ids))
        loss.backward()
        for (world, rank), result in found.items():
            for per in {4 // world, 1}:
                shares = [found[world, other][per][0].item() for other in range(world)]
                self.assertAlmostEqual(sum(shares), loss.item(), places=4)
                for gradient, p in zip(result[per][1], model.parameters()):
                    torch.testing.assert_close(gradient, p.grad, rtol=1e-4,
                                               atol=1e-5 * p.grad.abs().max().item())
            self.assertEqual(result["scores"], found[1, 0]["scores"])
            self.assertRegex(result["error"], r"step 3\b.*not finite")
            self.assertEqual(state_of(self.folder / f"run{world}/last.pt")["step"], 0)
        one, two = (log_of(self.folder / run, "step", "loss") for run in ("run1", "run2"))
        self.assertEqual([step for step, _ in one], [1, 2])
        np.testing.assert_allclose(one, two, rtol=1e-4)       # the same samples, by workers or not

    def test_learning_rate(self):
        for step, rate in ((0, 4e-5), (9, 4e-4), (10, 4e-4), (60, 2.0005e-4), (110, 1e-7),
                           (35, 1e-7 + 3.999e-4 * (1 + 0.5 ** 0.5) / 2)):
            self.assertAlmostEqual(train.learning_rate(step, 4e-4, 10, 110), rate, places=12)
        self.assertAlmostEqual(train.learning_rate(0, 4e-4, 0, 10), 4e-4, places=12)

    def test_recipe_of_the_deck(self):
        wanted = {"crop": 1024, "zoom": (0.5, 2.0), "batch": 24, "batch_per_process": 3,
                  "warmup": 0, "lr": 4e-4, "backbone_lr": 1e-4, "weight_decay": 1e-4, "levels": 3,
                  "backbone": "convnext_large", "pretrained": "in22k_1k_384", "layer_scale": 1e-6,
                  "bn_momentum": 0.01, "gamma": 0.5, "alphas": (8, 6, 4, 2, 1), "epochs": 50}
        self.assertLessEqual(wanted.items(), vars(train.Config(**train.RECIPES["driving"])).items())
        self.assertRegex(str(pseudolabel.Config()), r"data='data'.* threshold=0\.99")
        for real, half in ((True, torch.bfloat16), (False, torch.float16)):
            with mock.patch("torch.cuda.is_bf16_supported", return_value=real):
                self.assertEqual(data.half_type(torch.device("cuda"), "auto"), half)

    def test_optimizer(self):
        config = train.Config(backbone="convnext_atto", pretrained="none")
        model = train.make_model(config, data.CLASSES, None)
        optimizer, _ = train.make_optimizer(model, train.Config(), torch.device("cpu"), None)
        new, backbone = ({*map(id, group["params"])} for group in optimizer.param_groups)
        self.assertEqual(backbone, {id(p) for part in (model.backbone, model.lateral)
                                    for p in part.parameters()})
        self.assertEqual(new | backbone, {*map(id, model.parameters())})
        self.assertIs(type(optimizer), torch.optim.Adam)
        self.assertEqual([[group[name] for name in ("peak", "betas", "eps", "weight_decay")]
                          for group in optimizer.param_groups],
                         [[peak, (0.9, 0.999), 1e-7, 1e-4] for peak in (4e-4, 1e-4)])
        self.assertEqual((model.head[0].momentum, model.lateral[0][0][0].momentum), (0.01, 0.01))


class TrainTest(ScriptCase):
    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch.dict(convnext.SIZES, TINY))
        self.out = self.folder / "run"

    def train(self, status, words, *more):
        self.ends(status, words, train, *SMALL, "--data", streets(), "--out", self.out, *more)

    def test_run(self):
        given = "--steps", 4, "--batch-per-process", 3                     # parts of 3 and 1
        self.train(0, r"BatchNorm sees 1 (.|\n)*step 4/4 .*loss \d+\.\d+ .*images/s .*left", *given)
        steps, epochs, rates, speeds = zip(*log_of(self.out, "step", "epoch", "lr",
                                                   "images_per_second"))
        self.assertEqual((steps, min(speeds) > 0), ((1, 2, 3, 4), True))
        np.testing.assert_allclose(epochs, (1 / 3, 2 / 3, 1, 4 / 3))
        np.testing.assert_allclose(rates, (5e-5, 1e-4, 1.5e-4, 2e-4))
        self.assertEqual([step for step, _ in log_of(self.out, "step", "miou")], [0, 4])
        state = state_of(self.out / "last.pt")
        self.assertEqual((state["step"], state["classes"], state["config"]["val"]),
                         (4, data.CLASSES, ("cityscapes",)))
        self.assertEqual({*map(type, leaves(state))}, {bytes, int, float, str, bool, type(None)})
        before = files(self.out)
        self.assertEqual({*before}, WRITTEN)
        self.train(0, "finished", *given)
        self.assertEqual(files(self.out), before)

    def test_what_a_run_does_not_mix(self):
        root = shutil.copytree(streets() / "cityscapes", self.folder / "root/cityscapes")
        arguments = ("--train", "cityscapes", "--data", root.parent, "--steps", 1)
        self.train(0, ".", *arguments)
        before = files(self.out)
        self.train(0, "finished", *arguments, "--workers", 1, "--save-every", 7)
        for words, *change in (("lr 0.001 there, 0.5 here", "--lr", 0.5),
                               ("batch 4 there.*seed 0 there", "--batch", 2, "--seed", 5),
                               ("train .*files", "--train", "cityscapes*2")):
            self.train(2, words + ".*--out", *arguments, *change)
        for path in (min(root.glob("leftImg8bit/train/*/*")), min(root.glob("gtFine/train/*/*"))):
            shutil.copy(path, path.with_name("a" + path.name))
        self.train(2, "4 .*there, 5 .*here.*--out", *arguments)
        self.assertEqual(files(self.out), before)
        (self.out / "last.pt").unlink()
        self.train(2, "best.pt.*--out", *arguments)
        self.assertEqual((self.out / "best.pt").read_bytes(), before["best.pt"])

    def test_best_survives_an_interruption(self):
        more = ("--train", "cityscapes", "--steps", 6, "--val-every", 1)          # 1 step an epoch
        scores = [{"all": score} for score in (0.0, 0.5, 0.3, 0.4, 0.2, 0.1, 0.45)]
        with mock.patch.object(train, "validate", side_effect=[*scores[:3], KeyboardInterrupt]):
            self.train(130, ".", *more)
        with mock.patch.object(train, "validate", side_effect=scores[3:]):
            self.train(0, ".", *more)
        best, last = (state_of(self.out / name) for name in ("best.pt", "last.pt"))
        self.assertEqual((best["step"], best["best"], last["step"], last["best"]), (1, 0.5, 6, 0.5))

    def test_numbers_that_overflow(self):
        """A finite loss may become weights that are not; fp16's scale goes on, until it is tiny."""
        self.train(2, r"step 1\b.*not finite.*--lr", "--steps", 6, "--lr", math.inf)
        self.assertEqual(state_of(self.out / "last.pt")["step"], 0)
        more = ("--precision", "fp16", "--steps", 2, "--out", self.folder / "half")
        self.train(0, ".", *more)
        state = state_of(self.folder / "half/last.pt")
        for scale, status, words, growth in ((2.0 ** -7, 0, "2 processes", 8),
                                             (2.0 ** -12, 2, "float16.*fp32", 7)):
            state["scaler"].update(scale=scale, _growth_tracker=7)
            torch.save({**state, "step": 1, "world": 2}, self.folder / "half/last.pt")
            self.train(status, words, *more)
            scaler = state_of(self.folder / "half/last.pt")["scaler"]
            self.assertEqual((scaler["scale"], scaler["_growth_tracker"]), (scale, growth))
        self.train(0, ".", *more, "--precision", "fp32")         # what the message told
        self.assertEqual(state_of(self.folder / "half/last.pt")["step"], 2)

    def test_full_disk(self):
        save, arguments = torch.save, ("--steps", 4, "--save-every", 1)
        hidden = RuntimeError("unexpected pos")                # as torch hides it
        hidden.__context__ = OSError(28, "No space left on device")

        def full(state, file):
            if state["step"] != 2:
                return save(state, file)
            file.write(b"half")
            raise hidden
        with mock.patch.object(torch, "save", full):
            self.train(2, "No space left.* --out, /dev/shm", *arguments)
        self.assertEqual({*files(self.out)}, {"last.pt", "log.jsonl"})
        self.assertEqual(state_of(self.out / "last.pt")["step"], 1)
        (self.out / ".last.pt.99.tmp").touch()                # of a killed process
        self.train(0, ".", *arguments)
        self.assertEqual({*files(self.out)}, WRITTEN)
        self.assertEqual([step for step, _ in log_of(self.out, "step", "loss")], [1, 2, 3, 4])

    def test_init(self):
        path = write_checkpoint(self.folder / "other.pt")
        config = train.Config(backbone="convnext_atto", width=16, init=str(path), seed=1)
        for classes in (data.CLASSES, data.CLASSES[::-1], tuple("abcde")):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                state = train.make_model(config, classes, None).state_dict()
            same = classes == data.CLASSES
            self.assertEqual("new head" in said.getvalue(), not same)
            for name, tensor in state_of(path)["model"].items():
                taken = same or not name.startswith("head.2.")
                self.assertEqual(torch.equal(state[name], tensor), taken, name)
        with self.assertRaisesRegex(ValueError, "--levels"):
            train.make_model(dataclasses.replace(config, levels=1), data.CLASSES, None)

    def test_pseudolabels(self):
        """Four streets, and a picture of nothing but buses and trains that counts four times."""
        folder = self.folder / "v1"
        put(folder / "a.png", pattern(16, 320, 180))
        (folder / "settings.json").write_text(json.dumps({"classes": data.CLASSES}))
        image = min((streets() / "stf").rglob("*.png")).relative_to(streets())
        manifest = folder / "manifest.csv"
        manifest.write_text(f"image,label,selected\n{image},a.png,1\n{image},b.png,0\n")
        arguments = "--train", "cityscapes", "--pseudo", f"{folder}*4", "--steps", 2, "--jitter", 1
        self.train(2, "v1 train: labels show fewer than two", *arguments)
        put(folder / "a.png", pattern([15, 16], 320, 180))
        with (mock.patch.object(train, "TrainSet", wraps=data.TrainSet) as train_set,
              mock.patch.object(train, "take_step", return_value=torch.ones(())) as take_step):
            self.train(0, "2 an epoch.* 5 images", *arguments)
        labels = torch.cat([call[0][4] for call in take_step.call_args_list]).flatten(1)
        self.assertEqual((len(labels), ((labels == 15) | (labels == 16)).all(1).sum()), (8, 4))
        self.assertEqual(train_set.call_args[0][2:], (96, (0.75, 1.75), 0, 1))     # jitter the last
        manifest.write_text(manifest.read_text().replace(",1", ",2").replace(",0", ",1"))
        self.train(2, "files .*--out", *arguments)

    def test_without_data(self):
        with (contextlib.chdir(self.folder), mock.patch.object(train, "draw_demo") as draw,
              mock.patch.object(train, "train") as start):
            self.ends(0, "no folder data/.*demo", train)
            self.assertEqual((start.call_args[0][0].recipe, draw.call_args[0]), ("demo", ("demo",)))
            config = start.call_args[0][0]
            self.assertEqual(train.Run(config, "", 1).folder, Path("runs/demo"))
            with mock.patch.object(train, "all_gather", lambda item: [item, (1, *item[1:])]):
                self.assertRaisesRegex(ValueError, "other --data", train.Run, config, "", 1)
            self.assertNotEqual(*(train.digest(config, [], [], [], c) for c in ("ab", "ba")))
            self.ends(0, "^$", train, "--data", streets())
            config = start.call_args[0][0]
            self.assertEqual((config.train, config.val), (("cityscapes", "acdc"), ("acdc",)))
            Path("data").mkdir()
            self.ends(2, "cityscapes", train)
            Path("data/cityscapes/deeper").mkdir(parents=True)
            self.ends(2, "data/cityscapes has no train images, as leftImg8bit", train)

    def test_images_of_train_in_val_and_masks_of_0_and_255(self):
        for other, words in ((0, "2 images of --train .* in --val"),
                             (1, "none of 2 labels shows b\n.*fewer than two")):
            for split, seed in ("train", 0), ("val", other):
                custom(self.folder, [picture(seed)] * 2, [pattern([0, 255])] * 2, "ab", split)
            self.train(2, words, "--train", "custom", "--val", "custom", "--data", self.folder)

    def test_sigterm_while_a_batch_is_awaited(self):
        augment, calls = data.augment, itertools.count(1)

        def hang(*given):
            if next(calls) == 10:                                      # of the third batch
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(100)
            return augment(*given)
        with mock.patch.object(data, "augment", hang):
            self.train(f"{self.out}: stopped by SIGTERM; the same command continues", ".",
                       "--steps", 4)
        self.assertEqual(state_of(self.out / "last.pt")["step"], 2)


class InterruptionTest(ScriptCase):
    def test_interruptions(self):
        """Stopped, killed and continued, a run ends in the bits of an undisturbed one."""
        steps = 60 if SLOW else 12
        for processes in (1, 2):
            calm, out = self.folder / f"calm{processes}", self.folder / f"killed{processes}"
            undisturbed, start = (functools.partial(
                run, "train.py", *SMALL, "--data", streets(), "--levels", 1, "--crop", 64,
                "--steps", steps, "--batch-per-process", 1, "--uniform-classes", 0.5, "--jitter",
                0.2, "--drop-path", 0.3, "--workers", 1, "--val-every", 2, "--save-every",
                1 if SLOW else 4, "--out", path, cwd=self.folder, processes=processes)
                for path in (calm, out))
            self.assertEqual(undisturbed()[0], 0)
            process = start(start=True)
            self.addCleanup(process.kill)
            wait_for(lambda: len(log_of(out, "loss")) > 1)
            if processes == 1:
                process.send_signal(signal.SIGSTOP)
                self.assertRegex(str(start()), r"^\(2, .*another process")
                process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
            self.assertIn("SIGTERM", process.communicate(timeout=40)[0])
            done, world = map(state_of(out / "last.pt").get, ("step", "world"))
            self.assertEqual((len(log_of(out, "loss")), done < steps, world), (done, 1, processes))
            self.kill(start, out)
            self.assertTrue(SLOW or state_of(out / "last.pt")["step"] < steps)   # killed, all of it
            self.assertEqual(start()[0], 0)
            for name in ("last.pt", "best.pt"):
                a, b = (state_of(path / name) for path in (calm, out))
                self.assertTrue(leaves({**a, "config": 0}) == leaves({**b, "config": 0}), name)
            self.assertEqual(log_of(out, "step", "loss", "lr"), log_of(calm, "step", "loss", "lr"))
            self.assertEqual({*files(out)}, WRITTEN)

    def test_torchrun_that_is_gone(self):
        with (mock.patch.dict(os.environ, TORCHELASTIC_USE_AGENT_STORE="True", MASTER_PORT="1",
                              MASTER_ADDR="localhost"), self.assertRaises(OSError)):
            data.start_processes()

    @unittest.skipUnless(SLOW, "long: run with --slow")
    def test_demo(self):
        self.assertEqual(run("train.py", cwd=self.folder, processes=2, seconds=3600)[0], 0)
        best = state_of(self.folder / "runs/demo/best.pt")["best"]
        self.assertGreater(best, 0.3)
        self.assertEqual(run("evaluate.py", "--json", "found", cwd=self.folder)[0], 0)
        found = json.loads((self.folder / "found").read_text())
        self.assertEqual(found["results"]["all"][0]["miou"], best)


# --- pseudolabel.py -----------------------------------------------------------------------------

class PseudolabelTest(ScriptCase):
    def setUp(self):
        super().setUp()
        self.root, self.out, self.model = (self.folder / x for x in ("data", "out", "model.pt"))
        self.pool = self.root / "pool"
        self.arguments = ("--checkpoint", self.model, "--data", self.root, "--pools", self.pool,
                          "--threshold", 0.0645, "--workers", 0)       # about half of the pixels

    def label(self, status, words, *more):
        self.ends(status, words, pseudolabel, *self.arguments, "--out", self.out, *more)

    def select(self, status, words, *more):
        self.ends(status, words, pseudolabel, "--out", self.out, "--select", *more)

    def draw(self, count):
        write_checkpoint(self.model)
        for i in range(count):
            put(self.pool / f"{'ab'[i % 2]}/{i:02}.png", picture(i, 60 + i, 40))
        put(self.root / "stf/cam_stereo_left_lut/snow.png", picture(99, 50, 70))

    def write_manifest(self, classes, lines):
        self.out.mkdir(exist_ok=True)
        head = ",".join(("image,label,pool,kept,confidence,selected", *classes))
        (self.out / "manifest.csv").write_text("\n".join([head, *lines, ""]))

    def rows(self, **wanted):
        with open(self.out / "manifest.csv", newline="") as file:
            return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]

    def test_labels_are_thresholded_predictions(self):
        self.draw(4)
        self.out = self.pool / "labels"
        put(self.pool / "b/broken.png", picture()).write_bytes(b"no image")
        for _ in range(2):                           # its own labels do not join the pool
            self.label(0, r"over.*broken.png(.|\n)*\n1 .*over", "--pools", self.pool, "stf")
        rows = self.rows(selected="1")
        self.assertEqual([(row["image"], row["pool"]) for row in rows], [
            *((f"pool/{name}.png", str(self.pool)) for name in ("a/00", "a/02", "b/01", "b/03")),
            ("stf/cam_stereo_left_lut/snow.png", "stf")])
        for row in rows:
            image = np.array(Image.open(self.root / row["image"])).transpose(2, 0, 1)
            logits = swiftnet.predict(swiftnet.load_checkpoint(self.model)[0], torch.tensor(image))
            q, ids = (part.numpy() for part in logits.softmax(0).max(0))
            label = np.array(Image.open(self.out / row["label"]))
            different = (label != np.where(q >= 0.0645, ids, 255)) & (abs(q - 0.0645) > 1e-6)
            self.assertEqual((different.any(), 0.05 < (label == 255).mean() < 0.95), (False, True))
            np.testing.assert_allclose([float(row[name]) for name in ("kept", "confidence")],
                                       [(label != 255).mean(), q.mean()], atol=2e-6)
            self.assertEqual([int(row[name]) for name in data.CLASSES],
                             [(label == c).sum() for c in range(19)])
        self.assertEqual(len(data.gather(self.root, [str(self.out)], "train")[0]), 5)

    def test_thinned_pools(self):
        write_checkpoint(self.model)
        for i in range(21):
            put(self.pool / f"{i:02}.png", picture())
        tree(self.root, "nightcity-flat")
        for pool, names in ((f"{self.pool}*0.1", "00 10 20"), ("nightcity@val", "C"),
                            (f"{self.pool}*.4", "00 02 05 07 10 12 15 17 20")):
            config = pseudolabel.Config(data=str(self.root), pools=(pool,))
            found = pseudolabel.pool_samples(config, data.CLASSES).values()
            self.assertEqual([Path(sample.image).stem for sample in found], names.split())
        self.label(2, "at most 1", "--pools", f"{self.pool}*2")

    def test_two_processes_that_are_killed(self):
        """One undisturbed process, and two that are killed and continued, write the same bytes."""
        self.draw(400 if SLOW else 100)
        self.label(0, ".")
        two = self.folder / "two"
        start = functools.partial(run, "pseudolabel.py", *self.arguments, "--out", two, processes=2,
                                  cwd=self.folder)
        self.kill(start, two)
        rows = [line for path in two.glob("rows*") for line in path.read_text().split("\n")[:-1]]
        for path in two.glob("rows*"):
            path.write_text(path.read_text() + "pool/a/00.png,cut")       # as a kill may leave it
        age = {p: p.stat().st_mtime_ns for p in (two / row.split(",")[1] for row in rows)}
        self.assertEqual(start()[0], 0)
        self.assertTrue(files(two) == files(self.out))
        self.assertEqual({p: p.stat().st_mtime_ns for p in age}, age)

    def test_what_a_folder_does_not_mix(self):
        self.draw(3)
        self.label(0, ".")
        before = files(self.out)
        for words, *change in (("flip", "--flip"), ("threshold", "--threshold", 0.5),
                               ("class_share", "--class-share", 0.5), ("pools", "--pools", "stf")):
            self.label(2, words + ".*--out", *change)
        self.label(0, ".", "--checkpoint", shutil.move(self.model, self.folder / "moved.pt"))
        write_checkpoint(self.model, step=2)
        self.label(2, "checkpoints.*--out")
        self.assertEqual(files(self.out), before)

    def test_refusals(self):
        self.draw(2)
        before = files(self.root)
        for folder in (self.root, self.pool):                # where labels would fall on images
            self.label(2, "other files|outside", "--out", folder)
        self.assertEqual(files(self.root), before)
        put(self.folder / "else/a.png", picture())
        self.label(2, "else/a.png is not below .*data", "--pools", self.folder / "else")
        self.label(2, "--min-kept", "--threshold", 1, "--select", 1)
        broken = {k: v * math.nan for k, v in state_of(self.model)["model"].items()}
        write_checkpoint(self.model, model=broken)
        self.label(2, "not finite", "--out", self.folder / "nan")
        self.assertEqual([*self.folder.glob("nan/**/*.png")], [])
        for path in self.pool.rglob("*.png"):
            path.write_bytes(b"damaged")
        self.label(2, "no image could", "--out", self.folder / "none")
        put(self.pool / "a/00.jpg", picture())
        self.label(2, r"a/00\.(jpg|png).*a/00\.(jpg|png)")

    def test_class_thresholds(self):
        """Against sorting: classes that the global threshold would starve keep their share."""
        logits = torch.randn(4, 80, 60, generator=torch.Generator().manual_seed(0))
        logits[3] -= 0.5                                  # fewer than 1000 pixels
        model = mock.Mock(num_classes=5, mean=torch.zeros(1))          # one class never comes up
        q, ids = (logits / 0.5).softmax(0).max(0)
        found = [(0, *evaluate.top_class(logits))]
        for wanted, least in ((0.3, 0.7), (0.95, 0.5)):
            config = pseudolabel.Config(threshold=0.9, class_share=wanted, temperature=0.5)
            with mock.patch.object(pseudolabel, "predictions", return_value=found):
                thresholds = pseudolabel.class_thresholds([model], [None], config, {})
            for c in range(3):
                share = q[ids == c].sort(descending=True).values
                exact = max(0.5, min(0.9, share[math.ceil(wanted * len(share)) - 1].item()))
                self.assertTrue(exact - 1 / 2000 < thresholds[c] < exact + 1e-6, (c, exact))
            self.assertTrue(least <= thresholds.min() < 0.89 < thresholds[3] < 0.91)
            self.assertEqual(thresholds[3], thresholds[4])

    def test_selection(self):
        """By hand: seven images of three pools, two with 100 pixels of train. Damaged manifests."""
        self.write_manifest(("road", "train"), (f"{name},{name}.png,{rest}" for name, rest in zip(
            "abcdefg", ("x,.9,1,1,100,0", "x,.8,1,1,500,99", "x,.1,1,1,500,100", "x,.8,1,1,500,0",
                        "y,.5,1,1,100,100", "y,.9,1,1,500,99", "z,.05,1,1,500,0"))))
        # Eligible from 0.2: a b d of x, e f of y. A budget of 3 is 1.8 and 1.2 of it: 2 and 1.
        for budget, rule, least, chosen in (
                (3, "rare", 0.2, "abe"), (3, "easiest", 0.2, "abf"), (1, "easiest", 0.2, "a"),
                (100, "rare", 0.2, "abdef"), (2, "rare", 0.05, "ce"), (5, "easiest", 0.85, "af")):
            self.select(0, "selected", budget, "--rule", rule, "--min-kept", least)
            self.assertEqual("".join(row["image"] for row in self.rows(selected="1")), chosen)
        self.select(2, "--min-kept", 3, "--min-kept", 1)
        for line in ("a,b,c,0.5,1,1", "a,b,c,much,1,1,5", "a,b,c,1,1,1,x"):
            self.write_manifest(("road",), [line])
            self.select(2, ".", 1)
        for text in "", "image,label\n":
            (self.out / "manifest.csv").write_text(text)
            self.select(2, "damaged", 1)


# --- bad input ----------------------------------------------------------------------------------

FAST = "--recipe demo --data {data} --out new --steps 1 --batch 2 --crop 160 --width 16 "
EVALUATE, LABEL = "--checkpoint {good} ", "--checkpoint {good} --data {data} --out labels "
BAD_INPUT = {      # script: [(arguments, a word that the message must hold)]
    "train.py": [
        ("--nonsense 1", "--nonsense"), ("--steps -1", "--steps"), ("--lr nan", "--lr"),
        ("--zoom 2 1", "--zoom"), ("--jitter 2", "2.0"), ("--local-rank 0", "use torchrun"),
        ("--crop 128", "--crop"), ("--backbone resnet", "resnet"), ("--data nowhere", "nowhere"),
        (FAST + "--train atlantis", "atlantis"), (FAST + "--train acdc:hail", "hail"),
        (FAST + "--train acdc*0", "weight"), (FAST + "--train acdc acdc:fog", "twice"),
        (FAST + "--train acdc@val:fog", "--val"), (FAST + "--train camvid", "camvid"),
        (FAST + "--val stf", "labelled"), (FAST + "--pseudo nowhere", "nowhere"),
        (FAST + "--init {notes}", "notes.txt"), (FAST + "--out {notes}", "notes.txt"),
        (FAST + "--pretrained nowhere.pt", "nowhere.pt"), (FAST + "--pretrained in22k", "in1k")],
    "evaluate.py": [
        ("", "runs"), ("--checkpoint {notes}", "begins with b'no checkpoint"),
        (EVALUATE + "--temperature 0", "temperature"), (EVALUATE + "--scales 0", "--scales"),
        (EVALUATE + "--tile 100", "--tile"), (EVALUATE + "--val atlantis", "atlantis"),
        (EVALUATE + "--split test", "split"), ("--images x --json y", "--json"),
        (EVALUATE + "--submit mars x.zip", "mars"), (EVALUATE + "--submit acdc x.zip", "2000"),
        (EVALUATE + "--images nowhere", "nowhere"), ("--images x --score y", "exclude"),
        (EVALUATE + "--images x --temperature fit", "fit"), ("--score {data}", "--val"),
        ("--score {data} --val acdc --temperature 2", "--score"),
        ("--score nowhere --data {data} --val acdc", "nowhere")],
    "pseudolabel.py": [
        ("", "--checkpoint"), ("--select 3 --out nowhere", "nowhere"),
        ("--checkpoint {good}", "--pools"), (LABEL + "--pools stf --threshold 2", "2.0"),
        (LABEL + "--pools atlantis", "atlantis"), ("--select 3 --threshold 0.5", "threshold")],
    "data.py": [("--data nowhere", "nowhere"), ("--make-demo {notes}", "notes.txt")]}


class BadInputTest(Case):
    def test_one_line_and_nothing_damaged(self):
        notes, good = self.folder / "notes.txt", write_checkpoint(self.folder / "good.pt")
        notes.write_text("no checkpoint, no folder\n")
        before = [notes.read_bytes(), good.read_bytes()]
        self.enterContext(contextlib.chdir(self.folder))
        for script, rows in BAD_INPUT.items():
            for text, word in rows:
                error, ignored = io.StringIO(), io.StringIO()
                arguments = text.format(data=streets(), notes=notes, good=good).split()
                with self.subTest(script=script, arguments=text):
                    with (mock.patch.object(sys, "argv", [script, *arguments]),
                          contextlib.redirect_stdout(ignored), contextlib.redirect_stderr(error),
                          self.assertRaises(SystemExit) as stopped):
                        data.run_main(sys.modules[script.removesuffix(".py")].main)
                    self.assertEqual(stopped.exception.code, 2)
                    self.assertRegex(error.getvalue(), rf"\A{script}: .+\n\Z")
                    self.assertIn(word, error.getvalue())
                self.assertEqual([notes.read_bytes(), good.read_bytes()], before)
        self.assertFalse(list(self.folder.rglob("*.tmp")) + list(self.folder.rglob("best.pt")))

    def test_as_the_shell_sees_it(self):
        for script in BAD_INPUT:
            status, output = run(script, "--workers", "many", cwd=self.folder)
            self.assertEqual((status, output.count("\n")), (2, 1), output)
        status, output = run("train.py", "--data", "nowhere", cwd=self.folder, processes=2)
        self.assertNotEqual(status, 0)
        self.assertEqual(output.count("train.py: --data nowhere"), 1, output)
        self.assertNotIn("Traceback", output.split("elastic")[0], output)


class ReadmeTest(Case):
    text = (HERE / "README.md").read_text()

    def test_commands_and_help(self):
        flags = {}
        for script in ("train.py", "evaluate.py", "pseudolabel.py", "data.py"):
            status, output = run(script, "--help", cwd=self.folder)
            self.assertEqual(status, 0)
            flags[script] = {*re.findall(r"--[a-z][a-z-]*", output)}
        commands = re.findall(r"^(?:torchrun|python) .*?(\w+\.py)((?:.*\\\n)*.*)$", self.text, re.M)
        self.assertGreater(len(commands), 12)
        for script, arguments in commands:
            with self.subTest(script=script, arguments=arguments):
                self.assertTrue((HERE / script).exists())
                given = {*re.findall(r" (--[a-z][a-z-]*)", arguments.split("#")[0])}
                self.assertLessEqual(given, flags.get(script, set()))

    def test_table_of_files(self):
        for name, lines in re.findall(r"^\| (\w+\.py) \| ([\d,]+) \|", self.text, re.M):
            count = len(re.findall(r".*\S", (HERE / name).read_text()))
            self.assertEqual(int(lines.replace(",", "")), count, name)
        self.assertLessEqual(len(self.text.splitlines()), 220)

    def test_example(self):
        write_checkpoint(self.folder / "runs/demo/best.pt")
        names, lines = {"image": images_of(3, 180, 320)}, swiftnet.__doc__.split("\n")[4:7]
        with contextlib.chdir(self.folder):
            exec("\n".join(map(str.strip, lines)), names)
        self.assertEqual(tuple(names["logits"].shape), (19, 180, 320))


class Result(unittest.TextTestResult):
    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help="Class or Class.test (default: all)")
    parser.add_argument("--slow", action="store_true", help="run the long ones too")
    given = parser.parse_args()
    torch.set_num_threads(1)     # as fast for tests this small, and the same numbers on any machine
    loader, module = unittest.TestLoader(), sys.modules[__name__]
    suite = (loader.loadTestsFromNames(given.tests, module) if given.tests
             else loader.loadTestsFromModule(module))
    result = unittest.TextTestRunner(resultclass=Result, verbosity=2).run(suite)
    if streets.cache_info().currsize:
        shutil.rmtree(streets().parent)
    failed = len(result.failures) + len(result.errors)
    print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
