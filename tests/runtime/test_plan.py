from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dtpm_fast.errors import UserError
from dtpm_fast.runtime.noise import noise_fields
from dtpm_fast.runtime.plan import Form, Plan, native_form
from dtpm_fast.runtime.reference import Reference
from dtpm_fast.runtime.sampler import Stepper, make_steps, sample
from dtpm_fast.runtime.task_swap import TaskSwap

CONFIGS = [
    {},
    {"semantic_code": "compact"},
    {"semantic_code": "compact", "code_source": "degraded", "condition": "predicted"},
    {"predictor": "none"},
    {"adapter_positions": "encoder", "adapter_ratio": 0.5},
    {"adapter_positions": "decoder"},
    {"adapter_positions": "none"},
    {"parameterization": "eps"},
    {"clip": False},
    {"eta": 0.7},
    {"spacing": "leading"},
    {"width": 24, "encoder_blocks": [2, 1], "decoder_blocks": [1, 2], "middle_blocks": 3},
]


def picture(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return (torch.rand(batch, 3, height, width, generator=generator) * 2 - 1).to(dtype)


@torch.inference_mode()
def restored(stepper: Stepper, y_d: Tensor) -> Tensor:
    noise = noise_fields(1, y_d.shape[2], y_d.shape[3], stepper.steps.noise_fields)
    return sample(stepper, stepper.prepare(y_d), noise.to(y_d))


def psnr(a: Tensor, b: Tensor) -> float:
    """In dB, of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / (a.double() - b.double()).square().mean()))


@pytest.mark.parametrize("form", ["folded", "kernels", "native"])
@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_the_plan_is_the_plain_module(random_model: Callable[..., tuple], settings: dict, form: Form) -> None:
    model, config = random_model(**settings)
    steps = make_steps(config, 3)
    for batch, height, width in ((1, 16, 40), (2, 24, 8)):
        exact = restored(Reference(model.double(), steps), picture(batch, height, width, torch.float64))
        if form != "native":  # float32 only
            plan = Plan(model, steps, torch.float64, form)
            difference = restored(plan, picture(batch, height, width, torch.float64)) - exact
            # Raw epsilon divides by sqrt(gamma_999) = 0.0064, and rounding with it.
            assert difference.abs().max() <= (1e-10 if settings.get("parameterization") != "eps" else 1e-8)
        if form == "native" and native_form(model, torch.float32) is None:
            pytest.skip("no C++ blocks: dtpm_fast._nafnet was not built, or has no form for these channels")
        single = Plan(model.float(), steps, torch.float32, form)
        assert psnr(restored(single, picture(batch, height, width)), exact) >= 60


@pytest.mark.parametrize("form", ["folded", "native"])
def test_bfloat16_keeps_its_bound(random_model: Callable[..., tuple], form: Form) -> None:
    model, config = random_model(width=16, predictor_width=16)
    if form == "native" and native_form(model, torch.bfloat16) is None:
        pytest.skip("no C++ blocks in bfloat16: this CPU multiplies none (AVX512_BF16, Intel AMX)")
    steps = make_steps(config, 4)
    y_d = picture(1, 40, 56)
    assert psnr(restored(Plan(model, steps, torch.bfloat16, form), y_d), restored(Reference(model, steps), y_d)) >= 45


def test_dpm_solver_runs_on_the_same_prepared_steps(random_model: Callable[..., tuple]) -> None:
    model, config = random_model()
    model.double()
    steps = make_steps(config, 5, "dpm++2m")
    y_d = picture(1, 16, 24, torch.float64)
    exact = restored(Reference(model, steps), y_d)
    assert (restored(Plan(model, steps, torch.float64), y_d) - exact).abs().max() <= 1e-10
    assert (exact - restored(Reference(model, make_steps(config, 5)), y_d)).abs().max() > 1e-4


def test_a_gated_adapter_refuses_to_merge(random_model: Callable[..., tuple]) -> None:
    model, config = random_model(adapter_kind="gated")
    with pytest.raises(UserError, match="gated adapters are not linear and cannot be merged"):
        Plan(model, make_steps(config, 2))


def test_a_prior_has_no_plan(random_model: Callable[..., tuple]) -> None:
    model, config = random_model(stage=1)
    with pytest.raises(UserError, match="stage 2"):
        Plan(model, make_steps(config, 2))


def test_a_task_taken_in_place_keeps_every_address(random_model: Callable[..., tuple]) -> None:
    first, config = random_model(seed=0)
    second, _ = random_model(seed=1)
    steps = make_steps(config, 2)
    plan = Plan(first, steps)
    before = {name: value.data_ptr() for name, value in plan.tensors().items()}
    y_d = picture(1, 16, 16)
    old = restored(plan, y_d)
    tasks = TaskSwap(plan.tensors(), "first")
    tasks.add("second", plan.of(second, plan.steps).tensors())
    tasks.take("second")
    assert {name: value.data_ptr() for name, value in plan.tensors().items()} == before
    assert torch.equal(restored(plan, y_d), restored(Plan(second, steps), y_d))
    assert not torch.equal(restored(plan, y_d), old)
    tasks.take("first")
    assert torch.equal(restored(plan, y_d), old)
    other, _ = random_model(width=24)
    with pytest.raises(ValueError, match="another shape"):
        tasks.add("other", plan.of(other, plan.steps).tensors())


def test_tasks_of_one_prior_share_what_they_do_not_change(random_model: Callable[..., tuple]) -> None:
    first, config = random_model(seed=0)
    second, _ = random_model(seed=1)
    second.denoiser.load_state_dict(first.denoiser.state_dict())
    plan = Plan(first, make_steps(config, 2))
    tasks = TaskSwap(plan.tensors(), "first")
    tasks.add("second", plan.of(second, plan.steps).tensors())
    changed = tasks.values["second"]
    assert not any(name.startswith("step.") and ".w1" in name for name in changed)
    assert any(name.endswith(".matrix") for name in changed)
    assert any(name.startswith("prepare.predictor") for name in changed)


def test_what_was_hoisted_can_be_read(random_model: Callable[..., tuple]) -> None:
    model, config = random_model(semantic_code="compact")
    plan = Plan(model, make_steps(config, 4))
    held = {item.what: item for item in plan.hoisted(plan.prepare(picture(1, 16, 24)))}
    channels = sum(model.denoiser.positions().values())
    assert held["time embedding to the modulation rows of all blocks and steps"].bytes == 4 * 4 * channels * 4
    assert held["semantic code to its share of the modulation rows"].bytes == 4 * channels * 4
    assert held["the condition's half of the intro convolution"].bytes == 16 * 16 * 24 * 4
    squares = sum(c * c for c in model.denoiser.positions().values())
    assert held["adapters merged, M = I + W_out W_in"].bytes == 4 * squares
    assert held["what the picture adds to 7 adapters"].once_per == "picture"
    assert held["what the picture adds to 7 adapters"].bytes > 0


def test_the_step_leaves_what_it_was_given_alone(random_model: Callable[..., tuple]) -> None:
    """The products that write in place write over maps of their own."""
    model, config = random_model()
    plan = Plan(model, make_steps(config, 2))
    with torch.inference_mode():
        conditions = plan.prepare(picture(1, 16, 16))
        kept = {name: value.clone() for name, value in conditions.items()}
        x, previous = torch.randn(2, 1, 3, 16, 16)
        x_kept = x.clone()
        first = plan.step(x, previous, 0, conditions)
        second = plan.step(x, previous, 0, conditions)
    assert torch.equal(first[0], second[0])
    assert torch.equal(x, x_kept)
    for name, value in conditions.items():
        assert torch.equal(value, kept[name])


def test_the_step_can_be_exported(random_model: Callable[..., tuple]) -> None:
    model, config = random_model()
    plan = Plan(model, make_steps(config, 2))
    with torch.no_grad():
        conditions = plan.prepare(picture(2, 16, 24))
        x, previous = torch.randn(2, 2, 3, 16, 24)
        inputs = (x, previous, plan.table[0], plan.time_rows[:1], conditions)
        exported = torch.export.export(plan.step_module, inputs).module()
        torch.testing.assert_close(exported(*inputs), plan.step_module(*inputs))
