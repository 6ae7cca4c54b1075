"""The mean of a network's weights at several times of its training, as one file.

    python recipes/mean_of_weights.py RUN/earlier.safetensors … RUN/model.safetensors -o MODEL.safetensors

Each is a model or a state of a run (a copy of its `state.safetensors`, of which the running average counts); the last is a
model, whose header the new file takes. Weights of one run lie close enough together for their mean to be a network too,
and a smoother one.

Source: P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov, A. G. Wilson, "Averaging weights leads to wider optima and better
generalization" (2018).
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tunemri import methods


def weights(path: Path) -> dict[str, Tensor]:
    """Of a model or of a state."""
    tensors = load_file(path)
    if not any(name.startswith("average.") for name in tensors):
        return tensors
    own = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    return own | {name.removeprefix("average."): v for name, v in tensors.items() if name.startswith("average.")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    model = methods.load(options.files[-1])
    found = [weights(path) for path in options.files]
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.stack([one[name].double() for one in found]).mean(0))
    recipe = methods.card(options.files[-1]).get("recipe", {}) | {"mean_of": [path.name for path in options.files]}
    methods.save(model, options.output, recipe)


if __name__ == "__main__":
    main()
