"""SwiftNet-pyramid: one ConvNeXt on three resolutions, fused as a pyramid,
upsampled by a lean ladder.

    python swiftnet.py        prints parameters and multiply-accumulates of every size

    from swiftnet import build, load_checkpoint, predict
    model, checkpoint = load_checkpoint("runs/demo/best.pt")
    logits = predict(model, image)     # image (3, H, W) uint8 -> logits (C, H, W) float32

Orsic and Segvic, "Efficient semantic segmentation with pyramidal fusion", Pattern Recognition 2021;
Grcic, "Large-scale semantic segmentation through multi-resolution processing and selective
pseudolabeling", Vision for All Seasons, CVPR 2022 ("the deck").
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from convnext import SIZES, compiling, convnext, read_tensors

MEAN = (123.675, 116.28, 103.53)       # ImageNet, in grey levels of 0..255
STD = (58.395, 57.12, 57.375)
DECK_GMACS = {"convnext_base": 957.1, "convnext_large": 2067.3}      # at 1024x2048, deck, table 1


def bn_relu_conv(inputs, outputs, kernel, bias=False):
    """Pre-activation unit. Without bias where a sum and a BatchNorm follow, which would undo it."""
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(),
                         nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias))


class SwiftNet(nn.Module):
    """Logits at the size of the image.

    backbone: gives features of strides 4, 8, 16, 32 and their widths in `.dims`.
    width: channels of the pyramid and the ladder.
    levels: resolutions (1 is the single-scale SwiftNet).
    """

    def __init__(self, backbone, num_classes=19, width=256, levels=3):
        super().__init__()
        self.backbone = backbone
        self.num_classes, self.width, self.levels = num_classes, width, levels
        self.lateral = nn.ModuleList(                              # a set of projections per level
            nn.ModuleList(bn_relu_conv(dim, width, 1) for dim in backbone.dims)
            for _ in range(levels))
        self.ladder = nn.ModuleList(bn_relu_conv(width, width, 3) for _ in range(levels + 2))
        self.head = bn_relu_conv(width, num_classes, 1, bias=True)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        for module in self.modules():              # weights in the layout that their gradients have
            if isinstance(module, nn.Conv2d):
                module.weight.data = channels_last(module.weight.data)

    def forward(self, images):
        """images: (B, 3, H, W) uint8, or float in 0..255; any H, W. Returns logits (B, C, H, W)."""
        height, width = images.shape[-2:]
        x = (images.float() - self.mean) / self.std
        coarsest = 32 * 2 ** (self.levels - 1)                     # stride of the coarsest feature
        x = F.pad(x, (0, -width % coarsest, 0, -height % coarsest))    # 0 is the mean colour here
        padded = x.shape[-2:]
        # Channels-last from here on: LayerNorm and the pointwise layers need it,
        # the rest gains by it.
        x = x.contiguous(memory_format=torch.channels_last)

        pyramid = [0] * (self.levels + 3)                          # strides 4, 8, ... coarsest
        for level, lateral in enumerate(self.lateral):
            if level > 0:
                x = F.avg_pool2d(x, 2)                             # the image at 1/2, 1/4, ...
            for i, (project, feature) in enumerate(zip(lateral, self.backbone(x))):
                pyramid[level + i] = pyramid[level + i] + project(feature)    # equal stride: sum

        x = pyramid.pop()
        for blend in self.ladder:                                  # from the coarsest stride to 4
            skip = pyramid.pop()
            x = blend(resize(x, skip.shape[-2:]) + skip)
        logits = resize(self.head(x), padded)
        return logits[..., :height, :width]


def channels_last(weight):
    """A convolution weight (O, I, h, w) in channels-last strides. `Tensor.to` would leave depthwise
    ones (I = 1) as they are, since their order is ambiguous, and DDP would copy every gradient of
    theirs."""
    return weight.permute(0, 2, 3, 1).clone(
        memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def resize(x, size):
    """Bilinear interpolation of (B, C, H, W) to size (height, width), pixel centres aligned."""
    if compiling():
        x = x.float() if torch.is_autocast_enabled("cuda") else x      # as autocast does below
        return compiled_resize(x, *size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


# torch.compile would take interpolate apart. On a CPU it then gets gradients wrong (torch 2.13: of
# most weights they are 0), on a GPU its backward pass is one of atomic additions, four times slower
# than the stock one, which would get its gradient in an order that is slow as well (README,
# "Speed"). As operators of our own both passes stay whole.
@torch.library.custom_op("swiftnet::resize", mutates_args=())
def compiled_resize(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """resize of (B, C, H, W) to (B, C, height, width), in channels-last memory."""
    y = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("swiftnet::resize_gradient", mutates_args=())
def resize_gradient(grad: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Gradient (B, C, height, width) of compiled_resize's x, in channels-last memory."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    gradient = torch.ops.aten.upsample_bilinear2d_backward(
        grad, grad.shape[2:], (*grad.shape[:2], height, width), False)
    return gradient.contiguous(memory_format=torch.channels_last)


@compiled_resize.register_fake
@resize_gradient.register_fake
def resized_like(x, height, width):
    """What both return, without its values."""
    return torch.empty(*x.shape[:2], height, width, dtype=x.dtype, device=x.device,
                       memory_format=torch.channels_last)


def resize_backward(ctx, grad):
    """Gradient of compiled_resize's x; the size has none."""
    return resize_gradient(grad, *ctx.size), None, None


