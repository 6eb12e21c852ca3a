"""Tests of everything, against hand-worked numbers and slow obvious forms.

    python test_all.py                        all quick tests
    python test_all.py LossTest.test_pixel    one of them
    python test_all.py --slow                 the long ones too: the whole demo, a hundred kills
    python test_all.py --mutations 30         break the code, one place at a time: is it noticed?

Needs torch, numpy and pillow, two CPU cores, no data and no network.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import unittest
import zipfile
import zlib
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


def write_checkpoint(path, network=None, **changes):
    """A checkpoint as train.py writes it, of a small network with the 19 classes unless said
    otherwise."""
    network = network or swiftnet.build("convnext_atto", width=16)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": network.state_dict(), "classes": data.CLASSES,
                "config": {"data": "data", "val": ("custom",)},
                "architecture": {"backbone": "convnext_atto", "width": 16,
                                 "num_classes": network.num_classes},
                "step": 1, "total": 1, **changes}, path)


class Temporary(unittest.TestCase):
    """A test case with an empty folder in self.folder."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="swiftnet-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)


# --- convnext.py --------------------------------------------------------------------------------

def slow_convnext(model, x):
    """The forward pass of Liu et al. (figure 4), in plain tensor algebra on (B, C, H, W)."""
    state = model.state_dict()

    def norm(x, name):
        mean = x.mean(1, keepdim=True)
        variance = ((x - mean) ** 2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return (x * state[name + ".weight"].view(1, -1, 1, 1)
                + state[name + ".bias"].view(1, -1, 1, 1))

    def conv(x, name, **how):
        weight = state[name + ".weight"]
        return F.conv2d(x, weight.view(*weight.shape, *(1,) * (4 - weight.ndim)),
                        state[name + ".bias"], **how)

    features = []
    for i, depth in enumerate(model.depths):
        name = f"downsample_layers.{i}"
        x = norm(conv(x, name + ".0", stride=4), name + ".1") if i == 0 else \
            conv(norm(x, name + ".0"), name + ".1", stride=2)
        for j in range(depth):
            name = f"stages.{i}.{j}."
            y = norm(conv(x, name + "dwconv", padding=3, groups=x.shape[1]), name + "norm")
            y = conv(y, name + "pwconv1")
            y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
            x = x + state[name + "gamma"].view(1, -1, 1, 1) * conv(y, name + "pwconv2")
        features.append(x)
    return features


def foreign_layouts(state):
    """Our state dict under the names of the four layouts,
    written out independently of the reader."""
    torchvision, timm, hugging = {}, {}, {}
    for name, tensor in state.items():
        part = name.split(".")
        leaf = part[-1]
        if part[0] == "downsample_layers":
            i, k = int(part[1]), part[2]
            torchvision[f"features.{2 * i}.{k}.{leaf}"] = tensor
            timm[f"stem.{k}.{leaf}" if i == 0 else f"stages.{i}.downsample.{k}.{leaf}"] = tensor
            where = {"0": "patch_embeddings", "1": "layernorm"}[k]
            hugging[f"convnext.embeddings.{where}.{leaf}" if i == 0 else
                    f"convnext.encoder.stages.{i}.downsampling_layer.{k}.{leaf}"] = tensor
        else:
            i, j, what = part[1], part[2], part[3]
            tv = {"dwconv": 0, "norm": 2, "pwconv1": 3, "pwconv2": 5}
            ti = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
            torchvision_block, timm_block = (f"features.{2 * int(i) + 1}.{j}",
                                             f"stages.{i}.blocks.{j}")
            hugging_block = f"convnext.encoder.stages.{i}.layers.{j}"
            if what == "gamma":
                torchvision[torchvision_block + ".layer_scale"] = tensor.view(-1, 1, 1)
                timm[timm_block + ".gamma"] = tensor
                hugging[hugging_block + ".layer_scale_parameter"] = tensor
            else:
                torchvision[f"{torchvision_block}.block.{tv[what]}.{leaf}"] = tensor
                linear = what.startswith("pw") and leaf == "weight"
                timm[f"{timm_block}.{ti[what]}.{leaf}"] = (
                    tensor[..., None, None] if linear else tensor)
                hugging[f"{hugging_block}.{'layernorm' if what == 'norm' else what}."
                        f"{leaf}"] = tensor

    def head(names):
        return {f"{name}.{leaf}": torch.zeros(7) for name in names for leaf in ("weight", "bias")}
    return {"facebook": {"model": {**state, **head(("norm", "head"))}},
            "torchvision": {**torchvision, **head(("classifier.0", "classifier.2"))},
            "timm": {**timm, **head(("head.norm", "head.fc"))},
            "huggingface": {**hugging, **head(("convnext.layernorm", "classifier"))}}


def write_safetensors(path, tensors):
    """A safetensors file by the letter of the format."""
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + blob)


class BackboneTest(Temporary):
    # Parameters of the published classifiers with 1000 classes (torchvision and timm print them).
    PUBLISHED = {"convnext_atto": 3695520, "convnext_femto": 5217784, "convnext_pico": 9045672,
                 "convnext_nano": 15593560, "convnext_tiny": 28589128, "convnext_small": 50223688,
                 "convnext_base": 88591464, "convnext_large": 197767336,
                 "convnext_xlarge": 350196968}

    def test_parameter_counts(self):
        self.assertEqual(list(self.PUBLISHED), list(convnext.SIZES))
        for name, published in self.PUBLISHED.items():
            with torch.device("meta"):
                backbone = convnext.convnext(name)
            last = convnext.SIZES[name][1][-1]
            head = 1000 * last + 1000 + 2 * last                   # classifier and final norm
            self.assertEqual(sum(p.numel() for p in backbone.parameters()) + head, published, name)

    def test_equals_slow_form(self):
        torch.manual_seed(0)
        model = convnext.ConvNeXt((1, 2, 1, 1), (8, 12, 16, 20), layer_scale=0.7).double()
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
        for layout in (torch.contiguous_format, torch.channels_last):
            features = model(x.contiguous(memory_format=layout))
            for i, (ours, slow) in enumerate(zip(features, slow_convnext(model, x))):
                self.assertEqual(ours.shape, (2, model.dims[i], 64 >> i + 2, 96 >> i + 2))
                self.assertLess((ours - slow).abs().max(), 1e-12)

    def test_checkpointed_blocks_and_drop_path(self):
        torch.manual_seed(0)
        model = convnext.ConvNeXt((2, 1, 1, 1), (8, 12, 16, 20), drop_path=0.5, layer_scale=1.0)
        rates = [block.drop_path for stage in model.stages for block in stage]
        self.assertEqual(rates, [0.0, 0.125, 0.25, 0.375, 0.5])
        x, grads, calls = torch.randn(2, 3, 64, 64), [], []
        model.stages[0][0].dwconv.register_forward_hook(
            lambda *_: calls.append(model.checkpoint_blocks))
        for model.checkpoint_blocks in (False, True):
            model.zero_grad()
            torch.manual_seed(1)
            sum(f.square().sum() for f in model(x)).backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        self.assertEqual(calls, [False, True, True])                   # recomputed: twice
        for plain, recomputed in zip(*grads):
            torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-5)
        # The mean over many draws of a dropped residual is the residual.
        block = convnext.Block(8, drop_path=0.25, layer_scale=1.0)
        x = torch.randn(1, 8, 7, 7).expand(4000, -1, -1, -1)
        residual = (block(x) - x).detach()
        kept = residual.flatten(1).abs().amax(1) > 0
        self.assertAlmostEqual(kept.float().mean().item(), 0.75, delta=0.03)
        block.eval()
        torch.testing.assert_close(residual[kept][0] * 0.75, (block(x[:1]) - x[:1])[0].detach(),
                                   rtol=1e-4, atol=1e-5)

    def test_reads_all_layouts(self):
        torch.manual_seed(3)
        source = convnext.ConvNeXt((1, 1, 2, 1), (8, 12, 16, 20))
        for p in source.parameters():
            p.data = torch.randn_like(p)
        for layout, state in foreign_layouts(source.state_dict()).items():
            path = self.folder / f"{layout}.download"              # the name must not matter
            for write in (torch.save, None):
                if write:
                    torch.save(state, path)
                else:
                    write_safetensors(path, state.get("model", state))
                model = convnext.ConvNeXt((1, 1, 2, 1), (8, 12, 16, 20))
                convnext.load_pretrained(model, str(path))
                for name, tensor in source.state_dict().items():
                    self.assertTrue(torch.equal(model.state_dict()[name], tensor), (layout, name))

    def test_nothing_is_lost_in_silence(self):
        model = convnext.ConvNeXt((1, 1, 1, 1), (8, 12, 16, 20))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        good = foreign_layouts(model.state_dict())["timm"]
        missing = {k: v for k, v in good.items() if k != "stages.2.blocks.0.gamma"}
        for state, words in ((missing, "missing: stages.2.0.gamma"),
                             ({**good, "stages.0.blocks.0.extra": torch.ones(1)},
                              "unexpected: stages.0.blocks.0.extra"),
                             ({**good, "stem.0.weight": torch.ones(9, 3, 4, 4)},
                              r"\(9, 3, 4, 4\) in the file"),
                             ({"conv1.weight": torch.ones(1)}, "no ConvNeXt in the layout")):
            with self.assertRaisesRegex(ValueError, words):
                convnext.load_pretrained(model, state)
        for name, tensor in model.state_dict().items():
            self.assertTrue(torch.equal(tensor, before[name]))

    def test_published_table(self):
        large = convnext.convnext("convnext_pico")
        with self.assertRaisesRegex(ValueError, "never published as 'in22k'; there is 'in1k'"):
            convnext.load_pretrained(large, "in22k")
        with mock.patch("torch.hub.get_dir", return_value=str(self.folder)), \
                mock.patch("torch.hub.download_url_to_file", side_effect=OSError("no network")):
            with self.assertRaisesRegex(FileNotFoundError,
                                        re.escape(str(self.folder)) + ".*convnext_pico_d1"):
                convnext.load_pretrained(large, "in1k")
            # What the message says: put the file there, and it is taken.
            path = (self.folder / "checkpoints"
                    / os.path.basename(convnext.WEIGHTS["convnext_pico"]["in1k"]))
            torch.save(convnext.convnext("convnext_pico", layer_scale=0.5).state_dict(), path)
            convnext.load_pretrained(large, "in1k")
        self.assertEqual(large.stages[0][0].gamma[0].item(), 0.5)

    def test_bad_files(self):
        good = self.folder / "good.safetensors"
        write_safetensors(good, {"a": torch.ones(4)})
        raw = good.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        bad = {"empty": b"", "text": b"hello, this is no checkpoint",
               "zip": b"PK\x03\x04" + bytes(50),
               "cut": raw[:-4], "header": (2 ** 62).to_bytes(8, "little") + raw[8:],
               "json": raw[:8] + b"{" + b"x" * (size - 1) + raw[8 + size:],
               "offsets": raw.replace(b"[0, 16]", b"[9, 25]"), "shape": raw.replace(b"[4]", b"[5]"),
               "dtype": raw.replace(b"F32", b"F99"),
               "negative": raw.replace(b"[0, 16]", b"[-4,12]")}
        for name, content in bad.items():
            path = self.folder / name
            path.write_bytes(content)
            with self.assertRaisesRegex(ValueError, re.escape(str(path)), msg=name):
                convnext.read_tensors(path)
        with self.assertRaises(FileNotFoundError):
            convnext.read_tensors(self.folder / "nowhere.pth")
        torch.save({"model": Path("pickled object")}, self.folder / "object.pth")
        with self.assertRaisesRegex(ValueError, "plain values.* it holds a pathlib"):
            convnext.read_tensors(self.folder / "object.pth")


# --- swiftnet.py --------------------------------------------------------------------------------

class SwiftNetTest(Temporary):
    def test_macs_of_the_deck(self):
        for name, macs in (("convnext_base", 956.45e9), ("convnext_large", 2066.40e9)):
            with torch.device("meta"):
                model = swiftnet.build(name)
            self.assertLess(abs(swiftnet.count_macs(model, 1024, 2048) / macs - 1), 1e-3)

    def test_macs_by_hand(self):
        # One convolution of the stem on 8x8: 2x2 outputs, 4x4x3 weights each, 8 channels.
        model = tiny_model()
        counted = swiftnet.count_macs(model, 128, 128)
        by_hand, hooks = [], []
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                hooks.append(module.register_forward_hook(lambda m, _, out: by_hand.append(
                    out.numel() * m.weight[0].numel())))
        model.eval()(torch.zeros(1, 3, 128, 128))
        self.assertEqual(counted, sum(by_hand))

    def test_structure_by_slow_form(self):
        """The pyramid written out stride by stride, on an image that needs no padding."""
        model = tiny_model().double().eval()
        image = torch.randint(0, 256, (1, 3, 128, 256), dtype=torch.uint8)
        x = ((image.double() - torch.tensor(swiftnet.MEAN).view(3, 1, 1))
             / torch.tensor(swiftnet.STD).view(3, 1, 1))
        half = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        quarter = (half[..., ::2, ::2] + half[..., 1::2, ::2] + half[..., ::2, 1::2]
                   + half[..., 1::2, 1::2]) / 4
        at = {}
        for level, image_level in enumerate((x, half, quarter)):
            for i, feature in enumerate(slow_convnext(model.backbone, image_level)):
                stride = 4 * 2 ** (i + level)
                at[stride] = at.get(stride, 0) + model.lateral[level][i](feature)
        self.assertEqual(sorted(at), [4, 8, 16, 32, 64, 128])
        y = at[128]
        for stride, blend in zip((64, 32, 16, 8, 4), model.ladder):
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
            y = blend(y + at[stride])
        slow = F.interpolate(model.head(y), scale_factor=4, mode="bilinear", align_corners=False)
        model.mean, model.std = model.mean.double(), model.std.double()
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            ours = model(image)
        self.assertLess((ours - slow).abs().max(), 1e-9)

    def test_any_size(self):
        model = tiny_model().eval()
        for height, width in ((1, 1), (3, 200), (127, 129), (128, 128), (129, 1)):
            for images in (torch.zeros(2, 3, height, width, dtype=torch.uint8),
                           torch.zeros(2, 3, height, width)):
                with torch.no_grad():
                    self.assertEqual(model(images).shape, (2, 5, height, width))
        # Padding is the mean colour, right and below.
        image = torch.randint(0, 256, (1, 3, 100, 90)).float()
        padded = torch.tensor(swiftnet.MEAN).view(1, 3, 1, 1).repeat(1, 1, 128, 128)
        padded[..., :100, :90] = image
        with torch.no_grad():
            torch.testing.assert_close(model(image), model(padded)[..., :100, :90])

    def test_one_backbone_for_all_levels(self):
        model = tiny_model()
        calls = []
        model.backbone.register_forward_hook(
            lambda m, inputs, out: calls.append(tuple(inputs[0].shape[2:])))
        model(torch.zeros(1, 3, 256, 128, dtype=torch.uint8))
        self.assertEqual(calls, [(256, 128), (128, 64), (64, 32)])
        single = tiny_model(levels=1)
        self.assertEqual(len(single.lateral), 1)
        self.assertEqual(single(torch.zeros(1, 3, 40, 40)).shape, (1, 5, 40, 40))

    def test_input_is_left_alone(self):
        image = torch.randint(0, 256, (2, 3, 64, 64)).float()
        before = image.clone()
        tiny_model()(image)
        self.assertTrue(torch.equal(image, before))

    def test_widths(self):
        widths = {name: swiftnet.ladder_width(name) for name in convnext.SIZES}
        self.assertEqual(widths, {"convnext_atto": 128, "convnext_femto": 128, "convnext_pico": 128,
                                  "convnext_nano": 128, "convnext_tiny": 256, "convnext_small": 256,
                                  "convnext_base": 256, "convnext_large": 320,
                                  "convnext_xlarge": 320})

    def test_predict(self):
        models = [tiny_model(seed=seed).eval() for seed in (0, 1)]
        image = torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
        total = 0
        with torch.no_grad():
            for scale, model, mirrored in itertools.product((0.5, 1.0, 1.5), models, (False, True)):
                x = F.interpolate(image[None].float(), size=(round(70 * scale), round(90 * scale)),
                                  mode="bilinear", align_corners=False, antialias=scale < 1)
                y = model(x.flip(3)).flip(3) if mirrored else model(x)
                total = total + F.interpolate(y, size=(70, 90), mode="bilinear",
                                              align_corners=False)
        ours = swiftnet.predict(models, image, scales=(0.5, 1.0, 1.5), flip=True)
        self.assertEqual((ours.shape, ours.dtype), ((5, 70, 90), torch.float32))
        torch.testing.assert_close(ours, total[0] / 12, rtol=1e-4, atol=1e-4)

    def test_tiles(self):
        """Where the receptive field ends inside the thrown-away margin, tiles change nothing."""
        model = tiny_model(levels=1).eval()
        model.backbone.stages[3] = model.backbone.stages[2] = nn.Sequential()          # short reach
        probe = torch.rand(1, 3, 512, 512).mul(255).requires_grad_()
        model(probe)[0, :, 256, 256].sum().backward()
        touched = probe.grad.abs().sum((0, 1)).nonzero()
        self.assertLess((touched - 256).abs().max().item(), 128)                          # tile / 4
        for size in ((600, 1100), (90, 700)):                    # lower than half a tile, too
            image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
            whole, tiled = swiftnet.predict(model, image), swiftnet.predict(model, image, tile=512)
            torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)
        with self.assertRaisesRegex(ValueError, "multiple of 512"):
            swiftnet.predict(model, image, tile=500)

    def test_size_table_runs(self):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            swiftnet.main()
        self.assertRegex(out.getvalue(), r"convnext_base +256 +[\d.]+ +956\.45 +957\.1 +-0\.07%")
        self.assertRegex(out.getvalue(), r"convnext_large +320 +[\d.]+ +2066\.40 +2067\.3 +-0\.04%")


# --- losses.py ----------------------------------------------------------------------------------

def brute_distance(labels):
    """Distance to the nearest other label by looking at every pair of pixels."""
    out = torch.full(labels.shape, math.inf)
    height, width = labels.shape[1:]
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for b, y, x in itertools.product(range(len(labels)), range(height), range(width)):
        other = labels[b] != labels[b, y, x]
        if other.any():
            squared = ((ys - y) ** 2 + (xs - x) ** 2)[other].min()
            out[b, y, x] = squared.double().sqrt().float()
    return out


class SpeedTest(unittest.TestCase):
    """Speed options leave the results as they are."""

    def grads(self, model, network, images):
        model.zero_grad()
        logits = network(images)
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    def setUp(self):
        torch.manual_seed(0)
        self.model = tiny_model().train()
        self.images = torch.randint(0, 256, (2, 3, 160, 192), dtype=torch.uint8)
        self.plain = self.grads(self.model, self.model, self.images)

    def test_recomputed_blocks_are_equal(self):
        self.model.backbone.checkpoint_blocks = True
        again = self.grads(self.model, self.model, self.images)
        self.assertTrue(all(map(torch.equal, self.plain, again)))
        batches = self.model.lateral[0][0][0].num_batches_tracked
        self.assertEqual(batches.item(), 2)                    # no statistics are updated twice

    def test_whole_network_is_one_graph_and_equal(self):
        # the graph as torch.compile sees it, without the compiler behind it; a graph break raises
        network = torch.compile(self.model, backend="aot_eager", fullgraph=True)
        for a, b in zip(self.plain, self.grads(self.model, network, self.images)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    @unittest.skipUnless(any(map(shutil.which, ("c++", "g++", "clang++"))), "needs a C++ compiler")
    def test_compiled_equals_eager(self):
        """At this size torch 2.13 compiles the stock upsampling to gradients of 0 before it."""
        model = swiftnet.SwiftNet(convnext.ConvNeXt((1, 1, 1, 1), (8, 8, 8, 8), layer_scale=0.5),
                                  num_classes=5, width=8, levels=1).train()
        network, images = torch.compile(model, dynamic=False), self.images[..., :64, :64]
        for a, b in zip(self.grads(model, model, images), self.grads(model, network, images)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

    def test_memory_layout_is_no_matter(self):
        for module in self.model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.data = module.weight.data.clone(
                    memory_format=torch.contiguous_format)
        for a, b in zip(self.plain, self.grads(self.model, self.model, self.images)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

    def test_resize_of_compiled_networks(self):
        x = torch.randn(2, 5, 6, 7, dtype=torch.float64, requires_grad=True)
        y, expected = (f(x) for f in (lambda x: swiftnet.compiled_resize(x, 12, 28),
                                      lambda x: swiftnet.resize(x, (12, 28))))
        grad = torch.randn_like(y)
        self.assertTrue(torch.equal(y, expected))
        self.assertTrue(torch.equal(*(torch.autograd.grad(t, x, grad)[0] for t in (y, expected))))
        for operator, args in ((swiftnet.compiled_resize, (x, 12, 28)),
                               (swiftnet.resize_gradient, (grad, 6, 7))):
            torch.library.opcheck(operator, args, test_utils=(
                "test_schema", "test_autograd_registration", "test_faketensor",
                "test_aot_dispatch_static"))

    @unittest.skipUnless(platform.libc_ver()[0] == "glibc", "of glibc alone")
    def test_freed_memory_stays(self):
        """Of tensors one after the other only the first few are given pages by the kernel."""
        script = """if True:
            import resource, torch, evaluate
            evaluate.start_processes()
            faults = []
            for _ in range(20):
                pair = torch.ones(2 ** 24), torch.ones(2 ** 24)
                del pair
                faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
            print(faults[-1] - faults[9])"""
        result = subprocess.run([sys.executable, "-c", script], env=environment(), check=True,
                                capture_output=True, text=True)
        self.assertLess(int(result.stdout), 300)

    def test_images_of_another_size_find_the_memory_free(self):
        images = [(i, torch.zeros(3, 8, width)) for i, width in enumerate((8, 8, 9, 9))]
        with mock.patch.multiple(evaluate, EvalSet=lambda *_: images, glibc=mock.DEFAULT,
                                 predict=lambda models, image: image) as replaced, \
                contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(len([*evaluate.predictions([], images, 3, torch.device("cpu"))]), 4)
        self.assertEqual(replaced["glibc"].mock_calls, 2 * [mock.call("malloc_trim", 0)])

    def test_benchmark_is_of_the_recipe(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):    # no data/ here
            self.assertEqual(train.settle({"benchmark": True}).backbone, "convnext_large")

    def test_benchmark_prints_a_table(self):
        output, config = io.StringIO(), train.settle({
            "benchmark": True, "backbone": "convnext_atto", "levels": 1, "crop": 64,
            "batch_per_process": 1})
        with contextlib.redirect_stdout(output):
            train.benchmark(config, 0, 1, torch.device("cpu"))
        text = output.getvalue()
        self.assertRegex(text, r"(?s)training step 1x64x64: [\d.]+ ms\n.* ladder [\d.]+ ms"
                               r".*\nceiling: [\d.]+ TFLOP/s")
        rows = re.findall(r"^(\w.*?) +[\d.]+ +[\d.]+-[\d.]+ +- +[\d.]+ +[\d.]+ +[\d.]+% +-$", text,
                          re.M)
        self.assertEqual(rows, ["forward 1x64x128", "training step 1x64x64",
                                "training step 1x64x64, blocks recomputed"])

    def test_benchmark_goes_on_after_what_does_not_fit(self):
        output, config = io.StringIO(), train.settle({
            "benchmark": True, "backbone": "convnext_atto", "levels": 1, "crop": 64,
            "batch_per_process": 1})
        with (mock.patch.object(train.Steps, "__call__", side_effect=torch.OutOfMemoryError),
              contextlib.redirect_stdout(output)):
            train.benchmark(config, 0, 1, torch.device("cpu"))
        self.assertIn("out of memory: eager\nout of memory: eager, blocks recomputed\n",
                      output.getvalue())
        self.assertRegex(output.getvalue(), r"\nforward 1x64x128 .*%")
        with (mock.patch.object(train, "time_variant", side_effect=torch.OutOfMemoryError),
              contextlib.redirect_stdout(output),
              self.assertRaisesRegex(ValueError, "does not fit .* choose a smaller --crop")):
            train.benchmark(config, 0, 1, torch.device("cpu"))


class LossTest(unittest.TestCase):
    def maps(self):
        random = np.random.default_rng(0)
        for k, (height, width) in enumerate([(1, 1), (1, 23), (19, 1), (9, 31), (24, 24), (17, 29),
                                             (33, 20)]):
            few = torch.from_numpy(random.integers(0, 3, (2, height, width)))
            yield few
            yield torch.where(torch.from_numpy(random.random((2, height, width)) < 0.02),
                              255, 7)                                                  # thin
            blocks = torch.from_numpy(random.integers(0, 4, (2, height // 8 + 1, width // 8 + 1)))
            yield blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width]
        yield torch.full((2, 12, 15), 255)
        yield torch.full((1, 12, 15), 3)

    def test_distance_is_exact(self):
        for labels in self.maps():
            for dtype in (torch.int64, torch.uint8):
                self.assertTrue(torch.equal(losses.boundary_distance(labels.to(dtype)),
                                            brute_distance(labels)))

    def test_distance_far_away(self):
        labels = torch.zeros(1, 40, 6000, dtype=torch.uint8)       # squares above 2^24
        labels[0, 39, 5999] = 1
        distance = losses.boundary_distance(labels)
        self.assertEqual(distance[0, 0, 0].item(),
                         float(np.float32(math.sqrt(39 ** 2 + 5999 ** 2))))

    def test_distance_of_a_long_image(self):
        labels = torch.zeros(1, 1, 50_000, dtype=torch.uint8)      # squares above 2^31
        labels[0, 0, 0] = 1
        expected = torch.arange(50_000, dtype=torch.float32)
        expected[0] = 1
        self.assertTrue(torch.equal(losses.boundary_distance(labels)[0, 0], expected))

    def test_distance_under_flips(self):
        labels = torch.randint(0, 3, (2, 21, 34), generator=torch.Generator().manual_seed(1))
        for axes in ((1,), (2,), (1, 2)):
            self.assertTrue(torch.equal(losses.boundary_distance(labels.flip(axes)),
                                        losses.boundary_distance(labels).flip(axes)))
        self.assertTrue(torch.equal(losses.boundary_distance(labels.mT),
                                    losses.boundary_distance(labels).mT))

    def test_weights_table(self):
        labels = torch.zeros(1, 3, 400, dtype=torch.int64)
        labels[..., 200:] = 1
        labels[..., 399] = 255
        expected = []
        for x in range(400):
            d = 200 - x if x < 200 else min(x - 199, 399 - x) if x < 399 else None
            expected.append(0 if d is None else 8 if d < 4 else 6 if d < 16 else 4 if d < 64
                            else 2 if d < 128 else 1)
        for row in losses.boundary_weights(labels)[0]:
            self.assertEqual(row.tolist(), expected)

    def test_weights_equal_distances(self):
        generator = torch.Generator().manual_seed(2)
        labels = torch.randint(0, 6, (2, 12, 10), generator=generator)
        labels[labels == 5] = 255
        labels = labels.repeat_interleave(23, 1).repeat_interleave(31, 2)
        distance = losses.boundary_distance(labels)
        for bins, alphas in ((losses.BINS, losses.ALPHAS), ((2, 9), (5, 3, 1))):
            expected = torch.full_like(distance, alphas[-1])
            for edge, alpha in reversed(list(zip(bins, alphas))):
                expected[distance < edge] = alpha
            expected[labels == 255] = 0
            self.assertTrue(torch.equal(losses.boundary_weights(labels, bins, alphas), expected))
        with self.assertRaises(ValueError):
            losses.boundary_weights(labels, (1, 2), (1, 2))

    def test_pixel(self):
        """p = softmax([ln 3, 0])[0] = 3/4: loss = 8 exp(0.5 / 4) (-ln 0.75)."""
        logits = torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1)
        loss = losses.boundary_aware_focal_loss(logits, torch.zeros(1, 1, 1, dtype=torch.int64),
                                                torch.full((1, 1, 1), 8.0))
        self.assertAlmostEqual(loss.item(), 8 * math.exp(0.125) * -math.log(0.75), places=5)
        self.assertAlmostEqual(loss.item(), 2.607892, places=5)

    def test_slow_form_and_gradient(self):
        generator = torch.Generator().manual_seed(4)
        logits = 3 * torch.randn(2, 5, 9, 11, generator=generator)
        labels = torch.randint(0, 5, (2, 9, 11), generator=generator)
        labels[torch.rand(2, 9, 11, generator=generator) < 0.2] = 255
        weights = losses.boundary_weights(labels)
        for gamma, normalizer in ((0.5, None), (2.0, 1234)):
            a = logits.clone().requires_grad_()
            before = labels.clone()
            loss = losses.boundary_aware_focal_loss(a, labels, weights, gamma, normalizer)
            loss.backward()
            self.assertTrue(torch.equal(labels, before))
            b = logits.double().requires_grad_()
            total, count = 0, 0
            for n, y, x in itertools.product(range(2), range(9), range(11)):
                c = labels[n, y, x]
                if c == 255:
                    continue
                log_p = b[n, c, y, x] - torch.logsumexp(b[n, :, y, x], 0)
                factor = math.exp(gamma * (1 - math.exp(log_p.item())))      # a number: no gradient
                total, count = total - weights[n, y, x].double() * factor * log_p, count + 1
            slow = total / (normalizer or count)
            slow.backward()
            self.assertAlmostEqual(loss.item(), slow.item(), places=5)
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-7)

    def test_finite_differences(self):
        """At gamma = 0 the loss has no detached factor,
        so differences must see its whole gradient."""
        generator = torch.Generator().manual_seed(5)
        logits = torch.randn(1, 3, 4, 4, generator=generator).requires_grad_()
        labels = torch.randint(0, 3, (1, 4, 4), generator=generator)
        weights = losses.boundary_weights(labels)
        losses.boundary_aware_focal_loss(logits, labels, weights, gamma=0.0).backward()
        with torch.no_grad():
            for index in ((0, 0, 1, 1), (0, 2, 3, 0), (0, 1, 2, 2)):
                values = []
                for sign in (1, -1):
                    moved = logits.clone()
                    moved[index] += sign * 0.05
                    values.append(losses.boundary_aware_focal_loss(moved, labels, weights,
                                                                   gamma=0.0).item())
                self.assertAlmostEqual((values[0] - values[1]) / 0.1, logits.grad[index].item(),
                                       places=2)

    def test_all_ignored(self):
        logits = torch.randn(1, 4, 8, 8, requires_grad=True)
        labels = torch.full((1, 8, 8), 255)
        loss = losses.boundary_aware_focal_loss(logits, labels, losses.boundary_weights(labels))
        loss.backward()                                            # attached: must not raise
        self.assertEqual(loss.item(), 0)
        self.assertEqual(logits.grad.abs().max().item(), 0)


# --- evaluate.py --------------------------------------------------------------------------------

def brute_metrics(logits, labels, invalid, temperature, thetas):
    """IoU, UIoU at every theta and ECE by counting pixels one threshold at a time (metrics.md)."""
    classes = logits.shape[1]
    q, y = torch.softmax(logits.double() / temperature, 1).max(1)
    q = q.float()
    known = labels != 255
    present = [c for c in range(classes) if ((labels == c) | (y == c))[known].any()]

    def mean_uiou(theta):
        total = 0
        for c in present:
            valid = q >= theta
            tp = (known & (labels == c) & (y == c) & valid).sum().item()
            fp = (known & (labels != c) & (y == c) & valid).sum().item()
            fn = (known & (labels == c) & (y != c) & valid).sum().item()
            ti = (known & (labels == c) & (invalid == 1) & ~valid).sum().item()
            fi = (known & (labels == c) & (invalid == 0) & ~valid).sum().item()
            total += (tp + ti) / (tp + ti + fp + fn + fi) if tp + ti + fp + fn + fi else 0
        return total / len(present)

    def error(chosen):
        n, total = chosen.sum().item(), 0
        for b in range(15):
            inside = chosen & (q > np.float32(b / 15)) & (q <= np.float32((b + 1) / 15))
            total += abs((inside & (y == labels)).sum().item() - q[inside].double().sum().item())
        return total / n
    return (mean_uiou(0), [mean_uiou(theta) for theta in thetas], error(known),
            error(known & (invalid == 0)))


def logits_of(confidence, prediction, classes):
    """Logits (1, C, H, W) whose softmax has this maximum, in this class, the rest shared evenly."""
    rest = (1 - confidence) / (classes - 1)
    p = rest[:, None].repeat(1, classes, 1, 1).scatter(1, prediction[:, None], confidence[:, None])
    return p.double().log().float()


class MetricsTest(unittest.TestCase):
    def random(self, images=4, classes=6, seed=0):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(images, classes, 13, 17, generator=generator)
        # two classes absent
        labels = torch.randint(0, classes - 2, (images, 13, 17), generator=generator)
        logits[:, classes - 1] -= 100                                          # one never predicted
        hint = F.one_hot(labels, classes).permute(0, 3, 1, 2)
        logits += 2 * hint * torch.rand(images, 1, 13, 17, generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
        invalid = torch.rand(labels.shape, generator=generator) < 0.3
        return logits, labels, invalid

    def test_worked_example(self):
        truth = torch.tensor([[[0, 0], [1, 255]]])
        invalid = torch.tensor([[[0, 1], [0, 0]]])
        logits = logits_of(torch.tensor([[[.9, .6], [.7, .8]]]), torch.tensor([[[0, 1], [1, 0]]]),
                           2)
        metrics = evaluate.Metrics(2)
        metrics.update(logits, truth, invalid)
        result = metrics.compute()
        self.assertAlmostEqual(result["miou"], 0.5)
        self.assertAlmostEqual(result["auiou"], 0.55, places=3)
        self.assertAlmostEqual(result["ece"], 1 / 3, places=5)
        self.assertAlmostEqual(result["ece_valid"], 0.2, places=5)   # pixels 1 and 3: (.1 + .3) / 2
        self.assertEqual(result["pixels"], 3)
        for theta, uiou in ((.5, .5), (.65, 1), (.75, .5), (.95, .25)):
            at = (result["thresholds"] - theta).abs().argmin()
            self.assertAlmostEqual(result["uiou"][at].item(), uiou)
        coarse = evaluate.Metrics(2, thresholds=3)                         # .5, .75, 1
        coarse.update(logits, truth, invalid)
        self.assertEqual(coarse.compute()["thresholds"].tolist(), [.5, .75, 1])
        self.assertAlmostEqual(coarse.compute()["auiou"], (.5 + .5 + .25) / 3)

    def test_brute_force(self):
        logits, labels, invalid = self.random()
        for temperature in (0.67, 1.0, 1.5):
            metrics = evaluate.Metrics(6, temperature, thresholds=23)
            metrics.update(logits, labels, invalid)
            result = metrics.compute()
            miou, uiou, ece, ece_valid = brute_metrics(logits, labels, invalid, temperature,
                                                       result["thresholds"])
            self.assertAlmostEqual(result["miou"], miou, places=12)
            np.testing.assert_allclose(result["uiou"].numpy(), uiou, rtol=0, atol=1e-12)
            self.assertAlmostEqual(result["auiou"], sum(uiou) / 23, places=12)
            self.assertAlmostEqual(result["ece"], ece, places=6)
            self.assertAlmostEqual(result["ece_valid"], ece_valid, places=6)
            self.assertEqual(result["classes"], 5)
            self.assertTrue(result["iou"][5].isnan())

    def test_temperature_leaves_iou_alone(self):
        logits, labels, invalid = self.random()
        iou = []
        for temperature in (0.1, 1.0, 10.0):
            metrics = evaluate.Metrics(6, temperature)
            metrics.update(logits, labels, invalid)
            iou.append(metrics.compute()["iou"])
        self.assertTrue(torch.equal(iou[0][:5], iou[1][:5]) and torch.equal(iou[0][:5], iou[2][:5]))

    def test_consequences(self):
        """At theta = 1/C nothing is invalid; confidence 1 everywhere gives AUIoU = mIoU;
        uniform logits."""
        logits, labels, invalid = self.random()
        metrics = evaluate.Metrics(6, thresholds=11)
        metrics.update(logits, labels, invalid)
        result = metrics.compute()
        self.assertAlmostEqual(result["uiou"][0].item(), result["miou"], places=12)
        certain = evaluate.Metrics(6)
        certain.update(logits * 1e6, labels, invalid)
        self.assertAlmostEqual(certain.compute()["auiou"], certain.compute()["miou"], places=12)
        # q = 1/C exactly on the first threshold: still valid
        for classes in (2, 3, 7, 11, 19, 150):
            uniform = evaluate.Metrics(classes, thresholds=5)
            uniform.update(torch.zeros(1, classes, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))
            self.assertEqual(uniform.compute()["uiou"][0].item(), uniform.compute()["miou"])

    def test_confidence_on_a_threshold_is_valid(self):
        metrics = evaluate.Metrics(2, thresholds=3)
        # softmax([ln 3, 0]) is not exact in floats; p = 1/2 and p = 1 are.
        logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]]).T.view(1, 2, 1, 2)
        metrics.update(logits, torch.tensor([[[0, 0]]]), torch.tensor([[[0, 0]]]))
        self.assertEqual(metrics.compute()["uiou"].tolist(), [1.0, 0.5, 0.5])

    def test_bins_are_open_below_and_closed_above(self):
        """q = 1/3 = 5/15 falls into (4/15, 5/15], bin 4; q = 1 into the last."""
        metrics = evaluate.Metrics(3)
        metrics.update(torch.zeros(1, 3, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64))
        metrics.update(torch.tensor([500.0, 0, 0]).view(1, 3, 1, 1),
                       torch.zeros(1, 1, 1, dtype=torch.int64))
        self.assertEqual(metrics.compute()["reliability"][0].nonzero().flatten().tolist(), [4, 14])

    def test_empty_and_one_class(self):
        metrics = evaluate.Metrics(3)
        metrics.update(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 255), torch.ones(1, 4, 4))
        self.assertTrue(math.isnan(metrics.compute()["miou"]))
        self.assertEqual(metrics.compute()["pixels"], 0)
        logits = torch.zeros(1, 3, 4, 4)
        logits[:, 2] = 50
        metrics.update(logits, torch.full((1, 4, 4), 2))
        self.assertEqual((metrics.compute()["miou"], metrics.compute()["classes"]), (1.0, 1))

    def test_any_split_gives_the_same(self):
        logits, labels, invalid = self.random(images=6)
        whole = evaluate.Metrics(6, 0.7)
        whole.update(logits, labels, invalid)
        for parts in ([1] * 6, [2, 4], [5, 1], [3, 3]):
            pieces, start = [], 0
            for size in parts:
                piece = evaluate.Metrics(6, 0.7)
                piece.update(*(t[start:start + size] for t in (logits, labels, invalid)))
                pieces.append(piece)
                start += size
            for piece in reversed(pieces[:-1]):
                pieces[-1].merge(piece)
            for name, count in whole.counts.items():
                self.assertTrue(torch.equal(count, pieces[-1].counts[name]), name)

    def test_bad_arguments(self):
        with self.assertRaises(ValueError):
            evaluate.Metrics(3, temperature=0)
        with self.assertRaises(ValueError):
            evaluate.Metrics(3, thresholds=1)


