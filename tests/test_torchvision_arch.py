"""Networks of torchvision and timm as backbones: their features, their weights, and what is refused. No download."""

import os
import shutil
import sys
import types

import pytest
import torch
import torchvision
from torch import nn

from mtl.archs.check import check_model
from mtl.archs.model import HardSharing
from mtl.archs.pyramid import Pyramid
from mtl.archs.retina import Retina
from mtl.archs.timm import TimmBackbone
from mtl.archs.torchvision import TorchvisionBackbone
from mtl.config.identity import identify
from mtl.engine.loaded import load
from mtl.tasks import Classification, Depth, Normals, Regression, Segmentation

DIGITS = ("data=digits", "data.limit_train=32", "data.limit_test=16", "data.batch_size=16", "logger=none",
          "trainer.epochs=1", "trainer.device=cpu", "arch=torchvision", "arch.name=shufflenet_v2_x0_5")  # fmt: skip


def state_of(name: str) -> dict:
    torch.manual_seed(1)
    return torchvision.models.get_model(name, weights=None).state_dict()


@pytest.mark.parametrize("name, width", [
    ("squeezenet1_1", 512), ("mobilenet_v3_small", 1024), ("googlenet", 1024), ("regnet_y_400mf", 440),
    ("shufflenet_v2_x0_5", 1024), ("mnasnet0_5", 1280),
])  # fmt: skip
def test_small_images_become_features_and_every_parameter_is_used(name, width):
    torch.manual_seed(0)
    backbone = TorchvisionBackbone(1, name)
    model = HardSharing(backbone, [Classification("a", 3), Regression("b")])
    outputs = check_model(model, {"image": torch.randn(2, 1, 32, 32)}, ["a", "b"])
    assert outputs.features.shape == (2, width) == (2, backbone.out_features)
    assert not any(getattr(m, "out_features", 0) == 1000 for m in backbone.modules())
    assert sum(len(parts) for parts in backbone.layer_groups.values()) >= 1


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_weights_of_a_file_give_torchvisions_features(name, tmp_path):
    """A grey image gives what torchvision's network makes of it in three equal channels."""
    peer = torchvision.models.get_model(name, weights=None).eval()
    peer.load_state_dict(state_of(name))
    if name == "resnet18":
        peer.fc = nn.Identity()
    else:
        peer.classifier[-1] = nn.Identity()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state_of(name).items()}}, tmp_path / "w.pth")
    images = torch.rand(2, 1, 64, 64)
    for channels, seen in ((1, images), (3, images.expand(-1, 3, -1, -1))):
        ours = TorchvisionBackbone(channels, name, weights=str(tmp_path / "w.pth")).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(seen), peer(images.expand(-1, 3, -1, -1)).flatten(1), rtol=1e-4, atol=1e-5)


PIXELS = [Segmentation("classes", 5), Depth("depth"), Normals("normals"), Classification("scene", 3)]


@pytest.mark.parametrize("name, maps", [("mobilenet_v3_small", 4), ("squeezenet1_1", 3), ("shufflenet_v2_x0_5", 4)])
def test_tasks_with_labels_of_pixels_get_maps(name, maps):
    """From maps of several sizes, every parameter of which is trained; a task with one label an image goes along."""
    torch.manual_seed(0)
    backbone = TorchvisionBackbone(3, name, tasks=PIXELS)
    model = HardSharing(backbone, PIXELS)
    outputs = check_model(model, {"image": torch.randn(2, 3, 44, 60)}, [task.name for task in PIXELS])
    assert [p.shape for p in outputs.predictions] == [(2, 5, 44, 60), (2, 1, 44, 60), (2, 3, 44, 60), (2, 3)]
    assert outputs.features.shape == (2, backbone.out_features, 11, 15) and len(backbone.pyramid.lateral) == maps
    with pytest.raises(ValueError, match="multiples of 4, not 44x61"):
        model({"image": torch.randn(2, 3, 44, 61)})


