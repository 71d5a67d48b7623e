"""A method of a user's own that is wrong is refused in a line with the place of its code; one that is odd is told."""

import re

import pytest
import torch

import mtl
from mtl.config import schema
from mtl.errors import ConfigError
from mtl.losses.base import GramianWeighting, JacobianAggregation, LossWeighting

TOY = ("data=toy", "arch=point", "data.steps=2", "trainer.epochs=1", "trainer.device=cpu", "logger=none", "seed=0")
HERE = r" \(defined in \S*test_own_methods.py:\d+\)$"


def weighting(base, hook, result, **more):
    """A method whose function `hook` returns `result` of its argument."""

    def function(self, given):
        return result(given)

    return type("Own", (base,), {hook: function, **more})(3)


def step(strategy):
    torch.manual_seed(0)
    shared, heads = torch.nn.Linear(4, 5), [torch.nn.Linear(5, 1) for _ in range(3)]
    features = shared(torch.randn(6, 4)).tanh()
    mtl.backward([head(features).square().mean() for head in heads], strategy, shared, heads)
    return shared


@pytest.mark.parametrize(
    ("base", "hook", "result", "said"),
    [
        (GramianWeighting, "weights", lambda g: g, r"weights returned a tensor of shape \(3, 3\); .* \(3,\)"),
        (GramianWeighting, "weights", lambda g: g[:1, 0], r"weights returned a tensor of shape \(1,\); .* \(3,\)"),
        (GramianWeighting, "weights", lambda g: [1.0] * 3, r"weights returned a list; .* \(3,\)"),
        (GramianWeighting, "weights", lambda g: None, r"weights returned nothing"),
        (JacobianAggregation, "aggregate", lambda j: j, r"aggregate returned a tensor of shape \(3, 25\); .* \(25,\)"),
        (JacobianAggregation, "aggregate", lambda j: j.sum(1), r"aggregate returned a tensor of shape \(3,\)"),
        (JacobianAggregation, "aggregate", lambda j: (j.sum(0), j), r"aggregate returned .*; weights beside .* \(3,\)"),
        (LossWeighting, "forward", lambda x: x, r"forward returned a tensor of shape \(3,\); one differentiable"),
        (LossWeighting, "forward", lambda x: None, r"forward returned nothing"),
        (LossWeighting, "forward", lambda x: x.detach().sum(), r"the total does not depend on the losses"),
    ],
)
def test_a_result_of_another_shape_is_refused_with_the_line_of_the_code(base, hook, result, said):
    with pytest.raises(ValueError, match=rf"^Own\W.*{said}.*{HERE}"):
        step(weighting(base, hook, result))


def test_head_gradients_have_the_form_of_what_was_given():
    own = type("Own", (LossWeighting,), {"forward": lambda self, losses: losses.sum()})
    merged = type("Own", (GramianWeighting,), {
        "weights": lambda self, gramian: gramian[0], "head_gradients": lambda self, given: given[:2],
    })(3)  # fmt: skip
    step(own(3))
    with pytest.raises(ValueError, match=r"Own.head_gradients returned a list; a list for each head"):
        step(merged)


def test_a_constructor_that_forgets_its_base_is_named():
    class Forgets(LossWeighting):
        def __init__(self, tasks, power: float = 2.0):
            self.power = power

        def forward(self, losses):
            return losses.sum()

    said = r"Forgets.__init__ \(defined in \S*test_own_methods.py:\d+\) does not call super\(\).__init__\(tasks\)"
    with pytest.raises(TypeError, match=said):
        Forgets(3)
    node = {"_target_": f"{__name__}._Forgets"}
    globals()["_Forgets"] = Forgets
    with pytest.raises(ConfigError, match=rf"^loss: {said}"):
        schema.build(node, "loss", tasks=["a", "b"])


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "strange_methods.py").write_text(
        "import torch\nfrom mtl.losses.base import LossWeighting\nfrom mtl.archs.model import Model, Outputs\n\n\n"
        "class First(LossWeighting):\n    def forward(self, losses):\n        return losses[0]\n\n\n"
        "class Bare(Model):\n    def __init__(self, tasks):\n        super().__init__()\n"
        "        self.at = torch.nn.Parameter(torch.ones(2))\n\n"
        "    def forward(self, batch):\n"
        "        return Outputs([self.at.repeat(len(batch['image']), 1) for _ in range(2)])\n\n"
        "    def shared_parameters(self):\n        return [self.at]\n\n"
        "    def own_parameters(self, task):\n        return []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_total_of_one_loss_alone_is_told(cli, module):
    run = cli(*TOY, "loss=equal", "loss._target_=strange_methods.First")
    assert run.code == 0, run.err
    (line,) = re.findall(r"^WARNING .*", run.out, re.M)
    assert re.search(r"First \(defined in strange_methods.py:6\) has given L2 the weight 0 in each step", line)
    assert "WARNING" not in cli(*TOY, "loss=single", "loss.task=L1").out  # ours mean it


def test_a_method_of_the_features_is_refused_where_there_are_none(cli, module):
    bare = (*TOY, "arch._target_=strange_methods.Bare", "~arch.start")
    run = cli(*bare, "loss=consmtl")
    said = "error: loss: ConsMTL works on the features between backbone and heads, and Bare has none\n"
    assert run.code == 2 and run.err == said
    assert cli(*bare, "loss=pcgrad").code == 0
