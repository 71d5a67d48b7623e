"""Architectures for maps: published sizes, torchvision's networks, and SegNet-MTAN written a second time."""

from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from test_archs import NYUV2, build, images, with_statistics
from torch import nn
from torchvision import models
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from mtl.archs.check import check_model
from mtl.archs.deeplab import DeepLabV3, DilatedResNet
from mtl.archs.model import HardSharing, count_parameters
from mtl.archs.segnet import SegNet, SegNetMTAN, unpool
from mtl.archs.unet import UNet
from mtl.inspect.microscope import layer_groups
from mtl.tasks import Classification, Depth, Segmentation

DENSE = ("segnet", "segnet_mtan", "unet", "deeplabv3", "deeplabv3plus")
CITYSCAPES = Segmentation("segmentation", 7), Depth("depth")
SMALL = {name: {"width": 2, **({"depth": 18} if name.startswith("deeplab") else {})} for name in DENSE}


@pytest.fixture(autouse=True)
def threads():
    torch.set_num_threads(1)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("arch", "tasks", "parameters"), [
    ("segnet", NYUV2, 25_055_185), ("segnet_mtan", NYUV2, 44_229_073), ("segnet_mtan", CITYSCAPES, 41_206_984),
    ("deeplabv3", NYUV2, 71_888_721), ("deeplabv3", CITYSCAPES, 55_760_968), ("unet", (Depth("depth"),), 31_037_633),
])  # fmt: skip
def test_published_numbers_of_parameters(arch, tasks, parameters):
    with torch.device("meta"):
        assert count_parameters(build(arch, tasks)) == parameters


def test_shares_of_segnet_mtan():
    """SegNet and the convolutions after the masks are shared; of each task 1,835,648 + 1,148,928 numbers are masks."""
    with torch.device("meta"):
        model = build("segnet_mtan", NYUV2)
    assert sum(p.numel() for p in model.shared_parameters()) == 35_163_456
    for task, head in zip(NYUV2, (37_773, 36_993, 37_123), strict=True):
        assert sum(p.numel() for p in model.own_parameters(task.name)) == 1_835_648 + 1_148_928 + head


@pytest.mark.parametrize("arch", DENSE)
@pytest.mark.parametrize("tasks", [NYUV2, NYUV2[1:2], (*CITYSCAPES, Classification("scene", 4))])
def test_each_task_gets_a_map_or_a_vector(arch, tasks):
    """Every parameter has the owner that is declared, also where one task is alone."""
    model, (height, width) = build(arch, tasks, **SMALL[arch]), (40, 48)
    outputs = check_model(model, images(2, 3, height, width), [task.name for task in tasks])
    shapes = [(2, t.outputs) if isinstance(t, Classification) else (2, t.outputs, height, width) for t in tasks]
    assert [tuple(p.shape) for p in outputs.predictions] == shapes
    assert (outputs.features is None) == (arch == "segnet_mtan")
    groups = layer_groups(model)
    assert len(groups) >= 5 and sum(map(len, groups.values())) == len(list(model.shared_parameters()))


@pytest.mark.parametrize(("net", "height", "width"), [
    (SegNet, 33, 47), (UNet, 17, 31), (lambda c, w: build("deeplabv3plus", NYUV2, width=w, depth=18).backbone, 36, 44),
])  # fmt: skip
def test_sizes_that_no_power_of_two_divides(net, height, width):
    model = HardSharing(net(3, 2), NYUV2)
    assert {p.shape[2:] for p in model(images(2, 3, height, width)).predictions} == {(height, width)}


@pytest.mark.parametrize(("arch", "multiple"), [("deeplabv3", 8), ("deeplabv3plus", 4), ("fcn", 4)])
def test_a_size_that_does_not_fit_is_refused(cli, arch, multiple):
    more = () if arch == "fcn" else ("arch.depth=18",)
    result = cli(
        "data=rooms", f"arch={arch}", "arch.width=2", *more, "data.height=38", "data.train_size=16", "logger=none"
    )
    assert result.code == 2 and f"height and width are multiples of {multiple}, not 38x64" in result.err
    assert result.err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- oracles


def test_unpooling_is_pytorchs():
    x = torch.randn(2, 3, 9, 12, dtype=torch.double, requires_grad=True)
    pooled, indices = F.max_pool2d(x, 2, 2, return_indices=True)
    mine, theirs = unpool(pooled, indices, (9, 12)), F.max_unpool2d(pooled, indices, 2, 2, output_size=(9, 12))
    assert torch.equal(mine, theirs)
    slopes = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (mine, theirs)]
    assert torch.equal(*slopes)


