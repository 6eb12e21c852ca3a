"""ConvNeXt backbone: four feature maps of an image, and a reader for every published checkpoint.

    from convnext import convnext
    backbone = convnext("convnext_large", pretrained="in22k_1k_384")
    features = backbone(images)        # strides 4, 8, 16, 32

Liu et al., "A ConvNet for the 2020s", CVPR 2022. The three sizes below nano follow the
timm library.
"""

import json
import math
import os
import re
import warnings
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

try:                                       # comes inside the CUDA build of torch
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SIZES = {  # name -> (blocks per stage, channels per stage)
    "convnext_atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnext_femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnext_pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnext_nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}

# Published weights: size -> source -> file. The five large sizes come from the authors of the
# paper, the four small ones from timm. XLarge was never trained on ImageNet-1k alone.
AUTHORS = "https://dl.fbaipublicfiles.com/convnext/"
TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-rsb-weights/"
WEIGHTS = {
    "convnext_atto": {"in1k": TIMM + "convnext_atto_d2-01bb0f51.pth"},
    "convnext_femto": {"in1k": TIMM + "convnext_femto_d1-d71d5b4c.pth"},
    "convnext_pico": {"in1k": TIMM + "convnext_pico_d1-10ad7f0d.pth"},
    "convnext_nano": {"in1k": TIMM + "convnext_nano_d1h-7eb4bdea.pth"},
    **{f"convnext_{size}": {"in1k": f"{AUTHORS}convnext_{size}_1k_224_ema.pth",
                            "in22k": f"{AUTHORS}convnext_{size}_22k_224.pth",
                            "in22k_1k_384": f"{AUTHORS}convnext_{size}_22k_1k_384.pth"}
       for size in ("tiny", "small", "base", "large")},
    "convnext_xlarge": {"in22k": AUTHORS + "convnext_xlarge_22k_224.pth",
                        "in22k_1k_384": AUTHORS + "convnext_xlarge_22k_1k_384_ema.pth"},
}
SOURCES = ("in1k", "in22k", "in22k_1k_384")


def compiling():
    """Whether torch.compile traces the network. For torch.export, whose graphs should hold no
    operators of ours, the answer is no."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W).
    In channels-last memory both permutes are free."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Depthwise(nn.Conv2d):
    """Depthwise 7x7 convolution. Compiled for a GPU in half precision it is the kernel at the end
    of this file: the same sums, faster than the stock one (README, "Speed")."""

    def __init__(self, dim):
        super().__init__(dim, dim, 7, padding=3, groups=dim)

    def forward(self, x):
        if triton is not None and x.is_cuda and compiling():
            half = (torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda")
                    else x.dtype)
            if half in (torch.float16, torch.bfloat16):
                # permuted first, so that the gradient has the weight's strides, as DDP wants it
                taps = self.weight.to(half).permute(0, 2, 3, 1).reshape(-1, 49).t().contiguous()
                return depthwise(x.to(half), taps) + self.bias.to(half)[:, None, None]
        return super().forward(x)


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm, inverted bottleneck, layer scale;
    the residual is dropped per sample.

    The pointwise convolutions are linear layers on (B, H, W, C): the same map, and the faster form
    in channels-last memory, where the permutes below only relabel the axes.
    """

    def __init__(self, dim, drop_path=0.0, layer_scale=1e-6):
        super().__init__()
        self.dwconv = Depthwise(dim)
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

    depths, dims: blocks and channels per stage. drop_path: rate of the last block, rising linearly
    from 0. layer_scale: initial gamma (1e-6 suits 300 epochs; short runs from scratch need
    about 0.1). `checkpoint_blocks = True` recomputes each block in the backward pass and keeps
    only its input.
    """

    def __init__(self, depths, dims, drop_path=0.0, layer_scale=1e-6):
        super().__init__()
        self.depths, self.dims = tuple(depths), tuple(dims)
        self.checkpoint_blocks = False
        total = sum(depths)
        rates = [drop_path * i / max(total - 1, 1) for i in range(total)]
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, dims)):
            if i == 0:
                down = [nn.Conv2d(3, dim, 4, stride=4), ChannelNorm(dim, eps=1e-6)]
            else:
                down = [ChannelNorm(dims[i - 1], eps=1e-6),
                        nn.Conv2d(dims[i - 1], dim, 2, stride=2)]
            self.downsample_layers.append(nn.Sequential(*down))
            first = sum(depths[:i])
            self.stages.append(nn.Sequential(
                *(Block(dim, rates[first + j], layer_scale) for j in range(depth))))
        self.apply(initialise)

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


def initialise(module):
    """Truncated normal with deviation 0.02 for weights, 0 for biases (Liu et al., appendix A)."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def convnext(name, pretrained=None, drop_path=0.0, layer_scale=1e-6):
    """A backbone of SIZES, with random weights or those of `pretrained` (see load_pretrained)."""
    if name not in SIZES:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(SIZES)}")
    backbone = ConvNeXt(*SIZES[name], drop_path=drop_path, layer_scale=layer_scale)
    if pretrained is not None:
        load_pretrained(backbone, pretrained)
    return backbone


