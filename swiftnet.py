"""SwiftNet-pyramid: one ConvNeXt on three resolutions, fused as a pyramid, upsampled by a ladder.

    python swiftnet.py        prints parameters and multiply-accumulates of every size

    from swiftnet import load_checkpoint, predict
    model, checkpoint = load_checkpoint("runs/demo/best.pt")
    logits = predict(model, image)     # image (3, H, W) uint8 -> logits (C, H, W) float32

Orsic and Segvic, "Efficient semantic segmentation with pyramidal fusion", Pattern Recognition 2021;
"the deck": Grcic, "Large-scale semantic segmentation ...", Vision for All Seasons, CVPR 2022."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convnext import SIZES, convnext, read_tensors

MEAN = (123.675, 116.28, 103.53)       # ImageNet, in grey levels of 0..255
STD = (58.395, 57.12, 57.375)
PADDING_COLOUR = (124, 116, 104)       # MEAN in uint8: what lies beyond an image
LARGEST_SHORT_SIDE = 1080              # larger photos are brought to this, to train and to predict
LADDER = {"convnext_large": 320, "convnext_xlarge": 320,            # width; 128 for smaller sizes
          **dict.fromkeys(("convnext_tiny", "convnext_small", "convnext_base"), 256)}


def bn_relu_conv(inputs, outputs, kernel, bias=False):
    """Pre-activation unit. Without a bias where the next BatchNorm would cancel it."""
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(),
                         nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias))


def resize(x, size):
    """Bilinear interpolation of (B, C, H, W) to size (height, width), pixel centres aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class SwiftNet(nn.Module):
    """Logits at the size of the image. backbone: gives features of strides 4, 8, 16, 32 and their
    widths in `.dims`. width: channels of the pyramid and the ladder. levels: resolutions."""

    def __init__(self, backbone, num_classes=19, width=256, levels=3):
        super().__init__()
        self.backbone = backbone
        self.num_classes, self.width, self.levels = num_classes, width, levels
        self.lateral = nn.ModuleList(                              # a set of projections per level
            nn.ModuleList(bn_relu_conv(dim, width, 1) for dim in backbone.dims)
            for _ in range(levels))
        self.ladder = nn.ModuleList(bn_relu_conv(width, width, 3) for _ in range(levels + 2))
        self.head = bn_relu_conv(width, num_classes, 1, bias=True)
        for name, rgb in (("mean", MEAN), ("std", STD), ("padding", PADDING_COLOUR)):
            self.register_buffer(name, torch.tensor(rgb).float().view(3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """images: (B, 3, H, W) uint8, or float in 0..255; any H, W. Returns logits (B, C, H, W)."""
        height, width = images.shape[-2:]
        coarsest = 32 * 2 ** (self.levels - 1)                     # stride of the coarsest feature
        x = F.pad(images - self.padding, (0, -width % coarsest, 0, -height % coarsest))
        x = (x + self.padding - self.mean) / self.std              # the padding is PADDING_COLOUR
        padded = x.shape[-2:]
        x = x.contiguous(memory_format=torch.channels_last)        # LayerNorm and Linear need it

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
        full = torch.promote_types(x.dtype, torch.float32)         # in half, best classes would tie
        return resize(self.head(x).to(full), padded)[..., :height, :width]


def build(backbone="convnext_large", num_classes=19, width=None, levels=3, pretrained=None,
          drop_path=0.0, layer_scale=1e-6):
    """SwiftNet on a backbone of convnext.SIZES. `pretrained` as in convnext.load_pretrained."""
    return SwiftNet(convnext(backbone, pretrained, drop_path, layer_scale), num_classes,
                    width or LADDER.get(backbone, 128), levels)


def compiled(network):
    """torch.compile, `resize` left eager: its compiled gradients are wrong on a CPU (torch 2.13),
    and four times slower on a GPU."""
    global resize
    resize = torch.compiler.disable(resize)
    return torch.compile(network, dynamic=False)


# --- prediction ---------------------------------------------------------------------------------

def load_checkpoint(path, device="cpu"):
    """Model in eval mode, and the plain values beside the tensors in a checkpoint of train.py."""
    state = read_tensors(path)
    try:
        model = build(**{**state["architecture"], "pretrained": None})
        model.load_state_dict(state["model"])
        if len(state["classes"]) != model.num_classes:
            raise ValueError(f"{len(state['classes'])} names for {model.num_classes} classes")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = "see train.py --pretrained; " + " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no checkpoint of train.py: {reason}") from None
    return model.to(device).eval(), {k: state[k] for k in state.keys() - {"model", "optimizer"}}


@torch.inference_mode()
def predict(models, image, scales=(1.0,), flip=False, tile=None):
    """Logits of one image, averaged over models, scales and the mirrored image.

    models: one model or several with the same classes, in eval mode. image: (3, H, W) uint8. Its
    short side is brought to LARGEST_SHORT_SIDE where it is larger, as in training; `scales` count
    from there. tile: side of overlapping tiles, for images that do not fit at once (see
    forward_tiled). Returns (C, H, W) float32 on the models' device."""
    if not all(0 < scale <= 16 for scale in scales):
        raise ValueError(f"--scales must lie in (0, 16], found {scales}")
    models = [models] if isinstance(models, nn.Module) else models
    image = image.to(models[0].mean.device)[None]
    size, total = image.shape[-2:], 0
    for scale in scales:
        scale = scale * min(1, LARGEST_SHORT_SIDE / min(size))
        scaled = image if scale == 1 else F.interpolate(
            image.float(), size=[max(1, round(side * scale)) for side in size], mode="bilinear",
            align_corners=False, antialias=scale < 1)
        for model in models:
            for mirrored in (False, True) if flip else (False,):
                logits = forward_tiled(model, scaled.flip(-1) if mirrored else scaled, tile)
                logits = logits.flip(-1) if mirrored else logits
                total = total + (logits if scale == 1 else resize(logits, size)).float()
    return total[0] / (len(scales) * len(models) * (2 if flip else 1))


def forward_tiled(model, images, tile=None):
    """Logits of (B, 3, H, W), computed on tiles of `tile` pixels that overlap by half. Of each the
    quarter at every inner edge is dropped (the near one cut, the far one overwritten by the next
    tile): exact where the receptive field ends within it, else close."""
    height, width = images.shape[-2:]
    least = 512 * 2 ** max(0, model.levels - 2)
    if tile and (tile < 0 or tile % least):
        raise ValueError(f"--tile must be a multiple of {least} pixels, found {tile}")
    if not tile or tile >= max(height, width):
        return model(images)
    logits = images.new_empty(len(images), model.num_classes, height, width, dtype=torch.float32)
    for top in range(0, max(1, height - tile // 2), tile // 2):
        for left in range(0, max(1, width - tile // 2), tile // 2):
            part = model(images[..., top:top + tile, left:left + tile])
            y, x = tile // 4 * (top > 0), tile // 4 * (left > 0)
            logits[..., top + y:top + tile, left + x:left + tile] = part[..., y:, x:]
    return logits


def count_macs(model, height, width):
    """Multiply-accumulates of convolutions and linear layers for one image, as an int."""
    model = copy.deepcopy(model).to("meta").eval()                 # shapes alone, no arithmetic
    image = torch.empty(1, 3, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2


def main():
    print("SwiftNet-pyramid, 19 classes, one 1024x2048 image; deck: base 957.1, large 2067.3\n"
          f"{'backbone':<16} {'width':>5} {'Mparams':>8} {'GMACs':>8}")
    for name in SIZES:
        with torch.device("meta"):
            model = build(name)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name:<16} {model.width:>5} {millions:8.2f} "
              f"{count_macs(model, 1024, 2048) / 1e9:8.2f}")


if __name__ == "__main__":
    main()
