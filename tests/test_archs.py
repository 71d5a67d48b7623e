"""Backbones and the multi-task model against published sizes, torchvision's nets and a second count of MACs."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from torch import nn

from mtl.archs.model import MultiTaskModel, count_macs, count_parameters
from mtl.archs.resnet import ResNet, WideResNet
from mtl.archs.vgg import VGG16BN
from mtl.config import schema
from mtl.tasks import Classification, Regression

FILES = {file.stem: file for file in sorted((Path(__file__).parents[1] / "conf" / "arch").glob("*.yaml"))}
FINE, COARSE = Classification("fine", 100), Classification("coarse", 20)
every_arch = pytest.mark.parametrize("arch", FILES)


def backbone(arch: str, in_channels: int = 3, **overrides) -> nn.Module:
    """The backbone of a config file; `overrides` as on the command line."""
    return schema.build({**yaml.safe_load(FILES[arch].read_text()), **overrides}, "arch", in_channels=in_channels)


def small(arch: str, in_channels: int = 3) -> nn.Module:
    return backbone(arch, in_channels, **({"width": 1} if arch == "wide_resnet" else {}))


def seeded(make, seed: int = 0):
    torch.manual_seed(seed)
    return make()


@torch.no_grad()
def with_statistics(module: nn.Module) -> nn.Module:
    """In evaluation mode, with batch-norm statistics and affine parameters that are not 0 and 1."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.running_var, m.weight, m.bias):
                t.add_(0.1 * torch.rand_like(t))
    return module.eval()


