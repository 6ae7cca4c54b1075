"""Make src/tunemri/sample/brain.h5, the scan that ships with tunemri.

    python recipes/make_sample.py mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz src/tunemri/sample/brain.h5

The template lies in nilearn's package (`pip download nilearn --no-deps`, nilearn/datasets/data/ in the wheel). Its
notice must stay beside the result, see NOTICE.txt there. The same template gives the same file, byte for byte.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import torch

from tunemri.fourier import crop
from tunemri.masks import make_mask
from tunemri.simulate import simulate

SLICE = 86  # ventricles, basal ganglia and cortex
SHAPE = (208, 176)
ACCELERATION = 4
NOISE = 0.01


def main(template: Path, output: Path) -> None:
    volume = np.asarray(nibabel.load(template).dataobj, dtype=np.float32)
    # Axes are x to the right, y to the front, z up: turn so that the front is on top.
    plane = torch.from_numpy(np.rot90(volume[:, :, SLICE]).copy())
    image = crop(plane / plane.max(), SHAPE)[None]

    scan, target = simulate(
        image, mask=make_mask("poisson", SHAPE, ACCELERATION), coils=8, noise=NOISE, mask_name="Poisson disk"
    )
    assert scan.mask is not None and scan.noise_std is not None

    # Like the converter of a receiver: steps of at most an eighth of the noise. This adds at most 1/384 of the noise
    # energy, and leaves so few bits in each number that the file stays below 500 kB.
    step = 2.0 ** math.floor(math.log2(scan.noise_std / 8))
    kspace = scan.kspace.numpy()
    kspace = (np.round(kspace.view(np.float32) / step) * np.float32(step)).view(np.complex64)

    packed = {"compression": "gzip", "compression_opts": 9, "shuffle": True, "fletcher32": True, "track_times": False}
    with h5py.File(output, "w", libver="earliest") as file:
        file.create_dataset("kspace", data=kspace, chunks=(1, 1, *SHAPE), **packed)
        file.create_dataset("mask", data=scan.mask[0, 0].numpy().astype(np.uint8), **packed)
        reference = target.abs().numpy()
        # The template has eight bits; so has its magnitude, up to rounding in the phase factor.
        reference = (np.round(reference * float(plane.max())) / float(plane.max())).astype(np.float32)
        file.create_dataset("reconstruction_rss", data=reference, **packed)
        file.attrs.update(
            acquisition="AXT1",
            patient_id="ICBM 152 template",
            provenance=f"{scan.provenance}; object: ICBM 152 T1 template, slice {SLICE}, see NOTICE.txt",
            noise_std=scan.noise_std,
            acceleration=scan.acceleration,
            voxel_size=(1.0, 1.0, 1.0),
            max=float(reference.max()),
            norm=float(np.linalg.norm(reference)),
        )
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB, {scan.provenance}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
