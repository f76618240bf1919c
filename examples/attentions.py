"""Look at the attentions of a head: its gates, offsets and switches, as numbers and as a picture.

For a trained detector there is a command: python -m dyhead_cuda attend photo.jpg --checkpoint RUN

    python examples/attentions.py [head.png]
"""

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

import dyhead_cuda
from dyhead_cuda.inspect import figure, record

torch.manual_seed(0)
head = dyhead_cuda.DyHead(16, 16, num_blocks=2)
levels = [torch.randn(1, 16, side, side) for side in (32, 16, 8)]  # of an image of 256 pixels

blocks = record.record(head, levels)  # per block, per level
for number, block in enumerate(blocks, 1):
    for level, found in enumerate(block):
        gates = ", ".join(f"{branch} {gate:.2f}" for branch, gate in found.gates.items())
        moved = found.offset.norm(dim=1).mean().item()
        first = found.share.mean().item()  # of the pixels, those that the first line switches
        print(
            f"block {number}, level {level}: gates {gates}; samples move by {moved:.2f} pixels; "
            f"the first line of the dynamic ReLU is taken for {first:.0%}"
        )

# Where the branch on the coarser level reads for the pixel in row 5, column 7 of the middle level.
read = record.samples(blocks[0], level=1, row=5, column=7, high_offset="flat")["high"]
y, x = read.positions[0].tolist()
print(f"{len(read.positions)} samples of level {read.level}, the first at y {y:.2f}, x {x:.2f}")

path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(), "head.png")
photograph = Image.effect_noise((256, 256), 60).convert("RGB")
figure.draw(photograph, blocks, path, "What a new head does")
print("picture:", path)