def save_size(ctx, inputs, output):
    """Keep for the backward pass what it needs of x: its size."""
    ctx.size = inputs[0].shape[2:]


compiled_resize.register_autograd(resize_backward, setup_context=save_size)


def ladder_width(backbone):
    """Default ladder width of a backbone size. 256 and 320 reproduce the deck's GMACs for B
    and L."""
    dims = SIZES[backbone][1] if backbone in SIZES else (0,)
    return 128 if dims[0] < 96 else 256 if dims[0] <= 128 else 320


def build(backbone="convnext_large", num_classes=19, width=None, levels=3, pretrained=None,
          drop_path=0.0, layer_scale=1e-6):
    """SwiftNet on a backbone of convnext.SIZES. `pretrained` as in convnext.load_pretrained."""
    if not (1 <= levels <= 8 and 0 <= (width or 0) <= 4096 and 1 <= num_classes <= 2 ** 16):
        raise ValueError(f"{levels} levels, width {width}, {num_classes} classes: expected levels "
                         "in 1..8, width up to 4096, classes up to 65536")
    features = convnext(backbone, pretrained, drop_path, layer_scale)
    return SwiftNet(features, num_classes, width or ladder_width(backbone), levels)


ARCHITECTURE = {"backbone", "num_classes", "levels", "width", "drop_path", "layer_scale"}
CHECKPOINT = {"model": dict, "architecture": dict, "classes": tuple, "config": dict, "step": int,
              "total": int}


def read_checkpoint(path):
    """The state dict of a checkpoint that train.py wrote: tensors and plain values,
    with the keys of CHECKPOINT.

    Raises FileNotFoundError or ValueError.
    """
    state = read_tensors(path)
    wrong = [key for key, kind in CHECKPOINT.items() if not isinstance(state.get(key), kind)]
    # A tensor that is larger than its storage repeats numbers: a few bytes that ask for gigabytes.
    if wrong or not all(isinstance(value, torch.Tensor) and value.layout == torch.strided
                        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
                        for value in state["model"].values()):
        raise ValueError(f"{path} is no checkpoint of train.py (it lacks "
                         f"{', '.join(wrong) or 'tensors'}); ImageNet weights go to --pretrained")
    return state


def load_checkpoint(path, device="cpu"):
    """Model in eval mode and the state dict (read_checkpoint) of a checkpoint of train.py."""
    state = read_checkpoint(path)
    try:
        # no other argument: `pretrained` would let a stranger's file fetch or open another
        if unknown := state["architecture"].keys() - ARCHITECTURE:
            raise ValueError(f"unknown {', '.join(sorted(map(str, unknown)))}")
        with torch.device("meta"):                       # no memory before the shapes are right
            expected = build(**state["architecture"]).state_dict()
        if missing := expected.keys() - state["model"].keys():
            raise ValueError(f"it lacks {min(missing)}")
        for name in expected.keys() & state["model"].keys():
            if expected[name].shape != (found := state["model"][name].shape):
                raise ValueError(f"{name} is {tuple(found)}, not {tuple(expected[name].shape)}")
        model = build(**state["architecture"])
        model.load_state_dict(state["model"])
        if len(state["classes"]) != model.num_classes:
            raise ValueError(f"{len(state['classes'])} class names for {model.num_classes} classes")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit its own architecture {state['architecture']}: "
                         f"{str(error).splitlines()[-1].strip()[:200]}") from None
    return model.to(device).eval(), state


