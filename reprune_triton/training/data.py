"""Data to classify: digits, fashion-mnist, cifar10 (held on the device) and imagenet (read from folders).

    data = load("digits", batch=64, seed=0, device="cpu")
    for x, y in data.train_batches(epoch): ...      # x (B, C, H, W) float, normalised; y (B,) int64

Order and augmentation are a pure function of (seed, epoch), drawn on the CPU: a resumed run sees the same batches as an
uninterrupted one, on any device and with any number of workers, and no generator state has to be saved.
Nothing is downloaded. Where a data set is not found, the error says what was looked for, where, and how to get it.
"""

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from reprune_triton.errors import RepruneError

NAMES = ("digits", "fashion-mnist", "cifar10", "imagenet")
FASHION_MNIST_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
Split = tuple[np.ndarray, np.ndarray]  # images (N, C, H, W) uint8, labels (N,) int64


class Resident:
    """A small data set held on the device as uint8; cropping and flipping is one gather per batch."""

    def __init__(self, train: Split, test: Split, *, pad: int, flip: bool, batch: int, seed: int, device: str):
        images, labels = train
        if not 1 <= batch <= len(images):
            raise RepruneError(f"batch {batch} does not fit: the training set has {len(images)} images")
        self.classes = int(labels.max()) + 1
        self.channels, self.size = images.shape[1], images.shape[2]
        self.batch, self.seed, self.pad, self.flip = batch, seed, pad, flip
        self.train_size, self.test_size = len(images), len(test[0])
        self.steps = len(images) // batch  # per epoch; the last, partial batch is dropped

        pixels = images.astype(np.float64)
        mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
        self.std = torch.tensor(np.maximum(std, 1e-6), dtype=torch.float32, device=device).view(-1, 1, 1)
        # Padded once, in black, so that a shifted crop is a plain gather.
        self.images = F.pad(torch.from_numpy(images), (pad,) * 4).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.test_images, self.test_labels = (torch.from_numpy(part).to(device) for part in test)

    def train_batches(self, epoch: int) -> Batches:
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        device, n, side = self.images.device, self.train_size, torch.arange(self.size)
        order = torch.randperm(n, generator=generator)
        shift = torch.randint(0, 2 * self.pad + 1, (n, 2), generator=generator)
        rows, cols = side + shift[:, :1], side + shift[:, 1:]  # (N, H), (N, W)
        if self.flip:
            flipped = torch.rand(n, 1, generator=generator) < 0.5
            cols = torch.where(flipped, cols.flip(1), cols)
        order, rows, cols = order.to(device), rows.to(device), cols.to(device)
        channel = torch.arange(self.channels, device=device).view(1, -1, 1, 1)
        for start in range(0, self.steps * self.batch, self.batch):
            part = slice(start, start + self.batch)
            image = order[part]
            crop = (image[:, None, None, None], channel, rows[part, None, :, None], cols[part, None, None, :])
            yield self._normalised(self.images[crop]), self.labels[image]

    def test_batches(self) -> Batches:
        for start in range(0, self.test_size, 1000):
            part = slice(start, start + 1000)
            yield self._normalised(self.test_images[part]), self.test_labels[part]

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() - self.mean) / self.std


class Folders:
    """ImageNet's layout: train/CLASS/*.JPEG and val/CLASS/*.JPEG, decoded by worker processes."""

    def __init__(self, root: Path, *, batch: int, seed: int, device: str, workers: int, size: int = 224):
        try:
            from torchvision import datasets, transforms
        except ImportError as error:
            raise RepruneError("imagenet is read with torchvision: pip install 'reprune-triton[train]'") from error
        crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        middle = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
        try:
            parts = [
                datasets.ImageFolder(str(root / name), transforms.Compose([*steps, transforms.PILToTensor()]))
                for name, steps in (("train", crop), ("val", middle))
            ]
        except FileNotFoundError as error:  # a class folder without images, or no class folder at all
            raise RepruneError(f"{root}: {error}") from error
        self.train, self.test = parts
        if self.train.classes != self.test.classes:
            odd = sorted(set(self.train.classes) ^ set(self.test.classes))
            raise RepruneError(f"{root}: train/ and val/ differ in their class folders, first {odd[0]!r}")
        if not 1 <= batch <= len(self.train):
            raise RepruneError(f"batch {batch} does not fit: {root / 'train'} has {len(self.train)} images")
        self.classes, self.channels, self.size = len(self.train.classes), 3, size
        self.batch, self.seed, self.device, self.workers = batch, seed, device, workers
        self.train_size, self.test_size = len(self.train), len(self.test)
        self.steps = self.train_size // batch
        self.mean = torch.tensor([123.675, 116.28, 103.53], device=device).view(-1, 1, 1)
        self.std = torch.tensor([58.395, 57.12, 57.375], device=device).view(-1, 1, 1)

    def train_batches(self, epoch: int) -> Batches:
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        order = torch.randperm(self.train_size, generator=generator)[: self.steps * self.batch]
        seeds = torch.randint(2**62, (self.train_size,), generator=generator)
        return self._batches(_Seeded(self.train, order.tolist(), seeds.tolist()))

    def test_batches(self) -> Batches:
        return self._batches(self.test)

    def _batches(self, dataset: Any) -> Batches:
        cuda = self.device.startswith("cuda")
        loader = torch.utils.data.DataLoader(
            dataset, self.batch, num_workers=self.workers, pin_memory=cuda,
            generator=torch.Generator().manual_seed(0),  # else the loader draws from the global one
        )  # fmt: skip
        for x, y in loader:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            yield (x.float() - self.mean) / self.std, y


