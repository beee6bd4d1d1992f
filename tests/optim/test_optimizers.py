"""Every optimizer by its name: class, step, arguments, rules and refusals."""

import pytest
import torch
from small_network import Group, groups, network, train

from library.config.sections.optimizer import OptimizerConfig
from library.errors import ConfigError, EnvironmentUnsupported
from library.optim.factory import RECIPES, build, check

# name in the config -> class it must be, learning rate
CLASSES = {
    "AdamW": ("torch.optim.adamw.AdamW", 1e-2),
    "AdamW8bit": ("bitsandbytes.optim.adamw.AdamW8bit", 1e-2),
    "PagedAdamW": ("bitsandbytes.optim.adamw.PagedAdamW", 1e-2),
    "PagedAdamW8bit": ("bitsandbytes.optim.adamw.PagedAdamW8bit", 1e-2),
    "PagedAdamW32bit": ("bitsandbytes.optim.adamw.PagedAdamW32bit", 1e-2),
    "AdEMAMix8bit": ("bitsandbytes.optim.ademamix.AdEMAMix8bit", 1e-2),
    "Lion": ("lion_pytorch.lion_pytorch.Lion", 1e-3),
    "Lion8bit": ("bitsandbytes.optim.lion.Lion8bit", 1e-3),
    "PagedLion8bit": ("bitsandbytes.optim.lion.PagedLion8bit", 1e-3),
    "SGDNesterov": ("torch.optim.sgd.SGD", 1e-2),
    "SGDNesterov8bit": ("bitsandbytes.optim.sgd.SGD8bit", 1e-2),
    "DAdaptation": ("dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint", 1.0),
    "DAdaptAdamPreprint": ("dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint", 1.0),
    "DAdaptAdaGrad": ("dadaptation.dadapt_adagrad.DAdaptAdaGrad", 1.0),
    "DAdaptAdam": ("dadaptation.dadapt_adam.DAdaptAdam", 1.0),
    "DAdaptAdan": ("dadaptation.dadapt_adan.DAdaptAdan", 1.0),
    "DAdaptAdanIP": ("dadaptation.experimental.dadapt_adan_ip.DAdaptAdanIP", 1.0),
    "DAdaptLion": ("dadaptation.dadapt_lion.DAdaptLion", 1.0),
    "DAdaptSGD": ("dadaptation.dadapt_sgd.DAdaptSGD", 1.0),
    "Prodigy": ("prodigyopt.prodigy.Prodigy", 1.0),
    "Adafactor": ("transformers.optimization.Adafactor", 1e-2),
    "RAdamScheduleFree": ("schedulefree.radam_schedulefree.RAdamScheduleFree", 1e-2),
    "AdamWScheduleFree": ("schedulefree.adamw_schedulefree.AdamWScheduleFree", 1e-2),
    "SGDScheduleFree": ("schedulefree.sgd_schedulefree.SGDScheduleFree", 1e-2),
}
NOT_INSTALLED = {"CAME": "pytorch-optimizer", "ProdigyPlusScheduleFree": "prodigy-plus-schedule-free"}


def _config(name: str = "", *args: str, lr: float = 1e-2, **more: object) -> OptimizerConfig:
    return OptimizerConfig(optimizer_type=name, optimizer_args=args, learning_rate=lr, **more)


def test_the_table_is_covered():
    assert {*CLASSES, *NOT_INSTALLED} == set(RECIPES)


@pytest.mark.parametrize("name", CLASSES)
def test_is_the_right_class_under_any_case_and_moves_the_weights(name):
    expected, lr = CLASSES[name]
    module = network()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    built = build(_config(name.swapcase(), lr=lr), groups(module))
    kind = type(built.optimizer)
    assert f"{kind.__module__}.{kind.__name__}" == expected
    assert built.description.split("(")[0] == expected
    train(module, built.optimizer, range(7))  # RAdamScheduleFree waits for the sixth step
    for old, new in zip(before, module.parameters(), strict=True):
        assert not torch.equal(old, new.detach())
        assert new.isfinite().all()
    rates = built.learning_rates()
    assert list(rates) == ["first", "last"]
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize("name", NOT_INSTALLED)
def test_a_missing_package_is_named(name):
    with pytest.raises(EnvironmentUnsupported, match=f"pip install {NOT_INSTALLED[name]}$"):
        build(_config(name), groups(network()))


