"""Backbones and the multi-task model against published sizes and torchvision's nets."""

import inspect
import random
import re

import numpy as np
import pytest
import shipped
import torch
import torchvision
import yaml
from torch import nn
from torch.utils.checkpoint import checkpoint

from mtl.archs.check import ArchError, check_model
from mtl.archs.model import HardSharing, Model, Outputs, count_macs, count_parameters
from mtl.archs.resnet import ResNet, WideResNet
from mtl.archs.vgg import VGG16BN
from mtl.config import schema
from mtl.tasks import Classification, Depth, Normals, Regression, Segmentation

FILES = {file.stem: file for file in shipped.files("conf/arch/*.yaml")}
del FILES["point"]  # no network: tests/test_toy_data.py
del FILES["mlp"]  # of all inputs of the data: tests/test_table.py
del FILES["mpnn"], FILES["nnconv"]  # molecules: tests/test_molecules.py
del FILES["timm"]  # an extra: tests/test_torchvision_arch.py
del FILES["retina"]  # boxes: tests/test_detection.py
FINE, COARSE, INK = Classification("fine", 100), Classification("coarse", 20), Regression("ink")
NYUV2 = Segmentation("segmentation", 13), Depth("depth"), Normals("normals")
SMALL = {
    "wide_resnet": {"width": 1}, "segnet": {"width": 4}, "segnet_mtan": {"width": 4}, "unet": {"width": 4},
    "deeplabv3": {"width": 4, "depth": 18}, "deeplabv3plus": {"width": 4, "depth": 18},
}  # fmt: skip


def build(arch: str, tasks=(FINE, COARSE), in_channels: int = 3, seed: int = 0, **overrides) -> Model:
    """The model of a config file; `overrides` as on the command line."""
    torch.manual_seed(seed)
    node = {**yaml.safe_load(FILES[arch].read_text()), **overrides}
    whole = "tasks" in inspect.signature(schema.locate(node["_target_"], "arch")).parameters
    built = schema.build(node, "arch", in_channels=in_channels, **({"tasks": tasks} if whole else {}))
    return built if isinstance(built, Model) else HardSharing(built, tasks)


def images(*shape: int) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def sizes(arch: str, tasks, height: int = 32, width: int = 32) -> tuple[int, int]:
    with torch.device("meta"):
        model = build(arch, tasks)
        return count_parameters(model), count_macs(model, images(1, 3, height, width))


@torch.no_grad()
def with_statistics(module: nn.Module) -> nn.Module:
    """In evaluation mode, with batch-norm statistics and affine parameters that are not 0 and 1."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.running_var, m.weight, m.bias):
                t.add_(0.1 * torch.rand_like(t))
    return module.eval()


@pytest.mark.parametrize("arch, two_heads, mmacs, published", [
    ("resnet20", 279_624, 40.82, "0.28"), ("resnet56", 862_920, 125.75, "0.86"),
    ("vgg16_bn", 15_310_008, 313.78, "15.30"), ("wide_resnet", 36_536_884 + 20 * 641, 5243.40, "36.54"),
])  # fmt: skip
def test_published_sizes(arch, two_heads, mmacs, published):
    """Both tasks exactly; the 100-class net alone as published, in millions of parameters."""
    parameters, macs = sizes(arch, (FINE, COARSE))
    assert parameters == two_heads and f"{macs / 1e6:.2f}" == f"{mmacs:.2f}"
    assert f"{sizes(arch, (FINE,))[0] / 1e6:.2f}" == published


@pytest.mark.parametrize("arch", FILES)
def test_sizes_in_config_comments(arch):
    """Every config file states the sizes of its net: with CIFAR-100's tasks, or with NYUv2's where it names NYUv2."""
    first = FILES[arch].read_text().partition("\n")[0]
    found = re.search(r"([\d.]+) M parameters, ([\d.]+) ([MG])MAC", first)
    parameters, macs = sizes(arch, NYUV2, 288, 384) if "NYUv2" in first else sizes(arch, (FINE, COARSE))
    measured = f"{parameters / 1e6:.3g} M parameters, {macs / 1e6:.3g} MMAC"
    assert found, f"conf/arch/{arch}.yaml: end its first line with: {measured}"
    for text, value in ((found[1], parameters / 1e6), (found[2], macs / {"M": 1e6, "G": 1e9}[found[3]])):
        rounded = f"{value:.{len(text.partition('.')[2])}f}"
        assert rounded == text, f"conf/arch/{arch}.yaml says {text}, measured: {measured}"


@pytest.mark.parametrize("net", ["resnet18", "vgg16_bn"])
def test_outputs_equal_torchvisions(net):
    """ResNet-18 with a 3x3 stem and no pooling, VGG-16's convolutions; the weights copied over in order."""
    torch.manual_seed(0)
    ours = with_statistics(ResNet(3, 18) if net == "resnet18" else VGG16BN(3).features)
    with torch.device("meta"):
        peer = torchvision.models.resnet18() if net == "resnet18" else torchvision.models.vgg16_bn().features
        if net == "resnet18":
            peer.conv1, peer.maxpool, peer.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    peer.load_state_dict(dict(zip(peer.state_dict(), ours.state_dict().values(), strict=True)), assign=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), peer.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", FILES)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_forward_and_parameters(arch, in_channels):
    """One finite prediction a task, in order, whose gradient reaches all; heads and backbone partition the model."""
    model = build(arch, (FINE, COARSE, Regression("ink")), in_channels, **SMALL.get(arch, {}))
    predictions = model(images(2, in_channels, 32, 32)).predictions
    assert [tuple(p.shape) for p in predictions] == [(2, 100), (2, 20), (2, 1)]
    assert all(p.isfinite().all() for p in predictions)
    sum(p.square().sum() for p in predictions).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    parts = [*model.shared_parameters(), *(p for t in model.heads for p in model.own_parameters(t))]
    assert sorted(map(id, parts)) == sorted(map(id, model.parameters()))
    assert [p.shape for p in model.own_parameters("coarse")][-2:] == [(20, model.trunk.out_features), (20,)]


