"""Trains PyTorch networks with the recipe `dc` on a set that `eqdistill.export` wrote,
or on images that this script makes itself.

Needs PyTorch, Pillow and NumPy, but not this package. Prints the claimed accuracy. Then
prints the mean and the standard deviation of the test accuracy, on MNIST or a dataset
in the same format, for the images in `distilled.npz` and for the PNGs.

With `--make`, it distils one image per class by distribution matching, and writes them
to `res.pt`, in the format of the dataset-condensation code.
"""

# pyright: reportMissingImports=false

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn


def main(folder: Path, data_dir: Path, num_networks: int, make: int | None) -> None:
    test, test_labels = read_idx(data_dir, "t10k")
    sets = {}
    if make is None:
        with np.load(folder / "distilled.npz") as file:
            exported = dict(file)
        print(exported["recipe"])
        claim = exported["claimed_score"], exported["claimed_std"]
        print("claimed               {:.1%} ± {:.1%}".format(*claim), flush=True)
        # From pixels between 0 and 1 to the units in which the images were learned.
        to_units = lambda x: (x - exported["mean"]) / exported["deviation"]
        sets["from distilled.npz"] = exported["images"], exported["labels"]
        pictures, labels = read_pngs(folder)
        sets["from the PNGs alone"] = to_units(pictures), labels
    else:
        to_units = lambda x: (x - 0.1307) / 0.3081  # Published values for MNIST.
        real, labels = read_idx(data_dir, "train")
        made = make_images(to_units(real / 255), labels, make)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"data": [made]}, folder / "res.pt")
        sets["made here"] = made[0][:, 0].numpy(), made[1].numpy()

    for name, (images, labels) in sets.items():
        accuracies = []
        for seed in range(num_networks):
            torch.manual_seed(seed)
            network = train(make_network(), as_batch(images), torch.tensor(labels))
            accuracies.append(
                accuracy(network, as_batch(to_units(test / 255)), test_labels)
            )
        deviation = np.std(accuracies, ddof=1)
        print(f"{name:21} {np.mean(accuracies):.1%} ± {deviation:.1%}", flush=True)


def read_idx(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The images and the labels of one part of MNIST."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


def make_images(real: np.ndarray, labels: np.ndarray, steps: int) -> list[torch.Tensor]:
    """Distribution matching (Zhao and Bilen, 2023): matches the features of each image
    to the mean features of its class, in fresh random networks, which are narrower
    here."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    rows = [np.flatnonzero(labels == class_) for class_ in range(10)]
    draw = lambda n: real[np.concatenate([rng.choice(x, n, False) for x in rows])]
    made = torch.tensor(draw(1)[:, None], dtype=torch.float32, requires_grad=True)
    optimiser = torch.optim.SGD([made], lr=1.0, momentum=0.5)
    for _ in range(steps):
        features = make_network(32)[:-1].requires_grad_(False)
        wanted = features(as_batch(draw(64))).reshape(10, 64, -1).mean(1)
        optimiser.zero_grad()
        padded = nn.functional.pad(made, (2, 2, 2, 2))
        (features(padded) - wanted).square().sum().backward()
        optimiser.step()
    return [made.detach(), torch.arange(10)]


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
    """Images with one channel, padded with zeros to 32 x 32."""
    batch = torch.tensor(images, dtype=torch.float32)[:, None]
    return nn.functional.pad(batch, (2, 2, 2, 2))


def make_network(width: int = 128) -> nn.Sequential:
    """Three blocks of `width` channels with instance normalisation."""
    layers, channels = [], 1
    for _ in range(3):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width, width)]
        layers += [nn.ReLU(), nn.AvgPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 4 * 4, 10))


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
        "folder",
        type=Path,
        help="the folder that `eqdistill.export` wrote; with --make, the folder to "
        "write to",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        required=True,
        help="the folder with the four IDX files, compressed with gzip",
    )
    parser.add_argument("--num-networks", type=int, default=5)
    parser.add_argument(
        "--make",
        type=int,
        metavar="STEPS",
        help="make images in this number of steps, instead of reading them",
    )
    main(**vars(parser.parse_args()))
