"""Boundary-aware focal loss: distance of each pixel to the nearest other label, weights, loss.

Zhen et al., "Learning Fully Dense Neural Networks for Image Semantic Segmentation", AAAI 2019, in
the form of SwiftNet (Orsic and Segvic, Pattern Recognition 2021)."""

import torch
import torch.nn.functional as F

IGNORE = 255                     # pixels that nobody annotated
PADDING = 254                    # what a crop shows beyond the edge of its image
BINS = (4, 16, 64, 128)          # upper bounds of the distance bins, pixels
ALPHAS = (8, 6, 4, 2, 1)         # weight in each bin; the last one from BINS[-1] on
GAMMA = 0.5


def boundary_aware_focal_loss(logits, labels, weights, gamma=GAMMA, normalizer=None):
    """1/N * sum of weight * exp(gamma * (1 - p)) * -log p, p being the true class's probability.

    logits: (B, C, H, W), computed in float32. labels: (B, H, W) int64, 0..C-1, IGNORE or PADDING.
    weights: (B, H, W), 0 for these two. normalizer: N; None counts the pixels of positive weight.
    Returns a scalar, 0 but attached to the logits where no pixel counts, so that every process has
    a backward pass. The focal factor has no gradient; it lies in [1, e^gamma], unlike the
    (1 - p)^gamma of Lin et al. (ICCV 2017)."""
    labels = labels.masked_fill(labels == PADDING, IGNORE)
    nll = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    focal = torch.exp(gamma * (1 - torch.exp(-nll.detach())))                         # (B, H, W)
    if normalizer is None:
        normalizer = (weights > 0).sum()
    return (weights * focal * nll).sum() / torch.as_tensor(normalizer).clamp(min=1)


def boundary_weights(labels, bins=BINS, alphas=ALPHAS, ignore=IGNORE):
    """Weight of each pixel by its distance to the nearest other label (deck, part II).

    labels: (B, H, W) integers. Returns (B, H, W) float32: alphas[k] for the k-th distance bin, 0
    where labels == ignore or PADDING. Ignored pixels count as another label, the image edge does
    not, and neither does PADDING, which must fill whole rows and columns."""
    if len(alphas) != len(bins) + 1:
        raise ValueError(f"expected {len(bins) + 1} alphas for {len(bins)} bins, found {alphas}")
    squared = squared_boundary_distance(labels, bins[-1])
    weights = torch.full(labels.shape, float(alphas[-1]), device=labels.device)
    for edge, alpha in reversed(list(zip(bins, alphas))):
        weights = weights.masked_fill(squared < edge * edge, alpha)
    return weights.masked_fill((labels == ignore) | (labels == PADDING), 0)


def boundary_distance(labels):
    """Distance to the nearest other label, (B, H, W) float32; inf where an image has but one."""
    reach = sum(labels.shape[1:])                                  # beyond every distance
    squared = squared_boundary_distance(labels, reach)
    return squared.double().sqrt().float().masked_fill(squared == reach ** 2, torch.inf)


def squared_boundary_distance(labels, reach):
    """Squared distance to the nearest other label, reach^2 where it is that or more; (B, H, W).

    Two exact passes (Felzenszwalb and Huttenlocher, Theory of Computing 2012): along rows by
    run_distance; then, over offsets dy, the least dy^2 + the squared row distance at (y + dy, x).
    That distance is from the label there. Where it is not ours, (y + dy, x) is itself another
    label, and the distance along the column, where the minimum begins, is no longer."""
    row, column = (run_distance(labels, axis, reach) ** 2 for axis in (2, 1))
    best, height = torch.minimum(row, column), labels.shape[1]
    rows = min(height, reach)
    row = F.pad(row, (0, 0, rows, rows), value=reach * reach)
    for dy in range(1, rows):
        # Rows further off cannot help where all is nearer; asking a GPU would mean to wait for it.
        if not labels.is_cuda and dy % 8 == 1:
            if dy * dy >= best.masked_fill(labels == PADDING, 0).max():
                break
        nearest = torch.minimum(row[:, rows - dy:][:, :height], row[:, rows + dy:][:, :height])
        best = torch.minimum(best, nearest + dy * dy)
    return best


def run_distance(labels, axis, reach):
    """Distance along `axis` (1 or 2) to the nearest other label, at most `reach`."""
    size = labels.shape[axis]
    place = torch.arange(size, dtype=torch.int32, device=labels.device)
    place = place.view(-1, *(1,) * (2 - axis)).expand(labels.shape)
    one, next_one = labels.narrow(axis, 0, size - 1), labels.narrow(axis, 1, size - 1)
    change = (one != next_one) & (one != PADDING) & (next_one != PADDING)
    zero = place.narrow(axis, 0, 1)
    # position of the last pixel before with another label, and of the first one after
    before = torch.cat([zero - reach, place.narrow(axis, 0, size - 1).where(change, -reach)], axis)
    after = torch.cat([place.narrow(axis, 1, size - 1).where(change, size + reach),
                       zero + size + reach], axis)
    before, after = before.cummax(axis).values, after.flip(axis).cummin(axis).values.flip(axis)
    distance = torch.minimum(place - before, after - place).clamp(max=reach)
    return distance.to(torch.int16 if reach <= 128 else torch.int64)    # 128^2 + 127^2 < 2^15
