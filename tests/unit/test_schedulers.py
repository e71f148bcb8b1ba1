"""The schedulers on their own: what must hold whatever the reference says, and what is refused, and how."""

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch

from minisd.noise import draw_noise
from minisd.schedulers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, equations

SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
CLASSES = [DDPMScheduler, DDIMScheduler, DDIMInverseScheduler]
every_class = pytest.mark.parametrize("cls", CLASSES)
SHAPE = (2, 4, 3, 5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=seeded(seed))


def ready(cls, steps=10, **arguments):
    scheduler = cls(**{**SD15, **arguments})
    scheduler.set_timesteps(steps)
    return scheduler


# ---------------------------------------------------- noise levels


@pytest.mark.parametrize("schedule", DDPMScheduler.beta_schedules)
@pytest.mark.parametrize("rescale", [False, True])
def test_noise_grows(schedule, rescale):
    scheduler = DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=rescale)
    assert scheduler.betas.shape == (1000,)
    assert scheduler.betas.dtype == scheduler.alphas_cumprod.dtype == torch.float32
    assert (scheduler.alphas_cumprod.diff() < 0).all()
    assert 0.9 < scheduler.alphas_cumprod[0] < 1


def test_ends_of_the_schedules():
    linear = equations.linear_betas(0.0001, 0.02, 1000)
    scaled = equations.scaled_linear_betas(0.00085, 0.012, 1000)
    assert linear[[0, -1]].tolist() == pytest.approx([0.0001, 0.02])
    assert scaled[[0, -1]].tolist() == pytest.approx([0.00085, 0.012])
    assert linear[500] == pytest.approx(0.01006, rel=1e-3)
    assert scaled[500] == pytest.approx((0.00085**0.5 / 2 + 0.012**0.5 / 2) ** 2, rel=2e-3)
    assert equations.cosine_betas(0, 0, 1000).max() == pytest.approx(0.999)


def test_cosine_and_laplace_follow_alpha_bar():
    for alpha_bar in (equations.cosine_alpha_bar, equations.laplace_alpha_bar):
        product = torch.cumprod(1 - equations.betas_from_alpha_bar(alpha_bar, 100).double(), 0)
        wanted = [alpha_bar(i / 100) / alpha_bar(0) for i in range(1, 100)]
        assert product[:-1].tolist() == pytest.approx(wanted, rel=1e-4)


def test_zero_terminal_snr():
    before, after = (DDIMScheduler(**SD15, rescale_betas_zero_snr=rescale) for rescale in (False, True))
    assert before.alphas_cumprod[-1] > 0.004
    assert after.alphas_cumprod[-1] == 0
    assert after.alphas_cumprod[0] == pytest.approx(before.alphas_cumprod[0])


def test_trained_betas_replace_the_schedule():
    betas = [0.1, 0.2, 1.0]
    scheduler = DDIMScheduler(3, trained_betas=betas, beta_schedule="whatever was used then")
    assert scheduler.betas.tolist() == pytest.approx(betas)
    assert scheduler.config.trained_betas == (0.1, 0.2, 1.0)


def test_tables_stay_on_the_cpu():
    with torch.device("meta"):
        scheduler = DDIMScheduler(**SD15)
    assert scheduler.alphas_cumprod.device.type == scheduler.final_alpha_cumprod.device.type == "cpu"


def test_default_dtype_has_no_say():
    torch.set_default_dtype(torch.float64)
    try:
        scheduler = DDPMScheduler(beta_schedule="sigmoid")
    finally:
        torch.set_default_dtype(torch.float32)
    assert scheduler.betas.dtype == scheduler.one.dtype == torch.float32


def test_before_the_first_timestep():
    kept = DDIMScheduler(**SD15, set_alpha_to_one=False)
    assert kept.final_alpha_cumprod == kept.alphas_cumprod[0] < 1
    assert DDIMScheduler(**SD15).final_alpha_cumprod == 1
    assert DDPMScheduler(**SD15).final_alpha_cumprod == 1
    assert DDIMInverseScheduler(**SD15, set_alpha_to_one=False).initial_alpha_cumprod == kept.alphas_cumprod[0]


