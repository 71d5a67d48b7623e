"""Sharing schemes on networks that read several stages' maps: pyramids of networks by name, DeepLabV3+."""

import json
import signal
import sys
import types
from itertools import pairwise

import pytest
import torch
import torchvision
from test_sharing import SCHEMES, build, double, of_file, outcome
from torch import nn
from torchvision.models.resnet import BasicBlock

from mtl.archs.check import check_model
from mtl.archs.model import HardSharing, count_parameters
from mtl.archs.stages import stages_of
from mtl.archs.timm import TimmBackbone
from mtl.archs.torchvision import TorchvisionBackbone
from mtl.engine.learner import Learner
from mtl.tasks import Classification, Depth, Normals, Segmentation

TASKS = Segmentation("classes", 5), Depth("depth")
SIZE = (32, 48)
LAYERS = ["layer1", "layer2", "layer3", "layer4"]


class Small(nn.Module):
    """A ResNet with timm's names and few channels, with and without `features_only`."""

    num_features = 6
    widths = [2, 3, 4, 6]

    def __init__(self, in_chans, maps):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(in_chans, 2, 3, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = 2
        for i, width in enumerate(self.widths):
            shortcut = nn.Conv2d(inputs, width, 1, 2 if i else 1)
            first = BasicBlock(inputs, width, 2 if i else 1, shortcut)
            self.add_module(LAYERS[i], nn.Sequential(first, *(BasicBlock(width, width) for _ in range(1 - i % 2))))
            inputs = width
        self.maps, channels, reduction = maps, [2, *self.widths], [2, 4, 8, 16, 32]
        if maps:
            self.feature_info = types.SimpleNamespace(reduction=lambda: reduction, channels=lambda: channels)
        else:
            self.feature_info, self.global_pool = [{"num_chs": n} for n in channels], nn.AdaptiveAvgPool2d(1)

    def forward_head(self, x):
        return self.global_pool(x)

    def forward(self, x):
        found = [x := self.act1(self.bn1(self.conv1(x)))]
        x = self.maxpool(x)
        found += [x := getattr(self, name)(x) for name in LAYERS]
        return found if self.maps else self.forward_head(x)


@pytest.fixture(autouse=True)
def fake_timm(monkeypatch):
    """The package is an extra."""

    def create_model(name, pretrained, in_chans, num_classes=None, features_only=False):
        return Small(in_chans, features_only)

    fake = types.SimpleNamespace(create_model=create_model, is_model=["small"].__contains__, list_models=lambda: [])
    monkeypatch.setitem(sys.modules, "timm", fake)
    torch.set_num_threads(1)


def small(tasks=TASKS):
    return lambda: TimmBackbone(3, "small", tasks=tasks)


def resnet18():
    return TorchvisionBackbone(3, "resnet18", tasks=TASKS)


BACKBONES = {
    "by_name": small(), "deeplabv3": of_file("deeplabv3", depth=18, width=2),
    "deeplabv3plus": of_file("deeplabv3plus", depth=18, width=2),
}  # fmt: skip
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def images():
    return {"image": torch.randn(2, 3, *SIZE)}


def alone(net, head, x):
    return head(net(x["image"]))


# -------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize(("backbone", "count"), [
    (resnet18, 4), (small(), 4), (small((Classification("a", 3),)), 4),
    (lambda: TorchvisionBackbone(3, "shufflenet_v2_x0_5", tasks=TASKS), 0),
])  # fmt: skip
def test_the_layers_one_after_another_are_the_network(backbone, count):
    net, x, kept = backbone().eval(), images()["image"], []
    assert len(net.stages()) == count
    if count:
        y = x
        for stage in stages_of(net, "test"):
            y = stage.start(y, kept)
            assert y.shape[1] == stage.inner
            y = stage.end(y)
            assert y.shape[1] == stage.channels
        assert torch.equal(net.finish(y, kept), net(x))


def test_maps_of_torchvisions_resnet_are_as_before():
    """Those of torchvision's own feature extractor, in training and in evaluation, under the same names."""
    torch.manual_seed(0)
    net, x = resnet18(), images()["image"]
    peer = torchvision.models.resnet18(weights=None)
    state = net.network.state_dict()
    assert list(state) == [name for name in peer.state_dict() if not name.startswith("fc.")]
    peer.load_state_dict(state, strict=False)
    peer = torchvision.models.feature_extraction.create_feature_extractor(peer, LAYERS)
    for training in (True, False):
        maps = zip(net.train(training).network(x).values(), peer.train(training)(x).values(), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in maps)