# --- data.py ------------------------------------------------------------------------------------

def put(path, values, **how):
    """Write an array as an image file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(path, **how)
    return path


def picture(seed=0, width=24, height=16):
    """Random RGB array (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pattern(values, width=24, height=16):
    """(H, W) uint8 in which every one of `values` occurs."""
    return np.resize(np.array(values, np.uint8), (height, width))


class Fixtures:
    """Tiny trees in the official layouts, traps included (datasets.md, section 14).

    Each method writes one set below `root` and returns [(split, image stem, {label value: train
    id})], with train ids taken from the sets' documentation, not from our tables.
    """

    @staticmethod
    def cityscapes(root):
        ids = {0: 255, 1: 255, 2: 255, 3: 255, 7: 0, 8: 1, 11: 2, 14: 255, 23: 10, 26: 13, 29: 255,
               33: 18}
        base, expected = root / "cityscapes", []
        for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
            stem = f"{city}_000001_000019"
            put(base / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", picture(len(expected)))
            put(base / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", pattern(list(ids)))
            put(base / f"gtFine/{split}/{city}/{stem}_gtFine_color.png", picture(1))
            put(base / f"gtFine/{split}/{city}/{stem}_gtFine_instanceIds.png", pattern([0]))
            expected.append((split, f"{stem}_leftImg8bit", ids))
        put(base / "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png", picture(2))
        # a dummy
        put(base / "gtFine/test/berlin/berlin_000000_000019_gtFine_labelIds.png", pattern([3]))
        expected.append(("test", "berlin_000000_000019_leftImg8bit", None))
        return expected

    @staticmethod
    def cityscapes_coarse(root):
        base, ids = root / "cityscapes", {0: 255, 7: 0, 26: 13}
        for stem in ("troisdorf_000000_000073", "troisdorf_000000_000074"):
            put(base / f"leftImg8bit/train_extra/troisdorf/{stem}_leftImg8bit.png", picture())
            put(base / f"gtCoarse/train_extra/troisdorf/{stem}_gtCoarse_labelIds.png",
                pattern(list(ids)))
        return [("train", "troisdorf_000000_000074_leftImg8bit", ids)]

    @staticmethod
    def vistas(root, version="v1.2/"):
        ids = {0: 255, 2: 1, 4: 4, 13: 0, 27: 10, 41: 255, 55: 13, 64: 255, 65: 255}
        expected = []
        for folder, split, stem, size in (("training", "train", "-AAAAAAAAAAAAAAAAAAAAA", (24, 16)),
                                          ("validation", "val", "zBBBBBBBBBBBBBBBBBBBBB",
                                           (16, 24))):
            put(root / f"vistas/{folder}/images/{stem}.jpg", picture(0, *size))
            label = Image.fromarray(pattern(list(ids), *size), "P")
            label.putpalette([(7 * i) % 256 for i in range(768)])
            put(root / f"vistas/{folder}/{version}labels/{stem}.png", label)
            if version:
                put(root / f"vistas/{folder}/v2.0/labels/{stem}.png", pattern([123], *size))
            expected.append((split, stem, ids))
        return expected

    @staticmethod
    def vistas_old(root):
        return Fixtures.vistas(root, "")

    @staticmethod
    def vistas_conservative(root):
        ids = {0: 255, 2: 1, 4: 255, 13: 0, 27: 10, 41: 0, 55: 13, 64: 255, 65: 255}
        return [(split, stem, ids) for split, stem, _ in Fixtures.vistas(root)]

    @staticmethod
    def bdd100k(root):
        ids = {0: 0, 5: 5, 18: 18, 255: 255}
        for name in ("aaa", "shared"):
            put(root / f"bdd100k/images/10k/train/{name}.jpg", picture())
            put(root / f"bdd100k/labels/sem_seg/masks/train/{name}.png", pattern(list(ids)))
        for i, (split, name) in enumerate((("train", "shared"), ("train", "only100k"),
                                           ("val", "other"))):
            put(root / f"bdd100k/images/100k/{split}/{name}.jpg", picture(i))
        return [("train", "aaa", ids), ("train", "shared", ids)]

    @staticmethod
    def bdd100k_old(root):
        ids = {0: 0, 9: 9, 255: 255}
        put(root / "bdd100k/seg/images/val/bbb.jpg", picture())
        put(root / "bdd100k/seg/labels/val/bbb_train_id.png", pattern(list(ids)))
        return [("val", "bbb", ids)]

    @staticmethod
    def wilddash_beta(root):
        ids = {0: 255, 7: 0, 24: 11, 34: 14, 35: 13, 36: 255, 37: 255, 38: 0}
        put(root / "wilddash/images/at0001_100000.jpg", picture())
        put(root / "wilddash/labels/at0001_100000.png", pattern(list(ids)))
        return [("train", "at0001_100000", ids)]

    @staticmethod
    def wilddash_final(root):
        put(root / "wilddash/images/at0002_100000.jpg", picture())
        segment = np.zeros((16, 24), np.int64)
        segment[:4], segment[4:8], segment[8:12] = 300, 70_000, 5    # ids above 255 and above 65535
        put(root / "wilddash/panoptic/at0002_100000.png",
            np.stack([segment % 256, segment // 256 % 256, segment // 65536], 2).astype(np.uint8))
        (root / "wilddash/panoptic.json").write_text(json.dumps({"annotations": [{
            "file_name": "at0002_100000.png", "segments_info": [
                {"id": 300, "category_id": 7}, {"id": 70_000, "category_id": 26},
                {"id": 5, "category_id": 45}]}]}))
        return [("train", "at0002_100000",
                 np.select([segment == 300, segment == 70_000, segment == 5], [0, 13, 5], 255))]

    @staticmethod
    def acdc(root, images="rgb_anon", labels="gt"):
        ids, expected = {0: 0, 10: 10, 18: 18, 255: 255}, []
        for condition, split in itertools.product(("fog", "night", "rain", "snow"),
                                                  ("train", "val", "test")):
            stem, sequence = "GOPR0475_frame_000041", f"{condition}/{split}/GOPR0475/"
            put(root / f"acdc/{images}/{sequence}{stem}_rgb_anon.png", picture(len(expected)))
            put(root / f"acdc/{images}/{condition}/{split}_ref/GOPR0475/{stem}_rgb_ref_anon.png",
                picture(3))
            if split != "test":
                put(root / f"acdc/{labels}/{sequence}{stem}_gt_labelTrainIds.png",
                    pattern(list(ids)))
                put(root / f"acdc/{labels}/{sequence}{stem}_gt_invIds.png", pattern([0, 1, 1]))
                put(root / f"acdc/{labels}/{sequence}{stem}_gt_labelIds.png", pattern([33]))
            expected.append((split, f"{stem}_rgb_anon", ids if split != "test" else None))
        return expected

    @staticmethod
    def acdc_other(root):
        return Fixtures.acdc(root, "rgb_anon_trainvaltest/rgb_anon", "gt_trainval/gt")

    @staticmethod
    def camvid(root):
        ids = {0: 0, 3: 3, 10: 10, 11: 255}
        for split, stem, kind in (("train", "0001TP_006690", "jpg"),
                                  ("train", "0016E5_00390", "png"), ("val", "0016E5_07959", "png")):
            put(root / f"camvid/{split}/{stem}.{kind}", picture(len(stem) + ord(split[0])))
            put(root / f"camvid/{split}annot/{stem}.png", pattern(list(ids)))
        return [("train", "0001TP_006690", ids), ("train", "0016E5_00390", ids),
                ("val", "0016E5_07959", ids)]

    @staticmethod
    def camvid_19(root):
        Fixtures.camvid(root)
        ids = {0: 10, 3: 0, 10: 12, 11: 255}
        return [("train", "0001TP_006690", ids), ("train", "0016E5_00390", ids),
                ("val", "0016E5_07959", ids)]

    @staticmethod
    def camvid_dusk(root):
        Fixtures.camvid(root)                      # the drive at dusk alone: as pool, and as val
        return [("train", "0001TP_006690", None),
                ("val", "0001TP_006690", {0: 0, 3: 3, 10: 10, 11: 255})]

    @staticmethod
    def ade20k(root):
        base, ids = root / "ADEChallengeData2016", {0: 255, 1: 0, 150: 149}
        # grey
        put(base / "images/training/ADE_train_00000001.jpg",
            Image.fromarray(picture()[..., 0], "L"))
        put(base / "annotations/training/ADE_train_00000001.png", pattern(list(ids)))
        return [("train", "ADE_train_00000001", ids)]

    @staticmethod
    def custom(root, classes=3, size=(24, 16), images=1):
        ids = {**{i: i for i in range(classes)}, 255: 255}
        for split, i in itertools.product(("train", "val"), range(images)):
            put(root / f"custom/images/{split}/frame{i} of mine.png",
                picture(i + 100 * (split == "val"), *size))
            put(root / f"custom/labels/{split}/frame{i} of mine.png", pattern(list(ids), *size))
        (root / "custom/classes.txt").write_text("".join(f"kind {i}\n" for i in range(classes)))
        return [(split, "frame0 of mine", ids) for split in ("train", "val")]

    @staticmethod
    def dark_zurich(root):
        base, ids = root / "dark_zurich", {0: 0, 255: 255}
        for time_of_day in ("day", "night", "twilight"):
            put(base / f"rgb_anon/train/{time_of_day}/GOPR0345/GOPR0345_frame_000001_rgb_anon.png",
                picture())
        put(base / "rgb_anon/val/night/GOPR0356/GOPR0356_frame_000321_rgb_anon.png", picture())
        put(base / "rgb_anon/val_ref/day/GOPR0356_ref/GOPR0356_frame_000321_ref_rgb_anon.png",
            picture())
        put(base / "gt/val/night/GOPR0356/GOPR0356_frame_000321_gt_labelTrainIds.png",
            pattern(list(ids)))
        put(base / "gt/val/night/GOPR0356/GOPR0356_frame_000321_gt_invIds.png", pattern([0, 1]))
        return ([("train", "GOPR0345_frame_000001_rgb_anon", None)] * 3
                + [("val", "GOPR0356_frame_000321_rgb_anon", ids)])

    @staticmethod
    def nightcity(root):
        ids = {7: 0, 23: 10, 34: 255}
        put(root / "nightcity/NightCity-images/images/train/Chicago_0001.png", picture())
        put(root / "nightcity/NightCity-label/label/train/Chicago_0001_labelIds.png",
            pattern(list(ids)))
        return [("train", "Chicago_0001", ids)]

    @staticmethod
    def pools(root):
        put(root / "cadc/cadcd/2018_03_06/0001/labeled/image_00/data/0000000000.png", picture())
        put(root / "cadc/cadcd/2018_03_06/0001/labeled/image_03/data/0000000000.png", picture())
        for i in range(61):
            put(root / f"nightowls/nightowls_training/58c5810c{i:04d}.png", picture())
        put(root / "stf/cam_stereo_left_lut/2018-02-03_20-48-35_00400.png", picture())
        return []


class DataTest(Temporary):
    def test_every_set_is_read_back(self):
        """Every layout, pixel by pixel, through the documented values;
        the traps must not be walked into."""
        fixtures = [name for name in vars(Fixtures) if not name.startswith("_") and name != "pools"]
        for fixture in fixtures:
            root = self.folder / fixture
            name = next(n for n in sorted(data.DATASETS, key=len, reverse=True)
                        if fixture.startswith(n))
            expected = getattr(Fixtures, fixture)(root)
            found = [(split, sample) for split in ("train", "val", "test")
                     for sample in data.find_samples(root, name, split)]
            self.assertEqual(sorted((split, Path(sample.image).stem) for split, sample in found),
                             sorted((split, stem) for split, stem, _ in expected), fixture)
            classes = len(data.classes_of(root, name))
            wanted = {(split, stem): ids for split, stem, ids in expected}
            for split, sample in found:
                image, ids, invalid = data.read_sample(sample, classes)
                mapping = wanted[split, Path(sample.image).stem]
                with Image.open(sample.image) as raw:
                    np.testing.assert_array_equal(image,
                                                  np.asarray(raw.convert("RGB")).transpose(2, 0, 1))
                if mapping is None:
                    self.assertIsNone(ids)
                elif isinstance(mapping, np.ndarray):
                    np.testing.assert_array_equal(ids, mapping)
                else:
                    with Image.open(sample.label) as raw:
                        values = np.asarray(raw)
                    self.assertEqual(set(values.flat), set(mapping))
                    np.testing.assert_array_equal(ids, np.vectorize(mapping.get)(values), fixture)
                if invalid is not None:
                    np.testing.assert_array_equal(
                        invalid, pattern([0, 1, 1] if name == "acdc" else [0, 1]) == 1)

    def test_pools(self):
        Fixtures.pools(self.folder)
        Fixtures.bdd100k(self.folder)
        counts = {name: len(data.find_samples(self.folder, name, "train"))
                  for name in ("cadc", "cadc_all", "nightowls", "stf", "bdd100k_100k")}
        self.assertEqual(counts,
                         {"cadc": 1, "cadc_all": 2, "nightowls": 3, "stf": 1, "bdd100k_100k": 1})
        only, = data.find_samples(self.folder, "bdd100k_100k", "train")
        self.assertEqual(Path(only.image).stem, "only100k")        # "shared" is in 10K: a leak

    def test_acdc_parts(self):
        Fixtures.acdc(self.folder)
        samples = data.find_samples(self.folder, "acdc", "val")
        self.assertEqual([s.condition for s in samples], ["fog", "night", "rain", "snow"])
        for sample in samples:
            self.assertIn(f"gt/{sample.condition}/val/GOPR0475/"
                          "GOPR0475_frame_000041_gt_labelTrainIds.png", sample.label)
            self.assertIn(f"{sample.condition}/val_ref/", sample.reference)
            _, ids, invalid = data.read_sample(sample, 19)
            self.assertTrue(((ids != 255) & invalid).any())         # labelled and invalid at once
        night, = data.gather(self.folder, ("acdc:night",), "val")
        self.assertEqual(night.condition, "night")

    def test_day_and_dusk(self):
        """Parts by condition; the frames at dusk are a pool without labels, in two halves."""
        Fixtures.camvid(self.folder)
        for i, stem in enumerate(("0001TP_006720", "0001TP_006750")):
            put(self.folder / f"camvid/train/{stem}.png", picture(5 + i))
            put(self.folder / f"camvid/trainannot/{stem}.png", pattern([0]))

        def stems(spec, split="train", labelled=None):
            return [Path(s.image).stem
                    for s in data.gather(self.folder, (spec,), split, labelled)]
        self.assertEqual(stems("camvid:day"), ["0016E5_00390"])
        self.assertEqual(stems("camvid:dusk"), ["0001TP_006690", "0001TP_006720",
                                                 "0001TP_006750"])
        self.assertEqual(stems("camvid_dusk:even"), ["0001TP_006720"])
        self.assertEqual(stems("camvid_dusk:odd", "val", True), ["0001TP_006690", "0001TP_006750"])
        with self.assertRaisesRegex(ValueError, "camvid_dusk has no labels for its split 'train'"):
            stems("camvid_dusk", "train", True)
        with contextlib.redirect_stdout(io.StringIO()):       # one file in two roles is no leak
            self.assertEqual(data.check(self.folder), [])

    def test_tables(self):
        """Total and within range; the values that the documentation names one by one."""
        self.assertEqual((len(set(data.ADE20K_CLASSES)), data.ADE20K_CLASSES[149]), (150, "flag"))
        sizes = {"cityscapes": 35, "vistas": 66, "wilddash": 81, "ade20k": 151, "camvid": 12,
                 "camvid_19": 12}
        for name, size in sizes.items():
            row = data.DATASETS[name]
            self.assertEqual(len(row.table), size, name)
            self.assertLessEqual(set(row.table), {*range(len(row.classes)), 255}, name)
            if name not in ("vistas", "camvid_19"):        # these two do not know every class
                self.assertEqual(set(row.table) - {255}, set(range(len(row.classes))), name)
        self.assertEqual(len(data.VISTAS_CONSERVATIVE), 66)
        # of train ids 0..18
        labels = "7 8 11 12 13 17 19 20 21 22 23 24 25 26 27 28 31 32 33".split()
        self.assertEqual([data.CITYSCAPES_TABLE[int(i)] for i in labels], list(range(19)))
        self.assertEqual((len(data.CLASSES), len(data.PALETTE), len(set(data.PALETTE))),
                         (19, 19, 19))
        self.assertEqual(len(set(data.generated_palette(150))), 150)
        # SegNet's colours: sky, building, pole, road, pavement, tree, sign, fence, car, ...
        self.assertEqual(bytes(itertools.chain(*data.CAMVID_PALETTE)).hex(" ", 3),
                         "808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 "
                         "0080c0")

    def test_sequences(self):
        Fixtures.camvid(self.folder)
        Fixtures.cityscapes(self.folder)
        dusk = data.gather(self.folder, ("camvid:0001TP",), "train")
        put(self.folder / "custom/images/train/UPPER.JPG", picture(), format="JPEG")
        put(self.folder / "custom/labels/train/UPPER.png", pattern([0]))
        self.assertEqual(len(data.find_samples(self.folder, "custom", "train")), 1)
        self.assertEqual([(Path(s.image).stem, s.condition) for s in dusk],
                         [("0001TP_006690", "dusk")])
        self.assertEqual(len(data.gather(self.folder, ("cityscapes:bochum",), "train")), 1)
        self.assertEqual(len(data.gather(self.folder, ("cityscapes:bochum,aachen",), "train")), 2)
        for specs, words in ((("cityscapes:paris",), "nothing of paris"),
                             (("nonsense",), "unknown dataset"),
                             (("cityscapes:bochum,pari",), "nothing of pari"),
                             (("camvid:0001TP", "camvid"), "named twice in camvid:0001TP camvid"),
                             (("camvid", "cityscapes"), "different classes"),
                             (("acdc",), "looked for .*rgb_anon")):
            with self.assertRaisesRegex(ValueError, words):
                data.gather(self.folder, specs, "train")
        self.assertEqual(len(data.gather(self.folder, ("camvid_19", "cityscapes"), "train")), 4)

    def test_bad_files(self):
        """Each names the file and what is wrong with it."""
        Fixtures.custom(self.folder)
        sample, = data.gather(self.folder, ("custom",), "train", True)
        image, label = Path(sample.image), Path(sample.label)
        raw = image.read_bytes()

        def fails(words, path):
            with self.assertRaisesRegex(ValueError, words) as caught:
                data.read_sample(sample, 3)
            self.assertIn(str(path), str(caught.exception))
            with self.assertRaises(ValueError):
                data.augment(sample, 3, np.random.default_rng(0), 32)
        for content in (raw[:len(raw) // 2], b"", b"no image", raw[:40]):
            image.write_bytes(content)
            fails("cannot be read", image)
        put(image, Image.new("I;16", (24, 16)))
        fails("mode I;16", image)
        image.write_bytes(raw)
        put(label, pattern([0, 77]))
        fails(r"values \[77\] have no meaning in custom; expected 0..2 or 255", label)
        put(label, pattern([0], 20, 16))
        fails("20x16, its image .* 24x16", label)
        put(label, picture())
        fails("mode RGB, expected L or P", label)
        label.unlink()
        with self.assertRaisesRegex(ValueError, "1 of 1 images of custom train have no label"):
            data.gather(self.folder, ("custom",), "train", True)
        label.symlink_to(self.folder / "nowhere.png")
        with self.assertRaises(FileNotFoundError):
            data.read_sample(sample, 3)

    def test_augment_equals_resize_then_crop(self):
        """Against the usual order (resize everything, crop, pad, flip), to one grey level."""
        smooth = np.asarray(Image.fromarray(picture(5, 12, 9)).resize(
            (121, 87), Image.Resampling.BICUBIC))
        put(self.folder / "custom/images/train/a.png", smooth)
        put(self.folder / "custom/labels/train/a.png", pattern(range(7), 121, 87))
        (self.folder / "custom/classes.txt").write_text("\n".join("abcdefg"))
        sample, = data.gather(self.folder, ("custom",), "train")
        for seed in range(30):
            crop = 64
            image, ids = data.augment(sample, 7, np.random.default_rng(seed), crop)
            rng = np.random.default_rng(seed)
            zoom = rng.uniform(0.5, 2.0)                       # in the order in which augment draws
            width, height = round(121 * zoom), round(87 * zoom)
            left, top = (rng.integers(width - min(width, crop) + 1),
                         rng.integers(height - min(height, crop) + 1))
            flip = rng.random() < 0.5
            area = (left, top, left + min(width, crop), top + min(height, crop))
            usual = np.empty((crop, crop, 3), np.uint8)
            usual[:] = (124, 116, 104)
            part = np.asarray(Image.fromarray(smooth).resize((width, height),
                                                             Image.Resampling.BILINEAR).crop(area))
            usual[:part.shape[0], :part.shape[1]] = part
            usual_ids = np.full((crop, crop), 255, np.uint8)
            label = Image.open(sample.label).resize((width, height),
                                                    Image.Resampling.NEAREST).crop(area)
            usual_ids[:part.shape[0], :part.shape[1]] = np.asarray(label)
            if flip:
                usual, usual_ids = usual[:, ::-1], usual_ids[:, ::-1]
            self.assertLessEqual(np.abs(image.astype(int) - usual).max(), 1)
            np.testing.assert_array_equal(ids, usual_ids)

    def test_reduced_photos_stay_in_place(self):
        """A JPEG decoded at 1/8 is up to 7 pixels wider than the photo: a ramp shows where a crop
        really lies, at the edge too."""
        side, crop = 4321, 64
        ramp = np.broadcast_to(np.linspace(0, 255, side).round(), (side, side)).astype(np.uint8)
        put(self.folder / "custom/labels/train/a.png", np.zeros((side, side), np.uint8))
        (self.folder / "custom/classes.txt").write_text("x\ny\n")
        for axis, values in enumerate((ramp.T, ramp)):
            put(self.folder / "custom/images/train/a.jpg", values)
            sample, = data.gather(self.folder, ("custom",), "train")
            for seed in range(8):
                image, _ = data.augment(sample, 2, np.random.default_rng(seed), crop, (0.5, 0.5))
                rng = np.random.default_rng(seed)
                rng.uniform(0.5, 0.5)
                left, top = rng.integers(540 - crop + 1), rng.integers(540 - crop + 1)
                image = image[:, ::-1] if rng.random() < 0.5 else image
                start, line = ((top, image[:, 32, 0]), (left, image[32, :, 0]))[axis]
                expected = (start + np.arange(crop) + 0.5) / 540 * 255      # 0.47 levels a pixel
                self.assertLess(abs((line - expected).mean()), 0.3)

    def test_image_and_label_stay_aligned(self):
        """The image shows its label's number in every channel; after augmentation it still must."""
        blocks = np.kron(np.random.default_rng(0).integers(0, 7, (6, 8)),
                         np.ones((20, 20))).astype(np.uint8)
        put(self.folder / "custom/images/train/a.png", np.repeat(30 * blocks[..., None], 3, 2))
        put(self.folder / "custom/labels/train/a.png", blocks)
        (self.folder / "custom/classes.txt").write_text("\n".join("abcdefg"))
        sample, = data.gather(self.folder, ("custom",), "train")
        for seed in range(20):
            image, ids = data.augment(sample, 7, np.random.default_rng(seed), 100)
            valid = ids != 255
            agree = np.abs(image[..., 0].astype(int) - 30 * ids.astype(int))[valid] <= 2
            # interpolation blurs the pixels along the borders
            self.assertGreater(agree.mean(), 0.85)
            self.assertTrue((image[~valid] == (124, 116, 104)).all())

    def test_large_jpeg_is_drafted(self):
        """A JPEG over 1080 is decoded small, and its label still falls on it."""
        blocks = np.kron(np.random.default_rng(1).integers(0, 7, (12, 16)),
                         np.ones((200, 200))).astype(np.uint8)
        put(self.folder / "custom/images/train/a.jpg", np.repeat(30 * blocks[..., None], 3, 2),
            quality=95)
        put(self.folder / "custom/labels/train/a.png", blocks)
        (self.folder / "custom/classes.txt").write_text("\n".join("abcdefg"))
        sample, = data.gather(self.folder, ("custom",), "train")
        image, native = data.read_image(sample.image, 0.26)
        self.assertEqual((native, image.size), ((3200, 2400), (1600, 1200)))
        image, ids = data.augment(sample, 7, np.random.default_rng(0), 512)
        valid = ids != 255
        agree = np.abs(image[..., 0].astype(int) - 30 * ids.astype(int))[valid] <= 4
        self.assertGreater(agree.mean(), 0.95)

    def test_samples_depend_on_seed_epoch_position_alone(self):
        Fixtures.custom(self.folder, images=5, size=(90, 70))
        samples = data.gather(self.folder, ("custom",), "train")
        batches = {}
        for workers in (0, 2):
            sampler = data.step_keys([1] * 5, 4, 2, first=1, last=5, seed=3)
            loader = torch.utils.data.DataLoader(data.TrainSet(samples, 3, 64, (0.5, 2.0), 3),
                                                 batch_sampler=sampler, num_workers=workers,
                                                 collate_fn=data.collate)
            batches[workers] = list(loader)
        self.assertEqual(len(batches[0]), 4)
        for a, b in zip(*batches.values()):
            self.assertTrue(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]))
        dataset = data.TrainSet(samples, 3, 64, (0.5, 2.0), 3)
        # another epoch
        self.assertFalse(torch.equal(dataset[0, 0, 0, -1][0], dataset[1, 0, 0, -1][0]))
        # another position
        self.assertFalse(torch.equal(dataset[0, 0, 0, -1][0], dataset[0, 1, 0, -1][0]))

    def test_step_sampler(self):
        whole = list(data.step_keys([1] * 10, 4, 3, 0, 7, seed=1))
        self.assertEqual([len(step) for step in whole], [4] * 7)
        # Processes share each step's batch; a later start gives the later steps.
        halves = [list(data.step_keys([1] * 10, 4, 3, 0, 7, 1, rank, 2)) for rank in (0, 1)]
        self.assertEqual(whole, [a + b for a, b in zip(*halves)])
        self.assertEqual(whole[5:], list(data.step_keys([1] * 10, 4, 3, 5, 7, seed=1)))
        self.assertEqual([key[0] for step in whole for key in step], [0] * 12 + [1] * 12 + [2] * 4)
        first = [key[2] for step in whole[:3] for key in step]
        self.assertEqual(sorted(first[:10]), list(range(10)))         # every image before any twice
        self.assertNotEqual(first, [key[2] for step in whole[3:6] for key in step])

    def test_check_command(self):
        Fixtures.acdc(self.folder)
        Fixtures.custom(self.folder)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(data.check(self.folder), [])
        self.assertRegex(out.getvalue(),
                         r"acdc +val +4 +4 +4  fog 1, night 1, rain 1, snow 1; 24x16")
        self.assertRegex(out.getvalue(),
                         r"cityscapes +\S+leftImg8bit/\{split\}/\*/\*_leftImg8bit.png")
        shutil.copy(self.folder / "custom/images/train/frame0 of mine.png",
                    self.folder / "custom/images/val/copy.png")
        put(self.folder / "custom/labels/train/lonely.png", pattern([0]))
        put(self.folder / "custom/labels/train/frame0 of mine.png", pattern([9]))
        with contextlib.redirect_stdout(io.StringIO()):
            problems = "\n".join(data.check(self.folder))
        for words in ("custom val: 1 images without label", "custom train: 1 labels without image",
                      "same file", r"values \[9\] have no meaning"):
            self.assertRegex(problems, words)

    def test_check_of_incomplete_sets(self):
        """A mask or an entry of the json that lacks is named, two files for one image do not hide
        the sets that follow, and pools need no labels."""
        Fixtures.acdc(self.folder)
        Fixtures.wilddash_final(self.folder)
        Fixtures.camvid(self.folder)
        Fixtures.custom(self.folder)
        put(self.folder / "nightcity/images/val/a.png", picture())
        put(self.folder / "camvid/train/extra.png", picture())
        put(self.folder / "camvid/val/0016E5_07959.jpg", picture())
        (self.folder / "custom/labels/val/frame0 of mine.png").unlink()
        next((self.folder / "acdc/gt/fog/val").rglob("*invIds.png")).unlink()
        (self.folder / "wilddash/panoptic.json").write_text('{"annotations": []}')
        with contextlib.redirect_stdout(io.StringIO()) as out:
            problems = data.check(self.folder)
        self.assertRegex(out.getvalue(), r"camvid_dusk +train +1 +0 +0  odd 1")
        for words in ("acdc val: 1 labels without invalid, first .*fog.*labelTrainIds",
                      "wilddash train: .*at0002_100000.png is not described in .*panoptic.json",
                      "camvid train: 1 images without label, first .*extra.png",
                      "camvid val: two files for one image", "custom val: 1 images without label"):
            self.assertEqual(sum(bool(re.match(words, line)) for line in problems), 1, problems)
        self.assertFalse([line for line in problems if "nightcity" in line])
        with self.assertRaisesRegex(ValueError, "wilddash has no split 'val'; there is train"):
            data.gather(self.folder, ("wilddash",), "val")
        shutil.rmtree(self.folder / "acdc/gt")
        self.assertIn("acdc", data.annotated(self.folder, "train"))      # named as incomplete later

    def test_modes_and_rotation(self):
        """RGBA, grey and palette images become RGB; an EXIF rotation is not applied,
        as labels know none."""
        Fixtures.custom(self.folder)
        sample, = data.gather(self.folder, ("custom",), "train")
        pixels = picture(3)
        for image, expected in ((Image.fromarray(np.dstack([pixels, pixels[..., 0]])), pixels),
                                (Image.fromarray(pixels[..., 0]), np.repeat(pixels[..., :1], 3, 2)),
                                (Image.fromarray(pixels).quantize(256), None)):
            put(Path(sample.image), image)
            with (contextlib.nullcontext() if expected is not None
                  else Image.open(sample.image)) as raw:
                expected = np.asarray(raw.convert("RGB")) if expected is None else expected
            np.testing.assert_array_equal(data.read_sample(sample, 3)[0],
                                          expected.transpose(2, 0, 1))
        rotated = Path(sample.image).with_suffix(".jpg")
        exif = Image.Exif()
        exif[0x0112] = 6                                                # "turn by 90 degrees"
        put(rotated, pixels, exif=exif)
        self.assertEqual(data.read_sample(sample._replace(image=str(rotated)), 3)[0].shape,
                         (3, 16, 24))

    def test_one_corrupt_file_among_many(self):
        (self.folder / "custom").mkdir()
        (self.folder / "custom/classes.txt").write_text("a\nb\n")
        buffer = io.BytesIO()
        Image.fromarray(picture()).save(buffer, "JPEG")
        label = io.BytesIO()
        Image.fromarray(pattern([0, 1])).save(label, "PNG")
        for kind in ("images/train", "labels/train"):
            (self.folder / "custom" / kind).mkdir(parents=True)
        for i in range(1000):
            cut = 300 if i == 517 else None
            (self.folder / f"custom/images/train/{i:04d}.jpg").write_bytes(buffer.getvalue()[:cut])
            (self.folder / f"custom/labels/train/{i:04d}.png").write_bytes(label.getvalue())
        with contextlib.redirect_stdout(io.StringIO()):
            problem, = data.check(self.folder, all_files=True)
        self.assertRegex(problem, "custom train: .*0517.jpg cannot be read: .*[Tt]runcated")

    def test_mix(self):
        """Weights, per-set parts and pseudolabels in one mix."""
        self.assertEqual(data.parse_spec("acdc:night,fog*2.5"), ("acdc", ("night", "fog"), 2.5))
        for spec in ("acdc*", "acdc*0", "acdc*-1", "acdc*many", "acdc*nan"):
            with self.assertRaises(ValueError, msg=spec):
                data.parse_spec(spec)
        orders = [data.epoch_order([1.0] * 10 + [2.5] * 10, 30, seed=0, epoch=epoch)
                  for epoch in range(40)]
        # 30 of 30 to 40 turns
        turns = np.array([np.bincount(order, minlength=20) for order in orders])
        self.assertEqual((turns[:, :10].max(), turns[:, 10:].max()), (1, 3))
        self.assertAlmostEqual(turns[:, 10:].sum() / turns[:, :10].sum(), 2.5, delta=0.3)
        many = np.concatenate([data.epoch_order([0.25] * 400, 100, 0, epoch)
                               for epoch in range(20)])
        # a quarter of the images, once each
        self.assertAlmostEqual(len(set(many[:90])) / 90, 1, delta=0.01)
        Fixtures.cityscapes(self.folder)
        Fixtures.pools(self.folder)
        folder = self.folder / "pseudo/v1"
        image = "cadc/cadcd/2018_03_06/0001/labeled/image_00/data/0000000000.png"
        put(folder / "cadc/0000000000.png", pattern([0, 13, 255]))

        def manifest(*rows):
            (folder / "manifest.csv").write_text("image,label,kept,selected\n" + "\n".join(rows)
                                                 + "\n")
        manifest(f"{image},cadc/0000000000.png,0.9,1", f"{image},cadc/other.png,0.1,0")
        settings = folder / "settings.json"
        settings.write_text(json.dumps({"classes": data.CLASSES}))
        with contextlib.chdir(self.folder):
            samples = data.gather(".", ("cityscapes", "pseudo/v1*3"), "train", True)
            self.assertEqual([s.dataset for s in samples], ["cityscapes"] * 2 + ["pseudo/v1"])
            _, ids, _ = data.read_sample(samples[-1], 19)
            self.assertEqual(set(np.unique(ids)), {0, 13, 255})
            with self.assertRaisesRegex(ValueError, "a folder of pseudolabels is taken whole"):
                data.parse_spec("pseudo/v1:cadc")
            for content, words in ((json.dumps({"classes": data.CAMVID_CLASSES}),
                                    "cityscapes and pseudo/v1 have different classes"),
                                   (json.dumps({"classes": []}), "does not say which classes"),
                                   ("[]", "does not say which classes"),
                                   ("{", "pseudo/v1/settings.json cannot be used"),
                                   (None, "pseudo/v1/settings.json is missing")):
                settings.unlink() if content is None else settings.write_text(content)
                with self.assertRaisesRegex((ValueError, OSError), words):
                    data.gather(".", ("cityscapes", "pseudo/v1"), "train", True)
            settings.write_text(json.dumps({"classes": data.CLASSES}))
            for row in ("../../etc/passwd,x.png,1,1", f"{image},/etc/passwd,1,1",
                        f"{image},../x.png,1,1", f"{image},,1,1"):
                manifest(row)
                with self.assertRaisesRegex(ValueError,
                                            "line 2: image and label must be paths below"):
                    data.gather(".", ("pseudo/v1",), "train", True)
            (folder / "manifest.csv").write_text("nothing\n")
            with self.assertRaisesRegex(ValueError, "expected columns image and label"):
                data.gather(".", ("pseudo/v1",), "train", True)

    def test_classes_come_up_evenly(self):
        """Crops drawn for a class show it; rare classes come as often as common ones;
        counts are kept."""
        (self.folder / "custom").mkdir()
        (self.folder / "custom/classes.txt").write_text("common\nrare\nrarest\n")
        for i in range(12):
            ids = np.zeros((200, 200), np.uint8)
            ids[150:154, 30 + i:34 + i] = 1 if i < 3 else 0
            ids[5:8, 190:193] = 2 if i == 7 else 0
            put(self.folder / f"custom/images/train/{i:02d}.png", picture(i, 200, 200))
            put(self.folder / f"custom/labels/train/{i:02d}.png", ids)
        samples = data.gather(self.folder, ("custom",), "train")
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(io.StringIO()):
            counts = data.class_counts(samples, 3)
            np.testing.assert_array_equal(counts[:, 1], [16] * 3 + [0] * 9)
            np.testing.assert_array_equal(counts[:, 2], [9 * (i == 7) for i in range(12)])
            cache, = Path("runs").iterdir()
            with mock.patch.object(data.CountSet, "__getitem__", side_effect=AssertionError):
                # from the file
                np.testing.assert_array_equal(data.class_counts(samples, 3), counts)
            put(Path(samples[0].label), np.full((200, 200), 2, np.uint8))    # changed: counted anew
            self.assertEqual(data.class_counts(samples, 3)[0].tolist(), [0, 0, 40000])
            cache.write_bytes(b"broken")
            put(Path(samples[0].label), np.asarray(Image.open(samples[1].label)))
            self.assertEqual(data.class_counts(samples, 3)[0, 1], 16)
            other = [sample._replace(dataset="vistas") for sample in samples]     # another table
            self.assertEqual(data.class_counts(other, 3)[7, 2], 0)
            colourful = [sample._replace(label=sample.image) for sample in samples]
            with self.assertRaisesRegex(ValueError, "mode RGB, expected L or P"):
                data.class_counts(colourful, 3)
        sampler = data.step_keys([1] * 12, 6, 10, 0, 10, 0, counts=counts, uniform=1.0)
        keys = [key for step in sampler for key in step]
        self.assertEqual(np.bincount([key[3] for key in keys]).tolist(), [20, 20, 20])
        dataset = data.TrainSet(samples, 3, 64, (0.5, 2.0), 0)
        for key in keys:
            image, ids, error = dataset[key]
            self.assertIsNone(error)
            # At zoom 1/2 a class of 3 pixels may fall between the samples of
            # nearest-neighbour scaling.
            self.assertTrue((ids == key[3]).any() or key[3] == 2, key)
        heavy = data.step_keys([1] * 2 + [9] + [0.5] * 9, 6, 10, 0, 10, 0, counts=counts,
                               uniform=1.0)
        drawn = [index for step in heavy for _, _, index, wanted in step if wanted == 1]
        self.assertTrue(12 <= drawn.count(2) < 20, drawn)         # a weight of 9 among 11: 16 of 20
        half = [key
                for step in data.step_keys([1] * 12, 6, 10, 0, 10, 0, counts=counts, uniform=0.5)
                for key in step]
        self.assertTrue(15 < sum(key[3] >= 0 for key in half) < 45)

    def test_jitter(self):
        Fixtures.custom(self.folder, size=(80, 60))
        sample, = data.gather(self.folder, ("custom",), "train")
        plain, jittered = (data.augment(sample, 3, np.random.default_rng(1), 64, jitter=j)
                           for j in (0.0, 0.5))
        np.testing.assert_array_equal(plain[1], jittered[1])
        self.assertFalse(np.array_equal(plain[0], jittered[0]))
        put(Path(sample.image), np.full((60, 80, 3), 100, np.uint8))       # only brightness shows
        levels = [data.augment(sample, 3, np.random.default_rng(seed), 32, jitter=0.2)[0].mean()
                  for seed in range(60)]
        self.assertTrue(79 <= min(levels) < 85 and 115 < max(levels) <= 121, levels)

    def test_contact_sheets(self):
        Fixtures.acdc(self.folder)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            data.contact_sheets(self.folder, 2, self.folder / "sheets")
        self.assertEqual([Path(line).name for line in out.getvalue().split()],
                         ["acdc_train.png", "acdc_val.png"])
        with Image.open(self.folder / "sheets/acdc_val.png") as sheet:
            self.assertEqual(sheet.height, 2 * 248)

    def test_whole_file(self):
        path = self.folder / "a" / "file.txt"
        with data.whole_file(path) as temporary:
            temporary.write_text("one")
        with self.assertRaises(KeyError), data.whole_file(path) as temporary:
            temporary.write_text("two, cut")
            raise KeyError
        self.assertEqual((path.read_text(), [p.name for p in path.parent.iterdir()]),
                         ("one", ["file.txt"]))

    def test_colour(self):
        image = data.colour(torch.tensor([[0, 18], [255, 10]]))
        self.assertEqual([image.getpixel(xy) for xy in ((0, 0), (1, 0), (0, 1), (1, 1))],
                         [(128, 64, 128), (119, 11, 32), (0, 0, 0), (70, 130, 180)])


# --- processes ----------------------------------------------------------------------------------

def in_processes(function, world, folder, *args):
    """Run function(rank, world, folder, *args) in `world` processes of one gloo group,
    one thread each."""
    meeting = Path(folder) / f"meeting-{time.monotonic_ns()}"
    torch.multiprocessing.spawn(process_entry, (function, world, str(meeting), folder, *args),
                                nprocs=world)


def process_entry(rank, function, world, meeting, folder, *args):
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank,
                                world_size=world)
    function(rank, world, Path(folder), *args)
    evaluate.end_processes()


class KeepGradients:
    """Stands in for an optimizer: keeps the gradients of a step."""
    param_groups = ()

    def __init__(self, model):
        self.model = model

    def step(self):
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none=set_to_none)


def gradients_of_a_step(rank, world, folder, per_process):
    """One step of train.Steps on this process's share of four images with very uneven labels."""
    model = tiny_model().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()                         # frozen: statistics of a batch depend on its size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 96, 64), dtype=torch.uint8, generator=generator)
    ids = torch.randint(0, 5, (4, 12, 8), generator=generator).repeat_interleave(
        8, 1).repeat_interleave(8, 2)
    ids[1, 3:], ids[3] = 255, 255                          # nearly nothing, and nothing at all
    config = train.Config(batch=4, batch_per_process=per_process)
    device = torch.device("cpu")
    optimizer = KeepGradients(model)
    steps = train.Steps(model, train.wrap(model, config, device, world), optimizer,
                        torch.amp.GradScaler("cpu", enabled=False), config, device, None, rank,
                        world, 10)
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    steps(0, images[share], ids.to(torch.uint8)[share])
    loss = steps.mean_loss(0)
    torch.save((loss, optimizer.gradients), folder / f"gradients-{world}-{per_process}-{rank}.pt")


def validate_after_training(rank, world, folder):
    """Ranks with different running statistics validate together; rank 0 then alone."""
    model = tiny_model(num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += rank                    # as after a step on other images
    samples = data.gather(folder, ("custom",), "val", True)
    config = train.Config(workers=0)
    together = train.validate(model, samples, range(3), config, rank, world, torch.device("cpu"))
    alone = evaluate.evaluate(model.eval(), samples, 3, torch.device("cpu"))
    counts = ({c: group[0].compute()["confusion"] for c, group in alone.items()} if world == 1
              else None)
    torch.save(({c: r["confusion"] for c, r in together.items()},
                {name: b for name, b in model.named_buffers()}, counts),
               folder / f"validation-{world}-{rank}.pt")


def evaluate_share(rank, world, folder):
    samples = data.gather(folder, ("custom",), "val", True)
    results = evaluate.evaluate([tiny_model(3).eval()], samples, 3, torch.device("cpu"),
                                (0.67, 1.0), rank=rank, world=world)
    torch.save([[m.counts for m in group] for group in results.values()],
               folder / f"counts-{world}-{rank}.pt")


def bad_loss(rank, world, folder):
    """One rank meets a loss that is not finite; every rank must raise, and name the step.

    No weight is changed here, so only the loss itself can tell the others."""
    model = tiny_model()
    config = train.Config(batch=2, batch_per_process=1)
    device = torch.device("cpu")
    steps = train.Steps(model, train.wrap(model, config, device, world),
                        KeepGradients(model),
                        torch.amp.GradScaler("cpu", enabled=False), config, device, None, rank,
                        world, 10)
    image, ids = torch.zeros(1, 3, 160, 96), torch.zeros(1, 160, 96, dtype=torch.uint8)
    steps(3, image, ids)
    steps.mean_loss(3)
    said = []
    steps(4, image if rank == 0 else image + math.nan, ids)
    for ask in (4, 5):                                # at once on all ranks, and still a step later
        try:
            steps.mean_loss(ask)
        except ValueError as error:
            said.append(str(error))
        steps(5, image, ids)
    (folder / f"said-{rank}").write_text("\n".join(said))


class ProcessTest(Temporary):
    def test_gradients_do_not_depend_on_processes(self):
        for world, per_process in ((1, 4), (1, 1), (2, 2), (2, 1), (4, 1)):
            in_processes(gradients_of_a_step, world, self.folder, per_process)
        loss, reference = torch.load(self.folder / "gradients-1-4-0.pt", weights_only=True)
        self.assertGreater(max(g.abs().max().item() for g in reference.values()), 0.01)
        for path in sorted(self.folder.glob("gradients-*.pt")):
            other_loss, gradients = torch.load(path, weights_only=True)
            self.assertAlmostEqual(loss, other_loss, places=4, msg=path.name)
            for name, gradient in gradients.items():
                scale = max(1, reference[name].abs().max().item())
                self.assertLess((gradient - reference[name]).abs().max().item() / scale, 1e-5,
                                (path.name, name))

    def test_validation_with_two_ranks_equals_one(self):
        Fixtures.custom(self.folder, images=3, size=(80, 60))
        for world in (1, 2):
            in_processes(validate_after_training, world, self.folder)
        results = [torch.load(self.folder / f"validation-{world}-{rank}.pt", weights_only=True)
                   for world, rank in ((1, 0), (2, 0), (2, 1))]
        for confusion, buffers, _ in results:
            self.assertTrue(all(torch.equal(confusion[c], results[0][0][c]) for c in confusion))
            self.assertTrue(all(torch.equal(buffers[n], results[0][1][n]) for n in buffers))
        self.assertTrue(torch.equal(results[0][2]["all"], results[0][0]["all"]))
        # every image once
        self.assertEqual(results[0][0]["all"].sum().item(), 3 * 80 * 60 * 3 // 4)

    def test_evaluation_is_the_same_for_any_number_of_processes(self):
        Fixtures.custom(self.folder, images=4, size=(80, 60))
        for world in (1, 2, 3):
            in_processes(evaluate_share, world, self.folder)
        reference = torch.load(self.folder / "counts-1-0.pt", weights_only=True)
        for path in self.folder.glob("counts-*.pt"):
            for group, other in zip(reference, torch.load(path, weights_only=True)):
                for a, b in zip(group, other):
                    self.assertTrue(all(torch.equal(a[name], b[name]) for name in a), path.name)

    def test_loss_that_is_not_finite_stops_all_ranks(self):
        in_processes(bad_loss, 2, self.folder)
        for rank in (0, 1):
            said = (self.folder / f"said-{rank}").read_text().splitlines()
            self.assertEqual(len(said), 2)
            for line in said:
                self.assertRegex(line, "loss of step 4, or what it made of the weights, "
                                 "is not finite")


# --- train.py -----------------------------------------------------------------------------------

def environment():
    """One thread per process, and no GPU, so that numbers can be compared bit for bit."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(HERE)}


def command(script, *arguments, processes=1):
    start = [sys.executable] if processes == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={processes}"]
    return [*start, str(HERE / script), *map(str, arguments)]


def kill_tree(pid):
    """SIGKILL a process and all its descendants at once (torchrun's workers have sessions
    of their own)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    for member in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


# What the kill tests start in the place of a script: the same on a network of four blocks. While a
# file "slow" lies beside it, checkpoints are written slowly and "inside" lies there meanwhile.
SLOW_WRITER = """
import io, os, sys, time
from pathlib import Path
import torch
import convnext, data, pseudolabel, train

convnext.SIZES["convnext_atto"] = ((1, 1, 1, 1), (8, 16, 24, 32))
here, save, replace = Path(__file__).parent, torch.save, os.replace


def slow_save(state, file):
    buffer = io.BytesIO()
    save(state, buffer)
    half = len(buffer.getvalue()) // 2
    if (here / "slow").exists():
        (here / "inside").touch()
        file.write(buffer.getvalue()[:half])
        file.flush()
        time.sleep(0.3)
        file.write(buffer.getvalue()[half:])
    else:
        file.write(buffer.getvalue())


def slow_replace(source, target):
    if (here / "inside").exists() or Path(target).suffix == ".png":
        time.sleep(0.05 if Path(target).suffix == ".png" else 0.3)
    replace(source, target)
    (here / "inside").unlink(missing_ok=True)


torch.save, os.replace = slow_save, slow_replace
script = {"train": train, "pseudolabel": pseudolabel}[sys.argv.pop(1)]
data.run_main(script.main)
"""


def members(word):
    """{pid: pid of its parent} of the processes that have `word` on their command line."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if word.encode() in (stat.parent / "cmdline").read_bytes():
                found[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    return found


class RunTest(Temporary):
    """A test that starts the driver above, kills it, and looks into run folders."""

    def setUp(self):
        super().setUp()
        self.driver = self.folder / "driver.py"
        self.driver.write_text(SLOW_WRITER)
        self.slowest = {}

    def start(self, processes, script, arguments, out):
        with open(f"{out}.txt", "ab") as output:
            return subprocess.Popen(command(self.driver, script, *arguments, "--out", out,
                                            processes=processes),
                                    env=environment(), stdout=output, stderr=output)

    def finish(self, processes, script, arguments, out):
        code = self.start(processes, script, arguments, out).wait(300)
        self.assertEqual(code, 0, Path(f"{out}.txt").read_text()[-3000:])

    def wait(self, process, condition, seconds=120):
        """Whether `condition` comes true while the process lives; fails after many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if process.poll() is not None:
                return False
            self.assertLess(time.monotonic(), deadline, "neither progress nor an end")
            time.sleep(0.01)
        return True

    def kill(self, kind, process, out, random):
        """Kill what `kind` says, and wait until all processes have ended by themselves. False where
        there is no process of that kind."""
        family = members(str(out))
        ranks = [pid for pid, parent in family.items() if parent == process.pid]
        loaders = [pid for pid, parent in family.items() if parent in ranks]
        if process.args[1] != "-m":                        # no torchrun: its children load
            loaders, ranks = ranks, []
        doomed = {"loader": loaders, "rank": ranks, "launcher": [process.pid],
                  "all": list(family)}.get(kind, list(family))
        if not doomed:
            return False
        if kind in ("loader", "rank"):
            doomed = [random.choice(doomed)]
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while members(str(out)) or process.poll() is None:
            self.assertLess(time.monotonic() - began, 30, f"{kind}: some do not end")
            time.sleep(0.02)
        self.slowest[kind] = max(self.slowest.get(kind, 0), time.monotonic() - began)
        return True

    def small_run(self, steps):
        """Arguments of train.py for eight small images; two steps are an epoch."""
        Fixtures.custom(self.folder, images=8, size=(40, 40))
        return ("--recipe", "camvid", "--data", self.folder, "--train", "custom", "--val", "custom",
                "--crop", 96, "--levels", 2, "--width", 8, "--batch", 4, "--batch-per-process", 1,
                "--steps", steps, "--save-every", 3, "--log-every", 1, "--val-every", 4,
                "--drop-path", 0.3, "--workers", 1)

    def log(self, run):
        path = run / "log.jsonl"
        records = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def steps(self, run):
        return [{k: v for k, v in r.items() if k != "seconds"}
                for r in self.log(run) if "step" in r]

    def assert_same(self, a, b):
        if isinstance(a, dict):
            self.assertEqual(a.keys(), b.keys())
            for key in a:
                self.assert_same(a[key], b[key])
        elif isinstance(a, torch.Tensor):
            self.assertTrue(torch.equal(a, b))
        else:
            self.assertEqual(a, b)

    def assert_same_run(self, calm, killed, total):
        """Weights, optimizer, scores and log of two finished runs, bit for bit; times aside."""
        a, b = (torch.load(run / "last.pt", weights_only=True) for run in (calm, killed))
        self.assertEqual(a["step"], total)
        self.assert_same(a["model"], b["model"])
        self.assert_same(a["optimizer"]["state"], b["optimizer"]["state"])
        for key in ("step", "best", "untrained", "scaler", "data", "world", "dtype"):
            self.assertEqual(a[key], b[key], key)
        best = [torch.load(run / "best.pt", weights_only=True) for run in (calm, killed)]
        self.assertEqual(best[0]["step"], best[1]["step"])
        self.assert_same(best[0]["model"], best[1]["model"])
        self.assertEqual(self.steps(calm), self.steps(killed))         # no step twice, none missing


class ResumeTest(RunTest):
    """A run killed in the middle of an epoch and continued ends in the very bits of an
    undisturbed one."""

    def arguments(self, out):
        return ("--recipe", "camvid", "--data", self.folder, "--train", "custom", "--val", "custom",
                "--crop", 160, "--batch", 4, "--batch-per-process", 1, "--steps", 14,
                "--save-every", 3, "--log-every", 1, "--val-every", 2,
                "--drop-path", 0.3, "--workers", 1, "--width", 16, "--out", out)

    def kill_and_resume(self, processes):
        Fixtures.custom(self.folder, images=16, size=(80, 60))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment()}
        calm, killed = self.folder / "calm", self.folder / "killed"
        subprocess.run(command("train.py", *self.arguments(calm), processes=processes), check=True,
                       **quiet)
        process = subprocess.Popen(command("train.py", *self.arguments(killed),
                                           processes=processes),
                                   **quiet)
        self.wait_for_step(killed, 5)
        kill_tree(process.pid)
        process.wait()
        stopped = max(r.get("step", 0) for r in self.log(killed))
        self.assertIn(stopped, range(5, 14))               # 4 steps are an epoch: killed inside one
        subprocess.run(command("train.py", *self.arguments(killed), processes=processes),
                       check=True, **quiet)
        self.assert_same_run(calm, killed, 14)
        self.assertIn("restart", " ".join(" ".join(r) for r in self.log(killed)))

    def wait_for_step(self, run, step):
        deadline = time.monotonic() + 120
        while (max((r.get("step", 0) for r in self.log(run)), default=0) < step
               and time.monotonic() < deadline):
            time.sleep(0.01)

    def test_sigterm_and_lock(self):
        """SIGTERM saves at the next step boundary; meanwhile no second run may use the folder."""
        Fixtures.custom(self.folder, images=16, size=(80, 60))
        out = self.folder / "run"
        more = ["--steps", 300, "--save-every", 1000, "--val-every", 1000]
        process = subprocess.Popen(command("train.py", *self.arguments(out), *more, processes=2),
                                   env=environment(), stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)
        self.wait_for_step(out, 3)
        second = subprocess.run(command("train.py", *self.arguments(out), *more), env=environment(),
                                capture_output=True, text=True)
        self.assertEqual(second.returncode, 2)
        self.assertRegex(second.stderr,
                         r"run is in use by another process; choose another --out\n$")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        self.assertIn("stopped by SIGTERM after step", output)
        state = torch.load(out / "last.pt", weights_only=True)
        self.assertGreaterEqual(state["step"], 3)
        with mock.patch.object(sys, "argv",
                               ["train.py", *map(str, self.arguments(out)), *map(str, more)]):
            folder, found = train.choose_run(
                train.load_data(train.settle(data.parse_flags(train.Config, "")))[0])
        # the same command continues
        self.assertEqual((folder, found["step"]), (out, state["step"]))

    def test_one_process(self):
        self.kill_and_resume(1)

    def test_two_processes(self):
        self.kill_and_resume(2)


class FaultTest(RunTest):
    """What goes wrong around a run: one line says so, and the last checkpoint stays whole."""

    def run_main(self, script, arguments, code=2):
        """The message of a script that ends by `code`."""
        err = io.StringIO()
        with mock.patch.object(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)]), \
                contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), \
                mock.patch.dict(convnext.SIZES, convnext_atto=((1, 1, 1, 1), (8, 16, 24, 32))), \
                self.assertRaises(SystemExit) as stop:
            data.run_main(script.main)
        self.assertEqual((stop.exception.code, err.getvalue().count("\n")), (code, code == 2),
                         err.getvalue())
        return err.getvalue()

    def at_step(self, step, action):
        """Train.Steps, with an action before one step."""
        plain = train.Steps.__call__

        def steps(self, number, images, ids):
            if number == step:
                action()
            plain(self, number, images, ids)
        return mock.patch.object(train.Steps, "__call__", steps)

    def test_full_disk(self):
        """The disk fills while a checkpoint, or a line of the log, is written."""
        arguments, run = (*self.small_run(8), "--workers", 0, "--out", self.folder / "run"), \
            self.folder / "run"

        def full(name):                      # what is written there next finds no space left
            (run / name).unlink(missing_ok=True)
            (run / name).symlink_to("/dev/full")

        def limit():                         # files end after 100 kB; a checkpoint has 476
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        last = f".last.pt.{os.getpid()}.tmp"
        for step, action, words in (
                (2, lambda: full(last), "run/last.pt cannot be written: No space left on device"),
                (2, limit, "run/last.pt cannot be written: File too large"),
                (4, lambda: full(f".best.pt.{os.getpid()}.tmp"), "run/best.pt cannot be .*: No"),
                (7, lambda: full("log.jsonl"), "run/log.jsonl cannot be written: No space left")):
            before = (run / "last.pt").read_bytes() if run.exists() else None
            try:
                with self.at_step(step, action):
                    message = self.run_main(train, arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            self.assertRegex(message, words + ".*; the same command goes on once it can, or name "
                             "another folder. What was written before is whole")
            self.assertEqual([*run.glob(".*.tmp")], [])
            state = swiftnet.read_checkpoint(run / "last.pt")        # whole
            self.assertLess(state["step"], 8)
            if before and action is limit:
                self.assertEqual((run / "last.pt").read_bytes(), before)
        (run / "log.jsonl").unlink()

    def test_forbidden_folders(self):
        """As a user without rights: a folder that cannot be written, one that cannot be read."""
        arguments = (*self.small_run(2), "--workers", 0, "--out", self.folder / "run")
        with mock.patch.object(train.Steps, "__call__", side_effect=KeyboardInterrupt):
            self.run_main(train, arguments, 130)                   # leaves an unfinished run
        self.folder.chmod(0o755)
        for mode, words in ((0o555, "cannot be written: Permission denied; .*another folder"),
                            (0o000, "Permission denied: '.*run/last.pt'")):
            (self.folder / "run").chmod(mode)
            said = self.folder / f"said{mode}"
            said.touch()
            said.chmod(0o666)
            child = os.fork()
            if child == 0:                                     # root may do anything: become nobody
                try:
                    if os.getuid() == 0:
                        os.setuid(65534)
                    said.write_text(self.run_main(train, arguments))
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            self.assertRegex(said.read_text(), words)
            (self.folder / "run").chmod(0o755)

    def test_processes_that_die(self):
        """A loader worker, one process of two, torchrun: the others end by themselves, in 20
        seconds, and the checkpoint is whole."""
        random = np.random.default_rng(0)
        arguments = (*self.small_run(10_000), "--val-every", 10_000)
        for kind, processes, words in (
                ("loader", 1, r"driver.py: rank 0 stops: .*DataLoader worker .*continues"),
                ("rank", 2, "rank . stops, as another process ended|stopped by SIGTERM"),
                ("launcher", 2, "torchrun is gone; this process stops too")):
            with self.subTest(kind):
                out = self.folder / kind
                process = self.start(processes, "train", arguments, out)
                self.assertTrue(self.wait(process, lambda: len(self.steps(out)) > 3))
                self.kill(kind, process, out, random)
                output = Path(f"{out}.txt").read_text()
                self.assertRegex(output, words)
                self.assertNotIn('train.py", line', output)                  # no traceback of ours
                self.assertLess(self.slowest[kind], 20)
                swiftnet.read_checkpoint(out / "last.pt")
                with data.hold(out, 0):              # the next start, after a death within a write
                    self.assertEqual([*out.glob(".*.tmp")], [])
        print("; ".join(f"{kind} killed: the rest ended after {seconds:.1f} s"
                        for kind, seconds in self.slowest.items()), flush=True)

    def test_torchrun_that_ended_before(self):
        """A process whose launcher died during the imports finds nobody at its store."""
        with mock.patch.dict(os.environ, TORCHELASTIC_RUN_ID="x", MASTER_ADDR="localhost",
                             TORCHELASTIC_USE_AGENT_STORE="True", MASTER_PORT="1"), \
                self.assertRaisesRegex(ValueError, "torchrun is gone .*start the same command"):
            evaluate.start_processes()

    def test_lock(self):
        """A folder is one process's as long as that lives, and not longer."""
        script = ("import fcntl, time; lock = open('.lock', 'w'); fcntl.lockf(lock, fcntl.LOCK_EX);"
                  "print('held', flush=True); time.sleep(60)")
        other = subprocess.Popen([sys.executable, "-c", script], cwd=self.folder,
                                 stdout=subprocess.PIPE)
        other.stdout.readline()
        left = self.folder / "deep/.label.png.9.tmp"
        left.parent.mkdir()
        left.touch()
        with self.assertRaisesRegex(ValueError, "is in use by another process; choose another"), \
                data.hold(self.folder, 0):
            pass
        self.assertTrue(left.exists())                            # the other's: it may be at it
        with data.hold(self.folder, 1):
            pass
        other.kill()
        other.communicate()
        with data.hold(self.folder, 0):
            self.assertFalse(left.exists())

    def test_fp16_overflow(self):
        """One overflow costs a step and halves the scale; a storm of them ends in a message."""
        torch.manual_seed(0)
        model = tiny_model(levels=1).train()
        config, cpu = train.Config(batch=1, batch_per_process=1), torch.device("cpu")
        optimizer = train.make_optimizer(model, config, cpu)
        steps = train.Steps(model, model, optimizer, torch.amp.GradScaler("cpu"), config, cpu, None,
                            0, 1, 1000)
        images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        ids, weight = torch.randint(0, 5, (1, 64, 64), dtype=torch.uint8), model.head[2].weight
        before, factor = weight.detach().clone(), math.inf
        weight.register_hook(lambda gradient: gradient * factor)
        steps(0, images, ids)
        self.assertTrue(torch.equal(weight, before))
        self.assertEqual(steps.scaler.get_scale(), 2.0 ** 15)
        steps.mean_loss(0)
        factor = 1.0
        steps(1, images, ids)
        self.assertFalse(torch.equal(weight, before))
        before, factor = weight.detach().clone(), math.inf
        for step in range(2, 40):
            steps(step, images, ids)
            if steps.scaler.get_scale() >= train.LEAST_SCALE:
                steps.mean_loss(step)
        self.assertTrue(torch.equal(weight, before))
        with self.assertRaisesRegex(ValueError, "gradients overflow float16 .*--precision fp32"):
            steps.mean_loss(39)

    def test_broken_cache_of_class_counts(self):
        """Whatever lies in its place, classes are counted anew and the file is written again."""
        Fixtures.custom(self.folder, images=2)
        samples = data.gather(self.folder, ("custom",), "train", True)
        good = data.class_counts(samples, 3, folder=self.folder)
        path, = self.folder.glob(".class-counts-*.npy")
        raw, array, archive, harm = path.read_bytes(), io.BytesIO(), io.BytesIO(), io.BytesIO()
        np.save(array, np.zeros((2, 4), np.int64))
        np.savez(archive, a=good)
        np.save(harm, np.array([Harmful()], object), allow_pickle=True)
        for content in (b"", b"text", raw[:-8], raw[:20], array.getvalue(), archive.getvalue(),
                        raw.replace(b"<i8", b"<f8"), raw.replace(b"<i8", b"|O "),
                        raw.replace(b"(2, 3), }         ", b"(2000000000, 3), }"),
                        b"PK\x03\x04" + raw, raw.replace(b"'descr'", b"((((((("),
                        harm.getvalue()):
            path.write_bytes(content)
            with memory_limit(2 ** 30), contextlib.redirect_stdout(io.StringIO()), \
                    contextlib.chdir(self.folder):
                self.assertTrue((data.class_counts(samples, 3, folder=self.folder) == good).all())
            self.assertEqual(path.read_bytes(), raw)
        self.assertFalse((self.folder / "harmed").exists())

    def test_log_of_rubbish(self):
        """Lines that are no records are left out when a run is continued."""
        path = self.folder / "log.jsonl"
        path.write_bytes(b'{"config": 1}\n[1]\n7\n\xff\xfe\n' + DEEP + b'\n{"step": "x"}\nnull\n\n'
                         b'{"step": 3}\n{"step": 9}\n{"step"')
        self.assertEqual(train.kept_lines(path, 3), ['{"config": 1}', '{"step": 3}'])


class TrainTest(Temporary):
    def test_one_step_on_every_set(self):
        """Check, load, augment and one optimizer step, for every set with labels."""
        fixtures = ("cityscapes", "cityscapes_coarse", "vistas", "bdd100k", "wilddash_final",
                    "acdc", "camvid", "camvid_19", "ade20k", "custom", "nightcity")
        for fixture in fixtures:
            root = self.folder / fixture
            getattr(Fixtures, fixture)(root)
            name = fixture.removesuffix("_final")
            with contextlib.redirect_stdout(io.StringIO()):
                self.assertEqual(data.check(root), [], fixture)
            samples = data.gather(root, (name,), "train", True)
            classes = len(data.classes_of(root, name))
            dataset = data.TrainSet(samples, classes, 160, (0.5, 2.0), 0)
            images, ids, errors = data.collate([dataset[0, i, 0, -1] for i in range(2)])
            self.assertEqual((errors, images.shape, ids.shape),
                             ([], (2, 3, 160, 160), (2, 160, 160)))
            model = tiny_model(classes).train()
            config = train.Config(batch=2, batch_per_process=2)
            optimizer = train.make_optimizer(model, config, torch.device("cpu"))
            before = model.head[2].weight.detach().clone()
            steps = train.Steps(model, model, optimizer, torch.amp.GradScaler("cpu", enabled=False),
                                config, torch.device("cpu"), None, 0, 1, 10)
            steps(0, images, ids)
            self.assertGreater(steps.mean_loss(0), 0, fixture)
            self.assertEqual([group["lr"] for group in optimizer.param_groups], [4e-4, 1e-4])
            steps(5, images, ids)
            self.assertAlmostEqual(optimizer.param_groups[1]["lr"],
                                   train.learning_rate(5, 1e-4, 0, 10))
            self.assertFalse(torch.equal(model.head[2].weight, before))

    def scripted(self, scores, *more):
        """train.main with validations that return these scores one by one;
        an exception among them is raised."""
        script = iter(scores)

        def validate(*_):
            score = next(script)
            if isinstance(score, BaseException):
                raise score
            return {"all": {"miou": score, "classes": 3, "auiou": 0, "ece": 0, "ece_valid": 0,
                            "pixels": 1}}
        arguments = ["train.py", "--recipe", "camvid", "--data", self.folder, "--train", "custom",
                     "--val", "custom", "--crop", 160, "--batch", 2, "--steps", 8, "--width", 16,
                     "--val-every", 1, "--save-every", 1, "--log-every", 1, "--out",
                     self.folder / "run", *more]
        with mock.patch.object(sys, "argv", [*map(str, arguments)]), \
                mock.patch.object(train, "validate", validate), \
                contextlib.redirect_stdout(io.StringIO()) as out, \
                mock.patch.object(train, "count_conditions", return_value={"all": 4}):
            train.main()
        return out.getvalue()

    def test_best_survives_an_interruption(self):
        """best.pt is the best of all validations, before and after the break, and only of those."""
        Fixtures.custom(self.folder, images=4, size=(80, 60))            # 2 steps are an epoch
        with self.assertRaises(KeyboardInterrupt):
            self.scripted([0.0, 0.5, 0.3, KeyboardInterrupt()])
        self.scripted([0.4, 0.2])
        best, last = (torch.load(self.folder / f"run/{name}.pt", weights_only=True)
                      for name in ("best", "last"))
        self.assertEqual((best["step"], best["best"], last["step"], last["best"]), (2, 0.5, 8, 0.5))

    def test_changed_data_is_refused(self):
        Fixtures.custom(self.folder, images=4, size=(80, 60))
        with self.assertRaises(KeyboardInterrupt):
            self.scripted([0.0, KeyboardInterrupt()])
        put(self.folder / "custom/images/train/new.png", picture())
        put(self.folder / "custom/labels/train/new.png", pattern([0]))
        with self.assertRaisesRegex(ValueError, "trained on other files: 4 \\+ 4 images .* there, "
                                    "5 \\+ 4 images .* here"):
            self.scripted([0.1])

    def test_pseudo(self):
        """--pseudo adds a folder of pseudolabels to the sets, with its weight, and is one of the
        things that a continuation may not change."""
        Fixtures.cityscapes(self.folder / "data")
        Fixtures.pools(self.folder / "data")
        folder = self.folder / "pseudo/v1"
        image = "stf/cam_stereo_left_lut/2018-02-03_20-48-35_00400.png"
        put(folder / "a.png", pattern([0, 13, 255]))
        (folder / "settings.json").write_text(json.dumps({"classes": data.CLASSES}))
        (folder / "manifest.csv").write_text(f"image,label,kept\n{image},a.png,0.5\n")

        def load(*arguments):
            given = {"data": "data", "val": ("cityscapes",), **dict(zip(arguments[::2],
                                                                        arguments[1::2]))}
            return train.load_data(train.settle(given))
        with contextlib.chdir(self.folder):
            plain, mixed = load(), load("pseudo", ("pseudo/v1*2.5",))         # on the default mix
            self.assertEqual(mixed[0].train, ("cityscapes",))
            self.assertEqual(mixed[1][:-1], plain[1])
            self.assertEqual(mixed[1][-1], data.Sample(f"data/{image}", "pseudo/v1/a.png", None,
                                                       None, "pseudo/v1", "pseudo"))
            self.assertEqual(mixed[2].tolist(), [1, 1, 2.5])
            for name, value, words in (
                    ("train", ("pseudo/v1",), "--train pseudo/v1: --train takes sets"),
                    ("pseudo", ("cityscapes",), "--pseudo cityscapes: --train takes sets .*"
                                                "--pseudo folders"),
                    ("pseudo", ("pseudo/v2",), "unknown dataset 'pseudo/v2'"),
                    ("pseudo", ("pseudo/v1", "pseudo/v1"), "named twice")):
                with self.assertRaisesRegex(ValueError, words):
                    load(name, value)

            def digest(config, samples, weights, val_samples, classes):
                return train.data_digest(samples, weights, val_samples, config.pseudo)
            before = digest(*load("pseudo", ("pseudo/v1",)))
            self.assertNotEqual(before, digest(*plain))
            (folder / "manifest.csv").write_text(f"image,label,kept\n{image},a.png,0.6\n")
            self.assertNotEqual(before, digest(*load("pseudo", ("pseudo/v1",))))
            self.assertEqual(train.changes(mixed[0], {"config": vars(plain[0])}),
                             ["--pseudo  there, pseudo/v1*2.5 here"])
            (folder / "settings.json").write_text(json.dumps({"classes": data.CAMVID_CLASSES}))
            with self.assertRaisesRegex(ValueError, "cityscapes and pseudo/v1 have different"):
                load("pseudo", ("pseudo/v1",))

    def test_bad_weights_are_never_saved(self):
        """A finite loss whose gradient is not: the weights are checked before they overwrite a
        checkpoint."""
        Fixtures.custom(self.folder, images=4, size=(80, 60))
        plain = train.Steps.__call__

        def poisoned(steps, step, images, ids):
            plain(steps, step, images, ids)
            if step == 3:
                next(steps.model.parameters()).data.fill_(math.inf)
        with mock.patch.object(train.Steps, "__call__", poisoned), \
                self.assertRaisesRegex(ValueError,
                                       "step 3, or what it made of the weights, is not finite"):
            self.scripted([0.0, 0.1, 0.2])
        state = torch.load(self.folder / "run/last.pt", weights_only=True)
        self.assertEqual(state["step"], 3)
        self.assertTrue(all(tensor.isfinite().all() for tensor in state["model"].values()))

    def test_gradient_scaler_is_continued(self):
        config = train.Config(backbone="convnext_atto", width=16, pretrained="none",
                              precision="fp16")
        cpu = torch.device("cpu")
        steps = train.make_steps(config, data.CLASSES, None, 0, 1, cpu, 10)
        steps.scaler.load_state_dict({**steps.scaler.state_dict(), "scale": 4096.0,
                                      "_growth_tracker": 7})
        standing = {"step": 3, "best": 0.1, "untrained": {}, "data": ""}
        train.save(self.folder / "last.pt", steps, data.CLASSES, standing)
        state = swiftnet.read_checkpoint(self.folder / "last.pt")
        again = train.make_steps(config, data.CLASSES, state, 0, 1, cpu, 10)
        self.assertEqual(again.scaler.state_dict(), {**steps.scaler.state_dict()})
        self.assertEqual(again.scaler.state_dict()["scale"], 4096.0)

    def test_left_over_files_go(self):
        (self.folder / ".last.pt.123.tmp").write_text("of a killed process")
        with train.hold(self.folder, 0):
            self.assertEqual([path.name for path in self.folder.iterdir()], [".lock"])

    def test_skip_bad(self):
        """A file that cannot be read stops training, unless as many are allowed;
        then it is counted and logged, once, however often it comes up."""
        Fixtures.custom(self.folder, images=4, size=(80, 60))
        for i in (1, 2):
            (self.folder / f"custom/images/train/frame{i} of mine.png").write_bytes(b"broken")
        arguments = ["train.py", "--recipe", "camvid", "--data", self.folder, "--train", "custom",
                     "--val", "custom", "--crop", 160, "--batch", 2, "--steps", 6, "--width", 16,
                     "--out", self.folder / "run"]

        def run(*more):
            with mock.patch.object(sys, "argv", [*map(str, arguments), *more]), \
                    contextlib.redirect_stdout(io.StringIO()) as out:
                train.main()
            return out.getvalue()
        with self.assertRaisesRegex(ValueError, "frame[12] of mine.png cannot be read"):
            run()
        with self.assertRaisesRegex(ValueError,
                                    "frame[12] of mine.png .*2 unreadable files; --skip-bad 1"):
            run("--skip-bad", "1")
        self.assertIn("skipped, number 2 of at most 2", run("--skip-bad", "2"))
        log = [json.loads(line)
               for line in (self.folder / "run/log.jsonl").read_text().splitlines()]
        self.assertEqual(sum("skipped" in record for record in log), 2)

    def test_schedule(self):
        rates = [train.learning_rate(step, 4e-4, 10, 110) for step in range(111)]
        self.assertAlmostEqual(rates[0], 4e-5)
        self.assertAlmostEqual(rates[9], 4e-4)
        self.assertAlmostEqual(rates[10], 4e-4)
        self.assertAlmostEqual(rates[60], (4e-4 + 1e-7) / 2)
        self.assertAlmostEqual(rates[110], 1e-7, places=12)
        self.assertAlmostEqual(train.learning_rate(0, 4e-4, 0, 10), 4e-4)

    def test_the_recipe_of_the_deck(self):
        """NOTE: the deck's and the lineage's numbers, typed from them."""
        with contextlib.chdir(self.folder):
            Path("data").mkdir()
            config = train.settle({})
        self.assertEqual((config.crop, config.zoom, config.batch, config.batch_per_process,
                          config.epochs),
                         (1024, (0.5, 2.0), 24, 3, 50))
        self.assertEqual((config.lr, config.backbone_lr, config.weight_decay, train.ADAM_EPS,
                          train.LR_END),
                         (4e-4, 1e-4, 1e-4, 1e-7, 1e-7))
        self.assertEqual((config.backbone, config.pretrained, config.bn_momentum,
                          config.layer_scale),
                         ("convnext_large", "in22k_1k_384", 0.01, 1e-6))
        self.assertEqual((losses.BINS, losses.ALPHAS, losses.GAMMA),
                         ((4, 16, 64, 128), (8, 6, 4, 2, 1), 0.5))

    def test_optimizer_groups(self):
        model = tiny_model()
        optimizer = train.make_optimizer(model, train.Config(), torch.device("cpu"))
        new, backbone = optimizer.param_groups
        self.assertEqual((new["peak"], backbone["peak"]), (4e-4, 1e-4))
        for group in optimizer.param_groups:
            self.assertEqual((group["betas"], group["eps"], group["weight_decay"]),
                             ((0.9, 0.99), 1e-7, 1e-4))
        config = train.Config(backbone="convnext_atto", pretrained="none", bn_momentum=0.03,
                              checkpoint_blocks=True)
        made = train.make_model(config, "abc", None)
        self.assertEqual({m.momentum for m in made.modules() if isinstance(m, nn.BatchNorm2d)},
                         {0.03})
        self.assertTrue(made.backbone.checkpoint_blocks)
        self.assertEqual({id(p) for p in backbone["params"]},
                         {id(p) for p in model.backbone.parameters()})
        self.assertEqual(len(new["params"]) + len(backbone["params"]),
                         len(list(model.parameters())))

    def test_run_folders(self):
        def config(**changes):
            return train.Config(**{"data": "d", "train": ("x",), "val": ("x",), **changes})

        def write(folder, step, settings):
            write_checkpoint(Path(folder) / "last.pt", step=step, total=9, config=vars(settings),
                             optimizer={}, scaler={}, best=0.0, untrained={}, data="", world=1,
                             dtype="")
        with contextlib.chdir(self.folder):
            self.assertEqual(train.choose_run(config()), (Path("runs/driving"), None))
            write("runs/driving", 4, config())
            folder, state = train.choose_run(config(workers=3))                # free to change
            self.assertEqual((folder, state["step"]), (Path("runs/driving"), 4))
            with self.assertRaisesRegex(ValueError, "--lr 0.0004 there, 0.1 here"):
                train.choose_run(config(lr=0.1))
            (Path("runs/driving") / "last.pt").unlink()
            Path("runs/driving").rmdir()
            write("runs/driving", 9, config())                               # finished: next number
            self.assertEqual(train.choose_run(config(lr=0.1)), (Path("runs/driving-2"), None))
            write("runs/driving-2", 1, config(lr=0.1))
            self.assertEqual(train.choose_run(config(lr=0.1))[0], Path("runs/driving-2"))
            resumed = train.settle({"resume": "runs/driving-2/last.pt"})
            self.assertEqual((resumed.lr, resumed.data), (0.1, "d"))
            self.assertEqual(train.choose_run(resumed)[1]["step"], 1)
            with self.assertRaisesRegex(ValueError, "finished"):
                train.choose_run(train.settle({"resume": "runs/driving"}))
            with self.assertRaises(FileNotFoundError):
                train.settle({"resume": "runs/nowhere"})
            # torchrun restarts a process that died after its last step: nothing is left to do.
            with mock.patch.dict(os.environ, {"TORCHELASTIC_RESTART_COUNT": "1"}):
                self.assertEqual(train.choose_run(config())[1]["step"], 9)
            # A best.pt alone is somebody's result: its folder is left alone.
            write_checkpoint(Path("runs/other/best.pt"))
            self.assertEqual(train.choose_run(config(out="runs/other")),
                             (Path("runs/other-2"), None))
            write("runs/old", 1, config())
            state = torch.load("runs/old/last.pt", weights_only=True)
            torch.save({**state, "config": {**state["config"], "gone": 1}}, "runs/old/last.pt")
            with self.assertRaisesRegex(ValueError, "another version: it has settings gone"):
                train.settle({"resume": "runs/old"})

    def test_log_is_cut_at_the_checkpoint(self):
        path = self.folder / "log.jsonl"
        path.write_text('{"config": 1}\n{"step": 3}\n{"step": 6}\n{"step": 7}\n{"st')
        train.Log(self.folder, 0, {"world": 2}, {"step": 6}).write(step=7, loss=1.0)
        self.assertEqual([json.loads(line) for line in path.read_text().splitlines()],
                         [{"config": 1}, {"step": 3}, {"step": 6}, {"restart": 6, "world": 2},
                          {"step": 7, "loss": 1.0}])

    def test_init_takes_weights_and_says_when_the_head_is_new(self):
        path = self.folder / "other.pt"
        seven, names = tiny_model(7, seed=1), tuple("abcdefg")
        for model, classes in ((tiny_model(5, seed=2), tuple("abcde")),
                               (tiny_model(7, seed=2), tuple("gfedcba"))):
            write_checkpoint(path, seven, classes=names)
            head = model.head[2].weight.clone()
            with contextlib.redirect_stdout(io.StringIO()) as out:
                train.take_weights(model, path, classes)
            self.assertRegex(out.getvalue(),
                             rf"7 classes there \(a, ...\), {len(classes)} here .*: new head")
            self.assertTrue(torch.equal(model.head[2].weight, head))
            self.assertTrue(torch.equal(model.ladder[0][2].weight, seven.ladder[0][2].weight))
        model = tiny_model(7, seed=2)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            train.take_weights(model, path, names)
        self.assertEqual(out.getvalue(), "")
        self.assertTrue(torch.equal(model.head[2].weight, seven.head[2].weight))
        write_checkpoint(path, tiny_model(7, levels=1), classes=names)
        with self.assertRaisesRegex(ValueError, "does not fit"):
            train.take_weights(model, path, names)


# --- pseudolabel.py -----------------------------------------------------------------------------

class PseudolabelTest(Temporary):
    def pool(self, images=6, width=90, height=70):
        """A pool of small pictures and a checkpoint; returns the script's arguments."""
        for i in range(images):
            put(self.folder / f"data/pool/{'ab'[i % 2]}/{i}.png", picture(i, width + i, height))
        model = swiftnet.build("convnext_atto", num_classes=19, width=16)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        write_checkpoint(self.folder / "model.pt", model)
        return ["--checkpoint", self.folder / "model.pt", "--data", self.folder / "data", "--pools",
                self.folder / "data/pool", "--threshold", 0.3, "--workers", 0]

    def run_script(self, *arguments, processes=1):
        return subprocess.run(command("pseudolabel.py", *arguments, processes=processes),
                              env=environment(), cwd=self.folder, capture_output=True, text=True)

    def files(self, folder):
        return {path.relative_to(self.folder / folder): path.read_bytes()
                for path in (self.folder / folder).rglob("*")
                if path.is_file() and path.name != ".lock"}

    def test_labels_are_thresholded_predictions(self):
        """Two processes write the very files of one;
        an interrupted folder is completed to the same bytes."""
        arguments = self.pool()
        for out, processes in (("one", 1), ("two", 2)):
            result = self.run_script(*arguments, "--out", out, processes=processes)
            self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(self.files("one"), self.files("two"))
        model, _ = swiftnet.load_checkpoint(self.folder / "model.pt")
        rows = pseudolabel.load_rows(self.folder / "one")
        self.assertEqual((rows.classes, rows.selected.all()), (data.CLASSES, True))
        self.assertEqual(rows.image, sorted(f"pool/{'ab'[i % 2]}/{i}.png" for i in range(6)))
        for i in range(6):
            image = torch.from_numpy(np.array(
                Image.open(self.folder / "data" / rows.image[i]))).permute(2, 0, 1)
            confidence, ids = swiftnet.predict(model, image).softmax(0).max(0)
            expected = torch.where(confidence >= 0.3, ids, 255).numpy()
            label = np.asarray(Image.open(self.folder / "one" / rows.label[i]))
            self.assertGreater((label == expected).mean(), 0.999)      # ties at the threshold aside
            self.assertAlmostEqual(rows.kept[i], (label != 255).mean(), places=5)
            self.assertAlmostEqual(rows.confidence[i], confidence.mean().item(), places=4)
            self.assertEqual(rows.pixels[i].tolist(), [(label == c).sum() for c in range(19)])
        before = self.files("one")
        (self.folder / "one/manifest.csv").unlink()
        (self.folder / "one" / rows.label[2]).unlink()
        (self.folder / "one" / rows.label[4]).write_bytes(b"cut short")
        cut = self.folder / "one" / rows.label[0]
        cut.write_bytes(cut.read_bytes()[:-20])
        self.assertEqual(self.run_script(*arguments, "--out", "one").returncode, 0)
        self.assertEqual(self.files("one"), before)
        # They are a training set.
        with contextlib.chdir(self.folder):
            samples = data.gather("data", ("one",), "train", True)
        self.assertEqual(len(samples), 6)

    def test_other_settings_and_bad_images(self):
        arguments = self.pool(3)
        put(self.folder / "data/pool/broken.png", picture()).write_bytes(b"no image")
        result = self.run_script(*arguments, "--out", "out")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(result.stdout, "skipped: .*broken.png cannot be read")
        self.assertIn("3 labels are there, 1 images were skipped", result.stdout)
        before = self.files("out")
        for more, words in ((["--flip"], "flip: False there, True here"),
                            (["--threshold", 0.5], "threshold: 0.3 there"),
                            (["--threshold", 7], "must lie in"),
                            (["--temperature", 0], "at least 1e-6")):
            result = self.run_script(*arguments, "--out", "out", *more)
            self.assertEqual((result.returncode, result.stderr.count("\n")), (2, 1), result.stderr)
            self.assertRegex(result.stderr, words)
        self.assertEqual(self.files("out"), before)
        for more, words in (([], "nothing to do"),
                            (["--select", 3, "--out", "out", "--threshold", 0.5],
                             "--threshold is settled in a finished folder"),
                            (["--select", 3, "--out", "out", "--min-kept", 1],
                             "no image has --min-kept 1.0"),
                            (["--select", 3, "--out", "nowhere"],
                             "nowhere/manifest.csv is missing"),
                            (["--checkpoint", "model.pt"], "belong together"),
                            (["--checkpoint", "model.pt", "--pools", "stf"],
                             "no images in pool 'stf'")):
            result = self.run_script(*more)
            self.assertEqual((result.returncode, result.stderr.count("\n")), (2, 1), result.stderr)
            self.assertRegex(result.stderr, words)

    def test_images_that_would_share_a_label(self):
        for name in ("a.png", "b.png", "b.jpg"):
            put(self.folder / "data/pool" / name, picture())
        pool = str(self.folder / "data/pool")
        with self.assertRaisesRegex(ValueError, "b.jpg and .*b.png would share one label"):
            pseudolabel.pool_samples(self.folder / "data", (pool,), "out")
        (self.folder / "data/pool/b.jpg").unlink()
        for pools in ((pool, pool), (pool, pool + "/../pool")):
            found = pseudolabel.pool_samples(self.folder / "data", pools, "out")
            self.assertEqual(len(found), 2)

    def test_pools_are_never_written_to(self):
        """A label must not take the place of an image, nor lie outside the folder of labels."""
        root, pool = self.folder / "data", self.folder / "data/pool"
        put(pool / "a.png", picture())
        put(self.folder / "elsewhere/c.png", picture()).rename(self.folder / "elsewhere/c.PNG")
        (pool / "linked").symlink_to(self.folder / "elsewhere")
        put(pool / "labels/a.png", pattern([0]))
        found = pseudolabel.pool_samples(root, (str(pool),), pool / "labels")
        self.assertEqual([os.path.relpath(s.image, pool) for s in found], ["a.png", "linked/c.PNG"])
        for out in (root, pool, self.folder / "elsewhere"):
            with self.assertRaisesRegex(ValueError, "holds other files, such as .*name a new"):
                pseudolabel.stored_thresholds(out, {})
        (pool / "linked/again").symlink_to(pool)                         # a circle of links
        self.assertEqual(len(pseudolabel.pool_samples(root, (str(pool),), pool / "labels")), 2)
        (self.folder / "alias").symlink_to(pool)
        for outside in ("alias", "elsewhere"):
            with self.assertRaisesRegex(ValueError, "is not below the data root"):
                pseudolabel.pool_samples(root, (str(self.folder / outside),), "out")

    def test_damaged_weights_write_nothing(self):
        """Logits that are not finite must not become labels, not even all-ignored ones."""
        arguments = self.pool(2)
        state = torch.load(self.folder / "model.pt", weights_only=True)
        state["model"]["head.2.bias"].fill_(math.nan)
        torch.save(state, self.folder / "model.pt")
        result = self.run_script(*arguments, "--out", "out")
        self.assertEqual((result.returncode, result.stderr.count("\n")), (2, 1), result.stderr)
        self.assertIn("are not finite", result.stderr)
        self.assertEqual(list((self.folder / "out").rglob("*.png")), [])

    def test_selection(self):
        """Worked by hand: three pools, one class that only image e carries."""
        table = (("a", "x", 0.9, 5, 0), ("b", "x", 0.8, 5, 0), ("c", "x", 0.1, 5, 5),
                 ("d", "x", 0.7, 5, 0), ("e", "y", 0.5, 5, 5), ("f", "y", 0.9, 5, 0),
                 ("g", "z", 0.05, 5, 0))
        images, pools, kept, *pixels = zip(*table)
        pseudolabel.save_rows(self.folder, pseudolabel.Rows(
            ("road", "train"), images, images, pools, np.array(kept), np.ones(7),
            np.array(pixels).T, np.ones(7, bool)))
        self.assertEqual((self.folder / "manifest.csv").read_bytes().splitlines()[:2],
                         [b"image,label,pool,kept,confidence,selected,road,train",
                          b"a,a,x,0.9,1.0,1,5,0"])
        rows = pseudolabel.load_rows(self.folder)

        def chosen():
            return "".join(image for image, here in zip(rows.image, rows.selected) if here)
        # Eligible (kept >= 0.2): a b d of x, e f of y. A budget of 3 gives 1.8 and 1.2: 2 and 1.
        self.assertEqual(pseudolabel.select(rows, 3, "rare", 0.2), {"x": 2, "y": 1, "z": 0})
        self.assertEqual(chosen(), "abe")
        pseudolabel.save_rows(self.folder, rows)
        rows = pseudolabel.load_rows(self.folder)
        self.assertEqual(chosen(), "abe")
        pseudolabel.select(rows, 3, "easiest", 0.2)
        self.assertEqual(chosen(), "abf")
        pseudolabel.select(rows, 100, "rare", 0.2)
        self.assertEqual(chosen(), "abdef")

    def test_selection_of_many_rows(self):
        """The deck's pool, 250 000 rows, read, chosen from and written by the script: at most
        10 CPU seconds and 1 GB, measured from outside."""
        random, count = np.random.default_rng(0), 250_000
        pixels = random.integers(0, 40_000, (count, 19)) * (random.random((count, 19)) < 0.5)
        images = [f"bdd100k/images/100k/train/a_long_name_of_a_drive/{i:08d}.jpg"
                  for i in range(count)]
        pools = ["ab"[i % 2] for i in range(count)]
        pseudolabel.save_rows(self.folder / "out", pseudolabel.Rows(
            data.CLASSES, images, images, pools, random.random(count).round(6),
            random.random(count).round(6), pixels, np.ones(count, bool)))
        # by a small process between, since a peak begins with that of the process that forked
        between = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
                   "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
                   "print(used.ru_utime + used.ru_stime, used.ru_maxrss)")
        arguments = command("pseudolabel.py", "--out", "out", "--select", 60_000)
        result = subprocess.run([sys.executable, "-c", between, *map(str, arguments)],
                                env=environment(), cwd=self.folder, capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("selected 60000 by rule rare: a 300", result.stdout)
        seconds, kilobytes = map(float, result.stdout.split()[-2:])
        self.assertLess(seconds, 10)
        self.assertLess(kilobytes, 1_000_000)                    # a quarter of it torch itself
        rows = pseudolabel.load_rows(self.folder / "out")
        self.assertEqual((len(rows.image), rows.selected.sum()), (count, 60_000))

    def test_damaged_manifest(self):
        head = "image,label,pool,kept,confidence,selected,road"
        for content in ("", "image,label\n", head + "\n", head + "\na,b,c,0.5,1,1\n",
                        head + "\na,b,c,much,1,1,5\n", head + "\na,b,c,1,1,1,5.5\n",
                        head + f"\na,b,c,1,1,1,{2 ** 70}\n", head + "\n\n", "\0\n"):
            (self.folder / "manifest.csv").write_text(content)
            with self.assertRaisesRegex(ValueError, "manifest.csv is no manifest of this script"):
                pseudolabel.load_rows(self.folder)

    def test_output_that_cannot_be_written(self):
        """A file in the folder's place, and a disk that is full (files end at a limit of bytes):
        one line, nothing half-written, and the same command goes on afterwards."""
        arguments = self.pool(3, 320, 200)
        (self.folder / "file").write_text("mine")
        result = self.run_script(*arguments, "--out", "file")
        self.assertEqual((result.returncode, result.stderr),
                         (2, "pseudolabel.py: --out file is a file; expected a folder\n"))
        result = self.run_script(*arguments, "--out", "file/in")
        self.assertEqual((result.returncode, result.stderr.count("\n")), (2, 1), result.stderr)
        self.assertRegex(result.stderr, "file/in cannot be written: Not a directory")
        self.assertEqual((self.folder / "file").read_text(), "mine")
        self.assertEqual(self.run_script(*arguments, "--out", "good").returncode, 0)
        good = self.files("good")
        labels = [len(content) for path, content in good.items() if path.suffix == ".png"]
        settings = len(good[Path("settings.json")])
        self.assertLess(settings, min(labels))                       # so that a limit fits between
        for limit, left in ((settings - 1, set()), (settings, {Path("settings.json")}),
                            (max(labels) - 1, None)):
            result = subprocess.run(
                command("pseudolabel.py", *arguments, "--out", "full"), env=environment(),
                cwd=self.folder, capture_output=True, text=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            self.assertEqual((result.returncode, result.stderr.count("\n")), (2, 1), result.stderr)
            self.assertRegex(result.stderr, "full/.* cannot be written: File too large; the same "
                                            "command goes on once it can")
            found = self.files("full")
            self.assertTrue(left is None or set(found) == left, found.keys())
            self.assertNotIn(Path("manifest.csv"), found)
            self.assertTrue(found.items() <= good.items(), found.keys())     # all of them whole
        self.assertEqual(self.run_script(*arguments, "--out", "full").returncode, 0)
        self.assertEqual(self.files("full"), good)

    def test_classes_of_the_checkpoint(self):
        """Eleven classes label CamVid's pool, not one of the 19, and the labels say so."""
        Fixtures.camvid(self.folder / "data")
        Fixtures.pools(self.folder / "data")
        write_checkpoint(self.folder / "camvid.pt", swiftnet.build("convnext_atto", 11, width=16),
                         classes=data.CAMVID_CLASSES)
        arguments = ["--checkpoint", "camvid.pt", "--threshold", 0, "--workers", 0, "--out", "v1"]
        result = self.run_script(*arguments, "--pools", "stf")
        self.assertEqual((result.returncode, result.stderr.count("\n")), (2, 1), result.stderr)
        self.assertRegex(result.stderr, r"--pools stf: 19 classes \(road, ...\), but camvid.pt "
                                        r"knows 11 \(sky, ...\)")
        self.assertFalse((self.folder / "v1").exists())
        result = self.run_script(*arguments, "--pools", "camvid_dusk")
        self.assertEqual(result.returncode, 0, result.stderr)
        with contextlib.chdir(self.folder):
            self.assertEqual(data.classes_of("data", "v1"), data.CAMVID_CLASSES)
            self.assertEqual(pseudolabel.load_rows("v1").classes, data.CAMVID_CLASSES)
            sample, = data.gather("data", ("v1",), "train", True)
            _, ids, _ = data.read_sample(sample, 11)
            self.assertLess(ids.max(), 11)                           # --threshold 0 keeps all

    def test_class_thresholds(self):
        """Against sorting: every class that the global threshold would starve keeps the wanted
        share."""
        logits = torch.randn(4, 50, 60, generator=torch.Generator().manual_seed(0))
        config = pseudolabel.Config(threshold=0.9, class_share=0.3)
        with mock.patch.object(pseudolabel, "predictions", return_value=[(None, logits)]):
            thresholds = pseudolabel.class_thresholds(None, [None], config, 4, torch.device("cpu"),
                                                      0, 1)
        confidence, ids = logits.softmax(0).max(0)
        for c in range(4):
            wanted = confidence[ids == c].sort(descending=True).values
            exact = min(0.9, wanted[math.ceil(0.3 * len(wanted)) - 1].item())
            self.assertAlmostEqual(thresholds[c].item(), exact, delta=1 / 2000)
            self.assertGreaterEqual((wanted >= thresholds[c]).float().mean().item(), 0.3)


# --- evaluate.py as a script --------------------------------------------------------------------

def brute_budget(logits, labels, invalid, temperature, thetas):
    """(class UIoU, share lost to false invalids, to missed invalids, oracle), each (C,) means over
    thetas, pixel by pixel: loops over classes and thresholds, one image of everything."""
    classes = logits.shape[1]
    q, y = torch.softmax(logits.double() / temperature, 1).max(1)
    q = q.float()
    known = labels != 255

    def uiou(c, marked):
        tp = (known & (labels == c) & (y == c) & ~marked).sum().item()
        fp = (known & (labels != c) & (y == c) & ~marked).sum().item()
        fn = (known & (labels == c) & (y != c) & ~marked).sum().item()
        ti = (known & (labels == c) & (invalid == 1) & marked).sum().item()
        fi = (known & (labels == c) & (invalid == 0) & marked).sum().item()
        return (tp + ti) / (tp + ti + fp + fn + fi) if tp + ti + fp + fn + fi else 0.0

    should = (y != labels) | (invalid == 1)
    rows = []
    for c in range(classes):
        own, false, missed = [], [], []
        for theta in thetas:
            marked = q < theta
            n = (known & (labels == c)).sum().item()
            own.append(uiou(c, marked))
            false.append((known & (labels == c) & (y == c) & (invalid == 0) & marked).sum().item()
                         / max(n, 1))
            missed.append(uiou(c, marked | should) - own[-1])       # the missed ones marked as well
        rows.append((np.mean(own), np.mean(false), np.mean(missed), uiou(c, should)))
    return np.array(rows).T


class BudgetTest(unittest.TestCase):
    def scene(self, seed=0, classes=6):
        """Class 5 is nowhere, class 4 is predicted but never true, image 1 is all ignored,
        image 2 of one class."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 4, (4, 11, 13), generator=generator)
        logits = 1.5 * torch.randn(4, classes, 11, 13, generator=generator)
        logits += (3 * F.one_hot(labels, classes).permute(0, 3, 1, 2)
                   * torch.rand(4, 1, 11, 13, generator=generator))
        logits[:, 5] -= 50
        logits[0, 2, :3] += 500                                     # confidence exactly 1
        logits[3, :, :2] = 0                                        # and exactly 1/C
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
        labels[1], labels[2] = 255, 3
        return logits, labels, torch.rand(labels.shape, generator=generator) < 0.3

    def test_brute_force(self):
        logits, labels, invalid = self.scene()
        for temperature in (0.3, 1.0, 2.5):
            metrics = evaluate.Metrics(6, temperature, thresholds=19)
            metrics.update(logits, labels, invalid)
            result, budget = metrics.compute(), evaluate.budget(metrics)
            own, false, missed, oracle = brute_budget(logits, labels, invalid, temperature,
                                                      result["thresholds"])
            expected = {"auiou": own, "false_invalid": false, "missed_invalid": missed,
                        "oracle": oracle}
            self.assertEqual(result["classes"], 5)
            for name, values in expected.items():
                np.testing.assert_allclose(budget["class_" + name][:5].numpy(), values[:5], rtol=0,
                                           atol=1e-12, err_msg=name)
                self.assertTrue(budget["class_" + name][5].isnan())
                self.assertAlmostEqual(budget[name], values[:5].mean(), places=12)
            self.assertEqual(budget["class_oracle"][4].item(), 0)   # predicted, never true
            miou, uiou, ece, _ = brute_metrics(logits, labels, invalid, temperature,
                                               result["thresholds"])
            self.assertAlmostEqual(result["auiou"], np.mean(uiou), places=12)
            self.assertAlmostEqual(result["miou"], miou, places=12)
            self.assertAlmostEqual(result["ece"], ece, places=6)

    def test_identity(self):
        """oracle = AUIoU + what false invalids cost + what missed ones cost,
        all of them >= 0, class by class."""
        for seed in range(3):
            metrics = evaluate.Metrics(6, 0.8)
            metrics.update(*self.scene(seed))
            budget = evaluate.budget(metrics)
            parts = [budget["class_" + name][:5]
                     for name in ("auiou", "false_invalid", "missed_invalid", "oracle")]
            self.assertGreaterEqual(min(part.min().item() for part in parts), -1e-12)
            np.testing.assert_allclose(sum(parts[:3]).numpy(), parts[3].numpy(), rtol=0, atol=1e-12)
            self.assertAlmostEqual(budget["auiou"], metrics.compute()["auiou"], places=12)

    def test_by_hand(self):
        """The worked example of Metrics: pixel 1 right, 2 wrong and invalid, 3 right;
        theta in [.5, 1]."""
        metrics = evaluate.Metrics(2)
        metrics.update(logits_of(torch.tensor([[[.9, .6], [.7, .8]]]),
                                 torch.tensor([[[0, 1], [1, 0]]]), 2),
                       torch.tensor([[[0, 0], [1, 255]]]), torch.tensor([[[0, 1], [0, 0]]]))
        budget = evaluate.budget(metrics)
        self.assertEqual(budget["oracle"], 1)                   # 2 is marked: TI; 1 and 3 are right
        # False: class 0 loses 1 of 2 pixels above .9 (a fifth of the range),
        # class 1 its only one above .7.
        np.testing.assert_allclose(budget["class_false_invalid"], [.1, .6], atol=2e-3)
        # Missed below .6: class 0 has its wrong pixel unmarked, 1/2; class 1 a false positive, 1/2.
        np.testing.assert_allclose(budget["class_missed_invalid"], [.1, .1], atol=2e-3)

    def test_nothing_labelled(self):
        metrics = evaluate.Metrics(3)
        metrics.update(torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 255), torch.ones(1, 4, 4))
        self.assertTrue(math.isnan(evaluate.budget(metrics)["oracle"]))

    def test_reliability(self):
        logits, labels, invalid = self.scene()
        metrics = evaluate.Metrics(6, 1.3)
        metrics.update(logits, labels, invalid)
        pixels, accuracy, confidence = metrics.compute()["reliability"]
        q, y = torch.softmax(logits.double() / 1.3, 1).max(1)
        q = q.float().double()
        self.assertEqual(pixels.sum().item(), (labels != 255).sum().item())
        for b in range(15):
            chosen = (labels != 255) & (q > np.float32(b / 15)) & (q <= np.float32((b + 1) / 15))
            self.assertEqual(pixels[b].item(), chosen.sum().item())
            if chosen.any():
                self.assertAlmostEqual(accuracy[b].item(),
                                       (y == labels)[chosen].double().mean().item(), places=12)
                self.assertAlmostEqual(confidence[b].item(), q[chosen].mean().item(), places=6)
            else:
                self.assertTrue(accuracy[b].isnan())

    def test_confidence_on_edges(self):
        """A grid whose thresholds are the very edges of the ECE: q < theta is strict,
        bins are (lo, hi]."""
        metrics = evaluate.Metrics(2, thresholds=16)            # 1/2, 1/2 + 1/30, ...: 8/15, ..., 1
        thetas = metrics.thresholds
        edges = [float(np.float32(b / 15)) for b in range(8, 16)]
        q = torch.tensor(sorted({*thetas.tolist(), *edges}))
        pixels = evaluate.Pixels(torch.zeros(len(q), dtype=torch.int64), torch.zeros(len(q)), None,
                                 2, lambda temperature: q)
        metrics.add(pixels)
        result = metrics.compute()
        self.assertEqual(result["uiou"].tolist(),
                         [(q >= theta).sum().item() / len(q) for theta in thetas])
        for b in range(15):
            inside = (q > np.float32(b / 15)) & (q <= np.float32((b + 1) / 15))
            self.assertEqual(result["reliability"][0, b].item(), inside.sum().item())


class TemperatureTest(Temporary):
    def test_sweep(self):
        """Temperatures from 1/4 to 4, evenly in their logarithm, 1 in the middle."""
        np.testing.assert_allclose(np.diff(np.log(evaluate.SWEEP)), np.log(16) / 32, rtol=2e-2)
        self.assertEqual([evaluate.SWEEP[i] for i in (0, 16, -1)], [0.25, 1.0, 4.0])

    def test_halves(self):
        samples = [data.Sample(f"{c}{i}", None, None, None, "x", c)
                   for c, n in (("fog", 5), ("night", 2), ("rain", 1))
                   for i in range(n)]
        choosing, reporting = evaluate.split_halves(samples)
        self.assertEqual([s.image for s in choosing], ["fog1", "fog3", "night1"])
        self.assertEqual([s.image for s in reporting], ["fog0", "fog2", "fog4", "night0", "rain0"])
        with self.assertRaisesRegex(ValueError, "two images of a condition"):
            evaluate.split_halves(samples[-1:])

    def test_fit_finds_the_temperature(self):
        """Labels drawn from softmax(logits / 2.5), and the NLL on a fine grid as the slow form."""
        generator = torch.Generator().manual_seed(0)
        logits = 4 * torch.randn(5, 20000, generator=generator)
        truth = torch.multinomial(torch.softmax(logits.T / 2.5, 1), 1, generator=generator)[:, 0]
        found = evaluate.fit_temperature(logits, truth)
        self.assertAlmostEqual(found, 2.5, delta=0.1)
        grid = np.linspace(2, 3, 1001)
        loss = [F.cross_entropy(logits.T.double() / t, truth).item() for t in grid]
        self.assertAlmostEqual(found, grid[np.argmin(loss)], delta=0.0015)
        for wanted in (0.06, 0.08, 12.0):                    # near the ends of its range
            weak = logits / (80 if wanted < 1 else 1)
            truth = torch.multinomial(torch.softmax(weak.T / wanted, 1), 1,
                                      generator=generator)[:, 0]
            self.assertAlmostEqual(evaluate.fit_temperature(weak, truth) / wanted, 1, delta=0.1)
        # no minimum: all right
        self.assertTrue(0.05 <= evaluate.fit_temperature(10 * F.one_hot(truth, 5).T, truth) < 0.5)
        with self.assertRaisesRegex(ValueError, "no labelled pixel"):
            evaluate.fit_temperature(torch.zeros(5, 0), torch.zeros(0, dtype=torch.int64))

    def test_choice(self):
        """best is the best of the sweep by Metrics of each T; fit sees a bounded,
        fixed subset of labelled pixels."""
        logits, labels, invalid = BudgetTest().scene()
        logits = logits.clamp(-4, 4)                           # so that the fit is inside its range
        stream = [(i, *parts) for i, parts in enumerate(zip(logits, labels, invalid))]
        with mock.patch.object(evaluate, "FIT_PER_IMAGE", 50):
            chosen, curve = evaluate.choose_temperatures({"fit", "best"}, stream, 4, 6,
                                                         torch.device("cpu"), 30)
        self.assertEqual(len(curve), 33)
        for temperature, auiou in curve:
            metrics = evaluate.Metrics(6, temperature, 30)
            metrics.update(logits, labels, invalid)
            self.assertEqual(metrics.compute()["auiou"], auiou)
        self.assertEqual(chosen["best"], max(curve, key=lambda point: point[1])[0])
        taken = [(logits[i].flatten(1)[:, at], labels[i].flatten()[at]) for i in range(4)
                 for known in [(labels[i].flatten() != 255).nonzero()[:, 0]]
                 for at in [known[::max(1, math.ceil(len(known) / 50))]]]
        self.assertLessEqual(max(len(truth) for _, truth in taken), 50)
        self.assertTrue(0.1 < chosen["fit"] < 10)
        self.assertEqual(chosen["fit"],
                         evaluate.fit_temperature(torch.cat([t[0] for t in taken], 1),
                                                  torch.cat([t[1] for t in taken])))

    def test_plain(self):
        value = {"a": torch.tensor([1.0, math.nan]), "b": (2, [math.nan]),
                 "class_uiou": torch.zeros(3)}
        self.assertEqual(evaluate.plain(value), {"a": [1.0, None], "b": [2, [None]]})

    def test_benchmark(self):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), \
                mock.patch.object(evaluate, "build", lambda name: tiny_model(19)):
            evaluate.benchmark(torch.device("cpu"), "auto", 80, 120, repeats=1)
        self.assertRegex(out.getvalue(), r"ConvNeXt-T forward: [\d.]+ ms\n"
                         r"(metrics at +\d+ temperatures: .*% of it\n){3}$")


class EvaluateScriptTest(Temporary):
    """evaluate.py on a small demo: tables, JSON, pictures, files, submissions, scoring."""

    @classmethod
    def setUpClass(cls):
        cls.demo = tempfile.mkdtemp(prefix="swiftnet-")
        cls.addClassCleanup(shutil.rmtree, cls.demo, ignore_errors=True)
        root = Path(cls.demo) / "demo"
        with contextlib.redirect_stdout(io.StringIO()):
            data.draw_demo(root, scale=0.05)                         # two images of every condition
        torch.manual_seed(0)
        model = swiftnet.build("convnext_atto", width=16, layer_scale=1.0)
        for module in model.modules():                           # logits that differ between pixels
            if isinstance(module, torch.nn.Conv2d):
                module.weight.data *= 2.5
        write_checkpoint(Path(cls.demo) / "best.pt", model, step=7,
                         config={"data": str(root), "val": ("acdc",)})
        cls.arguments = ("--checkpoint", Path(cls.demo) / "best.pt", "--workers", 0)

    def run_script(self, *arguments):
        """Standard output of evaluate.py, run inside this process in the empty folder."""
        out = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out), \
                mock.patch.object(sys, "argv", ["evaluate.py", *map(str, arguments)]):
            evaluate.main()
        return out.getvalue()

    def run_processes(self, processes, *arguments):
        result = subprocess.run(command("evaluate.py", *self.arguments, *arguments,
                                        processes=processes), cwd=self.folder,
                                env=environment(), capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr[-3000:])
        return result.stdout

    def fails(self, words, *arguments):
        with self.assertRaisesRegex((ValueError, OSError), words):
            self.run_script(*arguments)

    def in_memory(self, val="acdc", temperature=1.0):
        root = Path(self.demo) / "demo"
        models, _ = evaluate.load_ensemble([Path(self.demo) / "best.pt"], "cpu")
        samples = data.gather(root, (val,), "val", True)
        with contextlib.redirect_stdout(io.StringIO()):
            return evaluate.evaluate(models, samples, 19, torch.device("cpu"),
                                     (temperature,))["all"][0].compute()

    def test_every_image_goes_through_once_and_numbers_are_those_of_evaluate(self):
        forwards = []

        def counted(models, image, **how):
            forwards.append(image.sum().item())
            return swiftnet.predict(models, image, **how)
        with mock.patch.object(evaluate, "predict", counted):
            text = self.run_script(*self.arguments, "--temperature", 0.67, "fit", "best", 1,
                                   "--json", "n.json")
        self.assertEqual((len(forwards), len(set(forwards))), (8, 8))
        self.assertIn("best and fit on 4 images, every second one of each condition; all tables "
                      "are of the other 4", text)
        numbers = json.loads((self.folder / "n.json").read_text())
        self.assertEqual([t["how"] for t in numbers["temperatures"]],
                         ["given", "fit", "best", "given"])
        self.assertEqual(len(numbers["grid"]), 1000)
        self.assertEqual(set(numbers["temperatures"][0]["conditions"]),
                         {"all", "fog", "night", "rain", "snow"})
        chosen = numbers["choice"]["chosen"]
        self.assertEqual([t["temperature"] for t in numbers["temperatures"]],
                         [0.67, chosen["fit"], chosen["best"], 1])
        reporting = evaluate.split_halves(
            data.gather(Path(self.demo) / "demo", ("acdc",), "val", True))[1]
        models, _ = evaluate.load_ensemble([Path(self.demo) / "best.pt"], "cpu")
        with contextlib.redirect_stdout(io.StringIO()):
            metrics = evaluate.evaluate(models, reporting, 19, torch.device("cpu"), (0.67,))
        for condition, (m,) in metrics.items():
            told = numbers["temperatures"][0]["conditions"][condition]
            expected = {**evaluate.budget(m), **m.compute()}
            for name in ("miou", "auiou", "ece", "ece_valid", "oracle", "false_invalid",
                         "missed_invalid"):
                self.assertEqual(told[name], expected[name], name)
            self.assertEqual(told["class_missed_invalid"],
                             evaluate.plain(expected["class_missed_invalid"]))
        row = numbers["temperatures"][0]["conditions"]["night"]
        self.assertRegex(text, rf"\nnight +1 +\d+ +{100 * row['miou']:.2f} "
                         rf"+{100 * row['auiou']:.2f} +{row['ece']:.4f} ")
        c = data.CLASSES.index("car")                       # the cell of one class in one condition
        cell = (f"{100 * row['class_false_invalid'][c]:.2f} / "
                f"*{100 * row['class_missed_invalid'][c]:.2f}")
        self.assertRegex(text.split("AUIoU lost")[1], rf"\ncar +(\S+ / *\S+ +){{2}}{cell} ")

    def test_two_processes_write_the_same(self):
        for world in (1, 2):
            self.run_processes(world, "--temperature", 0.67, "fit", "best", "--json",
                               f"{world}/n.json", "--plots", f"{world}/plots",
                               "--panels", 1, "--panels-worst", "--out", f"{world}/panels",
                               "--precision", "fp32")
            self.run_processes(world, "--submit", "acdc", f"{world}/acdc.zip", "--split", "val")
        files = [sorted(path.relative_to(self.folder / str(world))
                        for path in (self.folder / str(world)).rglob("*")
                        if path.is_file()) for world in (1, 2)]
        self.assertEqual(files[0], files[1])
        self.assertEqual(len(files[0]), 1 + 5 + 4 + 1)               # numbers, plots, sheets, zip
        for path in files[0]:
            self.assertEqual((self.folder / "1" / path).read_bytes(),
                             (self.folder / "2" / path).read_bytes(), path)

    def test_plots_and_panels(self):
        self.run_script(*self.arguments, "--temperature", 0.67, 1, "--plots", "plots", "--panels",
                        1, "--out", "panels")
        for condition in ("all", "fog", "night", "rain", "snow"):
            with Image.open(self.folder / f"plots/{condition}.png") as image:
                self.assertEqual(image.width, 1600)
                colours = {colour for _, colour in image.getcolors(2 ** 20)}
                self.assertTrue({*evaluate.COLOURS[:2], evaluate.INK, evaluate.GREY} <= colours)
        sheets = sorted(path.name for path in (self.folder / "panels").iterdir())
        self.assertEqual(sheets, [f"{c}-01-GP{k}10001_frame_000002_rgb_anon.png"
                                  for k, c in enumerate(("fog", "night", "rain", "snow"))])

    def test_plot_of_a_perfect_prediction(self):
        metrics = evaluate.Metrics(3, 0.1)
        labels = torch.arange(3).repeat(4, 5)[None]
        metrics.update(100.0 * F.one_hot(labels, 3).permute(0, 3, 1, 2), labels)
        row = {**evaluate.budget(metrics), **metrics.compute()}
        self.assertEqual(row["auiou"], 1)
        self.assertEqual(evaluate.plot("x", [row], [(0.1, "given")]).width, 1600)

    def test_sets_without_conditions_count_in_the_total(self):
        """Their condition is called "all", which must not stand for all sets."""
        samples = [data.Sample(name, None, None, None, "x", condition)
                   for name, condition in (("a", "fog"), ("b", "all"), ("c", "all"))]
        labels = torch.zeros(2, 2, dtype=torch.int64)
        stream = [(i, evaluate.Pixels.of(torch.tensor([1.0, 0.0]).view(2, 1, 1).expand(2, 2, 2),
                                         labels)) for i in range(3)]
        results = evaluate.pool(stream, samples, 2, "cpu")
        counts = evaluate.count_conditions(samples)
        self.assertEqual((list(results), counts), (["all", "fog"], {"all": 3, "fog": 1}))
        self.assertEqual([group[0].compute()["pixels"] for group in results.values()], [12, 4])

    def test_sheet(self):
        """Cells show what they say: invalid black, withheld pixels black."""
        root = Path(self.demo) / "demo"
        sample = data.gather(root, ("acdc",), "val", True)[0]
        image, ids, invalid = data.read_sample(sample, 19)
        height, width = ids.shape
        prediction = torch.from_numpy(np.where(ids == 255, 0, ids)).flatten()
        level = torch.zeros(height, width, dtype=torch.uint8)
        level[:, width // 3:], level[:, 2 * width // 3:] = 1, 2
        picture = np.array(evaluate.sheet(sample, data.CLASSES, 0.5, prediction, level.flatten(),
                                          1.0, width=width))

        def cell(column, row):
            x, y = 16 + column * (width + 16), 60 + row * (height + 44) + 44
            return picture[y + 1:y + height - 1, x + 1:x + width - 1]
        inner = slice(1, -1), slice(1, -1)
        np.testing.assert_array_equal(cell(0, 0), image.transpose(1, 2, 0)[inner])
        np.testing.assert_array_equal(cell(1, 0), np.array(data.colour(ids))[inner])
        np.testing.assert_array_equal(cell(2, 0)[..., 0], np.where(invalid, 0, 255)[inner])
        colours = np.array(data.colour(prediction.view(height, width)))[inner]
        np.testing.assert_array_equal(cell(0, 1), colours)
        for column in (1, 2):
            shown = cell(column, 1)
            cut = column * width // 3 - 1
            self.assertEqual(shown[:, :cut].max(), 0)
            np.testing.assert_array_equal(shown[:, cut + 1:], colours[:, cut + 1:])

    def test_worst_sheets(self):
        samples = [data.Sample(f"{i}.png", None, None, None, "x", "fog") for i in range(5)]
        labels = torch.zeros(4, 4, dtype=torch.int64)
        for worst, expected in ((True, [3, 1]), (False, [1, 3])):
            panels = evaluate.Panels(samples, 2, worst, 1.0, ("a", "b"))
            for i, wrong in enumerate((0, 8, 2, 16, 4)):
                logits = torch.zeros(2, 16)
                logits[0], logits[1, :wrong] = 1, 2
                panels(i, evaluate.Pixels.of(logits.view(2, 4, 4), labels))
            self.assertEqual([item[1] for item in panels.kept["fog"]], expected)

    def test_images(self):
        folder = self.folder / "photos"
        put(folder / "a.png", picture(0, 200, 100))
        put(folder / "deep/er/b.jpg", picture(1, 90, 130))
        put(folder / "deep/c.JPEG", picture(2, 33, 17))
        (folder / "notes.txt").write_text("no image")
        arguments = (*self.arguments, "--images", folder, "--out", folder / "out", "--temperature",
                     0.67)
        self.run_script(*arguments)
        written = {str(path.relative_to(folder / "out")): path.stat().st_mtime_ns
                   for path in (folder / "out").rglob("*.png")}
        self.assertEqual(set(written), {f"{kind}/{name}.png"
                                        for kind in ("labelTrainIds", "confidence", "overlay")
                                        for name in ("a", "deep/er/b", "deep/c")})
        model, _ = swiftnet.load_checkpoint(Path(self.demo) / "best.pt")
        image, _ = data.read_image(folder / "deep/er/b.jpg")
        logits = swiftnet.predict(model, torch.from_numpy(np.array(image)).permute(2, 0, 1))
        q, y = torch.softmax(logits / 0.67, 0).max(0)
        with Image.open(folder / "out/labelTrainIds/deep/er/b.png") as ids, \
                Image.open(folder / "out/confidence/deep/er/b.png") as c:
            self.assertEqual((ids.mode, ids.size), ("L", (90, 130)))
            np.testing.assert_array_equal(np.array(ids), y.numpy())
            self.assertIn(c.mode, ("I;16", "I"))
            np.testing.assert_allclose(np.array(c) / 65535, q.numpy(), atol=1e-5)
        (folder / "out/confidence/a.png").unlink()       # an interrupted run: a alone is made again
        self.run_script(*arguments)
        again = {str(path.relative_to(folder / "out")): path.stat().st_mtime_ns
                 for path in (folder / "out").rglob("*.png")}
        self.assertEqual({name for name in again if again[name] != written[name]},
                         {f"{kind}/a.png" for kind in ("labelTrainIds", "confidence", "overlay")})
        self.fails("other settings", *arguments[:-1], 1.0)
        put(folder / "a.jpg", picture(3))
        self.fails("two images would be written as a.png", *arguments)
        self.fails("no such folder, or no .png", *self.arguments, "--images",
                   self.folder / "nowhere")

    def test_submissions(self):
        root = Path(self.demo) / "demo"
        self.fails("expects 2000 test images, found 8", *self.arguments, "--submit", "acdc",
                   "a.zip")
        self.fails("knows acdc, cityscapes, darkzurich", *self.arguments, "--submit", "kitti",
                   "a.zip")
        self.assertEqual(list(self.folder.iterdir()), [])
        for kind, images, inside in (("acdc", 8, ("labelTrainIds/",)), ("cityscapes", 2, ("",)),
                                     ("darkzurich", 2,
                                      ("labelTrainIds/", "confidence/", "labelTrainIds_invalid/"))):
            self.run_script(*self.arguments, "--submit", kind, f"{kind}.zip", "--split", "val",
                            "--theta", 0.3)
            samples = data.gather(root, (evaluate.SUBMISSIONS[kind][0],), "val", True)
            with zipfile.ZipFile(self.folder / f"{kind}.zip") as archive:
                self.assertEqual(sorted(archive.namelist()),
                                 sorted(f"{folder}{Path(s.image).stem}.png" for folder in inside
                                        for s in samples))
                self.assertEqual(len(samples), images)
                archive.extractall(self.folder / kind)
            self.assertFalse((self.folder / f"{kind}.zip.parts").exists())
        model, _ = swiftnet.load_checkpoint(Path(self.demo) / "best.pt")
        for kind, where, val in (("acdc", "labelTrainIds", "acdc"),
                                 ("cityscapes", "", "cityscapes")):
            sample = data.gather(root, (val,), "val", True)[0]
            y = swiftnet.predict(model,
                                 torch.tensor(data.read_sample(sample, 19)[0])).argmax(0).numpy()
            with Image.open(self.folder / kind / where / f"{Path(sample.image).stem}.png") as image:
                self.assertEqual(image.mode, "L")
                values = np.array(image)
            if kind == "cityscapes":
                values = np.array(data.CITYSCAPES_TABLE)[values]
            np.testing.assert_array_equal(values, y)
        one = next((self.folder / "darkzurich/confidence").iterdir()).name
        ids, c, marked = (np.array(Image.open(self.folder / "darkzurich" / folder / one))
                          for folder in ("labelTrainIds", "confidence", "labelTrainIds_invalid"))
        self.assertTrue(((marked == 255) | (marked == ids)).all())
        clear = abs(c / 65535 - 0.3) > 1e-4
        np.testing.assert_array_equal((marked == 255)[clear], (c / 65535 < 0.3)[clear])

    def test_submission_is_checked(self):
        parts, good = self.folder / "parts", pattern(range(19))
        put(parts / "labelTrainIds/a.png", good)
        folders = ("labelTrainIds",)
        evaluate.check_parts(parts, folders, "a.png", good.shape)
        for values, words in ((pattern([19]), "such as 19"), (pattern([255]), "such as 255"),
                              (pattern([0], 20), "it is 20x16, expected 24x16"),
                              (good.astype(np.uint16), "mode I;16, expected L")):
            put(parts / "labelTrainIds/a.png", values)
            with self.assertRaisesRegex(ValueError, words):
                evaluate.check_parts(parts, folders, "a.png", good.shape)
        put(parts / "labelIds/a.png", pattern([7, 9]))
        put(parts / "confidence/a.png", good)
        for folder, words in (("labelIds", "such as 9"), ("confidence", "mode L, expected I;16")):
            with self.assertRaisesRegex(ValueError, words):
                evaluate.check_parts(parts, (folder,), "a.png", good.shape)
        with self.assertRaises(FileNotFoundError):
            evaluate.check_parts(parts, folders, "b.png", good.shape)
        Fixtures.acdc(self.folder)                                   # one name in all conditions
        with self.assertRaisesRegex(ValueError, "two val images of acdc would be "
                                    "GOPR0475_frame_000041_rgb_anon.png"):
            evaluate.submission_samples("acdc", self.folder, "val")
        for i in range(1525):
            path = self.folder / f"cityscapes/leftImg8bit/test/x/x_{i:06d}_000000_leftImg8bit.png"
            (put(path, picture(0, 8, 4)) if i == 0
             else path.symlink_to("x_000000_000000_leftImg8bit.png"))
        with self.assertRaisesRegex(ValueError, "it is 8x4, expected 2048x1024"):
            evaluate.submission_samples("cityscapes", self.folder, "test")

    def test_score(self):
        """What was written scores as what was in memory: mIoU exactly,
        AUIoU and ECE to the 16 bits of the files."""
        root = Path(self.demo) / "demo"
        self.run_script(*self.arguments, "--submit", "darkzurich", "d.zip", "--split", "val",
                        "--temperature", 0.67)
        self.run_script(*self.arguments, "--submit", "cityscapes", "c.zip", "--split", "val")
        self.run_script(*self.arguments, "--images", root / "acdc/rgb_anon", "--out", "acdc",
                        "--temperature", 1.5)
        for name in ("d", "c"):
            with zipfile.ZipFile(self.folder / f"{name}.zip") as archive:
                archive.extractall(self.folder / name)
        for folder, val, temperature, more in (("d", "dark_zurich", 0.67, ()),
                                               ("acdc", "acdc", 1.5, ()),
                                               ("c", "cityscapes", 1.0, ("--label-ids",))):
            text = self.run_script("--score", folder, "--data", root, "--val", val, "--json",
                                   "n.json", *more)
            told = json.loads((self.folder / "n.json").read_text())[
                "temperatures"][0]["conditions"]["all"]
            expected = self.in_memory(val, temperature)
            self.assertEqual(told["confusion"], expected["confusion"].tolist())
            self.assertEqual(told["miou"], expected["miou"])
            if folder == "c":
                self.assertIsNone(told["auiou"])
                self.assertIn("mIoU only", text)
            else:
                for name in ("auiou", "ece", "ece_valid"):
                    self.assertAlmostEqual(told[name], expected[name], delta=1e-4)
        self.run_script("--score", "acdc", "--data", root, "--val", "acdc", "--panels", 1, "--out",
                        "sheets", "--plots", "plots")
        self.assertEqual((len(list((self.folder / "sheets").iterdir())),
                          len(list((self.folder / "plots").iterdir()))), (4, 5))
        for path in (self.folder / "acdc/labelTrainIds").iterdir():      # the flat layout
            path.rename(self.folder / "acdc" / path.name)
        for name in ("labelTrainIds", "overlay"):
            shutil.rmtree(self.folder / "acdc" / name)
        flat = self.run_script("--score", "acdc", "--data", root, "--val", "acdc")
        self.assertIn("confidence as stored", flat)
        self.fails("--score takes the confidence as it is stored", "--score", "acdc", "--val",
                   "acdc", "--temperature", 2)
        self.fails("name no class on .* --label-ids", "--score", "c", "--data", root, "--val",
                   "cityscapes")
        self.fails("lacks 2 of 2 predictions, first .*expected PNGs named like", "--score", "d",
                   "--data", root, "--val", "cityscapes")
        some = next((self.folder / "d/labelTrainIds").iterdir())
        put(self.folder / "d/labelTrainIds/deeper" / some.name, pattern([0]))
        self.fails("stands for two images or files", "--score", "d", "--data", root, "--val",
                   "dark_zurich")

    def test_mistakes(self):
        for words, arguments in (
                ("--images and --score exclude each other", ["--images", "x", "--score", "y"]),
                ("--temperature fit and best need logits",
                 ["--images", "x", "--temperature", "fit"]),
                ("--plots needs labelled images; --images has none",
                 ["--images", "x", "--plots", "y"]),
                ("--panels takes the number", ["--panels-worst"]),
                ("--score needs the set", ["--score", "x"]),
                ("invalid temperature value: 'warm'", ["--temperature", "warm"]),
                ("expected 2 arguments", ["--submit", "acdc"])):
            self.fails(words, *arguments)

    def test_logits_that_are_not_finite(self):
        with mock.patch.object(
                evaluate, "predict",
                lambda models, image, **how: torch.full((19, *image.shape[1:]), math.nan)):
            self.fails("logits of .*png are not finite", *self.arguments)


# --- mistakes of users --------------------------------------------------------------------------

class Refusals(Temporary):
    """One line that says what was found and what to do, exit status 2,
    nothing written is touched."""

    def fails(self, script, arguments, words):
        before = self.contents()
        out, err = io.StringIO(), io.StringIO()
        name = Path(script.__file__).name
        with contextlib.chdir(self.folder), \
                mock.patch.object(sys, "argv", [name, *map(str, arguments)]), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
                self.assertRaises(SystemExit) as stop:
            data.run_main(script.main)
        message = err.getvalue()
        self.assertEqual(stop.exception.code, 2, message)
        self.assertEqual(message.count("\n"), 1, message)
        self.assertTrue(message.startswith(f"{name}: "), message)
        self.assertRegex(message, words)
        after = self.contents()
        self.assertTrue(all(after.get(path) == content for path, content in before.items()))
        self.assertEqual([*self.folder.rglob(".*.tmp")], [])

    def contents(self):
        return {path: (path.stat().st_mtime_ns, path.read_bytes())
                for path in sorted(self.folder.rglob("*"))
                if path.is_file() and path.name != ".lock"}


class MistakeTest(Refusals):
    def setUp(self):
        super().setUp()
        Fixtures.custom(self.folder / "data", images=4, size=(80, 60))
        self.scratch = ("--recipe", "camvid", "--train", "custom", "--val", "custom", "--crop", 160,
                        "--batch", 2, "--steps", 1, "--width", 16)

    def test_flags(self):
        for script, arguments, words in (
                (train, ["--recipe", "nonsense"], "invalid choice: 'nonsense'.*--help"),
                (train, ["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
                (train, ["--lr", "fast"], "invalid float value: 'fast'"),
                (train, ["--batch", 0], "--batch must be at least 1, found 0"),
                (train, ["--steps", -1], "--steps must not be negative"),
                (train, ["--zoom", 2], "--zoom takes two numbers"),
                (train, ["--zoom", 0.5, "inf"], "--zoom must be a finite number, found inf"),
                (train, ["--layer-scale", "nan"], "--layer-scale must be a finite number"),
                (train, ["--crop", 100_000_000], "--crop must be at most 8192"),
                (train, ["--seed", 10 ** 15], "--seed must be at most 1000000"),
                (train, ["--train", "camvid"],
                 "no train images of camvid|neither acdc nor cityscapes"),
                (evaluate, ["--scales", "inf"], "--scales must be a finite number"),
                (train, ["--zoom", 2, 1], "--zoom takes two numbers"),
                (train, ["--crop", 128], "not above the coarsest stride, 128"),
                (train, ["--demo", "--recipe", "camvid"], "exclude each other"),
                (train, ["--drop-path", 1], "0 <= --drop-path < 1"),
                (train, ["--resume", "runs/nowhere"], "there is no runs/nowhere/last.pt"),
                (train, ["--compil"], "unrecognized arguments"),
                (evaluate, ["--temperature", 0], "at least 1e-6"),
                (evaluate, ["--temperature", "warm"], "invalid temperature value"),
                (evaluate, ["--tile", -512], "--tile must be|--tile"),
                (evaluate, ["--thresholds", 1], "--thresholds must lie in 2..100000"),
                (evaluate, ["--workers", -1], "--workers must lie in 0..256"),
                (evaluate, ["--precision", "fp8"], "invalid choice: 'fp8'"),
                (evaluate, [], "no checkpoint: nothing matches runs/.*train.py"),
                (data, ["--data", "elsewhere"], "elsewhere: no such folder")):
            self.fails(script, arguments, words)

    def test_data(self):
        (self.folder / "empty").mkdir()
        for arguments, words in (
                (["--data", "elsewhere"], "--data elsewhere: no such folder"),
                (["--data", "empty"], "empty holds none of cityscapes, vistas"),
                ([], "data holds none of cityscapes"),
                (["--train", "custom"], "neither acdc nor cityscapes"),
                (["--train", "cityscapes", "--val", "custom"],
                 "no train images of cityscapes: looked for data/cityscapes"),
                (["--train", "mars", "--val", "custom"],
                 "unknown dataset 'mars'; known: cityscapes"),
                ([*self.scratch, "--init", "nowhere.pt"], "cannot open the weights nowhere.pt"),
                ([*self.scratch, "--pretrained", "in22k"],
                 "convnext_atto was never published as 'in22k'")):
            self.fails(train, arguments, words)

    def test_files(self):
        image = self.folder / "data/custom/images/train/frame1 of mine.png"
        label = self.folder / "data/custom/labels/train/frame1 of mine.png"
        good_image, good_label = image.read_bytes(), label.read_bytes()
        arguments = [*self.scratch, "--batch", 4, "--out", self.folder / "out"]
        for path, content, words in ((image, good_image[:200],
                                      "frame1 of mine.png cannot be read: .*replace or remove"),
                                     (label, pattern([77], 80, 60),
                                      r"label values \[77\] have no meaning in custom"),
                                     (label, pattern([0], 79, 60), "79x60, its image .* 80x60"),
                                     (label, None, "1 of 4 images of custom train have no label")):
            if content is None:
                path.unlink()
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                put(path, content)
            with mock.patch.object(train, "Log"):        # the log may be begun before a file is met
                self.fails(train, arguments, words)
            image.write_bytes(good_image)
            label.write_bytes(good_label)

    def test_checkpoints(self):
        def save(path, **changes):
            write_checkpoint(self.folder / path, swiftnet.build("convnext_atto", 5, width=16),
                             **{"classes": tuple("abcde"), **changes})
        save("five.pt")
        save("broken.pt", architecture={"backbone": "convnext_tiny", "num_classes": 5, "width": 16})
        save("strange.pt", architecture={"no_such": 1})
        save("unnamed.pt", classes=None)
        save("lists.pt", model={"a": [1]})
        torch.save({"model": {}}, self.folder / "other.pt")
        (self.folder / "text.pt").write_text("not a checkpoint at all")
        (self.folder / "cut.pt").write_bytes((self.folder / "five.pt").read_bytes()[:1000])
        for path, words in (("five.pt",
                             r"five.pt knows 5 classes \(a, ...\), which are not those of custom"),
                            ("broken.pt", "does not fit its own architecture"),
                            ("strange.pt", "does not fit its own architecture"),
                            ("other.pt", "no checkpoint of train.py .it lacks architecture"),
                            ("unnamed.pt", "it lacks classes"), ("lists.pt", "it lacks tensors"),
                            ("text.pt", "no torch file"), ("cut.pt", "no torch file"),
                            ("nowhere.pt", "cannot open the weights nowhere.pt")):
            self.fails(evaluate, ["--checkpoint", path], words)
        save("runs-other.pt", classes=("kind 0", "kind 1", "kind 2"))
        self.fails(evaluate, ["--checkpoint", "runs-other.pt"], "3 class names for 5 classes")
        save("runs-other.pt", classes=tuple(f"kind {i}" for i in range(5)))
        self.fails(evaluate, ["--checkpoint", "five.pt", "runs-other.pt"],
                   "an ensemble needs the same")

    def test_more_processes_than_the_batch_divides_into(self):
        with mock.patch.dict(os.environ, {"WORLD_SIZE": "3"}), \
                mock.patch.object(train, "start_processes",
                                  return_value=(0, 3, torch.device("cpu"))):
            self.fails(train, [*self.scratch], "--batch 2 does not divide by 3 processes")

    def test_more_processes_than_gpus(self):
        with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "8"}), \
                mock.patch("torch.cuda.is_available", return_value=True), \
                mock.patch("torch.cuda.device_count", return_value=2):
            self.fails(train, [*self.scratch],
                       "8 processes for 2 GPUs; start with --nproc_per_node=2")


# --- the catalogue of bad input ------------------------------------------------------------------

def png(width, height, mode=2, depth=8, body=b"", before=b""):
    """Bytes of a PNG whose header says what it likes. body: raw zlib data."""
    def chunk(name, content):
        return (len(content).to_bytes(4, "big") + name + content
                + zlib.crc32(name + content).to_bytes(4, "big"))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, mode, 0, 0, 0])
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", body)
            + chunk(b"IEND", b""))


def bomb(width, height, mode):
    """A real one: megabytes of zeros in a few kilobytes."""
    row, packer = bytes(1 + width * {0: 1, 2: 3}[mode]), zlib.compressobj(9)
    return png(width, height, mode, body=b"".join(packer.compress(row) for _ in range(height))
               + packer.flush())


def safetensors(header, data=b"", size=None):
    """Bytes of a safetensors file with any header, and any length said of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"stem.0.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def saved(content):
    """Bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped(compression, **records):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


class Harmful:
    """Its unpickling writes a file: what must never happen."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def as_folder(path):
    path.mkdir()


def as_loop(path):
    path.symlink_to(path.name)


def as_pipe(path):
    os.mkfifo(path)


def as_dangling(path):
    path.symlink_to("nowhere at all")


def as_zeros(path):
    path.symlink_to("/dev/zero")


def flipped(path):
    """A good checkpoint with one bit of a tensor turned."""
    raw = bytearray(saved(torch.load(CatalogueTest.good / "run/last.pt", weights_only=True)))
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path):
    path.write_bytes((CatalogueTest.good / "run/last.pt").read_bytes()[:-1000])


def changed(inside=(), **changes):
    """A good checkpoint with other contents; `inside` go into its "model"."""
    def write(path):
        state = {**torch.load(CatalogueTest.good / "run/last.pt", weights_only=True), **changes}
        state["model"].update(inside)
        path.write_bytes(saved(state))
    return write


DEEP = b"[" * 200_000
JPEG = io.BytesIO()
Image.new("RGB", (80, 60), "red").save(JPEG, "JPEG")
# What an image file may be instead of an image; the words are Pillow's or ours, after the name.
BROKEN_IMAGES = {
    "empty": (b"", "cannot be read: cannot identify"),
    "text": (b"hello, this is no image", "cannot identify"),
    "cut short": (bomb(80, 60, 2)[:-40], "cannot be read: "),
    "cut in its header": (bomb(80, 60, 2)[:20], "cannot be read: "),
    "a JPEG cut short": (JPEG.getvalue()[:-200], "cannot be read: |mode RGB"),
    "another format": (b"GIF89a" + bytes(40), "cannot identify"),
    "PostScript, which Pillow would run": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                                           "cannot identify"),
    "16 bit": (png(80, 60, 0, 16, zlib.compress(bytes(161 * 60))), "mode I;16, expected"),
    "of the largest size": (png(2 ** 31 - 1, 2 ** 31 - 1), "more than 67 megapixels"),
    "of no size": (png(0, 60), "cannot be read: "),
    "a bomb": (bomb(9000, 8000, 0), "9000x8000 is more than 67 megapixels"),
    "a bomb of text": (png(80, 60, 0, body=zlib.compress(bytes(81 * 60)), before=(
        lambda raw: len(raw).to_bytes(4, "big") + b"zTXt" + raw
        + zlib.crc32(b"zTXt" + raw).to_bytes(4, "big"))(
            b"a\0\0" + zlib.compress(bytes(2 ** 26)))), "cannot be read: Decompressed data"),
    "of a wrong checksum": (bomb(80, 60, 2)[:50] + b"x" + bomb(80, 60, 2)[51:],
                            "cannot be read: "),
    "a folder": (as_folder, "it is no file"),
    "a pipe": (as_pipe, "it is no file"),
    "an endless device": (as_zeros, "it is no file"),
    "a link to itself": (as_loop, "cannot be read: .*symbolic links"),
    "a link to nothing": (as_dangling, "is missing .a dangling link"),
}
IMAGE = "data/custom/images/val/frame0 of mine.png"
LABEL = "data/custom/labels/val/frame0 of mine.png"
MASK = "data/acdc/gt/fog/val/GOPR0475/GOPR0475_frame_000041_gt_invIds.png"
POOLED = "data/pool/0.png"
PREDICTED = "predicted/frame0 of mine.png"
TRAIN = ("--recipe", "camvid", "--data", "data", "--train", "custom", "--val", "custom", "--crop",
         96, "--levels", 2, "--width", 8, "--batch", 2, "--batch-per-process", 2, "--steps", 3)
EVALUATE = ("--checkpoint", "three.pt", "--data", "data", "--val", "custom", "--workers", 0)
SCORE = ("--score", "predicted", "--data", "data", "--val", "custom")
POOL = ("--checkpoint", "nineteen.pt", "--data", "data", "--pools", "data/pool", "--out", "pseudo",
        "--workers", 0)
PSEUDO = ("--recipe", "camvid", "--data", "data", "--train", "acdc:fog", "--val", "acdc:fog",
          "--pseudo", "pseudo", "--crop", 96, "--levels", 2, "--width", 8, "--batch", 2,
          "--steps", 1)
# A checkpoint instead of a good one; the words come after its name.
BROKEN_CHECKPOINTS = {
    "empty": (b"", "no torch file"),
    "text": (b"not a checkpoint at all", "no torch file"),
    "a zip of something else": (zipped(zipfile.ZIP_STORED, a="b"), "no torch file"),
    "a zip of numpy": (zipped(zipfile.ZIP_STORED, **{"a.npy": bytes(80)}), "no torch file"),
    "a compressed zip": (zipped(zipfile.ZIP_DEFLATED, **{"data.pkl": bytes(2 ** 20)}),
                         "compressed, as torch never does"),
    "a list": (saved([1, 2]), "holds a list; expected a dict of tensors"),
    "a path": (saved({"model": Path("x")}), "no torch file of tensors and plain values.*pathlib"),
    "a module": (saved({"model": nn.Linear(1, 1)}), "no torch file of tensors.*Linear"),
    "harmful": (saved({"model": Harmful()}), "no torch file of tensors.* it holds a posix.system"),
    "harmful, of the old format": (pickle.dumps(Harmful()), "no torch file"),
    "of another program": (saved({"state_dict": {}}), "no checkpoint of train.py .it lacks model"),
    "cut short": (cut, "no torch file"),
    "of one flipped bit": (flipped, r"is damaged: its record \w+/data/\d+ does not match"),
    "without a step": (changed(step="x"), "it lacks step"),
    "of lists": (changed({"head.2.bias": [1, 2]}), "it lacks tensors"),
    "a tensor that repeats itself": (changed({"head.2.bias": torch.ones(1).expand(2 ** 40)}),
                                     "it lacks tensors"),
    "a folder": (as_folder, "is no file"),
    "a pipe": (as_pipe, "is no file"),
    "an endless device": (as_zeros, "is no file"),
    "a link to itself": (as_loop, "Too many levels of symbolic links"),
}
BROKEN_SAFETENSORS = {
    "a header beyond the file": (safetensors(b"{}", size=2 ** 62), "header of 4611686018427387904"),
    "a header of 99 MB, said": (safetensors(b"{}", size=99_000_000), "header of 99000000 bytes"),
    "no JSON": (safetensors(b"{" + b"x" * 20), "unreadable safetensors header"),
    "nested beyond measure": (safetensors(b'{"a":' + DEEP), "unreadable safetensors header"),
    "not UTF-8": (safetensors(b'{"\xff\xfe": 1}'), "unreadable safetensors header"),
    "no table": (safetensors({"a": 3}), "unreadable safetensors header"),
    "no offsets": (safetensors({"a": {"dtype": "F32", "shape": [1]}}), "unreadable safeten"),
    "three offsets": (safetensors(entry(offsets=(0, 4, 8)), bytes(8)), "unreadable safetensors"),
    "a shape that is a number": (safetensors(entry(shape=2), bytes(8)), "unreadable safetensors"),
    "an unknown type": (safetensors(entry(dtype="F4"), bytes(8)), "unreadable safetensors"),
    "a type that is a list": (safetensors(entry(dtype=["F32"]), bytes(8)), "unreadable safeten"),
    "a negative shape": (safetensors(entry((-2, -1)), bytes(8)), "lies outside the file"),
    "a shape of truths": (safetensors(entry((True, 2)), bytes(8)), "lies outside the file"),
    "a shape of fractions": (safetensors(entry((0.5, 4)), bytes(8)), "lies outside the file"),
    "an absurd shape": (safetensors(entry((2 ** 40, 2 ** 40)), bytes(8)), "lies outside the file"),
    "a shape of 2^62 nothings": (safetensors(entry((0, 2 ** 62), (0, 0))), "lies outside the file"),
    "a terabyte": (safetensors(entry((2 ** 38,)), bytes(8)), "has 8 bytes, shape .* needs"),
    "offsets backwards": (safetensors(entry((0,), (8, 0)), bytes(8)), "lies outside the file"),
    "data cut short": (safetensors(entry(), bytes(7)), "lies outside the file; damaged or incompl"),
    "no ConvNeXt": (safetensors(entry(), bytes(8)), "does not fit|no ConvNeXt in the layout"),
}
HEADER = "image,label,pool,kept,confidence,selected,road\n"
BROKEN_MANIFESTS = {
    "empty": (b"", "expected columns image and label, found ''"),
    "binary": (bytes(range(128, 256)), "expected columns image"),
    "of zero bytes": (bytes(100), "manifest.csv cannot be used"),
    "without columns": (b"a,b\n1,2\n", "expected columns image and label, found 'a, b'"),
    "with one huge field": (b"image,label\n" + b"x" * 200_000 + b",y\n", "field larger than"),
    "an absolute image": (HEADER + "/etc/passwd,0.png,p,1,1,1,9\n", "line 2: .* must be paths"),
    "an image above the root": (HEADER + "pool/../../x.png,0.png,p,1,1,1,9\n",
                                "line 2: .* must be paths below"),
    "an absolute label": (HEADER + "pool/0.png,/etc/passwd,p,1,1,1,9\n", "line 2: .* must be path"),
    "a label above the folder": (HEADER + "pool/0.png,../x.png,p,1,1,1,9\n",
                                 "line 2: .* must be paths below"),
    "a row cut short": (HEADER + "pool/0.png\n", "line 2: .* must be paths below"),
    "a row too long": (HEADER + "pool/0.png,0.png,p,1,1,1,9,extra\n", "line 2: .* must be path"),
    "nothing selected": (HEADER + "pool/0.png,0.png,p,1,1,0,9\n",
                         "manifest.csv has no selected row"),
    "a label that is not there": (HEADER + "pool/0.png,no.png,p,1,1,1,9\n",
                                  "pseudo/no.png is missing"),
    "an image of no name": (HEADER + "\0,0.png,p,1,1,1,9\n", "cannot be used|cannot be read"),
    "a folder": (as_folder, "unknown dataset 'pseudo'"),
}


def catalogue():
    """Yield (title, script, arguments, {file: what it becomes}, words of the message)."""
    for script in (train, evaluate, pseudolabel, data):           # every flag with a wrong type
        for item in dataclasses.fields(script.Config):
            name, default = "--" + item.name.replace("_", "-"), item.default
            kind = item.metadata.get("type") or type(
                default[0] if default and isinstance(default, tuple) else default)
            if isinstance(default, bool):
                wrong, words = [f"{name}=maybe"], "ignored explicit argument 'maybe'"
            elif "choices" in item.metadata:
                wrong, words = [name, "nonsense"], "invalid choice: 'nonsense'"
            elif kind in (int, float):
                wrong, words = [name, "many"], f"argument {name}: invalid {kind.__name__} value"
            elif item.metadata.get("nargs") != "?":
                wrong, words = [name], f"argument {name}: (expected|invalid)"
            else:
                continue
            yield f"{script.__name__} {' '.join(wrong)}", script, wrong, {}, words
            if kind is float and "choices" not in item.metadata:
                yield (f"{script.__name__} {name} nan", script, [name, "nan"], {},
                       f"{name} must be a finite number, found nan")
    for script, words, *arguments in (                            # out of range, or in conflict
            (train, "--batch must be at least 1, found 0", "--batch", 0),
            (train, "--batch must be at most 100000", "--batch", 10 ** 9),
            (train, "--batch-per-process must be at least 1", "--batch-per-process", -1),
            (train, "--levels must be at least 1", "--levels", 0),
            (train, "--levels must be at most 8", "--levels", 10 ** 12),
            (train, "--epochs must be at least 1", "--epochs", 0),
            (train, "--epochs must be at most 1000000", "--epochs", 10 ** 30),
            (train, "--steps must be at most 1000000000", "--steps", 10 ** 30),
            (train, "--width must be at most 4096", "--width", 10 ** 9),
            (train, "--workers must be at most 256", "--workers", 10 ** 6),
            (train, "--warmup must not be negative", "--warmup", -5),
            (train, "--save-every must be at least 1", "--save-every", 0),
            (train, "--log-every must be at least 1", "--log-every", 0),
            (train, "--val-every must be at least 1", "--val-every", 0),
            (train, "--skip-bad must not be negative", "--skip-bad", -1),
            (train, "--seed must not be negative", "--seed", -1),
            (train, "--weight-decay must not be negative", "--weight-decay", -0.1),
            (train, "--lr and --backbone-lr above 0", "--lr", 0),
            (train, "--lr and --backbone-lr above 0", "--backbone-lr", -1),
            (train, "0 < --bn-momentum <= 1", "--bn-momentum", 0),
            (train, "0 <= --drop-path < 1", "--drop-path", 1),
            (train, "0 <= --jitter < 1", "--jitter", 1),
            (train, "0 <= --uniform-classes <= 1", "--uniform-classes", 1.5),
            (train, "--zoom takes two numbers", "--zoom", 1, 2, 3),
            (train, "--zoom takes two numbers", "--zoom", 0, 1),
            (train, "not above the coarsest stride, 512", "--levels", 5, "--crop", 512),
            (train, "--demo and --recipe camvid exclude", "--demo", "--recipe", "camvid"),
            (train, "unrecognized arguments: surplus", "surplus"),
            (train, "--train: expected at least one", *TRAIN, "--train"),
            (train, "unknown dataset ''", *TRAIN, "--train", ""),
            (train, "unknown dataset 'Ötztal'", *TRAIN, "--train", "Ötztal"),
            (train, "expected a weight between 0 and 1000", *TRAIN, "--train", "custom*0"),
            (train, "expected a weight between 0 and 1000", *TRAIN, "--train", "custom*much"),
            (train, "expected a weight between 0 and 1000", *TRAIN, "--train", "custom*nan"),
            (train, "custom train has nothing of mars", *TRAIN, "--train", "custom:mars"),
            (train, "are named twice in custom custom", *TRAIN, "--train", "custom", "custom"),
            (train, "have different classes", *TRAIN, "--val", "acdc"),
            (train, "different classes and cannot be mixed", *TRAIN, "--train", "custom", "acdc"),
            (train, "--data no such folder, ü: no such folder", "--data", "no such folder, ü"),
            (train, "--data three.pt: no such folder", "--data", "three.pt"),
            (train, "File name too long", "--data", "x" * 5000),
            (train, "--data: expected one argument", "--data", "-x"),
            (train, "--data -x: no such folder", "--data=-x"),
            (train, "--out three.pt is a file", *TRAIN, "--out", "three.pt"),
            (train, "three.pt/run cannot be written: Not a directory; .*name another folder",
             *TRAIN, "--out", "three.pt/run"),
            (train, "/proc/run cannot be written: No such file.*name another folder",
             *TRAIN, "--out", "/proc/run"),
            (train, "File name too long", *TRAIN, "--out", "x" * 300),
            (train, "--resume runs/ü: there is no runs/ü/last.pt", "--resume", "runs/ü"),
            (train, "--lr 0.001 there, 0.5 here", "--resume", "run", "--lr", 0.5),
            (train, "--lr 0.001 there, 0.5 here", *TRAIN, "--out", "run", "--lr", 0.5),
            (train, "--init .*: does not fit|does not fit", *TRAIN, "--init", "three.pt",
             "--width", 16),
            (train, "cannot fetch https://localhost:1/w.pth .*download it elsewhere", *TRAIN,
             "--pretrained", "https://localhost:1/w.pth"),
            (evaluate, "--temperature must be at least 1e-6, found -1.0", "--temperature", -1),
            (evaluate, "--scales must lie in .0, 16., found 0.0", "--scales", 0),
            (evaluate, "--scales must lie in .0, 16.", *EVALUATE, "--scales", 10 ** 6),
            (evaluate, "--tile must be a multiple of 512", "--tile", 500),
            (evaluate, "--thresholds must lie in 2..100000", "--thresholds", 1),
            (evaluate, "--thresholds must lie in 2..100000", "--thresholds", 10 ** 12),
            (evaluate, "--workers must lie in 0..256, found -1", "--workers", -1),
            (evaluate, "--images and --score exclude", "--images", "data", "--score", "predicted"),
            (evaluate, "--panels-worst needs it", "--panels-worst"),
            (evaluate, "--score needs the set", "--score", "predicted"),
            (evaluate, "--submit knows acdc", *EVALUATE, "--submit", "mars", "x.zip"),
            (evaluate, "no labels for its split 'test'|no test images", *EVALUATE, "--split",
             "test"),
            (evaluate, "custom has no split 'nonsense'", *EVALUATE, "--split", "nonsense"),
            (evaluate, "knows 19 classes .*not those of custom", *EVALUATE, "--checkpoint",
             "nineteen.pt"),
            (evaluate, "--images nowhere: no such folder", *EVALUATE, "--images", "nowhere"),
            (evaluate, "three.pt/n.json cannot be written: (Not a dir|File exists)", *EVALUATE,
             "--json", "three.pt/n.json"),
            (evaluate, "three.pt/plots/.* cannot be written: (Not a|File exists)", *EVALUATE,
             "--plots", "three.pt/plots"),
            (pseudolabel, r"--threshold must lie in \[0, 1\]", "--threshold", 1.5),
            (pseudolabel, r"--class-share must lie in \[0, 1\]", "--class-share", -1),
            (pseudolabel, r"--min-kept must lie in \[0, 1\]", "--min-kept", 2),
            (pseudolabel, "--temperature must be at least 1e-6, found 0.0", "--temperature", 0),
            (pseudolabel, "--scales must lie in .0, 16., found 1000.0", "--scales", 1000),
            (pseudolabel, "--select must not be negative, found -1", "--select", -1),
            (pseudolabel, "--workers must lie in 0..256, found 257", "--workers", 257),
            (pseudolabel, "--tile must be a multiple of 512 pixels, found 100", "--tile", 100),
            (pseudolabel, "--tile must be a multiple of 512 pixels, found -512", "--tile", -512),
            (pseudolabel, "belong together", "--pools", "stf"),
            (pseudolabel, "nothing to do", "--flip"),
            (pseudolabel, "no images in pool 'cadc'", *POOL, "--pools", "cadc"),
            (pseudolabel, "is not below the data root", *POOL, "--pools", "outside"),
            (pseudolabel, "three.pt/x.* cannot be written: Not a directory", *POOL, "--out",
             "three.pt/x"),
            (data, "--data nowhere: no such folder", "--data", "nowhere"),
            (data, "--workers and --show must not be negative, found -1 and 0", "--workers", -1),
            (data, "--show must not be negative", "--show", -1)):
        yield " ".join(map(str, (script.__name__, *arguments[-2:])))[:60], script, arguments, {}, \
            words
    for title, (content, words) in BROKEN_IMAGES.items():
        at = re.escape(IMAGE) + ".*" + words
        yield f"image: {title}", evaluate, EVALUATE, {IMAGE: content}, at
        first = "data/custom/images/train/frame0 of mine.png"
        if title != "a bomb":
            yield f"training image: {title}", train, TRAIN, {first: content}, \
                re.escape(first) + ".*" + words
        for name, path, arguments in (
                ("label", LABEL, EVALUATE), ("prediction", PREDICTED, SCORE),
                ("mask", MASK, ("--checkpoint", "nineteen.pt", "--data", "data", "--val",
                                "acdc:fog", "--workers", 0))):
            if title != "a link to nothing" or name != "prediction":
                yield f"{name}: {title}", evaluate, arguments, {path: content}, \
                    re.escape(path) + ".*(" + words + "|mode RGB)"
    for title, path, content, arguments, words in (
            ("label: unknown values", LABEL, pattern([77], 80, 60), EVALUATE, r"values \[77\]"),
            ("label: another size", LABEL, pattern([0], 79, 60), EVALUATE, "79x60, its image"),
            ("label: in colour", LABEL, picture(0, 80, 60), EVALUATE, "mode RGB, expected L or P"),
            ("mask: values of 255", MASK, pattern([255]), (
                "--checkpoint", "nineteen.pt", "--data", "data", "--val", "acdc:fog", "--workers",
                0), "values up to 255; expected 0 .valid. and 1"),
            ("prediction: unknown values", PREDICTED, pattern([77], 80, 60), SCORE,
             "values that name no class"),
            ("prediction: another size", PREDICTED, pattern([0], 9, 9), SCORE, "it is 9x9, expect"),
            ("two files for one image", "data/custom/images/val/frame0 of mine.jpg",
             JPEG.getvalue(), EVALUATE, "two files for one image"),
            ("classes.txt: empty", "data/custom/classes.txt", b"", EVALUATE, "0 class names"),
            ("classes.txt: binary", "data/custom/classes.txt", b"\xff\xfe\0a", EVALUATE,
             "classes.txt cannot be used: .*can't decode"),
            ("classes.txt: too many", "data/custom/classes.txt",
             "".join(f"{i}\n" for i in range(300)), EVALUATE, "300 class names; expected 2 to 255"),
            ("classes.txt: a folder", "data/custom/classes.txt", as_folder, EVALUATE,
             "classes.txt is missing"),
            ("settings of --images: of another run", "pictures/settings.json", b"{}",
             (*EVALUATE, "--images", "data/pool"), "holds predictions of other settings"),
            ("settings of --images: binary", "pictures/settings.json", b"\xff\xfe\0",
             (*EVALUATE, "--images", "data/pool"), "holds predictions of other settings")):
        yield title, evaluate, arguments, {path: content}, words
    panoptic = "data/wilddash/panoptic.json"
    wilddash = ("--checkpoint", "nineteen.pt", "--data", "data", "--val", "wilddash", "--split",
                "train", "--workers", 0)
    for title, content, words in (
            ("empty", b"", "cannot be used"), ("nested", DEEP, "cannot be used: Recursion"),
            ("a list", b"[]", "cannot be used"), ("binary", b"\xff\xfe", "can't decode"),
            ("a category beyond bytes", json.dumps({"annotations": [{
                "file_name": "at0002_100000.png", "segments_info": [
                    {"id": 1, "category_id": 300}]}]}), "category 300"),
            ("an id of words", json.dumps({"annotations": [{
                "file_name": "at0002_100000.png", "segments_info": [
                    {"id": "x", "category_id": 3}]}]}), "segment 'x'"),
            ("missing", None, "is missing")):
        yield f"panoptic.json: {title}", evaluate, wilddash, {panoptic: content}, \
            "panoptic.json.*" + words
    for title, (content, words) in BROKEN_CHECKPOINTS.items():
        for script, arguments in ((evaluate, (*EVALUATE, "--checkpoint", "bad.pt")),
                                  (train, (*TRAIN, "--init", "bad.pt"))):
            yield f"{script.__name__}, checkpoint: {title}", script, arguments, \
                {"bad.pt": content}, "bad.pt.*" + words
        if content not in (as_folder, as_loop, as_pipe, as_zeros):
            yield f"a run's last.pt: {title}", train, (*TRAIN, "--out", "run"), \
                {"run/last.pt": content}, "run/last.pt.*" + words
    for title, content, words in (
            ("of two weights too many", changed({"x": torch.ones(1), "y": torch.ones(1)}),
             "does not fit its own architecture"),
            ("of another shape", changed({"head.2.bias": torch.ones(4)}), r"head.2.bias is \(4,\)"),
            ("of a billion levels", changed(architecture={"levels": 10 ** 9}),
             "1000000000 levels.*expected levels in 1..8"),
            ("of a billion channels", changed(architecture={"width": 10 ** 9}), "width 1000000000"),
            ("of an unknown backbone", changed(architecture={"backbone": []}), "does not fit its"),
            ("that would fetch another file",
             changed(architecture={"pretrained": "https://localhost/w.pth"}), "unknown pretrained"),
            ("of no weights", changed(model={}), "it lacks "),
            ("of sparse weights", changed({"head.2.bias": torch.ones(3).to_sparse()}),
             "no checkpoint of train.py"),
            ("of weights that are not finite",
             changed({"head.2.bias": torch.full((3,), math.nan)}), "logits of .* are not finite")):
        yield f"evaluate, checkpoint: {title}", evaluate, (*EVALUATE, "--checkpoint", "bad.pt"), \
            {"bad.pt": content}, words
    for title, content, words in (
            ("no optimizer", changed(optimizer=None), "cannot be continued .it lacks optimizer"),
            ("another optimizer's", changed(optimizer={"state": 1}), "no state of this optimizer"),
            ("no score", changed(best="high"), "cannot be continued .it lacks best"),
            ("a step below 0", changed(step=-3), "cannot be continued .it lacks steps"),
            ("weights of another network", changed({"head.2.bias": torch.ones(4)}),
             "last.pt of run does not fit: size mismatch"),
            ("other images", changed(data="2 + 2 images 00"), "was trained on other files")):
        yield f"a run's last.pt: {title}", train, (*TRAIN, "--out", "run"), \
            {"run/last.pt": content}, words
    for title, config, words in (("of another version", {"speed": 1}, "has settings speed"),
                                 ("of a wrong type", {"lr": "fast"}, "has settings lr"),
                                 ("of a wrong type inside", {"train": (1,)}, "settings train")):
        yield f"--resume, settings {title}", train, ("--resume", "run"), \
            {"run/last.pt": changed(config=config)}, words
    for title, (content, words) in BROKEN_SAFETENSORS.items():
        yield f"safetensors: {title}", train, (*TRAIN, "--pretrained", "w.safetensors"), \
            {"w.safetensors": content}, "w.safetensors.*" + words
    for title, (content, words) in BROKEN_MANIFESTS.items():
        yield f"manifest.csv: {title}", train, PSEUDO, {"pseudo/manifest.csv": content}, words
    for title, content in (("empty", b""), ("a list", b"[]"), ("nested", DEEP),
                           ("binary", b"\xff\xfe\0")):
        yield f"settings.json of pseudolabels: {title}", pseudolabel, POOL, \
            {"pseudo/settings.json": content}, "settings.json is damaged; remove pseudo"
        yield f"settings.json to train on: {title}", train, PSEUDO, \
            {"pseudo/settings.json": content}, "pseudo/settings.json cannot be used"
    for title, content in (("empty", b""), ("binary", b"\xff\xfe"), ("no rows", HEADER),
                           ("no numbers", HEADER + "a,b,p,much,1,1,9\n"),
                           ("cut short", HEADER + "a,b,p\n"), ("of zero bytes", bytes(99))):
        yield f"manifest.csv to choose from: {title}", pseudolabel, (
            "--out", "pseudo", "--select", 1), {"pseudo/manifest.csv": content}, \
            "pseudo/manifest.csv"


class CatalogueTest(Refusals):
    """Every row: one line that names the find and the remedy, exit status 2, within 10 seconds and
    1 GB, and nothing that was there before is touched."""

    @classmethod
    def setUpClass(cls):
        cls.model = mock.patch.dict(convnext.SIZES,
                                    convnext_atto=((1, 1, 1, 1), (8, 16, 24, 32)))
        cls.model.start()
        cls.addClassCleanup(cls.model.stop)
        cls.good = Path(tempfile.mkdtemp(prefix="swiftnet-"))
        cls.addClassCleanup(shutil.rmtree, cls.good)
        Fixtures.custom(cls.good / "data", images=2, size=(80, 60))
        Fixtures.acdc(cls.good / "data")
        Fixtures.wilddash_final(cls.good / "data")
        for i in range(2):
            put(cls.good / f"data/pool/{i}.png", picture(i))
            put(cls.good / f"outside/{i}.png", picture(i))
            put(cls.good / f"predicted/frame{i} of mine.png", pattern([0], 80, 60))
        put(cls.good / "pseudo/0.png", pattern([0]))
        (cls.good / "pseudo/manifest.csv").write_text(HEADER + "pool/0.png,0.png,p,1,1,1,9\n")
        (cls.good / "pseudo/settings.json").write_text(json.dumps({"classes": data.CLASSES}))
        architecture = {"backbone": "convnext_atto", "width": 8, "levels": 2}
        for name, classes in (("three.pt", tuple(f"kind {i}" for i in range(3))),
                              ("nineteen.pt", data.CLASSES)):
            architecture["num_classes"] = len(classes)
            write_checkpoint(cls.good / name, swiftnet.build(**architecture), classes=classes,
                             architecture=architecture)
        with mock.patch.object(sys, "argv", ["train.py", *map(str, TRAIN), "--out", "run"]), \
                contextlib.chdir(cls.good), contextlib.redirect_stdout(io.StringIO()), \
                mock.patch.object(train.Steps, "__call__", side_effect=KeyboardInterrupt), \
                contextlib.suppress(KeyboardInterrupt):
            train.main()                                          # an unfinished run

    def setUp(self):
        Temporary.setUp(self)

    def test_catalogue(self):
        cases, slowest = 0, (0, "")
        shutil.copytree(self.good, self.folder, dirs_exist_ok=True)
        there = set(self.folder.rglob("*"))
        for title, script, arguments, files, words in catalogue():
            with self.subTest(title):
                for path, content in files.items():
                    path = self.folder / path
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.unlink(missing_ok=True)
                    if callable(content):
                        content(path)
                    elif isinstance(content, bytes):
                        path.write_bytes(content)
                    elif isinstance(content, str):
                        path.write_text(content)
                    elif content is not None:
                        put(path, content)
                began = time.monotonic()
                with memory_limit(2 ** 30):
                    self.fails(script, arguments, words)
                slowest = max(slowest, (time.monotonic() - began, title))
                self.assertLess(slowest[0], 10)
                self.assertFalse((self.folder / "harmed").exists())
            for path in sorted({*self.folder.rglob("*")} - there, reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            for path in files:                                       # as it was
                if (self.folder / path).is_dir():
                    (self.folder / path).rmdir()
                (self.folder / path).unlink(missing_ok=True)
                if (self.good / path).exists():
                    shutil.copy2(self.good / path, self.folder / path)
            cases += 1
        print(f"{cases} cases of bad input, the slowest ({slowest[1]}) took {slowest[0]:.1f} s",
              flush=True)


@contextlib.contextmanager
def memory_limit(more):
    """At most `more` bytes beside what this process has mapped already."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class PropertyTest(Temporary):
    """What must hold for any input, tried on seeded random ones."""

    def test_augmentation_keeps_image_and_label_aligned(self):
        """The red channel is the label's number: wherever a crop is of one class, it must agree."""
        for seed in range(40):
            rng = np.random.default_rng(seed)
            side, crop = int(rng.integers(8, 40)), int(rng.integers(33, 200))
            blocks = np.kron(rng.integers(0, 7, rng.integers(2, 7, 2)),
                             np.ones((side, side))).astype(np.uint8)
            image = rng.integers(0, 256, (*blocks.shape, 3)).astype(np.uint8)
            image[..., 0] = 30 * blocks
            sample = data.Sample(str(put(self.folder / "image.png", image)),
                                 str(put(self.folder / "label.png", blocks)), None, None, "custom",
                                 "all")
            wanted = int(rng.integers(7)) if seed % 2 else None
            pixels, ids = data.augment(sample, 7, rng, crop, (0.5, 2.0), wanted)
            self.assertEqual((pixels.shape, ids.shape), ((crop, crop, 3), (crop, crop)))
            around = np.stack([np.roll(ids, shift, (0, 1)) for shift in itertools.product(
                (-3, 0, 3), repeat=2)])
            inside = (around == ids).all(0) & (ids != 255)       # three pixels from any border
            inside[:3], inside[-3:], inside[:, :3], inside[:, -3:] = False, False, False, False
            self.assertLessEqual(
                np.abs(pixels[..., 0].astype(int) - 30 * ids.astype(int))[inside].max(initial=0), 1)
            if wanted in blocks:
                self.assertIn(wanted, ids, seed)

    def test_metrics_do_not_depend_on_order(self):
        """Pixels and images in any order, classes under any names: the same numbers."""
        for seed in range(10):
            rng = torch.Generator().manual_seed(seed)
            logits = 3 * torch.randn(3, 5, 8, 9, generator=rng)
            labels = torch.randint(0, 6, (3, 8, 9), generator=rng)
            labels[labels == 5] = 255
            invalid = torch.rand(3, 8, 9, generator=rng) < 0.2

            def numbers(logits, labels, invalid):
                metrics = evaluate.Metrics(5, 0.8)
                metrics.update(logits, labels, invalid)
                return metrics.compute()
            plain = numbers(logits, labels, invalid)
            pixels, images = torch.randperm(72, generator=rng), torch.randperm(3, generator=rng)
            mixed = [t.flatten(-2)[..., pixels].view(t.shape)[images]
                     for t in (logits, labels, invalid)]
            for name, value in numbers(*mixed).items():
                np.testing.assert_allclose(value, plain[name], rtol=1e-7, err_msg=name)
            names = torch.randperm(5, generator=rng)               # class c becomes names[c]
            renamed = torch.where(labels == 255, 255, names[labels.clamp(max=4)])
            other = numbers(logits[:, names.argsort()], renamed, invalid)
            for name in ("miou", "auiou", "ece"):
                self.assertAlmostEqual(other[name], plain[name], places=6)

    def test_checkpoint_round_trip(self):
        """What is saved is what is read, bit for bit; the loaded network predicts the same."""
        small = mock.patch.dict(convnext.SIZES, convnext_atto=((1, 1, 1, 1), (8, 16, 24, 32)))
        small.start()
        self.addCleanup(small.stop)
        config = train.Config(backbone="convnext_atto", width=16, pretrained="none", levels=2)
        cpu, image = torch.device("cpu"), torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
        for seed in range(3):
            torch.manual_seed(seed)
            steps = train.make_steps(config, data.CLASSES, None, 0, 1, cpu, 10)
            for tensor in steps.model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.normal_().abs_()
            steps.model(image[None]).sum().backward()
            steps.optimizer.step()
            standing = {"step": seed, "best": 0.1 * seed, "untrained": {"all": 0.0}, "data": "ü"}
            train.save(self.folder / "last.pt", steps, data.CLASSES, standing)
            model, state = swiftnet.load_checkpoint(self.folder / "last.pt")
            for name, tensor in steps.model.state_dict().items():
                self.assertTrue(torch.equal(tensor, state["model"][name]), name)
                self.assertTrue(torch.equal(tensor, model.state_dict()[name]), name)
            for saved, there in zip(state["optimizer"]["state"].values(),
                                    steps.optimizer.state_dict()["state"].values()):
                self.assertTrue(all(torch.equal(saved[key], there[key]) for key in there))
            self.assertEqual({key: state[key] for key in standing}, standing)
            self.assertEqual(state["config"], dataclasses.asdict(config))
            self.assertTrue(torch.equal(swiftnet.predict(model, image),
                                        swiftnet.predict(steps.model.eval(), image)))

    def test_any_flipped_bit_is_found(self):
        """torch.load looks at no checksum; convnext.check_zip does."""
        path = self.folder / "last.pt"
        write_checkpoint(path, tiny_model())
        raw, rng = path.read_bytes(), np.random.default_rng(0)
        with zipfile.ZipFile(path) as archive:
            records = [(item.header_offset, item.file_size) for item in archive.infolist()
                       if "/data/" in item.filename]
        for start, size in (records[i] for i in rng.integers(0, len(records), 40)):
            names = np.frombuffer(raw[start + 26:start + 30], "<u2").sum()      # name and padding
            damaged = bytearray(raw)
            damaged[start + 30 + names + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with self.assertRaisesRegex(ValueError, "is damaged|no torch file"):
                swiftnet.read_checkpoint(path)
        path.write_bytes(raw)
        swiftnet.read_checkpoint(path)

    def test_manifest_paths(self):
        """Names in a manifest stay below its roots; links that the owner made are followed."""
        (self.folder / "data/pool").mkdir(parents=True)
        (self.folder / "pseudo").mkdir()
        (self.folder / "elsewhere").mkdir()
        (self.folder / "data/linked").symlink_to(self.folder / "elsewhere")
        rng = np.random.default_rng(0)
        parts = ("a", "b.png", "..", ".", "", "linked", "...", "~", "ü", " ", "a\\b")
        with contextlib.chdir(self.folder):
            for _ in range(300):
                names = ["/".join(rng.choice(parts, rng.integers(1, 5))) for _ in range(2)]
                with open("pseudo/manifest.csv", "w", newline="") as file:
                    csv.writer(file).writerows([("image", "label"), names])
                allowed = all(name and not name.startswith("/") and ".." not in name.split("/")
                              for name in names)
                if allowed:
                    sample, = data.pseudo_samples("data", "pseudo")
                    for path, root in ((sample.image, "data"), (sample.label, "pseudo")):
                        self.assertTrue(Path(os.path.normpath(path)).is_relative_to(root), names)
                else:
                    with self.assertRaisesRegex(ValueError, "must be paths below data and pseudo"):
                        data.pseudo_samples("data", "pseudo")


# --- the scripts as their users run them --------------------------------------------------------

class ReadmeTest(Temporary):
    def test_mutations_are_of_lines_that_stand_once(self):
        for name, old, *_ in MUTATIONS:
            self.assertEqual((HERE / name).read_text().count(old), 1, old)

    """The README's commands, run as printed, on few steps and a small demo."""

    def test_commands(self):
        for path in HERE.glob("*.py"):
            shutil.copy(path, self.folder)
        data.draw_demo(self.folder / "demo", scale=0.05)
        environ = {**environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        blocks = re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.S)
        lines = [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()]
        tried = []
        for line in lines:
            line = line.removeprefix("pip install -r requirements.txt && ")
            if "test_all.py" in line:
                continue
            # not before: the first commands need no data/
            if "--data data" in line or "camvid" in line:
                Fixtures.camvid(self.folder / "data")
            if " train.py" in line:
                line += " --steps 2 --batch 4 --log-every 1"
            result = subprocess.run(line.split(), cwd=self.folder, env=environ, capture_output=True,
                                    text=True)
            self.assertEqual(result.returncode, 0,
                             f"{line}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
            tried.append(line)
        joined = "\n".join(tried)
        for script in ("train.py --demo", "train.py --recipe camvid",
                       "evaluate.py --temperature 0.67", "data.py", "swiftnet.py"):
            self.assertIn(script, joined)

    def test_example(self):
        """The five-line Python example: a checkpoint, an image file,
        a picture of the prediction."""
        code = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1]
        write_checkpoint(self.folder / "runs/demo/best.pt")
        put(self.folder / "street.png", picture(0, 200, 100))
        subprocess.run([sys.executable, "-c", code], cwd=self.folder, env=environment(), check=True)
        with Image.open(self.folder / "prediction.png") as image:
            self.assertEqual(image.size, (200, 100))

    def test_help(self):
        for script in ("train.py", "evaluate.py", "data.py"):
            result = subprocess.run(command(script, "--help"), env=environment(),
                                    capture_output=True, text=True)
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            self.assertIn("usage:", result.stdout)


class LadderTest(Temporary):
    """.ladder and the table of its runs."""

    def log(self, seed, row, scores, total=9, step=9, seconds=(90,), **settings):
        """Write the log of a run that ended with these scores, in parts of these lengths."""
        folder = self.folder / f"runs/{seed}/{row}"
        folder.mkdir(parents=True, exist_ok=True)
        records = []
        for i, length in enumerate(seconds):
            config = {"seed": seed, "train": ["acdc"], "val": ["acdc"], "pseudo": [f"p/{seed}/v1"]}
            header = {"config": {**config, **settings}, "total": total}
            records += [{"restart": 3, **header} if i else header,
                        {"step": 3 + i, "loss": 1.0, "seconds": length}]
        records.append({"step": step, "miou": scores, "seconds": seconds[-1]})
        (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def test_table(self):
        """Means and deviations worked out by hand."""
        for seed, (all_, fog) in enumerate(((0.3, 0.1), (0.4, 0.2), (0.5, 0.6))):
            self.log(seed, "1-acdc", {"all": all_, "fog": fog, "night": 0.2, "snow": 0.125},
                     seconds=(60, 30) if seed == 0 else (90,))
            self.log(seed, "2-plus", {"all": 0.5, "fog": 0, "night": 1, "snow": all_})
        # 30 40 50: mean 40, squares 100 + 0 + 100 over 2; 10 20 60: 30, (400 + 100 + 900) / 2 = 700
        self.assertEqual(evaluate.ladder_table(self.folder / "runs"), [
            "| mIoU, % | all | snow | fog | night | minutes a run |", "|---|---|---|---|---|---|",
            "| acdc | 40.00 ± 10.00 | 12.50 ± 0.00 | 30.00 ± 26.46 | 20.00 ± 0.00 | 1.5 |",
            "| plus | 50.00 ± 0.00 | 40.00 ± 10.00 | 0.00 ± 0.00 | 100.00 ± 0.00 | 1.5 |",
            "3 seeds (0, 1, 2), 9 steps a run; mean ± standard deviation over seeds"])
        shutil.rmtree(self.folder / "runs/1")
        shutil.rmtree(self.folder / "runs/2")
        self.assertIn("| acdc | 30.00 | 12.50 | 10.00 | 20.00 | 1.5 |",       # one seed: no spread
                      evaluate.ladder_table(self.folder / "runs"))

    def test_unfinished_and_unlike_runs_are_refused(self):
        scores = {"all": 0.5}
        self.log(0, "1-acdc", scores)
        self.log(0, "2-annotations", scores)
        folder = self.folder / "runs"
        path = folder / "0/2-annotations/log.jsonl"
        self.assertEqual(len(evaluate.ladder_table(folder)), 5)
        for how, words in (({"step": 8}, "2-annotations is no finished run: .* step 8 of 9; start"),
                           ({"total": 10, "step": 10}, "in one table: steps 10 and 9"),
                           ({"val": ["cityscapes"]}, "table: val .'cityscapes'. and .'acdc'."),
                           ({"init": "v1.pt"}, "table: init v1.pt and None")):
            self.log(0, "2-annotations", scores, **how)
            with self.assertRaisesRegex(ValueError, words):
                evaluate.ladder_table(folder)
        for content in ("", "{", "[]\n", '{"total": 9}\n{"step": 9, "loss": 1}\n'):
            path.write_text(content)
            with self.assertRaisesRegex(ValueError, "2-annotations is no finished run"):
                evaluate.ladder_table(folder)
        path.unlink()
        with self.assertRaisesRegex(ValueError, "2-annotations is no finished run"):
            evaluate.ladder_table(folder)
        self.log(0, "2-annotations", scores)
        self.log(1, "1-acdc", scores)
        for how, words in (({"train": ["cityscapes"]}, "train .'cityscapes'. and .'acdc'."),
                           ({"pseudo": ["p/1/v1*2"]}, "pseudo .'p/v1.2'. and .'p/v1'."),
                           ({"precision": "fp16"}, "precision fp16 and None")):
            self.log(1, "2-annotations", scores, **how)
            with self.assertRaisesRegex(ValueError, words):
                evaluate.ladder_table(folder)
        shutil.rmtree(folder / "1/2-annotations")
        with self.assertRaisesRegex(ValueError, "runs/1 has the rows 1-acdc, .*/0 1-acdc 2-ann"):
            evaluate.ladder_table(folder)
        with self.assertRaisesRegex(ValueError, "--ladder elsewhere: no runs SEED/ROW"):
            evaluate.ladder_table("elsewhere")

    def test_script(self):
        """Two steps a run on a few streets: all rows; what is there is not made again."""
        for path in (*HERE.glob("*.py"), HERE / ".ladder"):
            shutil.copy(path, self.folder)
        data.draw_demo(self.folder / "streets", seed=1, scale=0.01)
        environ = {**environment(), "RUN": sys.executable, "STEPS": "2", "WEIGHT": "2",
                   "LABELS": "--threshold 0.05", "FLAGS": "--batch 2 --crop 160 --width 16"}

        def start():
            result = subprocess.run(["bash", ".ladder", "demo", "streets", "3"], env=environ,
                                    cwd=self.folder, capture_output=True, text=True)
            self.assertEqual(result.returncode, 0, result.stdout[-2000:] + result.stderr[-2000:])
            return re.findall(r"^(runs/\S+): (new|finished before|finished)", result.stdout, re.M)
        rows = ("1-acdc", "2-annotations", "3-v1", "4-v2")
        self.assertEqual(start(), [(f"runs/ladder-streets/3/{row}", what) for row in rows
                                   for what in ("new", "finished")])
        runs, pseudo = (self.folder / f"{name}/ladder-streets/3" for name in ("runs", "pseudo"))
        states = {row: torch.load(runs / row / "last.pt", weights_only=True) for row in rows}
        for row, labels in zip(rows, ((), (), ("pseudo/ladder-streets/3/v1*2",),
                                      ("pseudo/ladder-streets/3/v2*2",))):
            config = states[row]["config"]
            self.assertEqual((config["pseudo"], config["seed"], config["init"]), (labels, 3, ""))
        for version, teacher in (("v1", "2-annotations"), ("v2", "3-v1")):
            self.assertIn(hashlib.sha256((runs / teacher / "last.pt").read_bytes()).hexdigest(),
                          (pseudo / version / "settings.json").read_text())
        # Stopped after V1, and within the labels of V2
        before = (pseudo / "v2/manifest.csv").read_bytes()
        next((pseudo / "v2/stf").rglob("*.png")).unlink()
        shutil.rmtree(runs / "4-v2")
        self.assertEqual(start(), [*((f"runs/ladder-streets/3/{row}", "finished before")
                                     for row in rows[:3]),
                                   ("runs/ladder-streets/3/4-v2", "new"),
                                   ("runs/ladder-streets/3/4-v2", "finished")])
        self.assertEqual((pseudo / "v2/manifest.csv").read_bytes(), before)
        again = torch.load(runs / "4-v2/last.pt", weights_only=True)
        for name, tensor in states["4-v2"]["model"].items():
            self.assertTrue(torch.equal(tensor, again["model"][name]), name)
        self.assertEqual(sorted(path.name for path in runs.iterdir()), list(rows))
        self.assertEqual(len(evaluate.ladder_table(runs.parent)), 7)
        refused = subprocess.run(["bash", ".ladder", "demo", "streets", "3"], cwd=self.folder,
                                 env={**environ, "STEPS": "3"}, capture_output=True, text=True)
        self.assertEqual(refused.returncode, 2)
        self.assertRegex(refused.stderr, "1-acdc holds a run .step 2 of 2. with other settings: "
                         "--steps 2 there, 3 here")
        result = subprocess.run(["bash", ".ladder", "demos"], cwd=self.folder, capture_output=True,
                                text=True)
        self.assertEqual((result.returncode, result.stderr.count("\n")), (2, 1))


class DemoTest(Temporary):
    def test_other_seeds_draw_other_streets(self):
        """Under the same names not one equal picture; a root of another seed is refused and left
        alone."""
        for name, seed in (("a", 2), ("b", 3)):
            data.draw_demo(self.folder / name, seed, scale=0.01)
        a, b = ({path.relative_to(self.folder / name): path.read_bytes()
                  for path in (self.folder / name).rglob("*.*") if path.is_file()}
                for name in "ab")
        self.assertEqual(a.keys(), b.keys())
        pictures = [path for path in a if "gt" not in path.parts and path.suffix == ".png"]
        self.assertGreater(len(pictures), 40)
        self.assertFalse([path for path in pictures if a[path] == b[path]])
        pool = data.find_samples(self.folder / "a", "stf", "train")
        self.assertEqual((len(pool), {s.label for s in pool}), (8, {None}))
        data.draw_demo(self.folder / "a", 2, scale=0.01)                    # there already
        with self.assertRaisesRegex(ValueError, "a holds demo streets of seed 2, asked for are "
                                                "demo streets of seed 3; name another folder"):
            data.draw_demo(self.folder / "a", 3, scale=0.01)
        self.assertEqual({path.relative_to(self.folder / "a"): path.read_bytes()
                          for path in (self.folder / "a").rglob("*.*") if path.is_file()}, a)

    def test_drawing_from_the_command_line(self):
        drawn = []
        for arguments, wanted in ((["--make-demo", "demo-2", "--seed", "2"], ("demo-2", 2)),
                                  (["--make-demo"], ("demo", 0)), ([], None)):
            with mock.patch.object(sys, "argv", ["data.py", *arguments]), \
                    mock.patch.object(data, "draw_demo", lambda *a: drawn.append(a)), \
                    contextlib.chdir(self.folder), self.assertRaises(FileNotFoundError):
                data.main()
            self.assertEqual(drawn.pop() if drawn else None, wanted)

    def test_layouts_and_determinism(self):
        data.draw_demo(self.folder / "a", scale=0.05)
        data.draw_demo(self.folder / "b", scale=0.05)
        files = sorted(path.relative_to(self.folder / "a")
                       for path in (self.folder / "a").rglob("*.png"))
        self.assertGreater(len(files), 50)
        for path in files:
            self.assertEqual((self.folder / "a" / path).read_bytes(),
                             (self.folder / "b" / path).read_bytes(), path)
        root = self.folder / "a"
        with contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(data.check(root, all_files=True), [])
        clear = data.gather(root, ("cityscapes",), "train", True)
        adverse = data.gather(root, ("acdc",), "val", True)
        self.assertEqual({s.condition for s in clear + adverse},
                         {"clear", "fog", "night", "rain", "snow"})
        self.assertTrue(data.gather(root, ("dark_zurich",), "train", False))
        seen, invalid_share, both = set(), [], 0
        for sample in clear + adverse:
            _, ids, invalid = data.read_sample(sample, 19)
            seen |= set(np.unique(ids).tolist())
            if invalid is not None:
                invalid_share.append(invalid.mean())
                both += (invalid & (ids != 255)).sum()
        self.assertEqual(seen, {*range(19), 255})
        self.assertTrue(0.005 < np.mean(invalid_share) < 0.25, invalid_share)
        self.assertGreater(both, 0)


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
class GpuTest(Temporary):
    def test_half_precision_follows_float32(self):
        device = torch.device("cuda")
        model = tiny_model().to(device).eval()
        images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8, device=device)
        with torch.no_grad():
            reference = model(images)
            for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
                with evaluate.autocast(device, dtype):
                    half = model(images).float()
                self.assertLess((half - reference).abs().max() / reference.abs().max(), tolerance)

    def test_depthwise_kernel_equals_float64(self):
        for shape in ((2, 40, 33, 17), (1, 96, 8, 130)):
            for dtype, tolerance in ((torch.float16, 1e-3), (torch.bfloat16, 6e-3)):
                x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
                grad = torch.randn(shape, device="cuda").to(dtype)
                taps = torch.randn(49, shape[1], device="cuda").to(dtype).requires_grad_()
                y = convnext.depthwise(x, taps)
                got = [y, *torch.autograd.grad(y, (x, taps), grad)]
                exact = [t.detach().double().requires_grad_() for t in (x, taps)]
                y = torch.nn.functional.conv2d(exact[0], exact[1].t().reshape(-1, 1, 7, 7),
                                               padding=3, groups=shape[1])
                expected = [y, *torch.autograd.grad(y, exact, grad.double())]
                for a, b in zip(got, expected):
                    self.assertLess((a.double() - b).norm() / b.norm(), tolerance)
                torch.library.opcheck(
                    convnext.depthwise, (x, taps),
                    test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))

    def test_compiled_depthwise_layer_equals_eager(self):
        layer = convnext.Depthwise(40).cuda()
        layer.weight.data = swiftnet.channels_last(layer.weight.data.normal_())
        layer.bias.data.normal_()
        x = torch.randn(2, 40, 33, 17, device="cuda").half().requires_grad_()
        grad = torch.randn(2, 40, 33, 17, device="cuda").half()
        runs = []
        for network in (layer, torch.compile(layer, fullgraph=True, dynamic=False)):
            with evaluate.autocast(x.device, torch.float16):
                y = network(x)
            runs.append([y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)])
        for eager, compiled in zip(*runs):
            self.assertLess((eager - compiled).norm() / eager.norm(), 0.01)
        self.assertEqual(runs[1][2].stride(), layer.weight.stride())     # DDP copies others

    def test_compiled_equals_eager(self):
        model = tiny_model().cuda().train()
        images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8, device="cuda")
        runs = []
        for network in (model, torch.compile(model, fullgraph=True, dynamic=False)):
            model.zero_grad()
            with evaluate.autocast(torch.device("cuda"), torch.float16):
                logits = network(images)
            logits.float().square().mean().backward()
            runs.append([logits.detach().float(), *(p.grad.clone() for p in model.parameters())])
        logits, gradients = ([r[0] for r in runs],
                             [torch.cat([g.flatten() for g in r[1:]]) for r in runs])
        for eager, compiled in (logits, gradients):
            self.assertLess((eager - compiled).norm() / eager.norm(), 0.05)

    def test_graph_of_the_forward_equals_eager(self):
        model = tiny_model().cuda().eval()
        network = torch.compile(model, dynamic=False, mode="reduce-overhead")
        for _ in range(4):                       # runs, is recorded, is replayed with other images
            images = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8, device="cuda")
            with torch.inference_mode(), evaluate.autocast(images.device, torch.float16):
                eager, graph = model(images), network(images)
            self.assertLess((eager - graph).norm() / eager.norm(), 0.05)

    def test_distances_and_metrics_equal_the_cpu(self):
        areas = torch.randint(0, 4, (2, 40, 60)).repeat_interleave(5, 1).repeat_interleave(5, 2)
        far = torch.zeros(2, 300, 300, dtype=torch.uint8)             # the answer lies rows away
        far[0, 150, 150], far[1, 0, 0], far[1, 299, 299] = 1, 1, 2
        for labels in (areas, far):
            self.assertTrue(torch.equal(losses.boundary_distance(labels.cuda()).cpu(),
                                        losses.boundary_distance(labels)))
            self.assertTrue(torch.equal(losses.boundary_weights(labels.cuda()).cpu(),
                                        losses.boundary_weights(labels)))
        logits = torch.randn(2, 4, 200, 300)
        ours, theirs = evaluate.Metrics(4), evaluate.Metrics(4, device="cuda")
        ours.update(logits, areas)
        theirs.update(logits.cuda(), areas.cuda())
        self.assertTrue(torch.equal(ours.counts["confusion"], theirs.counts["confusion"].cpu()))
        self.assertAlmostEqual(ours.compute()["auiou"], theirs.compute()["auiou"], places=4)