# ---------------------------------------------------- timesteps


def test_timesteps_of_sd15():
    assert ready(DDIMScheduler, 50).timesteps[[0, 1, -1]].tolist() == [981, 961, 1]
    assert ready(DDIMScheduler, 30).timesteps[[0, -1]].tolist() == [958, 1]
    assert ready(DDIMInverseScheduler, 50).timesteps[[0, 1, -1]].tolist() == [1, 21, 981]
    assert ready(DDIMScheduler, 1).timesteps.tolist() == [1]


def test_spacings():
    assert equations.leading_timesteps(1000, 4, 1).tolist() == [751, 501, 251, 1]
    assert equations.trailing_timesteps(1000, 4, 1).tolist() == [999, 749, 499, 249]
    assert equations.linspace_timesteps(1000, 4, 1).tolist() == [999, 666, 333, 0]


def test_all_timesteps_before_set_timesteps():
    assert DDPMScheduler(5).timesteps.tolist() == DDIMScheduler(5).timesteps.tolist() == [4, 3, 2, 1, 0]
    assert DDIMInverseScheduler(5).timesteps.tolist() == [0, 1, 2, 3, 4]
    assert len(DDIMScheduler(5)) == 5


@every_class
def test_trailing_warns_of_the_step_too_many(cls):
    with pytest.warns(UserWarning, match="61 steps to 62, the last at timestep -1"):
        ready(cls, 61, timestep_spacing="trailing")


def test_custom_timesteps():
    scheduler = DDPMScheduler(**SD15)
    scheduler.set_timesteps(timesteps=torch.tensor([900, 30, 0]))
    assert scheduler.timesteps.tolist() == [900, 30, 0]
    assert [scheduler.previous_timestep(t) for t in (900, 30, 0)] == [30, 0, -1]
    scheduler.set_timesteps(4)
    assert scheduler.previous_timestep(751) == 501


def test_timesteps_go_to_the_device():
    for cls in CLASSES:
        scheduler = cls()
        scheduler.set_timesteps(4, device="meta")
        assert scheduler.timesteps.device.type == "meta"


