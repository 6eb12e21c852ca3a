"""ConvNeXt backbone: four feature maps of an image, and a reader for its published checkpoints.

    from convnext import convnext
    backbone = convnext("convnext_large", pretrained="in22k_1k_384")
    features = backbone(images)        # strides 4, 8, 16, 32

Liu et al., "A ConvNet for the 2020s", CVPR 2022. The sizes below tiny follow the timm library."""

import json
import math
import os
import re
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SIZES = {  # name -> (blocks per stage, channels per stage)
    f"convnext_{name}": (depths, (width, 2 * width, 4 * width, 8 * width))
    for name, width, depths in (
        ("atto", 40, (2, 2, 6, 2)), ("femto", 48, (2, 2, 6, 2)), ("pico", 64, (2, 2, 6, 2)),
        ("nano", 80, (2, 2, 8, 2)), ("tiny", 96, (3, 3, 9, 3)), ("small", 96, (3, 3, 27, 3)),
        ("base", 128, (3, 3, 27, 3)), ("large", 192, (3, 3, 27, 3)),
        ("xlarge", 256, (3, 3, 27, 3)))}

# Published weights: the five large sizes by the authors of the paper, the others by timm.
AUTHORS = "https://dl.fbaipublicfiles.com/convnext/"
TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-rsb-weights/"
WEIGHTS = {
    **{f"convnext_{size}": {"in1k": f"{TIMM}convnext_{size}_{digest}.pth"} for size, digest in (
        ("atto", "d2-01bb0f51"), ("femto", "d1-d71d5b4c"), ("pico", "d1-10ad7f0d"),
        ("nano", "d1h-7eb4bdea"))},
    **{f"convnext_{size}": {"in1k": f"{AUTHORS}convnext_{size}_1k_224_ema.pth",
                            "in22k": f"{AUTHORS}convnext_{size}_22k_224.pth",
                            "in22k_1k_384": f"{AUTHORS}convnext_{size}_22k_1k_384.pth"}
       for size in ("tiny", "small", "base", "large")},
    "convnext_xlarge": {"in22k": AUTHORS + "convnext_xlarge_22k_224.pth",
                        "in22k_1k_384": AUTHORS + "convnext_xlarge_22k_1k_384_ema.pth"}}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W). In channels-last memory permutes are free."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm, inverted bottleneck, layer scale; drop path per sample.

    The pointwise convolutions are linear layers on (B, H, W, C): the same map, and faster in
    channels-last memory, where the permutes only relabel the axes."""

    def __init__(self, dim, drop_path=0.0, layer_scale=1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = drop_path

    def forward(self, x):                                             # (B, C, H, W)
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))             # (B, H, W, C)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        if self.training and self.drop_path:                          # Huang et al., ECCV 2016
            keep = 1 - self.drop_path
            y = y * y.new_empty(len(y), 1, 1, 1).bernoulli_(keep) / keep
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Feature maps of the four stages. Parameter names are those of the paper's code.

    drop_path: rate of the last block, rising linearly from 0. layer_scale: initial gamma (1e-6
    suits 300 epochs, short runs from scratch need about 0.1). `checkpoint_blocks = True` recomputes
    each block in the backward pass and keeps only its input."""

    def __init__(self, depths, dims, drop_path=0.0, layer_scale=1e-6):
        super().__init__()
        self.depths, self.dims = tuple(depths), tuple(dims)
        self.checkpoint_blocks = False
        rates = iter(drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, dims)):
            if i == 0:
                down = [nn.Conv2d(3, dim, 4, stride=4), ChannelNorm(dim, eps=1e-6)]
            else:
                down = [ChannelNorm(dims[i - 1], eps=1e-6),
                        nn.Conv2d(dims[i - 1], dim, 2, stride=2)]
            self.downsample_layers.append(nn.Sequential(*down))
            self.stages.append(nn.Sequential(
                *(Block(dim, next(rates), layer_scale) for _ in range(depth))))
        for module in self.modules():                                 # Liu et al., appendix A
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        """x: (B, 3, H, W) float. Returns [(B, dims[i], H / 2^(i+2), W / 2^(i+2)) for i in 0..3]."""
        features = []
        for down, stage in zip(self.downsample_layers, self.stages):
            x = down(x)
            for block in stage:
                if self.checkpoint_blocks and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            features.append(x)
        return features


def convnext(name, pretrained=None, drop_path=0.0, layer_scale=1e-6):
    """A backbone of SIZES, with random weights or those of `pretrained` (see load_pretrained)."""
    backbone = ConvNeXt(*SIZES[name], drop_path=drop_path, layer_scale=layer_scale)
    if pretrained:
        load_pretrained(backbone, pretrained)
    return backbone


# --- checkpoints --------------------------------------------------------------------------------

RENAMES = (       # names of timm, torchvision, Hugging Face, mmpretrain -> ours, applied in turn
    (r"\.(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)", ""),
    (r"^(stem|stages)_", r"\1."), (r"^(stem|features\.0)\.", "downsample_layers.0."),
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^stages\.(\d)\.downsampl(?:e|ing_layer)\.", r"downsample_layers.\1."),
    (r"^features\.([246])\.", lambda match: f"downsample_layers.{int(match[1]) // 2}."),
    (r"^features\.([1357])\.", lambda match: f"stages.{int(match[1]) // 2}."),
    (r"^(stages\.\d)\.(blocks|layers)\.", r"\1."), (r"\.layer_scale(_parameter)?$", ".gamma"),
    (r"\.(conv_dw|block\.0|depthwise_conv)\.", ".dwconv."),
    (r"(?<=\d)\.(layernorm|block\.2)\.", ".norm."),
    (r"\.(mlp\.fc1|block\.3|pointwise_conv1)\.", ".pwconv1."),
    (r"\.(mlp\.fc2|block\.5|pointwise_conv2)\.", ".pwconv2."))