@unittest.skipUnless("--slow" in sys.argv, "long: run with --slow")
class SlowTest(Temporary):
    """The promises of the demo, on the whole of it: about 20 minutes on two cores."""

    def run_demo(self, *arguments):
        result = subprocess.run(command("train.py", "--demo", *arguments, processes=2),
                                cwd=self.folder, env=environment(), capture_output=True, text=True,
                                check=True)
        table = re.findall(r"^(\w+) +\d+ +\d+ +([\d.]+) .* ([+-][\d.]+)$", result.stdout, re.M)
        return {name: (float(miou), float(gain)) for name, miou, gain in table}

    def test_demo(self):
        both = self.run_demo()
        self.assertEqual(set(both), {"all", "clear", "fog", "night", "rain", "snow"})
        for condition, (_, gain) in both.items():
            self.assertGreaterEqual(gain, 30, condition)
        clear_only = self.run_demo("--train", "cityscapes", "--out", "runs/clear")
        for condition in ("night", "fog"):
            self.assertGreaterEqual(clear_only["clear"][0] - clear_only[condition][0], 10,
                                    condition)


@unittest.skipUnless("--slow" in sys.argv, "long: run with --slow")
class KillTest(RunTest):
    """SIGKILL at random moments; the same command continues; the end is that of a calm run."""

    # How often what is killed. write: everything, while a checkpoint is being written. loader: a
    # loader worker. rank: one process of two. launcher: torchrun alone. all: everything at once.
    KILLS = {1: {"write": 16, "loader": 9, "all": 28},
             2: {"write": 16, "loader": 7, "rank": 9, "launcher": 11, "all": 12}}
    STEPS = 60

    def begun(self, out):
        """What changes when a start of a run has cut its log."""
        return (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_ino

    def strike(self, kind, process, out, begun, before, random):
        """Kill a training run at a random moment. False where it ended before."""
        if kind in ("all", "launcher") and random.random() < 0.4:      # any moment, the start too
            moment = time.monotonic() + random.uniform(0, 5)
            if not self.wait(process, lambda: time.monotonic() > moment):
                return False
        else:
            if kind == "write":
                (self.folder / "slow").touch()
            if not self.wait(process, lambda: self.begun(out) != begun and any(
                    record.get("step", -1) > before for record in self.log(out))):
                return False
            living = members(str(out))
            for left in out.glob(".*.tmp"):
                self.assertIn(int(left.name.split(".")[-2]), living, "of a killed process")
            time.sleep(random.uniform(0, 0.5))
            if kind == "write":
                if not self.wait(process, (self.folder / "inside").exists):
                    return False
                time.sleep(random.uniform(0, 0.2))
        if not self.kill(kind, process, out, random):
            return False
        self.inside += kind == "write" and (self.folder / "inside").exists()
        return True

    def train_and_kill(self, processes):
        arguments = self.small_run(self.STEPS)
        random, plan = np.random.default_rng(processes), self.KILLS[processes]
        kinds = random.permutation(np.repeat(list(plan), list(plan.values()))).tolist()
        tried, calm, self.inside = len(kinds), self.folder / "calm", 0
        self.finish(processes, "train", arguments, calm)
        for chain in itertools.count():
            out, step = self.folder / f"killed{chain}", -1
            while kinds and step < self.STEPS:
                begun = self.begun(out)
                process = self.start(processes, "train", arguments, out)
                if self.strike(kinds[-1], process, out, begun, step, random):
                    kinds.pop()
                for name in ("slow", "inside"):
                    (self.folder / name).unlink(missing_ok=True)
                process.wait()
                if step >= 0 or (out / "last.pt").exists():          # whole, whenever that was
                    step = swiftnet.read_checkpoint(out / "last.pt")["step"]
            if step < self.STEPS:
                self.finish(processes, "train", arguments, out)
            self.assert_same_run(calm, out, self.STEPS)
            self.assertEqual({path.name for path in out.iterdir()},
                             {".lock", "last.pt", "best.pt", "log.jsonl"})
            self.assertNotIn('train.py", line', Path(f"{out}.txt").read_text())   # no traceback
            if not kinds:
                break
        ended = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in self.slowest.items())
        print(f"train.py, {processes} processes: {tried} of {tried} kills survived in {chain + 1} "
              f"runs ({', '.join(f'{n} {kind}' for kind, n in plan.items())}; {self.inside} inside "
              f"a checkpoint write); slowest end after a kill: {ended}", flush=True)
        self.assertGreaterEqual(self.inside, 13)

    def test_one_process(self):
        self.train_and_kill(1)

    def test_two_processes(self):
        self.train_and_kill(2)

    def test_pseudolabels(self):
        """20 kills of a pool run, restarted: the files of a calm run, byte for byte."""
        for i in range(60):
            put(self.folder / f"data/pool/{'ab'[i % 2]}/{i}.png", picture(i, 90 + i, 70))
        with mock.patch.dict(convnext.SIZES, convnext_atto=((1, 1, 1, 1), (8, 16, 24, 32))):
            torch.manual_seed(0)
            write_checkpoint(self.folder / "model.pt", swiftnet.build("convnext_atto", width=16))
        arguments = ("--checkpoint", self.folder / "model.pt", "--data", self.folder / "data",
                     "--pools", self.folder / "data/pool", "--threshold", 0.05, "--workers", 1)

        def files(out):
            return {path.relative_to(out): path.read_bytes()
                    for path in out.rglob("*") if path.is_file()}
        random, kills, partial = np.random.default_rng(0), 0, 0
        for processes in (1, 2):
            calm = self.folder / f"calm{processes}"
            began = time.monotonic()
            self.finish(processes, "pseudolabel", arguments, calm)
            length = time.monotonic() - began
            for chain in itertools.count():
                out = self.folder / f"killed{processes}-{chain}"
                while kills < 10 * processes:
                    before = len(list(out.rglob("*.png")))
                    process = self.start(processes, "pseudolabel", arguments, out)
                    if random.random() < 0.7:               # while labels are written
                        alive = self.wait(process, lambda: len(list(out.rglob("*.png"))) > before)
                        moment = time.monotonic() + random.uniform(0, 0.5)
                    else:                                   # any moment, the start too
                        alive, moment = True, time.monotonic() + random.uniform(0, length)
                    if not (alive and self.wait(process, lambda: time.monotonic() > moment)):
                        self.assertEqual(process.returncode, 0)
                        break
                    kinds = ["all", "rank", "launcher"] if processes > 1 else ["all"]
                    self.assertTrue(self.kill(random.choice(kinds), process, out, random))
                    kills, labels = kills + 1, len(list(out.rglob("*.png")))
                    partial += 0 < labels < 60
                self.finish(processes, "pseudolabel", arguments, out)
                self.assertEqual(files(out), files(calm))
                if kills == 10 * processes:
                    break
        print(f"pseudolabel.py, 1 and 2 processes: {kills} of 20 kills survived, {partial} of "
              "them with some labels written and some not", flush=True)
        self.assertGreaterEqual(partial, 5)