# ---------------------------------------------------- steps


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@every_class
def test_a_perfect_model_is_believed(cls, prediction):
    """A model that knows x0 and noise gets them back, and DDIM ends where `add_noise` would."""
    x0, eps = noise(1), noise(2)
    scheduler = ready(cls, 10, prediction_type=prediction)
    t = int(scheduler.timesteps[4])
    here = t - 100 if cls is DDIMInverseScheduler else t
    there = t if cls is DDIMInverseScheduler else t - 100
    x = equations.add_noise(x0, eps, scheduler.alphas_cumprod[here])
    said = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": equations.velocity(x0, eps, scheduler.alphas_cumprod[here]),
    }
    result = scheduler.step(said[prediction], t, x)
    torch.testing.assert_close(result.pred_original_sample, x0, rtol=1e-4, atol=1e-5)
    if cls is not DDPMScheduler:
        wanted = equations.add_noise(x0, eps, scheduler.alphas_cumprod[there])
        torch.testing.assert_close(result.prev_sample, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_has_the_mean_and_variance_of_the_posterior(variance):
    scheduler = ready(DDPMScheduler, 10, variance_type=variance)
    x, eps = torch.full((1, 1, 300, 300), 0.7), torch.full((1, 1, 300, 300), 0.2)
    result = scheduler.step(eps, 501, x, generator=seeded())
    a, b = scheduler.alphas_cumprod[[501, 401]].tolist()
    variances = {"small": (1 - b) / (1 - a) * (1 - a / b), "large": 1 - a / b}
    x0 = (0.7 - (1 - a) ** 0.5 * 0.2) / a**0.5
    mean = (b**0.5 * (1 - a / b) * x0 + (a / b) ** 0.5 * (1 - b) * 0.7) / (1 - a)
    assert result.prev_sample.mean() == pytest.approx(mean, abs=0.01)
    assert result.prev_sample.var() == pytest.approx(variances[variance.split("_")[1]], rel=0.02)


def test_ddim_with_eta_1_is_ddpm():
    ddim, ddpm = ready(DDIMScheduler, 10), ready(DDPMScheduler, 10)
    x, eps = noise(1), noise(2)
    one = ddim.step(eps, 501, x, eta=1.0, generator=seeded()).prev_sample
    other = ddpm.step(eps, 501, x, generator=seeded()).prev_sample
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_learned_range_lies_between_small_and_large():
    a, b = DDPMScheduler(**SD15).alphas_cumprod[[501, 401]]
    small, large = (equations.ddpm_noise_scale(kind, a, b) for kind in ("fixed_small", "fixed_large"))
    for said, wanted in ((-1.0, small), (1.0, large)):
        got = equations.ddpm_noise_scale("learned_range", a, b, torch.tensor(said))
        assert float(got) == pytest.approx(float(wanted), rel=1e-4)


def test_chance():
    """DDIM draws nothing. DDPM draws once a step, at timestep 1 too (SD 1.5's last), but not at 0."""
    x = noise()
    for cls, t, drawn in (
        (DDIMScheduler, 501, 0),
        (DDPMScheduler, 501, 1),
        (DDPMScheduler, 1, 1),
        (DDPMScheduler, 0, 0),
    ):
        generator = seeded(3)
        scheduler = cls(**SD15) if t == 0 else ready(cls)
        scheduler.step(x, t, x, generator=generator)
        reference = seeded(3)
        for _ in range(drawn):
            torch.randn(SHAPE, generator=reference)
        assert torch.equal(generator.get_state(), reference.get_state()), (cls, t)


def test_one_generator_per_sample_makes_samples_independent():
    device, dtype = torch.device("cpu"), torch.float32
    pair = draw_noise(torch.Size(SHAPE), [seeded(1), seeded(2)], device, dtype)
    alone = draw_noise(torch.Size((1, *SHAPE[1:])), seeded(2), device, dtype)
    assert torch.equal(pair[1:], alone)


def test_inversion_and_sampling_undo_each_other():
    down, up = (ready(cls, 1000, steps_offset=0) for cls in (DDIMScheduler, DDIMInverseScheduler))
    start = x = noise(shape=(1, 2, 3, 3)) * 0.5

    def model(x, t):
        return 0.1 * x

    for t in up.timesteps:
        x = up.step(model(x, t), t, x).prev_sample
    assert (x - start).abs().max() > 0.1
    for t in down.timesteps:
        x = down.step(model(x, t), t, x).prev_sample
    torch.testing.assert_close(x, start, rtol=0.02, atol=0.005)


def test_clipping_and_thresholding():
    x, eps = 30 * noise(1), noise(2)
    x0 = ready(DDIMScheduler).step(eps, 501, x).pred_original_sample
    clipped = ready(DDIMScheduler, clip_sample=True, clip_sample_range=2.0).step(eps, 501, x).pred_original_sample
    assert torch.equal(clipped, x0.clamp(-2, 2))
    arguments = {"thresholding": True, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 1000.0}
    squeezed = ready(DDIMScheduler, **arguments).step(eps, 501, x).pred_original_sample
    median = x0.abs().flatten(1).quantile(0.5, dim=1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(squeezed, (x0 / median).clamp(-1, 1))


def test_small_x0_is_not_thresholded():
    x0 = noise() * 0.1
    assert torch.equal(equations.dynamic_threshold(x0, 0.9, 5.0), x0)


def test_add_noise_and_velocity():
    scheduler, x0, eps = DDPMScheduler(**SD15), noise(1), noise(2)
    t = torch.tensor([10, 900])
    a = scheduler.alphas_cumprod[t].reshape(2, 1, 1, 1)
    torch.testing.assert_close(scheduler.add_noise(x0, eps, t), a.sqrt() * x0 + (1 - a).sqrt() * eps)
    torch.testing.assert_close(scheduler.get_velocity(x0, eps, t), a.sqrt() * eps - (1 - a).sqrt() * x0)
    torch.testing.assert_close(scheduler.add_noise(x0, eps, t[1])[1], scheduler.add_noise(x0, eps, t)[1])


@every_class
def test_step_leaves_its_arguments_alone(cls):
    scheduler, x, eps = ready(cls, clip_sample=True), noise(1), noise(2)
    scheduler.step(eps, 501, x)
    assert torch.equal(x, noise(1))
    assert torch.equal(eps, noise(2))


@every_class
@pytest.mark.parametrize("t", [501, torch.tensor(501), torch.tensor([501]), np.int64(501)], ids=repr)
def test_what_may_be_a_timestep(cls, t):
    outcomes = []
    for timestep in (501, t):
        torch.manual_seed(0)
        outcomes.append(ready(cls).step(noise(1), timestep, noise(2)))
    assert torch.equal(outcomes[0].prev_sample, outcomes[1].prev_sample)
    assert outcomes[1][0] is outcomes[1].prev_sample


@pytest.mark.parametrize("cls", (DDIMScheduler, DDPMScheduler))
@pytest.mark.parametrize("spacing", ("trailing", "linspace"))
def test_zero_terminal_snr_with_epsilon_is_told(cls, spacing):
    """The first step divides by alpha_bar = 0; a model that predicts v, or a run that begins below, does not."""

    def first_step(kind, **settings):
        scheduler = ready(kind, rescale_betas_zero_snr=True, **settings)
        scheduler.step(noise(1), scheduler.timesteps[0], noise(2))

    with pytest.warns(UserWarning, match="zero terminal SNR.*timestep 999"):
        first_step(cls, timestep_spacing=spacing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_step(cls, timestep_spacing=spacing, prediction_type="v_prediction")
        first_step(cls, timestep_spacing="leading")
        first_step(DDIMInverseScheduler, timestep_spacing="trailing")


# ---------------------------------------------------- configuration


def test_config_is_read_only():
    config = DDIMScheduler(**SD15).config
    assert config.beta_start == config["beta_start"] == dict(config)["beta_start"] == 0.00085
    assert not hasattr(config, "variance_type")
    with pytest.raises(TypeError, match="from_config"):
        config.beta_start = 1
    with pytest.raises(TypeError, match="from_config"):
        config["beta_start"] = 1
    with pytest.raises(TypeError, match="from_config"):
        config.update(beta_start=1)
    with pytest.raises(AttributeError, match=r"no 'beta_strat'.*beta_start"):
        _ = config.beta_strat


def test_config_goes_through_other_schedulers_unharmed():
    first = DDPMScheduler(**SD15, variance_type="fixed_large", thresholding=True)
    through = DDIMInverseScheduler.from_config(DDIMScheduler.from_config(first.config).config)
    assert DDPMScheduler.from_config(through.config).config == first.config


def test_config_that_is_not_ours_has_no_effect():
    config = {**SD15, "_class_name": "Other", "_private": 1, "skip_prk_steps": True}
    scheduler = DDIMScheduler.from_config(config, steps_offset=0)
    assert scheduler.config.skip_prk_steps is True
    assert scheduler.config.steps_offset == 0
    assert scheduler.config.beta_start == 0.00085
    assert "_private" not in scheduler.config
    with pytest.raises(TypeError, match="beta_strat"):
        DDIMScheduler.from_config(config, beta_strat=0.1)


def test_what_was_never_chosen_is_not_passed_on():
    config = {"set_alpha_to_one": False, "steps_offset": 1, "_use_default_values": ["set_alpha_to_one"]}
    scheduler = DDIMScheduler.from_config(config)
    assert (scheduler.config.set_alpha_to_one, scheduler.config.steps_offset) == (True, 1)


def test_what_was_never_chosen_is_marked_in_the_config_and_survives():
    """The mark is diffusers': a scheduler made from the config of one made from a config takes its own defaults too."""
    first = DDIMScheduler(beta_end=0.012)
    assert "clip_sample_range" in first.config["_use_default_values"]
    second = DDPMScheduler.from_config(first.config)
    assert second.config.beta_end == 0.012
    assert {"clip_sample_range", "variance_type"} <= set(second.config["_use_default_values"])
    assert "beta_end" not in second.config["_use_default_values"]


def test_a_result_answers_as_diffusers_does():
    result = ready(DDIMScheduler).step(noise(1), 501, noise(2))
    assert list(result.keys()) == ["prev_sample", "pred_original_sample"]
    for index, name in enumerate(result.keys()):
        for got in (getattr(result, name), result[name], result[index], result.to_tuple()[index]):
            assert got is result.values()[index]
    prev_sample, x0 = result
    assert result[:1] == (prev_sample,) and dict(result) == {"prev_sample": prev_sample, "pred_original_sample": x0}
    with pytest.raises((KeyError, TypeError)):
        _ = result["prev"]


@every_class
def test_every_step_takes_eta_and_generator(cls):
    """So that a sampling loop need not ask; at eta 0, DDIM and its inverse draw nothing."""
    one, other = (ready(cls).step(noise(1), 501, noise(2), eta=0.0, generator=seeded()) for _ in range(2))
    assert torch.equal(one.prev_sample, other.prev_sample)


@every_class
def test_copies(cls):
    scheduler = ready(cls)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert other.config == scheduler.config
        assert torch.equal(other.timesteps, scheduler.timesteps)
    assert pickle.loads(pickle.dumps(scheduler.config)) == scheduler.config


@every_class
def test_save_and_load(cls, tmp_path):
    scheduler = cls(**SD15, num_train_timesteps=np.int64(3), trained_betas=np.array([0.1, 0.2, 0.3]))
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    again = cls.from_pretrained(tmp_path / "model", subfolder="scheduler")
    unlike = {"trained_betas": (), "_use_default_values": ()}  # a file has no mark of what was left at its default
    assert {**again.config, **unlike} == {**scheduler.config, **unlike}
    assert torch.equal(again.betas, scheduler.betas)
    assert [path.name for path in (tmp_path / "model" / "scheduler").iterdir()] == ["scheduler_config.json"]
    assert cls.from_pretrained(tmp_path / "model" / "scheduler", steps_offset=7).config.steps_offset == 7


def test_nothing_is_written_when_writing_fails(tmp_path):
    scheduler = DDIMScheduler.from_config({"something": object()})
    with pytest.raises(AttributeError):
        scheduler.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[]", "is not a JSON object"), (None, "is missing")])
def test_files_that_cannot_be_used(text, said, tmp_path):
    path = tmp_path / "scheduler_config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        DDIMScheduler.from_pretrained(tmp_path)
    assert str(path) in str(error.value)


def test_a_bad_value_in_a_file_is_named(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"beta_end": 3}))
    with pytest.raises(ValueError, match=r"beta_end=3: must be"):
        DDIMScheduler.from_pretrained(tmp_path)


# ---------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10.5},
        {"beta_start": 0.0},
        {"beta_start": "0.1"},
        {"beta_end": 1.0},
        {"beta_end": -0.1},
        {"beta_end": float("nan")},
        {"beta_schedule": "cosine"},
        {"prediction_type": "v"},
        {"timestep_spacing": "even"},
        {"steps_offset": -1},
        {"steps_offset": 0.5},
        {"clip_sample_range": 0},
        {"clip_sample_range": float("nan")},
    ],
    ids=str,
)
@every_class
def test_bad_arguments(cls, arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=rf"^{name}={value!r}: must be "):
        cls(**arguments)