def test_the_maps_are_the_networks_and_its_weights_fit_either_way(tmp_path):
    """The last map of each size of torchvision's network; weights go from one without maps to one with, and back."""
    torch.save(state_of("resnet18"), tmp_path / "w.pth")
    dense = TorchvisionBackbone(3, "resnet18", str(tmp_path / "w.pth"), frozen=True, tasks=PIXELS).train()
    peer = torchvision.models.resnet18(weights=None).eval()
    peer.load_state_dict(state_of("resnet18"))
    x = images = torch.rand(2, 3, 64, 96)
    wanted = []
    with torch.no_grad():
        for layer in (nn.Sequential(peer.conv1, peer.bn1, peer.relu, peer.maxpool, peer.layer1),
                      peer.layer2, peer.layer3, peer.layer4):  # fmt: skip
            wanted.append(x := layer(x))
        for found, map_ in zip(dense.network(images).values(), wanted, strict=True):
            torch.testing.assert_close(found, map_)
    assert not dense.network.training and dense.pyramid.training
    assert {n.split(".")[0] for n, p in dense.named_parameters() if p.requires_grad} == {"pyramid"}
    torch.save({"model": {f"backbone.{k}": v for k, v in dense.state_dict().items()}}, tmp_path / "run.pth")
    again = TorchvisionBackbone(3, "resnet18", weights=str(tmp_path / "run.pth"))
    assert torch.equal(again.network.layer4[1].conv2.weight, peer.layer4[1].conv2.weight)


def test_the_pyramid_adds_each_map_to_the_next_larger_one():
    pyramid, images = Pyramid([3, 5]), torch.randn(2, 3, 16, 24)
    large, small = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 2, 3)
    enlarged = nn.functional.interpolate(pyramid.lateral[1](small), (4, 6), mode="bilinear")
    wanted = pyramid.smooth.eval()(pyramid.lateral[0](large) + enlarged)
    torch.testing.assert_close(pyramid([large, small], images), wanted)
    with pytest.raises(ValueError, match=r"^name: swin_t has no maps of several sizes, which tasks with labels of pix"):
        TorchvisionBackbone(3, "swin_t", tasks=PIXELS)


def test_rooms_train_on_a_network_by_name_and_the_run_is_loaded_again(cli, tmp_path):
    run = cli("data=rooms", "data.train_size=8", "data.test_size=4", "data.height=32", "data.width=32", "logger=none",
              "data.batch_size=4", "trainer.epochs=1", "arch=torchvision", "arch.name=shufflenet_v2_x0_5")  # fmt: skip
    assert run.code == 0, run.err
    (folder,) = tmp_path.rglob("seed42")
    predictions = load(folder, "last").model.eval()({"image": torch.zeros(2, 3, 32, 32)}).predictions
    assert [p.shape for p in predictions] == [(2, 6, 32, 32), (2, 1, 32, 32), (2, 3, 32, 32)]


@pytest.mark.parametrize("name, tasks, size, needed", [
    ("squeezenet1_1", [], (16, 40), "at least 17x17, not 16x40"),
    ("squeezenet1_1", PIXELS, (16, 40), "at least 20x20, not 16x40"),  # the pyramid takes multiples of 4
    ("alexnet", [], (80, 32), "at least 63x63, not 80x32"),
    ("vit_b_32", [], (256, 256), "224x224, not 256x256"),
])  # fmt: skip
def test_images_that_do_not_fit_the_network_are_told_what_would(name, tasks, size, needed):
    with torch.device("meta"):  # no number is computed
        backbone, images = TorchvisionBackbone(3, name, tasks=tasks), torch.empty(2, 3, *size)
    with pytest.raises(ValueError, match=f"^{name} needs images of {needed}$"):
        backbone(images)
    least = int(needed.split()[-3].split("x")[0])
    assert len(backbone(torch.empty(2, 3, least, least, device="meta"))) == 2
    if "least" in needed:
        with pytest.raises(ValueError, match=f"at least {least}x{least}, not {least - 4}x{least}"):
            backbone(torch.empty(2, 3, least - 4, least, device="meta"))