# --- checkpoints --------------------------------------------------------------------------------

# Each layout: (a name that only this layout has, [(pattern of its names, ours)], names to leave
# out). What matches neither list is an error, so nothing is lost in silence.
LAYOUTS = {
    "facebook": (r"stages\.0\.0\.dwconv\.weight", [], r"(norm|head)\.(weight|bias)"),
    "torchvision": (r"features\.1\.0\.layer_scale", [
        *((rf"features\.{2 * i}\.([01])\.(weight|bias)", rf"downsample_layers.{i}.\1.\2")
          for i in range(4)),
        *((rf"features\.{2 * i + 1}\.(\d+)\.{theirs}", rf"stages.{i}.\1.{ours}")
          for i in range(4) for theirs, ours in (
              (r"block\.0\.(weight|bias)", r"dwconv.\2"), (r"block\.2\.(weight|bias)", r"norm.\2"),
              (r"block\.3\.(weight|bias)", r"pwconv1.\2"),
              (r"block\.5\.(weight|bias)", r"pwconv2.\2"), (r"layer_scale", "gamma"))),
    ], r"classifier\.[02]\.(weight|bias)"),
    "timm": (r"stages\.0\.blocks\.0\.conv_dw\.weight", [
        (r"stem\.([01])\.(weight|bias)", r"downsample_layers.0.\1.\2"),
        (r"stages\.(\d)\.downsample\.([01])\.(weight|bias)", r"downsample_layers.\1.\2.\3"),
        (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw\.(weight|bias)", r"stages.\1.\2.dwconv.\3"),
        (r"stages\.(\d)\.blocks\.(\d+)\.norm\.(weight|bias)", r"stages.\1.\2.norm.\3"),
        (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)", r"stages.\1.\2.pwconv\3.\4"),
        (r"stages\.(\d)\.blocks\.(\d+)\.gamma", r"stages.\1.\2.gamma"),
    ], r"(norm_pre|head\.norm|head\.fc)\.(weight|bias)"),
    "huggingface": (r"encoder\.stages\.0\.layers\.0\.dwconv\.weight", [
        (r"embeddings\.patch_embeddings\.(weight|bias)", r"downsample_layers.0.0.\1"),
        (r"embeddings\.layernorm\.(weight|bias)", r"downsample_layers.0.1.\1"),
        (r"encoder\.stages\.(\d)\.downsampling_layer\.([01])\.(weight|bias)",
         r"downsample_layers.\1.\2.\3"),
        (r"encoder\.stages\.(\d)\.layers\.(\d+)\.(dwconv|pwconv1|pwconv2)\.(weight|bias)",
         r"stages.\1.\2.\3.\4"),
        (r"encoder\.stages\.(\d)\.layers\.(\d+)\.layernorm\.(weight|bias)",
         r"stages.\1.\2.norm.\3"),
        (r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer_scale_parameter",
         r"stages.\1.\2.gamma"),
    ], r"(layernorm|classifier)\.(weight|bias)"),
}


def load_pretrained(backbone, source):
    """Fill `backbone` from published weights, or raise ValueError / FileNotFoundError;
    no third way.

    source: "in1k" | "in22k" | "in22k_1k_384" (looked up in WEIGHTS), a URL, a path (torch zip or
    safetensors, told apart by content) or a state dict, in the layout of the paper's authors,
    torchvision, timm or Hugging Face. Classifier and final norm are left out by name; every other
    name must match, and every tensor's shape.
    """
    where = source if isinstance(source, (str, os.PathLike)) else "the state dict"
    if isinstance(source, str) and source in SOURCES:
        source = published_url(backbone, source)
    if isinstance(source, str) and source.startswith(("https://", "http://", "file://")):
        source = download(source)
    state = source if isinstance(source, dict) else read_tensors(source)
    for wrapper in ("model", "state_dict"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    state = rename(state, where)

    expected = backbone.state_dict()
    for name, tensor in state.items():
        # torchvision keeps gamma as (C, 1, 1), timm's small sizes linear weights as 1x1
        # convolutions.
        if name in expected and tensor.shape == (*expected[name].shape, 1, 1):
            state[name] = tensor.reshape(expected[name].shape)
    wrong = [f"{name} is {tuple(state[name].shape)} in the file, "
             f"{tuple(expected[name].shape)} in the model"
             for name in expected if name in state and state[name].shape != expected[name].shape]
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if wrong or missing or unexpected:
        raise ValueError(f"{where} does not fit this backbone (depths {backbone.depths}, dims "
                         f"{backbone.dims}): " + "; ".join(
                             f"{title}: {shorten(names)}" for title, names in
                             (("wrong shape", wrong), ("missing", missing),
                              ("unexpected", unexpected))
                             if names) + ". Choose the backbone that the file was made for")
    backbone.load_state_dict(state)


def rename(state, where):
    """The state dict under this module's names. Raises ValueError for a layout that is
    not known."""
    state = {name.removeprefix("module.").removeprefix("convnext."): tensor   # of DDP, Hugging Face
             for name, tensor in state.items()}
    for marker, rules, left_out in LAYOUTS.values():
        if not any(re.fullmatch(marker, name) for name in state):
            continue
        renamed = {}
        for name, tensor in state.items():
            if re.fullmatch(left_out, name):
                continue
            for pattern, ours in rules:
                if match := re.fullmatch(pattern, name):
                    renamed[match.expand(ours)] = tensor
                    break
            else:
                renamed[name] = tensor               # reported as unexpected by the caller
        return renamed
    raise ValueError(f"{where} holds no ConvNeXt in the layout of {', '.join(LAYOUTS)}; "
                     f"its names begin with: {shorten(state, 3)}")


def shorten(names, most=8):
    """The first few of many names, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def published_url(backbone, source):
    """URL of the published weights of this backbone's size.
    Raises ValueError for a pair not published."""
    for name, shape in SIZES.items():
        if shape == (backbone.depths, backbone.dims):
            if source in WEIGHTS[name]:
                return WEIGHTS[name][source]
            raise ValueError(f"{name} was never published as {source!r}; there is "
                             + ", ".join(repr(known) for known in WEIGHTS[name]))
    raise ValueError(f"no published weights for depths {backbone.depths}, dims {backbone.dims}; "
                     "give a path, or one of the sizes " + ", ".join(SIZES))


def download(url):
    """Path of the file behind `url`, fetched once into torch.hub's folder."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, os.path.basename(url))
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", os.path.basename(url))   # timm's names carry one
        try:                                     # writes a temporary file and renames it
            torch.hub.download_url_to_file(url, path, digest and digest[1], progress=False)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"cannot fetch {url} ({error}); download it elsewhere and put "
                                    f"it at {path}, or name a file of your own") from None
    return path


def read_tensors(path):
    """Contents of a torch file (plain values only) or a safetensors file, told apart by content.

    Returns the dict that the file holds, tensors on the CPU.
    Raises FileNotFoundError or ValueError.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):     # a pipe would be waited for
            raise ValueError(f"{path} is no file; expected a file of weights")
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise FileNotFoundError(f"cannot open the weights {path}: {error.strerror}") from None
    if start[8:9] == b"{":
        return read_safetensors(path)
    check_zip(path)
    try:
        with warnings.catch_warnings(action="ignore"):           # of old pickles
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # torch.load raises a dozen kinds for a damaged file; all mean this
        refused = re.search(r"GLOBAL (\S+) was|unsupported GLOBAL (\S+)", str(error))
        reason = (f"it holds a {refused[1] or refused[2]}" if refused else
                  "damaged, or of another format")
        raise ValueError(f"{path} is no torch file of tensors and plain values, nor safetensors: "
                         f"{reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    return content


def check_zip(path):
    """Raise ValueError where a record of a torch file does not match its CRC-32. torch.save writes
    the sums and torch.load does not look at them: a flipped bit would be a weight."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch stores records as they are: no file unpacks to more than its own size
            packed = any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist())
            wrong = None if packed else archive.testzip()
    except Exception:        # no zip, or one cut short: torch.load knows older formats, and says so
        return
    if packed or wrong:
        raise ValueError(f"{path} is damaged: "
                         + (f"its record {wrong} does not match its checksum" if wrong else
                            "it is compressed, as torch never does")
                         + "; fetch or copy it anew, or take the run's other checkpoint")


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}