# ------------------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("backbone", [*BACKBONES.values(), resnet18], ids=[*BACKBONES, "resnet18"])
def test_cross_stitch_with_units_of_identity_is_single_networks(backbone):
    model, x = build("cross_stitch", TASKS, backbone).eval(), images()
    with torch.no_grad():
        for unit in model.units:
            for t, row in enumerate(unit):
                row.copy_(torch.eye(2)[t])
    expected = [alone(net, head, x) for net, head in zip(model.backbones, model.heads, strict=True)]
    assert len(model.units) == 3
    torch.testing.assert_close(list(model(x).predictions), expected)


def test_a_pyramid_sees_the_maps_after_the_units():
    model, x = double(build("cross_stitch", TASKS, small()), (2, 3, *SIZE))
    parts = [net.network for net in model.backbones]
    maps, seen = [net.maxpool(net.act1(net.bn1(net.conv1(x)))) for net in parts], [[], []]
    for name in LAYERS:
        maps = [getattr(net, name)(m) for net, m in zip(parts, maps, strict=True)]
        if name != "layer4":
            unit = torch.stack(list(model.units[LAYERS.index(name)]))
            maps = [unit[t, 0] * maps[0] + unit[t, 1] * maps[1] for t in (0, 1)]
        for t in (0, 1):
            seen[t].append(maps[t])
    expected = [head(net.pyramid(m, x)) for head, net, m in zip(model.heads, model.backbones, seen, strict=True)]
    torch.testing.assert_close(list(model({"image": x}).predictions), expected, rtol=1e-10, atol=1e-12)


@every_backbone
def test_ple_whose_gates_choose_a_tasks_experts_is_single_networks(backbone):
    model, x = build("ple", TASKS, BACKBONES[backbone], (3, *SIZE)).eval(), images()
    with torch.no_grad():
        for gates in model.gates:
            for gate in gates:
                gate.weight.zero_()
                gate.bias.copy_(torch.tensor([200.0, 0.0]))
    expected = [alone(nets[0], head, x) for nets, head in zip(model.own, model.heads, strict=True)]
    torch.testing.assert_close(list(model(x).predictions), expected)


@every_backbone
def test_mtan_with_masks_of_one_shares_hard(backbone):
    model, x = build("mtan", TASKS, BACKBONES[backbone]).eval(), images()
    with torch.no_grad():
        for mask in (mask for masks in model.masks for mask in masks):
            mask[-2].weight.zero_()
            mask[-2].bias.fill_(200.0)
    torch.testing.assert_close(list(model(x).predictions), [alone(model.backbone, head, x) for head in model.heads])


@pytest.mark.parametrize(("backbone", "level"), [("deeplabv3plus", 0), ("by_name", 0), ("by_name", 2)])
def test_a_task_of_mtan_sees_earlier_maps_through_its_mask(backbone, level):
    """One task has a mask of 0 at one level. All other masks are 1, so that the other task sees whole maps."""
    model, x = build("mtan", TASKS, BACKBONES[backbone]).eval(), images()
    with torch.no_grad():
        for t, masks in enumerate(model.masks):
            for l, mask in enumerate(masks):  # noqa: E741
                mask[-2].weight.zero_()
                mask[-2].bias.fill_(-200.0 if (t, l) == (0, level) else 200.0)
        net, y, kept = model.backbone, x["image"], []
        for stage in net.stages():
            y = stage(y, kept)
        expected = [head(net.finish(y, kept)) for head in model.heads]
        kept[level + (backbone == "by_name")] *= 0  # a pyramid also keeps the images
        expected[0] = model.heads[0](net.finish(y, kept))
        torch.testing.assert_close(list(model(x).predictions), expected)


