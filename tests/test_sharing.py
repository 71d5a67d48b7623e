"""Sharing schemes: their equations written again, whose the parameters are, runs through the command line."""

import json
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from test_archs import FILES, images
from test_config import composed, identity
from test_report import write
from torch import nn

import mtl
from mtl.archs.check import check_model
from mtl.archs.model import ArchError, HardSharing, Model, count_parameters
from mtl.archs.sharing.cgc import CGC
from mtl.archs.sharing.cross_stitch import CrossStitch
from mtl.archs.sharing.mmoe import MMoE
from mtl.archs.sharing.mtan import MTAN
from mtl.archs.sharing.ple import PLE
from mtl.archs.stages import BackboneStage, resize
from mtl.config import schema
from mtl.config.identity import identify
from mtl.data.inputs import Rows
from mtl.data.molecules import Molecules
from mtl.engine import checkpoint
from mtl.engine.learner import Learner
from mtl.inspect.microscope import layer_groups
from mtl.report.protocols import benchmarks
from mtl.report.runs import load
from mtl.tasks import Classification, Depth, Normals, Segmentation

SCHEMES = {"cross_stitch": CrossStitch, "mtan": MTAN, "mmoe": MMoE, "cgc": CGC, "ple": PLE}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
A, B, C = Classification("a", 3), Classification("b", 2), Classification("c", 4)
MAPS = Segmentation("classes", 5), Depth("depth"), Classification("scene", 4)


class Staged(nn.Module):
    """Three stages of 2, 4 and 8 channels, smooth, with something kept, and parameters that only `finish` uses."""

    out_features = 8

    def __init__(self, in_channels=3):
        super().__init__()
        widths = [in_channels, 2, 4, 8]
        self.first = nn.ModuleList(nn.Conv2d(a, b, 3, 2 if i else 1, 1) for i, (a, b) in enumerate(pairwise(widths)))
        self.last = nn.ModuleList(nn.Conv2d(c, c, 3, 1, 1) for c in widths[1:])
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x):
        kept = []
        for stage in self.stages():
            x = stage(x, kept)
        return self.finish(x, kept)

    def stages(self):
        return [
            BackboneStage(
                [self.first[i], self.last[i]], self._start(i), 2 * 2**i, lambda x, i=i: self.last[i](x).tanh(), 2 * 2**i
            )
            for i in range(3)
        ]

    def finish(self, x, kept):
        return (self.scale * x.mean((2, 3))) + kept[0].mean()

    def _start(self, i):
        def start(x, kept):
            if i == 1:
                kept.append(x)
            return self.first[i](x).tanh()

        return start


def build(scheme, tasks, backbone=lambda: Staged(), shape=(3, 8, 8), seed=0, **options):
    torch.manual_seed(seed)
    given = {"build_backbone": backbone, "tasks": tasks, "shapes": {"image": shape}}
    if scheme in ("cross_stitch", "mtan"):
        del given["shapes"]
    return SCHEMES[scheme](**given, **options)


def of_file(arch, **options):
    node = {**yaml.safe_load(FILES[arch].read_text()), **options}
    return lambda: schema.build(node, "arch", in_channels=3)


@pytest.fixture(autouse=True)
def threads():
    torch.set_num_threads(1)


# -------------------------------------------------------------------------------------------------------------- stages

STAGED = {
    "resnet20": ({}, (8, 8), 3), "wide_resnet": ({"width": 1, "depth": 10}, (8, 8), 3), "vgg16_bn": ({}, (32, 32), 5),
    "torchvision": ({"name": "resnet18"}, (32, 32), 4), "segnet": ({"width": 2}, (33, 47), 10),
    "unet": ({"width": 2}, (17, 31), 9), "deeplabv3": ({"width": 2, "depth": 18}, (40, 48), 4),
    "deeplabv3plus": ({"width": 2, "depth": 18}, (36, 44), 4), "fcn": ({"width": 2}, (16, 24), 3),
}  # fmt: skip


