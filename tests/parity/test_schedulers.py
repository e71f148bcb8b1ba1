"""The schedulers against diffusers, live: same tables, same whole trajectories, same random stream.

Everything here is bit for bit. The model is a cheap function of sample and timestep, since only the
schedulers are on trial. Each argument of each class is varied on its own, from two starting points:
diffusers' defaults and SD 1.5's.
"""

import json

import numpy as np
import pytest
import torch

from minisd import schedulers as ours

theirs = pytest.importorskip("diffusers")

SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
SD15_PNDM_FILE = {  # the scheduler_config.json that SD 1.5 comes with
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
NAMES = ["DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"]
V_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
RANDOM_BETAS = np.random.RandomState(0).uniform(1e-4, 0.02, 1000)

COMMON = [
    {},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_start": 0.001, "beta_end": 0.03},
    {"trained_betas": RANDOM_BETAS},
    {"trained_betas": RANDOM_BETAS.tolist()},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.5},
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction"},
    {"timestep_spacing": "trailing"},
    {"steps_offset": 0},
    {"steps_offset": 3},
    {**V_ZERO_SNR, "timestep_spacing": "trailing"},
    {**V_ZERO_SNR, "beta_schedule": "squaredcos_cap_v2"},
]
PIXELS = [
    {"timestep_spacing": "linspace"},
    {"thresholding": True},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 2.5, "clip_sample": True},
    {"thresholding": True, "sample_max_value": 0.5},
]
ENDS = [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}]
ARGUMENTS = {
    "DDPMScheduler": [
        *COMMON,
        *PIXELS,
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
        {"variance_type": "fixed_small_log"},
        {"variance_type": "fixed_large"},
        {"variance_type": "learned"},
        {"variance_type": "learned_range"},
    ],
    "DDIMScheduler": [*COMMON, *PIXELS, *ENDS, {"num_train_timesteps": 999, "timestep_spacing": "trailing"}],
    "DDIMInverseScheduler": [
        *(case for case in COMMON if case.get("prediction_type") != "sample"),
        {"prediction_type": "sample", "set_alpha_to_one": False},  # True divides by zero: see below
        *ENDS,
    ],
}
CASES = [(name, {**base, **extra}) for name in NAMES for base in ({}, SD15) for extra in ARGUMENTS[name]]


def case_id(value):
    if not isinstance(value, dict):
        return str(value).removesuffix("Scheduler")
    base = "sd15" if value.items() >= {"beta_start": 0.00085}.items() else "defaults"
    extra = {k: v if np.isscalar(v) else type(v).__name__ for k, v in value.items() if np.ndim(v) or SD15.get(k) != v}
    return "-".join([base, *(f"{key}={what}" for key, what in extra.items())])


every_case = pytest.mark.parametrize(("name", "arguments"), CASES, ids=case_id)
every_class = pytest.mark.parametrize("name", NAMES, ids=case_id)


def make_both(name, arguments):
    return getattr(ours, name)(**arguments), getattr(theirs, name)(**arguments)


def model(x, t, variance_type=""):
    """Any function will do, if it depends on everything that a model depends on."""
    output = 0.3 * x + torch.sin(torch.as_tensor(float(t)))
    return torch.cat([output, torch.sigmoid(x)], 1) if variance_type.startswith("learned") else output


def walk(scheduler, scale=1.0, seed=0, **step_arguments):
    """Every sample and every x0 on the way through all timesteps, stacked."""
    x = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(seed)) * scale
    variance_type = scheduler.config.get("variance_type", "")
    seen = []
    for t in scheduler.timesteps:
        result = scheduler.step(model(x, t, variance_type), t, x, **step_arguments)
        x = result.prev_sample
        seen += [result.pred_original_sample, x]
    return torch.stack(seen)


def assert_same_walk(mine, reference, scale=1.0, **step_arguments):
    """Same numbers, and as many random numbers drawn."""
    paths, states = [], []
    for scheduler in (mine, reference):
        generator = torch.Generator().manual_seed(5)
        chance = {} if "Inverse" in type(scheduler).__name__ else {"generator": generator}
        paths.append(walk(scheduler, scale, **chance, **step_arguments))
        states.append(generator.get_state())
    assert torch.isfinite(paths[0]).all()
    assert torch.equal(*paths)
    assert torch.equal(*states)