# --- prediction ---------------------------------------------------------------------------------

@torch.inference_mode()
def predict(models, image, scales=(1.0,), flip=False, tile=None):
    """Logits of one image, averaged over models, scales and the mirrored image.

    models: one model or several with the same classes, in eval mode. image: (3, H, W) uint8.
    tile: side in pixels of overlapping tiles for images that do not fit at once (see
    forward_tiled).
    Returns (C, H, W) float32 on the models' device. Memory: about three logit maps of the largest
    scale, whatever the number of scales and models.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    device = next(models[0].parameters()).device
    height, width = image.shape[-2:]
    image = image.to(device).unsqueeze(0)
    total = 0
    for scale in scales:
        scaled = image
        if scale != 1:
            size = (max(1, round(height * scale)), max(1, round(width * scale)))
            scaled = F.interpolate(image.float(), size=size, mode="bilinear", align_corners=False,
                                   antialias=scale < 1)
        for model in models:
            for mirrored in (False, True) if flip else (False,):
                x = scaled.flip(-1) if mirrored else scaled
                logits = forward_tiled(model, x, tile) if tile else model(x)
                logits = logits.flip(-1) if mirrored else logits
                if scale != 1:
                    logits = resize(logits, (height, width))
                total = total + logits.float()
    return total[0] / (len(scales) * len(models) * (2 if flip else 1))


def forward_tiled(model, images, tile):
    """Logits of (B, 3, H, W), computed on overlapping tiles of `tile` pixels.

    Tiles start at multiples of 128, so their feature grids coincide with those of the whole image
    (up to 3 levels); of each, the quarter at every inner edge is thrown away. What remains differs
    from the untiled logits only as far as the network looks beyond that margin: exactly equal where
    the receptive field ends inside the tile, close elsewhere.
    """
    if tile < 512 or tile % 512:
        raise ValueError(f"tile must be a multiple of 512 pixels, found {tile}")
    height, width = images.shape[-2:]
    margin = tile // 4
    step = tile - 2 * margin
    logits = None
    for top in range(0, max(1, height - 2 * margin), step):
        for left in range(0, max(1, width - 2 * margin), step):
            part = model(images[..., top:top + tile, left:left + tile])
            if logits is None:
                logits = part.new_empty(len(images), part.shape[1], height, width)
            y, x = margin * (top > 0), margin * (left > 0)
            logits[..., top + y:top + tile, left + x:left + tile] = part[..., y:, x:]
    return logits


# --- size ---------------------------------------------------------------------------------------

def count_macs(model, height, width):
    """Multiply-accumulates of convolutions and linear layers for one image, as an int.

    Runs the model on the meta device: shapes alone, no memory and no arithmetic.
    """
    tensors = {name: torch.empty_like(tensor, device="meta")
               for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    image = torch.empty(1, 3, height, width, device="meta")
    training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(model, tensors, (image,))
    model.train(training)
    return counter.get_total_flops() // 2


def main():
    """Print the size table."""
    print("SwiftNet-pyramid, 19 classes, GMACs of one 1024x2048 image "
          "(the deck's column beside ours)")
    print(f"{'backbone':<16} {'width':>5} {'Mparams':>8} {'GMACs':>8} {'deck':>8} {'deviation':>9}")
    for name in SIZES:
        with torch.device("meta"):
            model = build(name)
        params = sum(p.numel() for p in model.parameters()) / 1e6
        gmacs = count_macs(model, 1024, 2048) / 1e9
        deck = DECK_GMACS.get(name)
        beside = f"{deck:8.1f} {gmacs / deck - 1:+9.2%}" if deck else f"{'-':>8} {'-':>9}"
        print(f"{name:<16} {model.width:>5} {params:8.2f} {gmacs:8.2f} {beside}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