@pytest.mark.parametrize("arch", STAGED)
def test_the_stages_one_after_another_are_the_network(arch):
    options, size, number = STAGED[arch]
    net = of_file(arch, **options)().eval()
    x = first = images(2, 3, *size)["image"]
    kept, known, stages = [], set(), net.stages()
    assert len(stages) == number
    with torch.no_grad():
        for stage in stages:
            x = stage.start(x, kept)
            assert x.shape[1] == stage.inner
            x = stage.end(x)
            assert x.shape[1] == stage.channels
            mine = {id(p) for m in stage.modules for p in m.parameters()}
            assert mine and not mine & known
            known |= mine
        assert torch.equal(net.finish(x, kept), net(first))


@pytest.mark.parametrize(
    ("old", "new"), [((33, 47), (16, 23)), ((33, 47), (17, 24)), ((8, 8), (8, 8)), ((3, 5), (9, 9))]
)
def test_resizing_gives_the_size_and_keeps_constants(old, new):
    x = torch.full((2, 3, *old), 7.0)
    assert torch.equal(resize(x, torch.zeros(1, 1, *new)), torch.full((2, 3, *new), 7.0))


def test_halving_takes_the_largest_of_four():
    x = torch.randn(2, 3, 8, 6)
    assert torch.equal(resize(x, torch.zeros(1, 1, 4, 3)), F.max_pool2d(x, 2))


# --------------------------------------------------------------------------------------------------------- parameters


@every_scheme
@pytest.mark.parametrize(("arch", "tasks"), [("wide_resnet", (A, B)), ("fcn", MAPS), ("fcn", MAPS[:1])])
def test_every_parameter_has_the_owner_that_is_declared(scheme, arch, tasks):
    options, size, _ = STAGED[arch]
    model = build(scheme, tasks, of_file(arch, **options), (3, *size))
    outputs = check_model(model, images(2, 3, *size), [t.name for t in tasks])
    shapes = [(2, t.outputs) if isinstance(t, Classification) else (2, t.outputs, *size) for t in tasks]
    assert [tuple(p.shape) for p in outputs.predictions] == shapes
    assert (outputs.features is None) == (scheme not in ("mmoe", "cgc"))
    shared = list(model.shared_parameters())
    own = [p for t in tasks for p in model.own_parameters(t.name)]
    assert len({id(p) for p in (*shared, *own)}) == len(shared) + len(own) == len(list(model.parameters()))
    groups = layer_groups(model)
    assert len(groups) >= 3 and {id(p) for g in groups.values() for p in g} <= {id(p) for p in shared}
    assert sum(map(len, groups.values())) == len(shared)


def test_wrong_declarations_are_refused():
    """What LibMTL counts as shared in cross-stitch networks, and what the name "task experts" suggests in PLE."""
    x, names = images(2, 3, 8, 8), ["a", "b"]
    stitched = build("cross_stitch", (A, B))
    stitched.shared_parameters = lambda: [*stitched.backbones.parameters(), *stitched.units.parameters()]
    stitched.own_parameters = lambda task: stitched.heads[names.index(task)].parameters()
    with pytest.raises(ArchError, match="is declared shared, but only task 'a' uses it"):
        check_model(stitched, x, names)
    ple = build("ple", (A, B))
    ple.shared_parameters = lambda: ple.shared.parameters()
    ple.own_parameters = lambda task: [
        p for part in (ple.own, ple.gates, ple.heads) for p in part[names.index(task)].parameters()
    ]
    with pytest.raises(ArchError, match=r"own.0.* is declared task 'a''s own, but task 'b' uses it"):
        check_model(ple, x, names)