def test_a_detector_names_the_network_too():
    with pytest.raises(ValueError, match=r"^squeezenet1_1 needs images of at least 17x17, not 16x40$"):
        Retina(3, {"image": (3, 16, 40)}, "squeezenet1_1", levels=[3, 4])


def test_other_errors_of_a_network_stay_what_they_are():
    backbone = TorchvisionBackbone(3, "shufflenet_v2_x0_5")
    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel"):  # two images of this size fit
        backbone(torch.zeros(1, 3, 8, 8))
    with pytest.raises(RuntimeError, match="expected input"):
        backbone(torch.zeros(2, 1, 32, 32))


def test_weights_by_name_are_torchvisions_and_only_tensors(monkeypatch):
    asked = []

    def get_state_dict(self, **how):
        asked.append((self.name, how))
        return state_of("shufflenet_v2_x0_5")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", get_state_dict)
    network = TorchvisionBackbone(3, "shufflenet_v2_x0_5", weights="DEFAULT").network
    assert torch.equal(network.conv1[0].weight, state_of("shufflenet_v2_x0_5")["conv1.0.weight"])
    ((name, how),) = asked
    assert name == "IMAGENET1K_V1" and how["weights_only"] and how["check_hash"]


def test_a_frozen_network_stays_as_it_is_and_another_starts_from_its_run(cli, tmp_path):
    known = state_of("shufflenet_v2_x0_5")
    torch.save(known, tmp_path / "w.pth")
    run = cli(*DIGITS, "arch.frozen=true", "arch.weights=w.pth", "loss=pcgrad", "seed=0")
    assert run.code == 0, run.err
    (folder,) = tmp_path.rglob("seed0")
    assert folder.relative_to(tmp_path / "outputs").parts[:2] == ("digits", "torchvision-shufflenet_v2_x0_5")
    os.remove(tmp_path / "w.pth")  # a loaded run has its own weights
    model = load(folder, "last").model
    assert not any(p.requires_grad for p in model.backbone.parameters())
    known["conv1.0.weight"] = known["conv1.0.weight"].sum(1, keepdim=True)
    again = TorchvisionBackbone(1, "shufflenet_v2_x0_5", weights=str(folder))
    for state in (model.backbone.network.state_dict(), again.network.state_dict()):
        assert len(state) > 100 and all(torch.equal(state[key], known[key]) for key in state)


def test_identity_is_the_weights_content_not_their_place(tmp_path):
    def digest(weights):
        arch = {"_target_": "mtl.archs.torchvision.TorchvisionBackbone", "name": "x", "weights": weights}
        data, loss = {"_target_": "mtl.data.digits.Digits"}, {"_target_": "mtl.losses.Equal"}
        return identify({"data": data, "loss": loss, "arch": arch, "seed": 0}, {}).digest

    (tmp_path / "a.pth").write_bytes(b"1")
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "a.pth", tmp_path / "run" / "last.pt")
    assert digest(f"{tmp_path}/a.pth") == digest(f"{tmp_path}/run") != digest("DEFAULT") != digest(None)
    (tmp_path / "run" / "best.pt").write_bytes(b"2")
    assert digest(f"{tmp_path}/a.pth") != digest(f"{tmp_path}/run")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.fixture(scope="module")
