"""Data: standard formats read back exactly, batches a pure function of (seed, epoch), errors that help."""

import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from reprune_triton.errors import RepruneError
from reprune_triton.training import data


def batches(source, epoch):
    return [(x.clone(), y.clone()) for x, y in source.train_batches(epoch)]


def same(a, b):
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return data.load("digits", batch=100)


def test_digits_split_is_fixed_and_stratified(digits):
    assert (digits.train_size, digits.test_size, digits.classes, digits.channels, digits.size) == (1437, 360, 10, 1, 8)
    counts = torch.bincount(digits.test_labels)
    assert counts.min() >= 34 and counts.max() <= 38
    again = data.load("digits", batch=7, seed=5)
    assert torch.equal(again.test_images, digits.test_images)
    x = torch.cat([x for x, _ in digits.test_batches()])
    assert x.shape == (360, 1, 8, 8) and abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05


def test_batches_depend_on_seed_and_epoch_alone(digits):
    state = torch.get_rng_state()
    first = batches(digits, 3)
    torch.rand(5)  # someone else draws from the global generator
    assert same(first, batches(digits, 3))
    assert not same(first, batches(digits, 4))
    assert not same(first, batches(data.load("digits", batch=100, seed=1), 3))
    torch.set_rng_state(state)
    list(digits.train_batches(0))
    assert torch.equal(state, torch.get_rng_state())
    assert len(first) == digits.steps == 14 and all(x.shape == (100, 1, 8, 8) for x, _ in first)


def test_every_crop_and_flip_is_drawn_and_nothing_else():
    image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4) + 1
    many = image.repeat(4000, 1, 1, 1).numpy()
    labels = np.arange(4000) % 2
    source = data.Resident((many, labels), (many[:2], labels[:2]), pad=1, flip=True, batch=4000, seed=0, device="cpu")
    ((x, y),) = source.train_batches(0)
    x = (x * source.std + source.mean).round().byte()
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))[0, 0]
    wanted = {
        tuple((crop.flip(1) if flip else crop).flatten().tolist())
        for dy in range(3)
        for dx in range(3)
        for crop in [padded[dy : dy + 4, dx : dx + 4]]
        for flip in (False, True)
    }
    seen = [tuple(row) for row in x.flatten(1).tolist()]
    assert set(seen) == wanted and len(wanted) == 18
    assert min(seen.count(crop) for crop in wanted) > 4000 / 18 * 0.7
    assert y.sum() == 2000


def test_each_image_once_with_its_own_label():
    images = np.repeat(np.arange(50, dtype=np.uint8), 4).reshape(50, 1, 2, 2)
    labels = np.arange(50)
    source = data.Resident((images, labels), (images, labels), pad=0, flip=False, batch=10, seed=0, device="cpu")
    x, y = (torch.cat(part) for part in zip(*source.train_batches(0), strict=True))
    assert torch.equal((x * source.std + source.mean).round()[:, 0, 0, 0].long(), y)
    assert sorted(y.tolist()) == list(range(50))


def test_batch_that_does_not_fit():
    with pytest.raises(RepruneError, match="1437 images"):
        data.load("digits", batch=1438)


def test_unknown_name():
    with pytest.raises(RepruneError, match="unknown data set 'mnist': there are digits, fashion-mnist"):
        data.load("mnist")