def segnet_mtan(model: SegNetMTAN, x: torch.Tensor, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What SegNet's decoder gives, and the prediction of one task: level by level, with PyTorch's own unpooling."""
    net, masks = model.segnet, model.masks[task]
    first, last, places = {}, {}, {}
    for k in range(5):
        first[k] = net.encoder[k].first(x)
        last[k] = net.encoder[k].rest(first[k])
        x, places[k] = nn.MaxPool2d(2, return_indices=True)(last[k])
    larger, decoded = {}, {}
    for k in (4, 3, 2, 1, 0):
        larger[k] = nn.MaxUnpool2d(2)(x, places[k])
        x = decoded[k] = net.decoder_levels[k].rest(net.decoder_levels[k].first(larger[k]))
    seen = nn.MaxPool2d(2)(model.down[0](masks.encoder[0](first[0]) * last[0]))
    for k in (1, 2, 3, 4):
        mask = masks.encoder[k](torch.cat([first[k], seen], dim=1))
        seen = nn.MaxPool2d(2)(model.down[k](mask * last[k]))
    for k in (4, 3, 2, 1, 0):
        seen = model.up[k](nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)(seen))
        seen = masks.decoder[k](torch.cat([larger[k], seen], dim=1)) * decoded[k]
    return x, model.heads[task](seen)


def test_segnet_mtan_and_segnet_a_second_time():
    """In float64; with batch norm's statistics in use; the gradients, too."""
    model = with_statistics(build("segnet_mtan", NYUV2, width=3)).double()
    x = images(2, 3, 64, 32)["image"].double()
    for task, found in zip(NYUV2, model({"image": x}).predictions, strict=True):
        trunk, expected = segnet_mtan(model, x, task.name)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(model.segnet(x), trunk)
        first = model.segnet.encoder[0].first[0].weight
        one, two = (torch.autograd.grad(y.square().sum(), first, retain_graph=True)[0] for y in (found, expected))
        torch.testing.assert_close(one, two)
        assert (found.std((2, 3)) > 0).all()


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("stride", [8, 16])
def test_a_dilated_resnet_is_torchvisions_in_every_nth_pixel(depth, stride):
    """Where the strided network has a pixel, the dilated one has the same numbers; its weights fit as they are."""
    torch.manual_seed(0)
    net = with_statistics(DilatedResNet(3, depth, 64, stride, None)).double()
    with torch.device("meta"):
        peer = getattr(models, f"resnet{depth}")()
        peer.fc = nn.Identity()
    peer.load_state_dict(net.state_dict(), assign=True)
    peer = nn.Sequential(*list(peer.children())[:-2]).eval()
    x = images(1, 3, 64, 96)["image"].double()
    with torch.no_grad():
        found, expected = net(x)[1], peer(x)
    assert found.shape[2:] == (64 // stride, 96 // stride)
    step = 32 // stride
    torch.testing.assert_close(found[:, :, ::step, ::step], expected)


def test_the_head_of_deeplabv3_is_torchvisions():
    torch.manual_seed(0)
    head = with_statistics(DeepLabV3(3, 18).decoder(NYUV2[0]))
    with torch.device("meta"):
        peer = DeepLabHead(512, 13, atrous_rates=(12, 24, 36))
    peer.load_state_dict(dict(zip(peer.state_dict(), head.state_dict().values(), strict=True)), assign=True)
    x = torch.randn(1, 512, 4, 5)
    with torch.no_grad():
        expected = F.interpolate(peer.eval()(x), size=(32, 40), mode="bilinear", align_corners=True)
        torch.testing.assert_close(head(x), expected)


# ------------------------------------------------------------------------------------------------------------- weights


def test_pretrained_weights(monkeypatch):
    """torchvision's tensors, whichever name they are asked by."""
    torch.manual_seed(1)
    state = models.resnet18().state_dict()
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", lambda self, **_: dict(state))
    for name in ("IMAGENET1K_V1", "DEFAULT"):
        net = build("deeplabv3", NYUV2, depth=18, weights=name).backbone.resnet
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


ROOMS = ("data=rooms", "data.train_size=16", "data.test_size=8", "logger=none")


@pytest.mark.parametrize(("options", "code", "message"), [
    ((*ROOMS, "arch.weights=IMAGENET1K"), 2, ".weights: 'IMAGENET1K'; IMAGENET1K_V1, DEFAULT or null is needed; did"),
    ((*ROOMS, "arch.weights=IMAGENET1K_V1", "arch.width=8"), 2, ".weights: IMAGENET1K_V1 has width 64, not 8"),
    (("data=digits", "arch.weights=DEFAULT"), 2, ".weights: DEFAULT is made for 3 image channels, not 1"),
    ((*ROOMS, "arch.weights=IMAGENET1K_V1"), 1, ".weights=IMAGENET1K_V1: not in "),
])  # fmt: skip
def test_weights_that_cannot_be_had_are_one_line(cli, monkeypatch, tmp_path, options, code, message):
    def offline(self, **_):
        raise URLError("no network")

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    result = cli(*options, "arch=deeplabv3", "arch.depth=18", "logger=none")
    (line,) = result.err.splitlines()
    assert result.code == code and line.startswith(f"error: arch{message}")
    if code == 1:
        assert f"{tmp_path}/hub" in line and "no network" in line and "resnet18-f37072fd.pth" in line


# ------------------------------------------------------------------------------------------------ no last tensor


@pytest.mark.parametrize("options", [("loss=pcgrad", "step.gradients=features"), ("loss=rotograd",)])
def test_features_of_segnet_mtan_do_not_exist(cli, options):
    result = cli(*ROOMS, "arch=segnet_mtan", "arch.width=2", *options)
    assert result.code == 2 and "SegNetMTAN has none" in result.err and result.err.count("\n") == 1