def wrong_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.save({"w": Bomb()}, folder / "bomb.pth")
    torch.save(state_of("squeezenet1_1"), folder / "other.pth")
    torch.save([1, 2], folder / "list.pth")
    whole = (folder / "other.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.pth").write_bytes(whole[:100_000] + bytes([whole[100_000] ^ 64]) + whole[100_001:])
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize("option, message", [
    ("arch.name=resnett18", "arch.name: 'resnett18' is none of torchvision's 80 classification networks; did you mean"),
    ("arch.name=xyz", "such as resnet18"),
    ("arch.name=fcn_resnet50", "arch.name: 'fcn_resnet50' is none of torchvision's"),  # segments
    ("arch.name=squeezenet1_1", "arch: does not fit the inputs of data (1x8x8): squeezenet1_1 needs images of at"),
    ("arch.weights=IMAGENET", "arch.weights: 'IMAGENET' is no file, no folder of a run, and none of IMAGENET1K_V1"),
    ("arch.weights=gone.pth", "arch.weights=gone.pth: no such file or folder"),
    ("arch.weights=FOLDER/empty", "empty: neither best.pt nor last.pt is in it"),
    ("arch.weights=FOLDER/bomb.pth", "bomb.pth is damaged, or holds more than tensors, which is not run"),
    ("arch.weights=FOLDER/cut.pth", "cut.pth is damaged, or holds more than tensors"),
    ("arch.weights=FOLDER/flipped.pth", "flipped.pth is damaged, or holds more than tensors"),
    ("arch.weights=FOLDER/list.pth", "list.pth holds no weights by name"),
    ("arch.weights=FOLDER/other.pth", "other.pth is of another network: it lacks conv1.0.weight and"),
    ("arch.frozen=2", "arch.frozen=2: must be a valid boolean"),
])  # fmt: skip
def test_refusals(option, message, cli, tmp_path, wrong_weights):
    run = cli(*DIGITS, option.replace("FOLDER", str(wrong_weights)))
    assert run.code == 2 and message in run.err and run.err.count("\n") == 1, run.err
    assert not list(tmp_path.iterdir())


def test_timm_is_an_extra(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    run = cli(*DIGITS[:-2], "arch=timm")
    assert (run.code, run.err) == (1, "error: arch=timm needs a package: pip install mtl[timm]\n")


def test_a_network_of_timm(monkeypatch):
    """With a stand-in that has timm's three functions: the package itself is an extra."""

    class Net(nn.Sequential):
        num_features = 6

    class Maps(nn.Module):
        feature_info = types.SimpleNamespace(reduction=lambda: [2, 4, 8], channels=lambda: [5, 6, 7])

        def __init__(self, channels):
            super().__init__()
            self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 1, 2) for a, b in ((channels, 5), (5, 6), (6, 7)))

        def forward(self, x):
            return [x := convolution(x) for convolution in (nn.MaxPool2d(1), *self.convolutions)][1:]

    def create_model(name, pretrained, in_chans, num_classes=None, features_only=False):
        assert not pretrained and (num_classes == 0) != features_only
        return (
            Maps(in_chans) if features_only else Net(nn.Conv2d(in_chans, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        )

    names = ["net", "other"]
    fake = types.SimpleNamespace(create_model=create_model, is_model=names.__contains__, list_models=lambda: names)
    monkeypatch.setitem(sys.modules, "timm", fake)
    backbone = TimmBackbone(1, "net", frozen=True).train()
    assert backbone(torch.randn(2, 1, 8, 8)).shape == (2, backbone.out_features) == (2, 6)
    assert not backbone.network.training and not any(p.requires_grad for p in backbone.parameters())
    model = HardSharing(TimmBackbone(1, "net", tasks=PIXELS), PIXELS)
    outputs = check_model(model, {"image": torch.randn(2, 1, 32, 32)}, [task.name for task in PIXELS])
    assert [p.shape[2:] for p in outputs.predictions] == [(32, 32)] * 3 + [()]
    assert [conv.in_channels for conv in model.backbone.pyramid.lateral] == [6, 7]  # not the map of half the size
    with pytest.raises(ValueError, match=r"^name: 'nett' is none of timm's 2 networks; did you mean net"):
        TimmBackbone(1, "nett")
    with pytest.raises(ValueError, match=r"^weights: 'X' is no file"):
        TimmBackbone(1, "net", weights="X")