def test_numbers_of_parameters_follow_from_the_backbone():
    """ResNet-20 has 271,824 parameters, its stages 16, 32 and 64 channels."""
    net, tasks = of_file("resnet20"), (A, B, C)
    one, heads, gate = count_parameters(net()), 9 * (64 + 1), 3 * 64 + 1
    assert one == 271_824

    def number(scheme, **options):
        with torch.device("meta"):
            return count_parameters(build(scheme, tasks, net, **options)) - heads

    assert number("cross_stitch") == 3 * one + 2 * 9
    assert number("cross_stitch", per_channel=True) == 3 * one + 9 * (16 + 32)
    assert number("mmoe", experts=4) == 4 * one + 3 * 4 * gate
    assert number("cgc", shared_experts=2) == 5 * one + 3 * 3 * gate
    gates = 3 * 2 * (gate + 17 + 33) + 4 * (gate + 17)
    assert number("ple") == 4 * one + gates
    masks = sum((a + c) * c + 2 * c * 2 for a, c in ((16, 16), (64, 32), (128, 64)))
    onward = 9 * (16 * 32 + 32 * 64) + 2 * (32 + 64)
    assert number("mtan") == one + 3 * masks + onward


def test_numbers_of_parameters_beside_libmtl():
    """ResNet-50 and DeepLab heads on NYUv2 (3 tasks, 288x384). LibMTL publishes no numbers for schemes.

    Its numbers follow from the layers in its code, by hand: two experts in MMoE, one shared and one for each task in
    CGC and PLE. Ours differ by what docs/sharing.md says.
    """
    one, image, wide = 23_508_032, 3 * 288 * 384, (256, 512, 1024, 2048)
    pooled = 2 * 2048 * 256 + 3 * 9 * 2048 * 256 + 5 * 256 * 256 + 6 * 2 * 256  # five branches, and their projection
    heads = sum(pooled + 9 * 256**2 + 2 * 256 + (256 + 1) * outputs for outputs in (13, 1, 3))
    assert one + heads == 71_888_721  # published
    # Masks have biases there; between two stages is a bottleneck with a shortcut. Ours is a 3x3 convolution.
    masks = [(1 + (i > 0)) * c * c // 4 + c // 4 * c + 2 * (c // 4 + c) for i, c in enumerate(wide)]
    biases = [c // 4 + c for c in wide]
    bottlenecks = [a * b // 4 + 9 * (b // 4) ** 2 + b // 4 * b + a * b + 2 * (2 * b // 4 + 2 * b)
                   for a, b in pairwise(wide)]  # fmt: skip
    convolutions = [9 * a * b + 2 * b for a, b in pairwise(wide)]
    maps = (image, 64 * 72 * 96, 256 * 72 * 96, 512 * 36 * 48, 1024 * 36 * 48)  # what LibMTL's gates in PLE see
    libmtl = {
        "cross_stitch": 3 * one + 4 * 9 + heads,
        "mtan": one + 3 * (sum(masks) + sum(biases)) + sum(bottlenecks) + heads,
        "mmoe": 2 * one + 3 * 2 * (image + 1) + heads,
        "cgc": 4 * one + 3 * 2 * (image + 1) + heads,
        "ple": 4 * one + 3 * 2 * (sum(maps) + 5) + heads,
    }
    assert libmtl == {"cross_stitch": 118_904_821, "mtan": 92_347_921, "mmoe": 97_387_415, "cgc": 144_403_479,
                      "ple": 173_599_791}  # fmt: skip
    tasks = Segmentation("segmentation", 13), Depth("depth"), Normals("normals")

    def number(scheme, **options):
        with torch.device("meta"):
            return count_parameters(build(scheme, tasks, of_file("deeplabv3"), (3, 288, 384), **options))

    assert number("cross_stitch") == libmtl["cross_stitch"] - 9  # the unit after the last stage, which it never uses
    assert number("mmoe") == libmtl["mmoe"] - 3 * 2 * (image - 3 * 8 * 8)
    assert number("cgc") == libmtl["cgc"] - 3 * 2 * (image - 3 * 8 * 8)
    assert number("mtan", reduction=4) == libmtl["mtan"] - 3 * sum(biases) - sum(bottlenecks) + sum(convolutions)
    # Four stages instead of five with the stem; gates see means over places, and the shared expert has gates, too.
    gates = 3 * 2 * (3 * 8 * 8 + sum(wide[:3]) + 4) + 4 * (3 * 8 * 8 + sum(wide[:2]) + 3)
    assert number("ple") == libmtl["ple"] - 3 * 2 * (sum(maps) + 5) + gates


# ------------------------------------------------------------------------------------------------------------- oracles


def close(found, expected):
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def double(model, shape=(4, 3, 8, 8)):
    """The model in float64 with random gates, units and statistics, and images."""
    model = model.double()
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.5)
    return model, images(*shape)["image"].double()


def grid_means(x, n):
    """(N, C · n · n): means over fields, for sizes that n divides."""
    size, channels, height, width = x.shape
    return x.reshape(size, channels, n, height // n, n, width // n).mean((3, 5)).flatten(1)


def weights(gate, seen):
    powers = (seen @ gate.weight.T + gate.bias).exp()
    return powers / powers.sum(1, keepdim=True)


@pytest.mark.parametrize("per_channel", [False, True])
def test_cross_stitch_by_hand(per_channel):
    model, x = double(build("cross_stitch", (A, B, C), per_channel=per_channel))
    maps, kept = [x] * 3, [[], [], []]
    for level in range(3):
        maps = [net.stages()[level](maps[t], kept[t]) for t, net in enumerate(model.backbones)]
        if level < 2:
            unit = torch.stack(list(model.units[level]))
            form = "tjc,jnchw->tnchw" if per_channel else "tj,jnchw->tnchw"
            maps = list(torch.einsum(form, unit, torch.stack(maps)))
    features = [net.finish(m, k) for net, m, k in zip(model.backbones, maps, kept, strict=True)]
    close(model({"image": x}).predictions, [head(f) for head, f in zip(model.heads, features, strict=True)])


def test_cross_stitch_starts_nearly_apart():
    model = build("cross_stitch", (A, B, C))
    for unit in model.units:
        expected = torch.full((3, 3), 0.05) + 0.85 * torch.eye(3)
        torch.testing.assert_close(torch.stack(list(unit)), expected)
    with torch.no_grad():
        for unit in model.units:
            for t, row in enumerate(unit):
                row.copy_(torch.eye(3)[t])
    x = images(2, 3, 8, 8)
    alone = [head(net(x["image"])) for net, head in zip(model.backbones, model.heads, strict=True)]
    torch.testing.assert_close(list(model(x).predictions), alone)
    (unit,) = {float(row.detach()) for unit in build("cross_stitch", (A,)).units for row in unit}
    assert unit == 1


def test_mmoe_by_hand():
    model, x = double(build("mmoe", (A, B, C), experts=3, grid=4))
    outputs = [net.backbone(x) for net in model.experts]
    expected = []
    for gate, head in zip(model.gates, model.heads, strict=True):
        w = weights(gate, grid_means(x, 4))
        expected.append(head(sum(w[:, e : e + 1] * outputs[e] for e in range(3))))
    found = model({"image": x})
    close(found.predictions, expected)
    close([found.features], [torch.stack(outputs, 1)])


def test_mmoe_of_one_expert_shares_hard():
    model, x = double(build("mmoe", (A, B), experts=1))
    close(model({"image": x}).predictions, [head(model.experts[0].backbone(x)) for head in model.heads])


def test_mmoe_sees_every_pixel_of_a_fine_grid_and_vectors_as_they_are():
    model, x = double(build("mmoe", (A, B), grid=8))
    close([model.glimpse({"image": x})], [x.flatten(1)])

    class Table(nn.Module):
        inputs, out_features = ("row", "image"), 2

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 2)

        def forward(self, row, image):
            return self.layer(row)

    shapes = {"image": (3, 8, 8), "row": (5,)}
    model = MMoE(Table, (A, B), shapes, grid=1)
    row = torch.randn(4, 5)
    found = model.glimpse({"row": row, "image": x.float()})
    torch.testing.assert_close(found, torch.cat([row, x.float().mean((2, 3))], 1))
    tokens = {"row": row.long(), "image": x.float()}
    with pytest.raises(ArchError, match=r"the input row holds torch.int64; use sharing=hard"):
        model.glimpse(tokens)


def test_cgc_by_hand():
    model, x = double(build("cgc", (A, B, C), shared_experts=2, task_experts=2, grid=2))
    shared, expected = [net.backbone(x) for net in model.shared], []
    for own, gate, head in zip(model.own, model.gates, model.heads, strict=True):
        experts = [*(net.backbone(x) for net in own), *shared]
        expected.append(head(torch.einsum("ne,enf->nf", weights(gate, grid_means(x, 2)), torch.stack(experts))))
    close(model({"image": x}).predictions, expected)


def run_stages(net, kept, begin, end, x):
    for stage in net.stages()[begin:end]:
        x = stage(x, kept.setdefault(net, []))
    return net.finish(x, kept[net]) if end == 3 else x


@pytest.mark.parametrize(("levels", "bounds"), [(None, (0, 1, 2, 3)), (2, (0, 2, 3)), (1, (0, 3))])
def test_ple_by_hand(levels, bounds):
    model, x = double(build("ple", (A, B), shared_experts=2, levels=levels, grid=2))
    mine, common, kept = [x, x], x, {}
    for level, (begin, end) in enumerate(pairwise(bounds)):
        seen = [m.mean((2, 3)) if level else grid_means(m, 2) for m in (*mine, common)]
        own = [run_stages(model.own[t][0], kept, begin, end, mine[t]) for t in range(2)]
        shared = [run_stages(net, kept, begin, end, common) for net in model.shared]
        for t in range(2):
            w = weights(model.gates[t][level], seen[t])
            mine[t] = torch.einsum("ne,en...->n...", w, torch.stack([own[t], *shared]))
        if end < 3:
            w = weights(model.shared_gates[level], seen[2])
            common = torch.einsum("ne,en...->n...", w, torch.stack([*own, *shared]))
    close(model({"image": x}).predictions, [head(m) for head, m in zip(model.heads, mine, strict=True)])
    assert len(model.shared_gates) == len(bounds) - 2


def test_ple_of_one_level_is_cgc():
    ple, x = double(build("ple", (A, B), levels=1))
    cgc = build("cgc", (A, B)).double()
    cgc.load_state_dict(dict(zip(cgc.state_dict(), _in_order_of_cgc(ple), strict=True)))
    close(ple({"image": x}).predictions, cgc({"image": x}).predictions)


def _in_order_of_cgc(ple):
    parts = (ple.heads, ple.shared, ple.own, ple.gates)
    return [value for part in parts for value in part.state_dict().values()]


def test_mtan_by_hand():
    model, x = double(build("mtan", (A, B), of_file("fcn", width=2), (3, 16, 24), reduction=2), (4, 3, 16, 24))
    net, image = model.backbone, x
    u = [net.stem(image)]
    p = [net.down(u[0])]
    u.append(net.deep(p[0]))
    p.append(u[1] + net.wide(u[1]))
    u.append(p[1])
    p.append(u[2] + net.wider(u[2]))
    expected = []
    for masks, head in zip(model.masks, model.heads, strict=True):
        # The stem's map is twice as large as the one that is masked.
        seen = masks[0](F.max_pool2d(u[0], 2)) * p[0]
        for level in (1, 2):
            seen = masks[level](torch.cat([u[level], model.onward[level - 1](seen)], 1)) * p[level]
        expected.append(head(seen))
    close(model({"image": x}).predictions, expected)
    assert model.masks[0][1][0].out_channels == p[1].shape[1] // 2


# ------------------------------------------------------------------------------------------------------------ identity


def test_names_and_identities():
    hard, mmoe, three = identity(), identity("sharing=mmoe"), identity("sharing=mmoe", "sharing.experts=3")
    assert hard == identity("sharing=hard") and hard.arch == "resnet20"
    assert mmoe.name == f"resnet20-mmoe-equal-s42-{mmoe.digest}" and mmoe.group.startswith("cifar100/resnet20-mmoe/")
    assert len({hard.digest, mmoe.digest, three.digest}) == 3
    assert three.title == f"resnet20-mmoe-equal-experts3-s42-{three.digest}"
    config, choices = composed()
    del config["sharing"], choices["sharing"]  # a run from before there were schemes
    assert identify(config, choices) == hard


def test_the_report_separates_schemes_and_names_what_differs(tmp_path):
    for experts in (None, 2, 3):
        folder = write(tmp_path, **({} if experts is None else {"arch": f"resnet20-{experts}"}))
        if experts is None:
            continue
        info, config = (
            json.loads((folder / "run.json").read_text()),
            yaml.safe_load((folder / "config.yaml").read_text()),
        )
        config["sharing"] = {"_target_": "mtl.archs.sharing.mmoe.MMoE", "experts": experts}
        made = identify(config, {"data": "cifar100", "arch": "resnet20", "sharing": "mmoe", "loss": "equal"})
        info |= {"arch": made.arch, "digest": made.digest, "group": made.group, "name": made.name}
        place = made.directory(tmp_path)
        place.parent.mkdir(parents=True)
        folder.rename(place)
        (place / "run.json").write_text(json.dumps(info))
        (place / "config.yaml").write_text(yaml.safe_dump(config))
    (benchmark,) = benchmarks(load([tmp_path]).runs)
    assert benchmark.archs == ["resnet20", "resnet20-mmoe, experts 2", "resnet20-mmoe, experts 3"]
    assert [g.label for g in benchmark.groups] == ["equal"] * 3


# ---------------------------------------------------------------------------------------------------------------- runs

TINY = ("data=rooms", "data.train_size=16", "data.test_size=4", "data.batch_size=8", "data.height=16",
        "data.width=16", "data._target_=golden.problems.Pair", "arch=fcn", "arch.width=1", "trainer.device=cpu",
        "logger=none")  # fmt: skip


def outcome(root):
    (file,) = Path(root).rglob("metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    return rows, checkpoint.load(file.parent / "last.pt")


@every_scheme
def test_a_scheme_trains_resumes_exactly_and_predicts(cli, monkeypatch, scheme):
    monkeypatch.setattr("os.fsync", lambda file: None)
    words, train_epoch = (*TINY, f"sharing={scheme}", "trainer.epochs=2", "loss=pcgrad"), Learner.train_epoch

    def interrupted(self, batches, epoch):
        row = train_epoch(self, batches, epoch)
        return signal.raise_signal(signal.SIGINT) if epoch else row

    assert cli(*words, "output_root=whole").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train_epoch", interrupted)
        assert cli(*words, "output_root=parts").code == 130
    assert cli(*words, "output_root=parts").code == 0
    torch.testing.assert_close(outcome("parts"), outcome("whole"), rtol=0, atol=0)
    (file,) = Path("whole").rglob("best.pt")
    loaded = mtl.load(file.parent, epoch="last")
    assert isinstance(loaded.model, SCHEMES[scheme])
    found = loaded.predict(torch.zeros(3, 16, 16, 3, dtype=torch.uint8))
    assert all(len(answer) == 3 for answers in found.values() for answer in answers.values())


@every_scheme
def test_a_scheme_trains_with_methods_of_each_kind(cli, monkeypatch, scheme):
    monkeypatch.setattr("os.fsync", lambda file: None)
    features = ["step.gradients=features"] if scheme == "cgc" else []
    for options in (
        ["loss=mgda", "microscope.every=1", "microscope.samples=1", *features],
        ["loss=single", "loss.task=depth"],
    ):
        result = cli(*TINY, f"sharing={scheme}", "trainer.epochs=1", "data.limit_train=8", *options)
        assert result.code == 0, result.err


@pytest.mark.parametrize(("words", "message"), [
    (("sharing=mmoe", "sharing.experts=0"), "sharing.experts=0: must be greater than or equal to 1"),
    (("sharing=mmoe", "+sharing.expert=3"), "sharing.expert: unknown key; allowed: experts, grid; did you mean"),
    (("sharing=mmo",), "sharing=mmo: no such option; did you mean mmoe"),
    (("arch=segnet_mtan", "arch.width=1", "sharing=mtan"),
     "sharing: MTAN needs a backbone, and arch=SegNetMTAN is a whole model; use sharing=hard"),
    (("arch=fcn", "sharing=ple", "sharing.levels=4"), "sharing.levels: 4; FCN has 3 stages, a level needs one"),
    (("arch=torchvision", "arch.name=shufflenet_v2_x0_5", "sharing=cross_stitch"),
     "arch: CrossStitch needs a backbone in stages, and this TorchvisionBackbone has none; these have: resnet20"),
    (("arch=fcn", "sharing=ple", "loss=mgda", "step.gradients=features"), "loss: MGDA works on the features between "
     "backbone and heads, and PLE has none"),
    (("arch=fcn", "sharing=cross_stitch", "loss=mgda", "step.gradients=features"), "and CrossStitch has none"),
    (("arch=fcn", "sharing=mmoe", "loss=rotograd"), "RotoGrad needs features (N, F), a vector for each sample; "
     "MMoE has (N, 2, 64, "),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(cli, words, message):
    result = cli("data=rooms", "data.train_size=16", "data.test_size=8", "logger=none", *words)
    assert result.code == 2 and result.err.count("\n") == 1
    assert message in result.err


class Pair(Model):
    """A user's own scheme: it asks for the backbone alone."""

    def __init__(self, backbone, tasks, factor: float = 2.0):
        super().__init__()
        self.hard, self.factor = HardSharing(backbone, tasks), factor

    def forward(self, batch):
        outputs = self.hard(batch)
        return outputs._replace(predictions=[self.factor * p for p in outputs.predictions])

    def shared_parameters(self):
        return self.hard.shared_parameters()

    def own_parameters(self, task):
        return self.hard.own_parameters(task)


def test_a_scheme_of_ones_own(cli):
    words = (f"sharing._target_={__name__}.Pair", "+sharing.factor=3.0", "trainer.epochs=1", "output_root=out")
    result = cli(*TINY, *words)
    assert result.code == 0, result.err
    assert "fcn-pair-equal" in result.out


class Clouds(Molecules):
    """Points in space, a different number for each sample."""

    inputs = {"positions": Rows((3,))}


class Farthest(nn.Module):
    inputs, out_features = ("positions",), 1

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, positions):
        return positions.padded().norm(dim=2).amax(1, keepdim=True) * self.scale


def test_a_gate_refuses_samples_of_different_lengths(cli):
    none = [f"~arch.{key}" for key in ("width", "layers", "cutoff", "gaussians", "elements")]
    words = ("data=molecules", f"data._target_={__name__}.Clouds", "data.train_size=8", "data.test_size=4", "arch=mpnn",
             *none, f"arch._target_={__name__}.Farthest", "logger=none", "trainer.epochs=1")  # fmt: skip
    refused = cli(*words, "sharing=mmoe")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "a gate sees a vector, and samples of positions have different lengths; use sharing=hard" in refused.err
    assert (hard := cli(*words)).code == 0, hard.err