def assert_same_tables(mine, reference):
    for table in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        assert torch.equal(getattr(mine, table), getattr(reference, table)), table
    for value in ("one", "final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(reference, value):
            assert torch.equal(getattr(mine, value), getattr(reference, value)), value
    assert (mine.init_noise_sigma, mine.order, len(mine)) == (1.0, reference.order, len(reference))


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


# ---------------------------------------------------- construction and timesteps


@every_case
def test_tables(name, arguments):
    assert_same_tables(*make_both(name, arguments))


@every_class
@pytest.mark.parametrize("train_steps", [1, 2, 7, 999, 4000])
def test_other_numbers_of_training_timesteps(name, train_steps):
    mine, reference = make_both(name, {"num_train_timesteps": train_steps})
    assert_same_tables(mine, reference)
    for steps in {1, 2, train_steps // 3, train_steps} & set(range(1, train_steps + 1)):
        mine.set_timesteps(steps)
        reference.set_timesteps(steps)
        assert torch.equal(mine.timesteps, reference.timesteps)


@pytest.mark.filterwarnings("ignore:trailing spacing rounds")
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    ("name", "spacing"), [(name, s) for name in NAMES for s in getattr(ours, name).timestep_spacings]
)
def test_timesteps_for_every_number_of_steps(name, spacing, offset):
    mine, reference = make_both(name, {"timestep_spacing": spacing, "steps_offset": offset})
    for steps in range(1, 1001):
        mine.set_timesteps(steps)
        reference.set_timesteps(steps)
        assert torch.equal(mine.timesteps, reference.timesteps), steps
        assert mine.timesteps.dtype == reference.timesteps.dtype


def test_previous_timestep():
    mine, reference = make_both("DDPMScheduler", {})
    assert mine.previous_timestep(500) == reference.previous_timestep(500) == 499
    for choose in ({"num_inference_steps": 7}, {"timesteps": [900, 401, 400, 3]}):
        mine.set_timesteps(**choose)
        reference.set_timesteps(**choose)
        for t in reference.timesteps:
            assert mine.previous_timestep(t) == reference.previous_timestep(t)


# ---------------------------------------------------- whole trajectories


@pytest.mark.filterwarnings("ignore:trailing spacing rounds")  # 30 of 999
@every_case
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_trajectory(name, arguments, scale):
    mine, reference = make_both(name, arguments)
    for steps in (7, 30):
        mine.set_timesteps(steps)
        reference.set_timesteps(steps)
        assert_same_walk(mine, reference, scale)


@every_class
@pytest.mark.parametrize("steps", [1, 20, 50, 999])
def test_number_of_steps(name, steps):
    mine, reference = make_both(name, SD15)
    mine.set_timesteps(steps)
    reference.set_timesteps(steps)
    assert_same_walk(mine, reference)


@every_class
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_all_1000_steps(name, spacing):
    mine, reference = make_both(name, {**SD15, "steps_offset": 0, "timestep_spacing": spacing})
    mine.set_timesteps(1000)
    reference.set_timesteps(1000)
    assert_same_walk(mine, reference)


@pytest.mark.filterwarnings("ignore:trailing spacing rounds")
@every_class
def test_the_step_too_many_of_trailing(name):
    mine, reference = make_both(name, {**SD15, "timestep_spacing": "trailing"})
    mine.set_timesteps(61)
    reference.set_timesteps(61)
    assert len(mine.timesteps) == 62
    assert -1 in mine.timesteps
    assert_same_walk(mine, reference)


@pytest.mark.parametrize("arguments", [SD15, {**SD15, "set_alpha_to_one": False}, {"thresholding": True}], ids=case_id)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.3, 1.0, 1])
@pytest.mark.parametrize("clipped", [False, True])
def test_ddim_with_noise(arguments, spacing, prediction, eta, clipped):
    arguments = {**arguments, "timestep_spacing": spacing, "prediction_type": prediction}
    mine, reference = make_both("DDIMScheduler", arguments)
    mine.set_timesteps(15)
    reference.set_timesteps(15)
    assert_same_walk(mine, reference, eta=eta, use_clipped_model_output=clipped)


def test_ddim_use_clipped_model_output_matters():
    scheduler = ours.DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(10)
    assert not torch.equal(walk(scheduler), walk(scheduler, use_clipped_model_output=True))