def read_safetensors(path):
    """Tensors of a safetensors file: 8 bytes header length, JSON header, raw little-endian data.

    Every length and offset is checked against the file before a byte of it is used.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > min(size - 8, 100_000_000):
            raise ValueError(f"{path}: header of {header_size} bytes in a file of {size}; damaged")
        try:
            header = json.loads(file.read(header_size))
            entries = [(name, SAFETENSORS[entry["dtype"]], [*entry["shape"]], start, end)
                       for name, entry in header.items() if name != "__metadata__"
                       for start, end in [entry["data_offsets"]]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: unreadable safetensors header ({error!r}); fetch it "
                             "anew") from None
        data = bytearray(file.read())
    tensors = {}
    for name, dtype, shape, start, end in entries:
        if not (all(type(n) is int and 0 <= n < 2 ** 40 for n in (*shape, start, end))
                and start <= end <= len(data) and len(shape) <= 8):
            raise ValueError(f"{path}: {name} lies outside the file; damaged or incomplete")
        count = math.prod(shape)
        if end - start != count * dtype.itemsize:
            raise ValueError(f"{path}: {name} has {end - start} bytes, shape {shape} needs "
                             f"{count * dtype.itemsize}")
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start) if count else \
            torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
    return tensors


# --- depthwise kernel -----------------------------------------------------------------------------

if triton is not None:
    # A program's tile: rows, columns, channels; and its warps.
    TILE, WARPS = (8, 8, 64), 4

    @triton.jit
    def depthwise_kernel(x, taps, y, height, width, channels, ROWS: tl.constexpr,
                         COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
        """y = x * taps (7x7, zero padding), per channel. x and y (B, H, W, C), taps (49, C);
        sums in float32.

        A program walks down its columns once for each dx: the 7 taps of that dx stay in registers,
        and a row, once read, is added to every output row (up to 7) that it belongs to.
        """
        depths, across = tl.cdiv(channels, CHANNELS), tl.cdiv(width, COLUMNS)
        channel = tl.program_id(0) % depths * CHANNELS + tl.arange(0, CHANNELS)
        known = channel < channels
        tile = tl.program_id(0) // depths
        top = tile // across * ROWS
        column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        image = tl.program_id(1).to(tl.int64) * height * width * channels
        totals = (tl.zeros((COLUMNS, CHANNELS), tl.float32),) * ROWS
        for dx in range(7):
            beside = column + dx - 3
            inside = ((beside >= 0) & (beside < width))[:, None] & known[None, :]
            start = x + image + beside[:, None] * channels + channel[None, :]
            weights = ()
            for dy in tl.static_range(7):
                weight = tl.load(taps + (dy * 7 + dx) * channels + channel, known, 0.0)
                weights += (weight.to(tl.float32)[None, :],)
            for i in tl.static_range(ROWS + 6):
                source = top + i - 3
                value = tl.load(start + source * width * channels,
                                inside & (source >= 0) & (source < height), 0.0).to(tl.float32)
                sums = ()
                for row in tl.static_range(ROWS):
                    if i - row >= 0 and i - row < 7:
                        sums += (totals[row] + value * weights[i - row],)
                    else:
                        sums += (totals[row],)
                totals = sums
        inside = (column < width)[:, None] & known[None, :]
        for row in tl.static_range(ROWS):
            where = image + ((top + row) * width + column)[:, None] * channels + channel[None, :]
            tl.store(y + where, totals[row].to(y.dtype.element_ty), inside & (top + row < height))

    # Operators of their own: torch.compile need not look into the kernel at each of its many uses,
    # and hands over their arguments in the memory order that they had when it traced the network.
    @torch.library.custom_op("swiftnet::depthwise", mutates_args=())
    def depthwise(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
        """Depthwise 7x7 of (B, C, H, W) x and (49, C) taps, both of one half-precision type, on a
        GPU. The result is in channels-last memory. Raises ValueError for images that the kernel's
        32-bit places cannot reach."""
        x, taps = x.contiguous(memory_format=torch.channels_last), taps.contiguous()
        batch, channels, height, width = x.shape
        if channels * (height + 16) * (width + 16) >= 2 ** 31:
            raise ValueError(f"features of {channels} x {height} x {width} are too large for the "
                             "compiled depthwise layer; use a smaller crop, or do not compile")
        y = torch.empty_like(x, memory_format=torch.channels_last)
        rows, columns, depth = TILE
        tiles = triton.cdiv(height, rows) * triton.cdiv(width, columns)
        grid = (tiles * triton.cdiv(channels, depth), batch)
        depthwise_kernel[grid](x, taps, y, height, width, channels, *TILE, num_warps=WARPS)
        return y

    @torch.library.custom_op("swiftnet::depthwise_taps", mutates_args=())
    def depthwise_taps(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """Gradient (C, 49) of depthwise's taps. cuDNN's is the fastest in channels-last memory."""
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
        channels = x.shape[1]
        weight = x.new_empty(channels, 1, 7, 7)                        # only its shape counts
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, (1, 1), (3, 3), (1, 1), False, (0, 0), channels,
            (False, True, False))[1].reshape(channels, 49)

    @depthwise.register_fake
    def _(x, taps):
        return torch.empty_like(x, memory_format=torch.channels_last)

    @depthwise_taps.register_fake
    def _(x, grad):
        return x.new_empty(x.shape[1], 49)

    def save_inputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def depthwise_backward(ctx, grad):
        x, taps = ctx.saved_tensors
        return depthwise(grad, taps.flip(0)), depthwise_taps(x, grad).t()    # taps turned by 180

    depthwise.register_autograd(depthwise_backward, setup_context=save_inputs)
