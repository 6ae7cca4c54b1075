"""deepinv on our scan, and our model in deepinv: a posterior sampler, then one table for all.

    python examples/deepinv_sampler.py              needs: pip install ".[deepinv]"

deepinv's Langevin sampler draws images of the embedded brain scan through our operator, with deepinv's total variation
denoiser as the prior (nothing is downloaded). The chain is short and warm, to be done within a minute: its mean is an
image, its spread shows what data and prior leave open, not yet a calibrated error bar. Then `deepinv.test` scores our
`hyper-brain` at both ends of its dial, and deepinv's denoiser in our RED, beside zero-filling.
"""

from __future__ import annotations

import deepinv
import torch

import tunemri
from tunemri import metrics
from tunemri.adapters import RED, to_channels, to_complex, to_physics, to_reconstructor

ITERATIONS = 300

scan, target = tunemri.sample()
ready = tunemri.methods.prepare(scan)  # coil maps, and a scale that makes images reach about 1
reference = target / ready.scale.to(target.dtype)[:, None, None]
physics = to_physics(tunemri.encoding(ready), noise_std=ready.noise_std)
y = to_channels(ready.kspace)

# p(x | y) ∝ exp(-‖A x - y‖² / 2s² - α R(x)). The step stays below 1 / (1/s² + α/σ²); s is above the noise of the scan,
# 0.008 in either part, because the chain is slow in proportion to 1/s².
s, sigma, alpha = 0.02, 0.03, 1.0
sampler = deepinv.sampling.sampling_builder(
    "ULA",
    data_fidelity=deepinv.optim.L2(sigma=s),
    prior=deepinv.optim.ScorePrior(deepinv.models.TVDenoiser(n_it_max=10)),
    params_algo={"step_size": 0.8 / (1 / s**2 + alpha / sigma**2), "alpha": alpha, "sigma": sigma},
    max_iter=ITERATIONS,
    burnin_ratio=0.3,
    thinning=5,
)
mean, variance = sampler.sample(y, physics, x_init=physics.A_adjoint(y), seed=0)
image, spread = to_complex(mean).abs(), variance.sum(1).sqrt()
inside = metrics.foreground(reference)
print(f"mean of the draws: PSNR {metrics.psnr(image, reference):.2f} dB")
print(
    f"in the head: error {float((image - reference).abs()[inside].mean()):.4f}, spread {float(spread[inside].mean()):.4f}"
)

pairs = [{"x": x, "y": k} for x, k in zip(to_channels(reference + 0j), y, strict=True)]
hyper = tunemri.load("hyper-brain")
rows = {
    "zero-filled": to_reconstructor(tunemri.load("zero-filled")),
    "hyper-brain, ssim=0": to_reconstructor(hyper, ssim=0.0),
    "hyper-brain, ssim=1": to_reconstructor(hyper, ssim=1.0),
    "RED of TVDenoiser": to_reconstructor(RED(deepinv.models.TVDenoiser(n_it_max=10)), sigma=0.02),
}
print(f"\n{'deepinv.test':22}{'PSNR':>8}{'SSIM':>8}")
for name, model in rows.items():
    found = deepinv.test(
        model,
        torch.utils.data.DataLoader(pairs),
        physics,
        metrics=[metric(max_pixel=None, complex_abs=True) for metric in (deepinv.metric.PSNR, deepinv.metric.SSIM)],
        verbose=False,
        non_blocking_transfers=False,
    )
    print(f"{name:22}{found['PSNR']:8.2f}{found['SSIM']:8.4f}")