# ---------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backbone", ["by_name", "deeplabv3plus"])
def test_a_loss_reaches_shared_and_own_parameters_only(scheme, backbone):
    model, x = build(scheme, TASKS, BACKBONES[backbone], (3, *SIZE)), images()
    check_model(model, x, [task.name for task in TASKS])
    names = {id(p): name for name, p in model.named_parameters()}
    shared = {names[id(p)] for p in model.shared_parameters()}
    for place, task in enumerate(TASKS):
        model.zero_grad()
        model.train()(x).predictions[place].square().mean().backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        own = {names[id(p)] for p in model.own_parameters(task.name)}
        assert own <= reached <= own | shared and not own & shared
        # The pyramid belongs to the last stage, which in these two schemes is a task's own.
        if backbone == "by_name" and scheme in ("cross_stitch", "ple"):
            assert any(".pyramid." in name for name in own)


def test_numbers_of_parameters_of_a_pyramid_on_resnet50():
    """By hand from the layers: ResNet-50 without its classifier has 23,508,032 parameters."""
    widths, tasks = (256, 512, 1024, 2048), (Segmentation("segmentation", 13), Depth("depth"), Normals("normals"))
    pyramid = sum(128 * (c + 1) for c in widths) + 9 * 128**2 + 2 * 128
    one, heads = 23_508_032 + pyramid, sum(9 * 128**2 + 2 * 128 + (128 + 1) * outputs for outputs in (13, 1, 3))

    def number(scheme, **options):
        with torch.device("meta"):
            net = lambda: TorchvisionBackbone(3, "resnet50", tasks=tasks)  # noqa: E731
            model = build(scheme, tasks, net, (3, 288, 384), **options) if scheme else HardSharing(net(), tasks)
            return count_parameters(model)

    assert number(None) == one + heads
    assert number("cross_stitch") == 3 * one + 3 * 9 + heads
    masks = [(1 + (i > 0)) * c * c // 4 + c // 4 * c + 2 * (c // 4 + c) for i, c in enumerate(widths)]
    onward = [9 * a * b + 2 * b for a, b in pairwise(widths)]
    assert number("mtan", reduction=4) == one + 3 * sum(masks) + sum(onward) + heads


# ---------------------------------------------------------------------------------------------------------------- runs

ROOMS = ("data=rooms", "data.train_size=8", "data.test_size=4", "data.batch_size=4", "data.height=32", "data.width=32",
         "trainer.epochs=2", "trainer.device=cpu", "logger=none")  # fmt: skip


def test_a_network_by_name_trains_and_resumes_exactly(cli, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)
    words, train_epoch = (
        (*ROOMS, "arch=timm", "arch.name=small", "sharing=mtan", "loss=pcgrad"),
        Learner.train_epoch,
    )

    def interrupted(self, batches, epoch):
        row = train_epoch(self, batches, epoch)
        return signal.raise_signal(signal.SIGINT) if epoch else row

    whole = cli(*words, "output_root=whole")
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train_epoch", interrupted)
        assert cli(*words, "output_root=parts").code == 130
    assert cli(*words, "output_root=parts").code == 0
    torch.testing.assert_close(outcome("parts"), outcome("whole"), rtol=0, atol=0)
    assert "normals_mean" in json.dumps(outcome("whole")[0])


@pytest.mark.parametrize(("words", "message"), [
    (("arch=torchvision", "arch.name=mobilenet_v3_small", "sharing=mtan"),
     "arch: MTAN needs a backbone in stages, and this TorchvisionBackbone has none; these have: resnet20 to resnet110, "
     "resnet18, wide_resnet, vgg16_bn, segnet, unet, deeplabv3, deeplabv3plus, fcn, and the ResNets of torchvision and "
     "timm; "),
    (("arch=torchvision", "arch.name=resnet18", "data.height=34", "sharing=mtan"), "multiples of 4, not 34x32"),
    (("arch=segnet", "arch.width=1", "data.height=24", "sharing=mtan"),
     "SegNet needs images of at least 32x32, not 24x32"),
    (("arch=segnet_mtan", "arch.width=1", "data.height=24"), "SegNet needs images of at least 32x32, not 24x32"),
    (("arch=unet", "arch.width=1", "data.width=12"), "UNet needs images of at least 16x16, not 32x12"),
    (("arch=unet", "arch.width=1", "data.width=12", "sharing=ple"), "UNet needs images of at least 16x16, not 32x12"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(cli, words, message):
    result = cli(*ROOMS, *words)
    assert result.code == 2 and result.err.count("\n") == 1
    assert message in result.err