OF_ONE_CLASS = [
    (DDPMScheduler, {"variance_type": "small"}, "one of 'fixed_small', 'fixed_small_log', "),
    (DDIMScheduler, {"beta_schedule": "sigmoid"}, "one of 'linear', 'scaled_linear', 'squaredcos_cap_v2'"),
    (DDIMInverseScheduler, {"timestep_spacing": "linspace"}, "one of 'leading', 'trailing'"),
    (DDIMScheduler, {"dynamic_thresholding_ratio": 1.1}, "a number from 0 to 1"),
    (DDIMScheduler, {"sample_max_value": 0.0}, "a number above 0"),
    (
        DDIMScheduler,
        {"rescale_betas_zero_snr": True, "num_train_timesteps": 1},
        "False for a schedule of one",
    ),
]


@pytest.mark.parametrize(("cls", "arguments", "allowed"), OF_ONE_CLASS, ids=str)
def test_bad_arguments_of_one_class(cls, arguments, allowed):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=rf"^{name}={value!r}: must be {allowed}"):
        cls(**arguments)


def test_bad_trained_betas():
    with pytest.raises(ValueError, match=r"^len\(trained_betas\)=1: must be num_train_timesteps, 2$"):
        DDIMScheduler(2, trained_betas=[0.1])
    with pytest.raises(ValueError, match=r"^trained_betas\[1\]=0.0: must be above 0 and at most 1$"):
        DDIMScheduler(2, trained_betas=[0.1, 0.0])


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", None])
@every_class
def test_bad_number_of_steps(cls, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps={steps!r}"):
        cls().set_timesteps(steps)


@pytest.mark.parametrize("timesteps", [[], [10, 10], [10, 20], [1000, 1], [5, -1], [3.5]], ids=str)
def test_bad_custom_timesteps(timesteps):
    with pytest.raises(ValueError, match=r"^timesteps="):
        DDPMScheduler().set_timesteps(timesteps=timesteps)


def test_custom_timesteps_and_a_number_of_steps():
    with pytest.raises(ValueError, match="give one of the two"):
        DDPMScheduler().set_timesteps(3, timesteps=[3, 2, 1])


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_step_before_set_timesteps(cls):
    with pytest.raises(ValueError, match="call set_timesteps"):
        cls().step(noise(), 500, noise())


@pytest.mark.parametrize("t", [-1, 1000, 1.5, torch.tensor([1, 2])], ids=str)
@every_class
def test_bad_timestep(cls, t):
    with pytest.raises(ValueError, match=r"^timestep="):
        ready(cls).step(noise(), t, noise())


def test_timestep_that_ddpm_does_not_visit():
    with pytest.raises(ValueError, match="timestep=500: must be one of the scheduler's timesteps"):
        ready(DDPMScheduler).step(noise(), 500, noise())


@every_class
def test_too_many_steps_for_the_offset(cls):
    scheduler = ready(cls, 1000)
    t = int(scheduler.timesteps.max())
    with pytest.raises(ValueError, match="timestep=1000: must be a whole number from 0 to 999"):
        scheduler.step(noise(), t, noise())


@every_class
def test_bad_shapes(cls):
    with pytest.raises(ValueError, match=r"model_output.shape=\(2, 8, 3, 5\): must be the shape of sample"):
        ready(cls).step(noise(shape=(2, 8, 3, 5)), 501, noise())


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_needs_the_channels_for_it(variance):
    with pytest.raises(ValueError, match=f"variance_type='{variance}': must be a fixed one for a model_output of 4"):
        ready(DDPMScheduler, variance_type=variance).step(noise(), 501, noise())


@pytest.mark.parametrize("eta", [-0.1, float("nan"), "1"])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match=f"eta={eta!r}: must be a number, at least 0"):
        ready(DDIMScheduler).step(noise(), 501, noise(), eta=eta)


def test_noise_and_generator():
    with pytest.raises(ValueError, match="variance_noise and generator"):
        ready(DDIMScheduler).step(noise(), 501, noise(), eta=1.0, generator=seeded(), variance_noise=noise())


@pytest.mark.parametrize("count", [0, 2])
def test_too_few_generators(count):
    generators = [seeded() for _ in range(count)]
    with pytest.raises(ValueError, match="must be one, or one for each of 3 samples"):
        ready(DDPMScheduler).step(noise(shape=(3, 4)), 501, noise(shape=(3, 4)), generator=generators)


@pytest.mark.parametrize("t", [[-1, 5], [5, 1000]], ids=str)
def test_add_noise_at_no_timestep(t):
    for method in (DDPMScheduler().add_noise, DDPMScheduler().get_velocity):
        with pytest.raises(ValueError, match="timesteps="):
            method(noise(), noise(), torch.tensor(t))


@pytest.mark.parametrize("config", [None, "folder", [1]], ids=repr)
def test_config_that_is_no_mapping(config):
    with pytest.raises(ValueError, match=r"^config=.*must be a mapping"):
        DDIMScheduler.from_config(config)
