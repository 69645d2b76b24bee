"""Runs an exported detector on a grey image: python load_detector.py detector.stablehlo image.npy found.npz"""

import sys
from pathlib import Path

import jax
import jax.export  # reads the file by the package flatbuffers
import numpy as np

file, image, out = sys.argv[1:]
detector = jax.jit(jax.export.deserialize(bytearray(Path(file).read_bytes())).call)
found = jax.device_get(detector(np.load(image)[None]))  # of uint8 [1, h, w]
print(f"score {found['score'][0]:.4f}, {found['mask'].sum()} defective pixels")
np.savez(out, **found)
