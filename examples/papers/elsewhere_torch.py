"""Trains PyTorch networks with the recipe `dc` on a set that `eqdistill.export` wrote.

Needs PyTorch, Pillow and NumPy, but not this package. Prints the claimed accuracy, and
the mean accuracy and its standard deviation on the test images of MNIST, or of a
dataset with the same files: for the images in `distilled.npz`, and for the PNGs.
"""

# pyright: reportMissingImports=false

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn


def main(folder: Path, data_dir: Path, num_networks: int) -> None:
    with np.load(folder / "distilled.npz") as file:
        exported = dict(file)
    print(exported["recipe"])
    with gzip.open(data_dir / "t10k-images-idx3-ubyte.gz") as file:
        test = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(data_dir / "t10k-labels-idx1-ubyte.gz") as file:
        test_labels = np.frombuffer(file.read(), np.uint8, offset=8)
    # From pixels between 0 and 1 to the units in which the images were learned.
    to_units = lambda x: (x - exported["mean"]) / exported["deviation"]
    test = to_units(test / 255)

    claim = exported["claimed_score"], exported["claimed_std"]
    print("claimed               {:.1%} ± {:.1%}".format(*claim), flush=True)
    pictures, labels = read_pngs(folder)
    for name, images, classes in (
        ("from distilled.npz", exported["images"], exported["labels"]),
        ("from the PNGs alone", to_units(pictures), labels),
    ):
        accuracies = []
        for seed in range(num_networks):
            torch.manual_seed(seed)
            network = train(make_network(), as_batch(images), torch.tensor(classes))
            accuracies.append(accuracy(network, as_batch(test), test_labels))
        deviation = np.std(accuracies, ddof=1)
        print(f"{name:21} {np.mean(accuracies):.1%} ± {deviation:.1%}", flush=True)


def read_pngs(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images, in units where real images are from 0 to 1, and their classes: the
    folders in the order of their names."""
    pictures, labels = [], []
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    for label, path in enumerate(classes):
        for file in sorted(path.glob("*.png")):
            image = Image.open(file)
            low, high = (float(image.info[name]) for name in ("low", "high"))
            pixels = np.asarray(image.convert("L"))
            pictures.append(low + (high - low) * pixels / 255)
            labels.append(label)
    return np.stack(pictures), np.array(labels)


def as_batch(images: np.ndarray) -> torch.Tensor:
    """Images with one channel, padded by zeros to 32 x 32."""
    batch = torch.tensor(images, dtype=torch.float32)[:, None]
    return nn.functional.pad(batch, (2, 2, 2, 2))


def make_network() -> nn.Module:
    """Three blocks of 128 channels with instance normalisation."""
    layers, channels = [], 1
    for _ in range(3):
        layers += [nn.Conv2d(channels, 128, 3, padding=1), nn.GroupNorm(128, 128)]
        layers += [nn.ReLU(), nn.AvgPool2d(2)]
        channels = 128
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def train(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """The recipe `dc`: 300 steps on all images."""
    optimiser = torch.optim.SGD(
        network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, step_size=150, gamma=0.1)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images), labels.long()).backward()
        optimiser.step()
        schedule.step()
    return network


@torch.no_grad()
def accuracy(network: nn.Module, images: torch.Tensor, labels: np.ndarray) -> float:
    found = [network(batch).argmax(1).numpy() for batch in images.split(500)]
    return float(np.mean(np.concatenate(found) == labels))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="the folder that `eqdistill.export` wrote"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        required=True,
        help="the folder with the four IDX files, compressed with gzip",
    )
    parser.add_argument("--num-networks", type=int, default=5)
    main(**vars(parser.parse_args()))