@pytest.mark.parametrize("name", ["torch.optim.Adam", "Adam", "adam"])
def test_other_classes_by_path_or_from_torch(name):
    assert type(build(_config(name), groups(network())).optimizer) is torch.optim.Adam


def test_the_empty_name_is_adamw():
    assert type(build(_config(), groups(network())).optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("AdmW8bit", "did you mean .*AdamW8bit"),
        ("adan", "did you mean .*Adam"),
        ("Automagic_Sinkgd", "known are .*Adafactor.*module.Class"),
        ("torch.optim.Adamw", "has no class Adamw; did you mean AdamW"),
        ("LBFGS", "evaluates the loss several times a step"),
        ("..Adam", "is not of the form module.Class"),
    ],
)
def test_names_that_cannot_be_used_are_refused_with_what_to_do(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build(_config(name), groups(network()))


@pytest.mark.parametrize(("name", "meant"), [("prodigyopt", "Prodigy"), ("adamw_torch_fused", "AdamW")])
def test_names_of_other_trainers_are_understood_aloud(name, meant):
    built = build(_config(name, lr=1.0), groups(network()))
    assert type(built.optimizer).__name__ == meant
    assert any(f"{name} is read as {meant}" in notice for notice in built.notices)


def test_arguments_reach_the_optimizer_and_the_metadata():
    built = build(_config("AdamW", "weight_decay=0.05", "betas=0.9,0.95", "eps=1e-6"), groups(network()))
    group = built.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.05, (0.9, 0.95), 1e-6)
    assert built.description == "torch.optim.adamw.AdamW(weight_decay=0.05,betas=(0.9, 0.95),eps=1e-06)"
    assert build(_config("AdamW"), groups(network())).description == "torch.optim.adamw.AdamW"