# --- tests of the tests --------------------------------------------------------------------------
#
# python test_all.py --mutations [N] [--seed S] breaks one line of a copy of the project and runs
# the tests that must notice: every row of MUTATIONS, then N operators at random places. What
# survives is listed, to be read: a gap in the tests, or a change that changes nothing.

MUTATIONS = (             # file, what stands there once, what stands there instead, who must notice
    ("losses.py", "1 - torch.exp(-nll.detach())", "1 - torch.exp(-nll)", "LossTest"),
    ("losses.py", "squared < edge * edge", "squared <= edge * edge", "LossTest"),
    ("losses.py", "normalizer.clamp(min=1)", "normalizer", "LossTest"),
    ("convnext.py", "if packed or wrong:", "if packed:", "PropertyTest"),
    ("convnext.py", "start <= end <= len(data)", "start <= end", "CatalogueTest"),
    ("convnext.py", "if end - start != count * dtype.itemsize:", "if False:", "CatalogueTest"),
    ("swiftnet.py", "blend(resize(x, skip.shape[-2:]) + skip)",
     "blend(resize(x, skip.shape[-2:]) - skip)", "SwiftNetTest"),
    ("swiftnet.py", "pyramid[level + i] = pyramid[level + i] + project(feature)",
     "pyramid[level + i] = project(feature)", "SwiftNetTest"),
    ("swiftnet.py", "    if compiling():", "    if x.is_cuda and compiling():", "SpeedTest"),
    ("swiftnet.py", "logits.flip(-1) if mirrored", "logits if mirrored", "SwiftNetTest"),
    ("data.py", "FLIP_LEFT_RIGHT) if flip else part",
     'FLIP_LEFT_RIGHT) if flip and part.mode == "RGB" else part', "PropertyTest"),
    ("data.py", "(corner[1] + size[1]) * y", "(corner[1] + size[0]) * y", "DataTest"),
    ("data.py", "* batch + rank * share", "* batch", "DataTest"),
    ("data.py", 'or ".." in Path(n).parts', "", "PropertyTest"),
    ("data.py", "if invalid.max() > 1:", "if invalid.max() > 255:", "CatalogueTest"),
    ("data.py", "if not 0 < weight <= 1000:", "if not 0 <= weight <= 1000:", "CatalogueTest"),
    ("data.py", "if image.width * image.height > MOST_PIXELS:", "if False:", "CatalogueTest"),
    ("data.py", "                temporary.unlink()\n", "                pass\n", "DataTest"),
    ("data.py", 'for left in folder.rglob(".*.tmp"):', "for left in ():", "TrainTest"),
    ("evaluate.py", "                dist.all_reduce(count)\n", "                pass\n",
     "ProcessTest"),
    ("evaluate.py", "share = samples[rank::world]", "share = samples[0::world]", "ProcessTest"),
    ("evaluate.py", "union = truth[:, None] + false_positive", "union = truth[:, None]",
     "MetricsTest"),
    ("evaluate.py", "confusion.sum(1), confusion.sum(0)", "confusion.sum(0), confusion.sum(0)",
     "MetricsTest"),
    ("evaluate.py", "self.edges, right=True)", "self.edges)", "MetricsTest"),
    ("pseudolabel.py", "kept = q >= thresholds[ids]", "kept = q <= thresholds[ids]",
     "PseudolabelTest"),
    ("train.py", "0.5 * (1 + math.cos", "0.5 * (1 - math.cos", "TrainTest"),
    ("train.py", '.get("step", 0) <= step', '.get("step", 0) < step', "FaultTest"),
    ("train.py", 'if (state["step"] < state["total"] or', 'if (state["step"] <= state["total"] or',
     "TrainTest"),
    ("train.py", 'results["all"]["miou"] > standing["best"]',
     'results["all"]["miou"] != standing["best"]', "TrainTest"),
    ("train.py", "            dist.broadcast(buffer, 0)\n", "            pass\n",
     "ProcessTest"),
    ("train.py", "get_scale() < LEAST_SCALE", "get_scale() < 0", "FaultTest"),
    ("train.py", "normalizer=shared[0])", "normalizer=None)", "ProcessTest"))
