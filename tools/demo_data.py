"""Draw the demo's data: textured shapes with exact masks, the same pictures for the same seed.

python tools/demo_data.py work_dirs/demo/data [--seed 0]

Three tasks, so that the base of Dynamic Tuning (DyT) is pre-trained on something else than what it is tuned for:
`cls/{train,val}/<shape>_<texture>/*.png`, one shape: which shape in which texture? `seg/`, a few shapes, one hiding
another, in ADE20K layout: which texture where? Annotation 1 is the background, 2, 3 ... the textures in the order of
`TEXTURES`, 0 (ignored) a line of clutter. And `clips/{train,val}/*.avi` with lists "name label" beside them, one shape
that moves: in which of the `DIRECTIONS`? Each clip is there twice, forwards and backwards: the same frames, another
answer. So a model that is blind to the order of frames is right on one of the two at most, 50 % in all.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from mmdyt.files import whole_file, whole_path, write_text

SHAPES = ('disc', 'triangle', 'ring', 'cross')
TEXTURES = ('plain', 'rows', 'columns', 'checker', 'dots')
DIRECTIONS = ('right', 'left', 'down', 'up')  # each axis forwards, then backwards
CLS_SIZE, SEG_SIZE = 48, 80  # pixels; the position embeddings are stretched from one to the other
CLIP_SIZE, FRAMES = 32, 4  # decord 0.6.0 cannot read clips 16, 24, 48 or 72 pixels wide


def rotated_grid(size: int, centre: tuple[float, float], angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (u, v) of each pixel, each (size, size), in axes through ``centre`` turned by ``angle`` (radians)."""
    y, x = np.mgrid[:size, :size] - np.reshape(centre, (2, 1, 1))
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def shape_mask(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which pixels the shape covers; it lies within the unit circle of (u, v)."""
    if shape == 'triangle':
        return np.maximum(v, abs(u) * 0.75**0.5 - v / 2) <= 0.5
    if shape == 'cross':
        return (np.minimum(abs(u), abs(v)) <= 0.28) & (np.maximum(abs(u), abs(v)) <= 0.95)
    radius = np.hypot(u, v)
    return (radius <= 0.9) & (radius >= (0.5 if shape == 'ring' else 0))


def texture_mask(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which pixels have the second colour; the pattern has period 1 in (u, v)."""
    if texture == 'rows':
        return v % 1 < 0.5
    if texture == 'columns':
        return u % 1 < 0.5
    if texture == 'checker':
        return (u % 1 < 0.5) ^ (v % 1 < 0.5)
    if texture == 'dots':
        return np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.35
    return np.zeros_like(u, bool)


def draw_shape(
    rng: np.random.Generator,
    image: np.ndarray,
    shape: str,
    texture: str,
    radius: float,
    shift: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Paint a shape of random place, turn and colours into ``image`` (H, W, 3); return its mask (H, W).

    ``shift`` (y, x) moves the shape with its texture from that place.
    """
    size = len(image)
    centre = rng.uniform(radius * 0.8, size - radius * 0.8, 2) + shift
    u, v = rotated_grid(size, centre, rng.uniform(0, 2 * np.pi))
    mask = shape_mask(shape, u / radius, v / radius)
    u, v = rotated_grid(size, rng.uniform(0, size, 2) + shift, rng.uniform(-0.2, 0.2))
    period, colour = rng.uniform(5, 6), rng.uniform(150, 255, 3)
    image[mask] = colour * np.where(texture_mask(texture, u / period, v / period), 0.4, 1)[mask, None]
    return mask


def draw_ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """A slope between two dark colours, (size, size, 3)."""
    u, _ = rotated_grid(size, (size / 2, size / 2), rng.uniform(0, 2 * np.pi))
    return 45 + rng.uniform(-15, 15, 3) + u[..., None] / size * rng.uniform(-30, 30, 3)


def finish(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Add noise and round to 8 bits."""
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).round().astype(np.uint8)


def draw_single(rng: np.random.Generator, shape: str, texture: str) -> np.ndarray:
    """One picture of the classification task, (48, 48, 3)."""
    image = draw_ground(rng, CLS_SIZE)
    draw_shape(rng, image, shape, texture, rng.uniform(14, 22))
    return finish(rng, image)


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One picture (80, 80, 3) of the segmentation task and its annotation (80, 80)."""
    image = draw_ground(rng, SEG_SIZE)
    labels = np.ones((SEG_SIZE, SEG_SIZE), np.uint8)
    for _ in range(rng.integers(2, 5)):
        index = rng.integers(len(TEXTURES))
        labels[draw_shape(rng, image, rng.choice(SHAPES), TEXTURES[index], rng.uniform(14, 24))] = index + 2
    clutter = abs(rotated_grid(SEG_SIZE, rng.uniform(0, SEG_SIZE, 2), rng.uniform(0, np.pi))[0]) < 1
    image[clutter], labels[clutter] = rng.uniform(0, 255, 3), 0
    return finish(rng, image), labels


def draw_clip(rng: np.random.Generator, direction: str) -> np.ndarray:
    """One clip (T, 32, 32, 3) of a shape that moves evenly; the opposite direction gives the same frames backwards."""
    index = DIRECTIONS.index(direction)
    towards = np.eye(2)[1 - index // 2]  # (y, x)
    ground, look = draw_ground(rng, CLIP_SIZE), rng.integers(2**32)
    shape, texture, radius, speed = rng.choice(SHAPES), rng.choice(TEXTURES), rng.uniform(10, 13), rng.uniform(7, 8)
    frames = []
    for time in np.arange(FRAMES) - (FRAMES - 1) / 2:
        image = ground.copy()
        draw_shape(np.random.default_rng(look), image, shape, texture, radius, time * speed * towards)
        frames.append(finish(rng, image))
    return np.stack(frames[::-1] if index % 2 else frames)


def write_classification(root: Path, counts: dict[str, int], seed: int) -> None:
    """Write ``counts[split]`` pictures, the classes taking turns."""
    names = [(shape, texture) for shape in SHAPES for texture in TEXTURES]
    for split, count in counts.items():
        for i in range(count):
            shape, texture = names[i % len(names)]
            rng = np.random.default_rng([seed, 0, split == 'val', i])
            write_png(root / split / f'{shape}_{texture}' / f'{i:05d}.png', draw_single(rng, shape, texture))


def write_segmentation(root: Path, counts: dict[str, int], seed: int) -> None:
    """Write ``counts[split]`` pictures and annotations."""
    for split, count in counts.items():
        for i in range(count):
            rng = np.random.default_rng([seed, 1, split == 'validation', i])
            image, labels = draw_scene(rng)
            write_png(root / 'images' / split / f'{i:05d}.png', image)
            write_png(root / 'annotations' / split / f'{i:05d}.png', labels)


def write_clips(root: Path, counts: dict[str, int], seed: int) -> None:
    """Write ``counts[split]`` clips, the directions taking turns, and their lists."""
    for split, count in counts.items():
        lines = []
        for i in range(count):
            label, name = i % len(DIRECTIONS), f'{i:05d}.avi'
            rng = np.random.default_rng([seed, 2, split == 'val', i // 2])  # a pair is one clip and its reverse
            write_video(root / split / name, draw_clip(rng, DIRECTIONS[label]))
            lines.append(f'{name} {label}\n')
        write_text(root / f'{split}.txt', ''.join(lines))


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write losslessly (FFV1), making folders as needed: other codecs treat the first frame unlike the rest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_path(path, sync=False) as part:
        video = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*'FFV1'), FRAMES, frames.shape[2:0:-1])
        if not video.isOpened():
            raise SystemExit(f'error: OpenCV cannot write {path}: it was built without FFmpeg, or the disk is full.')
        for frame in frames:
            video.write(frame)
        video.release()


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write losslessly, making folders as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, 'wb', sync=False) as stream:
        stream.write(cv2.imencode('.png', pixels)[1])


def main(argv: list[str] | None = None) -> None:
    """Write the three data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', type=Path, help='folder to write to')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--scale', type=float, default=1.0, help='factor on the number of files, in (0, 1]')
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f'--seed must be at least 0, got {args.seed}.')
    if not 0 < args.scale <= 1:
        parser.error(f'--scale must lie in (0, 1], got {args.scale}.')
    classes = len(SHAPES) * len(TEXTURES)  # each split of the classification task has all of them
    train, val = (max(classes, round(count * args.scale)) for count in (4000, 400))
    write_classification(args.root / 'cls', dict(train=train, val=val), args.seed)
    train, val = (max(1, round(count * args.scale)) for count in (800, 100))
    write_segmentation(args.root / 'seg', dict(training=train, validation=val), args.seed)
    quads = {split: max(1, round(count * args.scale)) for split, count in dict(train=200, val=50).items()}
    write_clips(args.root / 'clips', {split: len(DIRECTIONS) * count for split, count in quads.items()}, args.seed)


if __name__ == '__main__':
    main()