@pytest.mark.parametrize("name", ["SGDNesterov", "SGDNesterov8bit"])
def test_nesterov_momentum_unless_given(name):
    def momentum(*arguments: str) -> float:
        group = build(_config(name, *arguments), groups(network())).optimizer.param_groups[0]
        assert group.get("nesterov", True)  # bitsandbytes does not keep it
        return group["momentum"] if "momentum" in group else group["betas"][0]

    assert momentum() == 0.9
    assert momentum("momentum=0.5") == 0.5
    with pytest.raises(ConfigError, match="has no argument nesterov"):
        momentum("nesterov=False")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("weight_decy=0.1",), "AdamW has no argument weight_decy; it takes betas, eps, weight_decay"),
        (("lr=1e-3",), "lr comes from learning_rate"),
        (("betas=2,3",), r"AdamW refuses .*betas=\(2, 3\).*beta"),
        (("betas",), 'optimizer_args: "betas" is not of the form key=value'),
        (("betas=(0.9,",), "is not a number"),
    ],
)
def test_wrong_arguments_are_named(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build(_config("AdamW", *arguments), groups(network()))


def test_groups_keep_their_rates_and_get_names_of_their_own():
    module = network()
    weight, bias = module[0].parameters()
    (last,) = module[2].parameters()
    built = build(
        _config("AdamW", lr=3e-4),
        [Group("unet", [weight], None), Group("unet", [bias], 5e-5), Group("te", [last], 0)],
    )
    assert built.learning_rates() == {"unet": 3e-4, "unet (2)": 5e-5, "te": 0.0}


def test_adafactor_sets_its_own_rate_unless_told_otherwise():
    built = build(_config("Adafactor"), groups(network(), lr=1e-4))
    assert built.sets_own_rate
    assert built.description == "transformers.optimization.Adafactor(relative_step=True)"
    assert built.learning_rates() == {"first": 0.0, "last": 0.0}
    assert any("learning_rate, unet_lr" in notice for notice in built.notices)


def test_adafactor_reports_the_rate_of_its_last_step():
    module = network()
    built = build(_config("Adafactor", "scale_parameter=False", "warmup_init=True"), groups(module))
    train(module, built.optimizer, range(3))
    assert built.learning_rates() == {"first": 3e-6, "last": 3e-6}


def test_adafactor_with_a_given_rate():
    arguments = ("relative_step=False,", "scale_parameter=False", "warmup_init=False")
    built = build(_config("Adafactor", *arguments, max_grad_norm=0.0), groups(network()))
    assert not built.sets_own_rate
    assert built.optimizer.param_groups[0]["relative_step"] is False
    assert built.learning_rates() == {"first": 1e-2, "last": 1e-2}
    assert len(built.notices) == 1
    assert "comma" in built.notices[0]
    clipped = build(_config("Adafactor", *arguments), groups(network()))
    assert any("max_grad_norm" in notice for notice in clipped.notices)


def test_adafactor_warm_up_switches_relative_steps_on():
    built = build(_config("Adafactor", "relative_step=False", "warmup_init=True"), groups(network()))
    assert built.sets_own_rate
    assert built.optimizer.param_groups[0]["relative_step"] is True
    assert any("switched on" in notice for notice in built.notices)


def test_adaptive_optimizers_want_a_rate_near_one_and_the_same_for_all():
    assert build(_config("Prodigy", lr=1.0), groups(network())).notices == ()
    assert any("use about 1" in one for one in build(_config("Prodigy", lr=1e-4), groups(network())).notices)
    module = network()
    different = [Group("a", list(module[0].parameters()), 1.0), Group("b", list(module[2].parameters()), 0.5)]
    with pytest.raises(ConfigError, match=r"needs one learning rate for all groups, these are 0.5, 1.0"):
        build(_config("Prodigy", lr=1.0), different)
    assert any("takes the largest" in one for one in build(_config("DAdaptAdan", lr=1.0), different).notices)
    frozen = [Group("a", list(module[0].parameters()), 1.0), Group("b", list(module[2].parameters()), 0.0)]
    train(module, build(_config("Prodigy", lr=1.0), frozen).optimizer, range(1))


def test_prodigy_reports_its_step_size():
    module = network()
    built = build(_config("Prodigy", lr=0.5), groups(module))
    train(module, built.optimizer, range(3))
    d = built.optimizer.param_groups[0]["d"]
    assert built.adapted_rates() == {"first": 0.5 * d, "last": 0.5 * d}
    assert build(_config("AdamW"), groups(network())).adapted_rates() == {}


def test_schedule_free_weights_switch_and_come_back():
    module = network()
    built = build(_config("AdamWScheduleFree"), groups(module))
    assert built.is_schedule_free
    assert built.sets_own_rate
    train(module, built.optimizer, range(5))
    trained = module[0].weight.detach().clone()
    built.eval()
    assert not torch.equal(module[0].weight, trained)
    built.train()
    torch.testing.assert_close(module[0].weight.detach(), trained)


def test_switching_is_nothing_for_other_optimizers():
    module = network()
    built = build(_config("AdamW"), groups(module))
    before = module[0].weight.detach().clone()
    built.eval()
    built.train()
    assert not built.is_schedule_free
    assert torch.equal(module[0].weight, before)


def test_a_check_before_building_says_how_words_are_read_and_refuses_wrong_ones():
    config = OptimizerConfig(optimizer_type="adamw_torch", optimizer_args=("weight_decay=0.1,",))
    name, comma = check(config)
    assert name == "optimizer_type = adamw_torch is read as AdamW"
    assert "the comma at the end is ignored" in comma
    with pytest.raises(ConfigError, match="has no argument weight"):
        check(OptimizerConfig(optimizer_args=("weight=0.1",)))


@pytest.mark.parametrize(
    ("arguments", "may_fuse", "fused"),
    [
        ((), True, True),
        (("weight_decay=0.1",), True, True),
        (("foreach=True",), True, False),
        ((), False, False),
    ],
)
def test_adamw_is_one_kernel_on_a_gpu_unless_told_otherwise(monkeypatch, arguments, may_fuse, fused):
    class OnGpu(torch.nn.Parameter):
        is_cuda = True

    groups = [Group("unet", (OnGpu(torch.zeros(2)),), 1e-3)]
    config = OptimizerConfig(optimizer_type="AdamW", optimizer_args=arguments, learning_rate=1e-3)
    built = build(config, groups, may_fuse=may_fuse)
    assert bool(built.optimizer.defaults["fused"]) is fused
    assert built.can_leave_out is fused
    assert "fused" not in built.description


def test_a_flag_on_the_device_keeps_a_step_from_being_made():
    parameter = torch.nn.Parameter(torch.ones(3))
    config = OptimizerConfig(optimizer_type="AdamW", optimizer_args=("fused=True",), learning_rate=0.1)
    built = build(config, [Group("unet", (parameter,), 0.1)])
    for flag, moves in ((1.0, False), (0.0, True)):
        before = parameter.detach().clone()
        parameter.grad = torch.full_like(parameter, float("nan") if flag else 1.0)
        built.leave_out(torch.tensor(flag))
        built.optimizer.step()
        assert bool((parameter != before).all()) is moves
        assert torch.isfinite(parameter).all()