@pytest.mark.parametrize("arch", ["resnet20", "vgg16_bn", "wide_resnet"])
def test_initialisation_is_a_function_of_the_seed(arch):
    """The same backbone whatever heads follow; He's variance; another seed gives another net."""
    options = SMALL.get(arch, {})
    first, again, other = (build(arch, seed=seed, **options).state_dict() for seed in (0, 0, 1))
    single = build(arch, (COARSE,), **options).backbone.state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert single and all(torch.equal(first[f"backbone.{k}"], v) for k, v in single.items())
    convolutions = [k for k, v in first.items() if v.dim() == 4]
    assert not any(torch.equal(first[k], other[k]) for k in convolutions)
    last = first[convolutions[-1]]
    assert last.std().item() == pytest.approx((2 / last[:, 0].numel()) ** 0.5, rel=0.05)


def test_refusals():
    """A backbone without an int out_features, by name; a Wide ResNet whose depth is not 6n + 4."""
    with pytest.raises(ValueError, match="Flatten needs an int attribute out_features"):
        HardSharing(nn.Flatten(), (FINE,))
    for depth in (4, 20, 29):
        with pytest.raises(ValueError, match=f"depth: {depth} is not"):
            WideResNet(3, depth=depth)


@pytest.mark.parametrize("training", [True, False])
def test_counting_macs_leaves_the_model_alone(training):
    """The same number in both modes; mode, batch-norm statistics and gradients stay as they were."""
    model = with_statistics(build("resnet20")).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert count_macs(model, images(1, 3, 32, 32)) == 40_820_224
    assert all(m.training is training for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------- a user's own nets


class Own(nn.Module):
    """One convolution; `step(net, features)` is what is wrong with it, on the way to its features (N, 8)."""

    out_features = 8

    def __init__(self, step=lambda net, f: f, **attributes):
        super().__init__()
        self.conv, self.step = nn.Conv2d(1, 8, 3, padding=1), step
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.step(self, self.conv(x).mean((2, 3)))


def try_out(backbone, tasks=(FINE, INK)) -> HardSharing:
    """As `build_learner` does it."""
    model = HardSharing(backbone, tasks)
    count_macs(model, images(1, 1, 8, 8))
    check_model(model, images(2, 1, 8, 8), [task.name for task in tasks])
    return model


@pytest.mark.parametrize(("returned", "message"), [
    ({"fine": 0, "ink": 1}, r"returned Outputs of a dict; Outputs\(\[…\]\) is needed, a list with one prediction"),
    ([0], r"returned 1 predictions; .* for each of 2 tasks, in this order: fine, ink"),
])  # fmt: skip
def test_predictions_of_a_wrong_kind_are_named(returned, message):
    class Wrong(HardSharing):
        def forward(self, batch):
            return Outputs(returned)

    with pytest.raises(ArchError, match=message):
        check_model(Wrong(Own(), (FINE, INK)), images(2, 1, 8, 8), ["fine", "ink"])


def average(net, f):
    """A running mean outside all buffers."""
    net.mean = f.detach().mean(0) if net.mean is None else 0.9 * net.mean + 0.1 * f.detach().mean(0)
    return f - net.mean


def count(net, f):
    net.calls += 1
    return f / net.calls


@pytest.mark.parametrize("backbone, message", [
    (lambda: Own(out_features=7), r"features of shape \(1, 8\) for .*out_features=7; \(1, 7\) is needed"),
    (lambda: Own(out_features=8.0), "Own needs an int .* not 8.0"), (lambda: Own(out_features=0), "not 0"),
    (lambda: len, "a builtin_function_or_method was built"), (lambda: Own(lambda net, f: (f, f)), "returned a tuple"),
    (lambda: Own(lambda net, f: f[..., None, None]), r"\(1, 8, 1, 1\) .*\.mean\(\(2, 3\)\)"),
    (lambda: Own(lambda net, f: f.sum(0)), r"features of shape \(8,\)"),
    (lambda: Own(lambda net, f: None), "a NoneType"),
    (lambda: Own(lambda net, f: f.half()), "float16 features for float32 inputs"),
    (lambda: Own(lambda net, f: f.to(torch.complex64)), "complex64 features"),
    (lambda: Own(lambda net, f: f.detach()), "no loss reaches a parameter of Own"),
    (lambda: Own(lambda net, f: net.w * f, w=torch.ones(8, requires_grad=True)), r"1 .*shape \(8,\).*nn.Parameter"),
    (lambda: Own(lambda net, f: net.more[0](f), more=[nn.Linear(8, 8)]), "2 weights .* nn.ModuleList"),
    (lambda: Own(average, mean=None), "other features .*register_buffer"),
    (lambda: Own(count, calls=0), "other features"),
    (lambda: nn.Sequential(nn.ReLU(inplace=True), Own()), "Sequential needs an int"),
    (lambda: Own(lambda net, f: f, lazy=nn.LazyLinear(3)), "the parameter backbone.lazy.weight has no shape yet"),
    (lambda: Own(unused=nn.Linear(2, 2)), r"no task uses the parameter backbone.unused.weight and 1 more; .*Identity"),
])  # fmt: skip
def test_a_backbone_that_cannot_be_trained_is_refused(backbone, message):
    with pytest.raises(ArchError, match=message):
        try_out(backbone())


def test_images_changed_in_place_are_refused():
    """FAMO and others look at the same batch again."""
    net = nn.Sequential(nn.ReLU(inplace=True), Own())
    net.out_features = 8
    with pytest.raises(ArchError, match="changes its inputs in place"):
        try_out(net)


def test_decoders_are_checked():
    class Mean(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean(0)

    with pytest.raises(ArchError, match=r"Own.decoder made a NoneType for task 'a'"):
        try_out(Own(decoder=lambda task: None), (Regression("a"),))
    with pytest.raises(ArchError, match=r"the head of task 'a' returned \(1,\) for 2 samples"):
        try_out(Own(decoder=lambda task: Mean(8, 1)), (Regression("a"),))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("backbone", [
    lambda: Own(lambda net, f: net.lazy(f), lazy=nn.LazyLinear(8)), lambda: Own().requires_grad_(False),
    lambda: Own(lambda net, f: (f * net.w).real, w=nn.Parameter(torch.ones(8, dtype=torch.complex64))),
    lambda: Own(lambda net, f: net.late(f), late=nn.Dropout(0.5)), lambda: Own(out_features=np.int64(8)),
    lambda: Own(lambda net, f: f + torch.rand(()) + float(np.random.rand()) + random.random()),
    lambda: Own(lambda net, f: f if net.training else f.detach()),
    lambda: Own(unused=nn.Linear(2, 2).requires_grad_(False)),
    lambda: Own(lambda net, f: checkpoint(nn.functional.relu, f, use_reentrant=True)),
])  # fmt: skip
def test_a_backbone_that_can_be_trained_passes(backbone):
    """Lazy, frozen, complex, random, with dropout, unused frozen or half-frozen parts, re-entrant checkpoints."""
    assert all(p.grad is None for p in try_out(backbone()).parameters())


def test_trying_out_leaves_model_and_generators_alone():
    """A parameter that the first batch sets and running averages are as they were, as are all random numbers."""

    def first_batch(net, f):
        if not net.done:
            net.scale.data = 1 / f.detach().abs().mean(0)
            net.done.fill_(True)
        return net.norm(f * net.scale + torch.rand(8) + random.random() + np.random.rand())

    net = Own(first_batch, scale=nn.Parameter(torch.ones(8)), norm=nn.BatchNorm1d(8))
    net.register_buffer("done", torch.tensor(False))
    model = HardSharing(net.train(), (FINE,))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    count_macs(model, images(1, 1, 8, 8))
    check_model(model, images(2, 1, 8, 8), ["fine"])
    assert states == [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_task_may_bear_the_name_of_a_method():
    model = try_out(Own(), (Regression("type"), Regression("values"), Regression("train")))
    assert list(model.heads) == ["type", "values", "train"] and len(list(model.own_parameters("values"))) == 2
    assert sum(k.startswith("heads.") for k in model.state_dict()) == 6
