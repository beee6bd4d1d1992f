"""Saving and restoring optimizers: interrupted training equals uninterrupted training, bit for bit."""

import json

import pytest
import torch
from small_network import Group, groups, network, train

from library.config.sections.optimizer import OptimizerConfig
from library.errors import CheckpointError
from library.optim.factory import build
from library.optim.state import ExportedState, export_state, from_plain, import_state, to_plain

CASES = {
    "AdamW": ("AdamW", 1e-2, ()),
    "AdamW amsgrad": ("AdamW", 1e-2, ("amsgrad=True",)),
    "AdamW8bit": ("AdamW8bit", 1e-2, ()),
    "PagedAdamW8bit": ("PagedAdamW8bit", 1e-2, ()),
    "AdEMAMix8bit": ("AdEMAMix8bit", 1e-2, ()),
    "Lion": ("Lion", 1e-3, ()),
    "Lion8bit": ("Lion8bit", 1e-3, ()),
    "SGDNesterov8bit": ("SGDNesterov8bit", 1e-2, ()),
    "Adafactor": ("Adafactor", 1e-2, ()),
    "Adafactor with rate": ("Adafactor", 1e-2, ("relative_step=False", "beta1=0.9")),
    "Prodigy": ("Prodigy", 1.0, ("use_bias_correction=True", "safeguard_warmup=True")),
    "DAdaptAdam": ("DAdaptAdam", 1.0, ()),
    "DAdaptAdaGrad": ("DAdaptAdaGrad", 1.0, ()),
    "DAdaptAdan": ("DAdaptAdan", 1.0, ()),
    "DAdaptLion": ("DAdaptLion", 1.0, ()),
    "DAdaptSGD": ("DAdaptSGD", 1.0, ()),
    "DAdaptAdamPreprint": ("DAdaptAdamPreprint", 1.0, ()),
    "AdamWScheduleFree": ("AdamWScheduleFree", 1e-2, ("warmup_steps=2",)),
    "RAdamScheduleFree": ("RAdamScheduleFree", 1e-2, ()),
    "SGDScheduleFree": ("SGDScheduleFree", 1e-2, ()),
}


def _built(module, name, lr, arguments):
    config = OptimizerConfig(optimizer_type=name, learning_rate=lr, optimizer_args=arguments)
    return build(config, groups(module))


def _names(module):
    return {parameter: name for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_four_steps_saved_and_four_more_equal_eight(case):
    through = network()
    losses = train(through, _built(through, *CASES[case]).optimizer, range(8))

    first = network()
    started = _built(first, *CASES[case])
    assert train(first, started.optimizer, range(4)) == losses[:4]
    exported = export_state(started.optimizer, _names(first))
    values = json.loads(json.dumps(exported.values))
    train(first, started.optimizer, range(4, 5))  # what was exported must not be changed by going on

    second = network(seed=1)
    repeat = network()
    train(repeat, _built(repeat, *CASES[case]).optimizer, range(4))
    resumed = _built(second, *CASES[case])
    second.load_state_dict(repeat.state_dict())
    import_state(resumed.optimizer, _names(second), ExportedState(exported.tensors, values))
    assert train(second, resumed.optimizer, range(4, 8)) == losses[4:]
    for expected, actual in zip(through.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize(("saved", "present"), [(False, True), (True, False)])
def test_a_state_goes_on_with_the_kernels_of_the_present_process(saved, present):
    first, second = network(), network()
    started = _built(first, "AdamW", 1e-2, (f"fused={saved}",))
    train(first, started.optimizer, range(2))
    resumed = _built(second, "AdamW", 1e-2, (f"fused={present}",))
    import_state(resumed.optimizer, _names(second), export_state(started.optimizer, _names(first)))
    assert resumed.optimizer.param_groups[0]["fused"] is present
    if resumed.can_leave_out:
        resumed.leave_out(torch.zeros(()))  # as a run ahead does: kernels of the saved kind refuse it
    second.load_state_dict(first.state_dict())
    assert train(second, resumed.optimizer, range(2, 4)) == pytest.approx(
        train(first, started.optimizer, range(2, 4)), rel=1e-5
    )


def test_eight_bit_states_stay_eight_bit_and_share_no_memory():
    module = network()
    built = _built(module, *CASES["AdamW8bit"])
    train(module, built.optimizer, range(2))
    exported = export_state(built.optimizer, _names(module))
    assert exported.tensors["0.weight/state1"].dtype == torch.uint8
    assert exported.tensors["2.weight/state1"].dtype == torch.float32
    pointers = [tensor.untyped_storage().data_ptr() for tensor in exported.tensors.values()]
    assert len(set(pointers)) == len(pointers)


def test_order_of_groups_and_parameters_does_not_matter():
    module = network()
    train(module, started := _built(module, *CASES["AdamW"]).optimizer, range(2))
    exported = export_state(started, _names(module))
    weight, bias = module[0].parameters()
    turned = [Group("last", list(module[2].parameters()), None), Group("first", [bias, weight], None)]
    other = build(OptimizerConfig(optimizer_type="AdamW", learning_rate=1e-2), turned).optimizer
    import_state(other, _names(module), exported)
    for parameter in module.parameters():
        assert torch.equal(other.state[parameter]["exp_avg"], started.state[parameter]["exp_avg"])


def test_learning_rates_of_groups_come_back():
    module = network()
    started = _built(module, *CASES["AdamW"]).optimizer
    started.param_groups[1]["lr"] = 0.125
    exported = export_state(started, _names(module))
    other = _built(module, *CASES["AdamW"])
    import_state(other.optimizer, _names(module), exported)
    assert other.learning_rates() == {"first": 1e-2, "last": 0.125}


def test_what_does_not_fit_is_refused():
    module = network()
    train(module, started := _built(module, *CASES["AdamW"]).optimizer, range(1))
    exported = export_state(started, _names(module))
    with pytest.raises(CheckpointError, match=r"belongs to the optimizer torch.*AdamW, this run uses .*Lion"):
        import_state(_built(module, *CASES["Lion"]).optimizer, _names(module), exported)
    renamed = {parameter: f"other.{name}" for name, parameter in module.named_parameters()}
    with pytest.raises(
        CheckpointError, match=r"3 of its parameters are gone and 0 are new, for example 0.bias"
    ):
        import_state(_built(module, *CASES["AdamW"]).optimizer, renamed, exported)
    fewer = build(
        OptimizerConfig(optimizer_type="AdamW", learning_rate=1e-2),
        [Group("all", list(module.parameters()), None)],
    )
    with pytest.raises(CheckpointError, match="2 of its parameter groups are gone and 1 are new"):
        import_state(fewer.optimizer, _names(module), exported)
    del exported.tensors["2.weight/exp_avg"]
    with pytest.raises(CheckpointError, match=r"lacks the tensor 2.weight/exp_avg"):
        import_state(_built(module, *CASES["AdamW"]).optimizer, _names(module), exported)


def test_nested_values_survive():
    value = {"a": [1, (2.5, None)], 7: {"b": torch.arange(3)}, "c": True, "empty": {}}
    tensors = {}
    plain = json.loads(json.dumps(to_plain(value, tensors, "x")))
    back = from_plain(plain, tensors)
    assert torch.equal(back[7].pop("b"), value[7].pop("b"))
    assert back == value
    with pytest.raises(TypeError, match=r"x/a: a value of type object"):
        to_plain({"a": object()}, {}, "x")