class _Seeded(torch.utils.data.Dataset):
    """The images of one epoch in their order, each augmented under a seed of its own.

    So neither the worker that decodes it nor the state of the process's generator matters.
    """

    def __init__(self, dataset: Any, order: list[int], seeds: list[int]):
        self.dataset, self.order, self.seeds = dataset, order, seeds

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.seeds[i])
            return self.dataset[self.order[i]]


Data = Resident | Folders


def load(
    name: str, root: str | Path | None = None, *, batch: int = 128, seed: int = 0, device: str = "cpu",
    workers: int = 4, size: int = 224,
) -> Data:  # fmt: skip
    """Return the data set `name`; `root` is its folder, `workers` and `size` (of the crop) are for imagenet only."""
    common: dict[str, Any] = {"batch": batch, "seed": seed, "device": str(device)}
    if name == "digits":
        return Resident(*_digits(), pad=1, flip=False, **common)
    if name == "fashion-mnist":
        return Resident(*_fashion_mnist(root), pad=2, flip=True, **common)
    if name == "cifar10":
        return Resident(*_cifar10(root), pad=4, flip=True, **common)
    if name == "imagenet":
        wanted = ["train/ and val/, each with one folder of images per class"]
        places = [Path(root)] if root else [Path("data/imagenet"), Path("imagenet")]
        for place in places:
            if (place / "train").is_dir() and (place / "val").is_dir():
                return Folders(place, workers=workers, size=size, **common)
        raise _not_found(name, wanted, places, "from image-net.org, after registering (ILSVRC2012), and unpack it so")
    raise RepruneError(f"unknown data set {name!r}: there are {', '.join(NAMES)}")


def _mix(seed: int, epoch: int) -> int:
    """Return one seed for (seed, epoch): distinct pairs give distinct ones, in any training of under 2**20 epochs."""
    return (seed << 20) + epoch


def _not_found(name: str, wanted: list[str], places: list[Path], get: str) -> RepruneError:
    return RepruneError(
        f"{name}: not found. Looked for {' or '.join(wanted)} in {', '.join(str(place) for place in places)}. "
        f"Get it {get}, and name the folder with --data-dir (root=...)"
    )


