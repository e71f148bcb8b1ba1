"""The schedulers after DDPM and DDIM against diffusers, live and bit for bit: tables, trajectories, random streams.

Each argument of each class is varied on its own, from two starting points, diffusers' defaults and SD 1.5's, and for
several numbers of steps.
"""

import warnings

import numpy as np
import pytest
import torch

from minisd import schedulers as ours

theirs = pytest.importorskip("diffusers")
pytest.importorskip("scipy")

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True}
BETAS = np.random.RandomState(0).uniform(1e-4, 0.02, 1000).tolist()
COMMON = [
    {},
    V,
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": BETAS},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"steps_offset": 0},
    {"num_train_timesteps": 500},
]
SAMPLE = [{"prediction_type": "sample"}]
SPACED = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_karras_sigmas": True, "timestep_spacing": "leading"},
    {"use_karras_sigmas": True, **V},
]
FINAL = [{"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}]
ZERO = [ZERO_SNR, {**ZERO_SNR, "timestep_spacing": "trailing"}]
THRESHOLD = [{"thresholding": True}, {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 2.5}]
PLAIN_DPM = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
SDE_DPM = {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
DPM = [
    *({"solver_order": order} for order in (1, 3)),
    {"solver_type": "heun"},
    {"lower_order_final": False},
    {"euler_at_final": True},
    {"solver_order": 3, "lower_order_final": False},
    {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
    {"solver_type": "bh2"},
    *({**SDE, "solver_order": order} for order in (1, 2, 3)),
    {**SDE, "solver_type": "heun"},
    {**SDE, "use_karras_sigmas": True},
    *({**PLAIN_DPM, "solver_order": order} for order in (1, 2, 3)),
    {**PLAIN_DPM, "solver_type": "heun"},
    {**PLAIN_DPM, **V},
    {**PLAIN_DPM, "prediction_type": "sample"},
    {**PLAIN_DPM, "thresholding": True},
    {**SDE_DPM, "solver_order": 1},
    SDE_DPM,
    {**SDE_DPM, "solver_type": "heun"},
]
UNIPC = [
    *({"solver_order": order} for order in (1, 3)),
    {"solver_type": "bh1"},
    {"solver_type": "bh1", "solver_order": 3},
    {"predict_x0": False},
    {"predict_x0": False, "solver_order": 3},
    {"predict_x0": False, "prediction_type": "sample"},
    {"predict_x0": False, **V},
    {"lower_order_final": False},
    {"disable_corrector": [0, 2]},
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0},
]
EULER = [
    {"interpolation_type": "log_linear"},
    {"timestep_type": "continuous", **V},
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0},
]
HEUN = [{"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.5}, {"beta_schedule": "exp"}]
PNDM = [{"skip_prk_steps": True}, {"set_alpha_to_one": True}, {"skip_prk_steps": True, "set_alpha_to_one": True, **V}]
PNDM += [{"skip_prk_steps": True, "timestep_spacing": spacing} for spacing in ("linspace", "trailing")]
LCM = [{"clip_sample": True}, {"set_alpha_to_one": False}, {"original_inference_steps": 100}, {"timestep_scaling": 7.0}]
ARGUMENTS = {
    "PNDMScheduler": [*COMMON, *PNDM],
    "LMSDiscreteScheduler": [*COMMON, *SAMPLE, *SPACED],
    "EulerDiscreteScheduler": [*COMMON, *SAMPLE, *SPACED, *ZERO, *FINAL, *EULER],
    "EulerAncestralDiscreteScheduler": [*COMMON, *ZERO],
    "HeunDiscreteScheduler": [*COMMON, *SAMPLE, *SPACED, *HEUN],
    "DPMSolverMultistepScheduler": [*COMMON, *SAMPLE, *SPACED, *ZERO, *FINAL, *THRESHOLD, *DPM],
    "UniPCMultistepScheduler": [*COMMON, *SAMPLE, *SPACED, *ZERO, *FINAL, *THRESHOLD, *UNIPC],
    "LCMScheduler": [*COMMON[:5], *SAMPLE, *ZERO, *THRESHOLD, *LCM],
}
CASES = [(name, {**base, **extra}) for name, cases in ARGUMENTS.items() for base in ({}, SD15) for extra in cases]


def case_id(value):
    if not isinstance(value, dict):
        return str(value).removesuffix("Scheduler")
    base = "sd15" if "beta_start" in value else "defaults"
    return "-".join([base, *(f"{k}={v}" for k, v in value.items() if np.ndim(v) == 0 and SD15.get(k) != v)])


def make_both(name, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # two of DPM-Solver's algorithms
        return getattr(ours, name)(**arguments), getattr(theirs, name)(**arguments)


def walk(scheduler, steps, scale=1.0, dtype=torch.float32, **arguments):
    """Every sample on the way through all timesteps, what the model was given, and the state of the generator."""
    generator = torch.Generator().manual_seed(5)
    if any(word in type(scheduler).__name__ for word in ("Ancestral", "DPM", "LCM")):
        arguments["generator"] = generator
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x * scale * scheduler.init_noise_sigma
    seen = []
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        output = (0.3 * given + torch.sin(t.float())).to(dtype)
        x = scheduler.step(output, t, x, **arguments).prev_sample
        seen += [given, x]
    return seen, generator.get_state()


def assert_same(mine, reference, steps, **settings):
    (one, state), (other, other_state) = (walk(scheduler, steps, **settings) for scheduler in (mine, reference))
    assert torch.equal(mine.timesteps, reference.timesteps)
    assert torch.equal(torch.as_tensor(mine.init_noise_sigma), torch.as_tensor(reference.init_noise_sigma))
    if hasattr(reference, "sigmas"):
        assert torch.equal(mine.sigmas, reference.sigmas)
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), f"value {index}"
    assert torch.isfinite(one[-1]).all() == torch.isfinite(other[-1]).all()
    assert torch.equal(state, other_state)


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=case_id)
def test_every_argument(name, arguments):
    for steps in (5, 20) if name != "LCMScheduler" else (1, 4):
        assert_same(*make_both(name, arguments), steps)


@pytest.mark.parametrize("name", ARGUMENTS, ids=case_id)
@pytest.mark.parametrize("steps", (4, 7, 13, 30, 50))
def test_numbers_of_steps(name, steps):
    assert_same(*make_both(name, SD15), steps)
    assert_same(*make_both(name, SD15), steps, scale=0.01)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ARGUMENTS, ids=case_id)
def test_half_precision(name, dtype):
    assert_same(*make_both(name, SD15), 10, dtype=dtype)


@pytest.mark.parametrize("name", ARGUMENTS, ids=case_id)
def test_forward_process(name):
    mine, reference = make_both(name, SD15)
    x, noise = (torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for scheduler in (mine, reference):
        scheduler.set_timesteps(10)
    chosen = reference.timesteps[[1, 4, 7]]
    assert torch.equal(mine.add_noise(x, noise, chosen), reference.add_noise(x, noise, chosen))
    if hasattr(reference, "get_velocity"):
        assert torch.equal(mine.get_velocity(x, noise, chosen), reference.get_velocity(x, noise, chosen))


@pytest.mark.parametrize("name", ARGUMENTS, ids=case_id)
def test_configuration(name, tmp_path):
    """The same arguments with the same defaults; each reads the other's file; SD 1.5's configuration of PNDM serves."""
    mine, reference = make_both(name, {})
    assert {k: v for k, v in mine.config.items() if not k.startswith("_")} == {
        k: v for k, v in reference.config.items() if not k.startswith("_")
    }
    mine.save_pretrained(tmp_path)
    kind = getattr(theirs, name)
    assert_same(getattr(ours, name).from_pretrained(tmp_path), kind.from_pretrained(tmp_path), 4)
    pndm = theirs.PNDMScheduler(**SD15, skip_prk_steps=True).config
    assert_same(getattr(ours, name).from_config(pndm), kind.from_config(pndm), 4)


def test_euler_takes_churn_and_given_steps():
    for arguments in ({"s_churn": 4.0}, {"s_churn": 4.0, "s_tmin": 1.0, "s_noise": 1.01}):
        mine, reference = make_both("EulerDiscreteScheduler", SD15)
        for scheduler in (mine, reference):
            arguments = {**arguments, "generator": torch.Generator().manual_seed(3)}
            scheduler.walked = walk(scheduler, 10, **arguments)[0]
        assert all(torch.equal(a, b) for a, b in zip(mine.walked, reference.walked, strict=True))


@pytest.mark.parametrize(
    ("name", "given"),
    (
        ("EulerDiscreteScheduler", {"timesteps": [900, 500.5, 100]}),
        ("EulerDiscreteScheduler", {"sigmas": [10.0, 4.0, 1.0, 0.0]}),
        ("HeunDiscreteScheduler", {"timesteps": [900, 500, 100]}),
        ("DPMSolverMultistepScheduler", {"timesteps": [900, 500, 100]}),
        ("LCMScheduler", {"timesteps": [999, 499, 19]}),
        ("LCMScheduler", {"num_inference_steps": 4, "strength": 0.5}),
        ("LCMScheduler", {"num_inference_steps": 4, "original_inference_steps": 20}),
    ),
    ids=str,
)
def test_given_steps(name, given):
    mine, reference = make_both(name, SD15)
    for scheduler in (mine, reference):
        scheduler.set_timesteps(**given)
    assert torch.equal(mine.timesteps, reference.timesteps)
    if hasattr(reference, "sigmas"):
        assert torch.equal(mine.sigmas, reference.sigmas)


@pytest.mark.parametrize("name", ("HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"))
def test_a_run_may_start_in_the_middle(name):
    """As image to image does: noise is added for the first timestep taken, which may stand twice."""
    arguments = {**SD15, "use_karras_sigmas": True}
    mine, reference = make_both(name, arguments)
    x, noise = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    ends = []
    for scheduler in (mine, reference):
        scheduler.set_timesteps(10)
        start = 4 * scheduler.order
        scheduler.set_begin_index(start)
        latents = scheduler.add_noise(x, noise, scheduler.timesteps[start : start + 1])
        for t in scheduler.timesteps[start:]:
            output = 0.3 * scheduler.scale_model_input(latents, t) + torch.sin(t.float())
            latents = scheduler.step(output, t, latents).prev_sample
        ends.append(latents)
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("name", "arguments"),
    (
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "last"}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}),
        ("PNDMScheduler", {"prediction_type": "sample"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
        ("DPMSolverMultistepScheduler", {"solver_type": "euler"}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("UniPCMultistepScheduler", {"solver_type": "bh3"}),
        ("UniPCMultistepScheduler", {"solver_order": 0}),
    ),
    ids=str,
)
def test_impossible_arguments(name, arguments):
    with pytest.raises(ValueError, match=f"^({'|'.join(arguments)}|final_sigmas_type)="):
        getattr(ours, name)(**arguments)


def test_an_index_is_not_a_timestep():
    scheduler = ours.EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"timestep=0: must be one of `scheduler.timesteps`"):
        scheduler.step(torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("said", "kind", "arguments"),
    (
        ("ddim", "DDIMScheduler", {}),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmpp_3m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler", {}),
        ("uni_pc", "UniPCMultistepScheduler", {}),
        ("PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
        ("LMS Karras", "LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    ),
)
def test_names(said, kind, arguments):
    assert ours.named(said) == (getattr(ours, kind), arguments)


@pytest.mark.parametrize("said", ("eular", "", "ddim karras", "euler a karras"))
def test_unknown_names(said):
    with pytest.raises(ValueError, match=r"scheduler=.*must be one of ddim, ddpm, pndm"):
        ours.named(said)