@torch.no_grad()
def macs_by_hooks(model: nn.Module, shape) -> int:
    """Convolutions: outputs times kernel size; linear layers: number of weights."""
    counted = []

    def hook(m, _, out):
        counted.append(m.weight.numel() * (out[0, 0].numel() if isinstance(m, nn.Conv2d) else 1))

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model.eval()(torch.zeros(1, *shape, device=next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    return sum(counted)


@pytest.mark.parametrize(
    "arch, tasks, parameters, mmacs",
    [
        ("resnet20", (FINE, COARSE), 279_624, 40.82),
        ("resnet56", (FINE, COARSE), 862_920, 125.75),
        ("vgg16_bn", (FINE, COARSE), 15_310_008, 313.78),
        ("resnet20", (FINE,), 0.28e6, 40.82),
        ("resnet56", (FINE,), 0.86e6, 125.75),
        ("vgg16_bn", (FINE,), 15.30e6, 313.77),
        ("wide_resnet", (FINE,), 36_536_884, None),
        ("wide_resnet", (FINE,), 36.5e6, None),
    ],
)
def test_published_sizes(arch, tasks, parameters, mmacs):
    """Exact counts where they are integers, otherwise to the digits that are published."""
    with torch.device("meta"):
        model = MultiTaskModel(backbone(arch), tasks)
    tolerance = 0 if isinstance(parameters, int) else 0.05e6 if arch == "wide_resnet" else 0.005e6
    assert abs(count_parameters(model) - parameters) <= tolerance
    if mmacs:
        assert count_macs(model, (3, 32, 32)) / 1e6 == pytest.approx(mmacs, abs=0.005)


@every_arch
def test_config_comment_and_macs(arch):
    """The sizes in the comment of every config file hold for both tasks together; MACs agree with a second count."""
    with torch.device("meta"):
        model = MultiTaskModel(backbone(arch), (FINE, COARSE))
    macs = count_macs(model, (3, 32, 32))
    assert macs == macs_by_hooks(model, (3, 32, 32))
    million, number, unit = re.search(r"([\d.]+) M parameters, ([\d.]+) ([MG])MAC", FILES[arch].read_text()).groups()
    for text, value in ((million, count_parameters(model) / 1e6), (number, macs / {"M": 1e6, "G": 1e9}[unit])):
        assert f"{value:.{len(text.partition('.')[2])}f}" == text


def test_resnet18_equals_torchvision():
    """With a 3x3 stem and no pooling in torchvision's net, and its weights copied over in order."""
    ours = with_statistics(seeded(lambda: ResNet(3, 18)))
    peer = torchvision.models.resnet18()
    peer.conv1, peer.maxpool, peer.fc = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity()
    source, target = ours.state_dict(), peer.state_dict()
    assert [t.shape for t in source.values()] == [t.shape for t in target.values()]
    peer.load_state_dict(dict(zip(target, source.values(), strict=True)))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peer.eval()(x), rtol=1e-5, atol=1e-5)


def test_vgg16_features_equal_torchvision():
    """The convolutions are torchvision's vgg16_bn; only the fully connected layers are narrower."""
    ours = with_statistics(seeded(lambda: VGG16BN(3))).features
    with torch.device("meta"):
        peer = torchvision.models.vgg16_bn().features
    peer.load_state_dict(ours.state_dict(), assign=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peer.eval()(x), rtol=1e-5, atol=1e-5)


@every_arch
@pytest.mark.parametrize("in_channels", [1, 3])
def test_forward(arch, in_channels):
    """One finite prediction a task, in order, whose gradient reaches every parameter."""
    model = seeded(lambda: MultiTaskModel(small(arch, in_channels), (FINE, COARSE, Regression("ink"))))
    predictions = model(torch.randn(2, in_channels, 32, 32))
    assert [tuple(p.shape) for p in predictions] == [(2, 100), (2, 20), (2, 1)]
    assert all(p.isfinite().all() for p in predictions)
    sum(p.square().sum() for p in predictions).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_arch
def test_shared_and_head_parameters_partition_the_model(arch):
    """Every parameter is shared or belongs to one head, and none is both."""
    with torch.device("meta"):
        model = MultiTaskModel(backbone(arch), (FINE, COARSE))
    parts = [*model.shared_parameters(), *model.head_parameters("fine"), *model.head_parameters("coarse")]
    assert sorted(map(id, parts)) == sorted(map(id, model.parameters()))
    features = model.backbone.out_features
    assert [p.shape for p in model.head_parameters("coarse")] == [(20, features), (20,)]


@pytest.mark.parametrize("arch", ["resnet20", "vgg16_bn", "wide_resnet"])
def test_initialisation_is_a_function_of_the_seed(arch):
    """The same seed gives the same backbone whatever heads follow; another seed gives another."""
    first = seeded(lambda: MultiTaskModel(small(arch), (FINE, COARSE))).state_dict()
    again = seeded(lambda: MultiTaskModel(small(arch), (FINE, COARSE))).state_dict()
    single = seeded(lambda: MultiTaskModel(small(arch), (COARSE,))).state_dict()
    other = seeded(lambda: MultiTaskModel(small(arch), (FINE, COARSE)), seed=1).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(torch.equal(first[k], v) for k, v in single.items() if k.startswith("backbone."))
    convolutions = [k for k, v in first.items() if v.dim() == 4]
    assert convolutions and not any(torch.equal(first[k], other[k]) for k in convolutions)
    k = convolutions[-1]  # He's fan-out variance
    assert first[k].std() == pytest.approx((2 / first[k][:, 0].numel()) ** 0.5, rel=0.05)


def test_model_needs_the_width_of_the_features():
    """A backbone without an int out_features is refused by name."""
    with pytest.raises(ValueError, match="Flatten needs an int attribute out_features"):
        MultiTaskModel(nn.Flatten(), (FINE,))


@pytest.mark.parametrize("depth", [4, 20, 29])
def test_wide_resnet_refuses_other_depths(depth):
    """Only 6n + 4."""
    with pytest.raises(ValueError, match=f"depth: {depth} is not"):
        WideResNet(3, depth=depth)


@pytest.mark.parametrize("training", [True, False])
def test_counting_macs_leaves_the_model_alone(training):
    """The same number in both modes; mode, batch-norm statistics and gradients stay as they were."""
    model = with_statistics(MultiTaskModel(small("resnet20"), (FINE,))).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert count_macs(model, (3, 32, 32)) == 40_818_944
    assert all(m.training is training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