def _digits() -> tuple[Split, Split]:
    """1,797 scanned digits of 8x8 pixels that scikit-learn carries; a fixed split with equal class shares."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RepruneError("digits comes with scikit-learn: pip install 'reprune-triton[train]'") from error
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8)[:, None], digits.target.astype(np.int64)  # (N, 1, 8, 8), 0 to 16
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    return (images[train], labels[train]), (images[test], labels[test])


# torchvision's FashionMNIST and CIFAR10 read neither .gz, .tar.gz nor the binary version, want folders of their own and
# md5 sums, and load pickles that may run code. So these formats, which are plain, are read here.


def _fashion_mnist(root: str | Path | None) -> tuple[Split, Split]:
    places = [Path(root)] if root else [FASHION_MNIST_PACKAGE, Path("data/fashion-mnist"), Path("fashion-mnist")]
    names = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for folder in (place / inside for place in places for inside in ("", "FashionMNIST/raw")):  # torchvision's folder
        found = [path for name in names for path in (folder / f"{name}.gz", folder / name) if path.is_file()]
        paths = {path.name.removesuffix(".gz"): path for path in reversed(found)}  # .gz if both are there
        if len(paths) == len(names):
            train, train_labels, test, test_labels = (paths[name] for name in names)
            return _idx_pair(train, train_labels), _idx_pair(test, test_labels)
    get = "with `apt-get install dataset-fashion-mnist` (Debian) or from github.com/zalandoresearch/fashion-mnist"
    raise _not_found("fashion-mnist", [" and ".join(f"{name}.gz" for name in names)], places, get)


def _idx_pair(images_path: Path, labels_path: Path) -> Split:
    images, labels = _idx(images_path, 3), _idx(labels_path, 1)
    if len(images) != len(labels) or not len(images):
        raise RepruneError(f"{images_path} has {len(images)} images, {labels_path} has {len(labels)} labels")
    return images[:, None], labels.astype(np.int64)


def _idx(path: Path, rank: int) -> np.ndarray:
    """Read IDX: two zero bytes, the type (8 = uint8), the rank, the sizes as big-endian int32, then the values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    start = 4 + 4 * rank
    if raw[:4] != bytes([0, 0, 8, rank]) or len(raw) < start:
        raise _damaged(path, f"not an IDX file of rank {rank}")
    shape = np.frombuffer(raw, ">i4", rank, 4).astype(np.int64)
    if len(raw) - start != shape.prod():
        raise _damaged(path, f"{len(raw) - start} bytes of values where {shape.tolist()} needs {shape.prod()}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


def _cifar10(root: str | Path | None) -> tuple[Split, Split]:
    # Folder, archive, the suffix of the batches in them, their reader.
    kinds: list[tuple[str, str, str, Callable[[bytes, str], Split]]] = [
        ("cifar-10-batches-py", "cifar-10-python.tar.gz", "", _cifar_python),
        ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", _cifar_binary),
    ]
    places = [Path(root)] if root else [Path("data"), Path("data/cifar10"), Path(".")]
    for place in places:
        for folder, archive, suffix, parse in kinds:
            names = [f"data_batch_{i}{suffix}" for i in range(1, 6)] + [f"test_batch{suffix}"]
            for source in (place, place / folder, place / archive):
                files = _members(source, folder, names)
                if files is not None:
                    parts = [parse(raw, f"{source}/{name}") for name, raw in zip(names, files, strict=True)]
                    images, labels = (np.concatenate(column) for column in zip(*parts[:5], strict=True))
                    return (images, labels), parts[5]
    wanted = [name for folder, archive, *_ in kinds for name in (folder, archive)]
    raise _not_found("cifar10", wanted, places, "from www.cs.toronto.edu/~kriz/cifar.html (python or binary version)")


def _members(source: Path, folder: str, names: list[str]) -> list[bytes] | None:
    """Return the named files of a folder or of an archive; None if `source` does not hold them all."""
    if source.is_dir():
        paths = [source / name for name in names]
        return [path.read_bytes() for path in paths] if all(path.is_file() for path in paths) else None
    if not source.is_file():
        return None
    wanted = [f"{folder}/{name}" for name in names]
    try:
        with tarfile.open(source, "r:*") as archive:
            # In one pass: a second look-up in a gzipped archive would decompress it again from the start.
            found = {m.name: archive.extractfile(m).read() for m in archive if m.isfile() and m.name in wanted}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise _damaged(source, f"cannot be read ({error})") from error
    return [found[name] for name in wanted] if len(found) == len(wanted) else None


def _cifar_binary(raw: bytes, path: str) -> Split:
    if not raw or len(raw) % 3073:
        raise _damaged(path, f"{len(raw)} bytes is no whole number of CIFAR-10 records")
    records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)  # label, then 3 x 32 x 32 pixels
    return _cifar_checked(records[:, 1:].copy(), records[:, 0].astype(np.int64), path)


def _cifar_python(raw: bytes, path: str) -> Split:
    try:
        record = _NumpyUnpickler(io.BytesIO(raw), encoding="latin1").load()
        pixels, labels = record["data"], np.asarray(record["labels"], dtype=np.int64)
    except RepruneError as error:
        raise RepruneError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise _damaged(path, f"not a CIFAR-10 batch ({error!r})") from error
    return _cifar_checked(pixels, labels, path)


def _cifar_checked(pixels: Any, labels: np.ndarray, path: str) -> Split:
    whole = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3072)
    if not whole or not len(labels) or labels.min() < 0 or labels.max() > 9:
        raise _damaged(path, "not a CIFAR-10 batch")
    return pixels.reshape(-1, 3, 32, 32), labels


def _damaged(path: Path | str, why: str) -> RepruneError:
    return RepruneError(f"{path}: {why}; get the file again")


class _NumpyUnpickler(pickle.Unpickler):
    """Rebuilds uint8 arrays and plain containers and refuses every other name, so that a file can run no code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return lambda *_: np.empty(0, np.uint8)
        if (module, name) == ("numpy", "ndarray"):
            return None  # only ever the first argument of _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return lambda *_: np.dtype(np.uint8, copy=True)  # values of another size would not fit the shape
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return lambda text, _: text.encode("latin1")
        raise RepruneError(f"the pickle asks for {module}.{name}, which a CIFAR-10 batch has no use for")
