"""Two runs' films of the same episodes, side by side, as one GIF.

    for run in A B; do
      python trqam_offline.py --eval-only --capture-video --checkpoint runs/$run/checkpoint.pt
    done
    python benchmarks/side_by_side.py runs/A/videos runs/B/videos --output film.gif

Evaluations of equal seeds start their episodes equally, so that each pair begins from one state. An
episode that ends earlier keeps its last frame while the other goes on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from moviepy import VideoFileClip
from PIL import Image, ImageDraw


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, Path]]
    """folders of films, as --capture-video writes them"""
    labels: tuple[str, str] = ("behaviour cloning", "fine-tuned")
    """what stands above each"""
    size: int = 160
    """pixels of each film's side"""
    every: int = 4
    """of so many frames, one is kept"""
    output: Path = Path("film.gif")
    """the GIF"""


def frames_of(path: Path, args: Args) -> list[Image.Image]:
    """Every so manieth frame of a film, made smaller, and its last."""
    frames = [Image.fromarray(frame) for frame in VideoFileClip(str(path)).iter_frames()]
    kept = [*frames[:: args.every], frames[-1]]
    return [frame.resize((args.size, args.size), Image.Resampling.LANCZOS) for frame in kept]


def main(args: Args):
    films = [sorted(folder.glob("*.mp4")) for folder in args.folders]
    if not films[0] or len(films[0]) != len(films[1]):
        sys.exit(f"error: {args.folders[0]} has {len(films[0])} films, {args.folders[1]} has "
                 f"{len(films[1])}: as many are needed in both")
    pictures = []
    for pair in zip(*films):
        left, right = (frames_of(path, args) for path in pair)
        for i in range(max(len(left), len(right)) + 4):  # the last ones stand for a moment
            both = [frames[min(i, len(frames) - 1)] for frames in (left, right)]
            picture = Image.new("RGB", (2 * args.size, args.size + 16), "white")
            for place, (frame, label) in enumerate(zip(both, args.labels)):
                picture.paste(frame, (place * args.size, 16))
                ImageDraw.Draw(picture).text((place * args.size + 4, 2), label, fill="black")
            pictures.append(picture)
    colours = Image.fromarray(np.concatenate([np.asarray(x) for x in pictures[::10]]))
    colours = colours.quantize(64)  # one palette for all, so that what stands still costs nothing
    small = [picture.quantize(palette=colours, dither=Image.Dither.NONE) for picture in pictures]
    small[0].save(args.output, save_all=True, append_images=small[1:], duration=80, loop=0)
    print(f"{args.output}: {len(small)} frames, {args.output.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Args))