COVERED = {"convnext.py": "BackboneTest SwiftNetTest CatalogueTest",
           "swiftnet.py": "SwiftNetTest PropertyTest CatalogueTest SpeedTest",
           "losses.py": "LossTest ProcessTest",
           "data.py": "DataTest PropertyTest CatalogueTest MistakeTest TrainTest FaultTest",
           "evaluate.py": "MetricsTest BudgetTest TemperatureTest LadderTest.test_table "
                          "CatalogueTest EvaluateScriptTest",
           "pseudolabel.py": "CatalogueTest PseudolabelTest",
           "train.py": "CatalogueTest MistakeTest TrainTest FaultTest ProcessTest"}
SWAPPED = {"+": "-", "-": "+", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
           "0": "1", "1": "0", "and": "or", "or": "and", "not": "", "min": "max", "max": "min"}
MUTATION_SECONDS = 600


def random_mutation(rng):
    """(file, line, column, word there, word instead) of a random operator of the ten files' code;
    what draws the demo, benchmarks, or runs on a GPU alone is left out."""
    name = rng.choice(list(COVERED))
    text = (HERE / name).read_text()
    left_out = set()
    for begin, end in (("# --- demo streets", "# --- the script"),
                       ("# --- benchmark", "\ndef main("), ("# --- depthwise kernel", "")):
        if begin in text:
            first = text[:text.index(begin)].count("\n")
            stop = text.find(end, text.index(begin)) if end else len(text)
            left_out |= {*range(first, text[:stop].count("\n") + 1)}
    places = [(token.start, token.string)
              for token in tokenize.generate_tokens(io.StringIO(text).readline)
              if token.string in SWAPPED and token.start[0] not in left_out]
    (line, column), word = places[rng.integers(len(places))]
    return name, line, column, word, SWAPPED[word]