@pytest.mark.parametrize(
    ("name", "wanted", "get"),
    [
        ("fashion-mnist", "train-images-idx3-ubyte.gz", "apt-get install dataset-fashion-mnist"),
        ("cifar10", "cifar-10-batches-py or cifar-10-python.tar.gz or cifar-10-batches-bin", "www.cs.toronto.edu"),
        ("imagenet", "train/ and val/", "image-net.org"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_not_found_says_what_where_and_how(tmp_path, name, wanted, get, there):
    folder = tmp_path if there else tmp_path / "absent"
    with pytest.raises(RepruneError) as error:
        data.load(name, folder)
    for part in (wanted, str(folder), get, "--data-dir"):
        assert part in str(error.value)


# fashion-mnist


def idx(values):
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()


def write_fashion(folder, compress=True):
    rng = np.random.default_rng(0)
    made = {}
    folder.mkdir(exist_ok=True)
    for part, n in (("train", 30), ("t10k", 10)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        made[part] = images, labels
        for kind, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            raw = idx(values)
            name = f"{part}-{kind}"
            (folder / (f"{name}.gz" if compress else name)).write_bytes(gzip.compress(raw) if compress else raw)
    return made


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist(tmp_path, monkeypatch, compress):
    made = write_fashion(tmp_path / "f", compress)
    monkeypatch.setattr(data, "FASHION_MNIST_PACKAGE", tmp_path / "f")  # found by itself
    source = data.load("fashion-mnist", batch=10)
    assert (source.channels, source.size, source.classes) == (1, 28, 10)
    assert torch.equal(source.test_images[:, 0], torch.from_numpy(made["t10k"][0]))
    assert source.labels.tolist() == made["train"][1].tolist()
    assert batches(source, 0)[0][0].shape == (10, 1, 28, 28)


def test_fashion_mnist_of_torchvision(tmp_path):
    """The folder that torchvision makes, and the arrays that it reads there."""
    datasets = pytest.importorskip("torchvision.datasets")
    (tmp_path / "FashionMNIST").mkdir()
    write_fashion(tmp_path / "FashionMNIST" / "raw", compress=False)
    source, theirs = data.load("fashion-mnist", tmp_path, batch=10), datasets.FashionMNIST(tmp_path, train=False)
    assert torch.equal(source.test_images[:, 0], theirs.data) and torch.equal(source.test_labels, theirs.targets)


def test_fashion_mnist_names_the_damaged_file(tmp_path):
    write_fashion(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    raw = gzip.decompress(whole)
    for damaged in (whole[:-20], b"<html>", gzip.compress(raw[:-1]), gzip.compress(b"\0\0\x0d\3" + raw[4:]),
                    gzip.compress(raw[:10])):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(RepruneError, match="t10k-images-idx3-ubyte.gz"):
            data.load("fashion-mnist", tmp_path, batch=10)


# cifar10


def cifar_parts():
    rng = np.random.default_rng(1)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {name: (rng.integers(0, 256, (20, 3072), dtype=np.uint8), (np.arange(20) % 10).tolist()) for name in names}


def cifar_files(parts, binary):
    if binary:
        return {
            f"{name}.bin": np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1).tobytes()
            for name, (pixels, labels) in parts.items()
        }
    return {
        name: pickle.dumps({"data": pixels, "labels": labels, "batch_label": name, "filenames": ["a.png"]}, protocol=2)
        for name, (pixels, labels) in parts.items()
    }


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("binary", [True, False])
def test_cifar10(tmp_path, packed, binary):
    parts = cifar_parts()
    files = cifar_files(parts, binary)
    folder = "cifar-10-batches-bin" if binary else "cifar-10-batches-py"
    if packed:
        archive = tmp_path / ("cifar-10-binary.tar.gz" if binary else "cifar-10-python.tar.gz")
        with tarfile.open(archive, "w:gz") as tar:
            for name, raw in files.items():
                info = tarfile.TarInfo(f"{folder}/{name}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
        roots = [tmp_path, archive]
    else:
        (tmp_path / folder).mkdir()
        for name, raw in files.items():
            (tmp_path / folder / name).write_bytes(raw)
        roots = [tmp_path, tmp_path / folder]
    for root in roots:
        source = data.load("cifar10", root, batch=50)
        assert source.train_size == 100 and source.test_size == 20
        assert torch.equal(source.test_images.flatten(1), torch.from_numpy(parts["test_batch"][0]))
        wanted = np.concatenate([parts[f"data_batch_{i}"][0] for i in range(1, 6)])
        assert torch.equal(source.images[:, :, 4:-4, 4:-4].flatten(1), torch.from_numpy(wanted))
        assert source.labels.tolist() == list(range(10)) * 10


def test_cifar10_as_python_2_pickled_it(tmp_path):
    # The published files are protocol 2 with str (not bytes) for the pixels and NumPy 1 names.
    def short(text):
        return b"U" + bytes([len(text)]) + text

    pixels = np.arange(20 * 3072, dtype=np.uint32).astype(np.uint8).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\0\x85" + short(b"b") + b"\x87R"
        + b"(K\x01K\x14M\x00\x0c\x86" + b"cnumpy\ndtype\n" + short(b"u1") + b"K\0K\x01\x87R"
        + b"(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        + b"\x89T" + len(pixels).to_bytes(4, "little") + pixels + b"tb"
    )  # fmt: skip
    raw = b"\x80\x02}(" + short(b"data") + array + short(b"labels") + b"](" + b"K\x03" * 20 + b"eu."
    for name in cifar_parts():
        (tmp_path / name).write_bytes(raw)
    source = data.load("cifar10", tmp_path, batch=10)
    assert source.test_images.numpy().tobytes() == pixels and set(source.labels.tolist()) == {3}


class Evil:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [(os.mkdir, ("PWNED",)), (eval, ("open('PWNED', 'w')",)), (np.load, ("PWNED",))])
def test_cifar10_pickle_runs_no_code(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for name, raw in cifar_files(cifar_parts(), binary=False).items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({"data": Evil(call), "labels": [0]}, protocol=2))
    with pytest.raises(RepruneError, match="data_batch_2: the pickle asks for"):
        data.load("cifar10", tmp_path, batch=10)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("binary", [True, False])
def test_cifar10_names_the_damaged_file(tmp_path, binary):
    files = cifar_files(cifar_parts(), binary)
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    name = next(name for name in files if "4" in name)
    bad_label = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, protocol=2)
    wide = pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}, protocol=2)  # float64
    for damaged in (b"", files[name][:-100], b"\x0a" + files[name][1:], pickle.dumps([1]), bad_label, wide):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(RepruneError, match=name):
            data.load("cifar10", tmp_path, batch=10)