BACKBONE = r"(.*\.)?((downsample_layers|stages|stem|features|embeddings)[._].*)"


def networks_in(tree, path=""):
    """{prefix: {our name: tensor}} of what looks like a ConvNeXt in a checkpoint, at any depth.
    Classifiers, decoders and the norms of feature extractors have none of its names."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict) and not str(name).startswith("optim"):
            for prefix, tensors in networks_in(value, f"{path}{name}.").items():
                found.setdefault(prefix, {}).update(tensors)
        elif isinstance(value, torch.Tensor):
            if parts := re.fullmatch(BACKBONE, f"{path}{name}"):
                prefix, name = (parts[1] or "").replace("encoder.", ""), parts[2]
                for pattern, ours in RENAMES:
                    name = re.sub(pattern, ours, name)
                found.setdefault(prefix, {})[name] = value
    return found


def load_pretrained(backbone, source):
    """Fill `backbone` from published weights, or raise ValueError or OSError.

    source: "in1k" | "in22k" | "in22k_1k_384" (looked up in WEIGHTS), a URL, a path (torch or
    safetensors) or a state dict, named as the authors, torchvision, timm, Hugging Face or
    mmpretrain do, below any prefix. All names and shapes of the backbone must match; a classifier
    or decoder is left out. Of a network and its moving average (EMA) the average is taken."""
    where = source if isinstance(source, (str, os.PathLike)) else "the state dict"
    if source in ("in1k", "in22k", "in22k_1k_384"):
        size = (backbone.depths, backbone.dims)
        known = next((WEIGHTS[name] for name in SIZES if SIZES[name] == size), {})
        if source not in known:
            raise ValueError(f"{source} was not published for this size; there is "
                             f"{', '.join(known) or 'nothing'}; name that, or a file")
        source = known[source]
    if isinstance(source, str) and source.startswith("https://"):
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(source))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:                                    # writes a temporary file, then renames it
            os.path.exists(path) or torch.hub.download_url_to_file(source, path)
        except OSError as error:
            raise OSError(f"cannot fetch {source} ({error}); put it at {path}") from None
        source = path
    networks = networks_in(source if isinstance(source, dict) else read_tensors(source))
    expected = backbone.state_dict()
    whole = [prefix for prefix, tensors in networks.items() if {*expected} <= {*tensors}]
    averaged = [prefix for prefix in whole if re.search(r"(?i)(^|[^a-z])ema", prefix)]
    if averaged and len(whole) > 1:
        print(f"{where}: taking the moving average, {averaged[0]!r} of {whole}", flush=True)
    if len(averaged or whole) != 1 and len(networks) != 1:
        raise ValueError(f"{where}: expected one ConvNeXt that fits, found parts of one below "
                         f"{[*networks] or 'no name'}; give its state dict alone")
    tensors = networks[(averaged or whole or [*networks])[0]]
    for name, ours in expected.items():
        if name in tensors and tensors[name].shape == (*ours.shape, 1, 1):
            tensors[name] = tensors[name].reshape(ours.shape)     # 1x1 convolution -> linear, gamma
    try:
        backbone.load_state_dict(tensors)
    except RuntimeError as error:
        second = "it is a ConvNeXt V2. " * (".grn." in " ".join(tensors))
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{where} does not fit a ConvNeXt of depths {backbone.depths}, dims "
                         f"{backbone.dims}; choose the size it was made for. {second}{reason}"
                         ) from None


def read_tensors(path):
    """The dict in a torch file (tensors and plain values only) or a safetensors file, on the CPU.

    A torch file is checked against the CRC sums of its zip, which torch.load does not look at: a
    flipped bit would be a weight. Raises OSError or ValueError."""
    with open(path, "rb") as file:
        start = file.read(32)
    try:
        if start[8:9] == b"{":
            return read_safetensors(path)
        if zipfile.is_zipfile(path) and (broken := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"{broken} does not match its checksum")
        return {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:            # a damaged file makes torch.load raise a dozen kinds
        refused = re.search(r"GLOBAL (\S+)", str(error))        # what weights_only does not run
        raise ValueError(
            f"{path} holds a {refused[1]}, which could run code; where it comes from, save the "
            "tensors alone: torch.save(model.state_dict(), FILE)" if refused else
            f"{path} is damaged, or no dict of tensors and plain values; it begins with {start!r}: "
            f"{str(error).partition('. ')[0][:200]}") from None


DTYPES = {"F64": torch.double, "F32": torch.float, "F16": torch.half, "BF16": torch.bfloat16}


def read_safetensors(path):
    """Tensors of a safetensors file: 8 bytes header length, JSON header, raw little-endian data."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    return {name: torch.frombuffer(data, dtype=DTYPES[entry["dtype"]],
                                   count=math.prod(entry["shape"]), offset=entry["data_offsets"][0])
            .reshape(entry["shape"]) for name, entry in header.items() if entry["dtype"] in DTYPES}