def mutations(count, seed):
    """Print what of MUTATIONS and of `count` random ones is caught; exit status 1 where a row of
    MUTATIONS is not."""
    folder, rng = Path(tempfile.mkdtemp(prefix="swiftnet-")), np.random.default_rng(seed)
    copied = (*HERE.glob("*.py"), HERE / "README.md", *HERE.glob(".ladder"))
    survivors, caught = [], {"none": 0, "chosen": 0, "random": 0}

    def notice(kind, name, text, about, classes):
        for path in copied:
            shutil.copy(path, folder)
        (folder / name).write_text(text)
        began, log = time.monotonic(), folder / "output"
        with open(log, "w") as output:
            process = subprocess.Popen(
                [sys.executable, folder / "test_all.py", "--failfast", *classes.split()],
                stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"},
                cwd=folder)
            try:
                process.wait(MUTATION_SECONDS)
            except subprocess.TimeoutExpired:                          # it hangs: that is noticed
                for pid in members(str(folder)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
        failed = re.search(r"^(?:FAIL|ERROR): (\w+) \(__main__\.(\w+)", log.read_text(), re.M)
        by = f"{failed[2]}.{failed[1]}" if failed else f"exit status {process.returncode}"
        seen = process.returncode != 0
        caught[kind] += seen
        word = "caught  " if seen else "passed  " if kind == "none" else "SURVIVED"
        print(f"{word} {time.monotonic() - began:6.1f} s  {about}"
              + (f"  by {by}" if seen else f"  ({classes})"), flush=True)
        if not seen:
            survivors.append(about)

    try:
        for tests in sorted({*" ".join((*COVERED.values(), *(m[3] for m in MUTATIONS))).split()}):
            notice("none", "README.md", (HERE / "README.md").read_text(), "nothing is changed",
                   tests)
            if not survivors:
                sys.exit(f"{tests} fails without a mutation: mend that first")
            survivors.clear()
        for name, old, new, tests in MUTATIONS:
            text, about = (HERE / name).read_text(), f"{name}: {old.strip()!r} -> {new.strip()!r}"
            if text.count(old) == 1:
                notice("chosen", name, text.replace(old, new), about, tests)
            else:
                survivors.append(f"{about}: stands there {text.count(old)} times, expected once; "
                                 "mend the table")
                print("FAILED  " + survivors[-1], flush=True)
        for _ in range(count):
            name, line, column, word, instead = random_mutation(rng)
            lines = (HERE / name).read_text().splitlines(keepends=True)
            there = lines[line - 1]
            lines[line - 1] = there[:column] + instead + there[column + len(word):]
            about = f"{name}:{line}: {there.strip()!r} -> {lines[line - 1].strip()!r}"
            notice("random", name, "".join(lines), about, COVERED[name])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\nsurvivors:\n" + "\n".join(survivors or ["none"]))
    print(f"mutations caught: {caught['chosen']} of {len(MUTATIONS)} chosen, {caught['random']} of "
          f"{count} random (seed {seed})", flush=True)
    sys.exit(caught["chosen"] < len(MUTATIONS))


class Result(unittest.TextTestResult):
    """Counts what passed and times every test."""
    passed, began = 0, 0.0

    def startTest(self, test):
        super().startTest(test)
        self.began = time.monotonic()

    def addSuccess(self, test):
        self.stream.write(f"{time.monotonic() - self.began:6.1f} s  ")
        super().addSuccess(test)
        self.passed += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="Class or Class.test (default: all)")
    parser.add_argument("--slow", action="store_true", help="run the long ones too")
    parser.add_argument("--failfast", action="store_true", help="stop at the first failure")
    parser.add_argument("--mutations", type=int, nargs="?", const=0, metavar="N",
                        help="break chosen lines and N random operators instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random operators")
    given = parser.parse_args()
    if given.mutations is not None:
        mutations(given.mutations, given.seed)
    torch.set_num_threads(1)     # as fast for tests this small, and the same numbers on any machine
    loader, module = unittest.TestLoader(), sys.modules[__name__]
    suite = (loader.loadTestsFromNames(given.tests, module) if given.tests
             else loader.loadTestsFromModule(module))
    result = unittest.TextTestRunner(resultclass=Result, verbosity=2,
                                     failfast=given.failfast).run(suite)
    failed = len(result.failures) + len(result.errors)
    print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