def test_cifar10_truncated_archive(tmp_path):
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = 50_000
        tar.addfile(info, io.BytesIO(os.urandom(50_000)))
    archive.write_bytes(archive.read_bytes()[:20_000])
    with pytest.raises(RepruneError, match="cifar-10-python.tar.gz: cannot be read"):
        data.load("cifar10", tmp_path)


# imagenet


@pytest.fixture
def folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(2)
    for part, n in (("train", 6), ("val", 2)):
        for label in ("n01", "n02"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                image.fromarray(pixels).save(tmp_path / part / label / f"{i}.png")
    return tmp_path


def test_imagenet_is_the_same_with_any_number_of_workers(folders):
    pytest.importorskip("torchvision")
    source = data.load("imagenet", folders, batch=4, workers=0, size=32)
    assert (source.classes, source.channels, source.size, source.steps) == (2, 3, 32, 3)
    state = torch.get_rng_state()
    first = batches(source, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert same(first, batches(data.load("imagenet", folders, batch=4, workers=2, size=32), 1))
    assert not same(first, batches(source, 2))
    assert all(x.shape == (4, 3, 32, 32) and x.dtype == torch.float32 for x, _ in first)
    assert sorted(torch.cat([y for _, y in first]).tolist()) == [0] * 6 + [1] * 6
    test = list(source.test_batches())
    assert sum(len(y) for _, y in test) == 4 and same(test, list(source.test_batches()))


def test_imagenet_folders_that_disagree(folders):
    pytest.importorskip("torchvision")
    (folders / "val" / "n02").rename(folders / "val" / "n03")
    with pytest.raises(RepruneError, match="differ in their class folders, first 'n02'"):
        data.load("imagenet", folders, batch=4)
    (folders / "val" / "n04").mkdir()
    with pytest.raises(RepruneError, match="n04"):
        data.load("imagenet", folders, batch=4)