def test_ddim_with_given_noise():
    mine, reference = make_both("DDIMScheduler", SD15)
    noise = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(9))
    for scheduler in (mine, reference):
        scheduler.set_timesteps(10)
    assert torch.equal(*(walk(s, eta=0.7, variance_noise=noise) for s in (mine, reference)))


@pytest.mark.parametrize(("name", "extra"), [("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 1.0})], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_lists_of_generators(name, extra, count):
    outcomes = []
    for scheduler in make_both(name, SD15):
        scheduler.set_timesteps(10)
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        path = walk(scheduler, generator=generators, **extra)
        outcomes.append([path, *(generator.get_state() for generator in generators)])
    for mine, reference in zip(*outcomes, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize(("name", "extra"), [("DDPMScheduler", {}), ("DDIMScheduler", {"eta": 1.0})], ids=str)
def test_the_global_random_stream(name, extra):
    outcomes = []
    for scheduler in make_both(name, SD15):
        torch.manual_seed(3)
        scheduler.set_timesteps(10)
        outcomes.append((walk(scheduler, **extra), torch.get_rng_state()))
    assert all(map(torch.equal, *outcomes))


@pytest.mark.parametrize("timesteps", [[999, 500, 499, 20, 1], [700], [30, 20, 0]], ids=str)
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_ddpm_custom_timesteps(timesteps, variance):
    mine, reference = make_both("DDPMScheduler", {**SD15, "variance_type": variance})
    for scheduler in (mine, reference):
        scheduler.set_timesteps(20)
        scheduler.set_timesteps(timesteps=timesteps)
    assert torch.equal(mine.timesteps, reference.timesteps)
    assert_same_walk(mine, reference)
    for scheduler in (mine, reference):
        scheduler.set_timesteps(20)
    assert_same_walk(mine, reference)


def test_ddpm_without_set_timesteps_walks_all_of_them():
    assert_same_walk(*make_both("DDPMScheduler", {"num_train_timesteps": 40}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("arguments", [SD15, {"thresholding": True, "sample_max_value": 1.5}], ids=case_id)
@every_class
def test_other_dtypes(name, arguments, dtype):
    if "Inverse" in name:
        arguments = {key: value for key, value in arguments.items() if key in SD15}
    outcomes = []
    for scheduler in make_both(name, arguments):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 4, 7, 9, generator=generator).to(dtype)
        chance = {} if "Inverse" in name else {"generator": generator}
        for t in scheduler.timesteps[::100]:
            scheduler.set_timesteps(1000)
            x = scheduler.step(0.3 * x, t, x, **chance).prev_sample
        outcomes.append(x)
    assert outcomes[0].dtype == dtype
    assert torch.equal(*outcomes)


@pytest.mark.parametrize(
    ("name", "arguments", "extra", "steps"),
    [
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, {}, 10),
        ("DDIMScheduler", {**SD15, **V_ZERO_SNR, "timestep_spacing": "trailing"}, {"eta": 1.0}, 10),
        ("DDIMInverseScheduler", {"prediction_type": "sample"}, {}, 10),
    ],
    ids=str,
)
def test_where_diffusers_is_not_a_number_neither_are_we(name, arguments, extra, steps):
    """The DDIM case takes the root of a variance that is zero up to rounding: below zero on some processors only."""
    paths = []
    for scheduler in make_both(name, arguments):
        scheduler.set_timesteps(steps)
        chance = {} if "Inverse" in name else {"generator": torch.Generator().manual_seed(0)}
        paths.append(walk(scheduler, **chance, **extra))
    assert name == "DDIMScheduler" or not torch.isfinite(paths[1]).all()
    torch.testing.assert_close(*paths, rtol=0, atol=0, equal_nan=True)


@every_class
def test_result_as_a_tuple(name):
    x = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(0))
    results = []
    for scheduler in make_both(name, {}):
        scheduler.set_timesteps(10)
        torch.manual_seed(0)
        results.append(scheduler.step(model(x, 500), 500, x, return_dict=False))
    mine, reference = results
    assert isinstance(mine, tuple)
    assert len(mine) == len(reference) == 2
    assert all(map(torch.equal, mine, reference))


# ---------------------------------------------------- into noise


@pytest.mark.parametrize("name", NAMES[:2], ids=case_id)
@pytest.mark.parametrize("arguments", [SD15, {}, {**V_ZERO_SNR, "beta_schedule": "squaredcos_cap_v2"}], ids=case_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4, 7, 9), (3, 5), (3, 4, 2, 7, 9)], ids=str)
@pytest.mark.parametrize("timesteps", [[0, 500, 999], [1], 321], ids=str)
def test_add_noise_and_velocity(name, arguments, dtype, shape, timesteps):
    mine, reference = make_both(name, arguments)
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    at = torch.tensor(timesteps)
    for method in ("add_noise", "get_velocity"):
        got, want = (getattr(scheduler, method)(x0, noise, at) for scheduler in (mine, reference))
        assert got.dtype == want.dtype == dtype
        assert torch.equal(got, want), method


def test_scale_model_input():
    x = torch.randn(2, 3)
    assert all(s.scale_model_input(x, 1) is x for name in NAMES for s in make_both(name, {}))


# ---------------------------------------------------- configuration


@every_class
def test_config_of_sd15_from_its_own_file(name):
    mine, reference = (getattr(library, name).from_config(dict(SD15_PNDM_FILE)) for library in (ours, theirs))
    assert public(mine.config) == public(reference.config)
    assert_same_tables(mine, reference)
    mine.set_timesteps(20)
    reference.set_timesteps(20)
    assert_same_walk(mine, reference)


@every_class
@pytest.mark.parametrize("source", [*NAMES, "PNDMScheduler", "EulerDiscreteScheduler"])
def test_config_from_a_diffusers_scheduler(name, source):
    arguments = {key: value for key, value in SD15.items() if key != "clip_sample"}
    config = getattr(theirs, source)(**arguments, num_train_timesteps=500).config
    mine, reference = (getattr(library, name).from_config(config) for library in (ours, theirs))
    assert public(mine.config) == public(reference.config)
    assert_same_tables(mine, reference)


@every_class
@pytest.mark.parametrize("source", NAMES)
def test_config_into_a_diffusers_scheduler(name, source):
    config = getattr(ours, source)(**SD15, num_train_timesteps=500, prediction_type="sample").config
    mine, reference = (getattr(library, name).from_config(config) for library in (ours, theirs))
    assert public(mine.config) == public(reference.config)
    assert_same_tables(mine, reference)


@every_class
@pytest.mark.parametrize("source", [*NAMES, "EulerDiscreteScheduler"])
@pytest.mark.parametrize("between", NAMES)
def test_config_through_two_schedulers(name, source, between):
    """What was left at its default is marked, in the second config as in the first."""
    given = getattr(theirs, source)(beta_end=0.012, timestep_spacing="trailing").config
    first = [getattr(library, between).from_config(given).config for library in (ours, theirs)]
    assert set(first[0]["_use_default_values"]) == set(first[1]["_use_default_values"])
    mine, reference = (
        getattr(library, name).from_config(config) for library, config in zip((ours, theirs), first, strict=True)
    )
    assert public(mine.config) == public(reference.config)
    assert set(mine.config["_use_default_values"]) == set(reference.config["_use_default_values"])


def test_config_overrides():
    config = theirs.PNDMScheduler(**{key: SD15[key] for key in ("beta_start", "beta_end", "beta_schedule")}).config
    pair = [
        library.DDIMScheduler.from_config(config, steps_offset=1, clip_sample=False, beta_end=0.02)
        for library in (ours, theirs)
    ]
    assert_same_tables(*pair)
    assert public(pair[0].config) == public(pair[1].config)


@every_class
def test_config_defaults(name):
    mine, reference = make_both(name, {})
    assert public(mine.config) == public(reference.config)


@pytest.mark.filterwarnings("ignore")  # diffusers deprecates the name
@pytest.mark.parametrize("value", [True, False])
def test_former_name_of_set_alpha_to_one(value):
    mine, reference = make_both("DDIMInverseScheduler", {"set_alpha_to_zero": value})
    assert_same_tables(mine, reference)
    assert mine.config.set_alpha_to_one is value  # diffusers' config keeps saying True


@every_case
def test_files_go_both_ways(name, arguments, tmp_path):
    mine, reference = make_both(name, arguments)
    mine.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    assert_same_tables(mine, getattr(theirs, name).from_pretrained(tmp_path / "ours"))
    assert_same_tables(getattr(ours, name).from_pretrained(tmp_path / "theirs"), reference)
    files = [json.loads((tmp_path / who / "scheduler_config.json").read_text()) for who in ("ours", "theirs")]
    assert public(files[0]) == public(files[1])
    assert files[0]["_class_name"] == files[1]["_class_name"] == name
